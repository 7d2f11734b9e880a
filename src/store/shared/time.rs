//! The store's clock, as a gateway knows it.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// For so long a better sample counts; a store whose clock is set back is followed after twice that time.
const WINDOW: Duration = Duration::from_secs(10);

/// Tells the store's time, from the times that its answers bear and the monotonic time since. Never later than the store's
/// own clock, as long as that is not set back: an answer was made before it arrived. Earlier by at most what the quickest
/// answer of the last seconds took on its way.
#[derive(Clone, Debug)]
pub struct StoreTime(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    started: Instant,
    /// The store's time at `started`, in milliseconds since the Unix epoch.
    offset_ms: AtomicI64,
    best: Mutex<Best>,
}

/// The latest that `offset_ms` can be, by the samples of this window and the one before.
#[derive(Debug)]
struct Best {
    began: Instant,
    this_window: i64,
    last_window: i64,
}

impl StoreTime {
    /// Begins with the first answer, which has just arrived.
    #[must_use]
    pub fn new(store_ms: u64) -> Self {
        let started = Instant::now();
        let offset = i64::try_from(store_ms).unwrap_or(i64::MAX);
        let best = Best { began: started, this_window: offset, last_window: offset };
        Self(Arc::new(Inner { started, offset_ms: AtomicI64::new(offset), best: Mutex::new(best) }))
    }

    /// An answer has just arrived that bears the store's time.
    pub fn told(&self, store_ms: u64) {
        let now = Instant::now();
        let offset = i64::try_from(store_ms).unwrap_or(i64::MAX).saturating_sub(self.elapsed_ms(now));
        let mut best = self.0.best.lock().unwrap_or_else(PoisonError::into_inner);
        if now.duration_since(best.began) >= WINDOW {
            *best = Best { began: now, this_window: offset, last_window: best.this_window };
        } else {
            best.this_window = best.this_window.max(offset);
        }
        self.0.offset_ms.store(best.this_window.max(best.last_window), Ordering::Release);
    }

    /// Milliseconds since the Unix epoch.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        let now = self.0.offset_ms.load(Ordering::Acquire).saturating_add(self.elapsed_ms(Instant::now()));
        u64::try_from(now).unwrap_or(0)
    }

    fn elapsed_ms(&self, now: Instant) -> i64 {
        i64::try_from(now.saturating_duration_since(self.0.started).as_millis()).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[tokio::test(start_paused = true)]
    async fn it_goes_on_between_answers_and_slow_ones_do_not_set_it_back() {
        let time = StoreTime::new(1_000_000);
        advance(MS(500)).await;
        assert_eq!(time.now_ms(), 1_000_500);
        // An answer that took 400 ms on its way.
        time.told(1_000_100);
        assert_eq!(time.now_ms(), 1_000_500);
        // A quicker one than the first.
        time.told(1_000_520);
        assert_eq!(time.now_ms(), 1_000_520);
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_set_is_followed() {
        let time = StoreTime::new(1_000_000);
        time.told(5_000_000);
        assert_eq!(time.now_ms(), 5_000_000, "forward, at once");
        advance(WINDOW).await;
        time.told(1_000_000);
        assert_eq!(time.now_ms(), 5_000_000 + 10_000, "back, not before the old samples have aged");
        advance(WINDOW).await;
        time.told(1_010_000);
        assert_eq!(time.now_ms(), 1_010_000);
        time.told(u64::MAX);
        let _ = time.now_ms();
    }
}
