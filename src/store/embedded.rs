//! The embedded store: a durable log that is the truth, with an index beside it.
//!
//! ```text
//! <path>/lock        held exclusively while a process uses the store
//! <path>/store       which store it is, and its settings
//! <path>/log/        numbered segments, and `head`: the oldest that counts
//! <path>/index/      id → place in the log; derived, rebuilt from the log whenever it is missing or in doubt
//! ```
//!
//! Life of a write: it is queued; the committer compares it with what the store holds, appends it together with all
//! that is queued as one frame, flushes once, makes it visible, and acknowledges. Entries that expire are moved to the
//! index by the indexer later; those that never expire (claims) stay in memory and in the log alone. `sweep` drops what
//! has expired and retires old segments. A start is always the same, whether after a clean stop or a power cut: the log is
//! verified, and what lies behind the index's checkpoint is replayed.
//!
//! What exactly a start verifies: the header of each segment, that none is missing, and that the frames' numbers go on
//! from each to the next; all frames and entries of the newest segments, 1 GiB together, and of those without a summary that
//! agrees with their first and last frames; all that it replays, and all of the log if the index is rebuilt. Damage in any
//! of that is a refusal. What remains of a larger log is verified while the store serves (`scrub`), and damage in it fails
//! the store, which the next start then refuses. Whenever an entry is read its checksum is compared.
//!
//! A frame may share a disk sector with the acknowledged frame before it. That is safe on disks that write a sector
//! whole or not at all, since the bytes of the earlier frame are written again unchanged.

mod commit;
mod error;
mod indexer;
mod listing;
mod recovery;
mod replay;
mod scrub;
mod settings;
mod space;
mod state;
mod survey;
mod sweep;
mod verify;

pub use super::index::Engine;
use super::index::{self, Index, IndexError};
use super::log::frame::MAX_VALUE;
use super::{
    Entry, Health, OLDEST_TRACKED, Page, RecordId, Status, Store, StoreError, Swap, Tag, Urgency, Value, Version,
};
use bytes::Bytes;
use commit::{Answer, Committer, Found, Op};
pub use error::OpenError;
use settings::Settings;
use space::Space;
use state::State;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use survey::Survey;
use tokio::sync::{mpsc, oneshot};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// A write is acknowledged once it is on the disk: it survives a power cut.
    Strict,
    /// A write is acknowledged once the operating system has it: it survives a killed process, not a power cut.
    Relaxed,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub path: PathBuf,
    /// Of the index. Another one than before has it rebuilt from the log.
    pub engine: Engine,
    /// `false`: a missing store is an error, not an empty one.
    pub create: bool,
    /// With less disk space than this free, new claims are refused.
    pub min_free_bytes: u64,
    pub durability: Durability,
}

/// Sizes that tests make small, in order to see in seconds what else takes hours.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Bytes of a log segment: an eighth of the log, but within these bounds.
    pub segment_bytes_min: u64,
    pub segment_bytes_max: u64,
    /// Settled entries that go to the index at once.
    pub index_bulk: usize,
    /// Bytes of entries that fjall gathers in memory before it writes them to a table of its own.
    pub memtable_bytes: u64,
    /// Bytes of log that a start may have to replay, roughly.
    pub replay_bytes: u64,
    /// Bytes of log, the newest, that a start verifies; older segments that have a summary are verified afterwards.
    pub verify_first_bytes: u64,
    /// An index of up to so many entries is walked through before the store is open, a larger one afterwards.
    pub survey_first_max: u64,
    /// Threads that walk through it afterwards.
    pub survey_threads: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            segment_bytes_min: 1 << 20,
            segment_bytes_max: 64 << 20,
            index_bulk: 20_000,
            memtable_bytes: 16 << 20,
            replay_bytes: 64 << 20,
            verify_first_bytes: 1 << 30,
            survey_first_max: 100_000,
            survey_threads: 2,
        }
    }
}

impl Tuning {
    fn index(&self) -> index::Tuning {
        index::Tuning { memtable_bytes: self.memtable_bytes }
    }

    fn segment_bytes(&self, log_bytes: u64) -> u64 {
        (log_bytes / 8).clamp(self.segment_bytes_min, self.segment_bytes_max.max(self.segment_bytes_min))
    }
}

#[derive(Debug, Default)]
struct Counters {
    batches: AtomicU64,
    batched_writes: AtomicU64,
    bytes_written: AtomicU64,
    swept: AtomicU64,
}

/// What the store's threads and its users share.
struct Shared {
    options: Options,
    tuning: Tuning,
    log_dir: PathBuf,
    created: bool,
    state: Mutex<State>,
    index: Box<dyn Index>,
    survey: Survey,
    space: Space,
    settings: Mutex<Settings>,
    /// Set once, for good: after a failed write or flush nobody knows what the disk holds, and asking again may lie.
    failed: OnceLock<String>,
    /// There is enough for the indexer; the indexer has made room.
    wake_indexer: Condvar,
    indexed: Condvar,
    newest_ms: AtomicU64,
    counters: Counters,
    closing: AtomicBool,
    /// Holds the lock while it is open.
    _lock: File,
}

enum Lookup {
    Absent {
        /// Whether the index may hold something under the id nevertheless.
        in_index: bool,
    },
    Found(Found),
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self) -> Option<StoreError> {
        self.failed.get().map(|reason| StoreError::Failed { reason: reason.clone() })
    }

    /// Takes no more writes from now on.
    fn fail(&self, reason: String) -> StoreError {
        if self.failed.set(reason.clone()).is_ok() {
            tracing::error!(reason, path = %self.options.path.display(), "the store has failed and takes no more writes");
        }
        self.wake_indexer.notify_all();
        self.indexed.notify_all();
        self.failed().unwrap_or(StoreError::Failed { reason })
    }

    fn full(&self) -> StoreError {
        StoreError::Full { path: self.options.path.display().to_string(), min_free_bytes: self.space.min_free_bytes }
    }

    fn index_error(error: &IndexError) -> StoreError {
        StoreError::Failed { reason: error.to_string() }
    }

    /// Finds what the store holds under an id. May read the index from the disk.
    fn look_up(&self, id: RecordId) -> Result<Lookup, StoreError> {
        let mut seen = None;
        loop {
            let state = self.state();
            if let Some(slot) = state.slots.get(&id) {
                let Some(live) = &slot.live else { return Ok(Lookup::Absent { in_index: true }) };
                if live.value.is_some() {
                    return Ok(Lookup::Found(Found::Memory(live.clone())));
                }
                return match state.segments.get(&live.located.position.segment) {
                    Some(segment) => Ok(Lookup::Found(Found::Log(segment.segment.clone(), live.located))),
                    None => Err(StoreError::Damaged { id, detail: "its log segment is gone".to_owned() }),
                };
            }
            drop(state);
            self.survey.confirm(self, id)?;
            let Some(located) = self.index.get(id).map_err(|error| Self::index_error(&error))? else {
                return Ok(Lookup::Absent { in_index: false });
            };
            let state = self.state();
            if let Some(segment) = state.segments.get(&located.position.segment) {
                return Ok(Lookup::Found(Found::Log(segment.segment.clone(), located)));
            }
            if state.segments.first_key_value().is_none_or(|(&head, _)| head <= located.position.segment) {
                return Err(StoreError::Damaged { id, detail: "its log segment does not exist".to_owned() });
            }
            // Its segment has been retired: between the two look-ups the entry was dropped or copied, and is found
            // elsewhere now. If it is not, the index had not heard of that before a restart.
            if seen.replace(located.position) == Some(located.position) {
                return Ok(Lookup::Absent { in_index: true });
            }
        }
    }

    fn read(&self, id: RecordId) -> Result<Option<Entry>, StoreError> {
        match self.look_up(id)? {
            Lookup::Absent { .. } => Ok(None),
            Lookup::Found(found) => found.read(id).map(Some),
        }
    }
}

/// Operations that wait for the committer; beyond it, callers wait for room.
const QUEUE_MAX: usize = 2048;

/// The store. Dropping it stops its threads too, but leaves relaxed writes to the operating system.
pub struct Embedded {
    shared: Arc<Shared>,
    queue: Mutex<Option<mpsc::Sender<Op>>>,
    sweeper: Arc<Mutex<sweep::Sweeper>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Embedded {
    /// Opens the store, or creates it. Blocks: it reads up to 1 GiB of log, or all of it if the index is rebuilt.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(options: &Options) -> Result<Self, OpenError> {
        Self::open_tuned(options, Tuning::default())
    }

    /// As [`Embedded::open`], with other sizes: for tests.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_tuned(options: &Options, tuning: Tuning) -> Result<Self, OpenError> {
        let recovered = recovery::open(options, tuning)?;
        let shared = Arc::new(recovered.shared);
        let (sender, receiver) = mpsc::channel(QUEUE_MAX);
        let committer =
            Committer::new(shared.clone(), recovered.active, recovered.capacity, recovered.end, recovered.next_version);
        let store = Self {
            shared: shared.clone(),
            queue: Mutex::new(Some(sender)),
            sweeper: Arc::default(),
            threads: Mutex::new(Vec::new()),
        };
        store.spawn("oncegate-commit", move |_| committer.run(receiver))?;
        store.spawn("oncegate-index", indexer::run)?;
        store.spawn("oncegate-space", |shared| shared.space.run())?;
        if !shared.survey.is_done() {
            for _ in 0..tuning.survey_threads {
                store.spawn("oncegate-survey", |shared| shared.survey.run(shared))?;
            }
        }
        if !recovered.unverified.is_empty() {
            store.spawn("oncegate-scrub", move |shared| scrub::run(shared, recovered.unverified))?;
        }
        let state = shared.state();
        let next = tuning.segment_bytes(state.log_bytes());
        let number = state.end.position.segment.saturating_add(1);
        drop(state);
        shared.space.request(number, next);
        Ok(store)
    }

    /// A thread whose panic fails the store, instead of leaving callers waiting.
    fn spawn(&self, name: &str, work: impl FnOnce(&Shared) + Send + 'static) -> Result<(), OpenError> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&shared))).is_err() {
                shared.fail("a thread of the store has panicked".to_owned());
            }
        });
        let path = self.shared.options.path.clone();
        let thread = thread.map_err(|source| OpenError::Io { what: "start a thread for", path, source })?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    fn closed(&self) -> StoreError {
        self.shared.failed().unwrap_or_else(|| StoreError::Failed { reason: "the store was closed".to_owned() })
    }

    fn sender(&self) -> Result<mpsc::Sender<Op>, StoreError> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(|| self.closed())
    }

    fn stop(&self) {
        if let Some(queue) = self.queue.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Others may hold senders for long; if the queue is full, the committer is awake anyway.
            self.shared.closing.store(true, Ordering::Release);
            // The committer must not go on waiting for the indexer, which may wait for a survey that has just been given up.
            drop(self.shared.state());
            self.shared.indexed.notify_all();
            let _ = queue.try_send(Op::Stop);
        }
        // The committer first: it may wait for the indexer.
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for (at, thread) in threads.into_iter().enumerate() {
            if at == 1 {
                self.shared.state().stopping = true;
                self.shared.wake_indexer.notify_all();
                self.shared.space.stop();
            }
            // Its panic was noted where it happened.
            let _ = thread.join();
        }
    }

    /// Runs what may wait for the disk where that delays nobody.
    async fn off_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let shared = self.shared.clone();
        match tokio::task::spawn_blocking(move || work(&shared)).await {
            Ok(result) => result,
            Err(error) => Err(StoreError::Failed { reason: format!("reading the store: {error}") }),
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Store for Embedded {
    async fn get(&self, id: RecordId) -> Result<Option<Entry>, StoreError> {
        {
            let state = self.shared.state();
            match state.slots.get(&id).map(|slot| slot.live.as_ref()) {
                Some(None) => return Ok(None),
                Some(Some(live)) if live.value.is_some() => {
                    let live = live.clone();
                    drop(state);
                    return Found::Memory(live).read(id).map(Some);
                }
                _ => {}
            }
        }
        self.off_thread(move |shared| shared.read(id)).await
    }

    async fn compare_and_swap(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> Result<Swap, StoreError> {
        if new.as_ref().is_some_and(|new| new.bytes.len() > MAX_VALUE || usize::from(new.tag.0) >= Tag::COUNT) {
            return Err(StoreError::Failed { reason: format!("a value of more than {MAX_VALUE} bytes, or a bad tag") });
        }
        let queue = self.sender()?;
        let (reply, answer) = oneshot::channel();
        match queue.try_send(Op::Swap(commit::Swap { id, expected, new, now_ms, urgency, reply })) {
            Ok(()) => drop(queue),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(self.closed()),
            // A task of its own waits for room, so that the operation goes on if this future is dropped.
            Err(mpsc::error::TrySendError::Full(op)) => drop(tokio::spawn(async move { queue.send(op).await })),
        }
        match answer.await.map_err(|_| self.closed())?? {
            Answer::Done(version) => Ok(Swap::Done(version)),
            Answer::Conflict(None) => Ok(Swap::Conflict(None)),
            Answer::Conflict(Some(found @ Found::Memory(_))) => found.read(id).map(|entry| Swap::Conflict(Some(entry))),
            Answer::Conflict(Some(found)) => {
                self.off_thread(move |_| found.read(id)).await.map(|entry| Swap::Conflict(Some(entry)))
            }
        }
    }

    async fn sweep(&self, now_ms: u64) -> Result<Duration, StoreError> {
        if let Some(error) = self.shared.failed() {
            return Err(error);
        }
        let (queue, sweeper) = (self.sender()?, self.sweeper.clone());
        // An idle store wakes no other thread for this.
        if !sweep::lock(&sweeper).is_needed(&self.shared, now_ms) {
            return Ok(sweep::IDLE);
        }
        self.off_thread(move |shared| sweep::lock(&sweeper).sweep(shared, &queue, now_ms)).await
    }

    fn unexpiring(&self) -> Result<Vec<(RecordId, Entry)>, StoreError> {
        let state = self.shared.state();
        let live: Vec<_> =
            state.unexpiring.values().filter_map(|id| Some((*id, state.slots.get(id)?.live.clone()?))).collect();
        drop(state);
        live.into_iter().map(|(id, live)| Ok((id, Found::Memory(live).read(id)?))).collect()
    }

    async fn list(&self, tag: Option<Tag>, after: u64, visit: usize) -> Result<Page, StoreError> {
        self.off_thread(move |shared| listing::list(shared, tag, after, visit)).await
    }

    fn newest_ms(&self) -> u64 {
        self.shared.newest_ms.load(Ordering::Acquire)
    }

    async fn setting(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        let settings = self.shared.settings.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(settings.values.get(name).map(|value| Bytes::copy_from_slice(value)))
    }

    async fn swap_setting(&self, name: &str, expected: Option<&[u8]>, new: &[u8]) -> Result<bool, StoreError> {
        if let Some(error) = self.shared.failed() {
            return Err(error);
        }
        let mut settings = self.shared.settings.lock().unwrap_or_else(PoisonError::into_inner);
        if settings.values.get(name).map(Vec::as_slice) != expected {
            return Ok(false);
        }
        let mut changed = settings.clone();
        changed.values.insert(name.to_owned(), new.to_vec());
        match changed.write(&self.shared.options.path) {
            Ok(()) => *settings = changed,
            Err(error) => return Err(self.shared.fail(format!("writing the settings: {error}"))),
        }
        Ok(true)
    }

    fn status(&self) -> Status {
        let shared = &self.shared;
        let health = match (shared.failed.get(), shared.space.is_low()) {
            (Some(_), _) => Health::Failed,
            (None, true) => Health::Full,
            (None, false) => Health::Ok,
        };
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let queue_len = queue.as_ref().map_or(0, |queue| queue.max_capacity() - queue.capacity());
        drop(queue);
        let state = shared.state();
        let oldest = state
            .tracked
            .first_key_value()
            .and_then(|(_, position)| Some((state.segments.get(&position.segment)?.segment.clone(), position.offset)));
        let entries = state.counts.map(|count| u64::try_from(count).unwrap_or(0));
        let log_bytes = state.log_bytes();
        drop(state);
        let mut oldest_ms = [None; Tag::COUNT];
        if let Some(place) = oldest_ms.get_mut(usize::from(OLDEST_TRACKED.0)) {
            *place = oldest.and_then(|(segment, offset)| commit::time_of(&segment, offset));
        }
        let counter = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Status {
            health,
            created: shared.created,
            entries,
            oldest_ms,
            queue_len: queue_len as u64,
            batches: counter(&shared.counters.batches),
            batched_writes: counter(&shared.counters.batched_writes),
            bytes_written: counter(&shared.counters.bytes_written),
            swept: counter(&shared.counters.swept),
            disk_bytes: log_bytes + shared.space.spare_bytes() + shared.index.disk_bytes(),
        }
    }

    fn close(&self) {
        self.stop();
    }
}

/// Where the parts of a store lie.
fn log_dir(path: &Path) -> PathBuf {
    path.join("log")
}

fn index_dir(path: &Path) -> PathBuf {
    path.join("index")
}
