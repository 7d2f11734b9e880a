//! What every store must do: one suite, run against each.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

#[path = "store_conformance/listing.rs"]
mod listing;
#[path = "store_conformance/postgres.rs"]
mod postgres;
#[path = "store_conformance/redis.rs"]
mod redis;
#[path = "servers/redis.rs"]
#[allow(dead_code, unreachable_pub)]
mod redis_server;
#[path = "store_conformance/shared.rs"]
mod shared;

use bytes::Bytes;
use listing::{
    a_listing_goes_on_after_a_restart, a_listing_goes_on_where_its_place_is_gone,
    a_listing_shows_expired_entries_until_they_are_swept, a_listing_shows_what_is_held_oldest_first,
    a_page_of_large_records_is_short, any_cursor_will_do, what_stays_unchanged_is_listed_whatever_happens_meanwhile,
};
use oncegate::store::embedded::{Durability, Embedded, Engine, Options, Tuning};
use oncegate::store::memory::Memory;
use oncegate::store::{Entry, Health, RecordId, Store, StoreError, Swap, Tag, Urgency, Value, Version};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

const CLAIMED: Tag = Tag(0);
const COMPLETED: Tag = Tag(1);
const UNKNOWN: Tag = Tag(2);

/// A store, and how to open it anew after it was closed.
trait Backend {
    type Store: Store;
    async fn open(&self) -> Self::Store;
    const DURABLE: bool;
    /// Whether it counts its entries by kind, at once.
    const COUNTS: bool = true;
}

struct InMemory;

impl Backend for InMemory {
    type Store = Memory;
    async fn open(&self) -> Memory {
        Memory::new()
    }
    const DURABLE: bool = false;
}

struct OnDisk {
    dir: TempDir,
    engine: Engine,
    durability: Durability,
    tuning: Tuning,
}

impl Backend for OnDisk {
    type Store = Embedded;
    async fn open(&self) -> Embedded {
        let path = self.dir.path().join("data");
        let (engine, durability) = (self.engine, self.durability);
        let options = Options { path, engine, create: true, min_free_bytes: 0, durability };
        Embedded::open_tuned(&options, self.tuning).unwrap()
    }
    const DURABLE: bool = true;
}

fn on_disk(engine: Engine, durability: Durability, tuning: Tuning) -> OnDisk {
    OnDisk { dir: tempfile::tempdir().unwrap(), engine, durability, tuning }
}

/// So small that a few entries fill a segment and a bulk.
fn small() -> Tuning {
    Tuning {
        segment_bytes_min: 4096,
        segment_bytes_max: 16384,
        index_bulk: 4,
        memtable_bytes: 32 << 10,
        replay_bytes: 16384,
        verify_first_bytes: u64::MAX,
        survey_first_max: u64::MAX,
        survey_threads: 2,
    }
}

fn id(n: u64) -> RecordId {
    let mut bytes = [0; 16];
    // Spread, as hashes are.
    bytes[..8].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    bytes[8..].copy_from_slice(&n.to_be_bytes());
    RecordId(bytes)
}

fn value(tag: Tag, expires_at_ms: Option<u64>, text: &str) -> Value {
    Value { tag, expires_at_ms, bytes: Bytes::copy_from_slice(text.as_bytes()) }
}

async fn put(store: &impl Store, id: RecordId, expected: Option<Version>, new: Value, now_ms: u64) -> Version {
    match store.compare_and_swap(id, expected, Some(new), now_ms, Urgency::Claim).await.unwrap() {
        Swap::Done(version) => version,
        Swap::Conflict(found) => panic!("conflict with {found:?}"),
    }
}

async fn remove(store: &impl Store, id: RecordId, expected: Version, now_ms: u64) -> Version {
    match store.compare_and_swap(id, Some(expected), None, now_ms, Urgency::Settle).await.unwrap() {
        Swap::Done(version) => version,
        Swap::Conflict(found) => panic!("conflict with {found:?}"),
    }
}

/// Sweeps until there is nothing to do.
async fn sweep_all(store: &impl Store, now_ms: u64) {
    while store.sweep(now_ms).await.unwrap() < Duration::from_millis(500) {}
}

async fn swaps_only_what_was_expected(backend: impl Backend) {
    let store = backend.open().await;
    assert_eq!(store.get(id(1)).await.unwrap(), None);
    let first = value(CLAIMED, None, "first");
    let v1 = put(&store, id(1), None, first.clone(), 10).await;
    let held = Entry { version: v1, value: first };
    assert_eq!(store.get(id(1)).await.unwrap(), Some(held.clone()));

    // Absent expected, another version expected, absent held: nothing is written, and the current entry is told.
    let other = value(COMPLETED, Some(5000), "other");
    let swap = store.compare_and_swap(id(1), None, Some(other.clone()), 11, Urgency::Claim).await.unwrap();
    assert_eq!(swap, Swap::Conflict(Some(held.clone())));
    let wrong = Some(Version(v1.0 + 1000));
    let swap = store.compare_and_swap(id(1), wrong, None, 11, Urgency::Settle).await.unwrap();
    assert_eq!(swap, Swap::Conflict(Some(held.clone())));
    let swap = store.compare_and_swap(id(1), wrong, Some(other.clone()), 11, Urgency::Settle).await.unwrap();
    assert_eq!(swap, Swap::Conflict(Some(held.clone())));
    let swap = store.compare_and_swap(id(2), Some(v1), Some(other.clone()), 11, Urgency::Claim).await.unwrap();
    assert_eq!(swap, Swap::Conflict(None));
    assert_eq!(store.get(id(1)).await.unwrap(), Some(held));
    assert_eq!(store.get(id(2)).await.unwrap(), None);

    let v2 = put(&store, id(1), Some(v1), other.clone(), 12).await;
    assert!(v2 > v1);
    let held = Entry { version: v2, value: other };
    assert_eq!(store.get(id(1)).await.unwrap(), Some(held.clone()));
    let swap = store.compare_and_swap(id(1), Some(v1), None, 13, Urgency::Settle).await.unwrap();
    assert_eq!(swap, Swap::Conflict(Some(held)));
    store.close();
}

async fn versions_never_repeat(backend: impl Backend) {
    let mut seen = HashSet::new();
    let mut last = Version(0);
    let mut note = |version: Version| {
        assert!(seen.insert(version), "{version:?} was given out twice");
        assert!(version > last);
        last = version;
    };
    let mut store = backend.open().await;
    for round in 0..20 {
        let v = put(&store, id(1), None, value(CLAIMED, None, "a"), round).await;
        note(v);
        note(remove(&store, id(1), v, round).await);
        assert_eq!(store.get(id(1)).await.unwrap(), None);
        // The version of something removed finds nothing.
        let swap = store.compare_and_swap(id(1), Some(v), None, round, Urgency::Settle).await.unwrap();
        assert_eq!(swap, Swap::Conflict(None));
        if is_durable(&backend) && round % 5 == 0 {
            store.close();
            drop(store);
            store = backend.open().await;
        }
    }
    store.close();
}

fn is_durable<B: Backend>(_: &B) -> bool {
    B::DURABLE
}

fn counts<B: Backend>(_: &B) -> bool {
    B::COUNTS
}

async fn expired_entries_stay_until_swept(backend: impl Backend) {
    let store = backend.open().await;
    let v1 = put(&store, id(1), None, value(COMPLETED, Some(1000), "soon"), 10).await;
    let v2 = put(&store, id(2), None, value(COMPLETED, Some(2000), "later"), 10).await;
    let v3 = put(&store, id(3), None, value(CLAIMED, None, "never"), 10).await;
    sweep_all(&store, 999).await;
    assert_eq!(store.get(id(1)).await.unwrap().map(|e| e.version), Some(v1));
    // Expired, not swept: it is returned, and the caller judges.
    assert_eq!(store.get(id(1)).await.unwrap().map(|e| e.value.expires_at_ms), Some(Some(1000)));
    sweep_all(&store, 1000).await;
    assert_eq!(store.get(id(1)).await.unwrap(), None);
    assert_eq!(store.get(id(2)).await.unwrap().map(|e| e.version), Some(v2));
    assert_eq!(store.get(id(3)).await.unwrap().map(|e| e.version), Some(v3));
    assert_eq!(store.status().entries, [1, 1, 0, 0]);
    assert_eq!(store.status().swept, 1);
    // What was swept is absent for a swap, too.
    let again = put(&store, id(1), None, value(CLAIMED, None, "again"), 1001).await;
    assert!(again > v3);
    sweep_all(&store, u64::MAX / 2).await;
    assert_eq!(store.status().entries, [2, 0, 0, 0]);
    store.close();
}

async fn sweep_spares_a_newer_version(backend: impl Backend) {
    let store = backend.open().await;
    let mut expected = Vec::new();
    for n in 0..200 {
        let old = put(&store, id(n), None, value(UNKNOWN, Some(1000), "old"), 10).await;
        if n % 2 == 0 {
            expected.push((id(n), put(&store, id(n), Some(old), value(COMPLETED, Some(3000), "new"), 20).await));
        }
    }
    sweep_all(&store, 1500).await;
    assert_eq!(store.status().entries, [0, 100, 0, 0]);
    for (id, version) in expected {
        let entry = store.get(id).await.unwrap().unwrap();
        assert_eq!((entry.version, &entry.value.bytes[..]), (version, &b"new"[..]));
    }
    sweep_all(&store, 3000).await;
    assert_eq!(store.status().entries, [0; 4]);
    store.close();
}

async fn one_of_many_wins(backend: impl Backend) {
    let store = Arc::new(backend.open().await);
    for round in 0..10 {
        let barrier = Arc::new(tokio::sync::Barrier::new(64));
        let tasks: Vec<_> = (0..64)
            .map(|n| {
                let (store, barrier) = (store.clone(), barrier.clone());
                tokio::spawn(async move {
                    barrier.wait().await;
                    let mine = value(CLAIMED, None, &format!("{round} {n}"));
                    let swap = store.compare_and_swap(id(round), None, Some(mine.clone()), 10, Urgency::Claim).await;
                    (mine, swap.unwrap())
                })
            })
            .collect();
        let (mut won, mut lost) = (Vec::new(), Vec::new());
        for task in tasks {
            match task.await.unwrap() {
                (value, Swap::Done(version)) => won.push(Entry { version, value }),
                (_, Swap::Conflict(entry)) => lost.push(entry.expect("told what is held")),
            }
        }
        assert_eq!(won.len(), 1, "exactly one wins");
        assert!(lost.iter().all(|entry| *entry == won[0]), "all others are told of it");
    }
    store.close();
}

async fn a_chain_of_swaps_loses_none(backend: impl Backend) {
    let store = Arc::new(backend.open().await);
    put(&*store, id(7), None, value(CLAIMED, None, "0"), 10).await;
    let tasks: Vec<_> = (0..16)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..25 {
                    let mut held = store.get(id(7)).await.unwrap().unwrap();
                    loop {
                        let text = std::str::from_utf8(&held.value.bytes).unwrap();
                        let count: u64 = text.split(' ').next().unwrap().parse().unwrap();
                        // Through the index and memory in turn.
                        let expires = count.is_multiple_of(2).then_some(1 << 40);
                        // Not the same as another's: shared stores take an equal entry for the very write.
                        let next = value(CLAIMED, expires, &format!("{} {writer}", count + 1));
                        let swap = store.compare_and_swap(id(7), Some(held.version), Some(next), 10, Urgency::Settle);
                        match swap.await.unwrap() {
                            Swap::Done(_) => break,
                            Swap::Conflict(current) => held = current.unwrap(),
                        }
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert!(store.get(id(7)).await.unwrap().unwrap().value.bytes.starts_with(b"400 "));
    if counts(&backend) {
        assert_eq!(store.status().entries, [1, 0, 0, 0]);
    }
    store.close();
}

async fn a_dropped_future_does_not_lose_the_write(backend: impl Backend) {
    let store = Arc::new(backend.open().await);
    for n in 0..50 {
        let mine = value(CLAIMED, None, "claim");
        let mut swap = Box::pin(store.compare_and_swap(id(n), None, Some(mine), 10, Urgency::Claim));
        // Polled once, so that it was begun.
        let _ = futures_poll_once(swap.as_mut()).await;
        drop(swap);
    }
    // Operations are answered in order: once this one is, the others are done.
    put(&*store, id(1000), None, value(CLAIMED, None, "last"), 10).await;
    for n in 0..50 {
        assert!(store.get(id(n)).await.unwrap().is_some(), "write {n} was lost");
    }
    store.close();
}

async fn futures_poll_once<F: Future>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
    std::future::poll_fn(|context| {
        std::task::Poll::Ready(match future.as_mut().poll(context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        })
    })
    .await
}

async fn counts_and_lists_by_kind(backend: impl Backend) {
    let store = backend.open().await;
    assert!(store.status().created);
    assert_eq!(store.status().health, Health::Ok);
    let mut claims = Vec::new();
    for n in 0..30 {
        let claim = value(CLAIMED, None, &format!("claim {n}"));
        claims.push((id(n), Entry { version: put(&store, id(n), None, claim.clone(), 100 + n).await, value: claim }));
    }
    for n in 0..10 {
        put(&store, id(n), Some(claims[n as usize].1.version), value(COMPLETED, Some(9000), "c"), 200 + n).await;
    }
    let mut unknown = Vec::new();
    for n in 10..15 {
        let version = claims[n as usize].1.version;
        unknown.push(put(&store, id(n), Some(version), value(UNKNOWN, Some(9000), "u"), 300 + n).await);
    }
    for n in 15..18 {
        remove(&store, id(n), claims[n as usize].1.version, 400).await;
    }
    let status = store.status();
    assert_eq!(status.entries, [12, 10, 5, 0]);
    assert_eq!(status.oldest_ms[2], Some(310));
    assert_eq!(store.newest_ms(), 400);
    let mut listed = store.unexpiring().unwrap();
    listed.sort_by_key(|(_, entry)| entry.version);
    assert_eq!(listed, claims.split_off(18));
    // Resolving the oldest makes the next one the oldest.
    put(&store, id(10), Some(unknown[0]), value(COMPLETED, Some(9000), "c"), 500).await;
    assert_eq!(store.status().oldest_ms[2], Some(311));
    assert_eq!(store.status().entries, [12, 11, 4, 0]);
    store.close();
}

async fn settings_are_as_left(store: &impl Store) {
    assert_eq!(store.setting("secret").await.unwrap().as_deref(), Some(&b"changed"[..]));
    assert_eq!(store.setting("empty").await.unwrap().as_deref(), Some(&b""[..]));
    assert_eq!(store.setting("absent").await.unwrap(), None);
}

async fn settings_are_kept(backend: impl Backend) {
    let store = backend.open().await;
    assert_eq!(store.setting("secret").await.unwrap(), None);
    assert!(store.swap_setting("secret", None, b"\x00\x01binary").await.unwrap());
    assert!(store.swap_setting("empty", None, b"").await.unwrap());
    for wrong in [None, Some(&b""[..]), Some(&b"\x00\x01binary0"[..])] {
        assert!(!store.swap_setting("secret", wrong, b"never").await.unwrap(), "{wrong:?}");
    }
    assert!(!store.swap_setting("absent", Some(b""), b"never").await.unwrap());
    assert!(store.swap_setting("secret", Some(b"\x00\x01binary"), b"changed").await.unwrap());
    assert!(store.swap_setting("empty", Some(b""), b"").await.unwrap());
    settings_are_as_left(&store).await;
    store.close();
    if is_durable(&backend) {
        drop(store);
        settings_are_as_left(&backend.open().await).await;
    }
}

async fn values_of_all_sizes(backend: impl Backend) {
    let mut store = backend.open().await;
    let sizes = [0, 1, 7, 8, 9, 4000, 5000, 100_000, 1 << 20, (5 << 20) + 3];
    let mut held = Vec::new();
    for (n, size) in sizes.into_iter().enumerate() {
        for (m, expires) in [None, Some(9000)].into_iter().enumerate() {
            let bytes: Vec<u8> = (0..size).map(|i| (i * 7 + n) as u8).collect();
            let value = Value { tag: COMPLETED, expires_at_ms: expires, bytes: bytes.into() };
            let id = id((n * 2 + m) as u64);
            held.push((id, Entry { version: put(&store, id, None, value.clone(), 10).await, value }));
        }
    }
    for _ in 0..2 {
        for (id, entry) in &held {
            assert_eq!(store.get(*id).await.unwrap().as_ref(), Some(entry));
            let swap = store.compare_and_swap(*id, None, None, 11, Urgency::Claim).await.unwrap();
            assert_eq!(swap, Swap::Conflict(Some(entry.clone())));
        }
        if !is_durable(&backend) {
            break;
        }
        store.close();
        drop(store);
        store = backend.open().await;
    }
}

async fn a_closed_store_says_so(backend: impl Backend) {
    let store = backend.open().await;
    put(&store, id(1), None, value(CLAIMED, None, "x"), 10).await;
    store.close();
    let swap = store.compare_and_swap(id(2), None, Some(value(CLAIMED, None, "y")), 11, Urgency::Claim).await;
    assert!(matches!(swap, Err(StoreError::Failed { .. })), "{swap:?}");
    assert!(store.sweep(20).await.is_err());
    store.close();
}

async fn reopening_keeps_everything(backend: impl Backend) {
    let mut store = backend.open().await;
    let mut held: Vec<(RecordId, Option<Entry>)> = Vec::new();
    for n in 0..120 {
        let claim = value(CLAIMED, None, &format!("claim {n}"));
        let version = put(&store, id(n), None, claim.clone(), 1000 + n).await;
        held.push((
            id(n),
            match n % 4 {
                0 => Some(Entry { version, value: claim }),
                1 => {
                    remove(&store, id(n), version, 1500).await;
                    None
                }
                m => {
                    let tag = if m == 2 { COMPLETED } else { UNKNOWN };
                    let settled = value(tag, Some(100_000 + n), &format!("settled {n}"));
                    let version = put(&store, id(n), Some(version), settled.clone(), 2000 + n).await;
                    Some(Entry { version, value: settled })
                }
            },
        ));
    }
    let (before, unexpiring) = (store.status(), store.unexpiring().unwrap());
    for round in 0..4 {
        if round != 2 {
            store.close();
        }
        drop(store);
        store = backend.open().await;
        let status = store.status();
        assert!(!status.created);
        assert_eq!(status.entries, before.entries);
        assert_eq!(status.oldest_ms[2], before.oldest_ms[2]);
        assert_eq!(store.newest_ms(), 2119);
        for (id, entry) in &held {
            assert_eq!(store.get(*id).await.unwrap(), *entry);
        }
        let sorted = |mut list: Vec<(RecordId, Entry)>| {
            list.sort_by_key(|(id, _)| *id);
            list
        };
        assert_eq!(sorted(store.unexpiring().unwrap()), sorted(unexpiring.clone()));
    }
}

macro_rules! suite {
    ($backend:expr; $($test:ident),+) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            super::$test($backend).await;
        })+
    };
}

macro_rules! suite_for_all {
    ($backend:expr) => {
        suite!($backend;
            swaps_only_what_was_expected, versions_never_repeat, expired_entries_stay_until_swept,
            sweep_spares_a_newer_version, one_of_many_wins, a_chain_of_swaps_loses_none,
            a_dropped_future_does_not_lose_the_write, counts_and_lists_by_kind, settings_are_kept,
            values_of_all_sizes, a_closed_store_says_so, a_listing_shows_what_is_held_oldest_first,
            a_listing_shows_expired_entries_until_they_are_swept,
            what_stays_unchanged_is_listed_whatever_happens_meanwhile,
            a_listing_goes_on_where_its_place_is_gone, any_cursor_will_do);
    };
}

mod memory {
    use super::*;
    suite_for_all!(InMemory);
}

mod sled_strict {
    use super::*;
    suite_for_all!(on_disk(Engine::Sled, Durability::Strict, Tuning::default()));
    suite!(on_disk(Engine::Sled, Durability::Strict, Tuning::default()); reopening_keeps_everything, a_listing_goes_on_after_a_restart,
        a_page_of_large_records_is_short);
}

mod sled_relaxed {
    use super::*;
    suite_for_all!(on_disk(Engine::Sled, Durability::Relaxed, Tuning::default()));
    suite!(on_disk(Engine::Sled, Durability::Relaxed, Tuning::default()); reopening_keeps_everything, a_listing_goes_on_after_a_restart,
        a_page_of_large_records_is_short);
}

mod sled_small {
    use super::*;
    suite_for_all!(on_disk(Engine::Sled, Durability::Strict, small()));
    suite!(on_disk(Engine::Sled, Durability::Strict, small()); reopening_keeps_everything, a_listing_goes_on_after_a_restart,
        a_page_of_large_records_is_short);
}

mod sled_small_relaxed {
    use super::*;
    suite_for_all!(on_disk(Engine::Sled, Durability::Relaxed, small()));
    suite!(on_disk(Engine::Sled, Durability::Relaxed, small()); reopening_keeps_everything, a_listing_goes_on_after_a_restart,
        a_page_of_large_records_is_short);
}

mod fjall_strict {
    use super::*;
    suite_for_all!(on_disk(Engine::Fjall, Durability::Strict, Tuning::default()));
    suite!(on_disk(Engine::Fjall, Durability::Strict, Tuning::default()); reopening_keeps_everything, a_listing_goes_on_after_a_restart,
        a_page_of_large_records_is_short);
}

mod fjall_small {
    use super::*;
    suite_for_all!(on_disk(Engine::Fjall, Durability::Strict, small()));
    suite!(on_disk(Engine::Fjall, Durability::Strict, small()); reopening_keeps_everything, a_listing_goes_on_after_a_restart,
        a_page_of_large_records_is_short);
}

mod fjall_small_relaxed {
    use super::*;
    suite_for_all!(on_disk(Engine::Fjall, Durability::Relaxed, small()));
    suite!(on_disk(Engine::Fjall, Durability::Relaxed, small()); reopening_keeps_everything, a_listing_goes_on_after_a_restart,
        a_page_of_large_records_is_short);
}

/// The store that the configuration asks for is the one that is opened.
#[tokio::test]
async fn any_store_delegates() {
    use oncegate::store::{AnyStore, Options as StoreOptions};
    let dir = tempfile::tempdir().unwrap();
    let embedded = |engine: Engine| {
        let path = dir.path().join(format!("{engine:?}"));
        StoreOptions::Embedded(Options {
            path,
            engine,
            create: true,
            min_free_bytes: 0,
            durability: Durability::Strict,
        })
    };
    for options in [StoreOptions::Memory, embedded(Engine::Sled), embedded(Engine::Fjall)] {
        let store = AnyStore::open(&options).await.unwrap();
        let version = put(&store, id(1), None, value(CLAIMED, None, "x"), 10).await;
        assert_eq!(store.get(id(1)).await.unwrap().unwrap().version, version);
        assert_eq!(store.unexpiring().unwrap().len(), 1);
        assert_eq!(store.list(Some(CLAIMED), 0, 10).await.unwrap().entries.len(), 1);
        store.close();
    }
    for (engine, name) in [("Sled", "sled"), ("Fjall", "fjall")] {
        assert_eq!(std::fs::read_to_string(dir.path().join(engine).join("index/engine")).unwrap(), name);
    }
}
