//! The suite, with `ENGINE` of the module above.

use super::ENGINE;
use bytes::Bytes;
use oncegate::store::embedded::{Durability, Embedded, Engine, OpenError, Options, Tuning};
use oncegate::store::{Entry, Health, RecordId, Store, StoreError, Swap, Tag, Urgency, Value, Version};
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const CLAIMED: Tag = Tag(0);
const COMPLETED: Tag = Tag(1);
const UNKNOWN: Tag = Tag(2);
const FAR: u64 = 1 << 40;

fn options(path: &Path) -> Options {
    Options { path: path.to_owned(), engine: ENGINE, create: true, min_free_bytes: 0, durability: Durability::Strict }
}

/// So small that a few entries fill a segment and a bulk.
fn small() -> Tuning {
    Tuning {
        segment_bytes_min: 4096,
        segment_bytes_max: 16384,
        index_bulk: 16,
        memtable_bytes: 64 << 10,
        replay_bytes: 16384,
        verify_first_bytes: u64::MAX,
        survey_first_max: u64::MAX,
        survey_threads: 2,
    }
}

fn open(path: &Path) -> Embedded {
    Embedded::open_tuned(&options(path), small()).unwrap()
}

/// As a large store is opened: it serves before its log has been verified, and its index walked through, by so many threads.
fn at_once(survey_threads: usize) -> Tuning {
    Tuning { verify_first_bytes: 0, survey_first_max: 0, survey_threads, ..small() }
}

fn open_at_once(path: &Path, survey_threads: usize) -> Embedded {
    Embedded::open_tuned(&options(path), at_once(survey_threads)).unwrap()
}

fn refused(path: &Path) -> OpenError {
    match Embedded::open_tuned(&options(path), small()) {
        Ok(_) => panic!("it was opened"),
        Err(error) => error,
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
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

async fn put(store: &Embedded, n: u64, expected: Option<Version>, new: Value, now_ms: u64) -> Version {
    match store.compare_and_swap(id(n), expected, Some(new), now_ms, Urgency::Claim).await.unwrap() {
        Swap::Done(version) => version,
        Swap::Conflict(found) => panic!("conflict with {found:?}"),
    }
}

/// Claims and completes.
async fn pair(store: &Embedded, n: u64, expires_at_ms: u64, now_ms: u64) -> Entry {
    let claim = put(store, n, None, value(CLAIMED, None, &format!("claim {n}")), now_ms).await;
    let settled = value(COMPLETED, Some(expires_at_ms), &format!("the response of {n} {}", "x".repeat(200)));
    Entry { version: put(store, n, Some(claim), settled.clone(), now_ms).await, value: settled }
}

async fn sweep_all(store: &Embedded, now_ms: u64) {
    while store.sweep(now_ms).await.unwrap() < Duration::from_millis(500) {}
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        let to = to.join(file.file_name());
        if file.path().is_dir() {
            copy_dir(&file.path(), &to);
        } else if let Ok(from) = std::fs::File::open(file.path()) {
            copy_file(&from, &to);
        }
        // Else it has gone meanwhile: the store may be in use.
    }
}

/// With its holes.
fn copy_file(from: &std::fs::File, to: &Path) {
    use rustix::fs::{SeekFrom, seek};
    let to = std::fs::File::create(to).unwrap();
    let mut at = 0;
    while let Ok(data) = seek(from, SeekFrom::Data(at)) {
        at = seek(from, SeekFrom::Hole(data)).unwrap();
        let mut bytes = vec![0; (at - data) as usize];
        let len = from.read_at(&mut bytes, data).unwrap();
        to.write_all_at(&bytes[..len], data).unwrap();
    }
    to.set_len(from.metadata().unwrap().len()).unwrap();
}

/// All files below a directory, in order.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for file in std::fs::read_dir(dir).unwrap() {
        let path = file.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Segments in order; the last one with entries is the active one, one more may be the spare.
fn segments(path: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(path.join("log"))
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|file| file.extension().is_some_and(|extension| extension == "seg"))
        .collect();
    files.sort();
    files
}

fn used_segments(path: &Path) -> Vec<PathBuf> {
    // The spare may be in the making: empty as yet.
    let used = |file: &PathBuf| std::fs::read(file).unwrap().iter().skip(64).any(|&byte| byte != 0);
    segments(path).into_iter().filter(used).collect()
}

fn flip(file: &Path, offset: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

/// A store of several segments and bulks, closed, and what it holds.
fn filled(path: &Path, records: u64) -> BTreeMap<u64, Entry> {
    runtime().block_on(async {
        let store = open(path);
        let mut held = BTreeMap::new();
        for n in 0..records {
            held.insert(n, pair(&store, n, FAR, 1000 + n).await);
        }
        for n in records..records + 3 {
            let claim = value(CLAIMED, None, "still claimed");
            held.insert(n, Entry { version: put(&store, n, None, claim.clone(), 2000).await, value: claim });
        }
        store.close();
        held
    })
}

fn assert_holds(store: &Embedded, held: &BTreeMap<u64, Entry>) {
    runtime().block_on(async {
        for (n, entry) in held {
            assert_eq!(store.get(id(*n)).await.unwrap().as_ref(), Some(entry), "record {n}");
        }
    });
    // A large index is counted while the store serves.
    wait_until("all are counted", || store.status().entries.iter().sum::<u64>() == held.len() as u64);
}

/// All pages of a listing.
async fn list_all(store: &Embedded, tag: Option<Tag>, visit: usize) -> Vec<(RecordId, Entry)> {
    let (mut after, mut listed) = (0, Vec::new());
    loop {
        let page = store.list(tag, after, visit).await.unwrap();
        assert!(page.entries.len() <= visit);
        listed.extend(page.entries);
        match page.next {
            None => return listed,
            Some(next) => after = next,
        }
    }
}

/// A listing of each kind shows just what is held, each entry once, in pages of all sizes.
async fn assert_listed(store: &Embedded, held: &BTreeMap<u64, Entry>) {
    for tag in [None, Some(CLAIMED), Some(COMPLETED), Some(UNKNOWN)] {
        let wanted = held.iter().filter(|(_, entry)| tag.is_none_or(|tag| entry.value.tag == tag));
        let mut wanted: Vec<_> = wanted.map(|(n, entry)| (id(*n), entry.clone())).collect();
        wanted.sort_by_key(|(_, entry)| entry.version);
        for visit in [3, 1000] {
            let mut listed = list_all(store, tag, visit).await;
            listed.sort_by_key(|(_, entry)| entry.version);
            assert_eq!(listed, wanted, "{tag:?}, {visit} at a time");
        }
    }
}

#[test]
fn a_torn_tail_is_cut_off_at_every_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (before, after, torn) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("torn"));
    let mut held = BTreeMap::new();
    let rt = runtime();
    rt.block_on(async {
        let store = open(&before);
        for n in 0..3 {
            held.insert(n, pair(&store, n, FAR, 1000).await);
        }
        store.close();
        copy_dir(&before, &after);
        let store = open(&after);
        put(&store, 3, None, value(CLAIMED, None, "the last"), 1001).await;
        store.close();
    });
    let name = PathBuf::from("log").join(used_segments(&before).pop().unwrap().file_name().unwrap());
    let (old, new) = (std::fs::read(before.join(&name)).unwrap(), std::fs::read(after.join(&name)).unwrap());
    let start = (0..old.len()).find(|&at| old[at] != new[at]).unwrap();
    let end = (0..old.len()).rfind(|&at| old[at] != new[at]).unwrap() + 1;
    assert!(end - start > 100 && end - start < 300, "one frame: {start}..{end}");
    for cut in start..=end {
        for truncate in [false, true] {
            let _ = std::fs::remove_dir_all(&torn);
            copy_dir(&after, &torn);
            let mut bytes = new.clone();
            if truncate {
                bytes.truncate(cut)
            } else {
                bytes[cut..].fill(0)
            }
            // Bytes that are zero anyway may be missing; where the file ends early, the frame's padding must be there.
            let whole = cut == end && !truncate;
            std::fs::write(torn.join(&name), &bytes).unwrap();
            let store = open(&torn);
            rt.block_on(async {
                let last = store.get(id(3)).await.unwrap();
                if whole {
                    assert!(last.is_some());
                } else if last.is_some() {
                    assert_eq!(&bytes[..], &new[..bytes.len()], "cut at {cut}");
                } else {
                    // What was cut off may be written again, and lasts.
                    put(&store, 3, None, value(CLAIMED, None, "anew"), 1002).await;
                }
            });
            drop(store);
            let store = open(&torn);
            rt.block_on(async {
                assert!(store.get(id(3)).await.unwrap().is_some());
                for (n, entry) in &held {
                    assert_eq!(store.get(id(*n)).await.unwrap().as_ref(), Some(entry));
                }
            });
        }
    }
}

#[test]
fn pages_of_the_last_frame_may_be_missing_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    let (path, torn) = (dir.path().join("a"), dir.path().join("torn"));
    let rt = runtime();
    let tuning = Tuning { segment_bytes_min: 1 << 20, replay_bytes: 1 << 30, ..small() };
    let held = rt.block_on(async {
        let store = Embedded::open_tuned(&options(&path), tuning).unwrap();
        let held = pair(&store, 0, FAR, 1000).await;
        put(&store, 1, None, value(CLAIMED, None, &"y".repeat(40_000)), 1001).await;
        held
    });
    let file = used_segments(&path).pop().unwrap();
    let name = file.file_name().unwrap();
    let bytes = std::fs::read(&file).unwrap();
    // All but the first page belong to the last frame; the first one is shared.
    for missing in 1..40_000 / 4096 {
        let _ = std::fs::remove_dir_all(&torn);
        copy_dir(&path, &torn);
        let mut bytes = bytes.clone();
        bytes[missing * 4096..(missing + 1) * 4096].fill(0);
        std::fs::write(torn.join("log").join(name), &bytes).unwrap();
        let store = Embedded::open_tuned(&options(&torn), tuning).unwrap();
        rt.block_on(async {
            assert_eq!(store.get(id(1)).await.unwrap(), None);
            assert_eq!(store.get(id(0)).await.unwrap().as_ref(), Some(&held));
            put(&store, 1, None, value(CLAIMED, None, "anew"), 1002).await;
        });
        drop(store);
        drop(Embedded::open_tuned(&options(&torn), tuning).unwrap());
    }
}

#[test]
fn garbage_behind_the_tail_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let held = filled(&path, 3);
    let file = used_segments(&path).pop().unwrap();
    let bytes = std::fs::read(&file).unwrap();
    let end = bytes.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    for (distance, len) in [(8, 1), (8, 100), (64, 1), (500, 300)] {
        let mut bytes = bytes.clone();
        bytes.resize(bytes.len().max(end + distance + len), 0);
        bytes[end + distance..end + distance + len].fill(0xa5);
        std::fs::write(&file, &bytes).unwrap();
        assert_holds(&open(&path), &held);
        let cleaned = std::fs::read(&file).unwrap();
        assert!(cleaned[end..].iter().all(|&byte| byte == 0), "it was cut off durably");
    }
}

#[test]
fn damage_in_a_sealed_segment_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    filled(&path, 60);
    let files = used_segments(&path);
    assert!(files.len() > 3);
    for file in &files[..files.len() - 1] {
        let len = std::fs::metadata(file).unwrap().len();
        for offset in [3, 40, 64, 64 + 20, 64 + 64 + 3, len / 2, len - 64, len - 1] {
            flip(file, offset);
            match refused(&path) {
                OpenError::Damaged { path: named, offset: named_offset, .. } => {
                    assert_eq!(&named, file);
                    assert!(named_offset <= offset, "{named_offset} {offset}");
                }
                // A version in the header that nobody knows.
                OpenError::Format { path: named, .. } => assert_eq!(&named, file),
                other => panic!("{other}"),
            }
            flip(file, offset);
        }
    }
    let message = {
        flip(&files[1], 200);
        refused(&path).to_string()
    };
    assert!(message.contains(files[1].to_str().unwrap()) && message.contains("offset"), "{message}");
    assert!(message.contains("executed again"), "it says what is at stake: {message}");
    flip(&files[1], 200);
    drop(open(&path));
}

#[test]
fn damage_before_valid_frames_of_the_last_segment_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let tuning = Tuning { segment_bytes_min: 1 << 20, ..small() };
    let held = runtime().block_on(async {
        let store = Embedded::open_tuned(&options(&path), tuning).unwrap();
        let mut held = BTreeMap::new();
        for n in 0..10 {
            held.insert(n, pair(&store, n, FAR, 1000).await);
        }
        held
    });
    let file = used_segments(&path).pop().unwrap();
    let bytes = std::fs::read(&file).unwrap();
    let end = bytes.iter().rposition(|&byte| byte != 0).unwrap() as u64;
    for offset in (64..end - 500).step_by(97) {
        flip(&file, offset);
        if std::fs::read(&file).unwrap() != bytes {
            match Embedded::open_tuned(&options(&path), tuning).map(drop) {
                Err(OpenError::Damaged { path: named, offset: named_offset, .. }) => {
                    assert_eq!(named, file);
                    assert!(named_offset <= offset);
                }
                other => panic!("at {offset}: {other:?}"),
            }
        }
        flip(&file, offset);
    }
    // A page of zeros in the middle is damage, too, not the end.
    let mut hole = bytes.clone();
    hole[1024..2048].fill(0);
    std::fs::write(&file, &hole).unwrap();
    assert!(matches!(Embedded::open_tuned(&options(&path), tuning), Err(OpenError::Damaged { .. })));
    std::fs::write(&file, &bytes).unwrap();
    assert_holds(&Embedded::open_tuned(&options(&path), tuning).unwrap(), &held);
}

#[test]
fn a_relaxed_log_with_a_hole_opens_up_to_the_hole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let tuning = Tuning { segment_bytes_min: 1 << 20, ..small() };
    let options = Options { durability: Durability::Relaxed, ..options(&path) };
    let rt = runtime();
    let first = rt.block_on(async {
        let store = Embedded::open_tuned(&options, tuning).unwrap();
        let first = pair(&store, 0, FAR, 1000).await;
        for n in 1..5 {
            pair(&store, n, FAR, 1000).await;
        }
        first
    });
    let file = used_segments(&path).pop().unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[1024..1536].fill(0);
    std::fs::write(&file, &bytes).unwrap();
    for _ in 0..2 {
        let store = Embedded::open_tuned(&options, tuning).unwrap();
        assert_eq!(rt.block_on(store.get(id(0))).unwrap().as_ref(), Some(&first));
        assert_eq!(rt.block_on(store.get(id(4))).unwrap(), None);
    }
}

#[test]
fn a_missing_segment_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let held = filled(&path, 60);
    let (all, used) = (segments(&path), used_segments(&path));
    assert!(used.len() > 3);
    let aside = dir.path().join("aside");
    let last = used.len() - 1;
    for missing in [0, 1, used.len() / 2, last - 1] {
        std::fs::rename(&used[missing], &aside).unwrap();
        match refused(&path) {
            OpenError::SegmentMissing { path: named, .. } => assert_eq!(named, used[missing]),
            other => panic!("{other}"),
        }
        std::fs::rename(&aside, &used[missing]).unwrap();
    }
    // The last one, with and without the spare one behind it.
    std::fs::rename(&used[last], &aside).unwrap();
    assert!(matches!(refused(&path), OpenError::SegmentMissing { path: named, .. } if named == used[last]));
    let spare = dir.path().join("spare");
    if let Some(file) = all.get(used.len()) {
        std::fs::rename(file, &spare).unwrap();
        assert!(matches!(refused(&path), OpenError::SegmentMissing { path: named, .. } if named == used[last]));
        // Emptied is as bad as missing.
        std::fs::write(&used[last], b"").unwrap();
        assert!(matches!(refused(&path), OpenError::SegmentMissing { .. } | OpenError::Damaged { .. }));
        std::fs::rename(&spare, file).unwrap();
    }
    std::fs::rename(&aside, &used[last]).unwrap();
    // The spare one may be missing, or half created.
    if let Some(file) = all.get(used.len()) {
        std::fs::write(file, b"").unwrap();
        assert_holds(&open(&path), &held);
        std::fs::write(file, vec![0; 5000]).unwrap();
        assert_holds(&open(&path), &held);
        std::fs::remove_file(file).unwrap();
    }
    std::fs::write(path.join("log").join(format!("{:016x}.seg.tmp", 5)), b"of no interest").unwrap();
    assert_holds(&open(&path), &held);
    std::fs::remove_file(path.join("log/head")).unwrap();
    assert!(matches!(refused(&path), OpenError::SegmentMissing { .. }));
}

#[test]
fn a_segment_of_another_store_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (dir.path().join("one"), dir.path().join("other"));
    filled(&one, 60);
    filled(&other, 60);
    let (one_files, other_files) = (used_segments(&one), used_segments(&other));
    std::fs::copy(&other_files[1], &one_files[1]).unwrap();
    assert!(matches!(refused(&one), OpenError::Damaged { path, offset: 0, .. } if path == one_files[1]));
}

#[test]
fn the_index_is_rebuilt_whatever_has_become_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let index = path.join("index");
    filled(&path, 100);
    let stale = dir.path().join("stale");
    copy_dir(&index, &stale);
    // More records, and another one's index.
    let mut held = runtime().block_on(async {
        let store = open(&path);
        for n in 200..400 {
            pair(&store, n, FAR, 3000).await;
        }
        let mut held = BTreeMap::new();
        for n in (0..103).chain(200..400) {
            held.insert(n, store.get(id(n)).await.unwrap().unwrap());
        }
        held
    });
    let restore = |from: &Path| {
        std::fs::remove_dir_all(&index).unwrap();
        copy_dir(from, &index);
    };
    let good = dir.path().join("good");
    copy_dir(&index, &good);

    std::fs::remove_dir_all(&index).unwrap();
    assert_holds(&open(&path), &held);

    std::fs::remove_dir_all(&index).unwrap();
    std::fs::create_dir(&index).unwrap();
    assert_holds(&open(&path), &held);

    restore(&stale);
    assert_holds(&open(&path), &held);

    // Each of its files missing, emptied, or of another content.
    for name in files(&good).iter().map(|file| file.strip_prefix(&good).unwrap()) {
        for content in [None, Some(&b""[..]), Some(&b"no such thing"[..])] {
            restore(&good);
            match content {
                None => std::fs::remove_file(index.join(name)).unwrap(),
                Some(content) => std::fs::write(index.join(name), content).unwrap(),
            }
            assert_holds(&open(&path), &held);
        }
    }

    let other = dir.path().join("other");
    filled(&other, 100);
    restore(&other.join("index"));
    assert_holds(&open(&path), &held);

    // Damage of all sizes, wherever it strikes.
    let mut random = 0x1234_5678_9abc_def0_u64;
    for round in 0..24 {
        restore(&good);
        // Where something stands: files may be created longer than what is in them.
        let struck: Vec<_> = files(&index)
            .into_iter()
            .filter_map(|file| {
                Some((std::fs::read(&file).unwrap().iter().rposition(|&byte| byte != 0)? as u64 + 1, file))
            })
            .filter(|(_, file)| ENGINE == Engine::Fjall || file.ends_with("db"))
            .collect();
        let (len, file) = &struck[round % struck.len()];
        let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
        let size = [1, 16, 512, 4096, 65536, 1 << 20][round % 6].min(*len);
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let offset = (random >> 20) % (len - size + 1);
        let noise: Vec<u8> = (0..size).map(|i| (random >> (i % 50)) as u8 ^ i as u8).collect();
        file.write_all_at(&noise, offset).unwrap();
        let mut store = open(&path);
        assert_holds(&store, &held);
        // And it goes on working: through bulks, and after one more start.
        let first = 1000 + round as u64 * 100;
        if let Err(doubtful) = runtime().block_on(go_on(&store, first, &mut held)) {
            // Damage where no look-up and no walk comes by, but fjall's merging does. It is gone with the next start.
            assert_eq!(ENGINE, Engine::Fjall);
            assert!(index.join("condemned").exists());
            drop(store);
            store = open(&path);
            match runtime().block_on(store.get(id(doubtful))).unwrap() {
                Some(entry) => drop(held.insert(doubtful, entry)),
                None => drop(held.remove(&doubtful)),
            }
            assert_holds(&store, &held);
            assert_eq!(runtime().block_on(go_on(&store, first + 50, &mut held)), Ok(()));
        }
        drop(store);
        assert_holds(&open(&path), &held);
        std::fs::remove_dir_all(&good).unwrap();
        copy_dir(&index, &good);
    }
}

/// Writes what makes bulks. If the store fails: the key of which nobody knows what has become.
async fn go_on(store: &Embedded, first: u64, held: &mut BTreeMap<u64, Entry>) -> Result<(), u64> {
    for n in first..first + 40 {
        let mut expected = None;
        for new in [value(CLAIMED, None, "claim"), value(COMPLETED, Some(FAR), "settled")] {
            match store.compare_and_swap(id(n), expected, Some(new.clone()), 4000, Urgency::Claim).await {
                Ok(Swap::Done(version)) => held.insert(n, Entry { version, value: new }),
                Err(StoreError::Failed { .. }) => return Err(n),
                other => panic!("{other:?}"),
            };
            expected = held.get(&n).map(|entry| entry.version);
        }
    }
    Ok(())
}

/// Waits until sled's threads have let go of its file, which they do some time after it was dropped: to whoever opens it
/// before, it is an index that cannot be used, and is made anew.
fn let_go(path: &Path) {
    if let Ok(file) = std::fs::File::open(path.join("index/db")) {
        file.lock().unwrap();
    }
}

/// Takes one entry out of the index, behind its back.
fn lose(path: &Path, n: u64) {
    let index = path.join("index");
    let_go(path);
    match ENGINE {
        Engine::Sled => {
            let db = sled::open(index).unwrap();
            assert!(db.open_tree("entries").unwrap().remove(id(n).0).unwrap().is_some());
            db.flush().unwrap();
        }
        Engine::Fjall => {
            let db = fjall::Database::builder(index).open().unwrap();
            let entries = db.keyspace("entries", fjall::KeyspaceCreateOptions::default).unwrap();
            assert!(entries.contains_key(id(n).0).unwrap());
            entries.remove(id(n).0).unwrap();
            db.persist(fjall::PersistMode::SyncAll).unwrap();
        }
    }
    let_go(path);
}

#[test]
fn another_engine_takes_over_with_all_records() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let mut held = filled(&path, 200);
    let engines = [if ENGINE == Engine::Sled { Engine::Fjall } else { Engine::Sled }, ENGINE];
    let made_by = || std::fs::read_to_string(path.join("index/engine")).unwrap();
    for round in 0..6_u64 {
        let engine = engines[round as usize % 2];
        let options = Options { engine, ..options(&path) };
        let store = Embedded::open_tuned(&options, small()).unwrap();
        assert_eq!(made_by(), format!("{engine:?}").to_lowercase());
        assert_holds(&store, &held);
        runtime().block_on(async {
            // What this engine learns, the other one's index would not know.
            for n in 0..50 {
                let n = 1000 + round * 50 + n;
                held.insert(n, pair(&store, n, FAR, 5000).await);
            }
            let old = held.remove(&round).unwrap().version;
            store.compare_and_swap(id(round), Some(old), None, 5000, Urgency::Settle).await.unwrap();
        });
        assert_holds(&store, &held);
        drop(store);
        // Nothing of the other one is left, and the same one is not made anew.
        let strange = if engine == Engine::Sled { "keyspaces" } else { "db" };
        assert!(!path.join("index").join(strange).exists());
        let mark = path.join("index/mark");
        std::fs::write(&mark, b"").unwrap();
        let_go(&path);
        let store = Embedded::open_tuned(&options, small()).unwrap();
        assert!(mark.exists(), "it was rebuilt for nothing");
        assert_holds(&store, &held);
    }
}

#[test]
fn an_entry_lost_from_the_index_is_never_taken_for_absent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let held = filled(&path, 300);
    let runtime = runtime();
    // Before the store is open, all of the index is compared.
    lose(&path, 7);
    assert_holds(&open(&path), &held);

    // While it serves, whoever meets the gap compares first.
    let failed = |error: StoreError| assert!(matches!(error, StoreError::Failed { .. }), "{error}");
    for round in 0..3 {
        lose(&path, 7);
        // Without threads nobody walks but who meets an absence.
        let store = open_at_once(&path, if round < 2 { 0 } else { 2 });
        match round {
            0 => failed(runtime.block_on(store.get(id(7))).unwrap_err()),
            1 => {
                let claim = value(CLAIMED, None, "again");
                let swap = store.compare_and_swap(id(7), None, Some(claim), 5000, Urgency::Claim);
                failed(runtime.block_on(swap).unwrap_err());
            }
            // Nobody asks: the walk through the whole index finds it.
            _ => failed(runtime.block_on(async {
                loop {
                    if let Err(error) = store.sweep(0).await {
                        break error;
                    }
                }
            })),
        }
        assert_eq!(store.status().health, Health::Failed);
        drop(store);
        // It is not to be trusted again, small or large.
        assert_holds(&open_at_once(&path, 2), &held);
    }
}

/// What stands in the index under a record; if `put` is given, that stands there then, behind its back.
fn in_index(path: &Path, n: u64, put: Option<&[u8]>) -> Vec<u8> {
    let index = path.join("index");
    let_go(path);
    let old = match ENGINE {
        Engine::Sled => {
            let db = sled::open(index).unwrap();
            let entries = db.open_tree("entries").unwrap();
            let old = entries.get(id(n).0).unwrap().unwrap().to_vec();
            if let Some(put) = put {
                entries.insert(id(n).0, put).unwrap();
                db.flush().unwrap();
            }
            old
        }
        Engine::Fjall => {
            let db = fjall::Database::builder(index).open().unwrap();
            let entries = db.keyspace("entries", fjall::KeyspaceCreateOptions::default).unwrap();
            let old = entries.get(id(n).0).unwrap().unwrap().to_vec();
            if let Some(put) = put {
                entries.insert(id(n).0, put).unwrap();
                db.persist(fjall::PersistMode::SyncAll).unwrap();
            }
            old
        }
    };
    let_go(path);
    old
}

#[test]
fn an_older_entry_in_the_index_is_never_believed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let runtime = runtime();
    // Without a claim, which would have all that follows it replayed from the log.
    let mut held = runtime.block_on(async {
        let store = open(&path);
        let mut held = BTreeMap::new();
        for n in 0..300 {
            held.insert(n, pair(&store, n, FAR, 1000 + n).await);
        }
        store.close();
        held
    });
    let older = in_index(&path, 7, None);
    let old = held[&7].version;
    runtime.block_on(async {
        let store = open(&path);
        let newer = value(UNKNOWN, Some(FAR), "newer");
        held.insert(7, Entry { version: put(&store, 7, Some(old), newer.clone(), 3000).await, value: newer });
        // So that the index hears of it.
        for n in 1000..1200 {
            held.insert(n, pair(&store, n, FAR, 3000).await);
        }
        store.close();
    });
    for round in 0..4 {
        let newer = in_index(&path, 7, Some(&older));
        assert_ne!(newer, older, "the index had heard of it");
        if round == 0 {
            // Before the store is open, all of the index is compared.
            assert_holds(&open(&path), &held);
            continue;
        }
        let store = open_at_once(&path, 0);
        let claim = value(CLAIMED, None, "again");
        let error = match round {
            1 => runtime.block_on(store.get(id(7))).unwrap_err(),
            2 => runtime
                .block_on(store.compare_and_swap(id(7), Some(old), Some(claim), 5000, Urgency::Settle))
                .expect_err("it is not the version that stands there"),
            _ => runtime.block_on(store.compare_and_swap(id(7), None, Some(claim), 5000, Urgency::Claim)).unwrap_err(),
        };
        assert!(matches!(error, StoreError::Failed { .. }), "{error}");
        drop(store);
        assert_holds(&open_at_once(&path, 2), &held);
    }
}

#[test]
fn an_older_copy_of_the_index_is_brought_up_to_date_or_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (path, copy) = (dir.path().join("data"), dir.path().join("copy"));
    let runtime = runtime();
    let mut held: BTreeMap<u64, (Entry, u64)> = BTreeMap::new();
    let mut now = 1000;
    let mut oldest_segments = Vec::new();
    for round in 0..8_u64 {
        let store = open(&path);
        runtime.block_on(async {
            for n in round * 60..round * 60 + 60 {
                // Some are replaced in a later round, some removed, some stay claimed; most expire after two rounds.
                let expires_at_ms = if n % 6 == 0 { FAR } else { now + 130 };
                held.insert(n, (pair(&store, n, expires_at_ms, now).await, expires_at_ms));
                now += 1;
                if n % 6 == 0 && n >= 120 {
                    let (old, _) = held.remove(&(n - 120)).unwrap();
                    if n % 12 == 0 {
                        let newer = value(UNKNOWN, Some(FAR), &format!("replaced in round {round}"));
                        let version = put(&store, n - 120, Some(old.version), newer.clone(), now).await;
                        held.insert(n - 120, (Entry { version, value: newer }, FAR));
                    } else {
                        let none = store.compare_and_swap(id(n - 120), Some(old.version), None, now, Urgency::Settle);
                        assert!(matches!(none.await.unwrap(), Swap::Done(_)));
                    }
                }
            }
            held.retain(|_, (_, expires_at_ms)| *expires_at_ms > now);
            sweep_all(&store, now).await;
        });
        drop(store);
        let_go(&path);
        oldest_segments.push(segments(&path)[0].clone());
        copy_dir(&path.join("index"), &dir.path().join(format!("index-{round}")));
    }
    assert!(oldest_segments.last() > oldest_segments.get(2), "segments have been retired since: {oldest_segments:?}");
    let expected: BTreeMap<u64, Entry> = held.iter().map(|(n, (entry, _))| (*n, entry.clone())).collect();
    for round in 0..8 {
        for tuning in [small(), at_once(0), at_once(2)] {
            let _ = std::fs::remove_dir_all(&copy);
            copy_dir(&path, &copy);
            std::fs::remove_dir_all(copy.join("index")).unwrap();
            copy_dir(&dir.path().join(format!("index-{round}")), &copy.join("index"));
            let store = Embedded::open_tuned(&options(&copy), tuning).unwrap();
            runtime.block_on(async {
                for n in 0..480 {
                    let found = store.get(id(n)).await.unwrap();
                    match expected.get(&n) {
                        Some(entry) => assert_eq!(found.as_ref(), Some(entry), "record {n}, index of round {round}"),
                        // What has expired may come back, to be dropped again.
                        None => assert!(
                            found.is_none_or(|found| found.value.expires_at_ms.is_some_and(|at| at <= now)),
                            "record {n}, index of round {round}"
                        ),
                    }
                }
            });
        }
    }
}

#[test]
fn a_large_index_is_walked_through_while_the_store_serves() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let mut held = filled(&path, 300);
    let runtime = runtime();
    for round in 0..10_u64 {
        let store = open_at_once(&path, 2);
        runtime.block_on(async {
            // Absent ones can be claimed, present ones replaced and removed, at once.
            for n in 1000 + 100 * round..1020 + 100 * round {
                assert_eq!(store.get(id(n)).await.unwrap(), None);
                held.insert(n, pair(&store, n, FAR, 4000).await);
            }
            let old = held.get(&round).unwrap().version;
            let unknown = value(UNKNOWN, Some(FAR), "unknown");
            let version = put(&store, round, Some(old), unknown.clone(), 4000).await;
            held.insert(round, Entry { version, value: unknown });
            let old = held.remove(&(100 + round)).unwrap().version;
            store.compare_and_swap(id(100 + round), Some(old), None, 4000, Urgency::Settle).await.unwrap();
            sweep_all(&store, 0).await;
        });
        assert_holds(&store, &held);
        let unknown = held.values().filter(|entry| entry.value.tag == UNKNOWN).count() as u64;
        let status = store.status();
        assert_eq!(status.entries[usize::from(UNKNOWN.0)], unknown);
        assert_eq!(status.entries.iter().sum::<u64>(), held.len() as u64);
        assert_eq!(status.oldest_ms[usize::from(UNKNOWN.0)].is_some(), unknown > 0);
    }
}

#[test]
fn a_spare_segment_that_is_not_blank_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let held = filled(&path, 100);
    let spare = segments(&path).pop().unwrap();
    assert!(!used_segments(&path).contains(&spare), "the last one is unused");
    // As a first frame that was torn leaves it.
    flip(&spare, 2000);
    let store = open(&path);
    assert_holds(&store, &held);
    store.close();
    drop(store);
    assert_eq!(segments(&path).len(), used_segments(&path).len() + 1, "no segment holds anything but entries");
    assert_holds(&open(&path), &held);
}

#[test]
fn a_store_closes_while_its_committer_waits_for_the_walk_through_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let mut held = filled(&path, 300);
    let runtime = runtime();
    // Without threads the walk never ends, and nothing goes to the index.
    let store = std::sync::Arc::new(open_at_once(&path, 0));
    let most = 50 * small().index_bulk as u64;
    let tasks: Vec<_> = (1000..1000 + 2 * most)
        .map(|n| {
            let store = store.clone();
            runtime.spawn(async move {
                let new = value(COMPLETED, Some(FAR), "settled");
                let swap = store.compare_and_swap(id(n), None, Some(new.clone()), 4000, Urgency::Settle).await;
                swap.ok().map(|swap| (n, swap, new))
            })
        })
        .collect();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while store.status().entries[usize::from(COMPLETED.0)] < most {
        assert!(std::time::Instant::now() < deadline, "the committer does not get that far");
        std::thread::yield_now();
    }
    let (sender, closed) = std::sync::mpsc::channel();
    let closing = store.clone();
    std::thread::spawn(move || {
        closing.close();
        sender.send(()).unwrap();
    });
    closed.recv_timeout(Duration::from_secs(20)).expect("it closes");
    for task in tasks {
        if let Some((n, Swap::Done(version), value)) = runtime.block_on(task).unwrap() {
            held.insert(n, Entry { version, value });
        }
    }
    drop(store);
    // What was acknowledged is there.
    let store = open(&path);
    runtime.block_on(async {
        for (n, entry) in &held {
            assert_eq!(store.get(id(*n)).await.unwrap().as_ref(), Some(entry), "record {n}");
        }
    });
}

/// The summaries of sealed segments.
fn summaries(path: &Path) -> Vec<PathBuf> {
    files(&path.join("log")).into_iter().filter(|file| file.extension().is_some_and(|end| end == "sum")).collect()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(std::time::Instant::now() < deadline, "never: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_summary_is_believed_only_where_it_agrees_with_its_segment() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let mut held = filled(&path, 300);
    assert!(summaries(&path).len() > 8, "sealed segments are summarised");
    assert_holds(&open_at_once(&path, 2), &held);
    let before = summaries(&path);
    let right: Vec<_> = before.iter().map(|file| std::fs::read(file).unwrap()).collect();

    // Damaged; empty; another segment's; missing.
    flip(&before[0], 40);
    std::fs::write(&before[1], b"").unwrap();
    std::fs::copy(&before[3], &before[2]).unwrap();
    std::fs::remove_file(&before[3]).unwrap();
    // With a right checksum, but wrong: uid, end, first frame, last frame, next version, newest time.
    for (at, offset) in [12, 20, 28, 36, 44, 52].into_iter().enumerate() {
        let mut bytes = right[4 + at].clone();
        bytes.truncate(bytes.len() - 8);
        bytes[offset] ^= 8;
        bytes.extend_from_slice(&xxhash_rust::xxh3::xxh3_64(&bytes).to_le_bytes());
        std::fs::write(&before[4 + at], bytes).unwrap();
    }
    // Left over: of no segment; of one that was being written.
    std::fs::write(path.join("log/00000000000000ff.sum"), b"").unwrap();
    std::fs::write(path.join("log/0000000000000001.sum.tmp"), b"").unwrap();
    let store = open_at_once(&path, 2);
    assert_holds(&store, &held);
    // The index learns something, and then they are made anew.
    runtime().block_on(async {
        for n in 1000..1040 {
            held.insert(n, pair(&store, n, FAR, 5000).await);
        }
    });
    let is_right = || {
        let now = summaries(&path);
        let read = |file: &PathBuf| std::fs::read(file).unwrap_or_default();
        now.len() >= before.len() && before.iter().map(read).eq(right.iter().cloned())
    };
    wait_until("they are made anew, the same as before", is_right);
    drop(store);
    assert!(!path.join("log/00000000000000ff.sum").exists() && !path.join("log/0000000000000001.sum.tmp").exists());
    assert_holds(&open_at_once(&path, 2), &held);
}

/// Has the summaries say that all has expired at time 1. Returns them as they were, and the number of records.
fn with_wrong_histograms(path: &Path) -> (BTreeMap<PathBuf, Vec<u8>>, BTreeMap<u64, Entry>) {
    let held = filled(path, 300);
    let right: BTreeMap<_, _> =
        summaries(path).into_iter().map(|file| (file.clone(), std::fs::read(file).unwrap())).collect();
    for (file, right) in &right {
        let mut bytes = right.clone();
        // All expire at the same time.
        assert_eq!(bytes[60..76], [1_u64.to_le_bytes(), 1_u64.to_le_bytes()].concat(), "width, number of buckets");
        bytes.truncate(bytes.len() - 8);
        bytes[76..84].copy_from_slice(&1_u64.to_le_bytes());
        bytes.extend_from_slice(&xxhash_rust::xxh3::xxh3_64(&bytes).to_le_bytes());
        std::fs::write(file, bytes).unwrap();
    }
    (right, held)
}

#[test]
fn a_wrong_histogram_in_a_summary_drops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let (_, held) = with_wrong_histograms(&path);
    // The sweep, at once, against the thread that corrects them.
    let store = Embedded::open_tuned(&options(&path), Tuning { verify_first_bytes: 0, ..small() }).unwrap();
    runtime().block_on(sweep_all(&store, 6000));
    assert_holds(&store, &held);
    drop(store);
    assert_holds(&open(&path), &held);
}

#[test]
fn a_wrong_histogram_in_a_summary_is_corrected() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let (right, mut held) = with_wrong_histograms(&path);
    let store = open_at_once(&path, 2);
    let mut next = 1000;
    let is_right = || {
        // Whenever the index learns something, the summaries are written that are due.
        runtime().block_on(async {
            for n in next..next + 20 {
                held.insert(n, pair(&store, n, FAR, 5000).await);
            }
        });
        next += 20;
        right.iter().all(|(file, right)| std::fs::read(file).is_ok_and(|now| now == *right))
    };
    wait_until("they are as they were", is_right);
    assert_holds(&store, &held);
}

/// Opens a store with damage that a start does not see, and waits until it has been found.
fn assert_found(path: &Path, segment: &Path, held: &BTreeMap<u64, Entry>) {
    let store = open_at_once(path, 2);
    runtime().block_on(async {
        for (n, entry) in held {
            match store.get(id(*n)).await {
                Ok(found) => assert_eq!(found.as_ref(), Some(entry), "record {n}"),
                Err(StoreError::Damaged { .. }) => {}
                Err(error) => panic!("record {n}: {error}"),
            }
        }
    });
    wait_until("the damage is found", || store.status().health == Health::Failed);
    drop(store);
    // Summary or not, from now on it is refused.
    for tuning in [small(), at_once(2)] {
        match Embedded::open_tuned(&options(path), tuning) {
            Err(OpenError::Damaged { path, .. }) => assert_eq!(path, segment),
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("it was opened"),
        }
    }
}

#[test]
fn a_large_log_is_verified_while_the_store_serves() {
    let dir = tempfile::tempdir().unwrap();
    let original = dir.path().join("data");
    let held = filled(&original, 300);
    let copy = |name: &str| {
        let path = dir.path().join(name);
        copy_dir(&original, &path);
        let segment = summaries(&path)[3].with_extension("seg");
        (path, segment)
    };
    let refused = |path: &Path| match Embedded::open_tuned(&options(path), at_once(2)) {
        Ok(_) => panic!("it was opened"),
        Err(error) => error,
    };

    // In the middle of a segment: found while the store serves. What is served is right, or an error.
    let (path, segment) = copy("middle");
    flip(&segment, 1000);
    assert_found(&path, &segment, &held);

    // Where it begins, and where it ends: seen at once.
    for (name, offset) in [("first", 64 + 10), ("header", 20)] {
        let (path, segment) = copy(name);
        flip(&segment, offset);
        assert!(matches!(refused(&path), OpenError::Damaged { path, .. } if path == segment), "{name}");
    }
    let (path, segment) = copy("cut");
    let file = std::fs::OpenOptions::new().write(true).open(&segment).unwrap();
    file.set_len(file.metadata().unwrap().len() - 8).unwrap();
    assert!(matches!(refused(&path), OpenError::Damaged { path, .. } if path == segment));

    // A segment that is missing, or stands in another's place.
    let (path, segment) = copy("missing");
    std::fs::remove_file(&segment).unwrap();
    assert!(matches!(refused(&path), OpenError::SegmentMissing { path, .. } if path == segment));
    let (path, segment) = copy("exchanged");
    std::fs::copy(summaries(&path)[4].with_extension("seg"), &segment).unwrap();
    assert!(matches!(refused(&path), OpenError::Damaged { path, .. } if path == segment));

    // Without its index, all of the log is read.
    let (path, segment) = copy("rebuilt");
    flip(&segment, 1000);
    std::fs::remove_dir_all(path.join("index")).unwrap();
    assert!(matches!(refused(&path), OpenError::Damaged { path, .. } if path == segment));
}

#[test]
fn damage_in_what_a_start_replays_is_refused_however_large_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let store = open(&path);
    runtime().block_on(async {
        // A claim that lasts: replay begins there.
        put(&store, 1_000_000, None, value(CLAIMED, None, "for long"), 1000).await;
        for n in 0..300 {
            pair(&store, n, FAR, 1000 + n).await;
        }
    });
    store.close();
    drop(store);
    let segment = summaries(&path)[3].with_extension("seg");
    flip(&segment, 1000);
    match Embedded::open_tuned(&options(&path), at_once(2)) {
        Err(OpenError::Damaged { path, .. }) => assert_eq!(path, segment),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was opened"),
    }
}

#[test]
fn a_log_set_back_behind_its_index_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let held = filled(&path, 30);
    let old = dir.path().join("old");
    copy_dir(&path.join("log"), &old);
    runtime().block_on(async {
        let store = open(&path);
        for n in 200..300 {
            pair(&store, n, FAR, 3000).await;
        }
    });
    std::fs::remove_dir_all(path.join("log")).unwrap();
    copy_dir(&old, &path.join("log"));
    let error = refused(&path);
    assert!(matches!(error, OpenError::LogBehindIndex { .. }), "{error}");
    assert!(error.to_string().contains("delete the directory"), "{error}");
    // It was only refused, not touched; and the operator may accept the loss.
    assert!(matches!(refused(&path), OpenError::LogBehindIndex { .. }));
    std::fs::remove_dir_all(path.join("index")).unwrap();
    assert_holds(&open(&path), &held);
}

#[test]
fn one_process_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let store = open(&path);
    let error = refused(&path);
    assert!(matches!(error, OpenError::Locked { .. }), "{error}");
    assert!(error.to_string().contains("in use by another process"));
    drop(store);
    drop(open(&path));
}

#[test]
fn a_missing_store_is_created_only_if_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/in/data");
    let no = Options { create: false, ..options(&path) };
    assert!(matches!(Embedded::open(&no), Err(OpenError::Missing { .. })));
    assert!(!path.exists());
    std::fs::create_dir_all(&path).unwrap();
    assert!(matches!(Embedded::open(&no), Err(OpenError::Missing { .. })));
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0, "an unmounted volume's mount point is left alone");
    assert!(Embedded::open(&options(&path)).unwrap().status().created);
    assert!(!Embedded::open(&no).unwrap().status().created);
}

#[test]
fn a_path_that_cannot_be_written_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, b"").unwrap();
    assert!(matches!(Embedded::open(&options(&file)), Err(OpenError::Io { .. })));
    assert!(matches!(Embedded::open(&options(&file.join("data"))), Err(OpenError::Io { .. })));
    assert!(matches!(Embedded::open(&options(Path::new("/proc/oncegate"))), Err(OpenError::Io { .. })));
}

#[test]
fn a_log_without_its_settings_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let held = filled(&path, 5);
    let file = path.join("store");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(refused(&path), OpenError::SettingsMissing { .. }));
    for at in 12..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        std::fs::write(&file, &bytes).unwrap();
        assert!(matches!(refused(&path), OpenError::SettingsDamaged { .. }), "at {at}");
    }
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    assert!(matches!(refused(&path), OpenError::SettingsDamaged { .. }));
    let mut newer = bytes.clone();
    newer[8] = 2;
    std::fs::write(&file, &newer).unwrap();
    assert!(matches!(refused(&path), OpenError::Format { version: 2, .. }));
    std::fs::write(&file, &bytes).unwrap();
    // And settings without their log.
    let aside = dir.path().join("aside");
    std::fs::rename(path.join("log"), &aside).unwrap();
    assert!(matches!(refused(&path), OpenError::SegmentMissing { .. }));
    std::fs::rename(&aside, path.join("log")).unwrap();
    assert_holds(&open(&path), &held);
}

#[test]
fn disk_space_is_bounded_by_what_is_retained() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let rt = runtime();
    let mut held = BTreeMap::new();
    rt.block_on(async {
        let store = open(&path);
        let mut now = 1000;
        let mut largest = 0;
        for n in 0..6000_u64 {
            now += 10;
            let old_claim = n % 1000 == 0;
            if old_claim {
                // Some claims last; some unknown records live much longer than what is around them.
                let claim = value(CLAIMED, None, "lasting");
                held.insert(n, Entry { version: put(&store, n, None, claim.clone(), now).await, value: claim });
            } else if n % 500 == 1 {
                let unknown = value(UNKNOWN, Some(FAR), "unknown");
                held.insert(n, Entry { version: put(&store, n, None, unknown.clone(), now).await, value: unknown });
            } else {
                // Retained for 100 records' time.
                pair(&store, n, now + 1000, now).await;
            }
            if n % 10 == 0 {
                sweep_all(&store, now).await;
            }
            if n > 1000 {
                largest = largest.max(segments(&path).iter().map(|file| file.metadata().unwrap().len()).sum::<u64>());
            }
        }
        // 100 records of about 500 bytes are alive at a time: twice that, and some segments.
        assert!(largest < 2 * 100 * 600 + 8 * 16384, "{largest} bytes of log");
        let status = store.status();
        assert_eq!((status.entries[0], status.entries[2]), (6, 12));
        assert!(status.entries[1] < 500, "{:?}", status.entries);
        assert_eq!(status.oldest_ms[2], Some(1020));
        sweep_all(&store, now + 200_000).await;
        assert_eq!(store.status().entries, [6, 0, 12, 0]);
        assert_eq!(store.status().swept, 6000 - 18);
        assert_eq!(store.newest_ms(), now);
    });
    let store = open(&path);
    // What was dropped without a trace in the log may be back, to be dropped again.
    rt.block_on(sweep_all(&store, 1_000_000));
    assert_holds(&store, &held);
    let mut unexpiring = store.unexpiring().unwrap();
    unexpiring.sort_by_key(|(_, entry)| entry.version);
    let claims: Vec<_> =
        held.iter().filter(|(_, e)| e.value.tag == CLAIMED).map(|(n, e)| (id(*n), e.clone())).collect();
    assert_eq!(unexpiring, claims);
    drop(store);
    std::fs::remove_dir_all(path.join("index")).unwrap();
    let store = open(&path);
    rt.block_on(sweep_all(&store, 1_000_000));
    assert_holds(&store, &held);
}

#[test]
fn a_damaged_value_is_damaged_and_not_absent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let rt = runtime();
    rt.block_on(async {
        let store = open(&path);
        let held = pair(&store, 1, FAR, 1000).await;
        assert_eq!(store.get(id(1)).await.unwrap(), Some(held));
        let file = used_segments(&path).pop().unwrap();
        let at = std::fs::read(&file).unwrap().iter().rposition(|&byte| byte == b'x').unwrap() as u64;
        flip(&file, at);
        assert!(matches!(store.get(id(1)).await, Err(StoreError::Damaged { .. })));
        let swap = store.compare_and_swap(id(1), None, None, 1001, Urgency::Claim).await;
        assert!(matches!(swap, Err(StoreError::Damaged { .. })), "{swap:?}");
    });
}

#[test]
fn a_listing_is_whole_before_the_index_has_been_walked_through() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let runtime = runtime();
    let mut held = BTreeMap::new();
    // Some superseded, some removed. Of each kind some are in the index, and some behind its checkpoint: what is claimed
    // and stays so goes last, since all behind a claim is in memory.
    runtime.block_on(async {
        let store = open(&path);
        for n in 0..303 {
            if n >= 300 {
                let claim = value(CLAIMED, None, "still claimed");
                held.insert(n, Entry { version: put(&store, n, None, claim.clone(), 4000).await, value: claim });
            }
            let n = if n < 300 { n } else { n + 100 };
            let settled = pair(&store, n, FAR, 4000).await;
            let (old, unknown) = (Some(settled.version), value(UNKNOWN, Some(FAR), &format!("unknown {n}")));
            held.insert(n, settled);
            if n % 7 == 0 {
                let version = put(&store, n, old, unknown.clone(), 4000).await;
                held.insert(n, Entry { version, value: unknown });
            } else if n % 50 == 5 {
                held.remove(&n);
                store.compare_and_swap(id(n), old, None, 4000, Urgency::Settle).await.unwrap();
            }
        }
    });
    // Without threads, only what is asked for is compared: each kind before another one has done that.
    for tag in [Some(UNKNOWN), Some(COMPLETED), Some(CLAIMED), None] {
        let store = open_at_once(&path, 0);
        let listed = runtime.block_on(list_all(&store, tag, 64));
        let wanted = held.values().filter(|entry| tag.is_none_or(|tag| entry.value.tag == tag)).count();
        assert_eq!(listed.len(), wanted, "{tag:?}");
        runtime.block_on(assert_listed(&store, &held));
    }
    // A listing that was begun before the walk is over goes on after it.
    let store = open_at_once(&path, 0);
    let half = runtime.block_on(store.list(Some(UNKNOWN), 0, 100)).unwrap();
    drop(store);
    let store = open_at_once(&path, 2);
    wait_until("all are counted", || store.status().entries.iter().sum::<u64>() == held.len() as u64);
    let mut listed = half.entries;
    let mut after = half.next;
    while let Some(next) = after {
        let page = runtime.block_on(store.list(Some(UNKNOWN), next, 100)).unwrap();
        listed.extend(page.entries);
        after = page.next;
    }
    listed.sort_by_key(|(_, entry)| entry.version);
    let mut unknown: Vec<_> =
        held.iter().filter(|(_, e)| e.value.tag == UNKNOWN).map(|(n, e)| (id(*n), e.clone())).collect();
    unknown.sort_by_key(|(_, entry)| entry.version);
    assert_eq!(listed, unknown);
    runtime.block_on(assert_listed(&store, &held));
}

/// Whatever is damaged of an entry: those before and behind it are shown, in the same frame as well.
#[test]
fn a_listing_passes_over_damaged_entries() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let runtime = runtime();
    let mark = |n: u64| format!("the response of {n:03} {}", "y".repeat(150));
    for tag in [COMPLETED, UNKNOWN] {
        // In the value; in the id; in the length; in the checksum.
        for (at, whole_frame) in [(56 + 20, false), (12, false), (48, true), (50, true), (3, false)] {
            let _ = std::fs::remove_dir_all(&path);
            // Large enough for all to stay in one segment, and in memory.
            let tuning = Tuning { segment_bytes_min: 1 << 20, segment_bytes_max: 1 << 20, index_bulk: 1000, ..small() };
            let store = std::sync::Arc::new(Embedded::open_tuned(&options(&path), tuning).unwrap());
            let mut held = BTreeMap::new();
            runtime.block_on(async {
                for frame in 0..3 {
                    // At once, so that many are in one frame.
                    let tasks: Vec<_> = (frame * 50..(frame + 1) * 50)
                        .map(|n| {
                            let (store, new) = (store.clone(), value(tag, Some(FAR), &mark(n)));
                            tokio::spawn(async move {
                                let version = put(&store, n, None, new.clone(), 1000).await;
                                (n, Entry { version, value: new })
                            })
                        })
                        .collect();
                    for task in tasks {
                        let (n, entry) = task.await.unwrap();
                        held.insert(n, entry);
                    }
                }
            });
            let file = used_segments(&path).pop().unwrap();
            let bytes = std::fs::read(&file).unwrap();
            let text = mark(75);
            let value_at = bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
            flip(&file, (value_at - 56 + at) as u64);
            for kind in [None, Some(tag)] {
                for visit in [1, 7, 1000] {
                    let mut listed = runtime.block_on(list_all(&store, kind, visit));
                    listed.sort_by_key(|(_, entry)| entry.version);
                    let shown: Vec<u64> =
                        listed.iter().map(|(id, _)| u64::from_be_bytes(id.0[8..].try_into().unwrap())).collect();
                    assert!(!shown.contains(&75), "byte {at}, {kind:?}");
                    for (n, (id, entry)) in shown.iter().zip(&listed) {
                        assert_eq!((id, entry), (&self::id(*n), held.get(n).unwrap()));
                    }
                    // If its length is lost, so is what follows in its frame; a place that is known needs no length.
                    match whole_frame && kind != Some(UNKNOWN) {
                        true => assert!(shown.len() >= 100, "byte {at}, {kind:?}: {} shown", shown.len()),
                        false => assert_eq!(shown.len(), 149, "byte {at}, {kind:?}"),
                    }
                }
            }
            assert_eq!(store.status().health, Health::Ok);
            store.close();
        }
    }
}

#[test]
fn with_little_space_claims_are_refused_and_settles_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let rt = runtime();
    rt.block_on(async {
        let store = open(&path);
        let version = put(&store, 1, None, value(CLAIMED, None, "claim"), 1000).await;
        store.close();
        drop(store);
        let greedy = Options { min_free_bytes: u64::MAX / 4, ..options(&path) };
        let store = Embedded::open_tuned(&greedy, small()).unwrap();
        let claim = value(CLAIMED, None, "claim");
        let swap = store.compare_and_swap(id(2), None, Some(claim.clone()), 1001, Urgency::Claim).await;
        assert!(matches!(swap, Err(StoreError::Full { .. })), "{swap:?}");
        assert_eq!(store.status().health, Health::Full);
        assert_eq!(store.get(id(2)).await.unwrap(), None);
        // A conflict is still told: nothing has to be written for it.
        let swap = store.compare_and_swap(id(1), None, Some(claim), 1001, Urgency::Claim).await;
        assert!(matches!(swap, Ok(Swap::Conflict(Some(_)))));
        let done = value(COMPLETED, Some(FAR), "done");
        let swap = store.compare_and_swap(id(1), Some(version), Some(done), 1002, Urgency::Settle).await;
        assert!(matches!(swap, Ok(Swap::Done(_))));
    });
}

/// Says that a test cannot run here; fails it where all must run.
fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
    assert!(std::env::var("ONCEGATE_REQUIRE_ALL").as_deref() != Ok("1"), "skipped, but ONCEGATE_REQUIRE_ALL=1: {why}");
}

/// A mounted file system that goes away with it.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(at: PathBuf, size: &str) -> Option<Self> {
        std::fs::create_dir_all(&at).unwrap();
        let size = format!("size={size}");
        let status = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&at).output();
        status.is_ok_and(|output| output.status.success()).then_some(Self(at))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_refuses_claims_settles_and_recovers_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mounted) = Mounted::tmpfs(dir.path().join("disk"), "8m") else {
        return skip("needs root, to mount a small file system");
    };
    let path = mounted.0.join("data");
    let options = Options { min_free_bytes: 1 << 20, ..options(&path) };
    let tuning = Tuning { segment_bytes_min: 64 << 10, segment_bytes_max: 256 << 10, index_bulk: 100, ..small() };
    runtime().block_on(async {
        let store = Embedded::open_tuned(&options, tuning).unwrap();
        let mut open_claims = Vec::new();
        for n in 0..40 {
            open_claims.push((n, put(&store, n, None, value(CLAIMED, None, "claim"), 1000).await));
        }
        assert_eq!(store.status().health, Health::Ok);
        // Somebody else fills the disk to the last byte.
        let hog = mounted.0.join("hog");
        let mut file = std::fs::File::create(&hog).unwrap();
        let chunk = vec![1; 4096];
        while std::io::Write::write_all(&mut file, &chunk).is_ok() {}
        let full = |n: u64| {
            let store = &store;
            async move {
                let claim = value(CLAIMED, None, "claim");
                store.compare_and_swap(id(n), None, Some(claim), 1001, Urgency::Claim).await
            }
        };
        // The look at the disk is paced.
        let mut n = 1000;
        while full(n).await.is_ok() {
            n += 1;
        }
        assert!(matches!(full(n + 1).await, Err(StoreError::Full { .. })));
        assert_eq!(store.status().health, Health::Full);
        // What was begun can be ended: the segments have their room already.
        let mut settled = 0;
        for (n, version) in &open_claims {
            let done = value(COMPLETED, Some(FAR), &"r".repeat(500));
            match store.compare_and_swap(id(*n), Some(*version), Some(done), 1002, Urgency::Settle).await {
                Ok(Swap::Done(_)) => settled += 1,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(settled, 40);
        // Even when no byte is left, nothing breaks: what cannot be written is refused.
        let mut refused = 0;
        let mut version = store.get(id(0)).await.unwrap().unwrap().version;
        for _ in 0..2000 {
            let done = value(COMPLETED, Some(FAR), &"r".repeat(500));
            match store.compare_and_swap(id(0), Some(version), Some(done), 1002, Urgency::Settle).await {
                Ok(Swap::Done(next)) => version = next,
                Err(StoreError::Full { .. }) => refused += 1,
                other => panic!("{other:?}"),
            }
            if refused > 3 {
                break;
            }
        }
        assert!(refused > 3);
        assert_eq!(store.status().health, Health::Full);
        // Space comes back: noticed without traffic.
        drop(file);
        std::fs::remove_file(&hog).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while store.status().health != Health::Ok {
            assert!(std::time::Instant::now() < deadline, "it never recovered: {:?}", store.status());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(matches!(full(5000).await, Ok(Swap::Done(_))));
        let done = value(COMPLETED, Some(FAR), "last");
        let swap = store.compare_and_swap(id(0), Some(version), Some(done), 1003, Urgency::Settle).await;
        assert!(matches!(swap, Ok(Swap::Done(_))), "{swap:?}");
        store.close();
        drop(store);
        let store = Embedded::open_tuned(&options, tuning).unwrap();
        assert_eq!(&store.get(id(0)).await.unwrap().unwrap().value.bytes[..], b"last");
        assert!(store.get(id(39)).await.unwrap().is_some());
    });
}

/// In a process whose files may not grow, so that a write fails for real.
#[test]
fn after_a_failed_write_the_store_has_failed_for_good() {
    const PATH: &str = "ONCEGATE_TEST_FAILING_PATH";
    const NAME: &str = "after_a_failed_write_the_store_has_failed_for_good";
    let tuning = Tuning { segment_bytes_min: 64 << 10, segment_bytes_max: 1 << 30, ..small() };
    if let Some(path) = std::env::var_os(PATH) {
        return runtime().block_on(fill_until_it_fails(Path::new(&path), tuning));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let exe = std::env::current_exe().unwrap();
    // An engine may create files that are larger than what will be in them.
    drop(Embedded::open_tuned(&options(&path), tuning).unwrap());
    // In blocks of 512 bytes. The signal that comes with it would kill the process.
    let script = r#"trap "" XFSZ; ulimit -f 400; exec "$0" "$@""#;
    let output = std::process::Command::new("bash")
        .args(["-c", script])
        .arg(exe)
        .args(["--exact", &format!("{}::{NAME}", module_path!().split_once("::").unwrap().1), "--nocapture"])
        .env(PATH, &path)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stdout));
    let acknowledged: u64 = text.lines().find_map(|line| line.strip_prefix("acknowledged ")).unwrap().parse().unwrap();
    assert!(acknowledged > 100);
    let store = Embedded::open_tuned(&options(&path), tuning).unwrap();
    runtime().block_on(async {
        for n in 0..acknowledged {
            assert!(store.get(id(n)).await.unwrap().is_some(), "record {n} was acknowledged");
        }
        put(&store, 100_000, None, value(CLAIMED, None, "goes on"), 1000).await;
    });
}

async fn fill_until_it_fails(path: &Path, tuning: Tuning) {
    let store = Embedded::open_tuned(&options(path), tuning).unwrap();
    let mut acknowledged = 0;
    let mut attempts = 0;
    // First frames larger than any segment may be, then whatever fits.
    let reason = loop {
        let size = if attempts < 500 { 100 } else { 250_000 };
        let claim = Value { tag: CLAIMED, expires_at_ms: None, bytes: vec![7; size].into() };
        match store.compare_and_swap(id(acknowledged), None, Some(claim), 1000, Urgency::Claim).await {
            Ok(Swap::Done(_)) => acknowledged += 1,
            Err(StoreError::Failed { reason }) => break reason,
            other => panic!("{other:?}"),
        }
        attempts += 1;
        assert!(attempts < 10_000);
    };
    assert!(!reason.is_empty());
    assert_eq!(store.status().health, Health::Failed);
    for n in 0..10 {
        // Small ones would fit, but nobody knows what the disk holds.
        let small = value(CLAIMED, None, "small");
        let swap = store.compare_and_swap(id(50_000 + n), None, Some(small), 1000, Urgency::Settle).await;
        assert!(matches!(swap, Err(StoreError::Failed { .. })), "{swap:?}");
    }
    assert!(matches!(store.swap_setting("x", None, b"y").await, Err(StoreError::Failed { .. })));
    assert!(matches!(store.sweep(1000).await, Err(StoreError::Failed { .. })));
    assert!(store.get(id(0)).await.unwrap().is_some(), "what was acknowledged can still be read");
    store.close();
    eprintln!("acknowledged {acknowledged}");
}

#[derive(Clone, Debug)]
enum Step {
    Claim(u64),
    Settle(u64, u64),
    Remove(u64),
    Big(u64),
    Advance(u64),
    Sweep,
    Reopen,
    Crash,
    LoseIndex,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = 0..30_u64;
    let step = prop_oneof![
        30 => key.clone().prop_map(Step::Claim),
        30 => (key.clone(), 0..400_000_u64).prop_map(|(n, ms)| Step::Settle(n, ms)),
        8 => key.clone().prop_map(Step::Remove),
        2 => key.prop_map(Step::Big),
        10 => (1..200_000_u64).prop_map(Step::Advance),
        8 => Just(Step::Sweep),
        1 => Just(Step::Reopen),
        2 => Just(Step::Crash),
        1 => Just(Step::LoseIndex),
    ];
    proptest::collection::vec(step, 1..250)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is done to the store, it holds what a map would hold; what has expired it may hold or not.
    #[test]
    fn it_behaves_like_a_map(steps in steps()) {
        runtime().block_on(run_model(steps));
    }
}

struct Model {
    dir: tempfile::TempDir,
    path: PathBuf,
    store: Option<Embedded>,
    held: HashMap<u64, Entry>,
    now: u64,
    last_version: Version,
    generation: u32,
}

impl Model {
    fn store(&self) -> &Embedded {
        self.store.as_ref().unwrap()
    }

    fn expired(&self, entry: &Entry) -> bool {
        entry.value.expires_at_ms.is_some_and(|at| at <= self.now)
    }

    /// What the store holds under `n`, compared with the model.
    async fn look(&self, n: u64) -> Option<Entry> {
        let found = self.store().get(id(n)).await.unwrap();
        match self.held.get(&n) {
            Some(entry) if self.expired(entry) => {
                assert!(found.is_none() || found.as_ref() == Some(entry), "{n}: {found:?}")
            }
            held => assert_eq!(found.as_ref(), held, "{n}"),
        }
        found
    }

    async fn write(&mut self, n: u64, new: Option<Value>) {
        let current = self.look(n).await.map(|entry| entry.version);
        let swap = self.store().compare_and_swap(id(n), current, new.clone(), self.now, Urgency::Claim).await.unwrap();
        let Swap::Done(version) = swap else { panic!("{swap:?}") };
        assert!(version > self.last_version, "versions never repeat");
        self.last_version = version;
        match new {
            Some(value) => drop(self.held.insert(n, Entry { version, value })),
            None => drop(self.held.remove(&n)),
        }
    }

    async fn step(&mut self, step: Step) {
        match step {
            Step::Claim(n) => self.write(n, Some(value(CLAIMED, None, &format!("claim {n} at {}", self.now)))).await,
            Step::Settle(n, ms) => {
                let tag = if ms % 3 == 0 { UNKNOWN } else { COMPLETED };
                let expires = Some(self.now + ms);
                self.write(n, Some(value(tag, expires, &format!("settled {n} {}", "s".repeat((ms % 700) as usize)))))
                    .await;
            }
            Step::Big(n) => {
                let bytes = vec![n as u8; 30_000].into();
                self.write(n, Some(Value { tag: COMPLETED, expires_at_ms: Some(self.now + 100_000), bytes })).await;
            }
            Step::Remove(n) => self.write(n, None).await,
            Step::Advance(ms) => self.now += ms,
            Step::Sweep => {
                sweep_all(self.store(), self.now).await;
                // Only what has expired has gone. It may be back after a restart, since that leaves no trace in the log.
                let mut found = 0;
                for n in 0..30 {
                    found += u64::from(self.look(n).await.is_some());
                }
                assert_eq!(self.store().status().entries.iter().sum::<u64>(), found);
            }
            Step::Reopen => {
                self.store().close();
                self.store = None;
                self.store = Some(open(&self.path));
            }
            Step::Crash => {
                self.generation += 1;
                let path = self.dir.path().join(self.generation.to_string());
                // As a killed process leaves it: nothing is closed before the copy is made.
                copy_dir(&self.path, &path);
                self.store = None;
                std::fs::remove_dir_all(&self.path).unwrap();
                self.path = path;
                self.store = Some(open_at_once(&self.path, 2));
            }
            Step::LoseIndex => {
                self.store = None;
                std::fs::remove_dir_all(self.path.join("index")).unwrap();
                self.store = Some(open(&self.path));
            }
        }
    }

    async fn compare_all(&self) {
        let mut unexpiring = Vec::new();
        let mut counts = [0_u64; Tag::COUNT];
        let mut held = BTreeMap::new();
        for n in 0..30 {
            let found = self.look(n).await;
            if let Some(entry) = found {
                held.insert(n, entry.clone());
                counts[usize::from(entry.value.tag.0)] += 1;
                if entry.value.expires_at_ms.is_none() {
                    unexpiring.push((id(n), entry));
                }
            }
        }
        // Nothing has expired by then: it only waits for the walk through the index.
        sweep_all(self.store(), 0).await;
        assert_eq!(self.store().status().entries, counts, "counts are exact");
        let mut listed = self.store().unexpiring().unwrap();
        listed.sort_by_key(|(id, _)| *id);
        unexpiring.sort_by_key(|(id, _)| *id);
        assert_eq!(listed, unexpiring);
        assert_listed(self.store(), &held).await;
        assert!(self.store().newest_ms() <= self.now);
    }
}

async fn run_model(steps: Vec<Step>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0");
    let store = Some(open(&path));
    let mut model =
        Model { dir, path, store, held: HashMap::new(), now: 1000, last_version: Version(0), generation: 0 };
    for step in steps {
        let reopened = matches!(step, Step::Reopen | Step::Crash | Step::LoseIndex);
        model.step(step).await;
        if reopened {
            model.compare_all().await;
        }
    }
    model.compare_all().await;
    // In the end, all that can go goes.
    model.now += 1_000_000;
    model.step(Step::Sweep).await;
    let claims = model.held.values().filter(|entry| entry.value.expires_at_ms.is_none()).count() as u64;
    assert_eq!(model.store().status().entries, [claims, 0, 0, 0]);
    model.compare_all().await;
}
