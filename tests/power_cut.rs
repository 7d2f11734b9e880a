//! Power cuts under load: the file system is shut down as if its power had been cut (`EXT4_IOC_SHUTDOWN` without flushing
//! the journal), mounted again, and the store must open by itself with everything that was acknowledged.
//!
//! `ONCEGATE_CUTS` says how often (14, with each engine).
//!
//! Needs root, a loop device, ext4 and python3 (for the ioctl). Says so loudly where it has to be skipped.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[allow(dead_code, reason = "shared with other tests")]
mod struck;

use oncegate::store::Store;
use oncegate::store::embedded::{Durability, Engine};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use struck::writer::Writing;
use struck::{Acknowledgements, Disk, id, note, open, skip, verify};

/// Gets ready to cut the power of a disk at once.
fn cutter(disk: &Disk) -> Child {
    // `EXT4_IOC_SHUTDOWN` = `_IOR('X', 125, u32)` with `EXT4_GOING_FLAGS_NOLOGFLUSH`.
    let script = "import fcntl, os, struct, sys\n\
                  disk = os.open(sys.argv[1], os.O_RDONLY)\n\
                  print('ready', flush=True)\n\
                  sys.stdin.readline()\n\
                  fcntl.ioctl(disk, 0x8004587d, struct.pack('I', 2))";
    let mut command = Command::new("python3");
    command.args(["-c", script, disk.at.to_str().unwrap()]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut cutter = command.spawn().expect("python3, to cut the power");
    let mut line = String::new();
    BufReader::new(cutter.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    cutter
}

/// Lets a process write, cuts the power, and returns what it had acknowledged, by key.
fn strike(
    disk: &Disk,
    path: &Path,
    engine: Engine,
    first: u64,
    after: Duration,
    durability: Durability,
) -> Acknowledgements {
    let writing = Writing { path: path.to_owned(), engine, durability, first, keys: None, position: None };
    let writer = writing.start("with_sled_nothing_acknowledged_is_lost_in_a_power_cut");
    let mut acknowledged = Acknowledgements::new();
    // From the first acknowledgement on, it runs for the given time.
    for line in writer.until(|line| line.starts_with("claimed")) {
        note(&mut acknowledged, &line);
    }
    let mut cutter = cutter(disk);
    std::thread::sleep(after);
    // What counts is what was acknowledged up to now. A flush that is under way while ext4 is being shut down may be
    // told that it succeeded although it did not; after a power cut, nobody is there to be told so.
    for line in writer.lines.try_iter() {
        note(&mut acknowledged, &line);
    }
    cutter.stdin.take().unwrap().write_all(b"now\n").unwrap();
    assert!(cutter.wait().unwrap().success());
    // The process notices, and acknowledges nothing more.
    writer.until(|line| line == "poisoned");
    drop(writer);
    assert!(disk.unmount() && disk.mount());
    acknowledged
}

#[test]
fn with_sled_nothing_acknowledged_is_lost_in_a_power_cut() {
    // The process that is struck is this one, started anew.
    match Writing::of_this_process() {
        Some(writing) => writing.write(),
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
    let mut acknowledged = Acknowledgements::new();
    let mut first = 0;
    for round in 0..cuts {
        // From the midst of its beginnings to after many retirements.
        let after = Duration::from_millis([0, 3, 40, 150, 400][(round % 5) as usize] + round * 7);
        let new = strike(&disk, &path, engine, first, after, Durability::Strict);
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
        let new = strike(&disk, &path, engine, first, Duration::from_millis(50 + round * 60), Durability::Relaxed);
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
