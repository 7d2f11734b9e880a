//! What a proxy has cost, and whether the machine was quiet meanwhile.

use rustix::thread::CpuSet;
use serde::Serialize;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::hint::spin_loop;
use std::io::Result;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Which cores do what.
#[derive(Clone, Copy)]
pub struct Cores {
    /// The proxy's.
    pub proxy: usize,
    /// Of the load and the upstream.
    pub ends: usize,
}

impl Cores {
    /// The first two cores that this process may use; with only one, both are the same, and nothing that is measured
    /// means anything.
    pub fn find() -> Result<Self> {
        let allowed = rustix::thread::sched_getaffinity(None)?;
        let mut cores = (0..CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core));
        let proxy = cores.next().unwrap_or(0);
        Ok(Self { proxy, ends: cores.next().unwrap_or(proxy) })
    }

    pub fn are_two(self) -> bool {
        self.proxy != self.ends
    }
}

/// Keeps this thread, and what it starts from now on, on one core.
pub fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// What a process tree has used up to now.
#[derive(Clone, Copy, Default)]
pub struct Usage {
    /// By the CPU clocks of its processes: all threads, ended ones too.
    pub cpu: Duration,
    /// Of it, outside of the kernel, in ticks of 10 ms.
    pub user: Duration,
    /// Handed to block devices, or dirtied to be.
    pub written_bytes: u64,
}

/// A process and its descendants, as they were found, and what each was last seen to have used: one may end meanwhile, as
/// nginx's cache loader does.
pub struct Tree(Vec<u32>, RefCell<HashMap<u32, Usage>>);

impl Tree {
    pub fn of_all(roots: impl IntoIterator<Item = u32>) -> Result<Self> {
        let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            // It may have ended meanwhile.
            if let Some(parent) = stat_fields(pid).and_then(|fields| fields.get(1)?.parse().ok()) {
                children.entry(parent).or_default().push(pid);
            }
        }
        let (mut tree, mut at) = (roots.into_iter().collect::<Vec<_>>(), 0);
        while at < tree.len() {
            tree.extend(children.remove(&tree[at]).unwrap_or_default());
            at += 1;
        }
        Ok(Self(tree, RefCell::default()))
    }

    pub fn pids(&self) -> &[u32] {
        &self.0
    }

    pub fn usage(&self) -> Usage {
        let mut sum = Usage::default();
        let mut seen = self.1.borrow_mut();
        for &pid in &self.0 {
            let last = seen.entry(pid).or_default();
            last.cpu = cpu_clock(pid).unwrap_or(last.cpu);
            last.user = stat_fields(pid).and_then(|fields| ticks(fields.get(11)?)).unwrap_or(last.user);
            last.written_bytes = field(&format!("/proc/{pid}/io"), "write_bytes:").unwrap_or(last.written_bytes);
            sum.cpu += last.cpu;
            sum.user += last.user;
            sum.written_bytes += last.written_bytes;
        }
        sum
    }

    /// Waits until hardly anything goes on in the background any more: what a load has left behind belongs to it.
    pub fn settle(&self) -> Usage {
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut last = self.usage();
        loop {
            std::thread::sleep(Duration::from_millis(50));
            let now = self.usage();
            if now.cpu - last.cpu < Duration::from_micros(500) || Instant::now() > deadline {
                return now;
            }
            last = now;
        }
    }

    /// How often their threads have gone to sleep up to now: as often, but for one, they were woken.
    pub fn sleeps(&self) -> u64 {
        let tasks = self.0.iter().filter_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).ok()).flatten().flatten();
        tasks
            .filter_map(|task| {
                let status = task.path().join("status");
                let status = status.to_str()?;
                field(status, "voluntary_ctxt_switches:")
            })
            .sum()
    }

    /// Resident memory once nothing goes on any more.
    pub fn settle_rss(&self) -> u64 {
        self.settle();
        self.rss_bytes()
    }

    /// Resident memory of all of them together; what they share counts for each.
    pub fn rss_bytes(&self) -> u64 {
        let rss = |pid: &u32| field(&format!("/proc/{pid}/status"), "VmRSS:").unwrap_or(0);
        self.0.iter().map(rss).sum::<u64>() << 10
    }
}

fn cpu_clock(pid: u32) -> Option<Duration> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).ok()?);
    let clock = nix::time::clock_getcpuclockid(pid).ok()?;
    Some(clock.now().ok()?.into())
}

/// The fields of `/proc/PID/stat` from the state on, which is field 0 here and 3 in proc(5).
fn stat_fields(pid: u32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}

/// A number of ticks; Linux tells them to programs at 100 a second on every architecture that matters here.
fn ticks(text: &str) -> Option<Duration> {
    Some(Duration::from_millis(10) * text.parse::<u32>().ok()?)
}

fn field(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

/// CPU time spent on both cores outside of the kernel, and taken away by the host.
#[derive(Clone, Copy)]
pub struct Busy {
    user: Duration,
    stolen: Duration,
}

impl Busy {
    pub fn now(cores: Cores) -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let mut busy = Self { user: Duration::ZERO, stolen: Duration::ZERO };
        let mut wanted = vec![format!("cpu{}", cores.proxy), format!("cpu{}", cores.ends)];
        wanted.dedup();
        for line in stat.lines() {
            let fields = line.split_whitespace().collect::<Vec<_>>();
            if fields.first().is_some_and(|name| wanted.iter().any(|core| core == name)) {
                let at = |at: usize| fields.get(at).and_then(|text| ticks(text)).unwrap_or_default();
                busy.user += at(1) + at(2);
                busy.stolen += at(8);
            }
        }
        busy
    }

    /// How much of it since then was stolen, or spent by anyone else than those who used `own`.
    pub fn foreign_since(self, earlier: Self, own: Duration) -> Duration {
        (self.user - earlier.user).saturating_sub(own) + (self.stolen - earlier.stolen)
    }
}

/// User time of this process, and of its children that have ended.
pub fn own_user() -> Duration {
    let fields = stat_fields(std::process::id()).unwrap_or_default();
    let at = |at: usize| fields.get(at).and_then(|text| ticks(text)).unwrap_or_default();
    at(11) + at(13)
}

/// Microseconds that an append of about a record and its `fdatasync` take in the middle, into a file that has its length
/// already: what a group commit costs at least.
#[derive(Clone, Copy, Serialize)]
pub struct Commit {
    /// One directly after another.
    pub in_a_row_us: f64,
    /// On a proxy's core, two within each millisecond: as often as in the workload `fresh-paced`.
    pub paced_us: f64,
}

impl Commit {
    pub fn measure(dir: &Path, cores: Cores) -> Result<Self> {
        let paced = || {
            pin(cores.proxy)?;
            commit_us(dir, Duration::from_micros(500))
        };
        let paced_us = thread::scope(|scope| scope.spawn(paced).join().expect("no panic"))?;
        Ok(Self { in_a_row_us: commit_us(dir, Duration::ZERO)?, paced_us })
    }
}

fn commit_us(dir: &Path, interval: Duration) -> Result<f64> {
    const TRIES: usize = 400;
    const APPEND_BYTES: usize = 1200;
    let file = tempfile::tempfile_in(dir)?;
    file.write_all_at(&vec![0; TRIES * APPEND_BYTES], 0)?;
    file.sync_all()?;
    let mut took = Vec::with_capacity(TRIES);
    for nth in 0..TRIES {
        let started = Instant::now();
        file.write_all_at(&[1; APPEND_BYTES], (nth * APPEND_BYTES) as u64)?;
        file.sync_data()?;
        took.push(started.elapsed());
        thread::sleep(interval.saturating_sub(started.elapsed()));
    }
    took.sort_unstable();
    Ok(took[TRIES / 2].as_secs_f64() * 1e6)
}

/// Nanoseconds for a cache line to go from one core to the other and back. On a virtual machine it tells whether the
/// host has moved the cores apart: every proxy then costs up to twice as much.
///
/// The least of several tries: who else runs for a moment is [`Busy`]'s matter.
pub fn ping(cores: Cores) -> Result<u64> {
    const TRIES: usize = 10;
    const TURNS: u32 = 2000;
    if !cores.are_two() {
        return Ok(0);
    }
    let line = AtomicU32::new(0);
    // Each waits for the other; a thread that could not be pinned must not keep the other one waiting.
    let volley = |from: u32| {
        let (mut turn, mut spins) = (from, 0u32);
        while turn - from < 2 * TURNS && spins < 1 << 30 {
            if line.load(Ordering::Acquire) == turn {
                line.store(turn + 1, Ordering::Release);
                turn += 2;
            } else {
                spins += 1;
                spin_loop();
            }
        }
        turn
    };
    let mut tries = [u128::MAX; TRIES];
    thread::scope(|scope| {
        let other = scope.spawn(|| pin(cores.proxy).map(|()| (0..TRIES).fold(1, |turn, _| volley(turn))));
        let mut turn = 0;
        for took in &mut tries {
            let started = Instant::now();
            turn = volley(turn);
            *took = started.elapsed().as_nanos();
        }
        other.join().unwrap_or_else(|_| unreachable!("a volley does not panic"))
    })?;
    let least = tries.into_iter().min().unwrap_or(0);
    Ok(u64::try_from(least).unwrap_or(u64::MAX) / u64::from(TURNS))
}
