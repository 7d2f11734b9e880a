//! The gateway's clock: the wall clock read once at start, monotonic time from then on.

use crate::idempotency::Millis;
use rustix::time::{ClockId, clock_gettime};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Since some moment in the past, by a clock that nobody sets and that goes on while the machine sleeps.
#[must_use]
pub fn since_boot() -> Duration {
    #[cfg(feature = "failpoints")]
    if let Some(clock) = SIMULATED.get() {
        return clock();
    }
    let time = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(feature = "failpoints")]
thread_local! {
    static SIMULATED: std::cell::Cell<Option<fn() -> Duration>> = const { std::cell::Cell::new(None) };
}

/// From now on `since_boot` stands in for the system's clocks on this thread: for simulations.
#[cfg(feature = "failpoints")]
pub fn simulate(since_boot: fn() -> Duration) {
    SIMULATED.set(Some(since_boot));
}

/// Tells the time for expiry and records. A step of the system's clock does not move it.
#[derive(Clone, Debug)]
pub struct Clock(Kind);

#[derive(Clone, Debug)]
enum Kind {
    System { started: Instant, started_ms: u64 },
    Shared(Shared),
    Mock(Arc<AtomicU64>),
}

#[derive(Clone)]
struct Shared(Arc<dyn Fn() -> u64 + Send + Sync>);

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a shared store's")
    }
}

impl Clock {
    /// Reads the wall clock, never earlier than `not_before`: the newest time in the store.
    #[must_use]
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the system's clocks")]
    pub fn system(not_before: Millis) -> Self {
        #[cfg(feature = "failpoints")]
        if SIMULATED.get().is_some() {
            let ms = || u64::try_from(since_boot().as_millis()).unwrap_or(u64::MAX);
            let (started, started_ms) = (ms(), ms().max(not_before.0));
            return Self::shared(move || started_ms + (ms() - started));
        }
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let started_ms = u64::try_from(wall).unwrap_or(u64::MAX).max(not_before.0);
        Self(Kind::System { started: Instant::now(), started_ms })
    }

    /// The clock that all who share a store go by, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn shared(now_ms: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self(Kind::Shared(Shared(Arc::new(now_ms))))
    }

    /// A clock that stands still until [`Clock::advance`] moves it.
    #[must_use]
    pub fn mock(now: Millis) -> Self {
        Self(Kind::Mock(Arc::new(AtomicU64::new(now.0))))
    }

    #[must_use]
    pub fn now(&self) -> Millis {
        match &self.0 {
            Kind::System { started, started_ms } => {
                Millis(*started_ms).plus(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX))
            }
            Kind::Shared(shared) => Millis(shared.0()),
            Kind::Mock(now) => Millis(now.load(Ordering::Acquire)),
        }
    }

    /// Milliseconds since some moment in the past: nobody sets it, and it goes on while the machine sleeps. What a lease is
    /// counted by.
    #[must_use]
    pub fn monotonic_ms(&self) -> u64 {
        match &self.0 {
            Kind::Mock(now) => now.load(Ordering::Acquire),
            Kind::System { .. } | Kind::Shared(_) => u64::try_from(since_boot().as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// Moves a mock clock; a system clock is left alone.
    pub fn advance(&self, ms: u64) {
        if let Kind::Mock(now) = &self.0 {
            now.fetch_add(ms, Ordering::AcqRel);
        }
    }
}
