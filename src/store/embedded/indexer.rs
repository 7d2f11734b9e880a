//! The indexer: one thread that moves settled entries from memory to the index, in sorted bulks.

use super::state::State;
use super::{Durability, Shared, Tuning};
use crate::store::index::{Change, Checkpoint};
use crate::store::log::summary;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

/// Whether enough waits to be worth a bulk, or replay at the next start would become long.
fn is_due(state: &State, tuning: &Tuning) -> bool {
    state.waiting >= tuning.index_bulk || state.waiting_bytes >= tuning.replay_bytes
}

impl Shared {
    /// Wakes the indexer if there is enough to do; waits for it if there is far too much.
    pub(super) fn hand_to_indexer(&self, mut state: MutexGuard<'_, State>) {
        if is_due(&state, &self.tuning) {
            self.wake_indexer.notify_one();
        }
        // While the index is still being compared nothing goes into it, which takes seconds where it is large.
        let bulks = if self.survey.is_done() { 10 } else { 50 };
        let too_many = self.tuning.index_bulk.saturating_mul(bulks);
        let waits =
            || self.failed.get().is_none() && !self.space.index_waits() && !self.closing.load(Ordering::Acquire);
        while state.waiting >= too_many && waits() {
            state = self.indexed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// How often a full disk is looked at again.
const CHECK_EVERY: Duration = Duration::from_millis(100);

/// Works until the store stops or fails.
pub(super) fn run(shared: &Shared) {
    loop {
        let mut state = shared.state();
        while !is_due(&state, &shared.tuning) || !shared.survey.is_done() {
            if state.stopping || shared.failed().is_some() {
                return;
            }
            state = shared.wake_indexer.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopping || shared.failed().is_some() {
            return;
        }
        if !shared.space.index_may_grow(shared.index.room_for(state.waiting)) {
            // Claims are refused meanwhile, so that what waits stays bounded by what was begun.
            shared.indexed.notify_all();
            drop(shared.wake_indexer.wait_timeout(state, CHECK_EVERY));
            continue;
        }
        drop(state);
        if let Err(reason) = bulk(shared) {
            shared.fail(reason);
            return;
        }
    }
}

/// Moves all that waits.
fn bulk(shared: &Shared) -> Result<(), String> {
    let mut state = shared.state();
    let (mut changes, checkpoint) = take(&mut state);
    let active = state.segments.get(&state.end.position.segment).map(|segment| Arc::clone(&segment.segment));
    drop(state);
    changes.sort_unstable_by_key(|change| change.id);
    // The index must never know more than the disk: it would then claim that acknowledged entries are gone.
    if shared.options.durability == Durability::Relaxed {
        // Segments before the active one were flushed when they were sealed.
        active
            .map_or(Ok(()), |active| active.file.sync_data())
            .map_err(|error| format!("flushing the log: {error}"))?;
    }
    shared.index.apply(&changes, checkpoint).map_err(|error| error.to_string())?;
    // In pieces, so that nobody waits long for the lock.
    for piece in changes.chunks(1024) {
        settle(&mut shared.state(), piece);
    }
    shared.indexed.notify_all();
    summarise(shared);
    Ok(())
}

/// Writes summaries of the segments that have been sealed.
fn summarise(shared: &Shared) {
    let mut state = shared.state();
    let sealed =
        state.segments.values_mut().filter_map(|state| Some((state.segment.clone(), state.unsummarised.take()?)));
    let sealed: Vec<_> = sealed.collect();
    drop(state);
    for (segment, verified) in sealed {
        let written = summary::write(&shared.log_dir, &segment, &verified);
        // If the segment has been retired meanwhile, its summary may have come too late to be deleted with it.
        let retired = !shared.state().segments.contains_key(&segment.number);
        let written = if retired { summary::remove(&shared.log_dir, segment.number) } else { written };
        if let Err(error) = written {
            // The next start takes longer, that is all.
            tracing::debug!(%error, segment = %segment.path.display(), "cannot write a summary");
        }
    }
}

/// What the index has to learn, unsorted, and how far it will have come then.
pub(super) fn take(state: &mut State) -> (Vec<Change>, Checkpoint) {
    let mut changes = Vec::with_capacity(state.waiting);
    for (id, slot) in &mut state.slots {
        if slot.for_index() {
            let new = slot.live.as_ref().map(|live| live.located);
            changes.push(Change { id: *id, new, is_new: !slot.in_index });
            // From now on the index may hold it: its removal must reach the index as well.
            slot.in_index = true;
        }
    }
    state.waiting_bytes = 0;
    let applied_to = state.end;
    let oldest = state.unexpiring.first_key_value().map(|(position, _)| *position);
    let replay_from = oldest.map_or(applied_to.position, |oldest| oldest.min(applied_to.position));
    (changes, Checkpoint { replay_from, applied_to })
}

/// Forgets what the index now holds, unless it has changed since.
pub(super) fn settle(state: &mut State, changes: &[Change]) {
    for Change { id, new, .. } in changes {
        let Some(slot) = state.slots.get(id) else { continue };
        if slot.live.as_ref().map(|live| live.located) == *new {
            state.slots.remove(id);
            state.waiting = state.waiting.saturating_sub(1);
        }
    }
    // A burst must not hold its memory for ever.
    if state.slots.capacity() > 4 * state.slots.len().max(4096) {
        let len = state.slots.len();
        state.slots.shrink_to(2 * len);
    }
}
