//! What to run, from the environment.

use crate::contestants::{Kind, PEERS};
use crate::workloads::{Keys, WORKLOADS, Workload};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Chosen like a workload.
pub const SCALE: &str = "scale";

#[derive(Serialize)]
pub struct Settings {
    #[serde(skip)]
    pub workloads: Vec<Workload>,
    /// The builds that are to take part, each with all engines.
    #[serde(skip)]
    pub gateways: Vec<Kind>,
    /// Names; `None`: nginx, haproxy and the gateway with its default engine.
    contestants: Option<Vec<String>>,
    /// Quiet ones that are wanted of each contestant, and how many are tried for them.
    pub rounds: usize,
    pub rounds_max: usize,
    /// Requests of a phase, before a workload takes its share of them.
    pub requests: usize,
    /// Connections, each with one request in flight.
    pub in_flight: usize,
    /// Whether the `scale` figures are wanted, with so many connections, and so long a look at idle ones.
    pub scale: bool,
    pub connections: usize,
    #[serde(skip)]
    pub idle: Duration,
    /// Further lines of the gateway's configuration.
    pub gateway: String,
    #[serde(skip)]
    pub dir: Option<PathBuf>,
    /// Whether the run, its plots and its table are written into the repository.
    #[serde(skip)]
    pub write: bool,
}

impl Settings {
    /// `quick`: only whether it works.
    pub fn from_env(quick: bool) -> Result<Self> {
        let list = |name| var(name).map(|text| text.split(',').map(|item| item.trim().to_owned()).collect::<Vec<_>>());
        let mut contestants = list("CONTESTANTS");
        if quick && contestants.is_none() {
            contestants = Some(["nginx", "nginx-cache", "oncegate"].map(str::to_owned).to_vec());
        }
        let wanted = list("WORKLOADS");
        for name in wanted.iter().flatten() {
            let names = WORKLOADS.iter().map(|workload| workload.name).chain([SCALE]).collect::<Vec<_>>();
            ensure!(names.contains(&name.as_str()), "there is no workload {name:?}; there are {names:?}");
        }
        let rounds = number("ROUNDS")?.unwrap_or(if quick { 1 } else { 5 }).max(1);
        let requests = number("REQUESTS")?.unwrap_or(if quick { 200 } else { 40_000 });
        let workloads = WORKLOADS
            .iter()
            .filter(|workload| wanted.as_ref().is_none_or(|wanted| wanted.iter().any(|name| workload.name == name)))
            .cloned()
            .map(|mut workload| {
                if let Keys::Recorded(records) = &mut workload.keys {
                    *records = (*records).min(requests as u64);
                }
                workload
            })
            .collect();
        let gateways = gateways(list("BINARY"))?;
        let all = PEERS.iter().chain(&gateways).map(Kind::to_string).collect::<Vec<_>>();
        for name in contestants.iter().flatten() {
            ensure!(all.contains(name), "there is no contestant {name:?}; there are {all:?}");
        }
        Ok(Self {
            workloads,
            gateways,
            contestants,
            rounds,
            rounds_max: number("ROUNDS_MAX")?.unwrap_or(if quick { 1 } else { 2 * rounds }).max(rounds),
            requests: requests.max(1),
            in_flight: number("CONNECTIONS")?.unwrap_or(if quick { 8 } else { 64 }).max(1),
            gateway: var("SETTINGS").unwrap_or_default(),
            dir: var("DIR").map(PathBuf::from),
            scale: wanted.as_ref().is_none_or(|wanted| wanted.iter().any(|name| name == SCALE)),
            connections: if quick { 100 } else { 10_000 },
            idle: Duration::from_secs(if quick { 1 } else { 10 }),
            write: var("WRITE").is_some_and(|text| text == "1"),
        })
    }

    pub fn wants(&self, kind: Kind) -> bool {
        match &self.contestants {
            Some(names) => names.iter().any(|name| *name == kind.to_string()),
            None => !matches!(kind, Kind::Oncegate(gateway) if ["fjall", "memory"].contains(&gateway.engine)),
        }
    }

    /// How many requests one phase of this workload has.
    pub fn requests_of(&self, workload: &Workload) -> usize {
        (self.requests / workload.share).max(self.in_flight)
    }
}

fn gateways(builds: Option<Vec<String>>) -> Result<Vec<Kind>> {
    let builds = builds.unwrap_or_else(|| vec![format!("oncegate={}", env!("CARGO_BIN_EXE_oncegate"))]);
    let mut names = Vec::new();
    let mut gateways = Vec::new();
    for build in &builds {
        let file_name = || Path::new(build).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (name, path) = match build.split_once('=') {
            Some((name, path)) => (name.to_owned(), path),
            None => (file_name(), build.as_str()),
        };
        let binary = fs::canonicalize(path).with_context(|| format!("ONCEGATE_BENCH_BINARY: {path}"))?;
        ensure!(!names.contains(&name), "ONCEGATE_BENCH_BINARY: two builds are named {name}; write NAME=PATH");
        gateways.extend(Kind::gateways(&name, &binary));
        names.push(name);
    }
    Ok(gateways)
}

fn var(name: &str) -> Option<String> {
    std::env::var(format!("ONCEGATE_BENCH_{name}")).ok().filter(|text| !text.is_empty())
}

fn number(name: &str) -> Result<Option<usize>> {
    let parse = |text: String| text.parse().with_context(|| format!("ONCEGATE_BENCH_{name}: not a number: {text}"));
    var(name).map(parse).transpose()
}
