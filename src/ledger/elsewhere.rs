//! A request that another gateway works on: waited for, as one in flight here is.

use super::{Remembered, Settlement, Shared, SlotOwner, StillInProgress, decode};
use crate::idempotency::{Policy, State, lapsed};
use crate::store::{RecordId, Store, Watch};
use std::sync::Arc;
use tokio::time::{Instant, timeout_at};

/// The duty to watch the store for all who wait here. They look again if this is dropped.
pub struct Elsewhere<S, R: Clone> {
    pub(super) shared: Arc<Shared<S, R>>,
    pub(super) id: RecordId,
    pub(super) policy: Policy,
    pub(super) owner: SlotOwner<R>,
    /// Made before the store is read.
    pub(super) watch: Watch,
}

impl<S: Store, R: Clone + Send + Sync + 'static> Elsewhere<S, R> {
    /// Waits until the key is settled, or its owner's lease is over.
    ///
    /// # Errors
    /// [`StillInProgress`] at the deadline.
    pub async fn settled(mut self, deadline: Instant) -> Result<Settlement<R>, StillInProgress> {
        // When the first caller over there got its 504 is not known here.
        let still = StillInProgress { late: false };
        loop {
            if let Some(settlement) = timeout_at(deadline, self.look()).await.map_err(|_| still)? {
                if matches!(settlement, Settlement::Recorded(_)) {
                    self.owner.settle(settlement.clone());
                }
                return Ok(settlement);
            }
            timeout_at(deadline, self.watch.changed()).await.map_err(|_| still)?;
        }
    }

    /// `None`: its owner is still at it, as far as can be seen.
    async fn look(&self) -> Option<Settlement<R>> {
        let entry = match self.shared.store.get(self.id).await {
            Ok(Some(entry)) => entry,
            Ok(None) => return Some(Settlement::Again),
            Err(error) => {
                tracing::debug!(record = %self.id, %error, "cannot look for the outcome of a request elsewhere");
                return None;
            }
        };
        let Some((_, record)) = decode(self.id, entry) else { return Some(Settlement::Again) };
        let now = self.shared.clock.now();
        match record.state {
            State::Claimed { .. } if lapsed(&self.policy, now, &record).is_none() => None,
            State::Completed { .. } => {
                let record = Remembered::new(record);
                self.shared.hot.put(self.id, Arc::clone(&record), now);
                Some(Settlement::Recorded(record))
            }
            State::Claimed { .. } | State::Unknown { .. } => Some(Settlement::Again),
        }
    }
}
