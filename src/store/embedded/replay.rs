//! The second half of opening: replays what lies behind the index's checkpoint into memory, or everything into a new
//! index. The survey then tells what both hold together.

use super::recovery::{damaged, io_error};
use super::settings::Settings;
use super::state::{Live, SegmentState, State};
use super::survey::Survey;
use super::verify::Opening;
use super::{Engine, OpenError, Options, Tuning, index_dir, indexer, log_dir};
use crate::store::index::{self, Checkpoint, Index, IndexError, Located};
use crate::store::log::frame::{self, FRAME_HEADER, Kind, NEVER};
use crate::store::log::scan::{FrameReader, Scanned};
use crate::store::log::segment::SEGMENT_HEADER;
use crate::store::log::{Head, LogPoint, Position};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// Brings index and memory to where the log ends.
pub(super) fn index_and_state(
    options: &Options,
    tuning: Tuning,
    settings: &Settings,
    head: Head,
    segments: &mut BTreeMap<u32, SegmentState>,
    end: LogPoint,
    index: Opening,
) -> Result<Usable, OpenError> {
    let path = index_dir(&options.path);
    let why = match use_index(options, tuning, head, segments, end, index)? {
        Ok(usable) => return Ok(usable),
        Err(why) => why,
    };
    // A store that has just been created has none, and that is no news.
    if path.exists() || end.frame > 1 {
        tracing::warn!(index = %path.display(), reason = why, "rebuilding the index from the log");
    }
    rebuild(options.engine, tuning, settings, head, std::mem::take(segments), end, &path)
}

type Usable = (Box<dyn Index>, State, Survey);

/// Replays what the index has not heard of. The inner error says why the index is of no use.
fn use_index(
    options: &Options,
    tuning: Tuning,
    head: Head,
    segments: &mut BTreeMap<u32, SegmentState>,
    end: LogPoint,
    index: Opening,
) -> Result<Result<Usable, String>, OpenError> {
    let index = match index {
        Ok(Some(index)) => index,
        Ok(None) => return Ok(Err("it is missing".to_owned())),
        Err(error) => return Ok(Err(error.to_string())),
    };
    let Ok(Some(checkpoint)) = index.checkpoint() else {
        return Ok(Err("it holds no valid checkpoint of this store".to_owned()));
    };
    if checkpoint.applied_to.frame > end.frame {
        return Err(OpenError::LogBehindIndex {
            path: log_dir(&options.path),
            index: index_dir(&options.path),
            log_frame: end.frame,
            index_frame: checkpoint.applied_to.frame,
        });
    }
    let mut state = State::with(std::mem::take(segments), end);
    let from = checkpoint.replay_from.max(log_start(&head));
    let matches = replay(&mut state, from, Some(checkpoint.applied_to), &mut |_, _| Ok(()))?;
    let why = match matches {
        false => "its checkpoint does not match the log".to_owned(),
        true => {
            let survey = Survey::begin(&mut state);
            // A walk through a large index would take too long now.
            let later = index.entries() > tuning.survey_first_max;
            match if later { Ok(()) } else { survey.complete(&*index, &mut state) } {
                Ok(()) => return Ok(Ok((index, state, survey))),
                Err(error) => error.to_string(),
            }
        }
    };
    *segments = state.segments;
    Ok(Err(why))
}

fn log_start(head: &Head) -> Position {
    Position { segment: head.segment, offset: SEGMENT_HEADER as u32 }
}

/// Builds a new index from the whole log.
fn rebuild(
    engine: Engine,
    tuning: Tuning,
    settings: &Settings,
    head: Head,
    segments: BTreeMap<u32, SegmentState>,
    end: LogPoint,
    path: &Path,
) -> Result<Usable, OpenError> {
    let start = log_start(&head);
    let no_index = |error: IndexError| OpenError::Index { path: path.to_owned(), detail: error.to_string() };
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => other.map_err(io_error("delete", path))?,
    }
    let index = index::create(path, engine, tuning.index(), settings.id).map_err(no_index)?;
    let begin = LogPoint { position: start, frame: head.first_frame };
    index.apply(&[], Checkpoint { replay_from: start, applied_to: begin }).map_err(no_index)?;
    let mut state = State::with(segments, end);
    replay(&mut state, start, None, &mut |state, reached| {
        if state.waiting >= tuning.index_bulk {
            state.end = reached;
            let (mut changes, checkpoint) = indexer::take(state);
            changes.sort_unstable_by_key(|change| change.id);
            index.apply(&changes, checkpoint).map_err(no_index)?;
            indexer::settle(state, &changes);
        }
        Ok(())
    })?;
    state.end = end;
    let survey = Survey::begin(&mut state);
    survey.complete(&*index, &mut state).map_err(no_index)?;
    Ok((index, state, survey))
}

type Progress<'a> = dyn FnMut(&mut State, LogPoint) -> Result<(), OpenError> + 'a;

/// Reads the log from `from` to the end into memory. Returns whether a frame begins at `known`, as it must.
fn replay(
    state: &mut State,
    from: Position,
    known: Option<LogPoint>,
    progress: &mut Progress<'_>,
) -> Result<bool, OpenError> {
    let segments = state.segments.range(from.segment..);
    let segments: Vec<_> = segments.map(|(_, state)| (state.segment.clone(), state.first_frame, state.end)).collect();
    // A place in a segment that has been retired meanwhile cannot be compared, and needs not be.
    let oldest = state.segments.first_key_value().map_or(0, |(&number, _)| number);
    let mut matches = known.is_none_or(|known| known.position.segment < oldest || known == state.end);
    for (segment, first_frame, end) in segments {
        let mut expected = first_frame;
        let mut reader = FrameReader::new(&*segment, segment.uid);
        let mut at = SEGMENT_HEADER;
        while at < end {
            let (header, payload) = match reader.frame(at).map_err(io_error("read", &segment.path))? {
                Scanned::Frame(header, payload) => (header, payload),
                Scanned::Blank => return Err(damaged(&segment.path, at, "no frame stands here")),
                Scanned::Invalid(why) => return Err(damaged(&segment.path, at, why)),
            };
            // If it was verified at this start, that was seen then.
            if header.number != expected {
                let detail = format!("frame number {} where {expected} must follow", header.number);
                return Err(damaged(&segment.path, at, &detail));
            }
            expected = expected.saturating_add(1);
            let position =
                |offset: u64| Position { segment: segment.number, offset: u32::try_from(offset).unwrap_or(u32::MAX) };
            matches |= known == Some(LogPoint { position: position(at), frame: header.number });
            let next = at + (FRAME_HEADER + payload.len()) as u64;
            matches |= known == Some(LogPoint { position: position(next), frame: header.number.saturating_add(1) });
            if position(next) > from {
                for entry in frame::entries(payload) {
                    let (offset, entry) =
                        entry.map_err(|()| damaged(&segment.path, at, "a frame with malformed entries"))?;
                    let position = position(at + (FRAME_HEADER + offset) as u64);
                    let live = (entry.kind != Kind::Remove).then(|| Live {
                        located: Located {
                            position,
                            len: u32::try_from(entry.value.len()).unwrap_or(u32::MAX),
                            tag: entry.tag,
                            version: entry.version,
                            expires_at_ms: entry.expires_at_ms,
                        },
                        time_ms: entry.time_ms,
                        value: (entry.expires_at_ms == NEVER).then(|| Bytes::copy_from_slice(entry.value)),
                    });
                    state.set(entry.id, live, true);
                }
                state.waiting_bytes += next - at;
                progress(state, LogPoint { position: position(next), frame: header.number.saturating_add(1) })?;
            }
            at = next;
        }
    }
    Ok(matches)
}
