//! Runs the contestants of a workload in turns, and makes figures of what was measured.

use crate::contestants::{Certificate, Contestant, Kind, Setting};
use crate::ends::{Ends, Loaded};
use crate::h2load;
use crate::measure::{self, Busy, Cores};
use crate::settings::Settings;
use crate::workloads::{Front, Keys, Rate, Requests, Workload};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What one contestant did in one round.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    pub workload: &'static str,
    pub contestant: String,
    pub round: usize,
    pub requests: usize,
    pub cpu_us: f64,
    /// Of it, what the server beside it took that keeps the records.
    pub server_cpu_us: f64,
    pub requests_per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// Of the median stretch of answers, in the order in which they came.
    pub stretch_p99_us: f64,
    pub p999_us: f64,
    pub written_bytes: f64,
    pub rss_bytes: u64,
    /// From core to core and back, before and after.
    pub ping_ns: (u64, u64),
    /// CPU time that others took meanwhile, the host included.
    pub foreign_ms: u64,
    pub elapsed_ms: u64,
    /// By what all phases up to now have seen.
    pub disturbed: bool,
}

/// Who or what could not take part, and why.
#[derive(Clone, Debug, Serialize)]
pub struct LeftOut {
    pub who: String,
    pub why: String,
    /// It ran and did something wrong.
    pub failed: bool,
}

impl LeftOut {
    /// That is not installed.
    pub fn new(who: String, why: &anyhow::Error) -> Self {
        Self { who, why: format!("{why:#}"), failed: false }
    }
}

/// A contestant in its workload.
struct Entrant {
    contestant: Contestant,
    requests: Requests,
    dir: PathBuf,
}

pub struct Bench<'a> {
    pub settings: &'a Settings,
    pub cores: Cores,
    pub ends: Ends,
    pub certificate: Certificate,
    pub dir: &'a Path,
    pub phases: Vec<Phase>,
    pub left_out: Vec<LeftOut>,
}

impl Bench<'_> {
    /// All rounds of one workload, contestants in turns; `kinds` are those that are installed.
    pub fn run(&mut self, workload: &Workload, kinds: &[Kind]) {
        let mut entrants = Vec::new();
        for kind in workload.contestants(&self.settings.gateways).into_iter().filter(|kind| kinds.contains(kind)) {
            match self.enter(kind, workload) {
                Ok(entrant) => entrants.push(entrant),
                Err(error) => self.leave_out(kind, workload, &error),
            }
        }
        let mut workload = workload.clone();
        if let (Rate::Share(share), Some(reference)) = (workload.rate, entrants.first_mut()) {
            match self.capacity(&workload, reference) {
                Ok(capacity) => workload.rate = Rate::Fixed((capacity * share).round()),
                Err(error) => return self.leave_out(reference.contestant.kind, &workload, &error),
            }
        }
        for round in 0..self.settings.rounds_max {
            if entrants.iter().all(|entrant| self.quiet_rounds(&workload, entrant) >= self.settings.rounds) {
                break;
            }
            let mut failed = Vec::new();
            for turn in 0..entrants.len() {
                let at = (turn + round) % entrants.len();
                let kind = entrants[at].contestant.kind;
                match self.phase(&workload, &mut entrants[at], round) {
                    Ok(phase) => {
                        eprintln!(
                            "{:12} {:12} {round}: {:6.2} µs CPU ({:.2} its server's), {:7.0} requests/s, p99 {:6.0} ({:.0}) µs, ping {} and {} ns, others {} ms",
                            phase.workload,
                            phase.contestant,
                            phase.cpu_us,
                            phase.server_cpu_us,
                            phase.requests_per_second,
                            phase.p99_us,
                            phase.stretch_p99_us,
                            phase.ping_ns.0,
                            phase.ping_ns.1,
                            phase.foreign_ms
                        );
                        self.phases.push(phase);
                    }
                    Err(error) => {
                        self.leave_out(kind, &workload, &error);
                        failed.push(kind);
                    }
                }
            }
            entrants.retain(|entrant| !failed.contains(&entrant.contestant.kind));
            mark_disturbed(&mut self.phases);
        }
    }

    fn quiet_rounds(&self, workload: &Workload, entrant: &Entrant) -> usize {
        let name = entrant.contestant.kind.to_string();
        let own = self.phases.iter().filter(|phase| phase.workload == workload.name && phase.contestant == name);
        own.filter(|phase| !phase.disturbed).count()
    }

    fn leave_out(&mut self, kind: Kind, workload: &Workload, error: &anyhow::Error) {
        let (who, why) = (format!("{kind} in {}", workload.name), format!("{error:#}"));
        eprintln!("{who}: {why}");
        // Who failed once has no figures, those of earlier rounds included.
        let name = kind.to_string();
        self.phases.retain(|phase| phase.workload != workload.name || phase.contestant != name);
        self.left_out.push(LeftOut { who, why, failed: true });
    }

    /// Starts a contestant, and lets it make the records that the workload wants.
    fn enter(&mut self, kind: Kind, workload: &Workload) -> Result<Entrant> {
        let dir = self.dir.join(format!("{}-{kind}", workload.name));
        let mut contestant = self.start(kind, workload, &dir)?;
        let mut requests = Requests::new(workload);
        if let Keys::Recorded(records) = workload.keys
            && kind.keeps_records()
        {
            let clients = self.ends.connect(contestant.address, self.settings.in_flight)?;
            self.ends.load(&clients, requests.begin(Keys::Fresh), records as usize, None)?;
            self.ends.disconnect(clients);
            if workload.from_store && matches!(kind, Kind::Oncegate(_)) {
                // Now all of it lies in the index and the log.
                contestant.stop()?;
                contestant = self.start(kind, workload, &dir)?;
            }
        }
        Ok(Entrant { contestant, requests, dir })
    }

    fn start(&self, kind: Kind, workload: &Workload, dir: &Path) -> Result<Contestant> {
        let setting = Setting {
            cores: self.cores,
            upstream: self.ends.upstream(),
            certificate: &self.certificate,
            gateway: &self.settings.gateway,
            strace: None,
        };
        Contestant::start(kind, workload, &setting, dir)
    }

    /// How many requests a second it answers when it gets them as fast as it can.
    fn capacity(&mut self, workload: &Workload, entrant: &mut Entrant) -> Result<f64> {
        let count = self.settings.requests_of(workload);
        let clients = self.ends.connect(entrant.contestant.address, self.settings.in_flight)?;
        let mut elapsed = Duration::ZERO;
        // The first time warms it up.
        for _ in 0..2 {
            elapsed = self.ends.load(&clients, entrant.requests.begin(workload.keys), count, None)?.elapsed;
        }
        self.ends.disconnect(clients);
        Ok(count as f64 / elapsed.as_secs_f64())
    }

    fn phase(&mut self, workload: &Workload, entrant: &mut Entrant, round: usize) -> Result<Phase> {
        let count = self.settings.requests_of(workload);
        let (tree, server) = (entrant.contestant.tree()?, entrant.contestant.server_tree()?);
        let ping_before = measure::ping(self.cores)?;

        let clients = match workload.front {
            Front::Http1 => self.ends.connect(entrant.contestant.address, self.settings.in_flight)?,
            _ => Vec::new(),
        };
        // Connections to the upstream are opened, code and data come into the caches.
        let warm_up = (10 * self.settings.in_flight).min(count);
        self.load(workload, entrant, &clients, warm_up).context("while warming up")?;

        self.ends.take_executions();
        let (before, server_before) = (tree.settle(), server.usage());
        let (own_before, busy_before) = (measure::own_user(), Busy::now(self.cores));
        let loaded = self.load(workload, entrant, &clients, count)?;
        let (own, busy, at_end) = (measure::own_user() - own_before, Busy::now(self.cores), tree.usage());
        let (after, server_after) = (tree.settle(), server.usage());
        self.ends.disconnect(clients);
        let ping_after = measure::ping(self.cores)?;

        // Whoever did something else than was asked costs something else.
        let (executed, kind) = (self.ends.take_executions(), entrant.contestant.kind);
        let expected = match kind {
            Kind::Direct => 0,
            kind if kind.keeps_records() => workload.executions(count),
            _ => count,
        };
        ensure!(executed.count == expected, "{} requests came to the upstream, not {expected}", executed.count);
        ensure!(executed.repeated == 0, "{} of them came with a key that had come before", executed.repeated);
        if matches!(kind, Kind::Oncegate(_)) {
            let (replayed, expected) = (loaded.replayed, count - expected);
            ensure!(replayed == expected, "{replayed} answers were marked as replays, not {expected}");
        }

        let foreign = busy.foreign_since(busy_before, own + (at_end.user - before.user));
        let each = |sum: f64| sum / count as f64;
        let mut latencies = loaded.latencies;
        let stretch_p99_us = stretch_p99_us(&latencies);
        latencies.sort_unstable();
        Ok(Phase {
            workload: workload.name,
            contestant: kind.to_string(),
            round,
            requests: count,
            cpu_us: each((after.cpu - before.cpu).as_secs_f64() * 1e6),
            server_cpu_us: each((server_after.cpu - server_before.cpu).as_secs_f64() * 1e6),
            requests_per_second: count as f64 / loaded.elapsed.as_secs_f64(),
            p50_us: quantile_us(&latencies, 0.5),
            p99_us: quantile_us(&latencies, 0.99),
            stretch_p99_us,
            p999_us: quantile_us(&latencies, 0.999),
            written_bytes: each((after.written_bytes - before.written_bytes) as f64),
            rss_bytes: tree.rss_bytes(),
            ping_ns: (ping_before, ping_after),
            foreign_ms: u64::try_from(foreign.as_millis()).unwrap_or(u64::MAX),
            elapsed_ms: u64::try_from(loaded.elapsed.as_millis()).unwrap_or(u64::MAX),
            disturbed: false,
        })
    }

    fn load(&mut self, workload: &Workload, entrant: &mut Entrant, clients: &[usize], count: usize) -> Result<Loaded> {
        let to = entrant.contestant.address;
        if workload.front != Front::Http1 {
            return h2load::load(&mut self.ends, to, workload, count, self.settings.in_flight, &entrant.dir);
        }
        let interval = match workload.rate {
            Rate::Full | Rate::Share(_) => None,
            Rate::Fixed(rate) => Some(Duration::from_secs_f64(1.0 / rate)),
        };
        Ok(self.ends.load(clients, entrant.requests.begin(workload.keys), count, interval)?)
    }
}

fn quantile_us(sorted_ns: &[u64], quantile: f64) -> f64 {
    let at = (sorted_ns.len() as f64 * quantile).ceil() as usize;
    sorted_ns.get(at.saturating_sub(1)).map_or(0.0, |&ns| ns as f64 / 1000.0)
}

/// Answers in a stretch: so few that a host which stands still for a moment now and then spares most of them.
const STRETCH: usize = 1000;

fn stretch_p99_us(latencies_ns: &[u64]) -> f64 {
    let stretches =
        latencies_ns.chunks(STRETCH).filter(|stretch| stretch.len() == STRETCH || latencies_ns.len() < STRETCH);
    median(stretches.map(|stretch| {
        let mut sorted = stretch.to_vec();
        sorted.sort_unstable();
        quantile_us(&sorted, 0.99)
    }))
}

/// A core-to-core round trip that takes so many times what it takes on this machine at best means that the host has
/// moved the cores.
const PING_RATIO_MAX: f64 = 1.6;
/// What others may take of a phase; the counters are coarse.
const FOREIGN_SHARE_MAX: f64 = 0.05;
const FOREIGN_MS_MIN: f64 = 30.0;

/// Marks the phases in which the machine was not quiet.
pub fn mark_disturbed(phases: &mut [Phase]) {
    let mut pings = phases.iter().flat_map(|phase| [phase.ping_ns.0, phase.ping_ns.1]).collect::<Vec<_>>();
    pings.sort_unstable();
    // Not the very least: it may be a stroke of luck.
    let best = pings.get(pings.len() / 10).copied().unwrap_or(0) as f64;
    for phase in phases {
        let ping = phase.ping_ns.0.max(phase.ping_ns.1) as f64;
        let foreign_max = FOREIGN_MS_MIN.max(phase.elapsed_ms as f64 * FOREIGN_SHARE_MAX);
        phase.disturbed = ping > best * PING_RATIO_MAX || phase.foreign_ms as f64 > foreign_max;
    }
}

/// Of the rounds.
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let (least, most) = (values.clone().fold(f64::INFINITY, f64::min), values.clone().fold(0.0, f64::max));
        Self { median: median(values), least, most }
    }
}

/// A contestant's figures in a workload: medians of the quiet rounds, or of all where none was quiet.
pub struct Summary {
    pub workload: &'static str,
    pub contestant: String,
    pub quiet_rounds: usize,
    pub rounds: usize,
    pub cpu_us: Spread,
    /// Of CPU time, round by round, to the workload's reference.
    pub ratio: Option<f64>,
    pub requests_per_second: f64,
    pub p50_us: Spread,
    pub p99_us: Spread,
    pub stretch_p99_us: f64,
    /// Of it to the reference's, round by round.
    pub p99_ratio: Option<f64>,
    pub p999_us: f64,
    pub written_bytes: f64,
    pub rss_bytes: f64,
}

pub fn summarize(workload: &Workload, gateways: &[Kind], phases: &[Phase]) -> Vec<Summary> {
    let reference = workload.reference().map(|kind| kind.to_string()).unwrap_or_default();
    let of = |contestant: &str| {
        let own = phases.iter().filter(|phase| phase.workload == workload.name && phase.contestant == contestant);
        own.collect::<Vec<_>>()
    };
    let references = of(&reference);
    let mut summaries = Vec::new();
    for contestant in workload.contestants(gateways).iter().map(Kind::to_string) {
        let all = of(&contestant);
        let quiet = all.iter().copied().filter(|phase| !phase.disturbed).collect::<Vec<_>>();
        let used = if quiet.is_empty() { &all } else { &quiet };
        if used.is_empty() {
            continue;
        }
        let spread = |get: fn(&Phase) -> f64| Spread::of(used.iter().map(|phase| get(phase)));
        let figure = |get: fn(&Phase) -> f64| median(used.iter().map(|phase| get(phase)));
        let ratio = |get: fn(&Phase) -> f64| {
            let ratios = used.iter().filter_map(|phase| {
                let other = references.iter().find(|other| other.round == phase.round)?;
                (other.disturbed == phase.disturbed).then_some(get(phase) / get(other))
            });
            Some(median(ratios)).filter(|ratio| ratio.is_finite())
        };
        summaries.push(Summary {
            workload: workload.name,
            contestant,
            quiet_rounds: quiet.len(),
            rounds: all.len(),
            cpu_us: spread(|phase| phase.cpu_us),
            ratio: ratio(|phase| phase.cpu_us),
            requests_per_second: figure(|phase| phase.requests_per_second),
            p50_us: spread(|phase| phase.p50_us),
            p99_us: spread(|phase| phase.p99_us),
            stretch_p99_us: figure(|phase| phase.stretch_p99_us),
            p99_ratio: ratio(|phase| phase.stretch_p99_us),
            p999_us: figure(|phase| phase.p999_us),
            written_bytes: figure(|phase| phase.written_bytes),
            rss_bytes: figure(|phase| phase.rss_bytes as f64),
        });
    }
    summaries
}

/// NaN of nothing.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values = values.collect::<Vec<_>>();
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.len().saturating_sub(1) / 2, values.len() / 2);
    match (values.get(low), values.get(high)) {
        (Some(low), Some(high)) => f64::midpoint(*low, *high),
        _ => f64::NAN,
    }
}
