//! What waits to be sent to the server.

use crate::store::{Entry, HashOfIds, RecordId, StoreError, Swapped, Value, Version};
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

/// Operations that wait at most; then the next ones are refused.
const QUEUE_MAX: usize = 4096;
/// What goes into one batch at most; a single operation may be larger.
const BATCH_MAX: usize = 256;
const BATCH_BYTES_MAX: usize = 4 << 20;

pub(super) enum Work {
    Get(RecordId),
    Swap {
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
    },
    /// Anything else. Harmless if it is done twice.
    Query {
        sql: String,
        params: Vec<Param>,
    },
}

pub(super) enum Answer {
    Entry(Option<Entry>),
    Swap(Swapped),
    Rows(Vec<Row>),
}

pub(super) enum Param {
    Int(i64),
    Small(i16),
    Text(String),
    Bytes(Vec<u8>),
    ByteArrays(Vec<Vec<u8>>),
}

impl Param {
    pub(super) fn typed(&self) -> (&(dyn ToSql + Sync), Type) {
        match self {
            Self::Int(value) => (value, Type::INT8),
            Self::Small(value) => (value, Type::INT2),
            Self::Text(value) => (value, Type::TEXT),
            Self::Bytes(value) => (value, Type::BYTEA),
            Self::ByteArrays(value) => (value, Type::BYTEA_ARRAY),
        }
    }
}

/// Until when a write may land, as its caller and the driver know it. Whoever gives it up first has the last word: after
/// that it is sent no more.
#[derive(Debug, Default)]
pub(super) struct Fate(AtomicU64);

impl Fate {
    const GIVEN_UP: u64 = u64::MAX;

    /// It is about to be sent, and may land until then; `None`: it was given up. What was known before.
    fn send(&self, until_ms: u64) -> Option<u64> {
        let later = |before: u64| (before != Self::GIVEN_UP).then(|| before.max(until_ms.min(Self::GIVEN_UP - 1)));
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, later).ok()
    }

    /// The server has said that it did not land that time.
    fn take_back(&self, until_ms: u64, before: u64) {
        let _ = self.0.compare_exchange(until_ms, before, Ordering::AcqRel, Ordering::Acquire);
    }

    /// The store's time from which on it is certain not to land any more; `None`: it was never sent.
    pub(super) fn give_up(&self) -> Option<u64> {
        match self.0.swap(Self::GIVEN_UP, Ordering::AcqRel) {
            0 => None,
            until => Some(until),
        }
    }
}

pub(super) struct Op {
    pub(super) work: Work,
    /// By then its caller has an answer, be it that there is none.
    pub(super) deadline: Instant,
    pub(super) fate: Arc<Fate>,
    pub(super) reply: oneshot::Sender<Result<Answer, StoreError>>,
    /// It was among those of which one has spoilt a batch.
    pub(super) alone: bool,
    /// An earlier attempt may have landed.
    pub(super) may_have_landed: bool,
    /// The promise of this attempt, and what was known before it.
    sent: Option<(u64, u64)>,
}

impl Op {
    pub(super) fn new(
        work: Work,
        deadline: Instant,
        fate: Arc<Fate>,
        reply: oneshot::Sender<Result<Answer, StoreError>>,
    ) -> Self {
        Self { work, deadline, fate, reply, alone: false, may_have_landed: false, sent: None }
    }

    pub(super) fn id(&self) -> Option<RecordId> {
        match &self.work {
            Work::Get(id) | Work::Swap { id, .. } => Some(*id),
            Work::Query { .. } => None,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match &self.work {
            Work::Swap { new: Some(new), .. } => new.bytes.len(),
            _ => 0,
        }
    }

    /// Whether to send it at all.
    pub(super) fn send(&mut self, until_ms: u64) -> bool {
        if matches!(self.work, Work::Get(_)) {
            return true;
        }
        let before = self.fate.send(until_ms);
        self.sent = before.map(|before| (until_ms, before));
        before.is_some()
    }

    /// It was not done.
    pub(super) fn take_back(&mut self) {
        if let Some((until_ms, before)) = self.sent.take() {
            self.fate.take_back(until_ms, before);
        }
    }

    /// Of a creation that is being answered: until when an earlier attempt may still land.
    pub(super) fn earlier_copies_until(&self) -> Option<u64> {
        let creates = matches!(self.work, Work::Swap { expected: None, new: Some(_), .. });
        self.sent.map(|(_, before)| before).filter(|_| creates && self.may_have_landed)
    }

    /// Whether it was done is not known.
    pub(super) fn lost(&mut self) {
        self.may_have_landed |= self.sent.take().is_some();
    }

    pub(super) fn answer(self, answer: Answer) {
        let _ = self.reply.send(Ok(answer));
    }

    pub(super) fn refuse(self, reason: &str) {
        let error = unavailable(reason, self.fate.give_up());
        let _ = self.reply.send(Err(error));
    }

    /// The server will not do it, however often it is asked.
    pub(super) fn refuse_for_good(self, reason: &str) {
        let error = match (&self.work, self.fate.give_up()) {
            // Whoever tries something else in its place finds an earlier copy that has landed, or is found by it.
            (Work::Swap { expected: Some(_), .. }, _) | (Work::Swap { .. }, None) => {
                StoreError::Refused { reason: reason.to_owned() }
            }
            // An earlier copy of a creation has to be looked for.
            (_, until) => unavailable(reason, until),
        };
        let _ = self.reply.send(Err(error));
    }
}

pub(super) fn unavailable(reason: &str, may_land_until_ms: Option<u64>) -> StoreError {
    StoreError::Unavailable { reason: reason.to_owned(), may_land_until_ms }
}

pub(super) fn closed() -> StoreError {
    StoreError::Failed { reason: "the store was closed".to_owned() }
}

/// What is sent at once. At most one write of each entry.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) gets: Vec<Op>,
    pub(super) swaps: Vec<Op>,
    pub(super) query: Option<Op>,
    pub(super) ids: Vec<RecordId>,
}

/// Guarded by one lock, which is never held while anything is awaited.
#[derive(Default)]
pub(super) struct State {
    ops: VecDeque<Op>,
    /// Operations of an entry are done one after the other.
    in_flight: HashSet<RecordId, HashOfIds>,
    query_runs: bool,
    /// Open connections.
    pub(super) live: usize,
    /// Why there is none, after an attempt to make one.
    pub(super) out_of_reach: Option<String>,
    /// Connections of an earlier one are not trusted any more.
    pub(super) generation: u64,
    pub(super) closed: bool,
}

impl State {
    /// # Errors
    /// It is not taken; nothing was sent.
    pub(super) fn push(&mut self, op: Op) -> Result<(), StoreError> {
        if self.closed {
            return Err(closed());
        }
        if let Some(reason) = &self.out_of_reach {
            return Err(unavailable(reason, None));
        }
        if self.ops.len() >= QUEUE_MAX {
            return Err(unavailable("too many operations wait for it", None));
        }
        self.ops.push_back(op);
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.ops.len()
    }

    /// The next batch, if there is anything that need not wait for what is in flight.
    pub(super) fn take(&mut self, now: Instant) -> Option<Batch> {
        let mut batch = Batch::default();
        let mut kept = VecDeque::new();
        let mut behind: HashSet<RecordId, HashOfIds> = HashSet::default();
        let mut bytes = 0;
        while batch.gets.len() + batch.swaps.len() < BATCH_MAX && bytes < BATCH_BYTES_MAX {
            let Some(op) = self.ops.pop_front() else { break };
            if op.deadline <= now {
                continue;
            }
            let empty = batch.gets.is_empty() && batch.swaps.is_empty();
            let Some(id) = op.id() else {
                if !empty || self.query_runs {
                    kept.push_back(op);
                    continue;
                }
                self.query_runs = true;
                batch.query = Some(op);
                break;
            };
            let with_others = matches!(op.work, Work::Get(_))
                && !behind.contains(&id)
                && batch.gets.iter().any(|get| get.id() == Some(id));
            if with_others {
                batch.gets.push(op);
            } else if self.in_flight.contains(&id) || op.alone && !empty {
                behind.insert(id);
                kept.push_back(op);
            } else {
                bytes += op.bytes();
                let alone = op.alone;
                self.in_flight.insert(id);
                batch.ids.push(id);
                if matches!(op.work, Work::Get(_)) {
                    batch.gets.push(op)
                } else {
                    batch.swaps.push(op)
                }
                if alone {
                    break;
                }
            }
        }
        kept.append(&mut self.ops);
        self.ops = kept;
        if batch.gets.is_empty() && batch.swaps.is_empty() && batch.query.is_none() {
            return None;
        }
        batch.gets.sort_by_key(Op::id);
        batch.swaps.sort_by_key(Op::id);
        Some(batch)
    }

    /// A batch is through. What was not answered goes first, the next time.
    pub(super) fn give_back(&mut self, ids: &[RecordId], query: bool, unanswered: Vec<Op>) {
        for id in ids {
            self.in_flight.remove(id);
        }
        if query {
            self.query_runs = false;
        }
        unanswered.into_iter().rev().for_each(|op| self.ops.push_front(op));
    }

    /// Ends the waiting of all that were never sent, for there is no connection. The others wait until their time is over: the next one
    /// may tell whether they have landed.
    pub(super) fn refuse_unsent(&mut self, reason: &str, now: Instant) {
        for op in std::mem::take(&mut self.ops) {
            if op.may_have_landed && op.deadline > now {
                self.ops.push_back(op);
            } else {
                op.refuse(reason);
            }
        }
    }

    pub(super) fn refuse_all(&mut self) {
        for op in std::mem::take(&mut self.ops) {
            match op.fate.give_up() {
                None => drop(op.reply.send(Err(closed()))),
                until => drop(op.reply.send(Err(unavailable("the store was closed", until)))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn op(work: Work) -> Op {
        Op::new(work, Instant::now() + Duration::from_secs(1), Arc::default(), oneshot::channel().0)
    }

    fn swap(n: u8, len: usize) -> Op {
        let new = Value { tag: crate::store::Tag(0), expires_at_ms: None, bytes: vec![0; len].into() };
        op(Work::Swap { id: RecordId([n; 16]), expected: None, new: Some(new) })
    }

    fn get(n: u8) -> Op {
        op(Work::Get(RecordId([n; 16])))
    }

    fn query() -> Op {
        op(Work::Query { sql: String::new(), params: Vec::new() })
    }

    fn sizes(batch: Option<&Batch>) -> Option<(usize, usize, bool)> {
        batch.map(|batch| (batch.gets.len(), batch.swaps.len(), batch.query.is_some()))
    }

    #[tokio::test]
    async fn operations_of_an_entry_keep_their_order() {
        let mut state = State::default();
        let all = [get(2), swap(1, 1), get(1), swap(1, 2), get(2), swap(2, 3), get(2), query()];
        all.into_iter().for_each(|op| state.push(op).unwrap());
        let now = Instant::now();
        let first = state.take(now);
        // The last look at 2 stays behind the write of it.
        assert_eq!(sizes(first.as_ref()), Some((2, 1, false)));
        let second = state.take(now);
        assert_eq!(sizes(second.as_ref()), Some((0, 0, true)), "entries of the first batch wait");
        assert_eq!(sizes(state.take(now).as_ref()), None);
        let first = first.unwrap();
        // The answer to the write was lost.
        state.give_back(&first.ids, false, first.swaps);
        let third = state.take(now).unwrap();
        assert_eq!(sizes(Some(&third)), Some((0, 2, false)));
        assert!(matches!(&third.swaps[0].work, Work::Swap { new: Some(new), .. } if new.bytes.len() == 1));
        assert_eq!(third.ids, [RecordId([1; 16]), RecordId([2; 16])], "in the order of their ids");
        state.give_back(&third.ids, false, Vec::new());
        assert_eq!(sizes(state.take(now).as_ref()), Some((2, 0, false)));
        assert_eq!(state.len(), 1);
    }

    #[tokio::test]
    async fn batches_and_the_queue_are_bounded() {
        let mut state = State::default();
        for n in 0..3 {
            state.push(swap(n, BATCH_BYTES_MAX - 1)).unwrap();
        }
        let now = Instant::now();
        assert_eq!(sizes(state.take(now).as_ref()), Some((0, 2, false)));
        assert_eq!(sizes(state.take(now).as_ref()), Some((0, 1, false)));
        let mut spoilt = swap(9, 1);
        spoilt.alone = true;
        state.push(swap(8, 1)).unwrap();
        state.push(spoilt).unwrap();
        assert_eq!(sizes(state.take(now).as_ref()), Some((0, 1, false)));
        assert_eq!(sizes(state.take(now).as_ref()), Some((0, 1, false)));
        for n in 0..QUEUE_MAX {
            state.push(get((n % 251) as u8)).unwrap();
        }
        let refused = state.push(get(0)).unwrap_err();
        assert!(matches!(refused, StoreError::Unavailable { may_land_until_ms: None, .. }));
        assert_eq!(sizes(state.take(now + Duration::from_secs(2)).as_ref()), None, "their time is over");
        assert_eq!(state.len(), 0);
    }

    #[test]
    fn what_was_given_up_is_not_sent() {
        let fate = Fate::default();
        assert_eq!(fate.send(10), Some(0));
        fate.take_back(10, 0);
        assert_eq!(fate.send(20), Some(0));
        assert_eq!(fate.send(30), Some(20));
        fate.take_back(30, 20);
        assert_eq!(fate.give_up(), Some(20));
        assert_eq!(fate.send(40), None);
        let unsent = Fate::default();
        assert_eq!(unsent.give_up(), None);
        assert_eq!(unsent.send(10), None);
    }
}
