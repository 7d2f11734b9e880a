//! Records in an operator's hands: shown, resolved, forgotten.
//!
//! An act holds its key's slot, as a claim does: no request on that key is decided meanwhile, and none is under way. Nothing
//! is put into the hot cache but by the holder of the slot, so a record that was forgotten cannot come back into it.

use super::{Budget, Held, Ledger, Remembered, Shared, SlotOwner, decode, to_value};
use crate::idempotency::{Decision, Event, Policy, Record, Resolution, Write, lapsed, step};
use crate::store::{Entry, RecordId, Store, StoreError, Swap, Urgency, Version};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// A record as it is shown.
#[derive(Clone, Debug)]
pub struct Shown {
    pub id: RecordId,
    /// Names this state of the record.
    pub version: Version,
    pub record: Arc<Remembered>,
    /// Whether a task of this gateway works on it right now.
    pub in_flight: bool,
}

/// An act to be carried out.
pub struct Act<E> {
    pub id: RecordId,
    /// The version that the operator has seen; the record must not have moved on since.
    pub if_version: Option<Version>,
    /// Who acts: for the log.
    pub who: Arc<str>,
    /// The rules for the record's route, and what is to become of it.
    pub decide: Decide<E>,
}

type Decide<E> = Box<dyn FnOnce(&Record) -> Result<(Policy, Event), E> + Send>;

/// An act that has landed.
#[derive(Clone, Debug)]
pub struct Acted {
    pub before: Shown,
    pub after: Option<Shown>,
}

/// Nothing was changed, unless the store's error leaves that open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal<E> {
    /// Absent, or its time is over.
    NotFound,
    /// It is claimed.
    InFlight,
    /// Its outcome is known.
    NotUnknown,
    /// It is not what the operator has seen, or changed while he acted.
    Changed,
    /// What [`Act::decide`] has found wrong.
    Refused(E),
    Store(String),
}

impl<E> From<StoreError> for Refusal<E> {
    fn from(error: StoreError) -> Self {
        Self::Store(error.to_string())
    }
}

/// How long an act waits for requests that are being decided: while their claim is written, or the upstream is asked.
const PATIENCE: Duration = Duration::from_secs(10);

impl<S: Store, R: Clone + Send + Sync + 'static> Ledger<S, R> {
    /// A record; `None` if it is absent or its time is over. `policy` tells the rules of its route: a claim whose lease is
    /// over is shown as what it counts as, unknown.
    ///
    /// # Errors
    /// The store's; [`StoreError::Damaged`] if the record cannot be decoded.
    pub async fn show(&self, id: RecordId, policy: impl Fn(&Record) -> Policy) -> Result<Option<Shown>, StoreError> {
        let Some(entry) = self.0.store.get(id).await? else { return Ok(None) };
        let mut shown = self.shown(id, entry)?;
        let policy = policy(&shown.record);
        self.0.let_lapse(&mut shown, &policy);
        Ok(Some(shown).filter(|shown| !shown.record.expired(self.0.clock.now())))
    }

    /// As the store holds it.
    pub(super) fn shown(&self, id: RecordId, entry: Entry) -> Result<Shown, StoreError> {
        let damaged = || StoreError::Damaged { id, detail: "it cannot be decoded".to_owned() };
        let (version, record) = decode(id, entry).ok_or_else(damaged)?;
        let in_flight = self.0.slots.get(id).is_some_and(|slot| slot.claimed().is_some());
        Ok(Shown { id, version, record: Remembered::new(record), in_flight })
    }

    /// Carries out an act, in a task of its own: what has been begun is finished, and logged, even if nobody waits for it.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub async fn act<E: Send + 'static>(&self, act: Act<E>) -> Result<Acted, Refusal<E>> {
        let ledger = self.clone();
        let done = tokio::spawn(async move {
            let owner = ledger.take_slot(act.id, PATIENCE).await.ok_or(Refusal::InFlight)?;
            let done = ledger.act_alone(act).await;
            // Whoever has waited looks again.
            drop(owner);
            done
        });
        done.await.unwrap_or_else(|error| Err(Refusal::Store(error.to_string())))
    }

    /// The slot of a key that nobody here works on. `None`: somebody does, or does not come to an end of deciding.
    pub(super) async fn take_slot(&self, id: RecordId, patience: Duration) -> Option<SlotOwner<R>> {
        let deadline = Instant::now() + patience;
        let no_body = || Held::new(Bytes::new(), Budget::new(0, self.0.metrics.clone()).reservation());
        loop {
            let slot = match self.0.slots.find_or_open(id, no_body) {
                Err(owner) => return Some(owner),
                Ok(slot) => slot,
            };
            if slot.is_claim() || Instant::now() >= deadline {
                return None;
            }
            timeout_at(deadline, slot.decided()).await.ok()?;
        }
    }

    /// One read, one step, one swap. A conflict is not tried again: the operator has judged what he has seen.
    async fn act_alone<E>(&self, act: Act<E>) -> Result<Acted, Refusal<E>> {
        let (shared, id) = (&self.0, act.id);
        let entry = shared.store.get(id).await?.ok_or(Refusal::NotFound)?;
        let mut before = self.shown(id, entry)?;
        if before.record.expired(shared.clock.now()) {
            return Err(Refusal::NotFound);
        }
        if act.if_version.is_some_and(|version| version != before.version) {
            return Err(Refusal::Changed);
        }
        let (policy, event) = (act.decide)(&before.record).map_err(Refusal::Refused)?;
        shared.let_lapse(&mut before, &policy);
        let now = shared.clock.now();
        let step = step(&policy, now, Some(&before.record), &event);
        match step.decision {
            Decision::Settled => {}
            Decision::InFlight => return Err(Refusal::InFlight),
            Decision::NotUnknown => return Err(Refusal::NotUnknown),
            Decision::NotFound => return Err(Refusal::NotFound),
            _ => return Err(Refusal::Changed),
        }
        let new = match step.write {
            Write::Put(record) => Some(record),
            Write::Remove => None,
            Write::Keep => return Err(Refusal::Changed),
        };
        // Before the write: whatever becomes of it, the store's word counts from now on.
        shared.hot.remove(id);
        let value = new.as_ref().map(|record| to_value(&policy, record));
        let swap = shared.store.compare_and_swap(id, Some(before.version), value, now.0, Urgency::Settle).await;
        let swap = swap.inspect_err(|error| {
            if matches!(error, StoreError::Failed { .. } | StoreError::Unavailable { may_land_until_ms: Some(_), .. }) {
                let (who, act) = (&*act.who, describe(&event));
                tracing::error!(who, record = %id, act, %error, "whether an operator's act has landed is not known");
            }
        })?;
        let Swap::Done(version) = swap else { return Err(Refusal::Changed) };
        let after = new.map(|record| Shown { id, version, record: Remembered::new(record), in_flight: false });
        if let Some(after) = &after {
            shared.hot.put(id, Arc::clone(&after.record), now);
        }
        log(&act.who, &before, &event);
        Ok(Acted { before, after })
    }
}

impl<S, R> Shared<S, R> {
    /// Shows a claim whose lease is over as what it counts as.
    pub(super) fn let_lapse(&self, shown: &mut Shown, policy: &Policy) {
        if let Some(lapsed) = lapsed(policy, self.clock.now(), &shown.record) {
            shown.record = Remembered::new(lapsed);
        }
    }
}

fn log(who: &str, before: &Shown, event: &Event) {
    let origin = &before.record.origin;
    let (key, route) = (String::from_utf8_lossy(&origin.key), String::from_utf8_lossy(&origin.route));
    let (key, route, act, token) = (&*key, &*route, describe(event), before.version.0);
    tracing::info!(who, record = %before.id, key, route, act, token, "an operator's act");
}

fn describe(event: &Event) -> String {
    match event {
        Event::Resolve(Resolution::NotExecuted) => "resolve not-executed".to_owned(),
        Event::Resolve(Resolution::Response(response)) => format!("resolve response {}", response.status),
        Event::Forget => "forget".to_owned(),
        _ => "none".to_owned(),
    }
}
