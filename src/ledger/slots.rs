//! Keys that this gateway is working on, and the duplicates that wait for them.

use super::Answer;
use super::budget::Held;
use super::lease::Lease;
use super::remembered::Remembered;
use crate::idempotency::State;
use crate::store::{HashOfIds, RecordId};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::watch;
use tokio::time::Instant;

/// A digest of all credentials that a request bore. Only who bears the same may share an unrecorded response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials(pub [u8; 32]);

/// How a slot ended, for those who waited.
#[derive(Clone, Debug)]
pub enum Settlement<R> {
    /// A completed record: replay it.
    Recorded(Arc<Remembered>),
    /// Nothing was executed; whoever bears the same credentials gets this same response.
    NotExecuted { response: R, credentials: Credentials },
    /// The upstream was asked in vain; whoever bears the same credentials gets this same answer.
    Undecided { answer: Answer, credentials: Credentials },
    /// Look again, as a newcomer.
    Again,
}

#[derive(Debug)]
pub(super) enum Phase<R> {
    /// The claim is on its way to the store.
    Pending,
    /// The claim is durable; or the record's outcome is unknown, and the upstream is being asked.
    Claimed(Arc<Remembered>),
    Settled(Settlement<R>),
}

/// One key that is being worked on here.
#[derive(Debug)]
pub(super) struct Slot<R> {
    phase: watch::Sender<Phase<R>>,
    waiters: AtomicUsize,
    /// The first caller has got its 504.
    late: AtomicBool,
    /// Of the claim that is worked on here, in a shared store.
    lease: OnceLock<Arc<Lease>>,
    /// The request's body, for waiters that bear the same bytes: they then need no copy of their own.
    body: Mutex<Option<Held>>,
}

impl<R: Clone> Slot<R> {
    pub(super) fn claimed(&self) -> Option<Arc<Remembered>> {
        match &*self.phase.borrow() {
            Phase::Claimed(record) => Some(Arc::clone(record)),
            _ => None,
        }
    }

    /// Whether a request is under way, not just asked for.
    pub(super) fn is_claim(&self) -> bool {
        is_claim(&self.phase.borrow())
    }

    /// Waits until the claim is known or the slot has ended.
    pub(super) async fn decided(&self) {
        let mut phase = self.phase.subscribe();
        // The slot is held, so its sender cannot be gone.
        let _ = phase.wait_for(|phase| is_claim(phase) || matches!(phase, Phase::Settled(_))).await;
    }

    pub(super) fn is_late(&self) -> bool {
        self.late.load(Ordering::Acquire)
    }

    pub(super) fn set_late(&self) {
        self.late.store(true, Ordering::Release);
        *lock(&self.body) = None;
    }

    pub(super) fn set_lease(&self, lease: Arc<Lease>) {
        // A slot is claimed once.
        let _ = self.lease.set(lease);
    }

    pub(super) fn set_claimed(&self, record: Arc<Remembered>) {
        self.phase.send_replace(Phase::Claimed(record));
    }

    /// Exchanges `body` for the slot's own, if both hold the same bytes.
    pub(super) fn share_body(&self, body: &mut Held) {
        if let Some(held) = &*lock(&self.body)
            && held.bytes == body.bytes
        {
            *body = held.clone();
        }
    }

    /// Joins the waiters, unless there are `max` already. `unchecked`: the claim was not known yet, so the payload was
    /// not compared with its; such a waiter shares nothing, it looks again once the claim is known.
    pub(super) fn join(self: &Arc<Self>, max: usize, unchecked: bool) -> Option<Waiting<R>> {
        let one_more = |count: usize| (count < max).then_some(count + 1);
        self.waiters.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).ok()?;
        Some(Waiting { slot: Arc::clone(self), unchecked })
    }
}

fn is_claim<R>(phase: &Phase<R>) -> bool {
    matches!(phase, Phase::Claimed(record) if matches!(record.state, State::Claimed { .. }))
}

/// A place among the waiters of a key; left when dropped.
pub struct Waiting<R> {
    slot: Arc<Slot<R>>,
    unchecked: bool,
}

impl<R: Clone> Waiting<R> {
    /// Waits until the key is settled.
    ///
    /// # Errors
    /// [`StillInProgress`] at the deadline.
    pub async fn settled(self, deadline: Instant) -> Result<Settlement<R>, StillInProgress> {
        let mut phase = self.slot.phase.subscribe();
        let changed = phase.wait_for(|phase| match phase {
            Phase::Pending => false,
            Phase::Claimed(_) => self.unchecked,
            Phase::Settled(_) => true,
        });
        match tokio::time::timeout_at(deadline, changed).await {
            Ok(Ok(phase)) => Ok(match &*phase {
                Phase::Settled(settlement) if !self.unchecked => settlement.clone(),
                _ => Settlement::Again,
            }),
            // The slot is held, so its sender cannot be gone; a newcomer's look is right in any case.
            Ok(Err(_)) => Ok(Settlement::Again),
            Err(_) => Err(StillInProgress { late: self.slot.is_late() }),
        }
    }
}

impl<R> Drop for Waiting<R> {
    fn drop(&mut self) {
        self.slot.waiters.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The wait is over, the request still in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StillInProgress {
    /// Its first caller has got a 504: it may take a while.
    pub late: bool,
}

const SHARDS: usize = 64;
type Shard<R> = HashMap<RecordId, Arc<Slot<R>>, HashOfIds>;

/// All slots, by record id.
pub(super) struct Slots<R> {
    shards: [Mutex<Shard<R>>; SHARDS],
}

impl<R: Clone> Slots<R> {
    pub(super) fn new() -> Self {
        Self { shards: std::array::from_fn(|_| Mutex::default()) }
    }

    pub(super) fn get(&self, id: RecordId) -> Option<Arc<Slot<R>>> {
        lock(self.shard(id)).get(&id).map(Arc::clone)
    }

    /// The leases of all claims that are worked on here.
    pub(super) fn leases(&self) -> Vec<(RecordId, Arc<Lease>)> {
        let of_shard = |shard: &Mutex<Shard<R>>| {
            let shard = lock(shard);
            shard.iter().filter_map(|(id, slot)| Some((*id, Arc::clone(slot.lease.get()?)))).collect::<Vec<_>>()
        };
        self.shards.iter().flat_map(of_shard).collect()
    }

    /// The slot of `id`; or a new one, which then belongs to the caller.
    pub(super) fn find_or_open(
        self: &Arc<Self>,
        id: RecordId,
        body: impl FnOnce() -> Held,
    ) -> Result<Arc<Slot<R>>, SlotOwner<R>> {
        let mut shard = lock(self.shard(id));
        if let Some(slot) = shard.get(&id) {
            return Ok(Arc::clone(slot));
        }
        let slot = Arc::new(Slot {
            phase: watch::Sender::new(Phase::Pending),
            waiters: AtomicUsize::new(0),
            late: AtomicBool::new(false),
            lease: OnceLock::new(),
            body: Mutex::new(Some(body())),
        });
        shard.insert(id, Arc::clone(&slot));
        Err(SlotOwner { slots: Arc::clone(self), id, slot, settled: false })
    }

    #[allow(clippy::indexing_slicing, reason = "the remainder is below the number of shards")]
    fn shard(&self, id: RecordId) -> &Mutex<Shard<R>> {
        let RecordId([first, ..]) = id;
        &self.shards[usize::from(first) % SHARDS]
    }
}

/// Owns a slot: settles it, if need be by being dropped.
pub(super) struct SlotOwner<R: Clone> {
    slots: Arc<Slots<R>>,
    id: RecordId,
    slot: Arc<Slot<R>>,
    settled: bool,
}

impl<R: Clone> SlotOwner<R> {
    pub(super) fn slot(&self) -> &Slot<R> {
        &self.slot
    }

    pub(super) fn settle(mut self, settlement: Settlement<R>) {
        self.finish(settlement);
    }

    fn finish(&mut self, settlement: Settlement<R>) {
        self.settled = true;
        // Out of the map first: who is woken must find the store's word, not this slot.
        lock(self.slots.shard(self.id)).remove(&self.id);
        self.slot.phase.send_replace(Phase::Settled(settlement));
    }
}

impl<R: Clone> Drop for SlotOwner<R> {
    fn drop(&mut self) {
        if !self.settled {
            self.finish(Settlement::Again);
        }
    }
}

/// A panic while a map was locked leaves the map itself whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
