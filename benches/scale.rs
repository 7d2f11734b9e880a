//! What the embedded store costs when it is large: `cargo bench --bench scale`.
//!
//! Fills a store with records (each claimed with 150 bytes, then completed with 600), then, each in a process of its own:
//! starts it again, looks records up at random, writes more of them, lets a part of them expire within a minute while it
//! serves. Then keeps a bounded number of records alive in a second store while three times their retention passes, on a
//! clock that runs as fast as they can be written. Lines that begin with `curve,` are for a plot.
//!
//! Environment:
//! - `ONCEGATE_SCALE_RECORDS`: how many (200,000)
//! - `ONCEGATE_SCALE_ENGINE`: `sled`, `fjall`, or both one after the other
//! - `ONCEGATE_SCALE_DIR`: where; the system's directory for temporary files otherwise. Takes about 1 KiB a record.
//! - `ONCEGATE_SCALE_EXPIRING`, `ONCEGATE_SCALE_CHURNING`: how many expire, how many are kept alive (a tenth of the records)
//! - `ONCEGATE_SCALE_FILL`: `relaxed` fills without a flush per group, and in larger groups; all else is `strict`
//! - `ONCEGATE_SCALE_MEMTABLE`: bytes that fjall gathers in memory, to try others than the built-in
//! - `ONCEGATE_SCALE_PLOT`: only draws the curves of this file (lines that begin with `curve,`) beside it, as SVG
//! - `ONCEGATE_SCALE_PHASES`: some of `fill,restart,serve,expire,churn` (all)
//!
//! CPU time is that of the whole process, all threads: the store's, the engine's, and the 64 tasks that write. The page
//! cache is left as it is: what has just been written mostly lies there, as it does when a service is restarted. RSS does
//! not count it. Compare ratios on one machine, not figures between machines.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, clippy::panic)]

use bytes::Bytes;
use oncegate::store::embedded::{Durability, Embedded, Engine, Options, Tuning};
use oncegate::store::{RecordId, Store, Swap, Tag, Urgency, Value};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const KEYS_GOING: u64 = 64;
const CLAIM: usize = 150;
const RESPONSE: usize = 600;
/// Far in the future.
const FAR: u64 = 1 << 42;
const START_MS: u64 = 1 << 40;
const DAY_MS: u64 = 86_400_000;
/// What records are written for. Those of one purpose are not those of another, nor those of an earlier run.
enum Purpose {
    Restart = 1,
    Serve,
    Expire,
    Before,
    During,
    Absent,
}

/// The first of many numbers that no record bears yet.
fn unused(purpose: Purpose) -> u64 {
    let time = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    (purpose as u64) << 60 | (time.as_millis() as u64) << 18
}

fn id(n: u64) -> RecordId {
    RecordId(xxhash_rust::xxh3::xxh3_128(&n.to_le_bytes()).to_le_bytes())
}

fn value(tag: u8, expires_at_ms: Option<u64>, n: u64, size: usize) -> Value {
    let mut bytes = vec![0; size];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    Value { tag: Tag(tag), expires_at_ms, bytes: Bytes::from(bytes) }
}

async fn pair(store: &Embedded, n: u64, now_ms: u64, expires_at_ms: u64) {
    let claim = value(0, None, n, CLAIM);
    let claim = store.compare_and_swap(id(n), None, Some(claim), now_ms, Urgency::Claim).await.unwrap();
    let Swap::Done(version) = claim else { unreachable!("{n} is new") };
    let completed = value(1, Some(expires_at_ms), n, RESPONSE);
    let swap = store.compare_and_swap(id(n), Some(version), Some(completed), now_ms, Urgency::Settle).await.unwrap();
    assert!(matches!(swap, Swap::Done(_)));
}

/// Writes the records of a range, so many at a time; `times` says when one is written and when it expires.
async fn write(
    store: &Arc<Embedded>,
    keys_going: u64,
    range: std::ops::Range<u64>,
    times: impl Fn(u64) -> (u64, u64) + Send + Sync + Clone + 'static,
) {
    let next = Arc::new(AtomicU64::new(range.start));
    let tasks: Vec<_> = (0..keys_going)
        .map(|_| {
            let (store, next, end, times) = (store.clone(), next.clone(), range.end, times.clone());
            tokio::spawn(async move {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= end {
                        return;
                    }
                    let (now_ms, expires_at_ms) = times(n);
                    pair(&store, n, now_ms, expires_at_ms).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

fn proc_status_mib(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) / 1024
}

fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Bytes that the files below a directory occupy.
fn disk(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    // One that has gone meanwhile occupies nothing.
    let size = |path: PathBuf| match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => disk(&path),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    };
    files.map(|file| size(file.path())).sum()
}

/// p50, p99, p99.9 and the largest, in milliseconds.
fn quantiles(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |q: f64| times[((times.len() - 1) as f64 * q) as usize].as_secs_f64() * 1e3;
    format!("p50 {:.3} ms, p99 {:.3} ms, p99.9 {:.3} ms, max {:.1} ms", at(0.5), at(0.99), at(0.999), at(1.0))
}

struct Setting {
    engine: Engine,
    dir: PathBuf,
    records: u64,
    expiring: u64,
    churning: u64,
}

impl Setting {
    fn open(&self, name: &str) -> Arc<Embedded> {
        self.open_with(name, Durability::Strict)
    }

    fn open_with(&self, name: &str, durability: Durability) -> Arc<Embedded> {
        let path = self.dir.join(name);
        let (engine, min_free_bytes) = (self.engine, 64 << 20);
        let options = Options { path, engine, create: true, min_free_bytes, durability };
        let mut tuning = Tuning::default();
        if let Some(bytes) = variable("MEMTABLE") {
            tuning.memtable_bytes = bytes.parse().expect("bytes");
        }
        Arc::new(Embedded::open_tuned(&options, tuning).unwrap())
    }

    fn say(&self, phase: &str, text: &str) {
        println!("{:?} {phase}: {text}", self.engine);
    }

    /// The curve: what a pair costs while the store grows from nothing.
    async fn fill(&self) {
        let relaxed = variable("FILL").is_some_and(|value| value == "relaxed");
        let (durability, keys_going) =
            if relaxed { (Durability::Relaxed, 16 * KEYS_GOING) } else { (Durability::Strict, KEYS_GOING) };
        let store = self.open_with("data", durability);
        // As large as a twentieth, and such that the first million is told apart.
        let step = (self.records / 20).clamp(1, 500_000);
        println!("curve,engine,records,cpu_us_per_pair,wall_us_per_pair,rss_mib,disk_bytes_per_record");
        let (mut done, all) = (0, Instant::now());
        while done < self.records {
            let end = (done + step).min(self.records);
            let (started, cpu_before) = (Instant::now(), cpu());
            write(&store, keys_going, done..end, |n| (START_MS + n / 64, FAR)).await;
            let per_pair = |time: Duration| time.as_secs_f64() * 1e6 / (end - done) as f64;
            let (wall, cpu_used) = (per_pair(started.elapsed()), per_pair(cpu() - cpu_before));
            let (rss, bytes) = (proc_status_mib("VmRSS:"), store.status().disk_bytes / end);
            println!("curve,{:?},{end},{cpu_used:.1},{wall:.1},{rss},{bytes}", self.engine);
            done = end;
        }
        let status = store.status();
        assert_eq!(status.entries[1], self.records);
        let rate = self.records as f64 / all.elapsed().as_secs_f64();
        let logged = status.bytes_written as f64;
        store.close();
        drop(store);
        let disk = disk(&self.dir.join("data")) as f64;
        self.say(
            "fill",
            &format!(
                "{} records, {rate:.0}/s; {:.0} bytes of log a record, disk {:.2} GB = {:.3} × log",
                self.records,
                logged / self.records as f64,
                disk / 1e9,
                disk / logged
            ),
        );
        self.say_rss("fill");
    }

    fn say_rss(&self, phase: &str) {
        self.say(phase, &format!("RSS {} MiB, at most {} MiB", proc_status_mib("VmRSS:"), proc_status_mib("VmHWM:")));
    }

    /// Until it is ready to serve, and then what the first pairs take, while index and log are still being compared.
    async fn restart(&self) {
        let (started, cpu_before) = (Instant::now(), cpu());
        let store = self.open("data");
        let (opened, opened_cpu, rss) = (started.elapsed(), cpu() - cpu_before, proc_status_mib("VmRSS:"));
        self.say("restart", &format!("ready after {opened:.2?} ({opened_cpu:.2?} of CPU), RSS {rss} MiB"));
        give_up_claims(&store).await;
        let waiting = store.clone();
        let compared = tokio::spawn(async move {
            compared(&waiting).await;
            started.elapsed()
        });
        let (first, mut n, mut times) = (unused(Purpose::Restart), 0, Vec::new());
        while !compared.is_finished() || n < 1000 {
            let begun = Instant::now();
            pair(&store, first + n, START_MS, FAR).await;
            times.push(begun.elapsed());
            n += 1;
        }
        let compared = compared.await.unwrap();
        let times = quantiles(times);
        self.say(
            "restart",
            &format!("index compared {compared:.2?} after the start; meanwhile, one at a time: {times}"),
        );
        // As it was.
        for n in first..first + n {
            let entry = store.get(id(n)).await.unwrap().unwrap();
            store.compare_and_swap(id(n), Some(entry.version), None, START_MS, Urgency::Settle).await.unwrap();
        }
        self.say_rss("restart");
        store.close();
    }

    /// Replays from the store, and more records.
    async fn serve(&self) {
        let store = self.open("data");
        give_up_claims(&store).await;
        compared(&store).await;
        let (look_ups, absent) = (self.records.min(100_000), unused(Purpose::Absent));
        for present in [true, false] {
            let mut times = Vec::new();
            let cpu_before = cpu();
            for n in 0..look_ups {
                // A walk through all of them in an order that is not theirs.
                let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % self.records;
                let begun = Instant::now();
                let found = store.get(id(if present { n } else { n + absent })).await.unwrap();
                times.push(begun.elapsed());
                assert_eq!(found.map(|entry| entry.value.bytes[..8] == n.to_le_bytes()), present.then_some(true));
            }
            let (which, cpu_used) = (if present { "there" } else { "absent" }, cpu() - cpu_before);
            let cpu_used = cpu_used.as_secs_f64() * 1e6 / look_ups as f64;
            self.say("look up", &format!("{which}: {}; {cpu_used:.1} µs of CPU", quantiles(times)));
        }
        self.say_rss("look up");
        let more = (self.records / 10).min(1_000_000);
        let (started, cpu_before) = (Instant::now(), cpu());
        let first = unused(Purpose::Serve);
        write(&store, KEYS_GOING, first..first + more, |_| (START_MS, FAR)).await;
        let per_pair = |time: Duration| time.as_secs_f64() * 1e6 / more as f64;
        let (cpu_used, wall) = (per_pair(cpu() - cpu_before), per_pair(started.elapsed()));
        self.say("write", &format!("{more} more: {cpu_used:.1} µs of CPU, {wall:.1} µs a pair"));
        self.say_rss("write");
        store.close();
    }

    /// Many records expire within a minute, while a pair is begun every millisecond.
    async fn expire(&self) {
        let store = self.open("data");
        give_up_claims(&store).await;
        compared(&store).await;
        let (begin_ms, many, first) = (START_MS + DAY_MS, self.expiring, unused(Purpose::Expire));
        write(&store, KEYS_GOING, first..first + many, move |n| (begin_ms, begin_ms + (n - first) * 60_000 / many))
            .await;
        let paced = Paced::start(&store, unused(Purpose::Before), begin_ms);
        tokio::time::sleep(Duration::from_secs(10)).await;
        let before = paced.stop().await;
        let paced = Paced::start(&store, unused(Purpose::During), begin_ms);
        let (started, swept_before) = (Instant::now(), store.status().swept);
        let cpu_before = cpu();
        while store.status().swept - swept_before < many {
            let wait = store.sweep(begin_ms + started.elapsed().as_millis() as u64).await.unwrap();
            tokio::time::sleep(wait).await;
        }
        let (elapsed, cpu_used) = (started.elapsed(), cpu() - cpu_before);
        let during = paced.stop().await;
        self.say(
            "expire",
            &format!("{many} records within 60 s: gone after {elapsed:.1?}, {cpu_used:.1?} of CPU with the pairs"),
        );
        self.say("expire", &format!("pairs before: {}", quantiles(before)));
        self.say("expire", &format!("pairs during: {}", quantiles(during)));
        self.say_rss("expire");
        store.close();
    }

    /// Three days of records that live for one. The sweep keeps up, as it does when a day takes a day.
    async fn churn(&self) {
        let store = self.open("churn");
        let (live, steps) = (self.churning, 50);
        let mut ratios = Vec::new();
        let (started, cpu_before) = (Instant::now(), cpu());
        for step in 0..3 * steps {
            let range = live * step / steps..live * (step + 1) / steps;
            let time_ms = move |n: u64| START_MS + n * DAY_MS / live;
            let now_ms = time_ms(range.end);
            write(&store, KEYS_GOING, range, move |n| (time_ms(n), time_ms(n) + DAY_MS)).await;
            while store.sweep(now_ms).await.unwrap() < Duration::from_millis(500) {}
            if step >= 2 * steps {
                let status = store.status();
                let pairs = live * (step + 1) / steps;
                let recorded = status.entries[1] * status.bytes_written / pairs;
                ratios.push(disk(&self.dir.join("churn")) as f64 / recorded as f64);
            }
        }
        let cpu_used = (cpu() - cpu_before).as_secs_f64() * 1e6 / (3 * live) as f64;
        let (log, alive) = (store.status().bytes_written / (3 * live), store.status().entries[1]);
        let (last, most) = (ratios[ratios.len() - 1], ratios.iter().copied().fold(0.0, f64::max));
        self.say(
            "churn",
            &format!(
                "3 × {live} records in {:.0?}, {cpu_used:.1} µs of CPU a pair and its sweep; {alive} alive; disk {last:.2} (at most {most:.2}) × \
                 what they took to record ({log} bytes each), {:.2} (at most {:.2}) × their {RESPONSE} bytes",
                started.elapsed(),
                last * log as f64 / RESPONSE as f64,
                most * log as f64 / RESPONSE as f64,
            ),
        );
        self.say_rss("churn");
        store.close();
    }
}

/// Claims of a run that was ended in the middle are given up, as a gateway settles them at its start: replay begins at the
/// oldest.
async fn give_up_claims(store: &Embedded) {
    for (id, entry) in store.unexpiring().unwrap() {
        store.compare_and_swap(id, Some(entry.version), None, START_MS, Urgency::Settle).await.unwrap();
    }
}

/// Waits until the index has been compared with its checkpoint: only then a sweep does anything.
async fn compared(store: &Embedded) {
    loop {
        let wait = store.sweep(0).await.unwrap();
        if wait > Duration::from_millis(500) {
            return;
        }
        tokio::time::sleep(wait).await;
    }
}

/// A pair every millisecond, however long they take.
struct Paced {
    stop: Arc<AtomicBool>,
    times: Arc<Mutex<Vec<Duration>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Paced {
    fn start(store: &Arc<Embedded>, base: u64, now_ms: u64) -> Self {
        let (stop, times) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (store, stopped, taken) = (store.clone(), stop.clone(), times.clone());
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(1));
            for n in base.. {
                let due = ticks.tick().await.into_std();
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (store, taken) = (store.clone(), taken.clone());
                tokio::spawn(async move {
                    pair(&store, n, now_ms, FAR).await;
                    taken.lock().unwrap().push(due.elapsed());
                });
            }
        });
        Self { stop, times, task }
    }

    /// What they took, from when they were due.
    async fn stop(self) -> Vec<Duration> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
        // The last ones.
        tokio::time::sleep(Duration::from_secs(1)).await;
        std::mem::take(&mut *self.times.lock().unwrap())
    }
}

const PHASE: &str = "ONCEGATE_SCALE_PHASE";
const PHASES: &str = "fill,restart,serve,expire,churn";

fn variable(name: &str) -> Option<String> {
    std::env::var(format!("ONCEGATE_SCALE_{name}")).ok()
}

/// CPU per pair over the records that are there, one line for each engine.
fn plot(curves: &Path) {
    use plotters::prelude::*;
    let text = std::fs::read_to_string(curves).expect("the file of curves");
    let curve = |engine: &str| {
        let of_engine =
            text.lines().filter_map(|line| line.strip_prefix("curve,")?.strip_prefix(engine)?.strip_prefix(','));
        let point = |line: &str| {
            let mut numbers = line.split(',').map(|number| number.parse::<f64>().unwrap());
            (numbers.next().unwrap() / 1e6, numbers.next().unwrap())
        };
        of_engine.map(point).collect::<Vec<_>>()
    };
    let curves_of = [("Sled", RGBColor(217, 80, 2)), ("Fjall", RGBColor(60, 120, 190))].map(|(e, c)| (e, c, curve(e)));
    let all = || curves_of.iter().flat_map(|(_, _, points)| points);
    let (right, top) = all().fold((0.0_f64, 0.0_f64), |(x, y), point| (x.max(point.0), y.max(point.1)));
    let svg = curves.with_extension("svg");
    let root = SVGBackend::new(&svg, (900, 400)).into_drawing_area();
    root.fill(&WHITE).unwrap();
    let mut chart = ChartBuilder::on(&root)
        .caption("CPU per claim and settle, µs, over millions of records", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(28)
        .y_label_area_size(40)
        .build_cartesian_2d(0.0..right, 0.0..top * 1.1)
        .unwrap();
    chart.configure_mesh().light_line_style(WHITE).draw().unwrap();
    for (engine, colour, points) in curves_of {
        let line = LineSeries::new(points, colour.stroke_width(2));
        let drawn = chart.draw_series(line).unwrap().label(engine.to_lowercase());
        drawn.legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE).draw().unwrap();
    root.present().unwrap();
}

fn main() {
    if let Some(curves) = variable("PLOT") {
        return plot(Path::new(&curves));
    }
    // `cargo test --benches` only wants to know whether it starts.
    let quick = std::env::args().any(|arg| arg == "--test");
    let number = |name: &str| variable(name).map(|text| text.replace('_', "").parse::<u64>().expect(name));
    let records = number("RECORDS").unwrap_or(if quick { 1000 } else { 200_000 });
    let tenth = (records / 10).max(100);
    let engines = match variable("ENGINE").as_deref() {
        None => vec![Engine::Sled, Engine::Fjall],
        Some("sled") => vec![Engine::Sled],
        Some("fjall") => vec![Engine::Fjall],
        Some(other) => panic!("no engine {other}"),
    };
    let setting = |engine, dir| Setting {
        engine,
        dir,
        records,
        expiring: number("EXPIRING").unwrap_or(tenth),
        churning: number("CHURNING").unwrap_or(tenth),
    };
    if let Ok(phase) = std::env::var(PHASE) {
        let setting = setting(engines[0], PathBuf::from(variable("DIR").unwrap()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime.block_on(async {
            match phase.as_str() {
                "fill" => setting.fill().await,
                "restart" => setting.restart().await,
                "serve" => setting.serve().await,
                "expire" if !quick => setting.expire().await,
                "churn" => setting.churn().await,
                _ => {}
            }
        });
    }
    for engine in engines {
        let name = if engine == Engine::Sled { "sled" } else { "fjall" };
        let (dir, kept);
        match variable("DIR") {
            // Whoever names a directory may run phase after phase.
            Some(given) => {
                dir = Path::new(&given).join(name);
                std::fs::create_dir_all(&dir).unwrap();
                kept = None;
            }
            None => {
                let temporary = tempfile::tempdir().unwrap();
                dir = temporary.path().to_owned();
                kept = Some(temporary);
            }
        }
        for phase in variable("PHASES").as_deref().unwrap_or(PHASES).split(',') {
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(std::env::args_os().skip(1)).env(PHASE, phase);
            let status = child.env("ONCEGATE_SCALE_ENGINE", name).env("ONCEGATE_SCALE_DIR", &dir).status().unwrap();
            assert!(status.success(), "{phase}: {status}");
        }
        drop(kept);
    }
}
