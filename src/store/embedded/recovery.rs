//! Opening: the same way after a clean stop, a killed process and a power cut.
//!
//! 1. lock, settings, head, segments: what must be there is there.
//! 2. (`verify`) Verify every frame of every segment, in two threads, while the index is opened in a third. Of a large
//!    log only the newest part; what is older is taken at its summary's word now, and verified while the store serves
//!    (`scrub`).
//! 3. Judge: only what may be the torn end of a crash is cut off; anything else is refused.
//! 4. (`replay`) Replay what lies behind the index's checkpoint into memory, or everything into a new index.
//! 5. (`survey`) Compare the index with its checkpoint; a large one while the store serves already.

use super::settings::{STORE_FILE, Settings};
use super::space::{Space, Spare};
use super::state::SegmentState;
use super::verify::{self, Opening, Reading};
use super::{Counters, OpenError, Options, Shared, Tuning, log_dir, replay};
use crate::store::files;
use crate::store::log::scan::{self, FrameReader, Tail, Verified};
use crate::store::log::segment::{HeaderFault, SEGMENT_HEADER, Segment, StoreId};
use crate::store::log::{HEAD_FILE, Head, LogPoint, Position, summary};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

/// A store that only lacks its threads.
pub(super) struct Recovered {
    pub(super) shared: Shared,
    pub(super) active: Arc<Segment>,
    pub(super) capacity: u64,
    pub(super) end: LogPoint,
    pub(super) next_version: u64,
    /// Segments that were taken at their summary's word, oldest first.
    pub(super) unverified: Vec<u32>,
}

pub(super) fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> OpenError + 'a {
    move |source| OpenError::Io { what, path: path.to_owned(), source }
}

pub(super) fn open(options: &Options, tuning: Tuning) -> Result<Recovered, OpenError> {
    let path = options.path.as_path();
    let log_dir = log_dir(path);
    if !options.create && !path.join(STORE_FILE).exists() && !log_dir.exists() {
        return Err(OpenError::Missing { path: path.to_owned() });
    }
    files::create_dir(path).map_err(io_error("create", path))?;
    let lock = lock(path)?;
    let (settings, created) = settings(options, &log_dir, tuning)?;
    let Log { head, mut segments, spare, end, next_version, newest_ms, index, unverified } =
        read_log(options, &log_dir, &settings, tuning)?;

    let (index, state, survey) = replay::index_and_state(options, tuning, &settings, head, &mut segments, end, index)?;
    let active = state.segments.get(&end.position.segment).map(|active| (active.segment.clone(), active.capacity));
    let Some((active, capacity)) = active else {
        let detail = "there is no active segment".to_owned();
        return Err(OpenError::SegmentMissing { path: log_dir, detail });
    };
    let space = Space::new(&log_dir, settings.id, options.min_free_bytes, tuning.segment_bytes_min, spare);
    let shared = Shared {
        options: options.clone(),
        tuning,
        log_dir,
        created,
        state: Mutex::new(state),
        index,
        survey,
        space,
        settings: Mutex::new(settings),
        failed: OnceLock::new(),
        wake_indexer: Condvar::new(),
        indexed: Condvar::new(),
        newest_ms: AtomicU64::new(newest_ms),
        counters: Counters::default(),
        closing: AtomicBool::new(false),
        _lock: lock,
    };
    Ok(Recovered { shared, active, capacity, end, next_version, unverified })
}

const LOCK_ATTEMPTS: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Locks the store for this process, within a second; the lock lives as long as the file.
fn lock(path: &Path) -> Result<File, OpenError> {
    let file = path.join("lock");
    let lock = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&file);
    let lock = lock.map_err(io_error("open", &file))?;
    for attempt in 1.. {
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(lock),
            // A process that has just ended, or one that it has just forked, may take a moment to let go.
            Err(rustix::io::Errno::WOULDBLOCK) if attempt < LOCK_ATTEMPTS => std::thread::sleep(LOCK_PAUSE),
            Err(rustix::io::Errno::WOULDBLOCK) => break,
            Err(error) => return Err(io_error("lock", &file)(error.into())),
        }
    }
    Err(OpenError::Locked { path: path.to_owned() })
}

/// Reads the settings, creating the store where there is none. Returns whether it was created.
fn settings(options: &Options, log_dir: &Path, tuning: Tuning) -> Result<(Settings, bool), OpenError> {
    let path = options.path.as_path();
    let settings = match Settings::read(path)? {
        Some(settings) if settings.initialised => return Ok((settings, false)),
        // Its creation was interrupted: nothing can have been acknowledged.
        Some(settings) => settings,
        None if segment_numbers(log_dir)?.is_empty() && !log_dir.join(HEAD_FILE).exists() => {
            if !options.create {
                return Err(OpenError::Missing { path: path.to_owned() });
            }
            let id = files::random().map_err(io_error("create", path))?;
            Settings { id, initialised: false, values: BTreeMap::new() }
        }
        None => return Err(OpenError::SettingsMissing { path: path.join(STORE_FILE) }),
    };
    for number in segment_numbers(log_dir)? {
        let name = log_dir.join(Segment::file_name(number));
        if let Ok(segment) = Segment::open(log_dir, number, settings.id).map_err(io_error("read", &name))? {
            let verified = scan::verify(&segment, segment.uid).map_err(io_error("read", &name))?;
            if verified.last_frame.is_some() {
                return Err(OpenError::SettingsDamaged { path: path.join(STORE_FILE) });
            }
        }
        std::fs::remove_file(&name).map_err(io_error("delete", &name))?;
    }
    let create = || {
        settings.write(path)?;
        files::create_dir(log_dir)?;
        Segment::create(log_dir, 1, settings.id, tuning.segment_bytes_min)?;
        Head { segment: 1, first_frame: 1, next_version: 1, newest_ms: 0 }.write(log_dir)?;
        let settings = Settings { initialised: true, ..settings.clone() };
        settings.write(path)?;
        Ok(settings)
    };
    Ok((create().map_err(io_error("create", path))?, true))
}

fn segment_numbers(log_dir: &Path) -> Result<Vec<u32>, OpenError> {
    let listing = match std::fs::read_dir(log_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(io_error("list", log_dir))?,
    };
    let mut numbers = Vec::new();
    for file in listing {
        let file = file.map_err(io_error("list", log_dir))?;
        numbers.extend(file.file_name().to_str().and_then(Segment::parse_name));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// What the log has told.
struct Log {
    head: Head,
    segments: BTreeMap<u32, SegmentState>,
    spare: Option<Spare>,
    end: LogPoint,
    next_version: u64,
    newest_ms: u64,
    index: Opening,
    unverified: Vec<u32>,
}

fn read_log(options: &Options, log_dir: &Path, settings: &Settings, tuning: Tuning) -> Result<Log, OpenError> {
    let head_file = log_dir.join(HEAD_FILE);
    let head = match std::fs::read(&head_file) {
        Ok(bytes) => Head::parse(&bytes).ok_or_else(|| damaged(&head_file, 0, "wrong checksum"))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let detail = "it says where the log begins".to_owned();
            return Err(OpenError::SegmentMissing { path: head_file, detail });
        }
        Err(source) => return Err(io_error("read", &head_file)(source)),
    };
    let (segments, interrupted) = open_segments(log_dir, &head, settings.id)?;
    summary::tidy(log_dir, &segments).map_err(io_error("tidy", log_dir))?;
    let Reading { verified, index, unverified, unsummarised } =
        verify::read_all(&segments, log_dir, options, settings.id, tuning)?;
    let verified_segments = segments.into_iter().zip(verified).collect();
    let (judged, spare) = judge(log_dir, verified_segments, &head)?;
    if let Some(number) = interrupted {
        // Nothing was ever written to it: judge() has seen that the segment before it is not sealed.
        let path = log_dir.join(Segment::file_name(number));
        std::fs::remove_file(&path).map_err(io_error("delete", &path))?;
    }
    let mut log = finish(log_dir, judged, spare, head, index, tuning)?;
    for (number, verified) in unsummarised {
        if let Some(state) = log.segments.get_mut(&number) {
            state.unsummarised = Some(verified);
        }
    }
    Ok(Log { unverified, ..log })
}

/// Opens the segments that count. A last one whose creation was interrupted is told by its number instead.
fn open_segments(log_dir: &Path, head: &Head, store: StoreId) -> Result<(Vec<Segment>, Option<u32>), OpenError> {
    let (left_over, numbers): (Vec<u32>, Vec<u32>) =
        segment_numbers(log_dir)?.into_iter().partition(|&number| number < head.segment);
    for number in left_over {
        let path = log_dir.join(Segment::file_name(number));
        std::fs::remove_file(&path).map_err(io_error("delete", &path))?;
    }
    let mut segments: Vec<Segment> = Vec::with_capacity(numbers.len());
    let last = numbers.last().copied();
    for (expected, number) in (head.segment..).zip(numbers) {
        if number != expected {
            return Err(missing(log_dir, expected, "later segments are there"));
        }
        let path = log_dir.join(Segment::file_name(number));
        match Segment::open(log_dir, number, store).map_err(io_error("open", &path))? {
            Ok(segment) => segments.push(segment),
            Err(HeaderFault::Blank) if Some(number) == last && !segments.is_empty() => {
                return Ok((segments, Some(number)));
            }
            Err(HeaderFault::Blank) => return Err(damaged(&path, 0, "the file is empty or blank")),
            Err(HeaderFault::Damaged) => return Err(damaged(&path, 0, "wrong checksum over the segment's header")),
            Err(HeaderFault::Foreign) => {
                return Err(damaged(&path, 0, "the segment's header names another segment or another store"));
            }
            Err(HeaderFault::Format(version)) => return Err(OpenError::Format { path, version }),
        }
    }
    if segments.is_empty() {
        return Err(missing(log_dir, head.segment, "the log begins with it"));
    }
    Ok((segments, None))
}

/// The segments in use, and the spare one; whether that is blank.
type Judged = (Vec<(Segment, Verified)>, Option<(Segment, bool)>);

/// Tells torn from damaged. Returns the segments in use and the spare one; what was torn is cut off.
fn judge(log_dir: &Path, verified: Vec<(Segment, Verified)>, head: &Head) -> Result<Judged, OpenError> {
    let mut in_use = Vec::with_capacity(verified.len());
    let mut expected = head.first_frame;
    let mut remaining = verified.into_iter();
    for (segment, mut verified) in remaining.by_ref() {
        let path = &segment.path;
        if let Some(found) = verified.first_frame.filter(|&found| found != expected) {
            return Err(damaged(path, SEGMENT_HEADER, &format!("frame number {found} where {expected} must follow")));
        }
        expected = verified.last_frame.map_or(expected, |(number, _)| number.saturating_add(1));
        if let Tail::Impossible(detail) = &verified.tail {
            return Err(damaged(path, verified.end, detail));
        }
        if verified.sealed {
            in_use.push((segment, verified));
            continue;
        }
        // The segment that was written to. Behind it there can only be an unused one.
        let spare = match remaining.next() {
            None => None,
            Some((spare, unused)) => {
                let search = FrameReader::new(&spare, spare.uid).find(SEGMENT_HEADER);
                let search = search.map_err(io_error("read", &spare.path))?;
                let unused = unused.first_frame.is_none() && search.valid.is_none() && remaining.next().is_none();
                if !unused {
                    let why = scan::tail_text(&verified.tail);
                    let detail = format!("{why}, but later segments hold entries");
                    return Err(damaged(path, verified.end, &detail));
                }
                Some((spare, !search.data))
            }
        };
        cut_torn_end(&segment, &mut verified)?;
        in_use.push((segment, verified));
        return Ok((in_use, spare));
    }
    let last = in_use.last().map_or(head.segment, |(segment, _)| segment.number);
    Err(missing(
        log_dir,
        last.saturating_add(1),
        "the segment before it ends with a seal, which is written once this one exists",
    ))
}

/// Cuts what is not a valid frame off the end of the segment that was written to, if nothing valid lies behind it.
fn cut_torn_end(segment: &Segment, verified: &mut Verified) -> Result<(), OpenError> {
    let path = &segment.path;
    let mut reader = FrameReader::new(segment, segment.uid);
    let search = reader.find(verified.end).map_err(io_error("read", path))?;
    if let Some((offset, header)) = search.valid {
        // Without a flush per frame, a power cut leaves any of them missing, and that was accepted.
        if !scan::is_relaxed(&header) {
            let why = scan::tail_text(&verified.tail);
            return Err(damaged(path, verified.end, &format!("{why}, but a valid frame follows at offset {offset}")));
        }
        tracing::error!(
            segment = %path.display(), offset = verified.end,
            "a power cut has lost entries that were acknowledged without a flush (durability = \"relaxed\")"
        );
    } else if search.data {
        tracing::warn!(
            segment = %path.display(), offset = verified.end, reason = scan::tail_text(&verified.tail),
            "cut off the torn end of the log: writes that were under way when the process or the machine stopped"
        );
    }
    if search.data {
        let capacity = segment.len().map_err(io_error("read", path))?;
        segment.cut(verified.end, capacity).map_err(io_error("cut the torn end off", path))?;
    }
    verified.tail = Tail::Clean;
    // What a killed process had written but not flushed is about to be told to callers.
    segment.file.sync_all().map_err(io_error("flush", path))
}

fn finish(
    log_dir: &Path,
    judged: Vec<(Segment, Verified)>,
    spare: Option<(Segment, bool)>,
    head: Head,
    index: Opening,
    tuning: Tuning,
) -> Result<Log, OpenError> {
    let mut segments = BTreeMap::new();
    let mut log = LogPoint { position: Position { segment: head.segment, offset: 0 }, frame: head.first_frame };
    let (mut next_version, mut newest_ms) = (head.next_version, head.newest_ms);
    for (segment, verified) in judged {
        let capacity = segment.len().map_err(io_error("read", &segment.path))?;
        let too_large = || damaged(&segment.path, verified.end, "the segment is too large");
        let offset = u32::try_from(verified.end).map_err(|_| too_large())?;
        let first_version = next_version;
        let first_frame = log.frame;
        if let Some((number, version)) = verified.last_frame {
            (log.frame, next_version) = (number.saturating_add(1), next_version.max(version));
        }
        log.position = Position { segment: segment.number, offset };
        newest_ms = newest_ms.max(verified.newest_ms);
        let number = segment.number;
        let state = SegmentState {
            segment: Arc::new(segment),
            end: verified.end,
            capacity,
            first_frame,
            first_version,
            expiry: verified.expiry,
            unsummarised: None,
            swept_until_ms: 0,
        };
        segments.insert(number, state);
    }
    let spare = match spare {
        None => None,
        Some((spare, blank)) => {
            let capacity = spare.len().map_err(io_error("read", &spare.path))?;
            // One that is too small to be of use, or not blank, is made anew.
            if capacity < tuning.segment_bytes_min || !blank {
                std::fs::remove_file(&spare.path).map_err(io_error("delete", &spare.path))?;
                files::sync_dir(log_dir).map_err(io_error("flush", log_dir))?;
                None
            } else {
                Some((spare, capacity))
            }
        }
    };
    Ok(Log { head, segments, spare, end: log, next_version, newest_ms, index, unverified: Vec::new() })
}

pub(super) fn damaged(path: &Path, offset: u64, detail: &str) -> OpenError {
    OpenError::Damaged { path: path.to_owned(), offset, detail: detail.to_owned() }
}

fn missing(log_dir: &Path, number: u32, detail: &str) -> OpenError {
    OpenError::SegmentMissing { path: log_dir.join(Segment::file_name(number)), detail: detail.to_owned() }
}
