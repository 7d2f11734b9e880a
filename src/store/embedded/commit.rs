//! The committer: one thread that appends what is queued, in groups, and acknowledges it once it is durable.

use super::state::{IdMap, Live, SegmentState};
use super::{Durability, Lookup, Shared};
use crate::fault;
use crate::store::index::Located;
use crate::store::log::expiry::ExpiryHistogram;
use crate::store::log::frame::{
    ENTRY_HEADER, EntryRef, FLAG_RELAXED, FLAG_SEAL, FRAME_HEADER, FrameBuilder, Kind, MAX_VALUE, NEVER,
};
use crate::store::log::scan::{Tail, Verified};
use crate::store::log::segment::{SEGMENT_HEADER, Segment, is_full};
use crate::store::log::{LogPoint, Position};
use crate::store::{Entry, RecordId, StoreError, Tag, Urgency, Value, Version};
use bytes::Bytes;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::{mpsc, oneshot};

/// Operations in one group.
const GROUP_MAX: usize = 1024;
/// A group is closed when its frame has this many bytes.
const GROUP_BYTES_MAX: usize = 4 << 20;

pub(super) enum Op {
    Swap(Swap),
    Maintain {
        items: Vec<Upkeep>,
        reply: oneshot::Sender<Result<u64, StoreError>>,
    },
    /// Wakes the committer, so that it sees that the store is being closed.
    Stop,
}

pub(super) struct Swap {
    pub(super) id: RecordId,
    pub(super) expected: Option<Version>,
    pub(super) new: Option<Value>,
    pub(super) now_ms: u64,
    pub(super) urgency: Urgency,
    pub(super) reply: oneshot::Sender<Result<Answer, StoreError>>,
}

/// What a swap has come to. An entry that is only in the log is read by whoever asked.
pub(super) enum Answer {
    Done(Version),
    Conflict(Option<Found>),
}

pub(super) enum Found {
    /// With its value.
    Memory(Live),
    Log(Arc<Segment>, Located),
}

impl Found {
    pub(super) fn located(&self) -> Located {
        match self {
            Self::Memory(live) => live.located,
            Self::Log(_, located) => *located,
        }
    }

    /// The entry itself. Reads the disk, if it must.
    ///
    /// # Errors
    /// [`StoreError::Damaged`].
    pub(super) fn read(&self, id: RecordId) -> Result<Entry, StoreError> {
        match self {
            Self::Memory(Live { located, value, .. }) => Ok(entry(located, value.clone().unwrap_or_default())),
            Self::Log(segment, located) => {
                let damaged = |detail: String| {
                    let (file, offset) = (segment.path.display(), located.position.offset);
                    let detail = format!("{file}, offset {offset}: {detail}");
                    tracing::error!(%id, detail, "a record cannot be read back; its outcome counts as unknown");
                    StoreError::Damaged { id, detail }
                };
                let len = ENTRY_HEADER + usize::try_from(located.len).unwrap_or(usize::MAX).min(MAX_VALUE);
                let mut bytes = vec![0; len];
                segment
                    .file
                    .read_exact_at(&mut bytes, u64::from(located.position.offset))
                    .map_err(|error| damaged(error.to_string()))?;
                match EntryRef::parse(&bytes, true) {
                    Some(read) if (read.id, read.version) == (id, located.version) && read.kind != Kind::Remove => {
                        let located = Located { expires_at_ms: read.expires_at_ms, tag: read.tag, ..*located };
                        let end = ENTRY_HEADER + read.value.len();
                        Ok(entry(&located, Bytes::from(bytes).slice(ENTRY_HEADER..end)))
                    }
                    Some(read) => Err(damaged(format!("version {} of {} stands there", read.version, read.id))),
                    None => Err(damaged("wrong checksum".to_owned())),
                }
            }
        }
    }
}

/// Housekeeping, on condition that the entry still stands at that position.
pub(super) enum Upkeep {
    /// Forget an entry that has expired. Nothing is written: it may come back after a restart, to be dropped again.
    Drop { id: RecordId, position: Position },
    /// Write an entry again, at the end of the log.
    Copy { id: RecordId, located: Located, time_ms: u64, value: Bytes },
}

impl Upkeep {
    fn target(&self) -> (RecordId, Position) {
        match self {
            Self::Drop { id, position } => (*id, *position),
            Self::Copy { id, located, .. } => (*id, located.position),
        }
    }
}

/// What a group does to one id, in order.
struct Change {
    id: RecordId,
    old: Option<Located>,
    /// The position is relative to the frame until the frame has its place.
    new: Option<Live>,
    in_index: bool,
}

/// An answer that has to wait for the group to be durable.
enum Waiting {
    Swap(oneshot::Sender<Result<Answer, StoreError>>, Answer),
    Maintain(oneshot::Sender<Result<u64, StoreError>>, u64),
}

/// Why a group was not written.
enum WriteError {
    NoRoom,
    Failed(String),
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        Self::Failed(format!("writing the log: {error}"))
    }
}

pub(super) struct Committer {
    shared: Arc<Shared>,
    active: Arc<Segment>,
    /// Bytes of the active segment in use, and of its file.
    end: u64,
    capacity: u64,
    next_frame: u64,
    next_version: u64,
    // The group that is being built.
    frame: FrameBuilder,
    time_ms: u64,
    changes: Vec<Change>,
    /// The latest change of the group to each id: its place in `changes`.
    pending: IdMap<usize>,
    waiting: Vec<Waiting>,
    swept: u64,
}

impl Committer {
    pub(super) fn new(
        shared: Arc<Shared>,
        active: Arc<Segment>,
        capacity: u64,
        end: LogPoint,
        next_version: u64,
    ) -> Self {
        Self {
            shared,
            active,
            end: u64::from(end.position.offset),
            capacity,
            next_frame: end.frame,
            next_version,
            frame: FrameBuilder::default(),
            time_ms: 0,
            changes: Vec::new(),
            pending: IdMap::default(),
            waiting: Vec::new(),
            swept: 0,
        }
    }

    /// Works until the store is closed, and then what is still queued.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Op>) {
        while let Some(first) = queue.blocking_recv() {
            self.frame.clear();
            self.take(first);
            for _ in 1..GROUP_MAX {
                if self.frame.len() >= GROUP_BYTES_MAX {
                    break;
                }
                let Ok(op) = queue.try_recv() else { break };
                self.take(op);
            }
            self.commit();
            if self.shared.closing.load(Ordering::Acquire) {
                queue.close();
            }
        }
        if self.shared.options.durability == Durability::Relaxed
            && self.shared.failed().is_none()
            && let Err(error) = self.active.file.sync_data()
        {
            self.shared.fail(format!("flushing the log: {error}"));
        }
    }

    fn take(&mut self, op: Op) {
        let failed = self.shared.failed();
        match op {
            Op::Swap(swap) => match failed {
                Some(error) => drop(swap.reply.send(Err(error))),
                None => self.swap(swap),
            },
            Op::Stop => {}
            Op::Maintain { items, reply } => match failed {
                Some(error) => drop(reply.send(Err(error))),
                None => match items.into_iter().try_fold(0, |done, item| Ok(done + u64::from(self.upkeep(item)?))) {
                    Ok(done) => self.waiting.push(Waiting::Maintain(reply, done)),
                    Err(error) => drop(reply.send(Err(error))),
                },
            },
        }
    }

    /// What the store holds under an id, the group's own changes included; whether it is one of them; and whether the
    /// index may hold something under the id.
    fn current(&self, id: RecordId) -> Result<(Option<Found>, bool, bool), StoreError> {
        if let Some(change) = self.pending.get(&id).and_then(|&at| self.changes.get(at)) {
            // If there is no slot when this change is applied, then because the change before it found none in the index.
            return Ok((change.new.clone().map(Found::Memory), true, false));
        }
        Ok(match self.shared.look_up(id)? {
            Lookup::Absent { in_index } => (None, false, in_index),
            Lookup::Found(found) => (Some(found), false, true),
        })
    }

    fn swap(&mut self, swap: Swap) {
        let (current, pending, in_index) = match self.current(swap.id) {
            Ok(current) => current,
            Err(error) => return drop(swap.reply.send(Err(error))),
        };
        let old = current.as_ref().map(Found::located);
        if old.map(|old| Version(old.version)) != swap.expected {
            let answer = Answer::Conflict(current);
            // What this group writes may not be told before it is durable.
            return match pending {
                true => self.waiting.push(Waiting::Swap(swap.reply, answer)),
                false => drop(swap.reply.send(Ok(answer))),
            };
        }
        if swap.urgency == Urgency::Claim && self.shared.space.is_low() {
            return drop(swap.reply.send(Err(self.shared.full())));
        }
        let version = self.next_version;
        self.next_version += 1;
        self.time_ms = self.time_ms.max(swap.now_ms);
        let (kind, value) = match swap.new {
            Some(value) => (Kind::Put, value),
            None => (Kind::Remove, Value { tag: Tag(0), expires_at_ms: None, bytes: Bytes::new() }),
        };
        let entry = EntryRef {
            id: swap.id,
            version,
            kind,
            tag: value.tag,
            expires_at_ms: value.expires_at_ms.unwrap_or(NEVER),
            time_ms: swap.now_ms,
            value: &value.bytes,
        };
        self.push(&entry, &value.bytes, old, in_index);
        self.waiting.push(Waiting::Swap(swap.reply, Answer::Done(Version(version))));
    }

    fn push(&mut self, entry: &EntryRef<'_>, value: &Bytes, old: Option<Located>, in_index: bool) {
        let offset = u32::try_from(self.frame.push(entry)).unwrap_or(u32::MAX);
        let new = (entry.kind != Kind::Remove).then(|| Live {
            located: Located {
                position: Position { segment: self.active.number, offset },
                len: u32::try_from(value.len()).unwrap_or(u32::MAX),
                tag: entry.tag,
                version: entry.version,
                expires_at_ms: entry.expires_at_ms,
            },
            time_ms: entry.time_ms,
            value: Some(value.clone()),
        });
        self.change(Change { id: entry.id, old, new, in_index });
    }

    fn change(&mut self, change: Change) {
        self.pending.insert(change.id, self.changes.len());
        self.changes.push(change);
    }

    /// Whether the entry still stood where the item says.
    fn upkeep(&mut self, item: Upkeep) -> Result<bool, StoreError> {
        let (id, position) = item.target();
        if self.pending.contains_key(&id) {
            return Ok(false);
        }
        let (current, _, in_index) = self.current(id)?;
        let Some(old) = current.as_ref().map(Found::located).filter(|old| old.position == position) else {
            return Ok(false);
        };
        match item {
            Upkeep::Drop { .. } => {
                self.change(Change { id, old: Some(old), new: None, in_index });
                self.swept += 1;
            }
            Upkeep::Copy { located, time_ms, value, .. } => {
                let Located { version, tag, expires_at_ms, .. } = located;
                let entry = EntryRef { id, version, kind: Kind::Copied, tag, expires_at_ms, time_ms, value: &value };
                self.push(&entry, &value, Some(old), in_index);
            }
        }
        Ok(true)
    }

    fn commit(&mut self) {
        let written = if self.frame.is_empty() { Ok(0) } else { self.write() };
        let error = match written {
            Ok(frame_at) => {
                self.apply(frame_at);
                None
            }
            Err(WriteError::NoRoom) => {
                // Has it tried again, in case that there is space by now.
                self.shared.space.is_low();
                Some(self.shared.full())
            }
            Err(WriteError::Failed(reason)) => Some(self.shared.fail(reason)),
        };
        self.changes.clear();
        self.pending.clear();
        for waiting in self.waiting.drain(..) {
            // Whoever no longer waits does not care.
            match waiting {
                Waiting::Swap(reply, answer) => drop(reply.send(error.clone().map_or(Ok(answer), Err))),
                Waiting::Maintain(reply, done) => drop(reply.send(error.clone().map_or(Ok(done), Err))),
            }
        }
        (self.swept, self.time_ms) = (0, 0);
    }

    /// Appends the frame and makes it durable. Returns its offset.
    fn write(&mut self) -> Result<u64, WriteError> {
        let needed = self.frame.len() as u64;
        if self.end + needed + FRAME_HEADER as u64 > self.capacity {
            self.rotate(needed)?;
        }
        let strict = self.shared.options.durability == Durability::Strict;
        let flags = if strict { 0 } else { FLAG_RELAXED };
        let frame_at = self.end;
        let bytes = self.frame.finish(flags, self.active.uid, self.next_frame, self.next_version, self.time_ms);
        fault::step("before-append")?;
        self.active.file.write_all_at(bytes, frame_at)?;
        fault::step("before-sync")?;
        if strict {
            self.active.file.sync_data()?;
        }
        fault::step("after-sync")?;
        self.end += needed;
        self.next_frame += 1;
        self.shared.newest_ms.fetch_max(self.time_ms, Ordering::AcqRel);
        let counters = &self.shared.counters;
        counters.batches.fetch_add(1, Ordering::Relaxed);
        counters.batched_writes.fetch_add(u64::from(self.frame.entries()), Ordering::Relaxed);
        counters.bytes_written.fetch_add(needed, Ordering::Relaxed);
        Ok(frame_at)
    }

    /// Goes on to the spare segment: the old one is sealed durably before anything is written to the new one, so that
    /// an unsealed segment with a non-empty successor is never the trace of a crash.
    fn rotate(&mut self, needed: u64) -> Result<(), WriteError> {
        let space = &self.shared.space;
        let Some((segment, mut capacity)) = space.take().map_err(WriteError::Failed)? else {
            return Err(WriteError::NoRoom);
        };
        let wanted = SEGMENT_HEADER + needed + FRAME_HEADER as u64;
        if wanted > capacity {
            match segment.extend(wanted) {
                Ok(()) => capacity = wanted,
                Err(error) if is_full(&error) => {
                    space.put_back((segment, capacity));
                    return Err(WriteError::NoRoom);
                }
                Err(error) => return Err(error.into()),
            }
        }
        let newest_ms = self.shared.newest_ms.load(Ordering::Acquire);
        let mut seal = FrameBuilder::default();
        seal.clear();
        let bytes = seal.finish(FLAG_SEAL, self.active.uid, self.next_frame, self.next_version, newest_ms);
        self.active.file.write_all_at(bytes, self.end)?;
        self.active.file.sync_data()?;
        self.end += FRAME_HEADER as u64;
        // Give back what a large frame left unused. Not durable, not needed to be.
        if self.active.file.set_len(self.end).is_ok() {
            self.capacity = self.end;
        }
        self.next_frame += 1;
        self.shared.counters.bytes_written.fetch_add(FRAME_HEADER as u64, Ordering::Relaxed);

        let segment = Arc::new(segment);
        let mut state = self.shared.state();
        if let Some(old) = state.segments.get_mut(&self.active.number) {
            (old.end, old.capacity) = (self.end, self.capacity);
            old.unsummarised = Some(Verified {
                end: old.end,
                first_frame: Some(old.first_frame),
                last_frame: Some((self.next_frame.saturating_sub(1), self.next_version)),
                newest_ms,
                sealed: true,
                expiry: old.expiry.clone(),
                tail: Tail::Clean,
            });
        }
        state.segments.insert(
            segment.number,
            SegmentState {
                segment: segment.clone(),
                end: SEGMENT_HEADER,
                capacity,
                first_frame: self.next_frame,
                first_version: self.next_version,
                expiry: ExpiryHistogram::default(),
                unsummarised: None,
                swept_until_ms: 0,
            },
        );
        let next = self.shared.tuning.segment_bytes(state.log_bytes());
        let number = segment.number.saturating_add(1);
        drop(state);
        (self.active, self.end, self.capacity) = (segment, SEGMENT_HEADER, capacity);
        space.request(number, next);
        Ok(())
    }

    /// Makes the durable group visible.
    fn apply(&mut self, frame_at: u64) {
        let mut guard = self.shared.state();
        let state = &mut *guard;
        let number = self.active.number;
        for Change { id, old, new, in_index } in self.changes.drain(..) {
            if let Some(old) = old {
                state.uncount(&old);
            }
            let new = new.map(|mut live| {
                let offset = frame_at + u64::from(live.located.position.offset);
                live.located.position = Position { segment: number, offset: u32::try_from(offset).unwrap_or(u32::MAX) };
                if live.located.expires_at_ms != NEVER {
                    live.value = None;
                    if let Some(segment) = state.segments.get_mut(&number) {
                        let bytes = (ENTRY_HEADER as u64) + u64::from(live.located.len);
                        segment.expiry.add(live.located.expires_at_ms, bytes);
                        // It may have expired already, and a sweep must still see it.
                        let before = live.located.expires_at_ms.saturating_sub(1);
                        segment.swept_until_ms = segment.swept_until_ms.min(before);
                    }
                }
                state.count(&live.located);
                live
            });
            state.set(id, new, in_index);
        }
        if let Some(segment) = state.segments.get_mut(&number) {
            state.waiting_bytes += self.end.saturating_sub(segment.end);
            segment.end = self.end;
        }
        let offset = u32::try_from(self.end).unwrap_or(u32::MAX);
        state.end = LogPoint { position: Position { segment: number, offset }, frame: self.next_frame };
        self.shared.counters.swept.fetch_add(self.swept, Ordering::Relaxed);
        self.shared.hand_to_indexer(guard);
    }
}

/// When the entry at that place was written.
pub(super) fn time_of(segment: &Segment, offset: u32) -> Option<u64> {
    let mut header = [0; ENTRY_HEADER];
    segment.file.read_exact_at(&mut header, u64::from(offset)).ok()?;
    EntryRef::time_ms(&header)
}

fn entry(located: &Located, bytes: Bytes) -> Entry {
    let expires_at_ms = (located.expires_at_ms != NEVER).then_some(located.expires_at_ms);
    Entry { version: Version(located.version), value: Value { tag: located.tag, expires_at_ms, bytes } }
}
