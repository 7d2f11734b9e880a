//! A record in memory, shared by all who answer from it.

use crate::idempotency::Record;
use bytes::Bytes;
use http::HeaderMap;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

/// A record that was read or written, with what its replays are made from.
#[derive(Debug)]
pub struct Remembered {
    record: Record,
    fields: OnceLock<Option<Box<HeaderMap>>>,
}

impl Remembered {
    #[must_use]
    pub fn new(record: Record) -> Arc<Self> {
        Arc::new(Self { record, fields: OnceLock::new() })
    }

    /// What `make` made of the recorded fields the first time; it must always make the same of the same.
    #[must_use]
    pub fn fields(
        &self,
        recorded: &[(Bytes, Bytes)],
        make: impl FnOnce(&[(Bytes, Bytes)]) -> Option<HeaderMap>,
    ) -> Option<&HeaderMap> {
        self.fields.get_or_init(|| make(recorded).map(Box::new)).as_deref()
    }
}

impl PartialEq for Remembered {
    fn eq(&self, other: &Self) -> bool {
        self.record == other.record
    }
}

impl Deref for Remembered {
    type Target = Record;

    fn deref(&self) -> &Record {
        &self.record
    }
}
