//! What the embedded store holds in memory: entries that the index does not (yet) hold, and the segments.

use crate::store::index::Located;
use crate::store::log::expiry::ExpiryHistogram;
use crate::store::log::frame::NEVER;
use crate::store::log::scan::Verified;
use crate::store::log::segment::Segment;
use crate::store::log::{LogPoint, Position};
use crate::store::{HashOfIds, OLDEST_TRACKED, RecordId, Tag};
use bytes::Bytes;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

pub(super) type IdMap<V> = HashMap<RecordId, V, HashOfIds>;
pub(super) type IdSet = HashSet<RecordId, HashOfIds>;

/// An entry that the store holds.
#[derive(Clone, Debug)]
pub(super) struct Live {
    pub(super) located: Located,
    /// When it was written first; a copy keeps it.
    pub(super) time_ms: u64,
    /// Entries that never expire are few and wanted soon: their value stays in memory.
    pub(super) value: Option<Bytes>,
}

/// What became of an id since the index last heard of it.
#[derive(Debug)]
pub(super) struct Slot {
    /// `None`: removed.
    pub(super) live: Option<Live>,
    /// Whether the index may hold something (older) under the id.
    pub(super) in_index: bool,
}

impl Slot {
    /// Entries that never expire do not go to the index.
    pub(super) fn for_index(&self) -> bool {
        self.live.as_ref().is_none_or(|live| live.located.expires_at_ms != NEVER)
    }
}

#[derive(Debug)]
pub(super) struct SegmentState {
    pub(super) segment: Arc<Segment>,
    /// Bytes in use.
    pub(super) end: u64,
    /// Bytes of the file.
    pub(super) capacity: u64,
    /// Number of its first frame, and the first version that is newer than all before it.
    pub(super) first_frame: u64,
    pub(super) first_version: u64,
    pub(super) expiry: ExpiryHistogram,
    /// What its summary is to say, if it is sealed and that has not been written yet.
    pub(super) unsummarised: Option<Verified>,
    /// All entries that expired until then have been dropped.
    pub(super) swept_until_ms: u64,
}

/// All of it is changed under one lock, so that a reader sees a batch whole or not at all.
#[derive(Debug)]
pub(super) struct State {
    pub(super) slots: IdMap<Slot>,
    /// Slots that wait for the index.
    pub(super) waiting: usize,
    /// Bytes appended since the indexer last took what was waiting.
    pub(super) waiting_bytes: u64,
    /// Where the entries stand that never expire.
    pub(super) unexpiring: BTreeMap<Position, RecordId>,
    /// How many those are.
    unexpiring_counts: [i64; Tag::COUNT],
    /// Versions of the entries of [`OLDEST_TRACKED`], and where they stand: 16 bytes each, and there should be few.
    pub(super) tracked: BTreeMap<u64, Position>,
    /// May be negative until the survey has counted what is in the index.
    pub(super) counts: [i64; Tag::COUNT],
    pub(super) segments: BTreeMap<u32, SegmentState>,
    /// Where the durable log ends.
    pub(super) end: LogPoint,
    pub(super) stopping: bool,
}

impl State {
    /// Empty, but for the log.
    pub(super) fn with(segments: BTreeMap<u32, SegmentState>, end: LogPoint) -> Self {
        Self {
            slots: IdMap::default(),
            waiting: 0,
            waiting_bytes: 0,
            unexpiring: BTreeMap::new(),
            unexpiring_counts: [0; Tag::COUNT],
            tracked: BTreeMap::new(),
            counts: [0; Tag::COUNT],
            segments,
            end,
            stopping: false,
        }
    }

    /// Puts `live` (`None`: removed) in the place of what stood under `id`. `in_index` tells whether the index may hold
    /// something under it if there is no slot now.
    pub(super) fn set(&mut self, id: RecordId, live: Option<Live>, in_index: bool) {
        let old = self.slots.remove(&id);
        let in_index = old.as_ref().map_or(in_index, |slot| slot.in_index);
        if let Some(old) = old {
            if old.for_index() {
                self.waiting = self.waiting.saturating_sub(1);
            } else if let Some(live) = old.live {
                self.unexpiring.remove(&live.located.position);
                add(&mut self.unexpiring_counts, live.located.tag, -1);
            }
        }
        if live.is_none() && !in_index {
            return;
        }
        let slot = Slot { live, in_index };
        if slot.for_index() {
            self.waiting += 1;
        } else if let Some(live) = &slot.live {
            self.unexpiring.insert(live.located.position, id);
            add(&mut self.unexpiring_counts, live.located.tag, 1);
        }
        self.slots.insert(id, slot);
    }

    pub(super) fn count(&mut self, located: &Located) {
        add(&mut self.counts, located.tag, 1);
        if located.tag == OLDEST_TRACKED {
            self.tracked.insert(located.version, located.position);
        }
    }

    pub(super) fn uncount(&mut self, located: &Located) {
        add(&mut self.counts, located.tag, -1);
        if located.tag == OLDEST_TRACKED {
            self.tracked.remove(&located.version);
        }
    }

    /// Whether none of a tag's entries expires. Counts only once the index has been walked through.
    pub(super) fn never_expire(&self, tag: Tag) -> bool {
        let at = usize::from(tag.0);
        self.counts.get(at) == self.unexpiring_counts.get(at)
    }

    /// Bytes of log from `position` to the end.
    pub(super) fn bytes_behind(&self, position: Position) -> u64 {
        let all: u64 = self.segments.range(position.segment..).map(|(_, segment)| segment.end).sum();
        all.saturating_sub(u64::from(position.offset))
    }

    /// Bytes of all segment files.
    pub(super) fn log_bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.capacity).sum()
    }
}

fn add(counts: &mut [i64; Tag::COUNT], tag: Tag, n: i64) {
    if let Some(count) = counts.get_mut(usize::from(tag.0)) {
        *count += n;
    }
}
