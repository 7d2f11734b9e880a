//! Upstreams that break the rules: the client is told the truth, the record says what is known, and a bad response spoils
//! neither a pooled connection nor the next request.

use crate::support::wire::{CUT_OFF, UNANSWERED, Wire};
use crate::support::{Client, Gate, Gateway, Upstream, eventually, post, request};
use Answer::{Broken, CutOff, Told};
use End::{Closes, Keeps, Resets};
use Record::{Final, Unknown};
use std::net::TcpListener;

struct Row(&'static str, &'static str, &'static [u8], End, Answer, Record);

/// What the upstream does to the connection after its answer.
#[derive(Clone, Copy, Debug)]
enum End {
    Keeps,
    Closes,
    Resets,
}

/// What a pass-through gets. An intercepted request gets the same, or 502 where it would be cut off.
#[derive(Clone, Copy, Debug)]
enum Answer {
    Told(u16, &'static str),
    /// 502 `upstream_broken`.
    Broken,
    /// A connection that ends before the response does; before it begins, if the first bytes of the body are wrong.
    CutOff,
}

/// What a retry of an intercepted request gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Record {
    Final,
    Unknown,
}

#[rustfmt::skip] // One row, one line.
const HEADS: &[Row] = &[
    Row("RFC 9112 §4", "nothing at all", b"", Closes, Broken, Unknown),
    Row("RFC 9112 §4", "garbage", b"garbage\r\n\r\n", Keeps, Broken, Unknown),
    Row("RFC 9112 §4", "a body alone", b"{}\r\n\r\n", Closes, Broken, Unknown),
    Row("RFC 9112 §4", "half a status line", b"HTTP/1.1 2", Closes, Broken, Unknown),
    Row("RFC 9112 §8", "half a head", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-", Closes, Broken, Unknown),
    Row("RFC 9112 §8", "half a head, and a reset", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-", Resets, Broken, Unknown),
    Row("RFC 9112 §4", "no reason", b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}", Keeps, Told(200, "{}"), Final),
    Row("RFC 9112 §4", "no space behind the status", b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\n{}", Keeps, Told(200, "{}"), Final),
    Row("RFC 9112 §4", "a status of two digits", b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §4", "a status of four digits", b"HTTP/1.1 1000 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §4", "a status of no digits", b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9110 §15", "a status below 100", b"HTTP/1.1 099 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9110 §15", "a status of zero", b"HTTP/1.1 000 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    // Complete, and in no list of outcomes: final.
    Row("RFC 9110 §15", "a status above 599", b"HTTP/1.1 600 What\r\nContent-Length: 2\r\n\r\n{}", Keeps, Told(600, "{}"), Final),
    Row("RFC 9110 §15", "the largest status", b"HTTP/1.1 999 What\r\nContent-Length: 2\r\n\r\n{}", Keeps, Told(999, "{}"), Final),
    Row("RFC 9112 §2.3", "HTTP/2.0", b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §2.3", "HTTP/1.2", b"HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §2.3", "a version in lower case", b"http/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §2.3", "another protocol", b"ICY 200 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §2.2", "lines that end with LF alone", b"HTTP/1.1 200 OK\nContent-Length: 2\nX: y\n\n{}", Keeps, Told(200, "{}"), Final),
    Row("RFC 9112 §2.2", "lines that end with CR alone", b"HTTP/1.1 200 OK\rContent-Length: 2\r\r\r\n\r\n{}", Closes, Broken, Unknown),
    Row("RFC 9112 §2.2", "a bare CR in a value", b"HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §5.2", "a folded value", b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §5", "no colon", b"HTTP/1.1 200 OK\r\nX\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §5.1", "a space before the colon", b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9110 §5.1", "a name that is no token", b"HTTP/1.1 200 OK\r\nX(: y\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9110 §5.5", "a NUL in a value", b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9110 §5.5", "a control character in a value", b"HTTP/1.1 200 OK\r\nX: a\x1bb\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9110 §5.5", "bytes beyond ASCII in a value", b"HTTP/1.1 200 OK\r\nX: \xe4\xff\r\nContent-Length: 2\r\n\r\n{}", Keeps, Told(200, "{}"), Final),
    Row("RFC 9112 §4", "bytes beyond ASCII in the reason", b"HTTP/1.1 200 \xe4\xff\r\nContent-Length: 2\r\n\r\n{}", Keeps, Told(200, "{}"), Final),
];

#[rustfmt::skip] // One row, one line.
const BODIES: &[Row] = &[
    Row("RFC 9112 §6.3", "both lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", Keeps, Told(200, "{}"), Final),
    Row("RFC 9112 §6.3", "both lengths, the coding first", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n2\r\n{}\r\n0\r\n\r\n", Keeps, Told(200, "{}"), Final),
    Row("RFC 9112 §6.3", "two different lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 5\r\n\r\n{}xyz", Keeps, Broken, Unknown),
    Row("RFC 9112 §6.3", "a list of different lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 2, 5\r\n\r\n{}xyz", Keeps, Broken, Unknown),
    Row("RFC 9110 §8.6", "two equal lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}", Keeps, Told(200, "{}"), Final),
    Row("RFC 9110 §8.6", "a list of equal lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\n{}", Keeps, Told(200, "{}"), Final),
    Row("RFC 9110 §8.6", "leading zeros", b"HTTP/1.1 200 OK\r\nContent-Length: 0010\r\n\r\n0123456789", Keeps, Told(200, "0123456789"), Final),
    Row("RFC 9112 §6.3", "a length with a plus sign", b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §6.3", "a length with a minus sign", b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §6.3", "an empty length", b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §6.3", "a length that is no number", b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §6.3", "a length of 65 bits", b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551618\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9112 §6.1", "another coding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n{}", Closes, Broken, Unknown),
    Row("RFC 9112 §6.1", "two codings", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", Keeps, Broken, Unknown),
    Row("RFC 9112 §6.1", "chunked twice", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", Keeps, Broken, Unknown),
    Row("RFC 9112 §6.1", "identity", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}", Closes, Broken, Unknown),
    Row("RFC 9112 §6.1", "a coding in HTTP/1.0", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", Closes, Broken, Unknown),
    Row("RFC 9112 §8", "a body shorter than its length", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}", Closes, CutOff, Unknown),
    Row("RFC 9112 §8", "a body shorter than its length, and a reset", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}", Resets, CutOff, Unknown),
    Row("RFC 9112 §6.3", "a body longer than its length", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}POISON", Keeps, Told(200, "{}"), Final),
    Row("RFC 9112 §9.2", "another response behind", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nPOISON", Keeps, Told(200, "{}"), Final),
    Row("RFC 9112 §9.2", "an empty line behind", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}\r\n", Keeps, Told(200, "{}"), Final),
    Row("RFC 9112 §7.1", "chunks, then something more", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\nPOISON", Keeps, Told(200, "{}"), Final),
    Row("RFC 9112 §7.1.1", "extensions", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0;c\r\n\r\n", Keeps, Told(200, "{}"), Final),
    Row("RFC 9110 §6.5.1", "trailers that would frame", b"HTTP/1.1 200 OK\r\nTrailer: Content-Length\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n", Keeps, Told(200, "{}"), Final),
    Row("RFC 9112 §7.1", "a chunk size that is no number", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n", Keeps, CutOff, Unknown),
    Row("RFC 9112 §7.1", "a chunk size with a sign", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n-2\r\n{}\r\n0\r\n\r\n", Keeps, CutOff, Unknown),
    Row("RFC 9112 §7.1", "a chunk size of 80 bits", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n{}\r\n0\r\n\r\n", Keeps, CutOff, Unknown),
    Row("RFC 9112 §7.1", "a chunk longer than its size", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}xx\r\n0\r\n\r\n", Keeps, CutOff, Unknown),
    Row("RFC 9112 §7.1", "a bare LF behind a chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\n0\r\n\r\n", Keeps, CutOff, Unknown),
    Row("RFC 9112 §7.1.1", "an extension with a bare LF", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;\n{}\r\n0\r\n\r\n", Keeps, CutOff, Unknown),
    Row("RFC 9112 §8", "an end within a chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{}", Closes, CutOff, Unknown),
    Row("RFC 9112 §8", "an end behind a chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", Closes, CutOff, Unknown),
    Row("RFC 9112 §8", "an end within the last chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", Closes, CutOff, Unknown),
    Row("RFC 9112 §8", "an end within the trailers", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: y\r\n", Closes, CutOff, Unknown),
    Row("RFC 9112 §6.3", "no length: the close ends it", b"HTTP/1.1 200 OK\r\n\r\n{}", Closes, Told(200, "{}"), Final),
    Row("RFC 9112 §8", "no length, and a reset", b"HTTP/1.1 200 OK\r\n\r\n{}", Resets, CutOff, Unknown),
    Row("RFC 9112 §6.3", "HTTP/1.0: the close ends it", b"HTTP/1.0 200 OK\r\n\r\n{}", Closes, Told(200, "{}"), Final),
    Row("RFC 9112 §9.3", "HTTP/1.0 with a length", b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}", Closes, Told(200, "{}"), Final),
    Row("RFC 9112 §9.3", "HTTP/1.0 with keep-alive", b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n{}", Keeps, Told(200, "{}"), Final),
    Row("RFC 9112 §9.6", "Connection: close, and a connection that stays", b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}POISON", Keeps, Told(200, "{}"), Final),
];

#[rustfmt::skip] // One row, one line.
const STATUSES: &[Row] = &[
    Row("RFC 9110 §15.2", "100 that nobody asked for", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Told(200, "{}"), Final),
    Row("RFC 8297 §2", "103", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Told(200, "{}"), Final),
    Row("RFC 9110 §15.2", "three of them", b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 199 X\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Told(200, "{}"), Final),
    // No interim response has a body, whatever it says.
    Row("RFC 9112 §6.3", "103 with a length", b"HTTP/1.1 103 Early Hints\r\nContent-Length: 9\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Told(200, "{}"), Final),
    Row("RFC 9112 §6.3", "103 with a body", b"HTTP/1.1 103 Early Hints\r\nContent-Length: 6\r\n\r\nPOISONHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9110 §15.2", "100, and the end", b"HTTP/1.1 100 Continue\r\n\r\n", Closes, Broken, Unknown),
    Row("RFC 9110 §15.2.2", "101 that nobody asked for", b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nPOISON", Keeps, Broken, Unknown),
    Row("RFC 9110 §15.2.2", "101, and a response", b"HTTP/1.1 101 Switching Protocols\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Keeps, Broken, Unknown),
    Row("RFC 9110 §15.3.5", "204", b"HTTP/1.1 204 No Content\r\n\r\n", Keeps, Told(204, ""), Final),
    Row("RFC 9112 §6.3", "204 with a length", b"HTTP/1.1 204 No Content\r\nContent-Length: 6\r\n\r\n", Keeps, Told(204, ""), Final),
    Row("RFC 9112 §6.3", "204 with a body", b"HTTP/1.1 204 No Content\r\nContent-Length: 6\r\n\r\nPOISON", Keeps, Told(204, ""), Final),
    Row("RFC 9112 §6.3", "204 with chunks", b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nPOISON\r\n0\r\n\r\n", Keeps, Told(204, ""), Final),
    Row("RFC 9110 §15.4.5", "304", b"HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\n\r\n", Keeps, Told(304, ""), Final),
    Row("RFC 9112 §6.3", "304 with a body", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 6\r\n\r\nPOISON", Keeps, Told(304, ""), Final),
    Row("RFC 9112 §6.3", "304 with a length that is no number", b"HTTP/1.1 304 Not Modified\r\nContent-Length: six\r\n\r\n", Keeps, Broken, Unknown),
    Row("RFC 9110 §15.3.6", "205 with a body", b"HTTP/1.1 205 Reset Content\r\nContent-Length: 2\r\n\r\n{}", Keeps, Told(205, "{}"), Final),
];

#[track_caller]
fn run(rows: &'static [Row]) {
    let upstream = Upstream::scripted(|request, reply| {
        let row = request.target.split_once('?').and_then(|(_, row)| row.parse::<usize>().ok());
        let Some(Row(_, _, answer, end, ..)) = row.and_then(|row| ALL[row / 100].get(row % 100)) else {
            return reply.send(200, &[], "next");
        };
        reply.raw(answer);
        match end {
            Keeps => {}
            Closes => reply.close(),
            Resets => reply.reset(),
        }
    });
    // One worker: the same pool of upstream connections for all.
    let gateway = Gateway::start(&upstream, "server.workers = 1");
    let table = ALL.iter().position(|table| table.as_ptr() == rows.as_ptr()).unwrap() * 100;
    let mut failures = Vec::new();
    for (number, row) in rows.iter().enumerate() {
        for check in [Row::pass, Row::intercept] {
            if let Err(why) = check(row, &upstream, &gateway, table + number).and_then(|()| next(&gateway)) {
                failures.push(format!("[{}] {}: {why}", row.0, row.1));
            }
        }
    }
    assert!(failures.is_empty(), "{} rows fail:\n{}", failures.len(), failures.join("\n"));
}

const ALL: [&[Row]; 3] = [HEADS, BODIES, STATUSES];

/// A request after it, and an intercepted one: answered by what belongs to them, and nothing else.
fn next(gateway: &Gateway) -> Result<(), String> {
    let key = fresh_key();
    for (text, replayed) in [
        (request("GET", "/next", &[], ""), false),
        (post("/posts", &key, "{}"), false),
        (post("/posts", &key, "{}"), true),
    ] {
        let mut wire = Wire::connect(gateway.addr);
        wire.send(text);
        let answer = wire.response().map_err(|why| format!("next: {why}"))?;
        if answer.body != b"next" || answer.field("idempotency-replayed").is_some() != replayed {
            return Err(format!("next: {}", answer.text()));
        }
    }
    Ok(())
}

/// A key that no other request has.
fn fresh_key() -> String {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    format!("next-{}", COUNT.fetch_add(1, Ordering::Relaxed))
}

impl Row {
    fn pass(&self, upstream: &Upstream, gateway: &Gateway, number: usize) -> Result<(), String> {
        let before = upstream.count();
        let mut wire = Wire::connect(gateway.addr);
        wire.send(request("GET", &format!("/x?{number}"), &[], ""));
        expect(&mut wire, self.4).map_err(|why| format!("passed: {why}"))?;
        if upstream.count() != before + 1 {
            return Err(format!("passed: sent {} times", upstream.count() - before));
        }
        Ok(())
    }

    fn intercept(&self, upstream: &Upstream, gateway: &Gateway, number: usize) -> Result<(), String> {
        let text = post(&format!("/posts?{number}"), &format!("k{number}"), "{}");
        let answer = if matches!(self.4, CutOff) { Broken } else { self.4 };
        let mut wire = Wire::connect(gateway.addr);
        wire.send(&text);
        expect(&mut wire, answer).map_err(|why| format!("intercepted: {why}"))?;
        let before = upstream.count();
        wire.send(&text);
        let retry = wire.response().map_err(|why| format!("retry: {why}"))?;
        let right = match (self.5, answer) {
            (Final, Told(status, body)) => {
                let replayed = retry.field("idempotency-replayed") == Some("true");
                replayed && (retry.status(), retry.body.as_slice()) == (status, body.as_bytes())
            }
            _ => retry.status() == 409 && String::from_utf8_lossy(&retry.body).contains("\"outcome_unknown\""),
        };
        if !right || upstream.count() != before {
            return Err(format!("retry: {}", retry.text()));
        }
        Ok(())
    }
}

fn expect(wire: &mut Wire, answer: Answer) -> Result<(), String> {
    let response = match (answer, wire.response()) {
        (CutOff, Err(why)) if why == CUT_OFF || why == UNANSWERED => return Ok(()),
        (CutOff, Ok(response)) => return Err(format!("not cut off: {}", response.text())),
        (_, response) => response?,
    };
    let (status, body) = (response.status(), String::from_utf8_lossy(&response.body).into_owned());
    let right = match answer {
        Told(expected, text) => (status, body.as_str()) == (expected, text),
        _ => status == 502 && body.contains("\"upstream_broken\"") && response.field("proxy-status").is_some(),
    };
    if right { Ok(()) } else { Err(response.text()) }
}

#[test]
fn heads_that_break_the_rules() {
    run(HEADS);
}

#[test]
fn bodies_that_break_the_rules() {
    run(BODIES);
}

#[test]
fn statuses_and_interim_responses_that_break_the_rules() {
    run(STATUSES);
}

#[test]
fn endless_heads_are_bounded() {
    let upstream = Upstream::scripted(|request, reply| match request.target.split('?').next_back().unwrap() {
        "lines" => {
            reply.raw("HTTP/1.1 200 OK\r\n");
            (0..100_000).for_each(|n| reply.raw(format!("X-{n}: {}\r\n", "x".repeat(100))));
            reply.close();
        }
        "line" => {
            reply.raw("HTTP/1.1 200 OK\r\nX: ");
            (0..10_000).for_each(|_| reply.raw("x".repeat(1000)));
            reply.close();
        }
        "status" => {
            reply.raw("HTTP/1.1 200 ");
            (0..10_000).for_each(|_| reply.raw("x".repeat(1000)));
            reply.close();
        }
        _ => reply.send(200, &[], "next"),
    });
    let gateway = Gateway::start(&upstream, "server.workers = 1");
    for kind in ["lines", "line", "status"] {
        gateway.call(request("GET", &format!("/x?{kind}"), &[], "")).expect_problem(502, "upstream_broken");
        next(&gateway).unwrap();
        let text = post(&format!("/posts?{kind}"), kind, "{}");
        gateway.call(&text).expect_problem(502, "upstream_broken");
        gateway.call(&text).expect_problem(409, "outcome_unknown");
        next(&gateway).unwrap();
    }
}

#[test]
fn endless_interim_responses_are_no_response() {
    let gate = Gate::default();
    let over = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        if request.target == "/next" || request.key().is_some_and(|key| key.starts_with("next")) {
            return reply.send(200, &[], "next");
        }
        while !over.is_open() {
            reply.raw("HTTP/1.1 100 Continue\r\n\r\n");
        }
        reply.close();
    });
    let settings = "server.workers = 1\nupstream.response_timeout = \"300ms\"\nupstream.late_window = \"300ms\"";
    let gateway = Gateway::start(&upstream, settings);
    gateway.call(request("GET", "/x", &[], "")).expect_problem(502, "upstream_broken");
    gateway.post("k", "{}").expect_problem(502, "upstream_broken");
    next(&gateway).unwrap();
    gate.open();
    gateway.post("k", "{}").expect_problem(409, "outcome_unknown");
}

#[test]
fn bytes_on_an_idle_connection_end_it() {
    for unsolicited in ["HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nPOISON", "POISON", "\r\n"] {
        let (gate, gone) = (Gate::default(), Gate::default());
        let (idle, closed) = (gate.clone(), gone.clone());
        let upstream = Upstream::scripted(move |request, reply| {
            reply.send(200, &[], "next");
            if request.number == 1 {
                idle.wait();
                reply.raw(unsolicited);
                if reply.closed_by_peer() {
                    closed.open();
                }
                reply.close();
            }
        });
        let gateway = Gateway::start(&upstream, "server.workers = 1");
        gateway.call(request("GET", "/x", &[], ""));
        eventually("it is idle", || (gateway.metric("oncegate_upstream_idle_connections") == 1.0).then_some(()));
        gate.open();
        eventually("it is closed", || gone.is_open().then_some(()));
        next(&gateway).unwrap();
        assert_eq!(upstream.connections(), 2, "{unsolicited:?}");
    }
}

#[test]
fn an_upstream_that_closes_idle_connections_fails_no_request() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    let closed = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&closed);
    let upstream = Upstream::scripted(move |_, reply| {
        reply.send(200, &[], "next");
        reply.close();
        count.fetch_add(1, Ordering::AcqRel);
    });
    let gateway = Gateway::start(&upstream, "server.workers = 1");
    for round in 0..60 {
        let answer =
            if round % 2 == 0 { gateway.call(request("GET", "/x", &[], "")) } else { gateway.post(&fresh_key(), "{}") };
        assert_eq!((answer.status, answer.text().as_str()), (200, "next"), "round {round}");
        eventually("the upstream has closed", || (closed.load(Ordering::Acquire) == round + 1).then_some(()));
    }
    assert_eq!(upstream.count(), 60, "none was sent twice");
}

#[test]
fn a_final_answer_before_the_upload_has_ended_reaches_the_client() {
    for ending in ["Connection: close\r\n", ""] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let gateway =
            Gateway::start_before(&format!("http://{}", listener.local_addr().unwrap()), "server.workers = 1");
        let mut client = Client::connect(gateway.addr);
        client.send("PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\nbeginning");
        let mut server = Client::from(listener.accept().unwrap().0);
        let mut seen = Vec::new();
        while !seen.ends_with(b"beginning") {
            seen.extend(server.read_some().unwrap());
        }
        server.send(format!("HTTP/1.1 413 Content Too Large\r\n{ending}Content-Length: 2\r\n\r\nno"));
        let answer = client.read();
        assert_eq!((answer.status, answer.text().as_str()), (413, "no"), "{ending:?}");
        drop(server);
        // The rest of the upload is nobody's request, and a connection whose request has not been written is no pooled one.
        let second = std::thread::spawn(move || {
            let mut server = Client::from(listener.accept().unwrap().0);
            let head = String::from_utf8(server.read_some().unwrap()).unwrap();
            server.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnext");
            head
        });
        assert_eq!(gateway.call(request("GET", "/next", &[], "")).text(), "next");
        assert!(second.join().unwrap().starts_with("GET /next HTTP/1.1\r\n"));
    }
}

#[test]
fn an_upload_that_is_answered_early_reaches_an_upstream_that_reads_on() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let settings = "server.workers = 1\nupstream.idle_timeout = \"60s\"";
    let gateway = Gateway::start_before(&format!("http://{}", listener.local_addr().unwrap()), settings);
    let mut client = Client::connect(gateway.addr);
    client.send("PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\nbeginning,");
    let mut server = Client::from(listener.accept().unwrap().0);
    let read_to = |server: &mut Client, end: &[u8]| {
        let mut seen = Vec::new();
        while !seen.ends_with(end) {
            seen.extend(server.read_some().unwrap());
        }
    };
    read_to(&mut server, b"beginning,");
    server.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly");
    assert_eq!(client.read().text(), "early");
    client.send("and an end");
    read_to(&mut server, b"and an end");
    // By now the connection is as good as any.
    eventually("it is pooled", || (gateway.metric("oncegate_upstream_idle_connections") == 1.0).then_some(()));
    client = Client::connect(gateway.addr);
    client.send(request("GET", "/next", &[], ""));
    assert!(server.read_head().starts_with("GET /next HTTP/1.1\r\n"));
    server.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnext");
    assert_eq!(client.read().text(), "next");
}

#[test]
fn a_final_answer_before_an_intercepted_request_is_read_is_its_record() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let gateway = Gateway::start_before(&format!("http://{}", listener.local_addr().unwrap()), "server.workers = 1");
    let text = post("/posts", "k", &"x".repeat(900_000));
    let mut client = Client::connect(gateway.addr);
    client.send(&text);
    let mut server = Client::from(listener.accept().unwrap().0);
    server.read_some().unwrap();
    server.send("HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno");
    let answer = client.read();
    assert_eq!((answer.status, answer.text().as_str(), answer.replayed()), (413, "no", false));
    let retry = gateway.call(&text);
    assert_eq!((retry.status, retry.text().as_str(), retry.replayed()), (413, "no", true));
    drop(server);
}

#[test]
fn a_response_too_large_to_be_recorded_is_framed_by_the_letter_whatever_the_upstream_says() {
    let body = "x".repeat(2000);
    let chunks = format!("7d0\r\n{body}\r\n0\r\n\r\n");
    let framings = [
        format!("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}"),
        format!("Content-Length: 5000\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}"),
        format!("Content-Length: 2000, 2000\r\n\r\n{body}"),
        format!("Content-Length: 2000\r\nContent-Length: 02000\r\n\r\n{body}"),
    ];
    let replies = framings.clone();
    let upstream = Upstream::scripted(move |request, reply| match request.key().and_then(|key| key.parse().ok()) {
        Some(number) => reply.raw(format!("HTTP/1.1 200 OK\r\n{}", replies[number as usize])),
        None::<u8> => reply.send(200, &[], "next"),
    });
    let settings = "server.workers = 1\nidempotency.max_recorded_body = \"1KiB\"";
    let gateway = Gateway::start(&upstream, settings);
    for (number, framing) in framings.iter().enumerate() {
        let mut wire = Wire::connect(gateway.addr);
        wire.send(post("/posts", &number.to_string(), "{}"));
        let answer = wire.response().unwrap_or_else(|why| panic!("{why}: {}", &framing[..40]));
        assert_eq!((answer.status(), answer.body.len()), (200, 2000), "{}", &framing[..40]);
        gateway.post(&number.to_string(), "{}").expect_problem(409, "body_not_recorded");
        next(&gateway).unwrap();
    }
}
