//! Tables of requests: one row, one behaviour. Each row runs as a pass-through and, where it can, as an intercepted POST.

use crate::support::wire::{CUT_OFF, Message, Tap, Wire};
use crate::support::{Gateway, PATIENCE};
use std::time::{Duration, Instant};

/// What would be a request of its own, were it not a body. 33 bytes.
pub const HIDDEN: &str = "GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n";

pub struct Row {
    pub rfc: &'static str,
    pub name: &'static str,
    before: &'static str,
    /// `{T}`: the target; `{K}`: the lines of key and credentials; `{HIDDEN}`: [`HIDDEN`]; `{LONG}`: 70,000 letters.
    send: &'static [u8],
    expect: Expect,
}

/// The upstream's requests are given as method, target and body.
pub enum Expect {
    /// Refused with this status; the connection ends, and not a byte reaches the upstream.
    Refused(u16),
    /// Refused with 400, because of what comes after a well-formed head. A pass-through streams, so its beginning may have
    /// reached the upstream; but never an end, and the connection there is closed.
    Cut,
    /// The upstream reads exactly these, each is answered, and the connection goes on.
    Reads(&'static [&'static str]),
    /// The same, but the connection ends.
    Last(&'static [&'static str]),
    /// The upstream reads exactly these; what comes behind them is refused.
    ThenRefused(&'static [&'static str], u16),
}

/// A row that gives all that is sent.
pub const fn whole(rfc: &'static str, name: &'static str, send: &'static [u8], expect: Expect) -> Row {
    Row { rfc, name, before: "", send, expect }
}

/// A row that gives what comes behind the request line, `Host` and the key of a POST.
pub const fn framed(rfc: &'static str, name: &'static str, send: &'static [u8], expect: Expect) -> Row {
    Row { rfc, name, before: "POST {T} HTTP/1.1\r\nHost: a\r\n{K}", send, expect }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Passed,
    Intercepted,
}

/// Runs a whole table before one gateway, and tells all rows that fail.
#[track_caller]
pub fn run(rows: &[Row], settings: &str) {
    let tap = Tap::start();
    // One worker: what is left on a connection to the upstream meets the next request.
    let gateway = Gateway::start_before(&tap.url(), &format!("server.workers = 1\n{settings}"));
    let mut failures = Vec::new();
    // The intercepted ones first: whatever they leave behind shows in the very next row.
    for way in [Way::Intercepted, Way::Passed] {
        for (number, row) in rows.iter().enumerate() {
            let key = format!("key-{number}");
            if (way == Way::Passed || row.has_target())
                && let Err(why) = row.check(&tap, &gateway, way, &key)
            {
                failures.push(format!("[{}] {} ({way:?}): {why}", row.rfc, row.name));
            }
        }
    }
    assert!(failures.is_empty(), "{} rows fail:\n{}", failures.len(), failures.join("\n"));
}

impl Row {
    /// Whether it leaves its target open, and so can be intercepted.
    fn has_target(&self) -> bool {
        [self.before.as_bytes(), self.send].iter().any(|part| part.windows(3).any(|window| window == b"{T}"))
    }

    fn check(&self, tap: &Tap, gateway: &Gateway, way: Way, key: &str) -> Result<(), String> {
        let keyed = format!("Authorization: Bearer a\r\nIdempotency-Key: {key}\r\n");
        let (target, keyed) = if way == Way::Intercepted { ("/posts", keyed.as_str()) } else { ("/x", "") };
        let long = "x".repeat(70_000);
        let fill = |text: &[u8]| {
            [("{T}", target), ("{K}", keyed), ("{HIDDEN}", HIDDEN), ("{LONG}", &long)]
                .iter()
                .fold(text.to_vec(), |text, (from, to)| replace(&text, from.as_bytes(), to.as_bytes()))
        };
        let expected = |reads: &[&str]| {
            let texts =
                reads.iter().map(|text| String::from_utf8(fill(text.as_bytes())).unwrap().trim_end().to_owned());
            texts.collect::<Vec<_>>()
        };
        tap.seen();
        let mut wire = Wire::connect(gateway.addr);
        wire.send(fill(&[self.before.as_bytes(), self.send].concat()));
        let (reads, goes_on) = match self.expect {
            Expect::Refused(status) => (expected(&[]), refusal(&mut wire, status).map(|()| false)?),
            Expect::Cut => (expected(&[]), refusal(&mut wire, 400).map(|()| false)?),
            Expect::Reads(reads) => (answered(&mut wire, expected(reads))?, true),
            Expect::Last(reads) => (answered(&mut wire, expected(reads))?, wire.ended().map(|()| false)?),
            Expect::ThenRefused(reads, status) => {
                (answered(&mut wire, expected(reads))?, refusal(&mut wire, status).map(|()| false)?)
            }
        };
        // What was refused has left nothing behind: a request with its key is a first one.
        let next = match (way, &self.expect) {
            (Way::Intercepted, Expect::Refused(_) | Expect::Cut) => {
                format!("POST /posts HTTP/1.1\r\nHost: a\r\n{keyed}Content-Length: 4\r\n\r\nnext")
            }
            _ => "GET /next HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(),
        };
        let streamed = way == Way::Passed && matches!(self.expect, Expect::Cut);
        let seen = tap.seen();
        if reads.is_empty() && !streamed && (seen.bytes, seen.connections) != (0, 0) {
            return Err(format!("the upstream has seen something: {seen:?}"));
        }
        let is_cut = |message: &Result<Message, String>| message.as_ref().is_err_and(|why| why == CUT_OFF);
        let mut messages = seen.messages;
        if streamed && seen.bytes > 0 {
            // What has begun there must end there, too.
            let deadline = Instant::now() + PATIENCE;
            while !messages.iter().any(is_cut) {
                if Instant::now() > deadline {
                    return Err("the upstream still waits for the rest".to_owned());
                }
                std::thread::sleep(Duration::from_millis(1)); // Between two looks.
                messages.extend(tap.seen().messages);
            }
        }
        if !goes_on {
            wire = Wire::connect(gateway.addr);
        }
        wire.send(&next);
        let answer = wire.response().map_err(|why| format!("next: {why}"))?;
        if answer.field("idempotency-replayed").is_some() {
            return Err(format!("next: a record of something refused: {}", answer.text()));
        }
        let next_echo = if next.starts_with("GET") { "GET /next" } else { "POST /posts next" };
        if answer.body != next_echo.as_bytes() {
            return Err(format!("next: {}", answer.text()));
        }
        messages.extend(tap.seen().messages);
        // The end of a connection may be noticed later than the answer.
        let whole = messages.into_iter().filter(|message| !(streamed && is_cut(message)));
        let echoes = whole.map(|message| message.map(|message| message.echo())).collect::<Result<Vec<_>, _>>()?;
        let all = [reads, vec![next_echo.to_owned()]].concat();
        if echoes != all {
            return Err(format!("the upstream read {echoes:?} instead of {all:?}"));
        }
        Ok(())
    }
}

/// Reads one answer for each request, in order.
fn answered(wire: &mut Wire, reads: Vec<String>) -> Result<Vec<String>, String> {
    for read in &reads {
        let answer = wire.response()?;
        if answer.status() != 200 || answer.body != read.as_bytes() {
            return Err(format!("answered to {read:?}: {}", answer.text()));
        }
    }
    Ok(reads)
}

/// Reads the gateway's own answer, after which the connection ends.
fn refusal(wire: &mut Wire, status: u16) -> Result<(), String> {
    let answer = wire.response()?;
    let code = match status {
        400 => "bad_request",
        414 => "target_too_long",
        431 => "headers_too_large",
        other => return Err(format!("{other} is no refusal of ours")),
    };
    let wrong = |what: &str| Err(format!("{what}: {}", answer.text()));
    if answer.status() != status {
        return wrong("not refused");
    }
    if answer.field("connection") != Some("close") {
        return wrong("no Connection: close");
    }
    if answer.field("content-type") != Some("application/problem+json") {
        return wrong("no problem");
    }
    match serde_json::from_slice::<serde_json::Value>(&answer.body) {
        Ok(body) if body["code"] == code && body["status"] == status => wire.ended(),
        _ => wrong("another problem"),
    }
}

pub fn replace(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut replaced = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.windows(from.len()).position(|window| window == from) {
        replaced.extend_from_slice(&rest[..at]);
        replaced.extend_from_slice(to);
        rest = &rest[at + from.len()..];
    }
    [replaced.as_slice(), rest].concat()
}
