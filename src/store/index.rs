//! The index of the embedded store: where in the log the settled record of an id stands. It is derived from the log
//! and may be deleted at any time while the store is closed.

mod fjall;
mod format;
mod sled;

use super::files;
use super::log::segment::StoreId;
use super::log::{LogPoint, Position};
use super::{RecordId, Tag};
use std::path::Path;

/// What keeps the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// A B-tree: for up to a few million live records.
    Sled,
    /// A log-structured merge tree: less memory, disk and time per record, the more the more there are.
    Fjall,
}

impl Engine {
    fn name(self) -> &'static str {
        match self {
            Self::Sled => "sled",
            Self::Fjall => "fjall",
        }
    }
}

/// A file that names the engine that made the index.
const ENGINE: &str = "engine";
/// A file that says: do not use this index.
const CONDEMNED: &str = "condemned";

/// Opens the index that stands at `path`.
///
/// # Errors
/// If it cannot be used: it was condemned, another engine made it, or the engine cannot open it.
pub(crate) fn open(path: &Path, engine: Engine, tuning: Tuning, store: StoreId) -> Result<Box<dyn Index>, IndexError> {
    if path.join(CONDEMNED).exists() {
        return Err(IndexError("it was found to be wrong while it was in use".to_owned()));
    }
    match std::fs::read(path.join(ENGINE)) {
        Ok(made_by) if made_by == engine.name().as_bytes() => {}
        Ok(made_by) => {
            let made_by = String::from_utf8_lossy(&made_by);
            return Err(IndexError(format!("{made_by:?} made it, and store.engine is {:?} now", engine.name())));
        }
        Err(error) => return Err(IndexError(format!("it does not tell which engine made it: {error}"))),
    }
    Ok(match engine {
        Engine::Sled => Box::new(sled::SledIndex::open(path, store)?),
        Engine::Fjall => Box::new(fjall::FjallIndex::open(path, tuning, store)?),
    })
}

/// Creates an index where there is none.
///
/// # Errors
/// If the engine cannot, or its files cannot be written or synced.
pub(crate) fn create(
    path: &Path,
    engine: Engine,
    tuning: Tuning,
    store: StoreId,
) -> Result<Box<dyn Index>, IndexError> {
    files::create_dir(path)
        .and_then(|()| files::replace(path, ENGINE, engine.name().as_bytes()))
        .map_err(|error| IndexError(error.to_string()))?;
    open(path, engine, tuning, store)
}

fn condemn(path: &Path) -> Result<(), IndexError> {
    files::replace(path, CONDEMNED, b"").map_err(|error| IndexError(error.to_string()))
}

/// Sizes that tests make small.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tuning {
    /// Bytes of entries that fjall gathers in memory before it writes them to a table.
    pub(crate) memtable_bytes: u64,
}

/// What the index knows of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Located {
    pub(crate) position: Position,
    /// Length of the value in bytes; an index may round it up to a multiple of 8, since entries are padded to that.
    pub(crate) len: u32,
    pub(crate) tag: Tag,
    pub(crate) version: u64,
    /// An index may round it up to seconds. The log has it exactly.
    pub(crate) expires_at_ms: u64,
}

/// What becomes of the entry under an id.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) id: RecordId,
    /// `None` removes it.
    pub(crate) new: Option<Located>,
    /// Nothing stands under the id: whoever wrote the entry has looked.
    pub(crate) is_new: bool,
}

/// What is known of an entry besides what stands in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// The checkpoint vouches for it, together with all others of its bucket.
    Settled,
    /// The index was stopped while it changed the entry. What became of it stands in the log behind the checkpoint; if
    /// nothing does, it had been dropped.
    Gone,
}

/// How far the index has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    /// Replay begins here: everything before it is in the index, or needs not be.
    pub(crate) replay_from: Position,
    /// Where the log ended when the index was last brought up to date. The log can never be shorter than that.
    pub(crate) applied_to: LogPoint,
}

#[derive(Clone, Debug, thiserror::Error)]
#[error("index: {0}")]
pub(crate) struct IndexError(pub(crate) String);

/// The index is checked in so many parts, by the first bits of the ids.
pub(crate) const BUCKETS: usize = 1024;

/// The part that an id belongs to.
pub(crate) fn bucket(id: RecordId) -> usize {
    let RecordId([first, second, ..]) = id;
    usize::from(u16::from_be_bytes([first, second]) >> (16 - BUCKETS.trailing_zeros()))
}

/// Calls one after the other, except `get` and `check`.
pub(crate) trait Index: Send + Sync {
    fn get(&self, id: RecordId) -> Result<Option<Located>, IndexError>;

    /// Applies changes, sorted by id, then makes them and the checkpoint durable, in this order.
    fn apply(&self, changes: &[Change], checkpoint: Checkpoint) -> Result<(), IndexError>;

    /// The checkpoint; `None` if there is none or it is damaged.
    fn checkpoint(&self) -> Result<Option<Checkpoint>, IndexError>;

    /// About how many entries it holds.
    fn entries(&self) -> u64;

    /// Walks through one bucket, and compares it with what the checkpoint says of it. To be called once for each bucket
    /// before the first change.
    ///
    /// # Errors
    /// If an entry cannot be read, or entries are missing or changed.
    fn check(&self, bucket: usize, visit: &mut dyn FnMut(RecordId, Located, Known)) -> Result<(), IndexError>;

    /// It was found to be wrong: it is not to be used after the next start.
    ///
    /// # Errors
    /// If that cannot be noted.
    fn condemn(&self) -> Result<(), IndexError>;

    /// Bytes that have to be free on the disk before so many changes are applied, generously estimated: engines break
    /// for good when they meet a full disk, so they must not.
    fn room_for(&self, changes: usize) -> u64;

    /// Bytes on the disk.
    fn disk_bytes(&self) -> u64;
}
