//! A disk that fills up: nothing is executed twice, and the gateway says what is wrong.

use crate::support::{Gateway, Upstream, call, eventually, request, skip};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// A small file system in memory; unmounted when dropped.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(mib: u32) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"])
            .arg(dir.path())
            .output()
            .is_ok_and(|output| output.status.success());
        if !mounted {
            skip("a tmpfs cannot be mounted here");
        }
        mounted.then_some(Self(dir))
    }

    fn ballast(&self) -> PathBuf {
        self.0.path().join("ballast")
    }

    /// Takes all the space that is left.
    fn fill(&self) {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(self.ballast()).unwrap();
        while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn settings(path: &Path, more: &str) -> String {
    format!("store.path = {:?}\nstore.min_free = \"1MiB\"\n{more}", path.join("data").display().to_string())
}

#[test]
fn on_a_full_disk_nothing_new_is_claimed_what_is_recorded_replays_and_it_recovers() {
    let Some(disk) = Tmpfs::mount(24) else { return };
    let upstream = Upstream::scripted(|request, reply| {
        reply.send(201, &[], format!("run {} {}", request.number, "x".repeat(9000)))
    });
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let settings = settings(disk.0.path(), "cache.max_bytes = 0");
    let gateway = Gateway::try_start(dir, &upstream.url(), &settings, &[], &[]).unwrap();
    let before = gateway.post("before", "{}");
    assert_eq!(before.status, 201);
    disk.fill();
    let mut attempts = 0;
    let refused = eventually("claims are refused", || {
        attempts += 1;
        Some(gateway.post(&format!("full{attempts}"), "{}")).filter(|answer| answer.status != 201)
    });
    refused.expect_problem(503, "store_unavailable");
    assert_eq!(refused.header("retry-after"), Some("1"));
    let calls = upstream.count();
    gateway.post("later", "{}").expect_problem(503, "store_unavailable");
    assert_eq!(gateway.admin("/readyz").status, 503);
    assert_eq!(gateway.admin("/livez").status, 200);
    assert!(gateway.post("before", "{}").replayed(), "from the store");
    assert_eq!(upstream.count(), calls, "the upstream was not touched");
    assert_eq!(gateway.call(request("GET", "/x", &[], "")).status, 201, "pass-through is unharmed");
    std::fs::remove_file(disk.ballast()).unwrap();
    let made = eventually("it recovers", || Some(gateway.post("later", "{}")).filter(|answer| answer.status == 201));
    assert!(!made.replayed());
    assert_eq!(gateway.admin("/readyz").status, 200);
    assert_eq!(upstream.executions("later"), 1);
    let gateway = gateway.restart();
    for (key, text) in [("before", before.text()), ("later", made.text())] {
        let replay = gateway.post(key, "{}");
        assert!(replay.replayed() && replay.text() == text, "{key}");
    }
}

#[test]
fn a_load_that_fills_the_disk_executes_nothing_twice() {
    let Some(disk) = Tmpfs::mount(12) else { return };
    let upstream = Upstream::scripted(|request, reply| {
        reply.send(201, &[], format!("run {} {}", request.number, "x".repeat(90_000)))
    });
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let gateway = Gateway::try_start(dir, &upstream.url(), &settings(disk.0.path(), ""), &[], &[]).unwrap();
    let mut answers = Vec::new();
    for n in 0..400 {
        let key = format!("k{n}");
        let answer = gateway.post(&key, "{}");
        if answer.status != 201 {
            answer.expect_problem(503, "store_unavailable");
            break;
        }
        answers.push((key, answer.body));
    }
    assert!(answers.len() > 10 && answers.len() < 400, "{} were answered", answers.len());
    assert_eq!(gateway.admin("/readyz").status, 503);
    let gateway = gateway.restart();
    for (key, body) in &answers {
        let replay = gateway.post(key, "{}");
        assert!(replay.replayed() && replay.body == *body, "{key}");
        assert_eq!(upstream.executions(key), 1);
    }
}

#[test]
fn on_store_error_pass_forwards_without_a_record() {
    let Some(disk) = Tmpfs::mount(8) else { return };
    let upstream = Upstream::counting();
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let settings = settings(disk.0.path(), "idempotency.on_store_error = \"pass\"");
    let gateway = Gateway::try_start(dir, &upstream.url(), &settings, &[], &[]).unwrap();
    disk.fill();
    eventually("the disk is full", || (gateway.admin("/readyz").status == 503).then_some(()));
    for n in 1..=2 {
        let answer = call(gateway.addr, crate::support::post("/posts", "k", "{}"));
        assert_eq!((answer.text(), answer.replayed()), (format!("{{\"n\":{n}}}"), false), "unprotected, as configured");
    }
    assert_eq!(gateway.metric("oncegate_unrecorded_passes_total"), 2.0);
}
