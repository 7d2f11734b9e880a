//! Claims in a shared store live by leases: renewed while their owner works on them, and looked at before a byte is sent.

use super::{Ledger, Shared};
use crate::idempotency::{ClaimToken, Decision, Event, Policy, Record};
use crate::store::{RecordId, Store, Version};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Of a lease, what has to be left for a byte to be sent: room for the difference between clocks, and for the first byte
/// itself.
const LEFT_TO_SEND: (u64, u64) = (1, 3);
/// It is renewed once this part of it is over, looked for so many times a lease.
const RENEWED_AFTER: (u64, u64) = (1, 3);
const LOOKS: u32 = 12;

/// A claim's lease, as its owner knows it.
#[derive(Debug)]
pub(super) struct Lease {
    token: ClaimToken,
    policy: Policy,
    lease_ms: u64,
    /// Monotonic: before the write that last prolonged it was sent.
    since_ms: AtomicU64,
    /// What the store holds since then.
    held: Mutex<(Version, Record)>,
    renewing: AtomicBool,
    /// Somebody has taken the claim for lapsed.
    lost: AtomicBool,
}

impl Lease {
    /// `None`: the store has but one user, whose claims need no lease.
    pub(super) fn new(policy: &Policy, since_ms: u64, version: Version, record: &Record) -> Option<Arc<Self>> {
        let lease_ms = policy.lease_ms?;
        Some(Arc::new(Self {
            token: record.token,
            policy: *policy,
            lease_ms,
            since_ms: AtomicU64::new(since_ms),
            held: Mutex::new((version, record.clone())),
            renewing: AtomicBool::new(false),
            lost: AtomicBool::new(false),
        }))
    }

    /// Whether the claim surely lives, and will for a while.
    pub(super) fn may_send(&self, now_ms: u64) -> bool {
        let (part, whole) = LEFT_TO_SEND;
        !self.lost.load(Ordering::Acquire) && self.age_ms(now_ms) < self.lease_ms - self.lease_ms / whole * part
    }

    pub(super) fn held(&self) -> (Version, Record) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The right to renew it, if it is time.
    fn take_due(&self, now_ms: u64) -> bool {
        let (part, whole) = RENEWED_AFTER;
        let due = self.age_ms(now_ms) >= self.lease_ms / whole * part && !self.lost.load(Ordering::Acquire);
        due && !self.renewing.swap(true, Ordering::AcqRel)
    }

    fn age_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.since_ms.load(Ordering::Acquire))
    }
}

impl<S: Store, R: Clone + Send + Sync + 'static> Ledger<S, R> {
    /// Renews the claims that are worked on here, for as long as the process lives.
    pub async fn keep_leases(&self, lease: Duration) {
        loop {
            tokio::time::sleep(lease / LOOKS).await;
            self.renew_leases();
        }
    }

    /// Begins to renew those that are due.
    pub(super) fn renew_leases(&self) {
        let now_ms = self.0.clock.monotonic_ms();
        for (id, lease) in self.0.slots.leases() {
            if lease.take_due(now_ms) {
                let shared = Arc::clone(&self.0);
                tokio::spawn(async move { shared.renew(id, &lease).await });
            }
        }
    }
}

impl<S: Store, R: Clone> Shared<S, R> {
    async fn renew(&self, id: RecordId, lease: &Lease) {
        let since_ms = self.clock.monotonic_ms();
        let event = Event::Renew { token: lease.token };
        match self.apply(id, &lease.policy, Some(lease.held()), &event).await {
            Ok((Decision::Renewed, Some(held))) => {
                *lease.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
                lease.since_ms.store(since_ms, Ordering::Release);
            }
            // Settled by now, or taken for lapsed; its token may settle it all the same.
            Ok(_) => lease.lost.store(true, Ordering::Release),
            // Tried again at the next look.
            Err(error) => tracing::debug!(record = %id, %error, "a lease could not be renewed"),
        }
        lease.renewing.store(false, Ordering::Release);
    }
}
