//! What a start reads of the log before it serves, and what it takes at a summary's word.

use super::recovery::io_error;
use super::{OpenError, Options, Tuning, index_dir};
use crate::store::index::{self, Index, IndexError};
use crate::store::log::scan::{self, Verified};
use crate::store::log::segment::{Segment, StoreId};
use crate::store::log::summary;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// The index, if there is one; why it cannot be used otherwise.
pub(super) type Opening = Result<Option<Box<dyn Index>>, IndexError>;

pub(super) struct Reading {
    /// For each segment.
    pub(super) verified: Vec<Verified>,
    pub(super) index: Opening,
    /// Segments that were taken at their summary's word, oldest first.
    pub(super) unverified: Vec<u32>,
    /// Sealed segments without a summary that says what was read.
    pub(super) unsummarised: BTreeMap<u32, Verified>,
}

/// Verifies the newest segments, `verify_first_bytes` of them together, and all others that have no summary to be believed,
/// in two threads; the index is opened in a third.
///
/// # Errors
/// If a segment cannot be read.
pub(super) fn read_all(
    segments: &[Segment],
    log_dir: &Path,
    options: &Options,
    store: StoreId,
    tuning: Tuning,
) -> Result<Reading, OpenError> {
    let mut noted = Vec::with_capacity(segments.len());
    for segment in segments {
        noted.push(summary::read(log_dir, segment).map_err(io_error("read", &segment.path))?);
    }
    let mut to_read = Vec::new();
    let mut newest_bytes = 0_u64;
    for (at, (segment, noted)) in segments.iter().zip(&noted).enumerate().rev() {
        newest_bytes = newest_bytes.saturating_add(segment.len().map_err(io_error("read", &segment.path))?);
        if newest_bytes <= tuning.verify_first_bytes || noted.is_none() {
            to_read.push((at, segment));
        }
    }
    let next = AtomicUsize::new(0);
    let results: Mutex<BTreeMap<usize, io::Result<Verified>>> = Mutex::default();
    let work = || {
        while let Some(&(at, segment)) = to_read.get(next.fetch_add(1, Ordering::Relaxed)) {
            let verified = scan::verify(segment, segment.uid);
            results.lock().unwrap_or_else(PoisonError::into_inner).insert(at, verified);
        }
    };
    let index_path = index_dir(&options.path);
    let index = std::thread::scope(|scope| {
        let index = scope.spawn(|| match index_path.exists() {
            true => index::open(&index_path, options.engine, tuning.index(), store).map(Some),
            false => Ok(None),
        });
        scope.spawn(work);
        work();
        index.join().unwrap_or_else(|_| Err(IndexError("opening it has panicked".to_owned())))
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut reading = Reading {
        verified: Vec::with_capacity(segments.len()),
        index,
        unverified: Vec::new(),
        unsummarised: BTreeMap::new(),
    };
    for (at, (segment, noted)) in segments.iter().zip(noted).enumerate() {
        let verified = match (results.remove(&at), noted) {
            (Some(read), noted) => {
                let read = read.map_err(io_error("read", &segment.path))?;
                if read.sealed && noted.as_ref() != Some(&read) {
                    reading.unsummarised.insert(segment.number, read.clone());
                }
                read
            }
            (None, Some(noted)) => {
                reading.unverified.push(segment.number);
                noted
            }
            (None, None) => return Err(io_error("read", &segment.path)(io::Error::other("it was passed over"))),
        };
        reading.verified.push(verified);
    }
    Ok(reading)
}
