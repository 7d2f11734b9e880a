//! What every store must do when it is listed.

use super::*;
use std::collections::{BTreeMap, HashMap};

const FAR: u64 = 1 << 40;
/// Pages of all sizes must come to the same.
const VISITS: [usize; 5] = [1, 2, 7, 64, 100_000];

/// Redis lists in the order of its hash table, and entries that share a place in it come together.
fn by_hash<S: Store>(_: &S) -> bool {
    use std::any::TypeId;
    TypeId::of::<S>() == TypeId::of::<shared::Shifted<oncegate::store::redis::Redis>>()
}

/// All pages from `after` on, one after the other.
async fn pages(store: &impl Store, tag: Option<Tag>, after: u64, visit: usize) -> Vec<Vec<(RecordId, Entry)>> {
    let (mut after, mut pages) = (after, Vec::new());
    loop {
        let page = store.list(tag, after, visit).await.unwrap();
        let together = if by_hash(store) { 8 } else { 0 };
        assert!(page.entries.len() <= visit + together, "no more than are looked at");
        pages.push(page.entries);
        match page.next {
            None => return pages,
            Some(next) => {
                assert_ne!(next, 0, "that would begin anew");
                assert_ne!(next, after, "it goes on");
                after = next;
            }
        }
        assert!(pages.len() < 100_000, "it ends");
    }
}

async fn list_all(store: &impl Store, tag: Option<Tag>, visit: usize) -> Vec<(RecordId, Entry)> {
    pages(store, tag, 0, visit).await.concat()
}

fn by_version(mut entries: Vec<(RecordId, Entry)>) -> Vec<(RecordId, Entry)> {
    entries.sort_by_key(|(_, entry)| entry.version);
    entries
}

type Held = HashMap<u64, Entry>;

fn with_tag(held: &Held, tag: Option<Tag>) -> Vec<(RecordId, Entry)> {
    let wanted = held.iter().filter(|(_, entry)| tag.is_none_or(|tag| entry.value.tag == tag));
    by_version(wanted.map(|(n, entry)| (id(*n), entry.clone())).collect())
}

async fn set(store: &impl Store, held: &mut Held, n: u64, new: Value, now_ms: u64) {
    let version = put(store, id(n), held.get(&n).map(|entry| entry.version), new.clone(), now_ms).await;
    held.insert(n, Entry { version, value: new });
}

/// Claimed, completed, unknown, replaced, removed: of each some.
async fn fill(store: &impl Store, records: u64) -> Held {
    let mut held = Held::new();
    for n in 0..records {
        set(store, &mut held, n, value(CLAIMED, None, &format!("claim {n}")), 100 + n).await;
        let text = format!("settled {n} {}", "x".repeat(n as usize % 50));
        match n % 8 {
            0 => {}
            1 => drop(remove(store, id(n), held.remove(&n).unwrap().version, 100 + n).await),
            2 | 3 => set(store, &mut held, n, value(UNKNOWN, Some(FAR + n), &text), 100 + n).await,
            _ => set(store, &mut held, n, value(COMPLETED, Some(FAR + n), &text), 100 + n).await,
        }
        if n % 16 == 2 {
            set(store, &mut held, n, value(COMPLETED, Some(FAR), "resolved"), 100 + n).await;
        }
    }
    held
}

const FILTERS: [Option<Tag>; 5] = [None, Some(CLAIMED), Some(COMPLETED), Some(UNKNOWN), Some(Tag(3))];

pub(super) async fn a_listing_shows_what_is_held_oldest_first(backend: impl Backend) {
    let store = backend.open().await;
    for tag in FILTERS {
        assert_eq!(store.list(tag, 0, 10).await.unwrap().entries, []);
        assert_eq!(list_all(&store, tag, 1).await, []);
    }
    let mut held = fill(&store, 200).await;
    // A kind that both expires and does not.
    set(&store, &mut held, 1000, value(COMPLETED, None, "never"), 500).await;
    set(&store, &mut held, 1001, value(UNKNOWN, None, "never"), 500).await;
    for tag in FILTERS {
        for visit in VISITS {
            let listed = list_all(&store, tag, visit).await;
            assert_eq!(by_version(listed.clone()), with_tag(&held, tag), "{tag:?}, {visit} at a time");
            // Those that never expire may come first.
            let expiring: Vec<_> =
                listed.iter().filter(|(_, e)| e.value.expires_at_ms.is_some() || tag.is_none()).collect();
            let sorted = by_hash(&store) || expiring.is_sorted_by_key(|(_, entry)| entry.version);
            assert!(sorted, "{tag:?}, {visit} at a time");
        }
    }
    // A page is not longer than asked for even where it could be.
    assert_eq!(store.list(Some(UNKNOWN), 0, 5).await.unwrap().entries.len(), 5);
    // Nothing to look at is no way to go on: one at least.
    assert!(store.list(None, 0, 0).await.unwrap().next.is_some());
    assert!(pages(&store, None, 0, 1).await.len() < 1000);
    store.close();
}

pub(super) async fn a_listing_shows_expired_entries_until_they_are_swept(backend: impl Backend) {
    let store = backend.open().await;
    let mut held = Held::new();
    for n in 0..300 {
        set(&store, &mut held, n, value(CLAIMED, None, "claim"), 10).await;
        let tag = if n % 3 == 0 { UNKNOWN } else { COMPLETED };
        set(&store, &mut held, n, value(tag, Some(if n % 10 == 0 { FAR } else { 1000 }), "settled"), 20).await;
    }
    for tag in FILTERS {
        assert_eq!(by_version(list_all(&store, tag, 50).await), with_tag(&held, tag));
    }
    // The sweep copies forward what lives longer, and drops the rest.
    sweep_all(&store, 1000).await;
    sweep_all(&store, 100_000).await;
    held.retain(|n, _| n % 10 == 0);
    for tag in FILTERS {
        for visit in VISITS {
            let listed = list_all(&store, tag, visit).await;
            assert_eq!(by_version(listed), with_tag(&held, tag), "{tag:?}, {visit} at a time, each once");
        }
    }
    store.close();
}

pub(super) async fn what_stays_unchanged_is_listed_whatever_happens_meanwhile(backend: impl Backend) {
    let store = Arc::new(backend.open().await);
    let held = fill(&*store, 200).await;
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    // Writers whose records expire at once, and a sweep that retires what they and the others have left behind.
    let mut tasks: Vec<_> = (0..4)
        .map(|writer| {
            let (store, stop) = (store.clone(), stop.clone());
            tokio::spawn(async move {
                let mut n = 10_000 + writer;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let claim = put(&*store, id(n), None, value(CLAIMED, None, "claim"), 1000).await;
                    let tag = if n % 2 == 0 { UNKNOWN } else { COMPLETED };
                    put(&*store, id(n), Some(claim), value(tag, Some(1000), &"x".repeat(300)), 1000).await;
                    n += 4;
                }
            })
        })
        .collect();
    let (sweeping, stopped) = (store.clone(), stop.clone());
    tasks.push(tokio::spawn(async move {
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            sweeping.sweep(2000).await.unwrap();
            tokio::task::yield_now().await;
        }
    }));
    // Pages large enough that writers do not outrun the listing: it would have no end.
    for round in 0..6 {
        for tag in FILTERS {
            let mut seen: HashMap<RecordId, Entry> = HashMap::new();
            for (id, entry) in list_all(&*store, tag, [100, 500, 5000][round % 3]).await {
                assert!(tag.is_none_or(|tag| entry.value.tag == tag));
                seen.insert(id, entry);
            }
            for (id, entry) in with_tag(&held, tag) {
                assert_eq!(seen.get(&id), Some(&entry), "{tag:?}, round {round}");
            }
        }
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for task in tasks {
        task.await.unwrap();
    }
    store.close();
}

/// A part of a listing, then so much traffic that the place of the cursor is gone (where there is such a place), then the rest.
pub(super) async fn a_listing_goes_on_where_its_place_is_gone(backend: impl Backend) {
    let store = backend.open().await;
    let held = fill(&store, 100).await;
    // Of each kind, what has been listed before each place.
    let mut parts = Vec::new();
    for tag in FILTERS {
        let (mut listed, mut after) = (Vec::new(), 0);
        while let page = store.list(tag, after, 7).await.unwrap()
            && let Some(next) = page.next
        {
            listed.extend(page.entries);
            parts.push((tag, listed.clone(), next));
            after = next;
        }
    }
    assert!(parts.len() >= 20);
    let mut now = 1000;
    for n in 0..2000 {
        now += 10;
        let claim = put(&store, id(10_000 + n), None, value(CLAIMED, None, "claim"), now).await;
        put(&store, id(10_000 + n), Some(claim), value(COMPLETED, Some(now + 100), &"x".repeat(200)), now).await;
        if n % 50 == 0 {
            sweep_all(&store, now).await;
        }
    }
    for (tag, listed, next) in parts {
        let mut seen: BTreeMap<RecordId, Entry> = listed.into_iter().collect();
        seen.extend(pages(&store, tag, next, 64).await.concat());
        for (id, entry) in with_tag(&held, tag) {
            assert_eq!(seen.get(&id), Some(&entry), "{tag:?}");
        }
    }
    store.close();
}

pub(super) async fn any_cursor_will_do(backend: impl Backend) {
    let store = backend.open().await;
    let held = fill(&store, 60).await;
    let mut random = 0x1234_5678_9abc_def0_u64;
    let cursors = (0..300_u64).flat_map(|n| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        [n, n * 8 + 1, u64::MAX - n, random, random >> (n % 60), (1 << 32) + n * 8 + 1, (1 << 32) + n * 8 + 2]
    });
    for cursor in cursors.chain([1 << 63]) {
        for tag in FILTERS {
            for (listed, entry) in store.list(tag, cursor, 200).await.unwrap().entries {
                let n = u64::from_be_bytes(listed.0[8..].try_into().unwrap());
                assert_eq!(held.get(&n), Some(&entry), "nothing is made up");
                assert!(tag.is_none_or(|tag| entry.value.tag == tag));
            }
        }
    }
    assert_eq!(store.status().health, Health::Ok);
    store.close();
}

/// Where a restart keeps records, it keeps listings: cursors too.
pub(super) async fn a_listing_goes_on_after_a_restart(backend: impl Backend) {
    let store = backend.open().await;
    let held = fill(&store, 200).await;
    let mut halves = Vec::new();
    for tag in FILTERS {
        halves.push((tag, store.list(tag, 0, 30).await.unwrap()));
    }
    store.close();
    drop(store);
    let store = backend.open().await;
    for (tag, half) in halves {
        let mut listed = half.entries;
        if let Some(next) = half.next {
            listed.extend(pages(&store, tag, next, 30).await.concat());
        }
        assert_eq!(by_version(listed), with_tag(&held, tag), "{tag:?}");
        assert_eq!(by_version(list_all(&store, tag, 30).await), with_tag(&held, tag), "{tag:?}");
    }
    store.close();
}

/// A page must not take gigabytes of memory because records are large.
pub(super) async fn a_page_of_large_records_is_short(backend: impl Backend) {
    let store = backend.open().await;
    let mut held = Held::new();
    for n in 0..24 {
        let tag = [CLAIMED, COMPLETED, UNKNOWN][n as usize % 3];
        let bytes = vec![n as u8; 1 << 20].into();
        let expires_at_ms = (tag != CLAIMED).then_some(FAR);
        set(&store, &mut held, n, Value { tag, expires_at_ms, bytes }, 10).await;
    }
    for tag in FILTERS {
        let pages = pages(&store, tag, 0, 1000).await;
        let largest = pages.iter().map(|page| page.iter().map(|(_, e)| e.value.bytes.len()).sum::<usize>()).max();
        assert!(largest.unwrap() <= 5 << 20, "{tag:?}: {largest:?}");
        assert_eq!(by_version(pages.concat()), with_tag(&held, tag), "{tag:?}");
    }
    store.close();
}

/// How long the first page takes while others write. Prints it; to be run by hand, in release mode:
/// `cargo test --release --test store_conformance -- --ignored --nocapture first_pages`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn first_pages_of_a_large_store_while_others_write() {
    let records: u64 = std::env::var("RECORDS").map_or(200_000, |n| n.parse().unwrap());
    for engine in [Engine::Sled, Engine::Fjall] {
        let backend = on_disk(engine, Durability::Relaxed, Tuning::default());
        let store = Arc::new(backend.open().await);
        let write = |store: Arc<Embedded>, n: u64| async move {
            let claim = put(&*store, id(n), None, value(CLAIMED, None, "claim"), 1000).await;
            let tag = if n.is_multiple_of(1000) { UNKNOWN } else { COMPLETED };
            put(&*store, id(n), Some(claim), value(tag, Some(FAR), &"x".repeat(600)), 1000).await;
        };
        for piece in (0..records).step_by(1000) {
            let tasks: Vec<_> = (piece..piece + 1000).map(|n| tokio::spawn(write(store.clone(), n))).collect();
            for task in tasks {
                task.await.unwrap();
            }
        }
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let written = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let writers: Vec<_> = (0..64)
            .map(|writer| {
                let (store, stop, written) = (store.clone(), stop.clone(), written.clone());
                tokio::spawn(async move {
                    let mut n = 1_000_000_000 + writer;
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        write(store.clone(), n).await;
                        written.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        n += 64;
                    }
                })
            })
            .collect();
        for (what, tag) in
            [("all", None), ("completed", Some(COMPLETED)), ("unknown", Some(UNKNOWN)), ("claimed", Some(CLAIMED))]
        {
            for visit in [100, 1000, 10_000] {
                let (mut times, mut len) = (Vec::new(), 0);
                let (since, before) = (std::time::Instant::now(), written.load(std::sync::atomic::Ordering::Relaxed));
                for _ in 0..9 {
                    let begin = std::time::Instant::now();
                    len = store.list(tag, 0, visit).await.unwrap().entries.len();
                    times.push(begin.elapsed());
                }
                times.sort();
                let pairs = written.load(std::sync::atomic::Ordering::Relaxed) - before;
                let rate = pairs as f64 / since.elapsed().as_secs_f64();
                eprintln!(
                    "{engine:?}, {records} records: first page of {what}, {visit} looked at: {len} entries, median {:?}, \
                     longest {:?}; others meanwhile {rate:.0} pairs/s",
                    times[4], times[8]
                );
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        for writer in writers {
            writer.await.unwrap();
        }
        let begin = std::time::Instant::now();
        let listed = list_all(&*store, None, 10_000).await.len();
        eprintln!("{engine:?}: all {listed} entries in {:?}, in pages of 10000 looked at", begin.elapsed());
        assert!(listed as u64 >= records);
        store.close();
    }
}
