//! Why a store cannot be opened: each says what is wrong, where, and what to do.

use std::io;
use std::path::PathBuf;

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("there is no store at {path}, and `store.create` is false: is its volume mounted?")]
    Missing { path: PathBuf },
    #[error("the store at {path} is in use by another process; an embedded store serves exactly one")]
    Locked { path: PathBuf },
    #[error("cannot {what} {path}: {source}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{path} is missing, but there is a log beside it. It holds the secret of which record ids are made: without it \
         every key would count as new. Restore it, or move the whole directory away to begin anew, which may execute \
         keys again that were executed before"
    )]
    SettingsMissing { path: PathBuf },
    #[error(
        "{path} is damaged. It holds the secret of which record ids are made: restore this file, or move the whole \
         directory away to begin anew, which may execute keys again that were executed before"
    )]
    SettingsDamaged { path: PathBuf },
    #[error("{path} has format version {version}, which this oncegate does not know; a newer one wrote it")]
    Format { path: PathBuf, version: u32 },
    #[error(
        "the log is damaged: {path}, offset {offset}: {detail}. Nothing has been changed. Records from there on would be \
         lost, and their keys executed again. Restore the file if there is an exact copy of it (an older backup of the \
         store brings back an older state: keys used since would be executed again). To give the store up deliberately, \
         move its directory away"
    )]
    Damaged { path: PathBuf, offset: u64, detail: String },
    #[error(
        "the log is incomplete: {path} is missing: {detail}. Nothing has been changed. Its records are lost, and their \
         keys would be executed again. Put the file back; to give the store up deliberately, move its directory away"
    )]
    SegmentMissing { path: PathBuf, detail: String },
    #[error(
        "the log at {path} ends before what the index at {index} has seen of it (frame {log_frame}, index {index_frame}): \
         acknowledged records are gone, as after restoring an older log. Their keys would be executed again. To accept \
         that loss, delete the directory {index}"
    )]
    LogBehindIndex { path: PathBuf, index: PathBuf, log_frame: u64, index_frame: u64 },
    #[error("the index at {path} cannot be built: {detail}")]
    Index { path: PathBuf, detail: String },
}
