//! What the gateway costs beside its peers: `cargo bench --bench load`.
//!
//! Starts a small upstream, the gateway, and those of nginx (as a proxy, as a cache keyed on the idempotency key, as a
//! bare server) and haproxy that are installed; each proxy runs on one core, load and upstream on another. The
//! contestants of a workload take turns, round by round; a figure is the median of the rounds in which the machine was
//! quiet. Every phase checks that the upstream executed exactly as often as it should have.
//!
//! Costs are those of the proxy alone: the CPU clocks of its processes, ended threads and what a load leaves to be done
//! in the background included, over a counted number of requests. Compare ratios on one machine, not figures between
//! machines. All traffic stays on 127.0.0.1.
//!
//! Beside them `scale`: start, idle connections, waiters, sizes.
//!
//! Environment, all with the prefix `ONCEGATE_BENCH_`: `WORKLOADS` and `CONTESTANTS` (names with commas between; also
//! `oncegate-memory` and `oncegate-fjall`), `BINARY` (builds of the gateway that take part side by side instead of this
//! one: `PATH`, named by its file name, or `NAME=PATH`, with commas between), `ROUNDS` (5 quiet ones; twice as
//! many, or `ROUNDS_MAX`, are tried), `REQUESTS` (a phase, 40,000), `CONNECTIONS` (64), `SETTINGS`
//! (further lines of the gateway's configuration), `DIR` (for the stores; default: that for temporary files), and
//! `WRITE=1`, which keeps the raw run under `benches/runs`, draws its plots, and puts the table into the README.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub
)]

mod contestants;
mod ends;
mod h2load;
mod http;
mod measure;
mod plot;
mod readme;
mod report;
mod rounds;
mod scale;
mod servers;
mod settings;
mod workloads;

use anyhow::{Result, bail};
use contestants::{Certificate, Kind, PEERS};
use measure::Cores;
use rounds::{Bench, LeftOut};
use std::collections::BTreeMap;
use std::time::Instant;
use workloads::Front;

fn main() -> Result<()> {
    // `cargo test --benches` only wants to know whether it works.
    let arguments = std::env::args().collect::<Vec<_>>();
    let quick = arguments.iter().any(|argument| argument == "--test") || !arguments.iter().any(|a| a == "--bench");
    let settings = settings::Settings::from_env(quick)?;
    let cores = Cores::find()?;
    if !cores.are_two() && !quick {
        bail!("the proxy and its load need a core each, and there is only one");
    }
    measure::pin(cores.ends)?;
    scale::raise_open_files()?;
    let dir = match &settings.dir {
        Some(dir) => tempfile::tempdir_in(dir)?,
        None => tempfile::tempdir()?,
    };
    let started = Instant::now();
    let commit_before = measure::Commit::measure(dir.path(), cores)?;
    let mut bench = Bench {
        settings: &settings,
        cores,
        ends: ends::Ends::new()?,
        certificate: Certificate::new()?,
        dir: dir.path(),
        phases: Vec::new(),
        left_out: Vec::new(),
    };

    let (kinds, mut versions) = installed(&mut bench);
    let h2load = report::h2load_version();
    for workload in &settings.workloads {
        match &h2load {
            Err(error) if workload.front != Front::Http1 => {
                bench.left_out.push(LeftOut::new(workload.name.to_owned(), error));
            }
            _ => bench.run(workload, &kinds),
        }
    }
    if let Ok(version) = h2load {
        versions.insert("h2load".to_owned(), version);
    }
    let figures = if settings.scale { scale::all(&mut bench, &kinds) } else { Vec::new() };

    let summaries = settings
        .workloads
        .iter()
        .flat_map(|workload| rounds::summarize(workload, &settings.gateways, &bench.phases))
        .collect::<Vec<_>>();
    let run = report::Run {
        date: report::today()?,
        commit: report::commit(),
        cpu: report::cpu_model(),
        kernel: report::kernel(),
        versions,
        commits: [commit_before, measure::Commit::measure(dir.path(), cores)?],
        settings: &settings,
        left_out: &bench.left_out,
        phases: &bench.phases,
        scale: &figures,
    };
    let table = report::table(&run, &settings.workloads, &summaries, started.elapsed());
    println!("{table}");
    if let Some(LeftOut { who, why, .. }) = bench.left_out.iter().find(|left_out| left_out.failed) {
        bail!("{who}: {why}; nothing is written");
    }
    if settings.write {
        report::write(&run, &table, &summaries)?;
    }
    Ok(())
}

/// Who takes part, and in which versions.
fn installed(bench: &mut Bench<'_>) -> (Vec<Kind>, BTreeMap<String, String>) {
    let (mut kinds, mut versions) = (Vec::new(), BTreeMap::new());
    let all = PEERS.into_iter().chain(bench.settings.gateways.iter().copied());
    for kind in all.filter(|kind| bench.settings.wants(*kind)) {
        match kind.version() {
            Ok(version) => {
                let program = version.split(['/', ' ', ':']).next().unwrap_or_default();
                versions.insert(program.to_owned(), version.replace(" - https://haproxy.org/", ""));
                kinds.push(kind);
            }
            Err(error) => bench.left_out.push(LeftOut::new(kind.to_string(), &error)),
        }
    }
    (kinds, versions)
}
