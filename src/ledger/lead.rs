//! From the right to claim a key to the claim, or to the answer that the store gives instead.

use super::claim::{HeldClaim, PAUSE_MAX, PAUSE_MIN};
use super::lease::Lease;
use super::{
    Answer, Arrival, Claim, ClaimResult, Elsewhere, Remembered, Settlement, Shared, SlotOwner, answer, damaged, decode,
    new_token,
};
use crate::idempotency::{ClaimToken, Decision, Event, Evidence, Millis, Outcome, Policy, Record, Verdict};
use crate::store::{RecordId, Store, StoreError, Version};
use std::sync::Arc;
use tokio::time::{Instant, timeout};

/// The right, and the duty, to claim a key that nobody here works on. Duplicates wait from now on; they look again if
/// this is dropped.
pub struct Lead<S, R: Clone> {
    pub(super) shared: Arc<Shared<S, R>>,
    pub(super) arrival: Arrival,
    pub(super) owner: SlotOwner<R>,
}

impl<S: Store, R: Clone + Send + Sync + 'static> Lead<S, R> {
    /// Claims the key in the store, or says what the store answers instead.
    ///
    /// # Errors
    /// The store's; nothing may be forwarded then.
    pub async fn claim(self) -> Result<ClaimResult<S, R>, StoreError> {
        let Arrival { origin, fingerprint, .. } = &self.arrival;
        let event = Event::Arrive { origin: origin.clone(), fingerprint: *fingerprint, token: new_token() };
        self.raise(None, &event).await
    }

    async fn raise(self, stored: Option<(Version, Record)>, event: &Event) -> Result<ClaimResult<S, R>, StoreError> {
        let Self { shared, arrival, owner } = self;
        let started = Instant::now();
        // The lease counts from here: before any write that makes it is sent.
        let since_ms = shared.clock.monotonic_ms();
        let (id, policy, mut may_land_until) = (arrival.id, arrival.policy, None);
        let applied = shared.apply_minding_copies(id, &policy, stored, event, &mut may_land_until).await;
        let claimed = matches!(applied, Ok((Decision::Forward { .. }, Some(_))));
        if let (false, Some(until), Some(token)) = (claimed, may_land_until, claimed_by(event)) {
            shared.behind.spawn(Arc::clone(&shared).give_up(id, policy, token, until));
        }
        let (decision, stored) = match applied {
            Err(StoreError::Damaged { id, detail }) => return Ok(ClaimResult::Answer(damaged(id, &detail))),
            applied => applied?,
        };
        let Some((version, record)) = stored else {
            // An arrival never removes a record; should it, nothing was claimed.
            return Ok(ClaimResult::Answer(Answer::InProgress { late: false }));
        };
        let record = Remembered::new(record);
        match decision {
            Decision::Forward { resend } => {
                shared.metrics.claim_seconds.observe(started.elapsed());
                let lease = Lease::new(&arrival.policy, since_ms, version, &record);
                owner.slot().set_claimed(Arc::clone(&record));
                if let Some(lease) = &lease {
                    owner.slot().set_lease(Arc::clone(lease));
                }
                let held = HeldClaim { shared, arrival, owner, version, record, lease, may_land_until };
                return Ok(ClaimResult::Claimed(Claim { held: Some(Box::new(held)), resend }));
            }
            Decision::Lookup => {
                // Others are compared with it, and wait for the upstream's word instead of asking, too.
                owner.slot().set_claimed(Arc::clone(&record));
                let asked_at = shared.clock.now();
                let lead = Self { shared, arrival, owner };
                return Ok(ClaimResult::LookUp(Inquiry { lead, version, record, asked_at }));
            }
            // Another gateway is at it. (In a store of our own it is one whose outcome could not be written: nobody is.)
            Decision::Wait { until: Some(_) } => {
                owner.slot().set_claimed(record);
                let watch = shared.store.watch(arrival.id);
                return Ok(ClaimResult::Wait(Elsewhere { shared, id, policy, owner, watch }));
            }
            _ => {}
        }
        shared.hot.put(arrival.id, Arc::clone(&record), shared.clock.now());
        // A claim in the store without a slot here is one whose outcome could not be written: nobody is at it.
        let answer = answer(decision, &record, false).unwrap_or(Answer::InProgress { late: false });
        match &answer {
            Answer::Replay(_) | Answer::BodyNotRecorded { .. } => owner.settle(Settlement::Recorded(record)),
            // The upstream has just been asked, with these credentials.
            _ if matches!(event, Event::LookedUp { .. }) => {
                let credentials = arrival.credentials;
                owner.settle(Settlement::Undecided { answer: answer.clone(), credentials });
            }
            _ => {}
        }
        Ok(ClaimResult::Answer(answer))
    }
}

/// The token of the claim that the event would make.
fn claimed_by(event: &Event) -> Option<ClaimToken> {
    match event {
        Event::Arrive { token, .. } | Event::LookedUp { token, .. } => Some(*token),
        _ => None,
    }
}

impl<S: Store, R: Clone + Send + Sync + 'static> Shared<S, R> {
    /// Nothing is sent under this claim any more, or ever was: its answer was lost, or it was settled as not executed. Should
    /// it have landed all the same, or a copy of it do so until `may_land_until`, then that is settled as not executed.
    pub(super) async fn give_up(
        self: Arc<Self>,
        id: RecordId,
        policy: Policy,
        token: ClaimToken,
        may_land_until: Millis,
    ) {
        let event = Event::Settle { token, outcome: Outcome::NotExecuted(Evidence::ThisSend) };
        let mut pause = PAUSE_MIN;
        loop {
            // A copy may land after another was given back: only what is found from then on is the end.
            let last = self.clock.now() > may_land_until;
            match self.store.get(id).await {
                Ok(found) => {
                    let own = found.and_then(|entry| decode(id, entry)).filter(|(_, record)| record.token == token);
                    let given_back = match own {
                        Some(own) => self.apply(id, &policy, Some(own), &event).await.is_ok(),
                        None => true,
                    };
                    if given_back && last {
                        return;
                    }
                }
                Err(StoreError::Failed { .. } | StoreError::Damaged { .. }) => return,
                Err(StoreError::Unavailable { .. } | StoreError::Full { .. } | StoreError::Refused { .. }) => {}
            }
            if timeout(pause, self.stop.cancelled()).await.is_ok() {
                return;
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

/// A record whose outcome is unknown, and the duty to ask the upstream for it. Duplicates wait; they look again if this is
/// dropped.
pub struct Inquiry<S, R: Clone> {
    lead: Lead<S, R>,
    version: Version,
    record: Arc<Remembered>,
    /// Before the question is sent.
    asked_at: Millis,
}

impl<S: Store, R: Clone + Send + Sync + 'static> Inquiry<S, R> {
    #[must_use]
    pub fn id(&self) -> crate::store::RecordId {
        self.lead.arrival.id
    }

    /// The decoded key that is asked for.
    #[must_use]
    pub fn key(&self) -> &bytes::Bytes {
        &self.record.origin.key
    }

    /// Acts on the upstream's word. It counts for the claim it was asked for alone.
    ///
    /// # Errors
    /// The store's; nothing may be forwarded then.
    pub async fn tell(self, verdict: Verdict) -> Result<ClaimResult<S, R>, StoreError> {
        let Self { lead, version, record, asked_at } = self;
        let Arrival { origin, fingerprint, .. } = &lead.arrival;
        let event = Event::LookedUp {
            of: record.token,
            asked_at,
            verdict,
            origin: origin.clone(),
            fingerprint: *fingerprint,
            token: new_token(),
        };
        let stored = Some((version, Record::clone(&record)));
        lead.raise(stored, &event).await
    }
}
