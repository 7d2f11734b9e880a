//! The walk through the index that follows its opening: an engine may silently give less than was written, or what was
//! written earlier. Until it has been compared with its checkpoint, neither an entry in it nor its absence means anything;
//! besides, only the walk tells how many records of each kind there are.
//!
//! A small index is walked through before the store is open. A large one is walked through while it serves, bucket by
//! bucket; whoever asks for an entry of a bucket that has not been compared yet, compares it first. The index does not
//! change meanwhile: indexer and sweep wait for the end.

use super::Shared;
use super::state::{IdSet, Slot, State};
use crate::store::index::{BUCKETS, Index, IndexError, Known, bucket};
use crate::store::log::Position;
use crate::store::{OLDEST_TRACKED, RecordId, StoreError, Tag};
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

pub(super) struct Survey {
    done: AtomicBool,
    work: Mutex<Option<Arc<Work>>>,
}

struct Work {
    /// What stands in the index under these is superseded: they had a slot when the store was opened.
    hidden: IdSet,
    oldest_segment: u32,
    newest_segment: u32,
    next: AtomicUsize,
    /// Whether a bucket has been compared.
    buckets: Vec<Mutex<bool>>,
    found: Mutex<Found>,
}

#[derive(Default)]
struct Found {
    buckets: usize,
    counts: [i64; Tag::COUNT],
    tracked: Vec<(RecordId, u64, Position)>,
    /// Entries of retired segments, and those that were dropped: the index has not heard that they are gone.
    stale: Vec<RecordId>,
}

impl Survey {
    /// Begins with what memory holds; the log has been replayed.
    pub(super) fn begin(state: &mut State) -> Self {
        let live: Vec<_> = state.slots.values().filter_map(|slot| Some(slot.live.as_ref()?.located)).collect();
        live.iter().for_each(|located| state.count(located));
        let work = Work {
            hidden: state.slots.keys().copied().collect(),
            oldest_segment: state.segments.keys().next().copied().unwrap_or(0),
            newest_segment: state.end.position.segment,
            next: AtomicUsize::new(0),
            buckets: (0..BUCKETS).map(|_| Mutex::new(false)).collect(),
            found: Mutex::default(),
        };
        Self { done: AtomicBool::new(false), work: Mutex::new(Some(Arc::new(work))) }
    }

    pub(super) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    fn work(&self) -> Option<Arc<Work>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The whole walk at once, in two threads, while nobody else has the store.
    ///
    /// # Errors
    /// If the index is not as its checkpoint says.
    pub(super) fn complete(&self, index: &dyn Index, state: &mut State) -> Result<(), IndexError> {
        let Some(work) = self.work() else { return Ok(()) };
        std::thread::scope(|scope| {
            let walk = || (0..BUCKETS).try_for_each(|_| work.step(index).map(drop));
            let other = scope.spawn(walk);
            let own = walk();
            own.and(other.join().unwrap_or_else(|_| Err(IndexError("walking through it has panicked".to_owned()))))
        })?;
        self.finish(&work, state);
        Ok(())
    }

    /// Makes known what was found.
    fn finish(&self, work: &Work, state: &mut State) {
        let found = std::mem::take(&mut *work.found.lock().unwrap_or_else(PoisonError::into_inner));
        for (count, counted) in state.counts.iter_mut().zip(found.counts) {
            *count += counted;
        }
        for (id, version, position) in found.tracked {
            // Unless it has been superseded since.
            if !state.slots.contains_key(&id) {
                state.tracked.insert(version, position);
            }
        }
        for id in found.stale {
            if let Entry::Vacant(slot) = state.slots.entry(id) {
                slot.insert(Slot { live: None, in_index: true });
                state.waiting += 1;
            }
        }
        *self.work.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.done.store(true, Ordering::Release);
    }

    /// Walks on, in a thread of its own, until nothing is left to do or the store is closed.
    pub(super) fn run(&self, shared: &Shared) {
        while let Some(work) = self.work()
            && !shared.closing.load(Ordering::Acquire)
        {
            match work.step(&*shared.index) {
                Ok(true) => {}
                // The last buckets may still be under way in other threads.
                Ok(false) => return,
                Err(error) => return drop(condemn(shared, &error)),
            }
            self.finish_if_complete(shared, &work);
        }
    }

    fn finish_if_complete(&self, shared: &Shared, work: &Work) {
        if work.found.lock().unwrap_or_else(PoisonError::into_inner).buckets < BUCKETS {
            return;
        }
        let mut state = shared.state();
        // Another thread may have been faster.
        if !self.is_done() {
            self.finish(work, &mut state);
            shared.wake_indexer.notify_all();
        }
    }

    /// Has the bucket of this id been compared, before the index is asked for it.
    ///
    /// # Errors
    /// If the index turns out to be wrong; the store has failed then.
    pub(super) fn confirm(&self, shared: &Shared, id: RecordId) -> Result<(), StoreError> {
        if self.is_done() {
            return Ok(());
        }
        let Some(work) = self.work() else { return Ok(()) };
        work.check(&*shared.index, bucket(id)).map_err(|error| condemn(shared, &error))?;
        self.finish_if_complete(shared, &work);
        Ok(())
    }
}

/// The index may have lost entries, or gone back to older ones: nothing that it says counts any more. The next start rebuilds it.
fn condemn(shared: &Shared, error: &IndexError) -> StoreError {
    let noted = shared.index.condemn();
    let next = match noted {
        Ok(()) => "the next start rebuilds it from the log".to_owned(),
        Err(error) => format!("delete the directory index before the next start (this could not be noted: {error})"),
    };
    shared.fail(format!("{error}; {next}"))
}

impl Work {
    /// Compares the next bucket, if there is one left.
    fn step(&self, index: &dyn Index) -> Result<bool, IndexError> {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        if next >= BUCKETS {
            return Ok(false);
        }
        self.check(index, next).map(|()| true)
    }

    fn check(&self, index: &dyn Index, bucket: usize) -> Result<(), IndexError> {
        let Some(checked) = self.buckets.get(bucket) else { return Ok(()) };
        let mut checked = checked.lock().unwrap_or_else(PoisonError::into_inner);
        if *checked {
            return Ok(());
        }
        let mut part = Found::default();
        let mut impossible = false;
        index.check(bucket, &mut |id, located, known| {
            if located.position.segment > self.newest_segment {
                impossible = true;
            } else if self.hidden.contains(&id) {
            } else if located.position.segment < self.oldest_segment || known == Known::Gone {
                part.stale.push(id);
            } else {
                if let Some(count) = part.counts.get_mut(usize::from(located.tag.0)) {
                    *count += 1;
                }
                if located.tag == OLDEST_TRACKED {
                    part.tracked.push((id, located.version, located.position));
                }
            }
        })?;
        if impossible {
            return Err(IndexError("it names segments that do not exist".to_owned()));
        }
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.buckets += 1;
        found.counts.iter_mut().zip(part.counts).for_each(|(count, counted)| *count += counted);
        found.tracked.append(&mut part.tracked);
        found.stale.append(&mut part.stale);
        *checked = true;
        Ok(())
    }
}
