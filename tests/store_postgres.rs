//! What only PostgreSQL can do to a store: failures, refusals, other gateways.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

#[path = "store_postgres/cost.rs"]
mod cost;
#[path = "store_postgres/failures.rs"]
mod failures;
#[path = "store_postgres/proxy.rs"]
mod proxy;
#[path = "store_postgres/records.rs"]
mod records;
#[path = "store_postgres/refusals.rs"]
mod refusals;
#[path = "store_postgres/roads.rs"]
mod roads;
#[path = "servers/postgres.rs"]
mod servers;
#[path = "store_postgres/word.rs"]
mod word;

use bytes::Bytes;
use oncegate::store::postgres::Postgres;
use oncegate::store::shared::{Options, TlsFiles};
use oncegate::store::{Entry, Health, RecordId, Store, StoreError, Swap, Tag, Urgency, Value, Version};
use servers::Server;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio_postgres::NoTls;

const CLAIMED: Tag = Tag(0);
const COMPLETED: Tag = Tag(1);
const UNKNOWN: Tag = Tag(2);
const MS: fn(u64) -> Duration = Duration::from_millis;
/// For what takes no time to speak of, on a busy machine.
const SOON: Duration = Duration::from_millis(1500);
const PATIENCE: Duration = Duration::from_secs(30);

/// For tests that leave the server alone; it lives as long as the process does.
static SERVER: LazyLock<Option<Server>> = LazyLock::new(|| Server::start(&[]));

fn prefix() -> String {
    static TABLES: AtomicU32 = AtomicU32::new(0);
    format!("t{}", TABLES.fetch_add(1, Ordering::Relaxed))
}

/// Tables of their own.
fn options(url: String, timeout: Duration) -> Options {
    Options {
        url,
        password: None,
        prefix: prefix(),
        timeout,
        start_timeout: Duration::ZERO,
        strict: true,
        wait_replicas: 0,
        create: true,
        migrate: true,
        tls: TlsFiles::default(),
    }
}

async fn open(options: &Options) -> Postgres {
    Postgres::open(options).await.unwrap()
}

fn id(n: u64) -> RecordId {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    bytes[8..].copy_from_slice(&n.to_be_bytes());
    RecordId(bytes)
}

fn value(tag: Tag, expires_at_ms: Option<u64>, text: &str) -> Value {
    Value { tag, expires_at_ms, bytes: Bytes::copy_from_slice(text.as_bytes()) }
}

async fn swap(
    store: &Postgres,
    id: RecordId,
    expected: Option<Version>,
    new: Option<Value>,
) -> Result<Swap, StoreError> {
    store.compare_and_swap(id, expected, new, 0, Urgency::Claim).await
}

async fn put(store: &Postgres, id: RecordId, expected: Option<Version>, new: Value) -> Version {
    match swap(store, id, expected, Some(new)).await.unwrap() {
        Swap::Done(version) => version,
        Swap::Conflict(found) => panic!("conflict with {found:?}"),
    }
}

/// A session of the tests' own.
async fn session(url: &str) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Polls until it is so.
async fn until<F: Future<Output = bool>>(what: &str, mut is: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !is().await {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(MS(5)).await;
    }
}

async fn until_health(store: &Postgres, health: Health) {
    until("the health is told", async || store.status().health == health).await;
}

#[track_caller]
fn unavailable<T: std::fmt::Debug>(result: Result<T, StoreError>) -> Option<u64> {
    match result {
        Err(StoreError::Unavailable { may_land_until_ms, .. }) => may_land_until_ms,
        other => panic!("{other:?}"),
    }
}
