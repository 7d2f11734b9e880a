//! The log: numbered segment files of frames, the truth of the embedded store.

pub(crate) mod expiry;
pub(crate) mod frame;
pub(crate) mod scan;
pub(crate) mod segment;
pub(crate) mod summary;

use crate::store::files::{self, Fields};
use std::io;
use std::path::Path;

pub use scan::{frame_around, scan_bytes};

/// A place in the log: a segment and an offset in it. Later places are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Position {
    pub(crate) segment: u32,
    pub(crate) offset: u32,
}

/// Where a frame begins, or the log ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LogPoint {
    pub(crate) position: Position,
    /// Number of the frame that begins or will begin there.
    pub(crate) frame: u64,
}

/// The file `head`: which segment is the oldest that counts, and what the retired ones had come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) segment: u32,
    pub(crate) first_frame: u64,
    pub(crate) next_version: u64,
    pub(crate) newest_ms: u64,
}

pub(crate) const HEAD_FILE: &str = "head";
const HEAD_MAGIC: [u8; 8] = *b"OGLOGHD1";

impl Head {
    /// Writes it in place of the old one, durably.
    ///
    /// # Errors
    /// If it cannot be written; the old one then still stands.
    pub(crate) fn write(&self, log_dir: &Path) -> io::Result<()> {
        let mut bytes = HEAD_MAGIC.to_vec();
        bytes.extend_from_slice(&self.segment.to_le_bytes());
        for field in [self.first_frame, self.next_version, self.newest_ms] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        files::replace(log_dir, HEAD_FILE, &files::seal(bytes))
    }

    /// `None` if the bytes are damaged.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(files::checked(bytes)?);
        if fields.array() != Some(HEAD_MAGIC) {
            return None;
        }
        Some(Self {
            segment: fields.u32()?,
            first_frame: fields.u64()?,
            next_version: fields.u64()?,
            newest_ms: fields.u64()?,
        })
    }
}
