//! Reads frames back and tells the torn end of a crash from damage.

use super::expiry::ExpiryHistogram;
use super::frame::{ALIGN, ENTRY_HEADER, FLAG_RELAXED, FLAG_SEAL, FRAME_HEADER, FrameHeader, Kind, MAGIC, NEVER};
use super::segment::SEGMENT_HEADER;
use std::io;
use xxhash_rust::xxh3::xxh3_64;

/// Something that can be read at any offset.
pub(crate) trait ReadAt {
    /// Reads into `buf` from `offset` on; 0 at the end.
    ///
    /// # Errors
    /// If it cannot be read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
}

impl ReadAt for [u8] {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|at| self.get(at..)).unwrap_or_default();
        let n = rest.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..n), rest.get(..n)) {
            to.copy_from_slice(from);
        }
        Ok(n)
    }
}

/// What stands at an offset of a segment.
pub(crate) enum Scanned<'a> {
    Frame(FrameHeader, &'a [u8]),
    /// The file ends here, or nothing but zeros stands where a header would.
    Blank,
    Invalid(&'static str),
}

/// Reads a segment in large pieces.
pub(crate) struct FrameReader<'a, R: ReadAt + ?Sized> {
    source: &'a R,
    uid: u64,
    /// Bytes that are read at once, at least.
    piece: usize,
    buf: Vec<u8>,
    /// Offset in the file of the buffer's first byte, and how much of the buffer is filled.
    start: u64,
    filled: usize,
}

const PIECE: usize = 1 << 20;

impl<'a, R: ReadAt + ?Sized> FrameReader<'a, R> {
    pub(crate) fn new(source: &'a R, uid: u64) -> Self {
        Self::in_pieces(source, uid, PIECE)
    }

    /// For a few short looks, `piece` bytes at once are enough.
    pub(crate) fn in_pieces(source: &'a R, uid: u64, piece: usize) -> Self {
        Self { source, uid, piece, buf: Vec::new(), start: 0, filled: 0 }
    }

    /// Up to `want` bytes from `offset` on; fewer only at the end of the file.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(crate) fn window(&mut self, offset: u64, want: usize) -> io::Result<&[u8]> {
        let end = self.start + self.filled as u64;
        if offset < self.start || offset > end {
            (self.start, self.filled) = (offset, 0);
        }
        let mut skip = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
        if self.filled - skip < want {
            self.buf.copy_within(skip..self.filled, 0);
            (self.start, self.filled, skip) = (offset, self.filled - skip, 0);
            let len = want.max(self.piece);
            if self.buf.len() < len {
                self.buf.resize(len, 0);
            }
            while self.filled < want {
                let free = self.buf.get_mut(self.filled..).unwrap_or_default();
                match self.source.read_at(free, self.start + self.filled as u64)? {
                    0 => break,
                    n => self.filled += n,
                }
            }
        }
        let end = self.filled.min(skip + want);
        Ok(self.buf.get(skip..end).unwrap_or_default())
    }

    /// Reads what stands at `offset`.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(crate) fn frame(&mut self, offset: u64) -> io::Result<Scanned<'_>> {
        let uid = self.uid;
        let head = self.window(offset, FRAME_HEADER)?;
        if head.iter().all(|&byte| byte == 0) {
            return Ok(Scanned::Blank);
        }
        let Some(header) = head.first_chunk().and_then(FrameHeader::parse) else {
            return Ok(Scanned::Invalid("no frame header with a right checksum"));
        };
        if header.uid != uid {
            return Ok(Scanned::Invalid("a frame of another segment"));
        }
        let len = usize::try_from(header.payload_len).unwrap_or(usize::MAX);
        // A header may promise more than there is: do not reserve memory on its word alone.
        if len > PIECE && self.source.read_at(&mut [0], offset + (FRAME_HEADER + len) as u64 - 1)? == 0 {
            return Ok(Scanned::Invalid("the frame is cut off"));
        }
        let payload = self.window(offset, FRAME_HEADER + len)?.get(FRAME_HEADER..).unwrap_or_default();
        if payload.len() < len {
            return Ok(Scanned::Invalid("the frame is cut off"));
        }
        if xxh3_64(payload) != header.payload_hash {
            return Ok(Scanned::Invalid("wrong checksum over the frame"));
        }
        Ok(Scanned::Frame(header, payload))
    }

    /// Looks for a valid frame at or behind `from`, at every place where one could begin.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(crate) fn find(&mut self, from: u64) -> io::Result<Search> {
        let mut search = Search { valid: None, data: false };
        let mut offset = from.next_multiple_of(ALIGN as u64);
        let mut candidates = Vec::new();
        loop {
            let window = self.window(offset, PIECE)?;
            let len = window.len() as u64;
            candidates.clear();
            let (words, rest) = window.as_chunks::<ALIGN>();
            for (at, word) in words.iter().enumerate() {
                if *word != [0; ALIGN] {
                    search.data = true;
                    if word.starts_with(&MAGIC.to_le_bytes()) {
                        candidates.push(offset + (at * ALIGN) as u64);
                    }
                }
            }
            search.data |= rest.iter().any(|&byte| byte != 0);
            for &candidate in &candidates {
                if let Scanned::Frame(header, _) = self.frame(candidate)? {
                    search.valid = Some((candidate, header));
                    return Ok(search);
                }
            }
            if len < PIECE as u64 {
                return Ok(search);
            }
            offset += len;
        }
    }
}

/// What [`FrameReader::find`] has found.
#[derive(Debug)]
pub(crate) struct Search {
    pub(crate) valid: Option<(u64, FrameHeader)>,
    /// Whether anything but zeros stands there.
    pub(crate) data: bool,
}

/// What a pass over a whole segment has told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verified {
    /// Offset behind the last valid frame.
    pub(crate) end: u64,
    pub(crate) first_frame: Option<u64>,
    /// Number, next version of the last frame.
    pub(crate) last_frame: Option<(u64, u64)>,
    pub(crate) newest_ms: u64,
    pub(crate) sealed: bool,
    pub(crate) expiry: ExpiryHistogram,
    pub(crate) tail: Tail,
}

/// What stands behind the last valid frame of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Tail {
    /// Zeros where the next header would be, or the seal has been read.
    Clean,
    /// Not a valid frame: torn or damaged.
    Invalid(&'static str),
    /// A valid frame that must not stand here: never the trace of a crash.
    Impossible(String),
}

/// Why a segment ends where it does.
pub(crate) fn tail_text(tail: &Tail) -> &str {
    match tail {
        Tail::Clean => "the entries end here without a seal",
        Tail::Invalid(why) => why,
        Tail::Impossible(detail) => detail,
    }
}

/// No counter and no time gets beyond 48 bits within thousands of years. The index relies on it.
const PLAUSIBLE: u64 = (1 << 48) - 1;

fn is_plausible(header: &FrameHeader) -> bool {
    header.number.max(header.next_version).max(header.time_ms) <= PLAUSIBLE
}

/// The header of the frame that begins at an offset, if a valid one of this file does; its payload is not read.
///
/// # Errors
/// If the file cannot be read.
pub(crate) fn header_at<R: ReadAt + ?Sized>(source: &R, uid: u64, offset: u64) -> io::Result<Option<FrameHeader>> {
    let mut bytes = [0; FRAME_HEADER];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match source.read_at(rest, offset.saturating_add(filled as u64))? {
            0 => return Ok(None),
            n => filled += n,
        }
    }
    Ok(FrameHeader::parse(&bytes).filter(|header| header.uid == uid && is_plausible(header)))
}

/// Reads a whole segment and compares all its checksums.
///
/// # Errors
/// If the file cannot be read.
pub(crate) fn verify<R: ReadAt + ?Sized>(source: &R, uid: u64) -> io::Result<Verified> {
    let mut reader = FrameReader::new(source, uid);
    let mut verified = Verified {
        end: SEGMENT_HEADER,
        first_frame: None,
        last_frame: None,
        newest_ms: 0,
        sealed: false,
        expiry: ExpiryHistogram::default(),
        tail: Tail::Clean,
    };
    while !verified.sealed {
        let (header, payload) = match reader.frame(verified.end)? {
            Scanned::Frame(header, payload) => (header, payload),
            Scanned::Blank => break,
            Scanned::Invalid(why) => {
                verified.tail = Tail::Invalid(why);
                break;
            }
        };
        if let Some((number, next_version)) = verified.last_frame
            && (number.checked_add(1) != Some(header.number) || header.next_version < next_version)
        {
            verified.tail = Tail::Impossible(format!("frame number {} follows number {number}", header.number));
            break;
        }
        if !is_plausible(&header) {
            verified.tail = Tail::Impossible("a frame with implausible numbers".to_owned());
            break;
        }
        let mut count = 0;
        let mut malformed = false;
        for entry in super::frame::entries(payload) {
            let Ok((_, entry)) = entry else {
                malformed = true;
                break;
            };
            count += 1;
            if entry.kind != Kind::Remove && entry.expires_at_ms != NEVER {
                verified.expiry.add(entry.expires_at_ms, (ENTRY_HEADER + entry.value.len()) as u64);
            }
        }
        if malformed || count != header.entries {
            verified.tail = Tail::Impossible("a frame with a right checksum but malformed entries".to_owned());
            break;
        }
        verified.first_frame.get_or_insert(header.number);
        verified.last_frame = Some((header.number, header.next_version));
        verified.newest_ms = verified.newest_ms.max(header.time_ms);
        verified.sealed = header.flags & FLAG_SEAL != 0;
        verified.end += (FRAME_HEADER + payload.len()) as u64;
    }
    Ok(verified)
}

/// Whether a frame was acknowledged before it was flushed.
pub(crate) fn is_relaxed(header: &FrameHeader) -> bool {
    header.flags & FLAG_RELAXED != 0
}

/// Scans arbitrary bytes as a segment: for fuzzing. Returns the end of the valid frames, and whether one lies behind it.
///
/// # Errors
/// Never, since memory can be read.
#[doc(hidden)]
pub fn scan_bytes(bytes: &[u8], uid: u64) -> io::Result<(u64, bool)> {
    let verified = verify(bytes, uid)?;
    let search = FrameReader::new(bytes, uid).find(verified.end)?;
    Ok((verified.end, search.valid.is_some()))
}

/// Makes a frame with right checksums around an arbitrary payload: so that fuzzing gets behind them.
#[doc(hidden)]
#[must_use]
pub fn frame_around(payload: &[u8], entries: u32, flags: u32, uid: u64, number: u64) -> Vec<u8> {
    FrameHeader {
        flags,
        uid,
        number,
        next_version: number,
        time_ms: number,
        payload_len: u32::try_from(payload.len()).unwrap_or(u32::MAX),
        entries,
        payload_hash: xxh3_64(payload),
    }
    .encode()
    .into_iter()
    .chain(payload.iter().copied())
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::log::frame::{EntryRef, FrameBuilder};
    use crate::store::{RecordId, Tag};

    fn segment(frames: u64) -> Vec<u8> {
        let mut bytes = vec![0; SEGMENT_HEADER as usize];
        for number in 0..frames {
            let mut frame = FrameBuilder::default();
            frame.clear();
            for n in 0..3 {
                let (id, value) = (RecordId([n; 16]), [7; 20]);
                let (version, tag, expires_at_ms, time_ms) = (number, Tag(1), 1000, 10);
                frame.push(&EntryRef { id, version, kind: Kind::Put, tag, expires_at_ms, time_ms, value: &value });
            }
            bytes.extend_from_slice(frame.finish(0, 99, number, number, 10));
        }
        bytes
    }

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        let bytes = segment(5);
        let len = bytes.len() as u64;
        assert_eq!(scan_bytes(&bytes, 99).unwrap(), (len, false));
        // Another file's frames are none of this one.
        assert_eq!(scan_bytes(&bytes, 98).unwrap(), (SEGMENT_HEADER, false));
        let verified = verify(&bytes[..], 99).unwrap();
        assert_eq!((verified.first_frame, verified.last_frame), (Some(0), Some((4, 4))));
        assert_eq!(verified.expiry.entries(), 15);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let bytes = segment(2);
        let frame = (bytes.len() - 64) / 2;
        for at in 64..bytes.len() {
            for bit in 0..8 {
                let mut bytes = bytes.clone();
                bytes[at] ^= 1 << bit;
                let first = at < 64 + frame;
                let end = if first { SEGMENT_HEADER } else { SEGMENT_HEADER + frame as u64 };
                assert_eq!(scan_bytes(&bytes, 99).unwrap(), (end, first), "byte {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn frames_longer_than_a_piece_and_across_its_border() {
        let mut bytes = vec![0; SEGMENT_HEADER as usize];
        for number in 0..6 {
            let mut frame = FrameBuilder::default();
            frame.clear();
            let value = vec![number as u8; 700_000 * (number as usize % 3 + 1)];
            let (id, version, tag, expires_at_ms, time_ms) = (RecordId([1; 16]), number, Tag(1), NEVER, 10);
            frame.push(&EntryRef { id, version, kind: Kind::Put, tag, expires_at_ms, time_ms, value: &value });
            bytes.extend_from_slice(frame.finish(0, 99, number, number, 10));
        }
        assert_eq!(scan_bytes(&bytes, 99).unwrap(), (bytes.len() as u64, false));
        bytes[100_000] ^= 1;
        assert_eq!(scan_bytes(&bytes, 99).unwrap(), (SEGMENT_HEADER, true));
    }
}
