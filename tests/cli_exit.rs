//! The command line where its surroundings fail: a setting that is no text, a file that leads nowhere, a full disk.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn oncegate(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oncegate"));
    command.current_dir(dir).stdin(Stdio::null());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ONCEGATE_")) {
        command.env_remove(name);
    }
    command
}

#[track_caller]
fn refused(output: &Output, start: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.starts_with(start) && output.stdout.is_empty(), "{stderr}");
}

#[test]
fn a_variable_that_is_not_utf8_is_never_ignored() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [&["check"][..], &["serve"], &[]] {
        let mut command = oncegate(dir.path());
        command.env("ONCEGATE_STORE__PATH", OsStr::from_bytes(b"d\xff")).args(arguments);
        refused(&command.output().unwrap(), "oncegate: ONCEGATE_STORE__PATH: ");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is opened");
}

#[test]
fn a_configuration_file_whose_link_leads_nowhere_is_not_no_file() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join("config.toml")).unwrap();
    refused(&oncegate(dir.path()).arg("check").output().unwrap(), "oncegate: config.toml: cannot read");
}

#[test]
fn a_bad_configuration_ends_before_any_address_is_bound() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("gateway.sock");
    let text = format!(
        "server.listen = \"unix:{}\"\nadmin.listen = \"127.0.0.1:0\"\nupstream.max_in_flight = 9223372036854775807\n",
        socket.display()
    );
    std::fs::write(dir.path().join("config.toml"), text).unwrap();
    refused(&oncegate(dir.path()).output().unwrap(), "oncegate: config.toml:3: upstream.max_in_flight: ");
    assert!(!socket.exists() && !dir.path().join("data").exists());
}

/// A failed write is no wrong usage.
#[test]
fn a_key_that_cannot_be_written_exits_1() {
    let Ok(full) = OpenOptions::new().write(true).open("/dev/full") else {
        panic!("this test needs /dev/full");
    };
    let dir = tempfile::tempdir().unwrap();
    let output = oncegate(dir.path()).args(["key", "a"]).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    let output = output.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("oncegate: cannot write to standard output: "));
}
