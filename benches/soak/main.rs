//! An hour of steady load with faults: does anything grow? `cargo bench --bench soak`.
//!
//! Two gateways, one for each embedded engine, run at the same time, each before an upstream of its own in this process.
//! Each gets some 400 requests a second, so that its index is flushed and merged many times: new keys, retries of young
//! and old ones (after their retention, too), concurrent duplicates, requests without a key, malformed ones, clients that
//! hang up or send half a body; the upstream answers late, not at all, too much, 429, 500, 502, 503, or breaks off. Now
//! and then it is shut for a second, or the gateway is stopped for 300 ms. Records are kept for three minutes, unknown
//! ones for one.
//!
//! All the time, each answer is judged by what the contract allows in its situation, and each arrival at the upstream by
//! what has been executed. Every ten seconds it is noted what a gateway takes; the first quarter is warm-up, then a line is
//! laid through each figure's means over two minutes. Fails if one of them is not flat, or anything was not allowed.
//!
//! Environment:
//! - `ONCEGATE_SOAK_MINUTES`: how long (60)
//! - `ONCEGATE_SOAK_DIR`: where; the system's directory for temporary files otherwise
//! - `ONCEGATE_SOAK_CSV`: writes the samples to this file
//! - `ONCEGATE_SEED`: repeats a run's choices
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod judge;
mod load;
mod process;
#[allow(dead_code, reason = "shared with tests")]
#[path = "../../tests/audit/random.rs"]
mod random;
mod script;
mod slope;
mod upstream;
mod wire;
mod world;

use process::Gateway;
use random::Random;
use slope::Sample;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};
use upstream::Upstream;
use world::World;

const EVERY: Duration = Duration::from_secs(10);
const TOLD_EVERY: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    // `cargo test --benches` only wants to know whether it works.
    let quick = !std::env::args().any(|argument| argument == "--bench");
    let variable = |name: &str| std::env::var(format!("ONCEGATE_{name}")).ok();
    let minutes = variable("SOAK_MINUTES").map(|text| text.parse::<f64>().expect("minutes"));
    let length = Duration::from_secs_f64(60.0 * minutes.unwrap_or(if quick { 0.05 } else { 60.0 }));
    let seed = variable("SEED").map_or_else(|| u64::from(std::process::id()), |text| text.parse().expect("a seed"));
    let temporary = tempfile::tempdir().unwrap();
    let dir = variable("SOAK_DIR").map_or_else(|| temporary.path().to_owned(), PathBuf::from);
    println!("{:.1} minutes, seed {seed}", length.as_secs_f64() / 60.0);
    let mut random = Random(seed);
    let runs = ["sled", "fjall"].map(|engine| {
        let (dir, random) = (dir.clone(), random.fork(1));
        thread::spawn(move || soak(engine, &dir, length, random))
    });
    let (mut csv, mut good) = (String::from("engine,s"), true);
    for figure in slope::FIGURES {
        csv += &format!(",{}", figure.replace(", ", "_"));
    }
    csv.push('\n');
    let mut tables = String::new();
    for run in runs {
        let outcome = run.join().expect("a run to the end");
        tables += &outcome.table;
        csv += &outcome.csv;
        good &= outcome.good;
    }
    println!(
        "\n| engine | figure | mean | slope per hour | its standard error | |\n|---|---|---|---|---|---|\n{tables}"
    );
    if let Some(path) = variable("SOAK_CSV") {
        std::fs::write(path, csv).unwrap();
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

struct Outcome {
    table: String,
    csv: String,
    good: bool,
}

fn soak(engine: &'static str, dir: &Path, length: Duration, mut random: Random) -> Outcome {
    let world = Arc::new(World::new(engine));
    let upstream = Upstream::start(&world);
    let gateway = Gateway::start(dir, engine, upstream.addr);
    let end = Instant::now() + length;
    let (load_random, revisit_random, mut fault_random) = (random.fork(2), random.fork(3), random.fork(4));
    let (stop_sampling, sampling) = channel::<()>();
    let (stop_faults, faults) = channel::<()>();
    let samples = thread::scope(|scope| {
        let (gateway, upstream, shared) = (&gateway, &*upstream, &*world);
        let samples = scope.spawn(move || sample(gateway, shared, length, &sampling));
        scope.spawn(move || disturb(gateway, upstream, shared, &mut fault_random, &faults));
        load::run(&world, gateway.addr, load_random, end);
        drop((stop_faults, stop_sampling));
        samples.join().unwrap()
    });
    gateway.settles(&world);
    let in_progress = || world.answers.lock().unwrap().get("409 in_progress").copied();
    let before = in_progress();
    load::revisit(&world, gateway.addr, revisit_random);
    if in_progress() != before {
        world.violated("in progress, when nothing is");
    }
    gateway.settles(&world);
    gateway.end(&world);
    let answers = std::mem::take(&mut *world.answers.lock().unwrap());
    let counted = answers.iter().map(|(label, count)| format!("{label}: {count}")).collect::<Vec<_>>().join(", ");
    println!("{engine}: {} requests: {counted}", answers.values().sum::<u64>());
    println!("{engine}: {} violations", world.violations());
    let (table, flat) = slope::table(engine, &samples, length);
    Outcome { table, csv: slope::csv(engine, &samples), good: flat && world.violations() == 0 }
}

/// Whether there is still time after the pause.
fn pause(stop: &Receiver<()>, time: Duration) -> bool {
    stop.recv_timeout(time) == Err(RecvTimeoutError::Timeout)
}

fn sample(gateway: &Gateway, world: &World, length: Duration, stop: &Receiver<()>) -> Vec<Sample> {
    let mut samples: Vec<Sample> = Vec::new();
    let mut told = Instant::now();
    while pause(stop, EVERY.min(length / 60)) {
        let sample = gateway.sample(world);
        if told.elapsed() >= TOLD_EVERY {
            told = Instant::now();
            let bench = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
            let pages = bench.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
            let figures = slope::FIGURES.iter().zip(sample.figures).map(|(what, figure)| format!("{what} {figure:.2}"));
            let figures = figures.collect::<Vec<_>>().join("; ");
            println!(
                "{} after {:.0} s: {figures}; {} violations; the load itself {} MiB",
                world.name,
                sample.at.as_secs_f64(),
                world.violations(),
                pages / 256
            );
        }
        samples.push(sample);
    }
    samples
}

/// Stops the gateway, or shuts the upstream, every half minute or so.
fn disturb(gateway: &Gateway, upstream: &Upstream, world: &World, random: &mut Random, stop: &Receiver<()>) {
    while pause(stop, random.ms(15_000, 45_000)) {
        let (away, shut) = (random.ms(200, 1500), random.percent(50));
        world.disturb(|| if shut { upstream.shut(away, world) } else { gateway.stop_for(Duration::from_millis(300)) });
    }
}
