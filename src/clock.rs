//! The gateway's clock: the wall clock read once at start, monotonic time from then on.

use crate::idempotency::Millis;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Tells the time for expiry and records. A step of the system's clock does not move it.
#[derive(Clone, Debug)]
pub struct Clock(Kind);

#[derive(Clone, Debug)]
enum Kind {
    System { started: Instant, started_ms: u64 },
    Mock(Arc<AtomicU64>),
}

impl Clock {
    /// Reads the wall clock, never earlier than `not_before`: the newest time in the store.
    #[must_use]
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the system's clocks")]
    pub fn system(not_before: Millis) -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let started_ms = u64::try_from(wall).unwrap_or(u64::MAX).max(not_before.0);
        Self(Kind::System { started: Instant::now(), started_ms })
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
            Kind::Mock(now) => Millis(now.load(Ordering::Acquire)),
        }
    }

    /// Moves a mock clock; a system clock is left alone.
    pub fn advance(&self, ms: u64) {
        if let Kind::Mock(now) = &self.0 {
            now.fetch_add(ms, Ordering::AcqRel);
        }
    }
}
