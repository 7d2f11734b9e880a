//! What a request costs in system calls and heap allocations: `cargo bench --bench costs`.
//!
//! One client sends one request after the other over one connection that stays open. The allocations of a gateway in
//! this process are counted by its allocator; the system calls of a gateway of its own (and of nginx, where it is
//! installed) by `strace`, as the difference between a run of n and one of 2n requests, so that start and end do not
//! count. Both must stay below [`BOUNDS`]. `ONCEGATE_BENCH_WRITE=1` puts the table into the README.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub,
    dead_code
)]

#[path = "load/contestants.rs"]
mod contestants;
#[path = "load/ends.rs"]
mod ends;
#[path = "load/http.rs"]
mod http;
#[path = "load/measure.rs"]
mod measure;
#[path = "load/readme.rs"]
mod readme;
#[path = "load/servers.rs"]
mod servers;
#[path = "load/workloads.rs"]
mod workloads;

use anyhow::{Context, Result, anyhow, bail, ensure};
use contestants::{Certificate, Contestant, Kind, Setting, first_line};
use ends::Ends;
use measure::Cores;
use oncegate::config::{self, Flags};
use oncegate::run;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use std::alloc::System;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use workloads::{Keys, Requests, WORKLOADS, Workload};

/// All memory of this process: the gateway's, for the ends of the load take none once they are warm.
#[global_allocator]
static HEAP: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// What a request may cost at most, on a connection that stays open, with one of them in flight.
struct Bound {
    workload: &'static str,
    system_calls_max: f64,
    allocations_max: f64,
}

/// What was measured and a little for timers and background work; whoever makes the path cheaper lowers them.
const BOUNDS: [Bound; 3] = [
    // On either side one wait, one read, one write.
    Bound { workload: "get", system_calls_max: 6.2, allocations_max: 9.5 },
    // The body goes with its head: no call more.
    Bound { workload: "post", system_calls_max: 6.2, allocations_max: 12.5 },
    // The client's side alone: nothing of the store, nothing of the upstream.
    Bound { workload: "replay", system_calls_max: 3.2, allocations_max: 27.5 },
];
/// Told without a bound: the store's groups vary.
const FREE: &[&str] = &["fresh"];

const WARM_UP: usize = 1000;
const REQUESTS: usize = 2000;
const PATIENCE: Duration = Duration::from_secs(20);

/// Calls per request by name.
type Calls = BTreeMap<String, f64>;

struct Row {
    workload: &'static Workload,
    /// Why there are none, else.
    calls: Result<Calls>,
    nginx_calls: Result<Calls>,
    allocations: f64,
    allocated_bytes: f64,
}

fn main() -> Result<()> {
    let names = BOUNDS.iter().map(|bound| bound.workload).chain(FREE.iter().copied()).collect::<Vec<_>>();
    let dir = tempfile::tempdir()?;
    let mut ends = Ends::new()?;
    let mut rows = Vec::new();
    for workload in WORKLOADS.iter().filter(|workload| names.contains(&workload.name)) {
        let own = dir.path().join(workload.name);
        fs::create_dir(&own)?;
        let (allocations, allocated_bytes) = allocations(&mut ends, workload, &own)?;
        let gateway = Kind::gateways("oncegate", Path::new(env!("CARGO_BIN_EXE_oncegate")))[0];
        let calls = system_calls(&mut ends, gateway, workload, &own);
        let nginx = if workload.keys == Keys::None { Kind::Nginx } else { Kind::NginxCache };
        let nginx_calls = system_calls(&mut ends, nginx, workload, &own);
        rows.push(Row { workload, calls, nginx_calls, allocations, allocated_bytes });
    }
    let table = table(&rows);
    println!("{table}");
    // `cargo test --benches` only wants to know whether it works.
    if !std::env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    for Bound { workload, system_calls_max, allocations_max } in BOUNDS {
        let row = rows.iter().find(|row| row.workload.name == workload).context(workload)?;
        ensure!(
            row.allocations <= allocations_max,
            "{workload}: {:.2} heap allocations per request, more than {allocations_max}",
            row.allocations
        );
        if let Ok(calls) = &row.calls {
            let calls = calls.values().sum::<f64>();
            ensure!(calls <= system_calls_max, "{workload}: {calls:.2} system calls, more than {system_calls_max}");
        }
    }
    if std::env::var("ONCEGATE_BENCH_WRITE").is_ok_and(|text| text == "1") {
        readme::replace("costs", &table)?;
    }
    Ok(())
}

/// The settings of a gateway with one worker.
fn gateway_config(upstream: SocketAddr, data: &Path) -> String {
    format!(
        "server.listen = \"127.0.0.1:0\"\nserver.workers = 1\nadmin.listen = \"127.0.0.1:0\"\n\
         upstream.url = \"http://{upstream}\"\nstore.path = {:?}\n",
        data.display().to_string()
    )
}

/// How often a gateway in this process takes memory for a request (taking more for what it has counts too), and how many bytes.
fn allocations(ends: &mut Ends, workload: &Workload, dir: &Path) -> Result<(f64, f64)> {
    let file = dir.join("in-process.toml");
    fs::write(&file, gateway_config(ends.upstream(), &dir.join("in-process")))?;
    let (config, _) = config::load(Some(&file), [], &Flags::default())?;
    let (tell, told) = std::sync::mpsc::channel();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let gateway = std::thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let running = run::start(config, false).await?;
            tell.send(running.addresses().first().context("an address")?.to_string())?;
            running.until(async { stopped.await.unwrap_or(()) }).await;
            Ok(())
        })
    });
    // Without an address the thread says why.
    let Ok(address) = told.recv() else { return joined(gateway).and_then(|()| bail!("the gateway ended")) };

    let mut requests = Requests::new(workload);
    let clients = ends.connect(address.parse()?, 1)?;
    warm_up(ends, &clients, &mut requests, workload)?;
    let before = HEAP.stats();
    ends.load(&clients, requests.begin(workload.keys), REQUESTS, None)?;
    let used = HEAP.stats() - before;
    ends.disconnect(clients);

    let _ = stop.send(());
    joined(gateway)?;
    let each = |sum: usize| sum as f64 / REQUESTS as f64;
    Ok((each(used.allocations + used.reallocations), each(used.bytes_allocated)))
}

fn joined(thread: JoinHandle<Result<()>>) -> Result<()> {
    thread.join().map_err(|_| anyhow!("the gateway panicked"))?
}

/// Opens the connection to the upstream, and makes the records that the workload wants.
fn warm_up(ends: &mut Ends, clients: &[usize], requests: &mut Requests, workload: &Workload) -> Result<()> {
    if let Keys::Recorded(records) = workload.keys {
        ends.load(clients, requests.begin(Keys::Fresh), records as usize, None)?;
    }
    ends.load(clients, requests.begin(workload.keys), WARM_UP, None)?;
    Ok(())
}

fn system_calls(ends: &mut Ends, kind: Kind, workload: &Workload, dir: &Path) -> Result<Calls> {
    first_line("strace", "--version")?;
    kind.version()?;
    let mut of = |count| counted_calls(ends, kind, workload, &dir.join(format!("{kind}-{count}")), count);
    let (once, twice) = (of(REQUESTS)?, of(2 * REQUESTS)?);
    let each = |(name, calls): (String, f64)| {
        let more = (calls - once.get(&name).copied().unwrap_or_default()) / REQUESTS as f64;
        (name, more)
    };
    // What is rarer than one in a hundred requests is not the path's.
    Ok(twice.into_iter().map(each).filter(|(_, calls)| *calls >= 0.01).collect())
}

/// All calls that a proxy does in its life, with so many requests in it.
fn counted_calls(ends: &mut Ends, kind: Kind, workload: &Workload, dir: &Path, count: usize) -> Result<Calls> {
    fs::create_dir(dir)?;
    let summary = dir.join("strace");
    let setting = Setting {
        cores: Cores::find()?,
        upstream: ends.upstream(),
        certificate: &Certificate::new()?,
        gateway: "",
        strace: Some(&summary),
    };
    let mut contestant = Contestant::start(kind, workload, &setting, dir)?;
    let mut requests = Requests::new(workload);
    let clients = ends.connect(contestant.address, 1)?;
    warm_up(ends, &clients, &mut requests, workload)?;
    ends.load(&clients, requests.begin(workload.keys), count, None)?;
    ends.disconnect(clients);
    contestant.stop()?;
    // The tracer writes it when its last process has ended.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = fs::read_to_string(&summary).unwrap_or_default();
        if text.trim_end().ends_with(" total") {
            return Ok(text.lines().filter_map(calls).filter(|(name, _)| name != "total").collect());
        }
        if Instant::now() > deadline {
            bail!("strace does not come to an end: {text}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A line of strace's summary: share, seconds, µs per call, calls, perhaps errors, name.
fn calls(line: &str) -> Option<(String, f64)> {
    let fields = line.split_whitespace().collect::<Vec<_>>();
    Some(((*fields.last()?).to_owned(), fields.get(3)?.parse().ok()?))
}

fn table(rows: &[Row]) -> String {
    let mut text = "| workload | system calls per request | which | nginx | heap allocations per request | bytes |\n\
                    |---|---|---|---|---|---|\n"
        .to_owned();
    for Row { workload, calls, nginx_calls, allocations, allocated_bytes } in rows {
        let sum = |calls: &Result<Calls>| match calls {
            Ok(calls) => format!("{:.1}", calls.values().sum::<f64>()),
            Err(error) => format!("not counted: {error:#}"),
        };
        let which = calls.iter().flatten().map(|(name, calls)| format!("{name} {calls:.2}")).collect::<Vec<_>>();
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {allocations:.1} | {allocated_bytes:.0} |",
            workload.name,
            sum(calls),
            which.join(", "),
            sum(nginx_calls)
        );
    }
    text
}
