//! A gateway's process, and what it takes.

use crate::slope::Sample;
use crate::wire::{Kind, Reader};
use crate::world::{LATE_WINDOW, RESPONSE_TIMEOUT, RETENTION, UNKNOWN_RETENTION, World};
use rustix::process::{Pid, Signal, kill_process};
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) struct Gateway {
    pub(crate) addr: SocketAddr,
    admin: SocketAddr,
    child: Child,
    store: PathBuf,
    log: PathBuf,
}

impl Gateway {
    pub(crate) fn start(dir: &Path, engine: &str, upstream: SocketAddr) -> Self {
        let dir = dir.join(engine);
        std::fs::create_dir_all(&dir).unwrap();
        let (store, log, config) = (dir.join("data"), dir.join("log"), dir.join("config.toml"));
        let text = format!(
            "server.listen = \"127.0.0.1:0\"\nserver.limits.body_timeout = \"2s\"\nadmin.listen = \"127.0.0.1:0\"\n\
             upstream.url = \"http://{upstream}\"\nupstream.response_timeout = \"{}s\"\nupstream.late_window = \"{}s\"\n\
             store.engine = {engine:?}\nstore.path = {:?}\ncache.max_bytes = \"8MiB\"\n\
             idempotency.retention = \"{}s\"\nidempotency.unknown_retention = \"{}s\"\n\
             idempotency.wait_timeout = \"2s\"\nidempotency.max_recorded_body = \"128KiB\"\n",
            RESPONSE_TIMEOUT.as_secs(),
            LATE_WINDOW.as_secs(),
            store.display().to_string(),
            RETENTION.as_secs(),
            UNKNOWN_RETENTION.as_secs()
        );
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_oncegate"));
        command.args(["serve", "--log-format", "json", "--config"]).arg(config).stdin(Stdio::null());
        let stderr = std::fs::File::create(&log).unwrap();
        let child = command.stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let (addr, admin) = loop {
            let text = std::fs::read_to_string(&log).unwrap();
            if let Some(both) = address(&text, "server").zip(address(&text, "admin")) {
                break both;
            }
            assert!(Instant::now() < deadline, "the gateway does not start: {text}");
            thread::sleep(Duration::from_millis(20));
        };
        Self { addr, admin, child, store, log }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    pub(crate) fn stop_for(&self, time: Duration) {
        self.signal(Signal::STOP);
        thread::sleep(time);
        self.signal(Signal::CONT);
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.child.id()))
    }

    pub(crate) fn sample(&self, world: &World) -> Sample {
        let status = std::fs::read_to_string(self.proc("status")).unwrap_or_default();
        let of_status = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.trim().trim_end_matches(" kB").parse().unwrap_or(0.0)
        };
        let metrics = self.metrics();
        let mut latencies = std::mem::take(&mut *world.latencies.lock().unwrap());
        latencies.sort_unstable();
        let quantile = |q: f64| {
            let at = (latencies.len().saturating_sub(1) as f64 * q) as usize;
            latencies.get(at).map_or(f64::NAN, Duration::as_secs_f64) * 1e3
        };
        let records = ["claimed", "completed", "unknown"].map(|state| metric(&metrics, "records", state));
        let index = disk(&self.store.join("index"));
        Sample {
            at: world.started.elapsed(),
            figures: [
                of_status("VmRSS:") / 1024.0,
                std::fs::read_dir(self.proc("fd")).map_or(0, Iterator::count) as f64,
                of_status("Threads:"),
                disk(&self.store) as f64 / 1048576.0,
                index as f64 / 1048576.0,
                records.iter().sum(),
                quantile(0.5),
                quantile(0.99),
            ],
        }
    }

    fn metrics(&self) -> String {
        let Ok(mut stream) = TcpStream::connect(self.admin) else { return String::new() };
        let _ = stream.set_read_timeout(Some(Duration::from_secs(20)));
        let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
        let answer = Reader::new(Kind::Response).read(&mut stream);
        answer.map_or(String::new(), |answer| String::from_utf8_lossy(&answer.body).into_owned())
    }

    /// Waits until nothing is under way any more.
    pub(crate) fn settles(&self, world: &World) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let metrics = self.metrics();
            let claimed = metric(&metrics, "records", "claimed");
            let others = ["upstream_in_flight", "waiters", "buffered_bytes"].map(|name| metric(&metrics, name, ""));
            if claimed == 0.0 && others == [0.0; 3] {
                return;
            }
            if Instant::now() > deadline {
                return world.violated(&format!("{claimed} claims, {others:?} in flight, waiting, bytes at the end"));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// SIGTERM; says what it logged.
    pub(crate) fn end(mut self, world: &World) {
        self.signal(Signal::TERM);
        let code = self.child.wait().unwrap().code();
        if code != Some(0) {
            world.violated(&format!("it ends with {code:?}"));
        }
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let count = |level: &str| log.lines().filter(|line| line.contains(&format!("\"level\":\"{level}\""))).count();
        println!("{}: logged {} errors, {} warnings", world.name, count("ERROR"), count("WARN"));
        for line in log.lines().filter(|line| line.contains("\"level\":\"ERROR\"")).take(5) {
            println!("  {line}");
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn address(log: &str, role: &str) -> Option<SocketAddr> {
    log.lines().find_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        let listening = line["message"] == "listening" && line["role"] == role;
        listening.then(|| line["address"].as_str()?.parse().ok())?
    })
}

/// NaN if there is none.
fn metric(text: &str, name: &str, state: &str) -> f64 {
    let label = if state.is_empty() { String::new() } else { format!("{{state=\"{state}\"}}") };
    let line = format!("oncegate_{name}{label} ");
    text.lines().find_map(|found| found.strip_prefix(&line)?.trim().parse().ok()).unwrap_or(f64::NAN)
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
