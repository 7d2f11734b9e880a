//! sled as the index.
//!
//! What has to be known of sled 0.34: its `flush` writes but never syncs on Linux, so each one is followed by an own
//! `fdatasync` of the file `db`; `flush_async` can hang for ever; opening or reading a damaged database may panic, or
//! silently give less than was written. Hence the checkpoint holds a sum over all entries, which [`Index::survey`] compares.

use super::{Checkpoint, Index, IndexError, Located, Visitor};
use crate::store::files::{self, Fields};
use crate::store::log::segment::StoreId;
use crate::store::log::{LogPoint, Position};
use crate::store::{RecordId, Tag};
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use xxhash_rust::xxh3::xxh3_64;

const CACHE_BYTES: u64 = 32 << 20;
const CHECKPOINT: &[u8] = b"checkpoint";

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
#[derive(Clone, Copy, Debug)]
struct State {
    checkpoint: Option<Checkpoint>,
    sum: Sum,
    /// `false` from before the first change until the next checkpoint: the sum does not hold then.
    clean: bool,
}

/// A sum that does not depend on order: of hashes of the entries, and their number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    entries: u64,
    hashes: u64,
}

impl Sum {
    fn add(&mut self, id: &[u8], value: &[u8]) {
        self.entries = self.entries.wrapping_add(1);
        self.hashes = self.hashes.wrapping_add(Self::hash(id, value));
    }

    fn subtract(&mut self, id: &[u8], value: &[u8]) {
        self.entries = self.entries.wrapping_sub(1);
        self.hashes = self.hashes.wrapping_sub(Self::hash(id, value));
    }

    fn hash(id: &[u8], value: &[u8]) -> u64 {
        xxh3_64(id) ^ xxh3_64(value).rotate_left(32)
    }
}

impl SledIndex {
    /// Opens the index, or creates it where there is none.
    ///
    /// # Errors
    /// If sled cannot (a panic included) or its files cannot be synced.
    pub(crate) fn open(path: &Path, store: StoreId) -> Result<Self, IndexError> {
        let fresh = !path.exists();
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
        let state = State { checkpoint: None, sum: Sum::default(), clean: false };
        let index = Self { trees: Some(trees), file, path: path.to_owned(), store, state: Mutex::new(state) };
        if fresh {
            index.sync()?;
            File::open(path.join("conf")).and_then(|conf| conf.sync_all()).map_err(io)?;
            files::sync_dir(&path.join("blobs")).map_err(io)?;
            files::sync_dir(path).map_err(io)?;
            path.parent().map_or(Ok(()), files::sync_dir).map_err(io)?;
        }
        if let Some(state) = index.read_checkpoint()? {
            *index.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        }
        Ok(index)
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

    /// Visits the entries whose first four bytes lie in `from..until`.
    fn survey_range(&self, from: u64, until: u64, visit: &mut Visitor<'_>) -> Result<Sum, IndexError> {
        let mut sum = Sum::default();
        let mut malformed = false;
        let from = u32::try_from(from).unwrap_or(u32::MAX).to_be_bytes();
        self.guarded(|trees| {
            for entry in trees.entries.range(from..) {
                let (id, value) = entry?;
                let Some(id) = id.first_chunk::<16>().filter(|_| id.len() == 16) else {
                    malformed = true;
                    return Ok(());
                };
                if Fields(id).array().map(u32::from_be_bytes).is_some_and(|first| u64::from(first) >= until) {
                    return Ok(());
                }
                sum.add(id, &value);
                match decode(&value) {
                    Some(located) => visit(RecordId(*id), located),
                    None => malformed = true,
                }
            }
            Ok(())
        })?;
        if malformed { Err(IndexError("it holds malformed entries".to_owned())) } else { Ok(sum) }
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
        let mut state = *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.clean && !changes.is_empty() {
            state.clean = false;
            self.write_checkpoint(&state)?;
        }
        self.guarded(|trees| {
            for (id, new) in changes {
                let old = match new {
                    Some(located) => {
                        let value = encode(located);
                        state.sum.add(&id.0, &value);
                        trees.entries.insert(id.0, value)?
                    }
                    None => trees.entries.remove(id.0)?,
                };
                if let Some(old) = old {
                    state.sum.subtract(&id.0, &old);
                }
            }
            Ok(())
        })?;
        self.sync()?;
        state.checkpoint = Some(checkpoint);
        state.clean = true;
        self.write_checkpoint(&state)?;
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        Ok(())
    }

    fn checkpoint(&self) -> Result<Option<Checkpoint>, IndexError> {
        Ok(self.state.lock().unwrap_or_else(PoisonError::into_inner).checkpoint)
    }

    fn survey(&self, visitors: &mut [Visitor<'_>]) -> Result<(), IndexError> {
        let parts = u32::try_from(visitors.len()).unwrap_or(u32::MAX).max(1);
        let border = |part: u32| (u64::from(u32::MAX) + 1) * u64::from(part) / u64::from(parts);
        let sums = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..parts)
                .zip(visitors)
                .map(|(part, visit)| scope.spawn(move || self.survey_range(border(part), border(part + 1), visit)))
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Sum, IndexError>>| {
                thread.join().unwrap_or_else(|_| Err(IndexError("walking through it has panicked".to_owned())))
            };
            threads.into_iter().map(join).collect::<Result<Vec<_>, _>>()
        })?;
        let mut sum = Sum::default();
        for part in sums {
            sum.entries = sum.entries.wrapping_add(part.entries);
            sum.hashes = sum.hashes.wrapping_add(part.hashes);
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.clean && state.sum != sum {
            let (found, wanted) = (sum.entries, state.sum.entries);
            return Err(IndexError(format!("{found} entries where {wanted} were written, or other ones")));
        }
        state.sum = sum;
        Ok(())
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
    for field in [checkpoint.applied_to.frame, state.sum.entries, state.sum.hashes] {
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
    let sum = Sum { entries: fields.u64()?, hashes: fields.u64()? };
    Some(State { checkpoint: Some(checkpoint), sum, clean: fields.u8()? == 1 })
}
