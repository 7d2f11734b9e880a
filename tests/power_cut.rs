//! Power cuts under load: the file system is shut down as if its power had been cut (`EXT4_IOC_SHUTDOWN` without flushing
//! the journal), mounted again, and the store must open by itself with everything that was acknowledged.
//!
//! `ONCEGATE_CUTS` says how often (14, with each engine).
//!
//! Needs root, a loop device, ext4 and python3 (for the ioctl). Says so loudly where it has to be skipped.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout, clippy::print_stderr)]

use bytes::Bytes;
use oncegate::store::embedded::{Durability, Embedded, Engine, Options, Tuning};
use oncegate::store::{Health, RecordId, Store, StoreError, Swap, Tag, Urgency, Value, Version};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

const PATH: &str = "ONCEGATE_TEST_POWER_CUT_PATH";
const FIRST: &str = "ONCEGATE_TEST_POWER_CUT_FIRST";
const ENGINE: &str = "ONCEGATE_TEST_POWER_CUT_ENGINE";
const RELAXED: &str = "ONCEGATE_TEST_POWER_CUT_RELAXED";
const CLAIMED: Tag = Tag(0);
const COMPLETED: Tag = Tag(1);
/// Operations until a completed record expires.
const RETENTION: u64 = 1500;

/// So small that rotation, indexing and retirement go on all the time.
fn tuning() -> Tuning {
    Tuning {
        segment_bytes_min: 32 << 10,
        segment_bytes_max: 128 << 10,
        index_bulk: 50,
        memtable_bytes: 64 << 10,
        replay_bytes: 256 << 10,
        verify_first_bytes: 0,
        survey_first_max: 0,
        survey_threads: 2,
    }
}

fn open(path: &Path, engine: Engine, durability: Durability) -> Result<Embedded, oncegate::store::embedded::OpenError> {
    let options = Options { path: path.to_owned(), engine, create: true, min_free_bytes: 1 << 20, durability };
    Embedded::open_tuned(&options, tuning())
}

fn id(n: u64) -> RecordId {
    let hash = xxhash_rust::xxh3::xxh3_128(&n.to_le_bytes());
    RecordId(hash.to_le_bytes())
}

fn claim(n: u64) -> Value {
    Value { tag: CLAIMED, expires_at_ms: None, bytes: Bytes::from(format!("claim {n}")) }
}

fn completed(n: u64, expires_at_ms: u64) -> Value {
    let text = format!("completed {n} {}", "r".repeat((n % 700) as usize));
    Value { tag: COMPLETED, expires_at_ms: Some(expires_at_ms), bytes: Bytes::from(text) }
}

/// The process that is struck. Tells each acknowledgement on its standard output.
fn write_until_struck(path: &Path) {
    let first: u64 = std::env::var(FIRST).unwrap().parse().unwrap();
    let durability = if std::env::var_os(RELAXED).is_some() { Durability::Relaxed } else { Durability::Strict };
    let engine = if std::env::var(ENGINE).unwrap() == "Fjall" { Engine::Fjall } else { Engine::Sled };
    let store = Arc::new(open(path, engine, durability).unwrap());
    let next = Arc::new(AtomicU64::new(first));
    let (tell, told) = mpsc::channel::<String>();
    let teller = std::thread::spawn(move || {
        let mut out = std::io::stdout().lock();
        for line in told {
            if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
                return;
            }
        }
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let error = runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..24 {
            let (store, next, tell) = (store.clone(), next.clone(), tell.clone());
            tasks.spawn(async move {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if let Err(error) = one(&store, n, &tell).await {
                        return error;
                    }
                }
            });
        }
        let (sweeper, clock) = (store.clone(), next.clone());
        tasks.spawn(async move {
            loop {
                match sweeper.sweep(clock.load(Ordering::Relaxed)).await {
                    Ok(wait) => tokio::time::sleep(wait.min(Duration::from_millis(5))).await,
                    Err(error) => return error,
                }
            }
        });
        tasks.join_next().await.unwrap().unwrap()
    });
    // The flush has failed: from now on nothing is acknowledged any more.
    assert!(matches!(error, StoreError::Failed { .. }), "{error}");
    assert_eq!(store.status().health, Health::Failed);
    runtime.block_on(async {
        for n in 0..20 {
            let swap = store.compare_and_swap(id(u64::MAX - n), None, Some(claim(n)), 1, Urgency::Settle).await;
            assert!(matches!(swap, Err(StoreError::Failed { .. })), "{swap:?}");
        }
    });
    tell.send("poisoned".to_owned()).unwrap();
    drop((runtime, tell));
    teller.join().unwrap();
    std::thread::park();
}

async fn one(store: &Embedded, n: u64, tell: &mpsc::Sender<String>) -> Result<(), StoreError> {
    let Swap::Done(version) = store.compare_and_swap(id(n), None, Some(claim(n)), n, Urgency::Claim).await? else {
        panic!("{n} is new");
    };
    tell.send(format!("claimed {n} {}", version.0)).unwrap();
    let new = match n % 10 {
        // Stays claimed.
        0 => return Ok(()),
        1 => None,
        // Lives long.
        2 => Some(completed(n, u64::MAX / 2)),
        _ => Some(completed(n, n + RETENTION)),
    };
    let what = if new.is_some() { "completed" } else { "removed" };
    let Swap::Done(version) = store.compare_and_swap(id(n), Some(version), new, n, Urgency::Settle).await? else {
        panic!("{n} is ours");
    };
    tell.send(format!("{what} {n} {}", version.0)).unwrap();
    Ok(())
}

fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
    assert!(std::env::var("ONCEGATE_REQUIRE_ALL").as_deref() != Ok("1"), "skipped, but ONCEGATE_REQUIRE_ALL=1: {why}");
}

fn run(program: &str, args: &[&str]) -> bool {
    match Command::new(program).args(args).output() {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            eprintln!("{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
            false
        }
        Err(error) => {
            eprintln!("{program}: {error}");
            false
        }
    }
}

/// An ext4 file system in a file, mounted while it lives.
struct Disk {
    image: PathBuf,
    at: PathBuf,
}

impl Disk {
    fn new(dir: &Path) -> Option<Self> {
        let disk = Self { image: dir.join("image"), at: dir.join("disk") };
        std::fs::create_dir(&disk.at).unwrap();
        std::fs::File::create(&disk.image).unwrap().set_len(128 << 20).unwrap();
        let made = run("mkfs.ext4", &["-q", "-F", disk.image.to_str().unwrap()]);
        (made && disk.mount()).then_some(disk)
    }

    fn mount(&self) -> bool {
        run("mount", &["-t", "ext4", "-o", "loop", self.image.to_str().unwrap(), self.at.to_str().unwrap()])
    }

    fn unmount(&self) -> bool {
        run("umount", &[self.at.to_str().unwrap()])
    }

    /// Gets ready to cut the power at once.
    fn cutter(&self) -> Child {
        // `EXT4_IOC_SHUTDOWN` = `_IOR('X', 125, u32)` with `EXT4_GOING_FLAGS_NOLOGFLUSH`.
        let script = "import fcntl, os, struct, sys\n\
                      disk = os.open(sys.argv[1], os.O_RDONLY)\n\
                      print('ready', flush=True)\n\
                      sys.stdin.readline()\n\
                      fcntl.ioctl(disk, 0x8004587d, struct.pack('I', 2))";
        let mut command = Command::new("python3");
        command.args(["-c", script, self.at.to_str().unwrap()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut cutter = command.spawn().expect("python3, to cut the power");
        let mut line = String::new();
        BufReader::new(cutter.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        cutter
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).stderr(Stdio::null()).status();
    }
}

/// What was acknowledged of a key last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Acknowledged {
    Claimed(Version),
    Completed(Version),
    Removed(Version),
}

/// Lets a process write, cuts the power, and returns what it had acknowledged, by key.
fn strike(
    disk: &Disk,
    path: &Path,
    engine: Engine,
    first: u64,
    after: Duration,
    relaxed: bool,
) -> BTreeMap<u64, Acknowledged> {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "with_sled_nothing_acknowledged_is_lost_in_a_power_cut", "--nocapture"]);
    child.env(PATH, path).env(ENGINE, format!("{engine:?}")).env(FIRST, first.to_string()).stdout(Stdio::piped());
    if relaxed {
        child.env(RELAXED, "1");
    }
    let mut child = child.spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (sender, receiver) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let mut acknowledged = BTreeMap::new();
    let mut note = |line: &str| {
        let mut words = line.split(' ');
        let what = words.next().unwrap();
        let mut number = || words.next().unwrap().parse::<u64>().unwrap();
        match what {
            "claimed" => drop(acknowledged.insert(number(), Acknowledged::Claimed(Version(number())))),
            "completed" => drop(acknowledged.insert(number(), Acknowledged::Completed(Version(number())))),
            "removed" => drop(acknowledged.insert(number(), Acknowledged::Removed(Version(number())))),
            _ => {}
        }
    };
    // From the first acknowledgement on, it runs for the given time.
    loop {
        let line = receiver.recv_timeout(Duration::from_secs(60)).expect("the process writes");
        note(&line);
        if line.starts_with("claimed") {
            break;
        }
    }
    let mut cutter = disk.cutter();
    std::thread::sleep(after);
    // What counts is what was acknowledged up to now. A flush that is under way while ext4 is being shut down may be
    // told that it succeeded although it did not; after a power cut, nobody is there to be told so.
    for line in receiver.try_iter() {
        note(&line);
    }
    cutter.stdin.take().unwrap().write_all(b"now\n").unwrap();
    assert!(cutter.wait().unwrap().success());
    // The process notices, and acknowledges nothing more.
    while receiver.recv_timeout(Duration::from_secs(60)).expect("the process notices") != "poisoned" {}
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap();
    assert!(disk.unmount() && disk.mount());
    acknowledged
}

async fn verify(store: &Embedded, acknowledged: &BTreeMap<u64, Acknowledged>, now: u64) -> (usize, usize) {
    let (mut present, mut moved_on, mut lost) = (0, 0, Vec::new());
    for (&n, &what) in acknowledged {
        let found = store.get(id(n)).await.unwrap();
        let expires = if n % 10 == 2 { u64::MAX / 2 } else { n + RETENTION };
        match (what, found) {
            (Acknowledged::Claimed(version), Some(entry)) if entry.version == version => {
                assert_eq!(entry.value, claim(n));
                present += 1;
            }
            (Acknowledged::Completed(version), Some(entry)) if entry.version == version => {
                assert_eq!(entry.value, completed(n, expires));
                present += 1;
            }
            (Acknowledged::Completed(_), None) => assert!(expires <= now, "completed record {n} was lost"),
            (Acknowledged::Removed(_), None) => {}
            // What was written next was not acknowledged any more, but has landed.
            (Acknowledged::Claimed(_), None) if n % 10 == 1 => moved_on += 1,
            (Acknowledged::Claimed(version), Some(entry)) if entry.version > version => {
                assert_eq!(entry.value, completed(n, expires));
                moved_on += 1;
            }
            (Acknowledged::Claimed(_), None) if n % 10 > 2 && expires <= now => moved_on += 1,
            (what, found) => lost.push(format!("key {n}: {what:?} was acknowledged, {found:?} was found")),
        }
    }
    assert!(lost.is_empty(), "{}", lost.join("\n"));
    (present, moved_on)
}

#[test]
fn with_sled_nothing_acknowledged_is_lost_in_a_power_cut() {
    // The process that is struck is this one, started anew.
    match std::env::var_os(PATH) {
        Some(path) => write_until_struck(Path::new(&path)),
        None => nothing_acknowledged_is_lost(Engine::Sled),
    }
}

#[test]
fn with_fjall_nothing_acknowledged_is_lost_in_a_power_cut() {
    nothing_acknowledged_is_lost(Engine::Fjall);
}

/// As often as `ONCEGATE_CUTS` says; from time to time with a new store.
fn nothing_acknowledged_is_lost(engine: Engine) {
    let cuts = std::env::var("ONCEGATE_CUTS").map_or(14, |text| text.parse().expect("ONCEGATE_CUTS"));
    (0..cuts).step_by(14).for_each(|done| one_store_loses_nothing(engine, (cuts - done).min(14)));
}

fn one_store_loses_nothing(engine: Engine, cuts: u64) {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::new(dir.path()) else {
        return skip("needs root, a loop device and ext4, to cut the power of a file system");
    };
    let path = disk.at.join("data");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut acknowledged = BTreeMap::new();
    let mut first = 0;
    for round in 0..cuts {
        // From the midst of its beginnings to after many retirements.
        let after = Duration::from_millis([0, 3, 40, 150, 400][(round % 5) as usize] + round * 7);
        let new = strike(&disk, &path, engine, first, after, false);
        let count = new.len();
        let last = new.last_key_value().map_or(first, |(n, _)| *n);
        acknowledged.extend(new);
        // Keys that were begun and not acknowledged are not used again.
        first = last + 1000;
        let store = open(&path, engine, Durability::Strict).expect("it opens without an operator's hand");
        let (present, moved_on) = runtime.block_on(verify(&store, &acknowledged, first));
        let status = store.status();
        eprintln!(
            "{engine:?}, round {round}: {count} keys, {present} of {} present, {moved_on} had moved on; {} KiB, {:?}",
            acknowledged.len(),
            status.disk_bytes >> 10,
            status.entries,
        );
        assert!(status.disk_bytes < 100 << 20);
        drop(store);
        // And what has been removed, swept and retired stays accounted for.
        if round % 4 == 3 {
            std::fs::remove_dir_all(path.join("index")).unwrap();
            let store = open(&path, engine, Durability::Strict).unwrap();
            runtime.block_on(verify(&store, &acknowledged, first));
        }
    }
}

/// Relaxed durability may lose the last writes in a power cut, but the store opens by itself, and goes on.
#[test]
fn a_relaxed_store_opens_after_a_power_cut() {
    for engine in [Engine::Sled, Engine::Fjall] {
        a_relaxed_store_opens(engine);
    }
}

fn a_relaxed_store_opens(engine: Engine) {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::new(dir.path()) else {
        return skip("needs root, a loop device and ext4, to cut the power of a file system");
    };
    let path = disk.at.join("data");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut first = 0;
    for round in 0..6_u64 {
        let new = strike(&disk, &path, engine, first, Duration::from_millis(50 + round * 60), true);
        first = new.last_key_value().map_or(first, |(n, _)| *n) + 1000;
        let store = open(&path, engine, Durability::Relaxed).expect("it opens without an operator's hand");
        runtime.block_on(async {
            for n in new.keys() {
                store.get(id(*n)).await.unwrap();
            }
        });
        drop(store);
    }
}
