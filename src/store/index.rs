//! The index of the embedded store: where in the log the settled record of an id stands. It is derived from the log
//! and may be deleted at any time while the store is closed.

pub(crate) mod sled;

use super::log::{LogPoint, Position};
use super::{RecordId, Tag};

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

pub(crate) type Visitor<'a> = Box<dyn FnMut(RecordId, Located) + Send + 'a>;

/// Calls one after the other, except `get`.
pub(crate) trait Index: Send + Sync {
    fn get(&self, id: RecordId) -> Result<Option<Located>, IndexError>;

    /// Applies changes (`None` removes), sorted by id, then makes them and the checkpoint durable, in this order.
    fn apply(&self, changes: &[(RecordId, Option<Located>)], checkpoint: Checkpoint) -> Result<(), IndexError>;

    /// The checkpoint; `None` if there is none or it is damaged.
    fn checkpoint(&self) -> Result<Option<Checkpoint>, IndexError>;

    /// Walks through all entries once, with a thread for each visitor, and compares them with what the checkpoint says
    /// of them.
    ///
    /// # Errors
    /// If an entry cannot be read, or entries are missing or changed.
    fn survey(&self, visitors: &mut [Visitor<'_>]) -> Result<(), IndexError>;

    /// Bytes on the disk.
    fn disk_bytes(&self) -> u64;
}
