//! What the store in Redis must do beyond what all stores must: lost answers, servers that fail, slow ones, expiry, word of
//! changes, and what it refuses to work with.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

#[path = "store_redis/cost.rs"]
mod cost;
#[path = "store_redis/emptied.rs"]
mod emptied;
#[path = "store_redis/entries.rs"]
mod entries;
#[path = "store_redis/failures.rs"]
mod failures;
#[path = "store_redis/many.rs"]
mod many;
#[path = "store_redis/proxy.rs"]
mod proxy;
#[path = "store_redis/refusals.rs"]
mod refusals;
#[path = "servers/redis.rs"]
#[allow(dead_code, unreachable_pub)]
mod servers;

use bytes::Bytes;
use oncegate::store::redis::Redis;
use oncegate::store::shared::{OpenError, Options, TlsFiles};
use oncegate::store::{Entry, Health, RecordId, Store, StoreError, Swap, Tag, Urgency, Value, Version};
use servers::{Server, installed};
use std::time::{Duration, Instant};

const CLAIMED: Tag = Tag(0);
const COMPLETED: Tag = Tag(1);
const UNKNOWN: Tag = Tag(2);

fn options(url: &str) -> Options {
    Options {
        url: url.to_owned(),
        password: None,
        prefix: "og".to_owned(),
        timeout: Duration::from_secs(5),
        start_timeout: Duration::ZERO,
        strict: false,
        wait_replicas: 0,
        create: true,
        migrate: true,
        tls: TlsFiles::default(),
    }
}

async fn open(url: &str) -> Redis {
    Redis::open(&options(url)).await.unwrap()
}

/// A store that gives up after so many milliseconds.
async fn open_hasty(url: &str, timeout_ms: u64) -> Redis {
    Redis::open(&Options { timeout: Duration::from_millis(timeout_ms), ..options(url) }).await.unwrap()
}

async fn error(options: &Options) -> OpenError {
    match Redis::open(options).await {
        Ok(_) => panic!("it was opened"),
        Err(error) => error,
    }
}

fn id(n: u8) -> RecordId {
    RecordId([n; 16])
}

/// As it is called in the server.
fn key(n: u8) -> String {
    format!("og:{{{n:02x}}}:{}", id(n))
}

fn value(tag: Tag, text: &str) -> Value {
    Value { tag, expires_at_ms: None, bytes: Bytes::copy_from_slice(text.as_bytes()) }
}

async fn swap(store: &Redis, n: u8, expected: Option<Version>, new: Option<Value>) -> Result<Swap, StoreError> {
    store.compare_and_swap(id(n), expected, new, 0, Urgency::Claim).await
}

async fn put(store: &Redis, n: u8, expected: Option<Version>, new: Value) -> Version {
    match swap(store, n, expected, Some(new)).await.unwrap() {
        Swap::Done(version) => version,
        Swap::Conflict(found) => panic!("conflict with {found:?}"),
    }
}

fn now_ms(store: &Redis) -> u64 {
    store.time().unwrap().now_ms()
}

/// Awaits a condition; for twenty seconds at most.
async fn until<F: AsyncFnMut() -> bool>(what: &str, mut holds: F) {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds().await {
        assert!(Instant::now() < end, "{what}: not within 20 s");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
