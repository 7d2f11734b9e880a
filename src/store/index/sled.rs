//! sled as the index.
//!
//! What has to be known of sled 0.34: its `flush` writes but never syncs on Linux, so each one is followed by an own
//! `fdatasync` of the file `db`; `flush_async` can hang for ever; opening or reading a damaged database may panic, or
//! silently give less than was written, or what was written earlier. Hence the checkpoint holds sums over all entries, which
//! [`Index::check`] compares. Changes are not whole or not at all either: they are announced in the checkpoint first, so
//! that the sums hold for all others whenever sled is stopped.

use super::format::{State, border, decode, decode_checkpoint, encode, encode_checkpoint, hash, mark};
use super::{Change, Checkpoint, Index, IndexError, Known, Located};
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
/// Changes that are announced together: with them the checkpoint has 88 KB, and what has 128 goes to a file that is never
/// synced.
const CHANGES_AT_ONCE: usize = 10_000;

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
    /// What was being changed when it was stopped.
    interrupted: Vec<u64>,
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
        let state = Mutex::new(State::empty());
        let mut index = Self { trees: Some(trees), file, path: path.to_owned(), store, state, interrupted: Vec::new() };
        if fresh {
            index.sync()?;
            File::open(path.join("conf")).and_then(|conf| conf.sync_all()).map_err(io)?;
            files::sync_dir(&path.join("blobs")).map_err(io)?;
            files::sync_dir(path).map_err(io)?;
        }
        if let Some(mut read) = index.read_checkpoint()? {
            index.interrupted = std::mem::take(&mut read.changing);
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

    /// Makes known, durably, what is about to change, and takes it out of the sums.
    fn announce(&self, state: &mut State, changes: &[Change]) -> Result<(), IndexError> {
        self.guarded(|trees| {
            for Change { id, .. } in changes.iter().filter(|change| !change.is_new) {
                if let Some(old) = trees.entries.get(id.0)? {
                    state.subtract(*id, &old);
                }
            }
            Ok(())
        })?;
        state.changing = changes.iter().map(|change| mark(change.id)).collect();
        self.write_checkpoint(state)
    }

    fn change(&self, state: &mut State, changes: &[Change]) -> Result<(), IndexError> {
        self.guarded(|trees| {
            for Change { id, new, is_new } in changes {
                let old = match new {
                    Some(located) => {
                        let value = encode(located);
                        state.add(*id, &value);
                        trees.entries.insert(id.0, value)?
                    }
                    None => trees.entries.remove(id.0)?,
                };
                if let Some(old) = old.filter(|_| *is_new) {
                    state.subtract(*id, &old);
                }
            }
            Ok(())
        })?;
        self.sync()
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
        for some in changes.chunks(CHANGES_AT_ONCE) {
            self.announce(&mut state, some)?;
            self.change(&mut state, some)?;
        }
        state.checkpoint = Some(checkpoint);
        state.changing.clear();
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

    fn check(&self, bucket: usize, visit: &mut dyn FnMut(RecordId, Located, Known)) -> Result<(), IndexError> {
        let (mut settled, mut all, mut malformed) = (0_u64, 0_u64, false);
        let Some(from) = border(bucket) else { return Ok(()) };
        let until = border(bucket + 1).map_or(Bound::Unbounded, Bound::Excluded);
        self.guarded(|trees| {
            for entry in trees.entries.range((Bound::Included(from), until)) {
                let (id, value) = entry?;
                let Some((id, located)) = id.first_chunk().filter(|_| id.len() == 16).zip(decode(&value)) else {
                    malformed = true;
                    return Ok(());
                };
                let (id, hash) = (RecordId(*id), hash(RecordId(*id), &value));
                all = all.wrapping_add(hash);
                if self.interrupted.binary_search(&mark(id)).is_ok() {
                    visit(id, located, Known::Gone);
                } else {
                    settled = settled.wrapping_add(hash);
                    visit(id, located, Known::Settled);
                }
            }
            Ok(())
        })?;
        if malformed {
            return Err(IndexError("it holds malformed entries".to_owned()));
        }
        self.state().compare(bucket, settled, all)
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
    fn a_change_is_announced_first_and_left_out_of_the_sums() {
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
        assert_eq!((during.changing, after.changing), (vec![mark(change.id)], vec![]));
        assert_eq!((during.entries, after.entries), (0, 1));
        assert_ne!(during.sums, after.sums);
    }

    /// Entries of a bucket each, and what is known of them.
    fn walk(index: &SledIndex) -> Result<Vec<(u8, u32, Known)>, IndexError> {
        let mut found = Vec::new();
        for bucket in 0..crate::store::index::BUCKETS {
            index.check(bucket, &mut |id, located, known| found.push((id.0[0], located.position.offset, known)))?;
        }
        Ok(found)
    }

    #[test]
    fn the_sums_hold_for_all_other_entries_wherever_a_change_is_interrupted() {
        let store = [7; 16];
        let at = |offset| Position { segment: 1, offset };
        let put = |n, offset, is_new| {
            let new = Some(Located { position: at(offset), len: 8, tag: Tag(1), version: 3, expires_at_ms: 1000 });
            Change { id: RecordId([n; 16]), new, is_new }
        };
        let checkpoint = Checkpoint { replay_from: at(64), applied_to: LogPoint { position: at(64), frame: 1 } };
        // One is replaced, one is new, one is removed; the change is interrupted before each of them.
        let changes =
            [put(1, 200, false), Change { id: RecordId([2; 16]), new: None, is_new: false }, put(3, 200, true)];
        for done in 0..=changes.len() {
            let dir = tempfile::tempdir().unwrap();
            let index = SledIndex::open(dir.path(), store).unwrap();
            index.apply(&[], checkpoint).unwrap();
            index.apply(&[put(1, 100, true), put(2, 100, true), put(9, 100, true)], checkpoint).unwrap();
            let mut state = index.state().clone();
            index.announce(&mut state, &changes).unwrap();
            index.change(&mut state, &changes[..done]).unwrap();
            let reopen = |index: SledIndex| {
                drop(index);
                File::open(dir.path().join("db")).unwrap().lock().unwrap();
                SledIndex::open(dir.path(), store).unwrap()
            };
            let index = reopen(index);
            let found = walk(&index).unwrap();
            assert!(found.contains(&(9, 100, Known::Settled)), "{found:?}");
            assert!(found.iter().all(|(n, _, known)| *n == 9 || *known == Known::Gone), "{found:?}");
            // What was found is what the next changes begin with.
            index.apply(&changes, checkpoint).unwrap();
            let index = reopen(index);
            let settled = [(1, 200), (3, 200), (9, 100)].map(|(n, offset)| (n, offset, Known::Settled));
            assert_eq!(walk(&index).unwrap(), settled);
            // And an older entry that stands in the place of another is noticed in the midst of a change, too.
            let mut state = index.state().clone();
            index.announce(&mut state, &changes).unwrap();
            let older = Located { position: at(80), len: 8, tag: Tag(1), version: 2, expires_at_ms: 1000 };
            index.guarded(|trees| trees.entries.insert([9; 16], encode(&older))).unwrap();
            assert!(walk(&reopen(index)).is_err());
        }
    }
}
