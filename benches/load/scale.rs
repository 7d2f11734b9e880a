//! What the gateway takes for being there: its start, idle connections, waiters, the size of its binary.

use crate::contestants::{Contestant, Gateway, Kind, Setting, command};
use crate::measure::Tree;
use crate::rounds::{Bench, LeftOut};
use crate::settings::SCALE;
use crate::workloads::{Keys, Requests, WORKLOADS, Workload};
use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit};
use serde::Serialize;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    pub gateway: String,
    pub what: String,
    pub value: f64,
    pub unit: &'static str,
}

const STARTS: usize = 11;
/// How many connections ask at the same time while all of them are used once.
const AT_ONCE: usize = 50;
const PATIENCE: Duration = Duration::from_secs(60);
/// Limits that would cut the waiting short.
const GENEROUS: &str = "server.limits.max_connections = 20000\nserver.limits.idle_timeout = \"10m\"\n\
                        upstream.response_timeout = \"2m\"\nidempotency.max_waiters_per_key = 20000\n\
                        idempotency.wait_timeout = \"2m\"\n";

/// The figures of all gateways among `kinds`.
pub fn all(bench: &mut Bench<'_>, kinds: &[Kind]) -> Vec<Figure> {
    let mut all = Vec::new();
    for kind in kinds {
        let Kind::Oncegate(gateway) = kind else { continue };
        match figures(bench, gateway) {
            Ok(figures) => all.extend(figures),
            Err(error) => {
                bench.left_out.push(LeftOut { failed: true, ..LeftOut::new(format!("{kind} in {SCALE}"), &error) })
            }
        }
    }
    all
}

fn figures(bench: &mut Bench<'_>, gateway: &'static Gateway) -> Result<Vec<Figure>> {
    let mut scale = Scale {
        dir: bench.dir.join(format!("scale-{}", gateway.name)),
        kind: Kind::Oncegate(gateway),
        connections: bench.settings.connections,
        bench,
        figures: Vec::new(),
    };
    scale.binary(&gateway.binary)?;
    scale.starts()?;
    scale.idle()?;
    scale.idle_connections()?;
    scale.waiters()?;
    Ok(scale.figures)
}

struct Scale<'a, 'b> {
    bench: &'a mut Bench<'b>,
    dir: PathBuf,
    kind: Kind,
    connections: usize,
    figures: Vec<Figure>,
}

impl Scale<'_, '_> {
    fn tell(&mut self, what: impl Into<String>, value: f64, unit: &'static str) {
        let figure = Figure { gateway: self.kind.to_string(), what: what.into(), value, unit };
        eprintln!("{:12} {}: {:.1} {}", figure.gateway, figure.what, figure.value, figure.unit);
        self.figures.push(figure);
    }

    /// One with an empty store.
    fn start(&self, name: &str, settings: &str) -> Result<Contestant> {
        let setting = Setting {
            cores: self.bench.cores,
            upstream: self.bench.ends.upstream(),
            certificate: &self.bench.certificate,
            gateway: &format!("{}\n{settings}", self.bench.settings.gateway),
            strace: None,
        };
        Contestant::start(self.kind, workload("get")?, &setting, &self.dir.join(name))
    }

    fn binary(&mut self, binary: &Path) -> Result<()> {
        fs::create_dir_all(&self.dir)?;
        let stripped = self.dir.join("stripped");
        let done = command("strip").arg("-o").arg(&stripped).arg(binary).status();
        if done.context("strip is not installed")?.success() {
            self.tell("binary, stripped", mib(fs::metadata(stripped)?.len()), "MiB");
        }
        Ok(())
    }

    fn starts(&mut self) -> Result<()> {
        let mut took = Vec::new();
        for nth in 0..STARTS {
            let started = Instant::now();
            let contestant = self.start(&format!("start-{nth}"), "")?;
            let admin = contestant.admin()?;
            while !get(admin, "/readyz")?.starts_with("HTTP/1.1 200") {
                ensure!(started.elapsed() < PATIENCE, "it does not become ready");
            }
            took.push(started.elapsed().as_secs_f64() * 1000.0);
        }
        took.sort_by(f64::total_cmp);
        self.tell("start to /readyz 200, empty store", took[STARTS / 2], "ms");
        self.tell("the slowest start of 11", took[STARTS - 1], "ms");
        Ok(())
    }

    fn idle(&mut self) -> Result<()> {
        let contestant = self.start("idle", "")?;
        let tree = contestant.tree()?;
        tree.settle();
        self.tell("idle: wake-ups", wake_ups_per_second(&tree, self.bench.settings.idle), "/s");
        self.tell("idle: RSS", mib(tree.rss_bytes()), "MiB");
        Ok(())
    }

    fn idle_connections(&mut self) -> Result<()> {
        let contestant = self.start("connections", GENEROUS)?;
        let (count, tree) = (self.connections, contestant.tree()?);
        let before = tree.settle_rss();
        let clients = self.bench.ends.connect(contestant.address, count)?;
        let mut requests = Requests::new(workload("get")?);
        let mut use_all = |ends: &mut crate::ends::Ends| -> Result<()> {
            for some in clients.chunks(AT_ONCE) {
                ends.load(some, requests.begin(Keys::None), some.len(), None)?;
            }
            Ok(())
        };
        use_all(&mut self.bench.ends)?;
        let after = tree.settle_rss();
        let what = format!("{count} idle connections, each used once");
        self.tell(format!("{what}: RSS"), mib(after), "MiB");
        self.tell(format!("{what}: each"), (after.saturating_sub(before)) as f64 / count as f64 / 1024.0, "KiB");
        let wake_ups = wake_ups_per_second(&tree, self.bench.settings.idle);
        self.tell(format!("{what}: wake-ups"), wake_ups, "/s");
        // None was given up meanwhile.
        use_all(&mut self.bench.ends)?;
        self.bench.ends.disconnect(clients);
        Ok(())
    }

    /// All send the same request; the upstream answers once all of them wait.
    fn waiters(&mut self) -> Result<()> {
        let contestant = self.start("waiters", GENEROUS)?;
        let (count, tree, admin) = (self.connections, contestant.tree()?, contestant.admin()?);
        let clients = self.bench.ends.connect(contestant.address, count)?;
        let before = tree.settle_rss();
        let open = Arc::new(AtomicBool::new(false));
        self.bench.ends.hold_until(Arc::clone(&open));
        self.bench.ends.take_executions();
        let waiting = format!("oncegate_waiters {}", count - 1);
        let watcher = std::thread::spawn(move || -> Result<(u64, Instant)> {
            let deadline = Instant::now() + PATIENCE / 4;
            let mut all = false;
            while !all && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
                all = get(admin, "/metrics")?.lines().any(|line| line == waiting);
            }
            let rss = tree.rss_bytes();
            open.store(true, Ordering::Release);
            ensure!(all, "not all of them wait");
            Ok((rss, Instant::now()))
        });
        let mut requests = Requests::new(workload("replay")?);
        let loaded = self.bench.ends.load(&clients, requests.begin(Keys::Recorded(1)), count, None)?;
        let ended = Instant::now();
        let (rss, opened) = watcher.join().map_err(|_| anyhow::anyhow!("the watcher panicked"))??;
        let executed = self.bench.ends.take_executions().count;
        ensure!(executed == 1, "the upstream executed {executed} times");
        ensure!(loaded.replayed == count - 1, "{} of {} waiters got the record", loaded.replayed, count - 1);
        self.bench.ends.disconnect(clients);
        let what = format!("{} waiters for one request", count - 1);
        self.tell(format!("{what}: RSS"), mib(rss), "MiB");
        self.tell(
            format!("{what}: each beside its connection"),
            rss.saturating_sub(before) as f64 / count as f64 / 1024.0,
            "KiB",
        );
        self.tell(format!("{what}: all answered after"), (ended - opened).as_secs_f64() * 1000.0, "ms");
        Ok(())
    }
}

fn workload(name: &str) -> Result<&'static Workload> {
    WORKLOADS.iter().find(|workload| workload.name == name).context("a workload")
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn wake_ups_per_second(tree: &Tree, over: Duration) -> f64 {
    let before = tree.sleeps();
    std::thread::sleep(over);
    (tree.sleeps().saturating_sub(before)) as f64 / over.as_secs_f64()
}

/// The whole response.
fn get(from: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(from)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// As many open files as this process, and what it starts, may have.
pub fn raise_open_files() -> Result<u64> {
    let Rlimit { maximum, .. } = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    Ok(maximum.unwrap_or(u64::MAX))
}
