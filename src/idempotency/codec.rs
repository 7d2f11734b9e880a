//! Records as bytes: versioned, and refusing what it does not know.

use super::record::Record;
use bytes::Bytes;

/// Encodes a record in the newest version of the format.
#[must_use]
pub fn encode(record: &Record) -> Bytes {
    let _ = record;
    todo!()
}

/// Why stored bytes are not a record. Such bytes mean "outcome unknown", never "absent".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("the record has format version {0}, which this oncegate does not know; a newer one wrote it")]
    Version(u8),
    #[error("the record is malformed: {0}")]
    Malformed(&'static str),
}

/// Decodes what [`encode`] of this or an earlier version has written.
///
/// # Errors
/// If the bytes are of an unknown version, cut off, have bytes left over, or hold an unknown tag.
pub fn decode(bytes: &Bytes) -> Result<Record, DecodeError> {
    let _ = bytes;
    todo!()
}
