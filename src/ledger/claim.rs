//! A claim in the hands of its owner: settled by him, whatever happens.

use super::lease::Lease;
use super::{Arrival, Remembered, Settlement, Shared, SlotOwner};
use crate::idempotency::{ClaimToken, Decision, Event, Millis, Outcome, Record, State, Why};
use crate::store::{Store, StoreError, Version};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout};

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
    /// The store's: the claim then stays; it becomes unknown, never free. The outcome may yet be recorded.
    pub async fn settle(mut self, outcome: Outcome, shared_response: Option<R>) -> Result<(), Unsettled<S, R>> {
        match self.held.take() {
            Some(held) => held.settle(outcome, shared_response).await,
            None => Ok(()),
        }
    }
}

/// An outcome that could not be recorded, and the claim that stays.
#[must_use = "the outcome is lost unless it is tried again"]
pub struct Unsettled<S, R: Clone> {
    pub error: StoreError,
    /// `None`: to try again is of no use.
    rest: Option<Rest<S, R>>,
}

type Rest<S, R> = (Box<HeldClaim<S, R>>, Box<Event>);

impl<S, R: Clone> std::fmt::Debug for Unsettled<S, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unsettled").field("error", &self.error).finish_non_exhaustive()
    }
}

impl<S: Store, R: Clone + Send + Sync + 'static> Unsettled<S, R> {
    /// Records it once the disk has room, or the shared store can be reached; until then duplicates wait for it. Ends in vain
    /// if the store has failed, or with [`Ledger::stop_trying`](super::Ledger::stop_trying): the claim is left. Whoever awaits this
    /// still holds what his request takes of the limits, so that what waits is bounded.
    pub async fn settle_later(self) {
        let Some((held, mut event)) = self.rest else { return };
        let stop = held.shared.stop.clone();
        let mut pause = PAUSE_MIN;
        let mut last = stop.is_cancelled();
        while !last {
            last = timeout(pause, stop.cancelled()).await.is_ok();
            pause = (pause * 2).min(PAUSE_MAX);
            match held.write(&mut event).await {
                Err(error) if may_pass(&error) => {}
                Ok(settled) => return held.finish(settled, None),
                // Found at the next start, or once its lease is over.
                Err(_) => return,
            }
        }
    }
}

impl<S: Store, R: Clone + Send + Sync + 'static> HeldClaim<S, R> {
    async fn settle(self: Box<Self>, outcome: Outcome, shared_response: Option<R>) -> Result<(), Unsettled<S, R>> {
        let metrics = &self.shared.metrics;
        match &outcome {
            Outcome::Final(_) => metrics.settled_final.inc(),
            Outcome::NotExecuted(_) => metrics.settled_not_executed.inc(),
            Outcome::Unknown(_) => metrics.settled_unknown.inc(),
        };
        let mut event = Box::new(Event::Settle { token: self.record.token, outcome });
        match self.write(&mut event).await {
            Ok(settled) => {
                self.finish(settled, shared_response);
                Ok(())
            }
            Err(error) => {
                metrics.settle_failures.inc();
                tracing::error!(record = %self.arrival.id, %error, "an outcome could not be recorded; the claim stays");
                let rest = may_pass(&error).then_some((self, event));
                Err(Unsettled { error, rest })
            }
        }
    }

    /// Of an outcome that the store refuses, less and less is written: without the body, then as unknown.
    async fn write(&self, event: &mut Event) -> Result<(Decision, Option<(Version, Record)>), StoreError> {
        let Self { shared, arrival, version, record, lease, .. } = self;
        loop {
            let started = Instant::now();
            let held = lease.as_ref().map_or_else(|| (*version, Record::clone(record)), |lease| lease.held());
            let settled = shared.apply(arrival.id, &arrival.policy, Some(held), event).await;
            shared.metrics.settle_seconds.observe(started.elapsed());
            let Err(StoreError::Refused { reason }) = &settled else { return settled };
            let Some(less) = less_than(record.token, event) else { return settled };
            shared.metrics.settle_failures.inc();
            let bodiless = matches!(less, Event::Settle { outcome: Outcome::Final(_), .. });
            let how = if bodiless { "without its body" } else { "as unknown" };
            tracing::error!(record = %arrival.id, reason, "the store refuses an outcome; it is recorded {how}");
            *event = less;
        }
    }

    fn finish(self: Box<Self>, settled: (Decision, Option<(Version, Record)>), shared_response: Option<R>) {
        let Self { shared, arrival, owner, record, may_land_until, .. } = *self;
        if let (None, Some(until)) = (&settled.1, may_land_until) {
            shared.behind.spawn(Arc::clone(&shared).give_up(arrival.id, arrival.policy, record.token, until));
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
}

/// The next best outcome; `None`: there is none.
fn less_than(token: ClaimToken, event: &Event) -> Option<Event> {
    let outcome = match event {
        Event::Settle { outcome: Outcome::Final(recorded), .. } => {
            recorded.omitted().map_or(Outcome::Unknown(Why::Abandoned), Outcome::Final)
        }
        Event::Settle { outcome: Outcome::NotExecuted(_), .. } => Outcome::Unknown(Why::Abandoned),
        _ => return None,
    };
    Some(Event::Settle { token, outcome })
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
            let behind = held.shared.behind.clone();
            let settle = async move {
                if let Err(unsettled) = held.settle(Outcome::Unknown(Why::Abandoned), None).await {
                    unsettled.settle_later().await;
                }
            };
            behind.spawn_on(settle, &runtime);
        }
    }
}
