//! The shell of the core: carries records between the store, the hot cache and the requests.

use std::time::Duration;

/// `[cache]`.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of completed records kept in memory.
    pub cache_max_bytes: u64,
    /// How long a hot entry may be used; `None`: for its retention.
    pub cache_max_age: Option<Duration>,
}
