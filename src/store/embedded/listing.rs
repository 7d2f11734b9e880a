//! Listing: pages of what the store holds, roughly oldest first. A page is bounded work, and no lock is held over more than
//! a small piece of it.
//!
//! What never expires is in memory, and of the entries of [`OLDEST_TRACKED`] memory knows where they stand. All others are
//! found by a walk through the log: each entry in it is compared with what the store holds under its id, and only the one
//! place where it stands counts. What stands at a place moves on only towards the end, so a walk misses nothing; what the
//! sweep copies forward meanwhile may be met twice.

use super::commit::Found;
use super::{Lookup, Shared};
use crate::store::log::Position;
use crate::store::log::frame::{ALIGN, ENTRY_HEADER, EntryRef, FRAME_HEADER, FrameHeader, Kind, MAX_VALUE, NEVER};
use crate::store::log::scan::FrameReader;
use crate::store::log::segment::{SEGMENT_HEADER, Segment};
use crate::store::{Entry, OLDEST_TRACKED, Page, RecordId, StoreError, Tag, Value, Version};
use bytes::Bytes;
use std::io;
use std::ops::Bound::{Excluded, Unbounded};

/// Bytes of entries that a page looks at, roughly: a single large one is looked at whatever its size.
const BYTES_MAX: usize = 4 << 20;
/// Entries that are gathered under the store's lock at once.
const STEP: usize = 128;
/// Bytes of log read at once: where entries are read here and there, and in a walk for each entry that may be looked at.
const SMALL_PIECE: usize = 4096;
const PIECE_PER_VISIT: usize = 1024;
const PIECE_MAX: usize = 1 << 20;

/// Where a listing goes on. As a cursor: position or version, and the kind in the three lowest bits, which offsets leave free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// The entry or frame at this place of the log is next.
    Log(Position),
    /// Entries that never expire, from this place of the log on.
    Unexpiring(Position),
    /// Entries of [`OLDEST_TRACKED`] with greater versions than this one.
    Tracked(u64),
}

const START: Position = Position { segment: 0, offset: 0 };

impl Place {
    fn begin(shared: &Shared, tag: Option<Tag>) -> Self {
        match tag {
            None => Self::Log(START),
            // Until the index has been walked through, not all of them are known.
            Some(OLDEST_TRACKED) if shared.survey.is_done() => Self::Tracked(0),
            Some(_) => Self::Unexpiring(START),
        }
    }

    fn encode(self) -> u64 {
        let pack = |position: Position| u64::from(position.segment) << 32 | u64::from(position.offset) & !7;
        match self {
            Self::Log(position) => pack(position) | 1,
            Self::Unexpiring(position) => pack(position) | 2,
            Self::Tracked(version) => version << 3 | 3,
        }
    }

    /// `None`: nothing that a listing of this kind has given out.
    fn decode(cursor: u64, tag: Option<Tag>) -> Option<Self> {
        let position = Position {
            segment: u32::try_from(cursor >> 32).unwrap_or(u32::MAX),
            offset: u32::try_from(cursor & 0xffff_fff8).unwrap_or(u32::MAX),
        };
        match cursor & 7 {
            1 => Some(Self::Log(position)),
            2 if tag.is_some() => Some(Self::Unexpiring(position)),
            3 if tag == Some(OLDEST_TRACKED) => Some(Self::Tracked(cursor >> 3)),
            _ => None,
        }
    }
}

/// One page. Reads the disk.
///
/// # Errors
/// [`StoreError::Failed`], if the log or the index cannot be read.
pub(super) fn list(shared: &Shared, tag: Option<Tag>, after: u64, visit: usize) -> Result<Page, StoreError> {
    let mut pager = Pager { shared, tag, visits_left: visit.max(1), bytes_left: BYTES_MAX, entries: Vec::new() };
    let mut next = Some(Place::decode(after, tag).unwrap_or_else(|| Place::begin(shared, tag)));
    while let Some(place) = next
        && pager.has_room()
    {
        next = match place {
            Place::Log(from) => pager.walk(from)?,
            Place::Unexpiring(from) => pager.unexpiring(from),
            Place::Tracked(after) => pager.tracked(after)?,
        };
    }
    Ok(Page { entries: pager.entries, next: next.map(Place::encode) })
}

struct Pager<'a> {
    shared: &'a Shared,
    tag: Option<Tag>,
    visits_left: usize,
    bytes_left: usize,
    entries: Vec<(RecordId, Entry)>,
}

impl Pager<'_> {
    fn has_room(&self) -> bool {
        self.visits_left > 0 && self.bytes_left > 0
    }

    fn visit(&mut self, bytes: usize) {
        self.visits_left = self.visits_left.saturating_sub(1);
        self.bytes_left = self.bytes_left.saturating_sub(bytes);
    }

    fn wanted(&self, tag: Tag) -> bool {
        self.tag.is_none_or(|wanted| wanted == tag)
    }

    /// A piece of what never expires.
    fn unexpiring(&mut self, from: Position) -> Option<Place> {
        let state = self.shared.state();
        let mut next = Some(Place::Log(START));
        for (at, (position, id)) in state.unexpiring.range(from..).enumerate() {
            if at >= STEP || !self.has_room() {
                next = Some(Place::Unexpiring(*position));
                break;
            }
            let live = state.slots.get(id).and_then(|slot| slot.live.as_ref());
            self.visit(live.and_then(|live| live.value.as_ref()).map_or(0, Bytes::len));
            if let Some(live) = live.filter(|live| self.wanted(live.located.tag))
                && let Ok(entry) = Found::Memory(live.clone()).read(*id)
            {
                self.entries.push((*id, entry));
            }
        }
        next
    }

    /// A piece of those of [`OLDEST_TRACKED`].
    fn tracked(&mut self, after: u64) -> Result<Option<Place>, StoreError> {
        let wanted = STEP.min(self.visits_left);
        let state = self.shared.state();
        let found: Vec<_> = state
            .tracked
            .range((Excluded(after), Unbounded))
            .take(wanted)
            .map(|(version, at)| (*version, *at, state.segments.get(&at.segment).map(|state| state.segment.clone())))
            .collect();
        drop(state);
        let mut last = None;
        for (version, position, segment) in &found {
            if !self.has_room() {
                return Ok(last);
            }
            last = Some(Place::Tracked(*version));
            let Some(segment) = segment else { continue };
            let mut reader = FrameReader::in_pieces(&**segment, segment.uid, SMALL_PIECE);
            let entry = entry_at(&mut reader, u64::from(position.offset), u64::MAX).map_err(unreadable(segment))?;
            self.visit(entry.as_ref().map_or(0, EntryRef::size));
            match entry.filter(|entry| entry.version == *version && self.wanted(entry.tag)) {
                Some(entry) => self.entries.push((entry.id, owned(&entry))),
                None => passed_over(segment, u64::from(position.offset)),
            }
        }
        // Fewer than asked for: there are no more.
        Ok(last.filter(|_| found.len() == wanted))
    }

    /// On through one segment of the log.
    fn walk(&mut self, from: Position) -> Result<Option<Place>, StoreError> {
        let state = self.shared.state();
        if let Some(tag) = self.tag
            && self.shared.survey.is_done()
            && state.never_expire(tag)
        {
            return Ok(None);
        }
        // A segment that has been retired meanwhile held nothing any more that counts.
        let mut segments = state.segments.range(from.segment..);
        let Some((number, state_of)) = segments.next() else { return Ok(None) };
        let (segment, end) = (state_of.segment.clone(), state_of.end);
        let next = segments.next().map(|(next, _)| Place::Log(Position { segment: *next, offset: 0 }));
        let begin = if *number == from.segment { u64::from(from.offset) } else { 0 };
        let mut at = begin.max(SEGMENT_HEADER).next_multiple_of(ALIGN as u64);
        drop(state);

        let piece = self.visits_left.saturating_mul(PIECE_PER_VISIT).clamp(SMALL_PIECE, PIECE_MAX);
        let mut reader = FrameReader::in_pieces(&*segment, segment.uid, piece);
        while at < end {
            let place = Position { segment: segment.number, offset: u32::try_from(at).unwrap_or(u32::MAX) };
            if !self.has_room() {
                return Ok(Some(Place::Log(place)));
            }
            if is_frame(&mut reader, segment.uid, at).map_err(unreadable(&segment))? {
                at += FRAME_HEADER as u64;
                continue;
            }
            if let Some(entry) = entry_at(&mut reader, at, end).map_err(unreadable(&segment))? {
                at += entry.size() as u64;
                self.visit(entry.size());
                if self.wanted(entry.tag) && self.stands_at(&entry, place)? {
                    self.entries.push((entry.id, owned(&entry)));
                }
            } else {
                self.visit(ENTRY_HEADER);
                passed_over(&segment, at);
                at = behind_damage(&mut reader, &segment, at, end).map_err(unreadable(&segment))?;
            }
        }
        Ok(next)
    }

    /// Whether the store holds the entry, and at this very place.
    fn stands_at(&self, entry: &EntryRef<'_>, place: Position) -> Result<bool, StoreError> {
        if entry.kind == Kind::Remove {
            return Ok(false);
        }
        if entry.expires_at_ms == NEVER {
            // With a tag, a listing begins with these.
            return Ok(self.tag.is_none() && self.shared.state().unexpiring.contains_key(&place));
        }
        if entry.tag == OLDEST_TRACKED && self.shared.survey.is_done() {
            return Ok(self.shared.state().tracked.get(&entry.version) == Some(&place));
        }
        match self.shared.look_up(entry.id) {
            Ok(Lookup::Found(found)) => Ok(found.located().position == place),
            Ok(Lookup::Absent { .. }) => Ok(false),
            Err(StoreError::Damaged { id, detail }) => {
                tracing::error!(%id, detail, "a listing passes over a damaged entry");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

fn unreadable(segment: &Segment) -> impl Fn(io::Error) -> StoreError {
    move |error| StoreError::Failed { reason: format!("reading {}: {error}", segment.path.display()) }
}

fn passed_over(segment: &Segment, offset: u64) {
    let segment = segment.path.display();
    tracing::error!(%segment, offset, "a listing passes over this place of the log, where no valid entry begins");
}

fn owned(entry: &EntryRef<'_>) -> Entry {
    let expires_at_ms = (entry.expires_at_ms != NEVER).then_some(entry.expires_at_ms);
    let bytes = Bytes::copy_from_slice(entry.value);
    Entry { version: Version(entry.version), value: Value { tag: entry.tag, expires_at_ms, bytes } }
}

type Reader<'a> = FrameReader<'a, Segment>;

fn is_frame(reader: &mut Reader<'_>, uid: u64, at: u64) -> io::Result<bool> {
    let header = reader.window(at, FRAME_HEADER)?.first_chunk().and_then(FrameHeader::parse);
    Ok(header.is_some_and(|header| header.uid == uid))
}

/// Bytes of the entry whose header stands at `at`, by its own word.
fn entry_len(reader: &mut Reader<'_>, at: u64) -> io::Result<Option<usize>> {
    let header = reader.window(at, ENTRY_HEADER)?.first_chunk();
    Ok(header.and_then(EntryRef::value_len).filter(|len| *len <= MAX_VALUE).map(|len| ENTRY_HEADER + len))
}

/// The entry that begins at `at`; `None` if none with a right checksum does that ends before `end`.
fn entry_at<'a>(reader: &'a mut Reader<'_>, at: u64, end: u64) -> io::Result<Option<EntryRef<'a>>> {
    match entry_len(reader, at)? {
        Some(len) if len as u64 <= end.saturating_sub(at) => Ok(EntryRef::parse(reader.window(at, len)?, true)),
        _ => Ok(None),
    }
}

/// Where to go on if no valid entry stands at `at`: behind it, if its length makes sense, or else at the next frame.
fn behind_damage(reader: &mut Reader<'_>, segment: &Segment, at: u64, end: u64) -> io::Result<u64> {
    if let Some(len) = entry_len(reader, at)? {
        let behind = at + len.next_multiple_of(ALIGN) as u64;
        if behind == end
            || behind < end && (is_frame(reader, segment.uid, behind)? || entry_at(reader, behind, end)?.is_some())
        {
            return Ok(behind);
        }
    }
    Ok(reader.find(at + ALIGN as u64)?.valid.map_or(end, |(frame, _)| frame.min(end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_are_read_back_and_never_zero() {
        let positions = [(0, 64), (1, 64), (7, 4096), (u32::MAX, u32::MAX - 7)]
            .map(|(segment, offset)| Position { segment, offset });
        let places = positions.iter().flat_map(|position| [Place::Log(*position), Place::Unexpiring(*position)]);
        for place in places.chain([Place::Tracked(1), Place::Tracked((1 << 48) - 1)]) {
            let cursor = place.encode();
            assert_ne!(cursor, 0);
            assert_eq!(Place::decode(cursor, Some(OLDEST_TRACKED)), Some(place));
        }
        // A cursor of another kind of listing begins anew, instead of leaving out what that one does not show.
        assert_eq!(Place::decode(Place::Tracked(9).encode(), None), None);
        assert_eq!(Place::decode(Place::Tracked(9).encode(), Some(Tag(1))), None);
        assert_eq!(Place::decode(Place::Unexpiring(START).encode(), None), None);
        assert_eq!(Place::decode(0, None), None);
    }
}
