//! The shell of the core: carries records between the store, the hot cache and the requests.
//!
//! It decides nothing. Every change of a record is a [`step`] whose write has landed in the store by compare-and-swap.

mod budget;
mod claim;
mod elsewhere;
mod hot_cache;
mod lapse;
mod lead;
mod lease;
mod listing;
mod operator;
mod remembered;
mod slots;

pub use budget::{Budget, Held, Reservation};
pub use claim::{Claim, Unsettled};
pub use elsewhere::Elsewhere;
pub use lead::{Inquiry, Lead};
pub use listing::Listed;
pub use operator::{Act, Acted, Refusal, Shown};
pub use remembered::Remembered;
pub use slots::{Credentials, Settlement, StillInProgress, Waiting};

use crate::clock::Clock;
use crate::idempotency::{
    ClaimToken, Concurrent, Decision, Event, Fingerprint, Millis, Origin, Policy, Record, RejectReason, State, Write,
    codec, droppable_at, step,
};
use crate::store::{Entry, RecordId, Status, Store, StoreError, Swap, Swapped, Urgency, Value, Version};
use crate::telemetry::Metrics;
use hot_cache::HotCache;
use slots::{SlotOwner, Slots};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// `[cache]`.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of completed records kept in memory.
    pub cache_max_bytes: u64,
    /// How long a hot entry may be used; `None`: for its retention.
    pub cache_max_age: Option<Duration>,
    /// How long a claim in a shared store lives without being renewed; `None`: the store is not shared.
    pub lease: Option<Duration>,
}

/// How records are tagged in the store.
pub mod tags {
    use crate::idempotency::{Record, State};
    use crate::store::Tag;
    pub const CLAIMED: Tag = Tag(0);
    pub const COMPLETED: Tag = Tag(1);
    pub const UNKNOWN: Tag = Tag(2);

    #[must_use]
    pub fn of(record: &Record) -> Tag {
        match record.state {
            State::Claimed { .. } => CLAIMED,
            State::Completed { .. } => COMPLETED,
            State::Unknown { .. } => UNKNOWN,
        }
    }
}

/// A keyed request, ready to be decided upon.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub id: RecordId,
    pub origin: Origin,
    pub fingerprint: Fingerprint,
    pub credentials: Credentials,
    pub policy: Policy,
    /// How many duplicates may wait for one request in flight.
    pub max_waiters: usize,
}

/// What became of an arrival without asking the store.
pub enum Arrived<S, R: Clone + Send + Sync + 'static> {
    Answer(Answer),
    Wait(Waiting<R>),
    /// Nobody here works on this key: claim it.
    Lead(Lead<S, R>),
}

/// An answer that needs no upstream.
#[derive(Clone, Debug)]
pub enum Answer {
    Replay(Arc<Remembered>),
    KeyReused,
    /// `late`: the first caller has got its 504 already.
    InProgress {
        late: bool,
    },
    OutcomeUnknown,
    BodyNotRecorded {
        status: u16,
        location: Option<bytes::Bytes>,
    },
}

/// What became of an attempt to claim.
pub enum ClaimResult<S: Store, R: Clone + Send + Sync + 'static> {
    Claimed(Claim<S, R>),
    /// Nobody knows what became of it: ask the upstream.
    LookUp(Inquiry<S, R>),
    /// Another gateway works on it.
    Wait(Elsewhere<S, R>),
    Answer(Answer),
}

/// Records, and the requests under way. `R` is the response that waiters may share when nothing was executed.
pub struct Ledger<S, R: Clone>(Arc<Shared<S, R>>);

impl<S, R: Clone> Clone for Ledger<S, R> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

struct Shared<S, R> {
    store: S,
    clock: Clock,
    hot: HotCache,
    slots: Arc<Slots<R>>,
    metrics: Metrics,
    /// What is settled behind the requests' backs: claims that were abandoned, or given up.
    behind: TaskTracker,
    /// Cancelled when there is no time to try again any more.
    stop: CancellationToken,
}

impl<S: Store, R: Clone + Send + Sync + 'static> Ledger<S, R> {
    #[must_use]
    pub fn new(store: S, clock: Clock, options: &Options, metrics: Metrics) -> Self {
        let hot = HotCache::new(options.cache_max_bytes, options.cache_max_age);
        let (slots, behind, stop) = (Arc::new(Slots::new()), TaskTracker::new(), CancellationToken::new());
        Self(Arc::new(Shared { store, clock, hot, slots, metrics, behind, stop }))
    }

    #[must_use]
    pub fn now(&self) -> Millis {
        self.0.clock.now()
    }

    #[must_use]
    pub fn store(&self) -> &S {
        &self.0.store
    }

    #[must_use]
    pub fn store_status(&self) -> Status {
        self.0.store.status()
    }

    /// Waits until nothing is left to be settled behind the requests' backs.
    pub async fn settled_behind(&self) {
        self.0.behind.close();
        self.0.behind.wait().await;
    }

    /// From now on what cannot be recorded at once is left as it is: claims, which become unknown.
    pub fn stop_trying(&self) {
        self.0.stop.cancel();
    }

    /// Entries and bytes of the hot cache.
    #[must_use]
    pub fn cache_size(&self) -> (u64, u64) {
        (self.0.hot.entries(), self.0.hot.bytes())
    }

    /// Turns every claim that the store holds into unknown: to be called once, before the first arrival, by the only
    /// user of the store. `policy` tells the rules of a route by its pattern (`None`: there are no routes at all, and the
    /// claim is left as it is). Returns how many there were.
    ///
    /// # Errors
    /// The store's.
    pub async fn recover(&self, policy: impl Fn(&[u8]) -> Option<Policy>) -> Result<usize, StoreError> {
        let mut recovered = 0;
        for (id, entry) in self.0.store.unexpiring()? {
            let Some((version, record)) = decode(id, entry) else {
                continue; // It stays a claim: never free, never sent.
            };
            let Some(policy) = policy(&record.origin.route) else { continue };
            let (decision, _) = self.0.apply(id, &policy, Some((version, record)), &Event::Recover).await?;
            recovered += usize::from(decision == Decision::Settled);
        }
        Ok(recovered)
    }

    /// The answer of a completed record that is in the hot cache: the shortest way through.
    #[must_use]
    pub fn answer_from_cache(&self, id: RecordId, policy: &Policy, fingerprint: Fingerprint) -> Option<Answer> {
        let now = self.0.clock.now();
        let record = self.0.hot.get(id, now)?;
        let answer = judge(policy, fingerprint, now, &record, false)?;
        self.0.metrics.cache_hits.inc();
        Some(answer)
    }

    /// Decides on an arrival by what this gateway holds in memory. `body` may be exchanged for an equal one that is shared.
    pub fn arrive(&self, arrival: &Arrival, body: &mut Held) -> Arrived<S, R> {
        let shared = &self.0;
        let now = shared.clock.now();
        if let Some(record) = shared.hot.get(arrival.id, now) {
            shared.metrics.cache_hits.inc();
            if let Some(answer) = judge(&arrival.policy, arrival.fingerprint, now, &record, false) {
                return Arrived::Answer(answer);
            }
        } else {
            shared.metrics.cache_misses.inc();
        }
        let slot = match shared.slots.find_or_open(arrival.id, || body.clone()) {
            Err(owner) => {
                return Arrived::Lead(Lead { shared: Arc::clone(shared), arrival: arrival.clone(), owner });
            }
            Ok(slot) => slot,
        };
        let claimed = slot.claimed();
        let judge = |record: &Arc<Remembered>| {
            // Who works on a claim here, or watches it, learns when it ends. This copy of it does not see it renewed.
            let now = if matches!(record.state, State::Claimed { .. }) { Millis(0) } else { now };
            judge(&arrival.policy, arrival.fingerprint, now, record, slot.is_late())
        };
        if let Some(answer) = claimed.as_ref().and_then(judge) {
            return Arrived::Answer(answer);
        }
        slot.share_body(body);
        let asked = claimed.as_ref().is_some_and(|record| matches!(record.state, State::Unknown { .. }));
        if asked && arrival.policy.concurrent == Concurrent::Conflict {
            return Arrived::Answer(Answer::InProgress { late: slot.is_late() });
        }
        match slot.join(arrival.max_waiters, claimed.is_none()) {
            Some(waiting) => Arrived::Wait(waiting),
            None => Arrived::Answer(Answer::InProgress { late: slot.is_late() }),
        }
    }

    /// The answer that a record gives to an arrival; `None`: it says to wait or to claim.
    #[must_use]
    pub fn answer_from(&self, arrival: &Arrival, record: &Arc<Remembered>) -> Option<Answer> {
        judge(&arrival.policy, arrival.fingerprint, self.0.clock.now(), record, false)
    }

    /// The answer that the store's record gives, without claiming anything; `None`: the key would have to be claimed.
    ///
    /// # Errors
    /// The store's.
    pub async fn look_up(&self, arrival: &Arrival) -> Result<Option<Answer>, StoreError> {
        match self.0.store.get(arrival.id).await {
            Ok(None) => Ok(None),
            Ok(Some(entry)) => match decode(arrival.id, entry) {
                Some((_, record)) => Ok(self.answer_from(arrival, &Remembered::new(record))),
                None => Ok(Some(Answer::OutcomeUnknown)),
            },
            Err(StoreError::Damaged { id, detail }) => Ok(Some(damaged(id, &detail))),
            Err(error) => Err(error),
        }
    }

    /// Removes expired records in the background, in small batches, until the store has failed or is closed.
    pub async fn sweep(&self) {
        loop {
            self.0.hot.tend();
            match self.0.store.sweep(self.0.clock.now().0).await {
                Ok(pause) => tokio::time::sleep(pause).await,
                Err(StoreError::Unavailable { .. }) => tokio::time::sleep(Duration::from_secs(5)).await,
                Err(error) => return tracing::error!(%error, "expired records are no longer removed"),
            }
        }
    }
}

impl<S: Store, R: Clone> Shared<S, R> {
    /// The shell's loop: step, then compare-and-swap, until the decision's write has landed. Returns the decision and
    /// what the store then holds.
    async fn apply(
        &self,
        id: RecordId,
        policy: &Policy,
        stored: Option<(Version, Record)>,
        event: &Event,
    ) -> Result<(Decision, Option<(Version, Record)>), StoreError> {
        self.apply_minding_copies(id, policy, stored, event, &mut None).await
    }

    /// As above. `may_land_until`: raised to the time until which a write of this event may still land that is not the one
    /// told of, whatever the result.
    async fn apply_minding_copies(
        &self,
        id: RecordId,
        policy: &Policy,
        mut stored: Option<(Version, Record)>,
        event: &Event,
        may_land_until: &mut Option<Millis>,
    ) -> Result<(Decision, Option<(Version, Record)>), StoreError> {
        loop {
            let now = self.clock.now();
            let step = step(policy, now, stored.as_ref().map(|(_, record)| record), event);
            let (new, urgency) = match step.write {
                Write::Keep => return Ok((step.decision, stored)),
                Write::Remove => (None, Urgency::Settle),
                Write::Put(record) => {
                    let claim = matches!(record.state, State::Claimed { .. });
                    (Some(record), if claim { Urgency::Claim } else { Urgency::Settle })
                }
            };
            let expected = stored.as_ref().map(|(version, _)| *version);
            let value = new.as_ref().map(|record| to_value(policy, record));
            let swapped = self.store.swap_minding_copies(id, expected, value, now.0, urgency).await;
            if let Ok(Swapped { may_land_until_ms, .. }) | Err(StoreError::Unavailable { may_land_until_ms, .. }) =
                &swapped
            {
                *may_land_until = (*may_land_until).max(may_land_until_ms.map(Millis));
            }
            match swapped?.swap {
                Swap::Done(version) => return Ok((step.decision, new.map(|record| (version, record)))),
                Swap::Conflict(None) => stored = None,
                Swap::Conflict(Some(entry)) => {
                    let version = entry.version;
                    let Some(found) = decode(id, entry) else {
                        let detail = format!("its version {} cannot be decoded", version.0);
                        return Err(StoreError::Damaged { id, detail });
                    };
                    stored = Some(found);
                }
            }
        }
    }
}

/// What a record that was read means for an arrival; `None`: wait for it, or claim the key.
fn judge(
    policy: &Policy,
    fingerprint: Fingerprint,
    now: Millis,
    record: &Arc<Remembered>,
    late: bool,
) -> Option<Answer> {
    // Origin and token are not used: nothing of this step is written.
    let event = Event::Arrive { origin: Origin::default(), fingerprint, token: ClaimToken([0; 16]) };
    answer(step(policy, now, Some(record), &event).decision, record, late)
}

fn answer(decision: Decision, record: &Arc<Remembered>, late: bool) -> Option<Answer> {
    match decision {
        Decision::Replay => Some(Answer::Replay(Arc::clone(record))),
        Decision::Reject(RejectReason::KeyReused) => Some(Answer::KeyReused),
        Decision::Reject(RejectReason::InProgress) => Some(Answer::InProgress { late }),
        Decision::Reject(RejectReason::OutcomeUnknown) => Some(Answer::OutcomeUnknown),
        Decision::Reject(RejectReason::BodyNotRecorded { status, location }) => {
            Some(Answer::BodyNotRecorded { status, location })
        }
        Decision::Forward { .. }
        | Decision::Lookup
        | Decision::Wait { .. }
        | Decision::Renewed
        | Decision::Settled
        | Decision::Superseded
        | Decision::NotFound
        | Decision::InFlight
        | Decision::NotUnknown => None,
    }
}

fn damaged(id: RecordId, detail: &str) -> Answer {
    tracing::error!(record = %id, detail, "a record cannot be read; its outcome is unknown");
    Answer::OutcomeUnknown
}

fn to_value(policy: &Policy, record: &Record) -> Value {
    Value {
        tag: tags::of(record),
        expires_at_ms: droppable_at(policy, record).map(|at| at.0),
        bytes: codec::encode(record),
    }
}

fn decode(id: RecordId, entry: Entry) -> Option<(Version, Record)> {
    match codec::decode(&entry.value.bytes) {
        Ok(record) => Some((entry.version, record)),
        Err(error) => {
            tracing::error!(record = %id, %error, "a record cannot be read; its outcome is unknown");
            None
        }
    }
}

/// 128 bits from the operating system. Should it refuse them, the time stands in: a token must be unlike all others, not
/// secret.
pub(crate) fn new_token() -> ClaimToken {
    let mut token = [0; 16];
    if getrandom::fill(&mut token).is_err() {
        static COUNTER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let count = COUNTER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let wall = Clock::system(Millis(0)).now().0;
        token = ((u128::from(wall) << 64) | u128::from(count)).to_be_bytes();
    }
    ClaimToken(token)
}

#[cfg(test)]
mod tests;
