//! The command line, from outside.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

#[path = "it/support/mod.rs"]
mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

fn oncegate(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oncegate"));
    command.current_dir(dir).stdin(Stdio::null());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ONCEGATE_")) {
        command.env_remove(name);
    }
    command
}

fn run(arguments: &[&str]) -> Output {
    oncegate(tempfile::tempdir().unwrap().path()).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn with_file(text: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.toml"), text).unwrap();
    dir
}

#[track_caller]
fn key(arguments: &[&str]) -> String {
    let output = run(&[&["key"], arguments].concat());
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
    let line = text(&output.stdout).strip_suffix('\n').expect("a line").to_owned();
    assert!(line.len() == 64 && line.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')), "{line}");
    line
}

fn key_of_json(payload: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut child =
        oncegate(dir.path()).args(["key", "--json", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(payload.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    text(&output.stdout).trim_end().to_owned()
}

#[test]
fn check_says_ok_about_the_defaults_and_a_good_file() {
    let output = run(&["check"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "the defaults: ok\n"));
    let dir = with_file("store.path = \"elsewhere\"\n");
    for arguments in [&["check"][..], &["check", "--config", "config.toml"]] {
        let output = oncegate(dir.path()).args(arguments).output().unwrap();
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "config.toml: ok\n"));
    }
    assert!(!dir.path().join("elsewhere").exists(), "nothing is opened");
}

#[test]
fn check_prints_every_error_and_exits_2() {
    let dir = with_file("[server]\nlissen = 1\n[store]\npath = 7\n[cache]\nmax_bytes = \"1 MB\"\n");
    for command in ["check", "serve"] {
        let output = oncegate(dir.path()).args([command]).output().unwrap();
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""), "{command}");
        let lines = text(&output.stderr).lines().collect::<Vec<_>>();
        assert_eq!(lines.len(), 3, "{lines:?}");
        for (line, start) in lines.iter().zip([
            "oncegate: config.toml:2: server.lissen: ",
            "oncegate: config.toml:4: store.path: ",
            "oncegate: config.toml:6: cache.max_bytes: ",
        ]) {
            assert!(line.starts_with(start), "{line}");
        }
    }
}

#[test]
fn the_environment_counts_for_check() {
    let dir = tempfile::tempdir().unwrap();
    let output = oncegate(dir.path()).arg("check").env("ONCEGATE_STORE__DURABILITY", "lax").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).starts_with("oncegate: ONCEGATE_STORE__DURABILITY: store.durability: "));
    let output = oncegate(dir.path()).arg("check").env("ONCEGATE_PORT", "tcp://10.0.0.1:80").output().unwrap();
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_missing_file_exits_2() {
    for command in ["check", "serve"] {
        let output = run(&[command, "--config", "nowhere.toml"]);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""));
        assert!(text(&output.stderr).starts_with("oncegate: nowhere.toml: cannot read"), "{}", text(&output.stderr));
    }
}

/// Keys are stable across versions: never change these values.
#[test]
fn keys_are_what_they_have_always_been() {
    assert_eq!(
        key(&["user-1", "draft-7", "1700000000"]),
        "730364d3c4d132aab8fe0abe177bb14c464177ef5ea4076a9e2a7ea02c5d67fc"
    );
    assert_eq!(key(&["a"]), "57feb47890e14caeeef4fed93f6b8fcea50f8fe0c00988ccf65465e9aa833347");
    assert_eq!(key(&[""]), "71e0a99173564931c0b8acc52d2685a8e39c64dc52e3d02390fdac2a12b155cb");
    assert_eq!(
        key_of_json(r#"{"a":1,"b":[true,null,"x"]}"#),
        "16cd0c3026e7e2b142d44de58180a3b88a4f177b1c5988061ee8dcc10c24d76a"
    );
}

#[test]
fn a_key_depends_on_its_parts_their_borders_and_their_order() {
    let keys = [
        key(&["a", "b"]),
        key(&["b", "a"]),
        key(&["ab"]),
        key(&["ab", "c"]),
        key(&["a", "bc"]),
        key(&["ab", ""]),
        key(&["", "ab"]),
        key(&["", ""]),
        key(&[""]),
    ];
    let different = keys.iter().collect::<std::collections::BTreeSet<_>>();
    assert_eq!(different.len(), keys.len(), "{keys:?}");
    assert_eq!(key(&["a", "b"]), keys[0]);
}

#[test]
fn a_key_of_json_is_that_of_its_value() {
    let one = key_of_json(r#"{"a":1,"b":{"c":"é","d":[1,2]}}"#);
    assert_eq!(one, key_of_json("{ \"b\" : {\"d\":[1, 2],\n\"c\":\"\\u00e9\"}, \"a\":1 }\n"));
    assert_ne!(one, key_of_json(r#"{"a":1.0,"b":{"c":"é","d":[1,2]}}"#), "numbers compare by their text");
    assert_ne!(one, key_of_json(r#"{"a":1,"b":{"c":"é","d":[2,1]}}"#), "the order of a list counts");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("payload.json");
    std::fs::write(&file, r#"{"b":{"c":"é","d":[1,2]},"a":1}"#).unwrap();
    assert_eq!(one, key(&["--json", file.to_str().unwrap()]));
}

#[test]
fn wrong_usage_exits_2() {
    for arguments in [
        &["key"][..],
        &["key", "part", "--json", "-"],
        &["key", "--json", "nowhere.json"],
        &["chek"],
        &["check", "--listen", "127.0.0.1:0"],
        &["serve", "--nonsense"],
        &["--listen"],
        &["--listen", "nonsense"],
        &["--listen", "127.0.0.1:0", "check"],
    ] {
        let output = run(arguments);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""), "{arguments:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn version_is_that_of_the_package() {
    let output = run(&["--version"]);
    let expected = format!("oncegate {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), expected.as_str()));
}

#[test]
fn serve_is_the_default_command() {
    let dir = with_file("admin.listen = \"127.0.0.1:0\"\n");
    let upstream = support::Upstream::counting();
    let mut child = oncegate(dir.path())
        .args(["--listen", "127.0.0.1:0", "--upstream", &upstream.url(), "--data", "here", "--log-format", "json"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let address = log.find_map(|line| {
        let line: serde_json::Value = serde_json::from_str(&line).ok()?;
        (line["message"] == "listening" && line["role"] == "server").then(|| line["address"].as_str()?.parse().ok())?
    });
    let reader = std::thread::spawn(move || log.count());
    let answer = address.map(|address| support::call(address, support::post("/posts", "k", "{}")));
    let there = dir.path().join("here").is_dir();
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap();
    assert_eq!(answer.map(|answer| answer.status), Some(201));
    assert!(there, "--data names the store");
}

#[test]
fn a_closed_standard_output_is_no_panic() {
    for arguments in [&["check"][..], &["key", "a"], &["--version"], &["--help"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let dir = tempfile::tempdir().unwrap();
        let output = oncegate(dir.path()).args(arguments).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let output = output.wait_with_output().unwrap();
        let stderr = text(&output.stderr);
        assert!(output.status.code().is_some_and(|code| code != 101) && !stderr.contains("panicked"), "{stderr}");
    }
}
