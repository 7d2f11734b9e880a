//! What all tests of the running program share.

#![allow(dead_code, unreachable_pub, unused_imports, reason = "each test binary that includes this uses its own part")]

pub mod client;
pub mod gateway;
pub mod h2;
pub mod jwt;
pub mod tls;
pub mod tls_front;
pub mod upstream;
pub mod wire;

pub use client::{Client, Response, call, post, request};
pub use gateway::Gateway;
pub use h2::{H2, RawH2, h2_post, h2_request};
pub use upstream::{Gate, Received, Reply, Upstream};

use std::net::TcpStream;
use std::time::{Duration, Instant};

/// How long anything may take that is certain to happen.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Polls until there is something.
#[track_caller]
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A suite that cannot run here says so; where everything must run, it fails.
pub fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
    assert!(std::env::var_os("ONCEGATE_REQUIRE_ALL").is_none(), "skipped although ONCEGATE_REQUIRE_ALL is set: {why}");
}

pub fn find<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(line, _)| line.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

fn parse_headers<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<(String, String)> {
    let fields = lines.filter_map(|line| line.split_once(':'));
    fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

/// Decodes a chunked body from the front of `buffer`; trailers are dropped. `None`: it was cut off.
fn read_chunked(buffer: &mut Vec<u8>, mut fill: impl FnMut(&mut Vec<u8>) -> Option<()>) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = take_line(buffer, &mut fill)?;
        let len = usize::from_str_radix(line.split(';').next()?.trim(), 16).ok()?;
        if len == 0 {
            while !take_line(buffer, &mut fill)?.is_empty() {}
            return Some(body);
        }
        while buffer.len() < len + 2 {
            fill(buffer)?;
        }
        body.extend(buffer.drain(..len));
        buffer.drain(..2);
    }
}

fn take_line(buffer: &mut Vec<u8>, fill: &mut impl FnMut(&mut Vec<u8>) -> Option<()>) -> Option<String> {
    loop {
        if let Some(at) = buffer.windows(2).position(|window| window == b"\r\n") {
            let line = buffer.drain(..at + 2).collect::<Vec<_>>();
            return Some(String::from_utf8_lossy(&line[..at]).into_owned());
        }
        fill(buffer)?;
    }
}

/// Ends a connection with a reset instead of an orderly close.
fn reset(stream: &TcpStream) {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}
