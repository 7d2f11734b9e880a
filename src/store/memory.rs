//! A store in memory: nothing survives the process. For tests, and for those who accept that.

use super::{Entry, Health, Page, RecordId, Status, Store, StoreError, Swap, Tag, Urgency, Value, Version};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Entries that one call of `sweep` drops at most.
const SWEEP_MAX: usize = 2048;
/// Entries that one call of `list` looks at, at most: others wait for it.
const LIST_MAX: usize = 1024;

#[derive(Debug, Default)]
pub struct Memory {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<RecordId, Held>,
    /// What expires, by time.
    expiry: BTreeSet<(u64, RecordId)>,
    /// What never expires.
    unexpiring: BTreeSet<RecordId>,
    /// Per tag: version → id, and time of the write.
    by_tag: [BTreeMap<u64, (RecordId, u64)>; Tag::COUNT],
    settings: BTreeMap<String, Bytes>,
    last_version: u64,
    newest_ms: u64,
    writes: u64,
    bytes_written: u64,
    swept: u64,
    closed: bool,
}

#[derive(Debug)]
struct Held {
    entry: Entry,
    time_ms: u64,
}

impl State {
    fn insert(&mut self, id: RecordId, held: Held) {
        match held.entry.value.expires_at_ms {
            Some(at) => drop(self.expiry.insert((at, id))),
            None => drop(self.unexpiring.insert(id)),
        }
        if let Some(tag) = self.by_tag.get_mut(usize::from(held.entry.value.tag.0)) {
            tag.insert(held.entry.version.0, (id, held.time_ms));
        }
        self.entries.insert(id, held);
    }

    fn remove(&mut self, id: RecordId) {
        let Some(held) = self.entries.remove(&id) else { return };
        match held.entry.value.expires_at_ms {
            Some(at) => drop(self.expiry.remove(&(at, id))),
            None => drop(self.unexpiring.remove(&id)),
        }
        if let Some(tag) = self.by_tag.get_mut(usize::from(held.entry.value.tag.0)) {
            tag.remove(&held.entry.version.0);
        }
    }

    fn open(&self) -> Result<(), StoreError> {
        if self.closed { Err(StoreError::Failed { reason: "the store was closed".to_owned() }) } else { Ok(()) }
    }
}

impl Memory {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for Memory {
    async fn get(&self, id: RecordId) -> Result<Option<Entry>, StoreError> {
        let state = self.state();
        state.open()?;
        Ok(state.entries.get(&id).map(|held| held.entry.clone()))
    }

    async fn compare_and_swap(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        _urgency: Urgency,
    ) -> Result<Swap, StoreError> {
        let mut state = self.state();
        state.open()?;
        if new.as_ref().is_some_and(|new| usize::from(new.tag.0) >= Tag::COUNT) {
            return Err(StoreError::Failed { reason: "a bad tag".to_owned() });
        }
        let current = state.entries.get(&id).map(|held| &held.entry);
        if current.map(|entry| entry.version) != expected {
            return Ok(Swap::Conflict(current.cloned()));
        }
        state.last_version += 1;
        state.newest_ms = state.newest_ms.max(now_ms);
        state.writes += 1;
        let version = Version(state.last_version);
        state.remove(id);
        if let Some(value) = new {
            state.bytes_written += value.bytes.len() as u64;
            state.insert(id, Held { entry: Entry { version, value }, time_ms: now_ms });
        }
        Ok(Swap::Done(version))
    }

    async fn sweep(&self, now_ms: u64) -> Result<Duration, StoreError> {
        let mut state = self.state();
        state.open()?;
        for _ in 0..SWEEP_MAX {
            let Some((_, id)) = state.expiry.first().copied().filter(|(at, _)| *at <= now_ms) else {
                return Ok(Duration::from_secs(1));
            };
            state.remove(id);
            state.swept += 1;
        }
        Ok(Duration::from_millis(1))
    }

    fn unexpiring(&self) -> Result<Vec<(RecordId, Entry)>, StoreError> {
        let state = self.state();
        state.open()?;
        Ok(state.unexpiring.iter().filter_map(|id| Some((*id, state.entries.get(id)?.entry.clone()))).collect())
    }

    /// By version.
    async fn list(&self, tag: Option<Tag>, after: u64, visit: usize) -> Result<Page, StoreError> {
        let state = self.state();
        state.open()?;
        let visit = visit.clamp(1, LIST_MAX);
        let wanted = |at: usize| tag.is_none_or(|tag| usize::from(tag.0) == at);
        let of_tags = state.by_tag.iter().enumerate().filter(|(at, _)| wanted(*at)).flat_map(|(_, of_tag)| {
            of_tag.range((Excluded(after), Unbounded)).take(visit).map(|(version, (id, _))| (*version, *id))
        });
        let mut found: Vec<_> = of_tags.collect();
        found.sort_unstable_by_key(|(version, _)| *version);
        found.truncate(visit);
        let next = found.last().map(|(version, _)| *version).filter(|_| found.len() == visit);
        let entry = |id: RecordId| Some((id, state.entries.get(&id)?.entry.clone()));
        Ok(Page { entries: found.into_iter().filter_map(|(_, id)| entry(id)).collect(), next })
    }

    fn newest_ms(&self) -> u64 {
        self.state().newest_ms
    }

    async fn setting(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        Ok(self.state().settings.get(name).cloned())
    }

    async fn swap_setting(&self, name: &str, expected: Option<&[u8]>, new: &[u8]) -> Result<bool, StoreError> {
        let mut state = self.state();
        state.open()?;
        let as_expected = state.settings.get(name).map(AsRef::as_ref) == expected;
        if as_expected {
            state.settings.insert(name.to_owned(), Bytes::copy_from_slice(new));
        }
        Ok(as_expected)
    }

    fn status(&self) -> Status {
        let state = self.state();
        Status {
            health: if state.closed { Health::Failed } else { Health::Ok },
            created: true,
            entries: state.by_tag.each_ref().map(|tag| tag.len() as u64),
            oldest_ms: state.by_tag.each_ref().map(|tag| tag.first_key_value().map(|(_, (_, time_ms))| *time_ms)),
            queue_len: 0,
            batches: state.writes,
            batched_writes: state.writes,
            bytes_written: state.bytes_written,
            swept: state.swept,
            disk_bytes: 0,
        }
    }

    fn close(&self) {
        self.state().closed = true;
    }
}
