//! Frames: what one commit appends. A frame is valid whole or not at all, because after a power cut any of its
//! pages may be missing while later ones are there.
//!
//! ```text
//! frame  = magic u32 | flags u32 | segment uid u64 | number u64 | next version u64 | time_ms u64
//!        | payload length u32 | entries u32 | xxh3(payload) u64 | xxh3(the 56 bytes before) u64 | payload
//! entry  = xxh3(the rest, without padding) u64 | id [16] | version u64 | expires_at_ms u64 | time_ms u64
//!        | value length u32 | kind u8 | tag u8 | 0 u16 | value | zeros up to a multiple of 8
//! ```
//! All numbers are little-endian; `expires_at_ms` is `u64::MAX` for entries that never expire.

use crate::store::files::Fields;
use crate::store::{RecordId, Tag};
use xxhash_rust::xxh3::xxh3_64;

pub(crate) const FRAME_HEADER: usize = 64;
pub(crate) const ENTRY_HEADER: usize = 56;
/// Frames begin at multiples of this.
pub(crate) const ALIGN: usize = 8;
/// Larger values are refused. Offsets within a segment fit into 32 bits because of it, and an eighth of it into 24.
pub(crate) const MAX_VALUE: usize = 64 << 20;
pub(crate) const MAGIC: u32 = 0x4d52_464f;
/// The last frame of its segment: another segment follows.
pub(crate) const FLAG_SEAL: u32 = 1;
/// Acknowledged before it was flushed.
pub(crate) const FLAG_RELAXED: u32 = 2;
pub(crate) const NEVER: u64 = u64::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Put = 1,
    Remove = 2,
    /// A live entry of an old segment, written again so that the segment can go.
    Copied = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    pub(crate) flags: u32,
    pub(crate) uid: u64,
    /// Counts the frames of the log without a gap, across segments.
    pub(crate) number: u64,
    /// All versions below it have been given out.
    pub(crate) next_version: u64,
    pub(crate) time_ms: u64,
    pub(crate) payload_len: u32,
    pub(crate) entries: u32,
    pub(crate) payload_hash: u64,
}

impl FrameHeader {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FRAME_HEADER);
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&self.flags.to_le_bytes());
        for field in [self.uid, self.number, self.next_version, self.time_ms] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&self.payload_len.to_le_bytes());
        out.extend_from_slice(&self.entries.to_le_bytes());
        out.extend_from_slice(&self.payload_hash.to_le_bytes());
        crate::store::files::seal(out)
    }

    /// `None` unless the bytes are a frame header with a right checksum.
    pub(crate) fn parse(bytes: &[u8; FRAME_HEADER]) -> Option<Self> {
        let mut fields = Fields(crate::store::files::checked(bytes)?);
        if fields.u32()? != MAGIC {
            return None;
        }
        Some(Self {
            flags: fields.u32()?,
            uid: fields.u64()?,
            number: fields.u64()?,
            next_version: fields.u64()?,
            time_ms: fields.u64()?,
            payload_len: fields.u32()?,
            entries: fields.u32()?,
            payload_hash: fields.u64()?,
        })
    }
}

/// One entry, borrowed from a frame or about to be put into one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EntryRef<'a> {
    pub(crate) id: RecordId,
    pub(crate) version: u64,
    pub(crate) kind: Kind,
    pub(crate) tag: Tag,
    /// [`NEVER`] if it does not expire.
    pub(crate) expires_at_ms: u64,
    pub(crate) time_ms: u64,
    pub(crate) value: &'a [u8],
}

impl<'a> EntryRef<'a> {
    /// Reads the entry at the front of `bytes`; the checksum is compared only on demand, since a frame has its own.
    /// `None` if it is malformed.
    pub(crate) fn parse(bytes: &'a [u8], compare_checksum: bool) -> Option<Self> {
        let mut fields = Fields(bytes);
        let hash = fields.u64()?;
        let id = RecordId(fields.array()?);
        let version = fields.u64()?;
        let expires_at_ms = fields.u64()?;
        let time_ms = fields.u64()?;
        let len = usize::try_from(fields.u32()?).ok()?;
        let kind = match fields.u8()? {
            1 => Kind::Put,
            2 => Kind::Remove,
            3 => Kind::Copied,
            _ => return None,
        };
        let tag = Tag(fields.u8()?);
        if usize::from(tag.0) >= Tag::COUNT || fields.array::<2>()? != [0, 0] {
            return None;
        }
        let value = fields.bytes(len)?;
        if compare_checksum && xxh3_64(bytes.get(8..ENTRY_HEADER + len)?) != hash {
            return None;
        }
        Some(Self { id, version, kind, tag, expires_at_ms, time_ms, value })
    }

    /// The time in an entry's header.
    pub(crate) fn time_ms(header: &[u8; ENTRY_HEADER]) -> Option<u64> {
        let mut fields = Fields(header);
        fields.bytes(8 + 16 + 8 + 8)?;
        fields.u64()
    }

    /// The length of the value, by the word of an entry's header.
    pub(crate) fn value_len(header: &[u8; ENTRY_HEADER]) -> Option<usize> {
        let mut fields = Fields(header);
        fields.bytes(8 + 16 + 8 + 8 + 8)?;
        usize::try_from(fields.u32()?).ok()
    }

    /// Bytes it takes in a frame.
    pub(crate) fn size(&self) -> usize {
        (ENTRY_HEADER + self.value.len()).next_multiple_of(ALIGN)
    }
}

/// Splits the payload of a frame into entries and their offsets in it; `Err` once if the rest is malformed.
pub(crate) fn entries(payload: &[u8]) -> impl Iterator<Item = Result<(usize, EntryRef<'_>), ()>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = payload.get(at..).filter(|rest| !rest.is_empty())?;
        let Some(entry) = EntryRef::parse(rest, false).filter(|entry| entry.size() <= rest.len()) else {
            at = payload.len();
            return Some(Err(()));
        };
        let offset = at;
        at += entry.size();
        Some(Ok((offset, entry)))
    })
}

/// Collects the entries of one commit. Reused from commit to commit.
#[derive(Debug, Default)]
pub(crate) struct FrameBuilder {
    bytes: Vec<u8>,
    entries: u32,
}

impl FrameBuilder {
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.resize(FRAME_HEADER, 0);
        // One huge value must not hold its memory for ever.
        self.bytes.shrink_to(8 << 20);
        self.entries = 0;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Bytes of the frame, header included.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn entries(&self) -> u32 {
        self.entries
    }

    /// Appends an entry and returns its offset in the frame.
    pub(crate) fn push(&mut self, entry: &EntryRef<'_>) -> usize {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 8]);
        self.bytes.extend_from_slice(&entry.id.0);
        for field in [entry.version, entry.expires_at_ms, entry.time_ms] {
            self.bytes.extend_from_slice(&field.to_le_bytes());
        }
        self.bytes.extend_from_slice(&u32::try_from(entry.value.len()).unwrap_or(u32::MAX).to_le_bytes());
        self.bytes.extend_from_slice(&[entry.kind as u8, entry.tag.0, 0, 0]);
        self.bytes.extend_from_slice(entry.value);
        let hash = self.bytes.get(start + 8..).map_or(0, xxh3_64);
        if let Some(place) = self.bytes.get_mut(start..start + 8) {
            place.copy_from_slice(&hash.to_le_bytes());
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        self.entries += 1;
        start
    }

    /// Fills in the header: the frame is ready to be written.
    pub(crate) fn finish(&mut self, flags: u32, uid: u64, number: u64, next_version: u64, time_ms: u64) -> &[u8] {
        let payload = self.bytes.get(FRAME_HEADER..).unwrap_or_default();
        let header = FrameHeader {
            flags,
            uid,
            number,
            next_version,
            time_ms,
            payload_len: u32::try_from(payload.len()).unwrap_or(u32::MAX),
            entries: self.entries,
            payload_hash: xxh3_64(payload),
        };
        if let Some(place) = self.bytes.get_mut(..FRAME_HEADER) {
            place.copy_from_slice(&header.encode());
        }
        &self.bytes
    }
}
