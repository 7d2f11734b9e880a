//! Load over HTTP/2 and TLS, by h2load of the nghttp2 project.

use crate::contestants::command;
use crate::ends::{Ends, Loaded};
use crate::workloads::Workload;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// Few, for their handshakes are counted.
const CONNECTIONS: usize = 8;
/// Where each has one request in flight.
const CONNECTIONS_HTTP1: usize = 16;
const TIME_MAX: Duration = Duration::from_secs(120);

/// Ended with its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends `count` requests with `in_flight` of them at a time, while `ends` answers as the upstream.
pub fn load(
    ends: &mut Ends,
    to: SocketAddr,
    workload: &Workload,
    count: usize,
    in_flight: usize,
    dir: &Path,
) -> Result<Loaded> {
    let scheme = if workload.front.is_tls() { "https" } else { "http" };
    let (log, out) = (dir.join("h2load.log"), dir.join("h2load.out"));
    // It appends.
    let _ = fs::remove_file(&log);
    let mut command = command("h2load");
    command.arg(format!("--requests={count}")).arg(format!("--log-file={}", log.display()));
    let connections = if workload.front.is_http2() { CONNECTIONS } else { CONNECTIONS_HTTP1 }.min(count);
    command.arg(format!("--clients={connections}"));
    if workload.front.is_http2() {
        command.arg(format!("--max-concurrent-streams={}", in_flight.div_ceil(CONNECTIONS)));
    } else {
        command.arg("--h1");
    }
    if workload.post {
        let body = dir.join("h2load.body");
        fs::write(&body, crate::http::json(workload.body_bytes))?;
        command.arg(format!("--data={}", body.display())).arg("--header=content-type: application/json");
    }
    command.arg(format!("{scheme}://127.0.0.1:{}{}", to.port(), workload.target));
    command.stdin(Stdio::null()).stdout(fs::File::create(&out)?).stderr(Stdio::null());
    let started = Instant::now();
    let mut child = Running(command.spawn().context("h2load")?);
    let mut ended = None;
    ends.serve_while(|| {
        ended = child.0.try_wait()?;
        Ok(ended.is_none() && started.elapsed() < TIME_MAX)
    })?;
    let said = fs::read_to_string(&out)?;
    ensure!(ended.is_some_and(|status| status.success()), "h2load did not end well: {said}");
    // "40000 total, 40000 started, 40000 done, 40000 succeeded, 0 failed, 0 errored, 0 timeout"
    ensure!(said.contains(&format!(" {count} succeeded, 0 failed, 0 errored")), "not all answers came: {said}");
    let answers = fs::read_to_string(&log)?.lines().map(answer).collect::<Option<Vec<_>>>().context("h2load's log")?;
    let begin = answers.iter().map(|answer| answer.begin_us).min().unwrap_or(0);
    let end = answers.iter().map(|answer| answer.begin_us + answer.took_us).max().unwrap_or(0);
    ensure!(answers.iter().all(|answer| (200..300).contains(&answer.status)), "not all answers were 2xx: {said}");
    Ok(Loaded {
        latencies: answers.iter().map(|answer| answer.took_us * 1000).collect(),
        elapsed: Duration::from_micros(end - begin),
        replayed: 0,
    })
}

struct Answer {
    begin_us: u64,
    status: u16,
    took_us: u64,
}

/// A line of its log: when the request began, its status, how long it took; with tabs between.
fn answer(line: &str) -> Option<Answer> {
    let mut fields = line.split('\t');
    let (begin, status, took) = (fields.next()?, fields.next()?, fields.next()?);
    Some(Answer { begin_us: begin.parse().ok()?, status: status.parse().ok()?, took_us: took.parse().ok()? })
}
