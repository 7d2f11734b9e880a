//! Verifies, while the store serves, what a start has taken at its summary's word. What is served does not depend on it:
//! each entry has a checksum of its own, which is compared whenever it is read, and one that is damaged counts as
//! unknown, never as absent. But damage is to be found, and not only when the damaged record is asked for.

use super::Shared;
use super::recovery::damaged;
use crate::store::log::scan::{self, ReadAt};
use crate::store::log::segment::Segment;
use crate::store::log::summary;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Idle time for each unit of working time: who is served comes first.
const IDLE_SHARE: u32 = 3;
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// A segment that is read in pieces, with pauses between them.
struct Paced<'a> {
    segment: &'a Segment,
    shared: &'a Shared,
    /// Since when the work goes on.
    since: std::cell::Cell<Instant>,
}

impl<'a> Paced<'a> {
    fn new(segment: &'a Segment, shared: &'a Shared) -> Self {
        Self { segment, shared, since: std::cell::Cell::new(now()) }
    }
}

impl ReadAt for Paced<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if self.shared.closing.load(Ordering::Acquire) {
            return Err(io::Error::other("the store is being closed"));
        }
        let read = self.segment.read_at(buf, offset);
        std::thread::sleep((self.since.get().elapsed() * IDLE_SHARE).min(PAUSE_MAX));
        self.since.set(now());
        read
    }
}

#[allow(clippy::disallowed_methods, reason = "paces the work; no record depends on it")]
fn now() -> Instant {
    Instant::now()
}

/// Reads the segments of these numbers, until the store is closed. A damaged one fails the store, as it would have been
/// refused at the start; the next start sees it.
pub(super) fn run(shared: &Shared, numbers: Vec<u32>) {
    for number in numbers {
        let state = shared.state();
        // It may have been retired meanwhile.
        let segment = state.segments.get(&number).map(|state| state.segment.clone());
        drop(state);
        let verdict = segment.map_or(Ok(()), |segment| verify(shared, &segment));
        if shared.closing.load(Ordering::Acquire) || shared.failed().is_some() {
            return;
        }
        if let Err(reason) = verdict {
            // Without it, the next start reads the segment itself.
            if let Err(error) = summary::remove(&shared.log_dir, number) {
                tracing::error!(%error, number, "cannot delete the summary of a damaged log segment");
            }
            shared.fail(reason);
            return;
        }
    }
    tracing::debug!("all of the log has been verified");
}

/// Compares all checksums of a segment, and what has been taken for granted of it.
fn verify(shared: &Shared, segment: &Arc<Segment>) -> Result<(), String> {
    let verified = scan::verify(&Paced::new(segment, shared), segment.uid)
        .map_err(|error| format!("reading {}: {error}", segment.path.display()))?;
    let mut state = shared.state();
    let Some(state) = state.segments.get_mut(&segment.number) else { return Ok(()) };
    if !verified.sealed || verified.end != state.end || verified.first_frame != Some(state.first_frame) {
        return Err(damaged(&segment.path, verified.end, scan::tail_text(&verified.tail)).to_string());
    }
    if verified.expiry != state.expiry {
        tracing::warn!(segment = %segment.path.display(), "the summary of a log segment was wrong; it is made anew");
        state.expiry = verified.expiry.clone();
        state.unsummarised = Some(verified);
    }
    Ok(())
}
