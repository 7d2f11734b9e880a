//! A claim in the hands of its owner: settled by him, whatever happens.

use super::lease::Lease;
use super::{Arrival, Remembered, Settlement, Shared, SlotOwner};
use crate::idempotency::{Decision, Event, Millis, Outcome, Record, State, Why};
use crate::store::{Store, StoreError, Version};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A durable claim. It is settled by [`Claim::settle`]; dropped without, it is settled as unknown.
pub struct Claim<S: Store, R: Clone + Send + Sync + 'static> {
    pub(super) held: Option<Box<HeldClaim<S, R>>>,
    /// The request may have been executed before: an earlier send's outcome is unknown.
    pub resend: bool,
}

pub(super) struct HeldClaim<S, R: Clone> {
    pub(super) shared: Arc<Shared<S, R>>,
    pub(super) arrival: Arrival,
    pub(super) owner: SlotOwner<R>,
    pub(super) version: Version,
    pub(super) record: Arc<Remembered>,
    /// In a shared store.
    pub(super) lease: Option<Arc<Lease>>,
    /// Until then an earlier copy of the claim may land, if the key is free by that time.
    pub(super) may_land_until: Option<Millis>,
}

impl<S: Store, R: Clone + Send + Sync + 'static> Claim<S, R> {
    /// The first caller gets its 504 now, while the forward goes on.
    pub fn set_late(&self) {
        if let Some(held) = &self.held {
            held.owner.slot().set_late();
        }
    }

    /// Whether the claim surely lives: to be asked right before the first byte is sent. If it does not, nothing may be sent.
    #[must_use]
    pub fn may_send(&self) -> bool {
        let held = self.held.as_ref();
        held.is_some_and(|held| {
            held.lease.as_ref().is_none_or(|lease| lease.may_send(held.shared.clock.monotonic_ms()))
        })
    }

    /// The header value of the first send.
    #[must_use]
    pub fn key_header(&self) -> Option<bytes::Bytes> {
        self.held.as_ref().map(|held| held.record.origin.key_header.clone())
    }

    /// Settles the claim durably. `shared_response` is for waiters with the same credentials, if nothing was executed.
    ///
    /// # Errors
    /// The store's: the claim then stays; it becomes unknown, never free.
    pub async fn settle(mut self, outcome: Outcome, shared_response: Option<R>) -> Result<(), StoreError> {
        match self.held.take() {
            Some(held) => held.settle(outcome, shared_response).await,
            None => Ok(()),
        }
    }
}

impl<S: Store, R: Clone + Send + Sync + 'static> HeldClaim<S, R> {
    async fn settle(self: Box<Self>, outcome: Outcome, shared_response: Option<R>) -> Result<(), StoreError> {
        let metrics = &self.shared.metrics;
        match &outcome {
            Outcome::Final(_) => metrics.settled_final.inc(),
            Outcome::NotExecuted(_) => metrics.settled_not_executed.inc(),
            Outcome::Unknown(_) => metrics.settled_unknown.inc(),
        };
        let event = Event::Settle { token: self.record.token, outcome };
        match self.write(&event).await {
            Ok(settled) => {
                self.finish(settled, shared_response);
                Ok(())
            }
            Err(error) => {
                metrics.settle_failures.inc();
                tracing::error!(record = %self.arrival.id, %error, "an outcome could not be recorded; the claim stays");
                // It is recorded once the disk has room, or the shared store can be reached, and waited for until then.
                if may_pass(&error) {
                    tokio::spawn(self.settle_later(event));
                }
                Err(error)
            }
        }
    }

    async fn write(&self, event: &Event) -> Result<(Decision, Option<(Version, Record)>), StoreError> {
        let Self { shared, arrival, version, record, lease, .. } = self;
        let started = Instant::now();
        let held = lease.as_ref().map_or_else(|| (*version, Record::clone(record)), |lease| lease.held());
        let settled = shared.apply(arrival.id, &arrival.policy, Some(held), event).await;
        shared.metrics.settle_seconds.observe(started.elapsed());
        settled
    }

    fn finish(self: Box<Self>, settled: (Decision, Option<(Version, Record)>), shared_response: Option<R>) {
        let Self { shared, arrival, owner, record, may_land_until, .. } = *self;
        if let (None, Some(until)) = (&settled.1, may_land_until) {
            tokio::spawn(Arc::clone(&shared).give_up(arrival.id, arrival.policy, record.token, until));
        }
        match settled {
            (Decision::Settled, Some((_, record))) if matches!(record.state, State::Completed { .. }) => {
                let record = Remembered::new(record);
                shared.hot.put(arrival.id, Arc::clone(&record), shared.clock.now());
                owner.settle(Settlement::Recorded(record));
            }
            (Decision::Settled, None) => owner.settle(match shared_response {
                Some(response) => Settlement::NotExecuted { response, credentials: arrival.credentials },
                None => Settlement::Again,
            }),
            _ => owner.settle(Settlement::Again),
        }
    }

    async fn settle_later(self: Box<Self>, event: Event) {
        let mut pause = PAUSE_MIN;
        loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
            match self.write(&event).await {
                Err(error) if may_pass(&error) => {}
                Ok(settled) => return self.finish(settled, None),
                // Found at the next start.
                Err(_) => return,
            }
        }
    }
}

/// How often an outcome that could not be recorded is tried again: after pauses that grow.
pub(super) const PAUSE_MIN: Duration = Duration::from_millis(100);
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(2);

fn may_pass(error: &StoreError) -> bool {
    matches!(error, StoreError::Full { .. } | StoreError::Unavailable { .. })
}

impl<S: Store, R: Clone + Send + Sync + 'static> Drop for Claim<S, R> {
    fn drop(&mut self) {
        let Some(held) = self.held.take() else { return };
        tracing::warn!(record = %held.arrival.id, "a claim was abandoned; its outcome is unknown");
        // Without a runtime (the process is ending) the claim is found at the next start.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(held.settle(Outcome::Unknown(Why::Abandoned), None));
        }
    }
}
