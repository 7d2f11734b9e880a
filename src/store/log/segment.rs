//! Segment files: preallocated, zero-filled, appended to, never recycled, so that nothing old can lie behind the end.

use super::scan::ReadAt;
use crate::store::files::{self, Fields};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes before the first frame.
pub(crate) const SEGMENT_HEADER: u64 = 64;
pub(crate) const FORMAT: u32 = 1;
const MAGIC: [u8; 8] = *b"OGSEGMNT";

/// Identifies a store: its log, its index and its settings belong together.
pub(crate) type StoreId = [u8; 16];

/// An open segment file. It stays readable for whoever holds it, even after it was unlinked.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) number: u32,
    /// Random: bytes that are no frame of this very file never look like one.
    pub(crate) uid: u64,
    pub(crate) path: PathBuf,
    pub(crate) file: File,
}

#[derive(Debug)]
pub(crate) enum HeaderFault {
    /// Blank or cut off: its creation was interrupted, or it was emptied.
    Blank,
    Damaged,
    Format(u32),
    /// It names another segment or another store.
    Foreign,
}

impl Segment {
    pub(crate) fn file_name(number: u32) -> String {
        format!("{number:016x}.seg")
    }

    /// The number in a segment's file name.
    pub(crate) fn parse_name(name: &str) -> Option<u32> {
        let digits = name.strip_suffix(".seg").filter(|digits| digits.len() == 16)?;
        u32::from_str_radix(digits, 16).ok().filter(|&number| Self::file_name(number) == name)
    }

    /// Creates the file with room for `capacity` bytes, durably.
    ///
    /// # Errors
    /// If it cannot be created, preallocated (no space) or synced; what was created is removed again.
    pub(crate) fn create(dir: &Path, number: u32, store: StoreId, capacity: u64) -> io::Result<Self> {
        let path = dir.join(Self::file_name(number));
        let create = || {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
            preallocate(&file, capacity)?;
            let uid = u64::from_le_bytes(files::random()?);
            file.write_all_at(&Self::header(number, uid, store), 0)?;
            file.sync_all()?;
            files::sync_dir(dir)?;
            Ok(Self { number, uid, path: path.clone(), file })
        };
        create().inspect_err(|_| {
            let _ = std::fs::remove_file(&path);
        })
    }

    fn header(number: u32, uid: u64, store: StoreId) -> Vec<u8> {
        let mut header = Vec::with_capacity(64);
        header.extend_from_slice(&MAGIC);
        header.extend_from_slice(&FORMAT.to_le_bytes());
        header.extend_from_slice(&number.to_le_bytes());
        header.extend_from_slice(&uid.to_le_bytes());
        header.extend_from_slice(&store);
        header.extend_from_slice(&[0; 16]);
        files::seal(header)
    }

    /// Opens an existing segment.
    ///
    /// # Errors
    /// The outer error if the file cannot be read, the inner one if its header is not what it must be.
    pub(crate) fn open(dir: &Path, number: u32, store: StoreId) -> io::Result<Result<Self, HeaderFault>> {
        let path = dir.join(Self::file_name(number));
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let mut header = [0; 64];
        let mut filled = 0;
        while let Some(rest) = header.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match file.read_at(rest, filled as u64)? {
                0 => break,
                n => filled += n,
            }
        }
        if filled < header.len() || header == [0; 64] {
            return Ok(Err(HeaderFault::Blank));
        }
        Ok(match Self::check_header(&header, number, store) {
            Ok(uid) => Ok(Self { number, uid, path, file }),
            Err(fault) => Err(fault),
        })
    }

    fn check_header(header: &[u8; 64], number: u32, store: StoreId) -> Result<u64, HeaderFault> {
        let body = files::checked(header).ok_or(HeaderFault::Damaged)?;
        let mut fields = Fields(body);
        if fields.array() != Some(MAGIC) {
            return Err(HeaderFault::Damaged);
        }
        match fields.u32() {
            Some(FORMAT) => {}
            other => return Err(HeaderFault::Format(other.unwrap_or(0))),
        }
        let named = fields.u32();
        let uid = fields.u64().ok_or(HeaderFault::Damaged)?;
        if named != Some(number) || fields.array() != Some(store) {
            return Err(HeaderFault::Foreign);
        }
        Ok(uid)
    }

    pub(crate) fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Makes room up to `capacity` bytes, durably.
    ///
    /// # Errors
    /// If there is no space.
    pub(crate) fn extend(&self, capacity: u64) -> io::Result<()> {
        preallocate(&self.file, capacity)?;
        self.file.sync_all()
    }

    /// Cuts everything from `end` on off, durably, and makes the room for `capacity` bytes anew, all zeros.
    ///
    /// # Errors
    /// If it cannot be cut; missing space for the new room is none.
    pub(crate) fn cut(&self, end: u64, capacity: u64) -> io::Result<()> {
        self.file.set_len(end)?;
        self.file.sync_all()?;
        match self.extend(capacity) {
            Err(error) if is_full(&error) => Ok(()),
            other => other,
        }
    }
}

impl ReadAt for Segment {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            match self.file.read_at(buf, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }
}

/// Whether an error says that the disk (or the quota) is full.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn preallocate(file: &File, capacity: u64) -> io::Result<()> {
    use rustix::io::Errno;
    loop {
        return match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, capacity) {
            Ok(()) => Ok(()),
            Err(Errno::INTR) => continue,
            // File systems without it: a sparse file does, only slower.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => match file.metadata()?.len() {
                len if len < capacity => file.set_len(capacity),
                _ => Ok(()),
            },
            Err(error) => Err(error.into()),
        };
    }
}
