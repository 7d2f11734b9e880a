//! What a sealed segment holds, noted in a file beside it, so that a start need not read all of a large log. Derived from
//! the segment: where the note is missing, damaged or contradicted, the segment itself is read.
//!
//! Little of it has to be believed: the segment's first frame and its seal tell the frames' numbers, the next version,
//! the newest time, and that the segment ends there. Only the histogram stands here alone; it decides when a sweep looks
//! through the segment, while what that does with an entry depends on the entry itself.
//!
//! ```text
//! summary = magic [8] | format u32 | segment uid u64 | end u64 | first frame u64 | last frame u64 | next version u64
//!         | newest_ms u64 | histogram | xxh3(all before) u64
//! ```

use super::expiry::ExpiryHistogram;
use super::frame::{FLAG_SEAL, FRAME_HEADER};
use super::scan::{self, Tail, Verified};
use super::segment::{SEGMENT_HEADER, Segment};
use crate::store::files::{self, Fields};
use std::io;
use std::path::{Path, PathBuf};

const MAGIC: [u8; 8] = *b"OGSUMMRY";
const FORMAT: u32 = 1;

fn file_name(number: u32) -> String {
    format!("{number:016x}.sum")
}

fn path(dir: &Path, number: u32) -> PathBuf {
    dir.join(file_name(number))
}

/// Notes what a sealed segment holds.
///
/// # Errors
/// If it cannot be written; nothing is lost by that.
pub(crate) fn write(dir: &Path, segment: &Segment, sealed: &Verified) -> io::Result<()> {
    let (Some(first), Some((last, next_version))) = (sealed.first_frame, sealed.last_frame) else { return Ok(()) };
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&FORMAT.to_le_bytes());
    for field in [segment.uid, sealed.end, first, last, next_version, sealed.newest_ms] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    sealed.expiry.encode(&mut out);
    files::replace(dir, &file_name(segment.number), &files::seal(out))
}

/// What was noted of a segment, if it can be believed: it is about this very file, which begins and ends as it says, with
/// a seal.
///
/// # Errors
/// If the segment cannot be read.
pub(crate) fn read(dir: &Path, segment: &Segment) -> io::Result<Option<Verified>> {
    let bytes = std::fs::read(path(dir, segment.number)).unwrap_or_default();
    let Some(noted) = files::checked(&bytes).and_then(|body| decode(body, segment.uid)) else { return Ok(None) };
    let Some(seal_at) = noted.end.checked_sub(FRAME_HEADER as u64).filter(|&at| at >= SEGMENT_HEADER) else {
        return Ok(None);
    };
    let first = scan::header_at(segment, segment.uid, SEGMENT_HEADER)?;
    let seal = scan::header_at(segment, segment.uid, seal_at)?;
    let agrees = first.zip(seal).is_some_and(|(first, seal)| {
        seal.flags & FLAG_SEAL != 0
            && seal.payload_len == 0
            && noted.first_frame == Some(first.number)
            && noted.last_frame == Some((seal.number, seal.next_version))
            && noted.newest_ms == seal.time_ms
            && first.number <= seal.number
            && first.next_version <= seal.next_version
    });
    Ok(agrees.then_some(noted))
}

/// Removes the note of a segment.
///
/// # Errors
/// If it is there and cannot be removed.
pub(crate) fn remove(dir: &Path, number: u32) -> io::Result<()> {
    match std::fs::remove_file(path(dir, number)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes notes without a segment, and what was left of one that was being written.
///
/// # Errors
/// If the directory cannot be listed, or a file not be removed.
pub(crate) fn tidy(dir: &Path, segments: &[Segment]) -> io::Result<()> {
    for file in std::fs::read_dir(dir)? {
        let name = file?.file_name();
        let Some(name) = name.to_str() else { continue };
        let whole = name.strip_suffix(".tmp");
        let Some(number) = whole.unwrap_or(name).strip_suffix(".sum") else { continue };
        let known = u32::from_str_radix(number, 16)
            .is_ok_and(|number| segments.binary_search_by_key(&number, |segment| segment.number).is_ok());
        if whole.is_some() || !known {
            std::fs::remove_file(dir.join(name))?;
        }
    }
    Ok(())
}

fn decode(body: &[u8], uid: u64) -> Option<Verified> {
    let mut fields = Fields(body);
    if fields.array() != Some(MAGIC) || fields.u32() != Some(FORMAT) || fields.u64() != Some(uid) {
        return None;
    }
    let (end, first, last) = (fields.u64()?, fields.u64()?, fields.u64()?);
    let (next_version, newest_ms) = (fields.u64()?, fields.u64()?);
    let expiry = ExpiryHistogram::decode(&mut fields, end).filter(|_| fields.0.is_empty())?;
    Some(Verified {
        end,
        first_frame: Some(first),
        last_frame: Some((last, next_version)),
        newest_ms,
        sealed: true,
        expiry,
        tail: Tail::Clean,
    })
}
