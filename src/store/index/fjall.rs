//! fjall as the index.
//!
//! What has to be known of fjall 3.1: a batch is written to its journal whole, with a checksum, and recovered whole or
//! not at all; hence the checkpoint goes into the same batch, and into the same keyspace, as the entries it speaks of.
//! A journal that is damaged is silently cut off at the damage, though later journals count: hence the sums in the
//! checkpoint, which [`Index::check`] compares. Writers are held up while flushing and compacting lag, in loops that
//! never end once the threads that do it have died. Opening a damaged database may panic.

use super::format::{State, border, decode, decode_checkpoint, encode, encode_checkpoint, hash};
use super::{Change, Checkpoint, Index, IndexError, Known, Located, Tuning};
use crate::store::RecordId;
use crate::store::log::segment::StoreId;
use fjall::compaction::Leveled;
use fjall::{AbstractTree, Database, Keyspace, KeyspaceCreateOptions, OwnedWriteBatch, PersistMode};
use std::ops::Bound;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const CACHE_BYTES: u64 = 64 << 20;
/// The least that fjall allows. A start reads up to twice that again.
const JOURNAL_BYTES: u64 = 64 << 20;
/// Tables of this size, so that merging some of them takes little room.
const TABLE_BYTES: u64 = 16 << 20;
/// One flushes, one compacts.
const THREADS: usize = 2;
/// Stands before all ids: these have 16 bytes.
const CHECKPOINT: [u8; 1] = [0];
/// From here on it is waited for flushing and compacting; fjall waits from 4 and 30 on.
const SEALED_MAX: usize = 1;
const RUNS_MAX: usize = 20;
const LOOK_EVERY: Duration = Duration::from_millis(1);

pub(super) struct FjallIndex {
    /// `None` only while it is dropped.
    open: Option<Open>,
    path: PathBuf,
    tuning: Tuning,
    store: StoreId,
    state: Mutex<State>,
}

struct Open {
    entries: Keyspace,
    db: Database,
}

impl Drop for FjallIndex {
    fn drop(&mut self) {
        let open = self.open.take();
        let _ = catch_unwind(AssertUnwindSafe(|| drop(open)));
    }
}

impl FjallIndex {
    /// Opens the index in the directory, or creates it there.
    ///
    /// # Errors
    /// If fjall cannot (a panic included).
    pub(super) fn open(path: &Path, tuning: Tuning, store: StoreId) -> Result<Self, IndexError> {
        let guarded = catch_unwind(|| {
            let db = Database::builder(path)
                .cache_size(CACHE_BYTES)
                .max_journaling_size(JOURNAL_BYTES)
                .worker_threads(THREADS)
                .manual_journal_persist(true)
                .open()?;
            let leveled = Arc::new(Leveled::default().with_table_target_size(TABLE_BYTES));
            let entries = db.keyspace("entries", || {
                KeyspaceCreateOptions::default()
                    .manual_journal_persist(true)
                    .max_memtable_size(tuning.memtable_bytes)
                    .compaction_strategy(leveled)
            })?;
            Ok::<_, fjall::Error>(Open { entries, db })
        });
        let open = match guarded {
            Ok(opened) => opened.map_err(|error| IndexError(error.to_string()))?,
            Err(_) => return Err(IndexError("fjall panicked while it was opened".to_owned())),
        };
        let state = Mutex::new(State::empty());
        let index = Self { open: Some(open), path: path.to_owned(), tuning, store, state };
        let checkpoint = index.guarded(|open| open.entries.get(CHECKPOINT))?;
        if let Some(read) = checkpoint.and_then(|bytes| decode_checkpoint(&bytes, store)) {
            *index.state() = read;
        }
        Ok(index)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a call into fjall; a panic in it is an error like others. After any of them the next start makes the index
    /// anew: damage in what no walk reads, such as filters, shows only in a look-up, or in the death of a thread that merges.
    fn guarded<T>(&self, call: impl FnOnce(&Open) -> Result<T, fjall::Error>) -> Result<T, IndexError> {
        let Some(open) = &self.open else { return Err(IndexError("it is closed".to_owned())) };
        let result = match catch_unwind(AssertUnwindSafe(|| call(open))) {
            Ok(result) => result.map_err(|error| IndexError(error.to_string())),
            Err(_) => Err(IndexError("fjall panicked".to_owned())),
        };
        if result.is_err()
            && let Err(error) = self.condemn()
        {
            tracing::error!(index = %self.path.display(), %error, "delete the index before the next start");
        }
        result
    }
}

impl Open {
    /// Waits while its threads lag. Once one of them has died, nothing can be written any more.
    fn wait_for_threads(&self) -> Result<(), fjall::Error> {
        while self.entries.sealed_memtable_count() > SEALED_MAX || self.entries.tree.l0_run_count() > RUNS_MAX {
            self.db.persist(PersistMode::Buffer)?;
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }
}

impl Index for FjallIndex {
    fn get(&self, id: RecordId) -> Result<Option<Located>, IndexError> {
        match self.guarded(|open| open.entries.get(id.0))? {
            Some(value) => {
                decode(&value).map(Some).ok_or_else(|| IndexError(format!("the entry of {id} is malformed")))
            }
            None => Ok(None),
        }
    }

    fn apply(&self, changes: &[Change], checkpoint: Checkpoint) -> Result<(), IndexError> {
        let mut state = self.state().clone();
        state.checkpoint = Some(checkpoint);
        self.guarded(|open| {
            open.wait_for_threads()?;
            let mut batch = OwnedWriteBatch::with_capacity(open.db.clone(), changes.len() + 1);
            for Change { id, new, is_new } in changes {
                if !is_new && let Some(old) = open.entries.get(id.0)? {
                    state.subtract(*id, &old);
                }
                match new {
                    Some(located) => {
                        let value = encode(located);
                        state.add(*id, &value);
                        batch.insert(&open.entries, id.0, value);
                    }
                    None => batch.remove(&open.entries, id.0),
                }
            }
            batch.insert(&open.entries, CHECKPOINT, encode_checkpoint(&checkpoint, &state, self.store));
            batch.durability(Some(PersistMode::SyncData)).commit()
        })?;
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
        let (mut sum, mut malformed) = (0_u64, false);
        let Some(from) = border(bucket) else { return Ok(()) };
        let until = border(bucket + 1).map_or(Bound::Unbounded, Bound::Excluded);
        self.guarded(|open| {
            for entry in open.entries.range((Bound::Included(from), until)) {
                let (id, value) = entry.into_inner()?;
                let Some((id, located)) = id.first_chunk().filter(|_| id.len() == 16).zip(decode(&value)) else {
                    malformed = true;
                    return Ok(());
                };
                sum = sum.wrapping_add(hash(RecordId(*id), &value));
                visit(RecordId(*id), located, Known::Settled);
            }
            Ok(())
        })?;
        if malformed {
            return Err(IndexError("it holds malformed entries".to_owned()));
        }
        self.state().compare(bucket, sum, sum)
    }

    fn condemn(&self) -> Result<(), IndexError> {
        super::condemn(&self.path)
    }

    /// The journal; two memtables on their way to the disk; a second copy of what is being merged.
    fn room_for(&self, changes: usize) -> u64 {
        let tables = self.open.as_ref().map_or(0, |open| open.entries.disk_space());
        (2 << 20) + 128 * changes as u64 + 2 * self.tuning.memtable_bytes + tables.min(12 * TABLE_BYTES)
    }

    /// A journal is created sparse: what counts is what it occupies.
    fn disk_bytes(&self) -> u64 {
        let tables = self.open.as_ref().map_or(0, |open| open.entries.disk_space());
        let files = std::fs::read_dir(&self.path).into_iter().flatten().flatten();
        let occupied: u64 = files.filter_map(|file| file.metadata().ok()).map(|meta| meta.blocks() * 512).sum();
        tables + occupied
    }
}
