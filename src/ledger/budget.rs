//! The memory that buffered bodies may take, all requests together.

use crate::telemetry::Metrics;
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A bound on buffered bytes.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    used: AtomicUsize,
    max: usize,
    metrics: Metrics,
}

impl Budget {
    #[must_use]
    pub fn new(max_bytes: usize, metrics: Metrics) -> Self {
        Self(Arc::new(Shared { used: AtomicUsize::new(0), max: max_bytes, metrics }))
    }

    /// Starts a reservation of nothing.
    #[must_use]
    pub fn reservation(&self) -> Reservation {
        Reservation { shared: Arc::clone(&self.0), bytes: 0 }
    }
}

/// Bytes reserved of a budget; given back when dropped.
#[derive(Debug)]
pub struct Reservation {
    shared: Arc<Shared>,
    bytes: usize,
}

impl Reservation {
    /// Reserves `more` bytes. Returns whether there was room; if not, what was reserved stays reserved.
    #[must_use]
    pub fn grow(&mut self, more: usize) -> bool {
        let max = self.shared.max;
        let fits = |used: usize| used.checked_add(more).filter(|total| *total <= max);
        let grown = self.shared.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).is_ok();
        if grown {
            self.bytes += more;
            self.shared.metrics.buffered_bytes.inc_by(i64::try_from(more).unwrap_or(i64::MAX));
        }
        grown
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.shared.used.fetch_sub(self.bytes, Ordering::AcqRel);
        self.shared.metrics.buffered_bytes.dec_by(i64::try_from(self.bytes).unwrap_or(i64::MAX));
    }
}

/// A body held in memory, with the room it takes. Clones share both.
#[derive(Clone, Debug)]
pub struct Held {
    pub bytes: Bytes,
    /// Given back when the last clone is gone.
    _reservation: Arc<Reservation>,
}

impl Held {
    #[must_use]
    pub fn new(bytes: Bytes, reservation: Reservation) -> Self {
        Self { bytes, _reservation: Arc::new(reservation) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_never_exceeded_and_given_back_with_the_last_clone() {
        let budget = Budget::new(10, Metrics::default());
        let mut first = budget.reservation();
        assert!(first.grow(6));
        assert!(!budget.reservation().grow(5));
        assert!(first.grow(4));
        assert!(!first.grow(1));
        assert!(!first.grow(usize::MAX), "an overflow is no room");
        let held = Held::new(Bytes::from_static(b"0123456789"), first);
        let clone = held.clone();
        drop(held);
        assert!(!budget.reservation().grow(1));
        drop(clone);
        assert!(budget.reservation().grow(10));
    }
}
