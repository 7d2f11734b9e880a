//! sled as the index.
//!
//! What has to be known of sled 0.34: its `flush` writes but never syncs on Linux, so each one is followed by an own
//! `fdatasync` of the file `db`; `flush_async` can hang for ever; opening or reading a damaged database may panic, or
//! silently give less than was written. Hence the checkpoint holds sums over all entries, which [`Index::check`] compares.

use super::format::{State, border, decode, decode_checkpoint, encode, encode_checkpoint, hash};
use super::{Change, Checkpoint, Index, IndexError, Located};
use crate::store::RecordId;
use crate::store::files;
use crate::store::log::segment::StoreId;
use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

const CACHE_BYTES: u64 = 32 << 20;
const CHECKPOINT: &[u8] = b"checkpoint";

/// How late sled's idle threads may wake, in nanoseconds: a minute.
const IDLE_SLACK_NS: NonZeroU64 = NonZeroU64::new(60_000_000_000).unwrap();

/// Lets sled start threads that sleep while there is nothing to do. With its first write, or the scan of what it finds, it
/// starts seven for good, and each looks for work once a second besides being told of it. Threads inherit the timer slack
/// (`PR_SET_TIMERSLACK`) of the one that starts them; with a large one those looks hardly ever happen.
fn with_idle_slack<T>(open: impl FnOnce() -> T) -> T {
    let before = rustix::thread::current_timer_slack().ok().and_then(NonZeroU64::new);
    // Where it cannot be set, they wake, which harms nobody.
    let _ = rustix::thread::set_current_timer_slack(Some(IDLE_SLACK_NS));
    let opened = open();
    let _ = rustix::thread::set_current_timer_slack(before);
    opened
}

pub(crate) struct SledIndex {
    /// `None` only while it is dropped.
    trees: Option<Trees>,
    /// An own descriptor of sled's only data file.
    file: File,
    path: PathBuf,
    store: StoreId,
    state: Mutex<State>,
}

struct Trees {
    db: sled::Db,
    entries: sled::Tree,
    meta: sled::Tree,
}

impl Drop for SledIndex {
    fn drop(&mut self) {
        let trees = self.trees.take();
        // sled flushes when it is dropped, and panics if the disk has failed.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(trees)));
    }
}

impl SledIndex {
    /// Opens the index in the directory, or creates it there.
    ///
    /// # Errors
    /// If sled cannot (a panic included) or its files cannot be synced.
    pub(super) fn open(path: &Path, store: StoreId) -> Result<Self, IndexError> {
        with_idle_slack(|| Self::open_and_sync(path, store))
    }

    fn open_and_sync(path: &Path, store: StoreId) -> Result<Self, IndexError> {
        let fresh = !path.join("db").exists();
        let open = || {
            let config = sled::Config::new()
                .path(path)
                .cache_capacity(CACHE_BYTES)
                .flush_every_ms(None)
                .mode(sled::Mode::HighThroughput);
            let db = config.open()?;
            let entries = db.open_tree("entries")?;
            let meta = db.open_tree("meta")?;
            Ok::<_, sled::Error>(Trees { db, entries, meta })
        };
        let trees = match catch_unwind(open) {
            Ok(opened) => opened.map_err(|error| IndexError(error.to_string()))?,
            Err(_) => return Err(IndexError("sled panicked while it was opened".to_owned())),
        };
        let io = |error: std::io::Error| IndexError(error.to_string());
        let file = File::open(path.join("db")).map_err(io)?;
        let state = Mutex::new(State::empty(false));
        let index = Self { trees: Some(trees), file, path: path.to_owned(), store, state };
        if fresh {
            index.sync()?;
            File::open(path.join("conf")).and_then(|conf| conf.sync_all()).map_err(io)?;
            files::sync_dir(&path.join("blobs")).map_err(io)?;
            files::sync_dir(path).map_err(io)?;
        }
        if let Some(read) = index.read_checkpoint()? {
            *index.state() = read;
        }
        Ok(index)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a call into sled; a panic in it is an error like others.
    fn guarded<T>(&self, call: impl FnOnce(&Trees) -> Result<T, sled::Error>) -> Result<T, IndexError> {
        let Some(trees) = &self.trees else { return Err(IndexError("it is closed".to_owned())) };
        match catch_unwind(AssertUnwindSafe(|| call(trees))) {
            Ok(result) => result.map_err(|error| IndexError(error.to_string())),
            Err(_) => Err(IndexError("sled panicked".to_owned())),
        }
    }

    fn read_checkpoint(&self) -> Result<Option<State>, IndexError> {
        let bytes = self.guarded(|trees| trees.meta.get(CHECKPOINT))?;
        Ok(bytes.and_then(|bytes| decode_checkpoint(&bytes, self.store)))
    }

    fn write_checkpoint(&self, state: &State) -> Result<(), IndexError> {
        let Some(checkpoint) = state.checkpoint else { return Ok(()) };
        let bytes = encode_checkpoint(&checkpoint, state, self.store);
        self.guarded(|trees| trees.meta.insert(CHECKPOINT, bytes))?;
        self.sync()
    }

    fn sync(&self) -> Result<(), IndexError> {
        self.guarded(|trees| trees.db.flush())?;
        self.file.sync_data().map_err(|error| IndexError(error.to_string()))
    }
}

impl Index for SledIndex {
    fn get(&self, id: RecordId) -> Result<Option<Located>, IndexError> {
        match self.guarded(|trees| trees.entries.get(id.0))? {
            Some(value) => {
                decode(&value).map(Some).ok_or_else(|| IndexError(format!("the entry of {id} is malformed")))
            }
            None => Ok(None),
        }
    }

    fn apply(&self, changes: &[Change], checkpoint: Checkpoint) -> Result<(), IndexError> {
        let mut state = self.state().clone();
        if state.clean && !changes.is_empty() {
            state.clean = false;
            self.write_checkpoint(&state)?;
        }
        self.guarded(|trees| {
            for Change { id, new, .. } in changes {
                let old = match new {
                    Some(located) => {
                        let value = encode(located);
                        state.add(*id, &value);
                        trees.entries.insert(id.0, value)?
                    }
                    None => trees.entries.remove(id.0)?,
                };
                if let Some(old) = old {
                    state.subtract(*id, &old);
                }
            }
            Ok(())
        })?;
        self.sync()?;
        state.checkpoint = Some(checkpoint);
        state.clean = true;
        self.write_checkpoint(&state)?;
        *self.state() = state;
        Ok(())
    }

    fn checkpoint(&self) -> Result<Option<Checkpoint>, IndexError> {
        Ok(self.state().checkpoint)
    }

    fn entries(&self) -> u64 {
        self.state().entries
    }

    fn is_certain(&self) -> bool {
        self.state().clean
    }

    fn check(&self, bucket: usize, visit: &mut dyn FnMut(RecordId, Located)) -> Result<(), IndexError> {
        let (mut sum, mut malformed) = (0_u64, false);
        let Some(from) = border(bucket) else { return Ok(()) };
        let until = border(bucket + 1).map_or(Bound::Unbounded, Bound::Excluded);
        self.guarded(|trees| {
            for entry in trees.entries.range((Bound::Included(from), until)) {
                let (id, value) = entry?;
                let Some((id, located)) = id.first_chunk().filter(|_| id.len() == 16).zip(decode(&value)) else {
                    malformed = true;
                    return Ok(());
                };
                sum = sum.wrapping_add(hash(RecordId(*id), &value));
                visit(RecordId(*id), located);
            }
            Ok(())
        })?;
        if malformed {
            return Err(IndexError("it holds malformed entries".to_owned()));
        }
        self.state().compare(bucket, sum)
    }

    fn condemn(&self) -> Result<(), IndexError> {
        super::condemn(&self.path)
    }

    fn room_for(&self, changes: usize) -> u64 {
        (2 << 20) + 2048 * changes as u64
    }

    fn disk_bytes(&self) -> u64 {
        let size = |name: &str| std::fs::metadata(self.path.join(name)).map_or(0, |meta| meta.len());
        size("db")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Tag;
    use crate::store::log::{LogPoint, Position};
    use std::time::Duration;

    #[test]
    fn its_threads_do_not_wake_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let before = rustix::thread::current_timer_slack().unwrap();
        let _index = SledIndex::open(dir.path(), [7; 16]).unwrap();
        assert_eq!(rustix::thread::current_timer_slack().unwrap(), before, "the caller's own");
        let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap());
        let pool = tasks.filter(|task| read(&task.path().join("comm")).starts_with("sled-io-"));
        let slacks = pool.map(|task| read(&Path::new("/proc").join(task.file_name()).join("timerslack_ns")));
        let slacks = slacks.collect::<Vec<_>>();
        assert!(!slacks.is_empty(), "they have not been started where their slack was set");
        assert!(slacks.iter().all(|slack| *slack == IDLE_SLACK_NS.to_string()), "{slacks:?}");
    }

    #[test]
    fn a_change_that_is_interrupted_leaves_the_sums_marked_as_uncertain() {
        let dir = tempfile::tempdir().unwrap();
        let store = [7; 16];
        let index = SledIndex::open(dir.path(), store).unwrap();
        let position = Position { segment: 1, offset: 64 };
        let checkpoint = Checkpoint { replay_from: position, applied_to: LogPoint { position, frame: 1 } };
        index.apply(&[], checkpoint).unwrap();
        let mut written = index.trees.as_ref().unwrap().meta.watch_prefix(CHECKPOINT);
        let located = Located { position, len: 8, tag: Tag(1), version: 3, expires_at_ms: 1000 };
        let change = Change { id: RecordId([1; 16]), new: Some(located), is_new: true };
        index.apply(&[change], checkpoint).unwrap();
        let mut next = || match written.next_timeout(Duration::from_secs(20)).unwrap() {
            sled::Event::Insert { value, .. } => decode_checkpoint(&value, store).unwrap(),
            sled::Event::Remove { .. } => panic!("it is never removed"),
        };
        // What a start finds between the two is the first.
        let (during, after) = (next(), next());
        assert_eq!((during.clean, after.clean), (false, true));
        assert_eq!((during.entries, after.entries), (0, 1));
        assert_ne!(during.sums, after.sums);
    }
}
