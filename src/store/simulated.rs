//! A store that a simulation makes up. Not part of a release.

use super::{
    Entry, Page, RecordId, Status, Store, StoreError, StoreTime, Swap, Swapped, Tag, Urgency, Value, Version, Watch,
};
use bytes::Bytes;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// What a store does: see [`Store`], whose methods these are.
#[allow(missing_docs, reason = "they are those of Store")]
pub trait Backend: Send + Sync + 'static {
    fn get(&self, id: RecordId) -> Answer<'_, Option<Entry>>;
    fn swap(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> Answer<'_, Swapped>;
    fn sweep(&self, now_ms: u64) -> Answer<'_, Duration>;
    fn list(&self, tag: Option<Tag>, after: u64, visit: usize) -> Answer<'_, Page>;
    fn setting(&self, name: &str) -> Answer<'_, Option<Bytes>>;
    fn swap_setting(&self, name: &str, expected: Option<Bytes>, new: Bytes) -> Answer<'_, bool>;
    /// # Errors
    /// The store's.
    fn unexpiring(&self) -> Result<Vec<(RecordId, Entry)>, StoreError>;
    fn newest_ms(&self) -> u64;
    fn time(&self) -> Option<StoreTime>;
    fn watch(&self, id: RecordId) -> Watch;
    fn status(&self) -> Status;
}

pub type Simulated = Box<dyn Backend>;

impl Store for Simulated {
    async fn get(&self, id: RecordId) -> Result<Option<Entry>, StoreError> {
        self.as_ref().get(id).await
    }

    async fn compare_and_swap(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> Result<Swap, StoreError> {
        Ok(self.as_ref().swap(id, expected, new, now_ms, urgency).await?.swap)
    }

    async fn swap_minding_copies(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> Result<Swapped, StoreError> {
        self.as_ref().swap(id, expected, new, now_ms, urgency).await
    }

    async fn sweep(&self, now_ms: u64) -> Result<Duration, StoreError> {
        self.as_ref().sweep(now_ms).await
    }

    fn unexpiring(&self) -> Result<Vec<(RecordId, Entry)>, StoreError> {
        self.as_ref().unexpiring()
    }

    async fn list(&self, tag: Option<Tag>, after: u64, visit: usize) -> Result<Page, StoreError> {
        self.as_ref().list(tag, after, visit).await
    }

    fn newest_ms(&self) -> u64 {
        self.as_ref().newest_ms()
    }

    async fn setting(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        self.as_ref().setting(name).await
    }

    async fn swap_setting(&self, name: &str, expected: Option<&[u8]>, new: &[u8]) -> Result<bool, StoreError> {
        let expected = expected.map(Bytes::copy_from_slice);
        self.as_ref().swap_setting(name, expected, Bytes::copy_from_slice(new)).await
    }

    fn time(&self) -> Option<StoreTime> {
        self.as_ref().time()
    }

    fn watch(&self, id: RecordId) -> Watch {
        self.as_ref().watch(id)
    }

    fn status(&self) -> Status {
        self.as_ref().status()
    }

    fn close(&self) {}
}
