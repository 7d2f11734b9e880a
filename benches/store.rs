//! What the embedded store costs: `cargo bench --bench store`.
//!
//! One producer keeps 64 keys going, each claimed (150 bytes) and then completed (600 bytes); then the store is closed
//! and opened again with all its records. Environment: `ONCEGATE_BENCH_RECORDS` (1,000,000), `ONCEGATE_BENCH_DIR` (the
//! system's directory for temporary files), `ONCEGATE_BENCH_DURABILITY` (`strict` or `relaxed`), `ONCEGATE_BENCH_ENGINE` (`sled`
//! or `fjall`).
//! CPU time is that of the whole process, all threads. Compare ratios on one machine, not figures between machines.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout)]

use bytes::Bytes;
use oncegate::store::embedded::{Durability, Embedded, Engine, Options};
use oncegate::store::{RecordId, Store, Swap, Tag, Urgency, Value};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const KEYS_GOING: usize = 64;

fn id(n: u64) -> RecordId {
    let hash = xxhash_rust::xxh3::xxh3_128(&n.to_le_bytes());
    RecordId(hash.to_le_bytes())
}

fn value(tag: u8, expires_at_ms: Option<u64>, n: u64, size: usize) -> Value {
    let mut bytes = vec![0; size];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    Value { tag: Tag(tag), expires_at_ms, bytes: Bytes::from(bytes) }
}

async fn pair(store: &Embedded, n: u64) {
    let claim = store.compare_and_swap(id(n), None, Some(value(0, None, n, 150)), n, Urgency::Claim).await.unwrap();
    let Swap::Done(version) = claim else { unreachable!("{n} is new") };
    let completed = value(1, Some(1 << 42), n, 600);
    let swap = store.compare_and_swap(id(n), Some(version), Some(completed), n, Urgency::Settle).await.unwrap();
    assert!(matches!(swap, Swap::Done(_)));
}

fn proc_self(file: &str, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
}

fn rss_mib() -> u64 {
    proc_self("status", "VmRSS:") / 1024
}

fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn main() {
    // `cargo test --benches` only wants to know whether it starts.
    let quick = std::env::args().any(|arg| arg == "--test");
    let records = std::env::var("ONCEGATE_BENCH_RECORDS").ok().and_then(|n| n.parse().ok());
    let records: u64 = records.unwrap_or(if quick { 1000 } else { 1_000_000 });
    let relaxed = std::env::var("ONCEGATE_BENCH_DURABILITY").is_ok_and(|value| value == "relaxed");
    let durability = if relaxed { Durability::Relaxed } else { Durability::Strict };
    let fjall = std::env::var("ONCEGATE_BENCH_ENGINE").is_ok_and(|value| value == "fjall");
    let engine = if fjall { Engine::Fjall } else { Engine::Sled };
    let dir = match std::env::var_os("ONCEGATE_BENCH_DIR") {
        Some(dir) => tempfile::tempdir_in(dir).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    let options = Options { path: dir.path().join("data"), engine, create: true, min_free_bytes: 64 << 20, durability };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();

    let store = Arc::new(Embedded::open(&options).unwrap());
    let next = Arc::new(AtomicU64::new(0));
    let (written, cpu_before, started) = (proc_self("io", "write_bytes:"), cpu(), Instant::now());
    runtime.block_on(async {
        let tasks: Vec<_> = (0..KEYS_GOING)
            .map(|_| {
                let (store, next) = (store.clone(), next.clone());
                tokio::spawn(async move {
                    loop {
                        let n = next.fetch_add(1, Ordering::Relaxed);
                        if n >= records {
                            return;
                        }
                        pair(&store, n).await;
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
    let (elapsed, cpu_used) = (started.elapsed(), cpu() - cpu_before);
    let status = store.status();
    assert_eq!(status.entries[1], records);
    println!("{engine:?}: {records} pairs, {durability:?}, {KEYS_GOING} keys going");
    println!(
        "| pairs/s | CPU µs per pair | bytes to disk per pair | log bytes per pair | writes per batch | RSS MiB |"
    );
    println!("|---|---|---|---|---|---|");
    println!(
        "| {:.0} | {:.1} | {} | {} | {:.1} | {} |",
        records as f64 / elapsed.as_secs_f64(),
        cpu_used.as_secs_f64() * 1e6 / records as f64,
        (proc_self("io", "write_bytes:") - written) / records,
        status.bytes_written / records,
        status.batched_writes as f64 / status.batches as f64,
        rss_mib(),
    );
    let rss_before_close = rss_mib();
    let started = Instant::now();
    store.close();
    drop(store);
    let closed = started.elapsed();

    let rss_closed = rss_mib();
    // The log lies in the page cache.
    let (mut opened, mut opened_cpu) = (Duration::MAX, Duration::MAX);
    for _ in 0..3 {
        let (started, cpu_before) = (Instant::now(), cpu());
        drop(Embedded::open(&options).unwrap());
        (opened, opened_cpu) = (opened.min(started.elapsed()), opened_cpu.min(cpu() - cpu_before));
    }
    let store = Embedded::open(&options).unwrap();
    let rss_open = rss_mib();
    let started = Instant::now();
    while runtime.block_on(store.sweep(0)).unwrap() < Duration::from_millis(500) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let surveyed = started.elapsed();
    let status = store.status();
    assert_eq!(status.entries[1], records);
    let look_ups = records.min(100_000);
    let look_up = |present: bool| {
        let started = Instant::now();
        runtime.block_on(async {
            for n in 0..look_ups {
                // A walk through all of them in an order that is not theirs.
                let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % records;
                let found = store.get(id(if present { n } else { n + records })).await.unwrap();
                assert_eq!(found.map(|entry| entry.value.bytes[..8] == n.to_le_bytes()), present.then_some(true));
            }
        });
        started.elapsed().as_secs_f64() * 1e6 / look_ups as f64
    };
    let (present, absent) = (look_up(true), look_up(false));
    println!();
    println!(
        "| close | reopen, best of 3: time / CPU | index compared after another | RSS MiB before close / closed / reopened | disk MiB | look-up µs: present / absent |"
    );
    println!("|---|---|---|---|---|---|");
    println!(
        "| {closed:.2?} | {opened:.2?} / {opened_cpu:.2?} | {surveyed:.2?} | {rss_before_close} / {rss_closed} / {rss_open} | {} | {present:.1} / {absent:.1} |",
        status.disk_bytes >> 20,
    );
    store.close();
    let started = Instant::now();
    drop(store);
    std::fs::remove_dir_all(options.path.join("index")).unwrap();
    let store = Embedded::open(&options).unwrap();
    println!("\nrebuilding the index from the log: {:.1?}", started.elapsed());
    assert_eq!(store.status().entries[1], records);
}
