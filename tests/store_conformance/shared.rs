//! Stores that are shared, in the suite. They go by a clock of their own, and the suite's times are small numbers: a store
//! here adds a base to each, mostly an hour from now, so that nothing expires meanwhile.

use super::*;
use oncegate::store::{Page, Status, StoreTime, Watch};
use std::sync::OnceLock;

pub(super) struct Shifted<S> {
    pub(super) store: S,
    pub(super) base_ms: u64,
}

impl<S> Shifted<S> {
    fn there(&self, mut value: Value) -> Value {
        value.expires_at_ms = value.expires_at_ms.map(|at| at + self.base_ms);
        value
    }

    fn back(&self, mut entry: Entry) -> Entry {
        entry.value.expires_at_ms = entry.value.expires_at_ms.map(|at| at - self.base_ms);
        entry
    }
}

impl<S: Store> Shifted<S> {
    /// With the same base after a restart.
    pub(super) fn new(store: S, ahead: Duration, base_ms: &OnceLock<u64>) -> Self {
        let base_ms = *base_ms.get_or_init(|| store.time().unwrap().now_ms() + ahead.as_millis() as u64);
        Self { store, base_ms }
    }
}

impl<S: Store> Store for Shifted<S> {
    async fn get(&self, id: RecordId) -> Result<Option<Entry>, StoreError> {
        Ok(self.store.get(id).await?.map(|entry| self.back(entry)))
    }

    async fn compare_and_swap(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> Result<Swap, StoreError> {
        let new = new.map(|value| self.there(value));
        Ok(match self.store.compare_and_swap(id, expected, new, self.base_ms + now_ms, urgency).await? {
            Swap::Conflict(entry) => Swap::Conflict(entry.map(|entry| self.back(entry))),
            done @ Swap::Done(_) => done,
        })
    }

    async fn sweep(&self, now_ms: u64) -> Result<Duration, StoreError> {
        self.store.sweep(now_ms.saturating_add(self.base_ms)).await
    }

    fn unexpiring(&self) -> Result<Vec<(RecordId, Entry)>, StoreError> {
        self.store.unexpiring()
    }

    async fn list(&self, tag: Option<Tag>, after: u64, visit: usize) -> Result<Page, StoreError> {
        let Page { entries, next } = self.store.list(tag, after, visit).await?;
        Ok(Page { entries: entries.into_iter().map(|(id, entry)| (id, self.back(entry))).collect(), next })
    }

    fn newest_ms(&self) -> u64 {
        self.store.newest_ms()
    }

    async fn setting(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        self.store.setting(name).await
    }

    async fn swap_setting(&self, name: &str, expected: Option<&[u8]>, new: &[u8]) -> Result<bool, StoreError> {
        self.store.swap_setting(name, expected, new).await
    }

    fn time(&self) -> Option<StoreTime> {
        self.store.time()
    }

    fn watch(&self, id: RecordId) -> Watch {
        self.store.watch(id)
    }

    fn status(&self) -> Status {
        self.store.status()
    }

    fn close(&self) {
        self.store.close();
    }
}
