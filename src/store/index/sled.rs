//! sled as the index.
//!
//! What has to be known of sled 0.34: its `flush` writes but never syncs on Linux, so each one is followed by an own
//! `fdatasync` of the file `db`; `flush_async` can hang for ever; opening or reading a damaged database may panic, or
//! silently give less than was written. Hence the checkpoint holds sums over all entries, which [`Index::check`] compares.

use super::{BUCKETS, Checkpoint, Index, IndexError, Located, bucket};
use crate::store::files::{self, Fields};
use crate::store::log::segment::StoreId;
use crate::store::log::{LogPoint, Position};
use crate::store::{RecordId, Tag};
use std::fs::File;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use xxhash_rust::xxh3::xxh3_64;

const CACHE_BYTES: u64 = 32 << 20;
const CHECKPOINT: &[u8] = b"checkpoint";
/// A file that says: do not use this index.
const CONDEMNED: &str = "condemned";

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

/// What the checkpoint says beside the positions.
#[derive(Clone, Debug)]
struct State {
    checkpoint: Option<Checkpoint>,
    /// Roughly, after a stop in the middle of changes.
    entries: u64,
    /// For each bucket, the sum of its entries' hashes: it does not depend on their order.
    sums: Vec<u64>,
    /// `false` from before the first change until the next checkpoint: the sums do not hold then.
    clean: bool,
}

impl State {
    fn add(&mut self, id: RecordId, value: &[u8]) {
        self.entries = self.entries.saturating_add(1);
        if let Some(sum) = self.sums.get_mut(bucket(id)) {
            *sum = sum.wrapping_add(hash(id, value));
        }
    }

    fn subtract(&mut self, id: RecordId, value: &[u8]) {
        self.entries = self.entries.saturating_sub(1);
        if let Some(sum) = self.sums.get_mut(bucket(id)) {
            *sum = sum.wrapping_sub(hash(id, value));
        }
    }
}

fn hash(id: RecordId, value: &[u8]) -> u64 {
    xxh3_64(&id.0) ^ xxh3_64(value).rotate_left(32)
}

impl SledIndex {
    /// Opens the index, or creates it where there is none.
    ///
    /// # Errors
    /// If sled cannot (a panic included) or its files cannot be synced.
    pub(crate) fn open(path: &Path, store: StoreId) -> Result<Self, IndexError> {
        let fresh = !path.exists();
        if path.join(CONDEMNED).exists() {
            return Err(IndexError("it was found to be wrong while it was in use".to_owned()));
        }
        let guarded = catch_unwind(|| {
            let config = sled::Config::new()
                .path(path)
                .cache_capacity(CACHE_BYTES)
                .flush_every_ms(None)
                .mode(sled::Mode::HighThroughput);
            let db = config.open()?;
            let entries = db.open_tree("entries")?;
            let meta = db.open_tree("meta")?;
            Ok::<_, sled::Error>(Trees { db, entries, meta })
        });
        let trees = match guarded {
            Ok(opened) => opened.map_err(|error| IndexError(error.to_string()))?,
            Err(_) => return Err(IndexError("sled panicked while it was opened".to_owned())),
        };
        let io = |error: std::io::Error| IndexError(error.to_string());
        let file = File::open(path.join("db")).map_err(io)?;
        let state = Mutex::new(State { checkpoint: None, entries: 0, sums: vec![0; BUCKETS], clean: false });
        let index = Self { trees: Some(trees), file, path: path.to_owned(), store, state };
        if fresh {
            index.sync()?;
            File::open(path.join("conf")).and_then(|conf| conf.sync_all()).map_err(io)?;
            files::sync_dir(&path.join("blobs")).map_err(io)?;
            files::sync_dir(path).map_err(io)?;
            path.parent().map_or(Ok(()), files::sync_dir).map_err(io)?;
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

    fn apply(&self, changes: &[(RecordId, Option<Located>)], checkpoint: Checkpoint) -> Result<(), IndexError> {
        let mut state = self.state().clone();
        if state.clean && !changes.is_empty() {
            state.clean = false;
            self.write_checkpoint(&state)?;
        }
        self.guarded(|trees| {
            for (id, new) in changes {
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
        let border = |bucket: usize| u16::try_from(bucket * ((1 << 16) / BUCKETS)).ok().map(u16::to_be_bytes);
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
        let mut state = self.state();
        let clean = state.clean;
        match state.sums.get_mut(bucket) {
            Some(wanted) if clean && *wanted != sum => {
                Err(IndexError("entries are missing, or others stand there than were written".to_owned()))
            }
            Some(wanted) => {
                *wanted = sum;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn condemn(&self) -> Result<(), IndexError> {
        files::replace(&self.path, CONDEMNED, b"").map_err(|error| IndexError(error.to_string()))
    }

    fn disk_bytes(&self) -> u64 {
        let size = |name: &str| std::fs::metadata(self.path.join(name)).map_or(0, |meta| meta.len());
        size("db")
    }
}

/// 22 bytes, which sled keeps without an allocation of their own: segment, offset, length and expiry rounded up to
/// multiples of 8 and to seconds.
fn encode(located: &Located) -> Vec<u8> {
    let mut out = Vec::with_capacity(22);
    out.extend_from_slice(&located.position.segment.to_le_bytes());
    out.extend_from_slice(&located.position.offset.to_le_bytes());
    let expires_at_s = u32::try_from(located.expires_at_ms.div_ceil(1000)).unwrap_or(u32::MAX);
    out.extend_from_slice(&expires_at_s.to_le_bytes());
    out.extend(located.len.div_ceil(8).to_le_bytes().into_iter().take(3));
    out.extend(located.version.to_le_bytes().into_iter().take(6));
    out.push(located.tag.0);
    out
}

fn decode(bytes: &[u8]) -> Option<Located> {
    let mut fields = Fields(bytes);
    let located = Located {
        position: Position { segment: fields.u32()?, offset: fields.u32()? },
        expires_at_ms: u64::from(fields.u32()?) * 1000,
        len: fields.u24()? * 8,
        version: fields.u48()?,
        tag: Tag(fields.u8()?),
    };
    (fields.0.is_empty() && usize::from(located.tag.0) < Tag::COUNT).then_some(located)
}

fn encode_checkpoint(checkpoint: &Checkpoint, state: &State, store: StoreId) -> Vec<u8> {
    let mut out = store.to_vec();
    for position in [checkpoint.replay_from, checkpoint.applied_to.position] {
        out.extend_from_slice(&position.segment.to_le_bytes());
        out.extend_from_slice(&position.offset.to_le_bytes());
    }
    for field in [checkpoint.applied_to.frame, state.entries].iter().chain(&state.sums) {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.push(u8::from(state.clean));
    files::seal(out)
}

fn decode_checkpoint(bytes: &[u8], store: StoreId) -> Option<State> {
    let mut fields = Fields(files::checked(bytes)?);
    if fields.array() != Some(store) {
        return None;
    }
    let mut position = || Some(Position { segment: fields.u32()?, offset: fields.u32()? });
    let (replay_from, applied_to) = (position()?, position()?);
    let checkpoint = Checkpoint { replay_from, applied_to: LogPoint { position: applied_to, frame: fields.u64()? } };
    let entries = fields.u64()?;
    let sums = (0..BUCKETS).map(|_| fields.u64()).collect::<Option<Vec<_>>>()?;
    Some(State { checkpoint: Some(checkpoint), entries, sums, clean: fields.u8()? == 1 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_change_that_is_interrupted_leaves_the_sums_marked_as_uncertain() {
        let dir = tempfile::tempdir().unwrap();
        let store = [7; 16];
        let index = SledIndex::open(&dir.path().join("index"), store).unwrap();
        let position = Position { segment: 1, offset: 64 };
        let checkpoint = Checkpoint { replay_from: position, applied_to: LogPoint { position, frame: 1 } };
        index.apply(&[], checkpoint).unwrap();
        let mut written = index.trees.as_ref().unwrap().meta.watch_prefix(CHECKPOINT);
        let located = Located { position, len: 8, tag: Tag(1), version: 3, expires_at_ms: 1000 };
        index.apply(&[(RecordId([1; 16]), Some(located))], checkpoint).unwrap();
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
