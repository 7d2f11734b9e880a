//! `oncegate records` from outside: against a scripted gateway, and against a real one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

#[path = "cli_records/real.rs"]
mod real;
#[path = "cli_records/scripted.rs"]
mod scripted;
#[path = "it/support/mod.rs"]
mod support;

use std::io::Write;
use std::process::{Command, Stdio};

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Run {
    #[track_caller]
    fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        self
    }

    /// It ends with this code, says this on standard error, and nothing on standard output.
    #[track_caller]
    fn fails(&self, code: i32, text: &str) {
        assert_eq!((self.code, self.stdout.as_str()), (Some(code), ""), "{}", self.stderr);
        assert!(self.stderr.contains(text), "{:?} does not say {text:?}", self.stderr);
        assert!(self.stderr.starts_with("oncegate: ") || code == 2, "{}", self.stderr);
    }

    #[track_caller]
    fn json(&self) -> serde_json::Value {
        assert_eq!(self.stdout.lines().count(), 1, "one document, one line: {}", self.stdout);
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }

    /// The rows of a table, without its head, as the words of each.
    #[track_caller]
    fn rows(&self) -> Vec<Vec<String>> {
        let mut lines = self.stdout.lines();
        if let Some(head) = lines.next() {
            assert!(head.starts_with("ID "), "{head}");
        }
        lines.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oncegate"));
    command.arg("records").args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ONCEGATE_")) {
        command.env_remove(name);
    }
    command
}

fn finish(child: std::process::Child) -> Run {
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Runs `oncegate records` in an empty directory.
fn records(arguments: &[&str]) -> Run {
    let dir = tempfile::tempdir().unwrap();
    finish(command(arguments).current_dir(&dir).spawn().unwrap())
}

fn with_input(arguments: &[&str], input: &[u8]) -> Run {
    let mut child = command(arguments).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    finish(child)
}

#[test]
fn wrong_usage_exits_2_and_asks_nobody() {
    let id = "0".repeat(32);
    let id = id.as_str();
    let gateway = support::Upstream::counting();
    let admin = gateway.addr.to_string();
    for arguments in [
        &[][..],
        &["lst"],
        &["list", "extra"],
        &["list", "--state", "new"],
        &["list", "--limit", "0"],
        &["list", "--limit", "-1"],
        &["list", "--match", "stat=502"],
        &["list", "--match", "status=5xx"],
        &["list", "--match", ""],
        &["list", "--state", "unknown", "--match", "state=unknown"],
        &["show"],
        &["show", "xyz"],
        &["show", id, "--key", "k"],
        &["show", "--key", ""],
        &["resolve", id],
        &["resolve", "--not-executed"],
        &["resolve", id, "--not-executed", "--response", "file"],
        &["resolve", id, "--response", "nowhere"],
        &["resolve", id, "--match", "status=502", "--not-executed"],
        &["resolve", "--match", "status=502", "--response", "-"],
        &["resolve", "--match", "state=completed", "--not-executed"],
        &["resolve", "--match", "status=502", "--not-executed", "--if-token", "1"],
        &["resolve", id, "--not-executed", "--yes"],
        &["forget"],
        &["forget", id, "--not-executed"],
        &["forget", "--match", "state=claimed", "--yes"],
        &["forget", id, "--token-file", "nowhere"],
    ] {
        let run = records(&[arguments, &["--admin", &admin]].concat());
        assert_eq!((run.code, run.stdout.as_str()), (Some(2), ""), "{arguments:?}: {}", run.stderr);
        assert!(!run.stderr.is_empty(), "{arguments:?}");
    }
    for access in [
        &["--admin", "9090"][..],
        &["--admin", "unix:"],
        &["--admin", "http://127.0.0.1:9090"],
        &["--admin", &admin, "--config", "config.toml"],
        &["--config", "nowhere.toml"],
    ] {
        let run = records(&[&["list"], access].concat());
        assert_eq!((run.code, run.stdout.as_str()), (Some(2), ""), "{access:?}: {}", run.stderr);
    }
    assert_eq!(gateway.connections(), 0);
}
