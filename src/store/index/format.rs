//! What the engines' entries and checkpoints look like: the same for all of them.

use super::{BUCKETS, Checkpoint, IndexError, Located, bucket};
use crate::store::files::{self, Fields};
use crate::store::log::segment::StoreId;
use crate::store::log::{LogPoint, Position};
use crate::store::{RecordId, Tag};
use xxhash_rust::xxh3::xxh3_64;

/// Of the checkpoint. Earlier ones said 1 here, or 0 while the index was being changed, and then not what was.
const FORMAT: u8 = 1;

/// What the checkpoint says beside the positions.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) checkpoint: Option<Checkpoint>,
    /// Roughly, after a stop in the middle of changes.
    pub(super) entries: u64,
    /// For each bucket, the sum of its entries' hashes: it does not depend on their order.
    pub(super) sums: Vec<u64>,
    /// What is being changed, in order: the sums leave these entries out, whatever stands there. Empty once the changes
    /// are on the disk.
    pub(super) changing: Vec<u64>,
}

/// Stands for an id in [`State::changing`]: ids are hashes.
pub(super) fn mark(id: RecordId) -> u64 {
    let RecordId([a, b, c, d, e, f, g, h, ..]) = id;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

impl State {
    /// Of an index without entries.
    pub(super) fn empty() -> Self {
        Self { checkpoint: None, entries: 0, sums: vec![0; BUCKETS], changing: Vec::new() }
    }

    pub(super) fn add(&mut self, id: RecordId, value: &[u8]) {
        self.entries = self.entries.saturating_add(1);
        if let Some(sum) = self.sums.get_mut(bucket(id)) {
            *sum = sum.wrapping_add(hash(id, value));
        }
    }

    pub(super) fn subtract(&mut self, id: RecordId, value: &[u8]) {
        self.entries = self.entries.saturating_sub(1);
        if let Some(sum) = self.sums.get_mut(bucket(id)) {
            *sum = sum.wrapping_sub(hash(id, value));
        }
    }

    /// Compares a bucket's sum with what was found of the entries that were not being changed; from now on it is that of
    /// all that were found.
    ///
    /// # Errors
    /// If they differ.
    pub(super) fn compare(&mut self, bucket: usize, settled: u64, all: u64) -> Result<(), IndexError> {
        match self.sums.get_mut(bucket) {
            Some(wanted) if *wanted != settled => {
                Err(IndexError("entries are missing, or others stand there than were written".to_owned()))
            }
            Some(wanted) => {
                *wanted = all;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// The hash of an entry, as it goes into its bucket's sum.
pub(super) fn hash(id: RecordId, value: &[u8]) -> u64 {
    xxh3_64(&id.0) ^ xxh3_64(value).rotate_left(32)
}

/// The first two bytes of the ids where a bucket begins; `None` behind the last one.
pub(super) fn border(bucket: usize) -> Option<[u8; 2]> {
    u16::try_from(bucket * ((1 << 16) / BUCKETS)).ok().map(u16::to_be_bytes)
}

/// 22 bytes, which sled keeps without an allocation of their own: segment, offset, length and expiry rounded up to
/// multiples of 8 and to seconds.
pub(super) fn encode(located: &Located) -> Vec<u8> {
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

pub(super) fn decode(bytes: &[u8]) -> Option<Located> {
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

pub(super) fn encode_checkpoint(checkpoint: &Checkpoint, state: &State, store: StoreId) -> Vec<u8> {
    let mut out = store.to_vec();
    for position in [checkpoint.replay_from, checkpoint.applied_to.position] {
        out.extend_from_slice(&position.segment.to_le_bytes());
        out.extend_from_slice(&position.offset.to_le_bytes());
    }
    for field in [checkpoint.applied_to.frame, state.entries].iter().chain(&state.sums) {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.push(FORMAT);
    state.changing.iter().for_each(|mark| out.extend_from_slice(&mark.to_le_bytes()));
    files::seal(out)
}

pub(super) fn decode_checkpoint(bytes: &[u8], store: StoreId) -> Option<State> {
    let mut fields = Fields(files::checked(bytes)?);
    if fields.array() != Some(store) {
        return None;
    }
    let mut position = || Some(Position { segment: fields.u32()?, offset: fields.u32()? });
    let (replay_from, applied_to) = (position()?, position()?);
    let checkpoint = Checkpoint { replay_from, applied_to: LogPoint { position: applied_to, frame: fields.u64()? } };
    let entries = fields.u64()?;
    let sums = (0..BUCKETS).map(|_| fields.u64()).collect::<Option<Vec<_>>>()?;
    if fields.u8()? != FORMAT {
        return None;
    }
    let changing = std::iter::from_fn(|| fields.u64()).collect();
    fields.0.is_empty().then_some(State { checkpoint: Some(checkpoint), entries, sums, changing })
}
