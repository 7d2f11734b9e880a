//! The store's clock, as a gateway knows it.

use crate::clock::since_boot;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// For so long a better sample counts; a store whose clock is set back is followed after twice that time.
const WINDOW: Duration = Duration::from_secs(10);

/// Tells the store's time, from the times that its answers bear and the monotonic time since. Never later than the store's
/// own clock, as long as that is not set back: an answer was made before it arrived. Earlier by at most what the quickest
/// answer of the last seconds took on its way.
///
/// Between answers it counts as leases are counted, by a clock that goes on while the machine sleeps: after a nap the store's
/// time would be behind otherwise, and what has lapsed would not have.
#[derive(Clone, Debug)]
pub struct StoreTime(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Since the machine's boot, as all of its times here.
    started: Duration,
    /// The store's time at `started`, in milliseconds since the Unix epoch.
    offset_ms: AtomicI64,
    best: Mutex<Best>,
}

/// The latest that `offset_ms` can be, by the samples of this window and the one before.
#[derive(Debug)]
struct Best {
    began: Duration,
    this_window: i64,
    last_window: i64,
}

impl StoreTime {
    /// Begins with the first answer, which has just arrived.
    #[must_use]
    pub fn new(store_ms: u64) -> Self {
        Self::new_at(store_ms, since_boot())
    }

    /// An answer has just arrived that bears the store's time.
    pub fn told(&self, store_ms: u64) {
        self.told_at(store_ms, since_boot());
    }

    /// Milliseconds since the Unix epoch.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.at(since_boot())
    }

    fn new_at(store_ms: u64, now: Duration) -> Self {
        let offset = i64::try_from(store_ms).unwrap_or(i64::MAX);
        let best = Best { began: now, this_window: offset, last_window: offset };
        Self(Arc::new(Inner { started: now, offset_ms: AtomicI64::new(offset), best: Mutex::new(best) }))
    }

    fn told_at(&self, store_ms: u64, now: Duration) {
        let offset = i64::try_from(store_ms).unwrap_or(i64::MAX).saturating_sub(self.elapsed_ms(now));
        let mut best = self.0.best.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_sub(best.began) >= WINDOW {
            *best = Best { began: now, this_window: offset, last_window: best.this_window };
        } else {
            best.this_window = best.this_window.max(offset);
        }
        self.0.offset_ms.store(best.this_window.max(best.last_window), Ordering::Release);
    }

    fn at(&self, now: Duration) -> u64 {
        let now = self.0.offset_ms.load(Ordering::Acquire).saturating_add(self.elapsed_ms(now));
        u64::try_from(now).unwrap_or(0)
    }

    fn elapsed_ms(&self, now: Duration) -> i64 {
        i64::try_from(now.saturating_sub(self.0.started).as_millis()).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;
    /// The machine has been up for a while.
    const UP: Duration = Duration::from_secs(12_345);

    #[test]
    fn it_goes_on_between_answers_and_slow_ones_do_not_set_it_back() {
        let time = StoreTime::new_at(1_000_000, UP);
        let now = UP + MS(500);
        assert_eq!(time.at(now), 1_000_500);
        // An answer that took 400 ms on its way.
        time.told_at(1_000_100, now);
        assert_eq!(time.at(now), 1_000_500);
        // A quicker one than the first.
        time.told_at(1_000_520, now);
        assert_eq!(time.at(now), 1_000_520);
    }

    #[test]
    fn a_clock_that_is_set_is_followed() {
        let time = StoreTime::new_at(1_000_000, UP);
        time.told_at(5_000_000, UP);
        assert_eq!(time.at(UP), 5_000_000, "forward, at once");
        let now = UP + WINDOW;
        time.told_at(1_000_000, now);
        assert_eq!(time.at(now), 5_000_000 + 10_000, "back, not before the old samples have aged");
        let now = now + WINDOW;
        time.told_at(1_010_000, now);
        assert_eq!(time.at(now), 1_010_000);
        time.told_at(u64::MAX, now);
        let _ = time.at(now);
    }

    /// The runtime's clock stands still while the machine sleeps; so it does here.
    #[tokio::test(start_paused = true)]
    async fn it_does_not_go_by_a_clock_that_can_stand_still() {
        let time = StoreTime::new(1_000_000);
        let began = since_boot();
        while since_boot() < began + MS(20) {
            std::hint::spin_loop();
        }
        assert!(time.now_ms() >= 1_000_020);
    }
}
