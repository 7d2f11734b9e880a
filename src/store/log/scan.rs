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
    buf: Vec<u8>,
    /// Offset in the file of the buffer's first byte, and how much of the buffer is filled.
    start: u64,
    filled: usize,
}

const PIECE: usize = 1 << 20;

impl<'a, R: ReadAt + ?Sized> FrameReader<'a, R> {
    pub(crate) fn new(source: &'a R, uid: u64) -> Self {
        Self { source, uid, buf: Vec::new(), start: 0, filled: 0 }
    }

    /// Up to `want` bytes from `offset` on; fewer only at the end of the file.
    fn window(&mut self, offset: u64, want: usize) -> io::Result<&[u8]> {
        let end = self.start + self.filled as u64;
        if offset < self.start || offset > end {
            (self.start, self.filled) = (offset, 0);
        }
        let mut skip = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
        if self.filled - skip < want {
            self.buf.copy_within(skip..self.filled, 0);
            (self.start, self.filled, skip) = (offset, self.filled - skip, 0);
            if self.buf.len() < want.max(PIECE) {
                self.buf.resize(want.max(PIECE), 0);
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
#[derive(Debug)]
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
#[derive(Debug)]
pub(crate) enum Tail {
    /// Zeros where the next header would be, or the seal has been read.
    Clean,
    /// Not a valid frame: torn or damaged.
    Invalid(&'static str),
    /// A valid frame that must not stand here: never the trace of a crash.
    Impossible(String),
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

/// Scans arbitrary bytes as a segment: for fuzzing. Returns the end of the valid frames and whether others lie behind.
///
/// # Errors
/// Never, since memory can be read.
pub fn scan_bytes(bytes: &[u8], uid: u64) -> io::Result<(u64, bool)> {
    let verified = verify(bytes, uid)?;
    let search = FrameReader::new(bytes, uid).find(verified.end)?;
    Ok((verified.end, search.valid.is_some()))
}
