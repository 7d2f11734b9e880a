//! Stores: opaque bytes under an id, changed by compare-and-swap. A store knows no record and decides nothing.

pub mod embedded;
mod files;
mod index;
pub mod log;
pub mod memory;
pub mod postgres;
pub mod redis;
pub mod shared;
#[cfg(feature = "failpoints")]
pub mod simulated;

pub use shared::{StoreTime, Watch};

use bytes::Bytes;
use std::future::Future;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Duration;

/// The name of an entry: a keyed hash of tenant and key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordId(pub [u8; 16]);

impl std::fmt::Display for RecordId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for RecordId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Ids are keyed hashes already: eight of their bytes are as good a hash as any, and nobody can choose them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(8) {
            let mut word = [0; 8];
            word.iter_mut().zip(piece).for_each(|(to, from)| *to = *from);
            self.0 = self.0.rotate_left(29) ^ u64::from_le_bytes(word);
        }
    }

    fn write_usize(&mut self, _len: usize) {}

    fn finish(&self) -> u64 {
        // The table takes its bits from both ends.
        self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// For maps and caches by id.
pub(crate) type HashOfIds = BuildHasherDefault<IdHasher>;

/// Names one write of one entry. Versions of a store never repeat, not even after a removal or a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version(pub u64);

/// A kind of entry, so that a store can count and list by kind without reading values. Its meaning is the caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub u8);

impl Tag {
    /// Tags run from 0 to `COUNT - 1`.
    pub const COUNT: usize = 4;
}

/// The tag of which stores tell the oldest entry ([`Status::oldest_ms`]).
pub const OLDEST_TRACKED: Tag = Tag(2);

/// What is written under an id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    pub tag: Tag,
    /// From this time (milliseconds since the Unix epoch) the store may drop the entry; `None`: never.
    /// Until it has dropped it, the store still returns it: the caller judges.
    pub expires_at_ms: Option<u64>,
    pub bytes: Bytes,
}

/// What a store holds under an id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub version: Version,
    pub value: Value,
}

/// A part of what a store holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    pub entries: Vec<(RecordId, Entry)>,
    /// Where to go on; `None`: that was the end.
    pub next: Option<u64>,
}

/// The answer to a compare-and-swap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swap {
    /// Written (and durable, as the store is configured); for a removal the version is that of the removal.
    Done(Version),
    /// Nothing written: this is what the store holds.
    Conflict(Option<Entry>),
}

/// The answer to a compare-and-swap, and what its way to the store has left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swapped {
    pub swap: Swap,
    /// A creation was sent more than once: should the key be free again, an earlier copy of it may still land, up to that time
    /// of the store's clock. `None`: none will.
    pub may_land_until_ms: Option<u64>,
}

/// Whether a write may be refused to keep room for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// New work: refused with [`StoreError::Full`] when the disk runs low.
    Claim,
    /// Ends work that was begun: goes on as long as there is any room.
    Settle,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Too little disk for new work (for a settle: none at all). Nothing was written.
    #[error("the store takes no new claims: less than {min_free_bytes} bytes are free at {path}")]
    Full { path: String, min_free_bytes: u64 },
    /// The store has failed for good: a write or flush went wrong. A write under way may or may not have landed.
    #[error("the store has failed and takes no more writes until the gateway is restarted: {reason}")]
    Failed { reason: String },
    /// A shared store cannot be reached, or does not answer in time. `may_land_until_ms`: a write may have landed, or may
    /// still do so up to that time of the store's clock; `None`: nothing was written, and nothing will be.
    #[error("the store cannot be reached: {reason}")]
    Unavailable { reason: String, may_land_until_ms: Option<u64> },
    /// A shared store answers, and will not take this write, however often it is asked: it is too large, say. Nothing was
    /// written, but an earlier copy of an update may be.
    #[error("the store refuses the write: {reason}")]
    Refused { reason: String },
    /// The entry exists, but its bytes are damaged: its outcome is unknown, it is not absent.
    #[error("the entry of {id} is damaged: {detail}")]
    Damaged { id: RecordId, detail: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Ok,
    /// New claims are refused, settling goes on.
    Full,
    /// A shared store cannot be reached; that may pass.
    Unreachable,
    /// Failed for good.
    Failed,
}

/// A reading of the store's gauges and counters, for metrics. Counters count since the start. Of a shared store the
/// entries may be as they were some seconds ago, and counters are this gateway's own.
#[derive(Clone, Debug)]
pub struct Status {
    pub health: Health,
    /// Whether opening it has created it.
    pub created: bool,
    /// Entries by tag. Expired ones count until they are swept. Shared stores tell what costs little to count.
    pub entries: [u64; Tag::COUNT],
    /// Time of the oldest write among the entries of a tag; told of [`OLDEST_TRACKED`] at least.
    pub oldest_ms: [Option<u64>; Tag::COUNT],
    pub queue_len: u64,
    pub batches: u64,
    pub batched_writes: u64,
    pub bytes_written: u64,
    pub swept: u64,
    pub disk_bytes: u64,
}

pub trait Store: Send + Sync + 'static {
    /// What the store holds under `id`.
    ///
    /// # Errors
    /// [`StoreError::Failed`], [`StoreError::Unavailable`], [`StoreError::Damaged`].
    fn get(&self, id: RecordId) -> impl Future<Output = Result<Option<Entry>, StoreError>> + Send;

    /// Writes `new` (`None`: removes) under `id` if the store holds just version `expected` of it (`None`: nothing).
    /// When it says [`Swap::Done`], the write is as durable as the store is configured to be.
    /// The operation goes on if the future is dropped.
    ///
    /// A shared store that finds a conflicting entry that equals `new` in all but the version may take it for this write,
    /// whose answer was lost: whoever needs to tell his writes from others' puts a token into their bytes.
    ///
    /// # Errors
    /// [`StoreError::Full`], for [`Urgency::Settle`] only when no byte can be had; [`StoreError::Failed`]; [`StoreError::Unavailable`];
    /// [`StoreError::Refused`]; [`StoreError::Damaged`] if the conflicting entry cannot be read.
    fn compare_and_swap(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> impl Future<Output = Result<Swap, StoreError>> + Send;

    /// As [`Store::compare_and_swap`], for whoever may give the key back soon after.
    ///
    /// # Errors
    /// The same.
    fn swap_minding_copies(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> impl Future<Output = Result<Swapped, StoreError>> + Send {
        // A store with one user sends nothing twice.
        async move {
            let swap = self.compare_and_swap(id, expected, new, now_ms, urgency).await?;
            Ok(Swapped { swap, may_land_until_ms: None })
        }
    }

    /// Drops a bounded batch of entries that have expired at `now_ms`, each on condition that its version is the one
    /// that had expired, and gives their space back. Returns how long to wait before the next call.
    ///
    /// # Errors
    /// [`StoreError::Failed`], [`StoreError::Unavailable`].
    fn sweep(&self, now_ms: u64) -> impl Future<Output = Result<Duration, StoreError>> + Send;

    /// All entries that never expire; meant for few (claims found at start). A shared store tells none: they are others' too.
    ///
    /// # Errors
    /// [`StoreError::Failed`], [`StoreError::Damaged`].
    fn unexpiring(&self) -> Result<Vec<(RecordId, Entry)>, StoreError>;

    /// What the store holds, of a tag or altogether, roughly oldest first (Redis: in no order), in pages: `after` 0 begins,
    /// [`Page::next`] goes on, also after a restart. What has expired but was not swept is shown: the caller judges. What stays unchanged
    /// from the first page to the last is in one of them (in two, if the sweep moves it meanwhile); what is written
    /// meanwhile may be in none, or in several, each time as it was then.
    ///
    /// A page is bounded work: at most `visit` entries are looked at (one at least), and a few mebibytes. So it may hold
    /// few entries, or none, although it is not the last. Whoever pages more slowly than others write comes to no end.
    /// Damaged entries are passed over, with a word in the log. A cursor that no page has given begins anywhere.
    ///
    /// # Errors
    /// [`StoreError::Failed`], [`StoreError::Unavailable`].
    fn list(&self, tag: Option<Tag>, after: u64, visit: usize)
    -> impl Future<Output = Result<Page, StoreError>> + Send;

    /// The newest time that any write has borne: the clock must not start before it.
    fn newest_ms(&self) -> u64;

    /// A small value that belongs to the store as a whole; `None` if it was never set.
    ///
    /// # Errors
    /// [`StoreError::Failed`], [`StoreError::Unavailable`].
    fn setting(&self, name: &str) -> impl Future<Output = Result<Option<Bytes>, StoreError>> + Send;

    /// Sets it, durably, if it is `expected` (`None`: was never set); `false`: it is not, and nothing was written. May block;
    /// meant for start-up.
    ///
    /// # Errors
    /// [`StoreError::Failed`], [`StoreError::Unavailable`].
    fn swap_setting(
        &self,
        name: &str,
        expected: Option<&[u8]>,
        new: &[u8],
    ) -> impl Future<Output = Result<bool, StoreError>> + Send;

    /// The clock that all who share the store go by; `None`: the store has but one user.
    fn time(&self) -> Option<StoreTime> {
        None
    }

    /// To wait for an entry of a shared store to be changed, by another gateway perhaps.
    fn watch(&self, _id: RecordId) -> Watch {
        Watch::polling()
    }

    fn status(&self) -> Status;

    /// Writes out what is buffered and stops the store's threads. Blocks. Later calls fail.
    fn close(&self);
}

/// Which store, and how.
#[derive(Clone, Debug)]
pub enum Options {
    Memory,
    Embedded(embedded::Options),
    Redis(shared::Options),
    Postgres(shared::Options),
}

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Embedded(#[from] embedded::OpenError),
    #[error(transparent)]
    Shared(#[from] shared::OpenError),
}

/// The store that the options ask for.
pub enum AnyStore {
    Memory(Box<memory::Memory>),
    Embedded(embedded::Embedded),
    Redis(Box<redis::Redis>),
    Postgres(Box<postgres::Postgres>),
    #[cfg(feature = "failpoints")]
    Simulated(simulated::Simulated),
}

impl AnyStore {
    /// Opens it; an embedded one blocks.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(options: &Options) -> Result<Self, OpenError> {
        Ok(match options {
            Options::Memory => Self::Memory(Box::default()),
            Options::Embedded(options) => Self::Embedded(embedded::Embedded::open(options)?),
            Options::Redis(options) => {
                let store = shared::open_within(options, || redis::Redis::open(options)).await?;
                Self::Redis(Box::new(store))
            }
            Options::Postgres(options) => {
                let store = shared::open_within(options, || postgres::Postgres::open(options)).await?;
                Self::Postgres(Box::new(store))
            }
        })
    }
}

macro_rules! delegate {
    ($self:ident, $store:ident => $call:expr) => {
        match $self {
            Self::Memory($store) => $call,
            Self::Embedded($store) => $call,
            Self::Redis($store) => $call,
            Self::Postgres($store) => $call,
            #[cfg(feature = "failpoints")]
            Self::Simulated($store) => $call,
        }
    };
}

impl Store for AnyStore {
    async fn get(&self, id: RecordId) -> Result<Option<Entry>, StoreError> {
        delegate!(self, store => store.get(id).await)
    }

    async fn compare_and_swap(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> Result<Swap, StoreError> {
        delegate!(self, store => store.compare_and_swap(id, expected, new, now_ms, urgency).await)
    }

    async fn swap_minding_copies(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> Result<Swapped, StoreError> {
        delegate!(self, store => store.swap_minding_copies(id, expected, new, now_ms, urgency).await)
    }

    async fn sweep(&self, now_ms: u64) -> Result<Duration, StoreError> {
        delegate!(self, store => store.sweep(now_ms).await)
    }

    fn unexpiring(&self) -> Result<Vec<(RecordId, Entry)>, StoreError> {
        delegate!(self, store => store.unexpiring())
    }

    async fn list(&self, tag: Option<Tag>, after: u64, visit: usize) -> Result<Page, StoreError> {
        delegate!(self, store => store.list(tag, after, visit).await)
    }

    fn newest_ms(&self) -> u64 {
        delegate!(self, store => store.newest_ms())
    }

    async fn setting(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        delegate!(self, store => store.setting(name).await)
    }

    async fn swap_setting(&self, name: &str, expected: Option<&[u8]>, new: &[u8]) -> Result<bool, StoreError> {
        delegate!(self, store => store.swap_setting(name, expected, new).await)
    }

    fn time(&self) -> Option<StoreTime> {
        delegate!(self, store => store.time())
    }

    fn watch(&self, id: RecordId) -> Watch {
        delegate!(self, store => store.watch(id))
    }

    fn status(&self) -> Status {
        delegate!(self, store => store.status())
    }

    fn close(&self) {
        delegate!(self, store => store.close());
    }
}
