//! Gives the space of expired entries back. Segment by segment: expired entries are dropped, and the oldest segment is
//! retired when nothing in it counts any more, or when what still counts is worth being copied forward.
//!
//! Only the oldest segment is retired, ever. So a removal outlives what it hides, and what is found in the index at a
//! place before the log's head is known to be superseded or dropped.

use super::commit::{Found, Op, Upkeep};
use super::state::State;
use super::{Lookup, Shared};
use crate::store::files;
use crate::store::index::Located;
use crate::store::log::frame::{self, FRAME_HEADER, Kind, NEVER};
use crate::store::log::scan::{FrameReader, Scanned};
use crate::store::log::segment::{SEGMENT_HEADER, Segment};
use crate::store::log::{Head, Position, summary};
use crate::store::{RecordId, StoreError};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// What one call may do: look up that many entries, read that many bytes of log.
const ENTRIES_MAX: usize = 2048;
const BYTES_MAX: u64 = 4 << 20;
/// Entries in one operation of the committer, so that others need not wait long.
const STEP: usize = 128;
/// A segment is looked through again when this fraction of its entries has expired, or after this time.
const FRACTION: u64 = 16;
const LATEST_MS: u64 = 60_000;
/// Segments that are kept however little of them is alive.
const SLACK_SEGMENTS: u64 = 3;

const MORE: Duration = Duration::from_millis(1);
const SURVEYING: Duration = Duration::from_millis(20);
/// Less than one wake-up a second, all timers of an idle gateway together.
pub(super) const IDLE: Duration = Duration::from_secs(3);

/// A walk through one segment, over as many calls as it takes.
#[derive(Debug)]
pub(super) struct Walk {
    segment: Arc<Segment>,
    offset: u64,
    /// Up to there; the active segment grows meanwhile.
    end: u64,
    now_ms: u64,
    swept_until_ms: u64,
    /// Copy forward what is alive, then delete the segment.
    retire: bool,
}

impl Walk {
    fn start(state: &mut State, number: u32, now_ms: u64, retire: bool) -> Option<Self> {
        let state = state.segments.get_mut(&number)?;
        let swept_until_ms = state.swept_until_ms;
        // Said in advance, so that an entry that is appended meanwhile and has expired already can take it back.
        state.swept_until_ms = swept_until_ms.max(now_ms);
        let (segment, end) = (state.segment.clone(), state.end);
        Some(Self { segment, offset: SEGMENT_HEADER, end, now_ms, swept_until_ms, retire })
    }
}

#[derive(Debug, Default)]
pub(super) struct Sweeper {
    walk: Option<Walk>,
    /// A segment with damage in it: it cannot go, and so none behind it.
    stuck: Option<u32>,
}

pub(super) fn lock(sweeper: &Mutex<Sweeper>) -> MutexGuard<'_, Sweeper> {
    sweeper.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sweeper {
    /// Whether [`Self::sweep`] has anything to do. Does not block.
    pub(super) fn is_needed(&mut self, shared: &Shared, now_ms: u64) -> bool {
        if !shared.survey.is_done() || self.walk.is_some() || old_claims(shared, &shared.state()).next().is_some() {
            return true;
        }
        self.walk = self.choose(shared, now_ms);
        self.walk.is_some()
    }

    /// One bounded piece of work. Blocks.
    pub(super) fn sweep(
        &mut self,
        shared: &Shared,
        queue: &mpsc::Sender<Op>,
        now_ms: u64,
    ) -> Result<Duration, StoreError> {
        if !shared.survey.is_done() {
            return Ok(SURVEYING);
        }
        copy_old_claims(shared, queue)?;
        if self.walk.is_none() {
            self.walk = self.choose(shared, now_ms);
        }
        let Some(mut walk) = self.walk.take() else { return Ok(IDLE) };
        let done = match proceed(shared, queue, &mut walk) {
            Ok(done) => done,
            Err(error) => {
                if let Some(segment) = shared.state().segments.get_mut(&walk.segment.number) {
                    segment.swept_until_ms = segment.swept_until_ms.min(walk.swept_until_ms);
                }
                if let Some(failed) = shared.failed() {
                    return Err(failed);
                }
                if shared.closing.load(Ordering::Acquire) {
                    return Ok(IDLE);
                }
                return match error {
                    StoreError::Full { .. } => Ok(IDLE),
                    // What is damaged stays where it is: nobody may take it for absent.
                    error => {
                        let segment = walk.segment.path.display();
                        tracing::error!(%error, %segment, "no log segment is deleted any more, because of damage in this one");
                        self.stuck = Some(walk.segment.number);
                        Ok(IDLE)
                    }
                };
            }
        };
        if !done {
            self.walk = Some(walk);
        } else if walk.retire
            && let Err(error) = retire(shared, &walk.segment)
        {
            let segment = walk.segment.path.display();
            tracing::warn!(%error, %segment, "cannot delete a log segment; trying again later");
            return Ok(IDLE);
        }
        Ok(MORE)
    }

    /// The segment that is most worth a walk.
    fn choose(&self, shared: &Shared, now_ms: u64) -> Option<Walk> {
        let mut state = shared.state();
        let active = state.end.position.segment;
        if let Some((number, oldest)) = state.segments.first_key_value().filter(|_| self.stuck.is_none()) {
            let used: u64 = state.segments.values().map(|segment| segment.end).sum();
            let live = || state.segments.values().map(|segment| segment.expiry.live_bytes(now_ms)).sum::<u64>();
            let slack = SLACK_SEGMENTS * shared.tuning.segment_bytes(used);
            if *number != active && (oldest.expiry.all_expired(now_ms) || used > 2 * live() + slack) {
                let number = *number;
                return Walk::start(&mut state, number, now_ms, true);
            }
        }
        let due = state.segments.iter().find(|&(number, segment)| {
            let expired = segment.expiry.expired_between(segment.swept_until_ms, now_ms);
            let late = now_ms.saturating_sub(segment.swept_until_ms) >= LATEST_MS;
            self.stuck != Some(*number) && expired > 0 && (late || expired >= segment.expiry.entries() / FRACTION)
        });
        let number = *due?.0;
        Walk::start(&mut state, number, now_ms, false)
    }
}

/// Replay at start begins at the oldest claim: one that lasts must not keep it far behind.
fn copy_old_claims(shared: &Shared, queue: &mpsc::Sender<Op>) -> Result<(), StoreError> {
    let state = shared.state();
    let items: Vec<_> = old_claims(shared, &state)
        .take(STEP)
        .filter_map(|id| {
            let live = state.slots.get(id)?.live.clone()?;
            Some(Upkeep::Copy { id: *id, located: live.located, time_ms: live.time_ms, value: live.value? })
        })
        .collect();
    drop(state);
    match send(queue, items) {
        Err(StoreError::Full { .. }) => Ok(()),
        other => other,
    }
}

fn old_claims<'a>(shared: &Shared, state: &'a State) -> impl Iterator<Item = &'a RecordId> {
    let behind_max = shared.tuning.replay_bytes;
    let old = state.unexpiring.iter().take_while(move |(position, _)| state.bytes_behind(**position) > behind_max);
    old.map(|(_, id)| id)
}

/// Walks on. Returns whether the end has been reached.
fn proceed(shared: &Shared, queue: &mpsc::Sender<Op>, walk: &mut Walk) -> Result<bool, StoreError> {
    let mut reader = FrameReader::new(&*walk.segment, walk.segment.uid);
    let (mut looked_up, mut read) = (0, 0);
    while walk.offset < walk.end && looked_up < ENTRIES_MAX && read < BYTES_MAX {
        let at = walk.offset;
        let io = |error: std::io::Error| StoreError::Failed {
            reason: format!("reading {} at offset {at}: {error}", walk.segment.path.display()),
        };
        let Scanned::Frame(header, payload) = reader.frame(at).map_err(io)? else {
            // It was valid when it was written or at start. Its entries are found damaged when they are asked for.
            let reason = format!("the frame at offset {at} of {} has been damaged", walk.segment.path.display());
            tracing::error!(reason);
            return Err(StoreError::Failed { reason });
        };
        let mut items = Vec::new();
        for (offset, entry) in frame::entries(payload).flatten() {
            let expired = entry.expires_at_ms <= walk.now_ms;
            let done_before = entry.expires_at_ms <= walk.swept_until_ms;
            if entry.kind == Kind::Remove || done_before || !(expired || walk.retire) {
                continue;
            }
            looked_up += 1;
            let offset = u32::try_from(at + (FRAME_HEADER + offset) as u64).unwrap_or(u32::MAX);
            let position = Position { segment: walk.segment.number, offset };
            let Some(found) = current_at(shared, entry.id, position)? else { continue };
            if expired && entry.expires_at_ms != NEVER {
                items.push(Upkeep::Drop { id: entry.id, position });
            } else {
                // Reading it compares its checksum. The index has it rounded; the log has it as it was given.
                let value = found.read(entry.id)?.value.bytes;
                let len = u32::try_from(value.len()).unwrap_or(u32::MAX);
                let (tag, version, expires_at_ms) = (entry.tag, entry.version, entry.expires_at_ms);
                let located = Located { position, len, tag, version, expires_at_ms };
                items.push(Upkeep::Copy { id: entry.id, located, time_ms: entry.time_ms, value });
            }
            if items.len() >= STEP {
                send(queue, std::mem::take(&mut items))?;
            }
        }
        send(queue, items)?;
        walk.offset += FRAME_HEADER as u64 + u64::from(header.payload_len);
        read += FRAME_HEADER as u64 + u64::from(header.payload_len);
    }
    Ok(walk.offset >= walk.end)
}

/// The entry, if it still stands at that place.
fn current_at(shared: &Shared, id: crate::store::RecordId, position: Position) -> Result<Option<Found>, StoreError> {
    Ok(match shared.look_up(id)? {
        Lookup::Found(found) if found.located().position == position => Some(found),
        _ => None,
    })
}

/// Has the committer do the work, and waits for it.
fn send(queue: &mpsc::Sender<Op>, items: Vec<Upkeep>) -> Result<(), StoreError> {
    if items.is_empty() {
        return Ok(());
    }
    let stopped = || StoreError::Failed { reason: "the store was closed".to_owned() };
    let (reply, answer) = oneshot::channel();
    queue.blocking_send(Op::Maintain { items, reply }).map_err(|_| stopped())?;
    answer.blocking_recv().map_err(|_| stopped())?.map(drop)
}

/// Deletes the oldest segment. First the head moves on, durably: a segment before it is only left-over.
fn retire(shared: &Shared, segment: &Segment) -> std::io::Result<()> {
    let state = shared.state();
    let Some((&number, next)) = state.segments.range(segment.number.saturating_add(1)..).next() else { return Ok(()) };
    let head = Head {
        segment: number,
        first_frame: next.first_frame,
        next_version: next.first_version,
        newest_ms: shared.newest_ms.load(Ordering::Acquire),
    };
    drop(state);
    head.write(&shared.log_dir)?;
    shared.state().segments.remove(&segment.number);
    std::fs::remove_file(&segment.path)?;
    summary::remove(&shared.log_dir, segment.number)?;
    files::sync_dir(&shared.log_dir)
}
