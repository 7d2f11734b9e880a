//! Request lines and header fields that are not by the letter: refused, or passed on so that none reads them in two ways.

use crate::rows::Expect::{Last, Reads, Refused};
use crate::rows::{Row, framed, run, whole};
use crate::support::{Client, Gateway, Upstream};

#[rustfmt::skip] // One row, one line.
const LINES: &[Row] = &[
    whole("RFC 9112 §2.2", "lines that end with LF alone", b"POST {T} HTTP/1.1\nHost: a\n{K}Content-Length: 2\n\n{}", Reads(&["POST {T} {}"])),
    whole("RFC 9112 §2.2", "an empty line before the request", b"\r\nPOST {T} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 2\r\n\r\n{}", Reads(&["POST {T} {}"])),
    whole("RFC 9112 §2.2", "lines that end with CR alone", b"POST {T} HTTP/1.1\rHost: a\r{K}\r\r\n\r\n", Refused(400)),
    whole("RFC 9112 §2.2", "a request line that ends with CR CR LF", b"POST {T} HTTP/1.1\r\r\nHost: a\r\n{K}\r\n", Refused(400)),
    framed("RFC 9112 §2.2", "a bare CR in a value", b"X: a\rb\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §2.2", "a line that ends with CR CR LF", b"X: a\r\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §2.2", "an end of CR CR LF", b"Content-Length: 0\r\n\r\r\n", Refused(400)),
    whole("RFC 9112 §2.2", "white space before the first field", b"POST {T} HTTP/1.1\r\n Host: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §2.2", "a tab before the first field", b"POST {T} HTTP/1.1\r\n\tX: y\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §5.2", "a folded value", b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §5.2", "a value folded with a tab", b"X: a\r\n\tContent-Length: 33\r\n\r\n{HIDDEN}", Refused(400)),
    framed("RFC 9112 §5.2", "a fold without a text", b"X: a\r\n \r\n\r\n{HIDDEN}", Refused(400)),
    framed("RFC 9112 §5.1", "a space before the colon", b"X : a\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §5.1", "a space within a name", b"X Y: a\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.1", "no name", b": a\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.1", "a parenthesis in a name", b"X(: a\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.1", "a slash in a name", b"X/Y: a\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.1", "a NUL in a name", b"X\x00Y: a\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.1", "a name that is not ASCII", b"X\xe4: a\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §5", "no colon", b"X\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §5", "a request line for a field", b"GET /hidden HTTP/1.1\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.5", "a NUL in a value", b"X: a\x00b\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.5", "a control character in a value", b"X: a\x01b\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.5", "a DEL in a value", b"X: a\x7fb\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.6.2", "all characters of a token in a name", b"!#$%&'*+-.^_`|~09Az: a\r\nContent-Length: 0\r\n\r\n", Reads(&["POST {T}"])),
    framed("RFC 9110 §5.5", "an empty value", b"X:\r\nContent-Length: 0\r\n\r\n", Reads(&["POST {T}"])),
];

#[rustfmt::skip] // One row, one line.
const REQUEST_LINES: &[Row] = &[
    whole("RFC 9112 §3", "no version (HTTP/0.9)", b"GET /x\r\n\r\n", Refused(400)),
    whole("RFC 9112 §2.3", "HTTP/0.9", b"GET /x HTTP/0.9\r\nHost: a\r\n\r\n", Refused(400)),
    // RFC 9110 §2.5 would take it for 1.1; there is no such version, and nobody sends it in good faith.
    whole("RFC 9112 §2.3", "HTTP/1.2", b"POST {T} HTTP/1.2\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §2.3", "HTTP/2.0", b"POST {T} HTTP/2.0\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §2.3", "HTTP/1.10", b"POST {T} HTTP/1.10\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §2.3", "HTTP/01.1", b"POST {T} HTTP/01.1\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §2.3", "HTTP/1", b"POST {T} HTTP/1\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §2.3", "a version in lower case", b"POST {T} http/1.1\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §2.3", "another protocol", b"POST {T} ICAP/1.1\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3", "a word behind the version", b"POST {T} HTTP/1.1 x\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3", "a space in the target", b"POST {T} /y HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3", "two spaces before the target", b"POST  {T} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3", "two spaces before the version", b"POST {T}  HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3", "a tab for a space", b"POST\t{T} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3", "a space before the method", b" POST {T} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.1", "no method", b" /x HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.1", "a method that is no token", b"PO(ST {T} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.1", "a NUL in the method", b"POST\x00 {T} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §9.1", "a method in lower case is another one", b"post /posts HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", Reads(&["post /posts"])),
    whole("RFC 8446 §5.1", "a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", Refused(400)),
];

#[rustfmt::skip] // One row, one line.
const TARGETS: &[Row] = &[
    whole("RFC 9112 §3.2", "no target", b"GET  HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2.1", "no slash", b"GET x HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2.1", "no slash before two segments", b"GET x/y HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2.1", "a query alone", b"GET ?x HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2.3", "an authority outside CONNECT", b"GET a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2.3", "CONNECT", b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2.3", "CONNECT with a path", b"CONNECT /x HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2.4", "OPTIONS *", b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", Reads(&["OPTIONS *"])),
    whole("RFC 9112 §3.2.4", "an asterisk outside OPTIONS", b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2.4", "POST *", b"POST * HTTP/1.1\r\nHost: a\r\nIdempotency-Key: k\r\nContent-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2.4", "an asterisk with a path", b"OPTIONS */x HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    // No part of a target; the HTTP library cuts it off before anybody sees it, and the upstream does not get it.
    whole("RFC 9112 §3.2", "a fragment", b"GET /x#/../posts HTTP/1.1\r\nHost: a\r\n\r\n", Reads(&["GET /x"])),
    whole("RFC 9112 §3.2", "a fragment of a route", b"POST {T}#x HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 2\r\n\r\n{}", Reads(&["POST {T} {}"])),
    whole("RFC 9112 §3.2", "a fragment alone", b"GET #x HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 3986 §2", "a quotation mark in a query", b"GET /x?a=\"b\" HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 3986 §2", "a NUL", b"GET /x\x00y HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 3986 §2", "a control character", b"GET /x\x01 HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 3986 §2", "a tab", b"GET /x\ty HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 3986 §2", "a DEL", b"GET /x\x7f HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 3986 §2", "a bare LF", b"GET /x\nHost: b HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 3986 §2", "bytes that are no UTF-8", b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    // Not by the letter, but everybody takes it, and none reads it in two ways.
    whole("RFC 3986 §2", "UTF-8", b"GET /\xc3\xa4 HTTP/1.1\r\nHost: a\r\n\r\n", Reads(&["GET /\u{e4}"])),
    whole("RFC 9112 §3.2.2", "an absolute target", b"POST http://a{T} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 2\r\n\r\n{}", Reads(&["POST {T} {}"])),
    whole("RFC 9112 §3.2.2", "an absolute target, and another Host", b"POST http://a{T} HTTP/1.1\r\nHost: b\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2.2", "an absolute target, and another port", b"POST http://a{T} HTTP/1.1\r\nHost: a:81\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2", "an absolute target, and no Host", b"POST http://a{T} HTTP/1.1\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2", "an absolute target, and an empty Host", b"POST http://a{T} HTTP/1.1\r\nHost:\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §4.2.4", "an absolute target with user information", b"GET http://u@a/x HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2.2", "another scheme", b"GET ftp://a/x HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 9110 §4.2.1", "an absolute target without a host", b"GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2.1", "an absolute target without a path", b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", Reads(&["GET /"])),
    whole("RFC 9112 §3.2.1", "an absolute target with a query alone", b"GET http://a?x=1 HTTP/1.1\r\nHost: a\r\n\r\n", Reads(&["GET /?x=1"])),
    // The last proxy would make it "*". To its clients this is no proxy but the server, and http://a is http://a/.
    whole("RFC 9112 §3.2.4", "OPTIONS of an absolute target without a path", b"OPTIONS http://a HTTP/1.1\r\nHost: a\r\n\r\n", Reads(&["OPTIONS /"])),
    whole("RFC 9110 §7.2", "an absolute target in HTTP/1.0 with a port that is no number", b"GET http://a:x/ HTTP/1.0\r\n\r\n", Refused(400)),
];

#[rustfmt::skip] // One row, one line.
const HOSTS: &[Row] = &[
    whole("RFC 9112 §3.2", "none", b"POST {T} HTTP/1.1\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2", "two", b"POST {T} HTTP/1.1\r\nHost: a\r\nHost: b\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2", "the same twice", b"POST {T} HTTP/1.1\r\nHost: a\r\nHost: a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2", "two in HTTP/1.0", b"POST {T} HTTP/1.0\r\nHost: a\r\nHost: b\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §3.2", "none in HTTP/1.0", b"POST {T} HTTP/1.0\r\n{K}Content-Length: 2\r\n\r\n{}", Last(&["POST {T} {}"])),
    // Grammatical: an authority may be empty. The upstream gets it as it is.
    whole("RFC 9112 §3.2", "an empty one", b"GET /x HTTP/1.1\r\nHost:\r\n\r\n", Reads(&["GET /x"])),
    whole("RFC 9110 §7.2", "a name, a port", b"GET /x HTTP/1.1\r\nHost: a_b-c.example:65535\r\n\r\n", Reads(&["GET /x"])),
    whole("RFC 9110 §7.2", "an IPv6 address, a port", b"GET /x HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", Reads(&["GET /x"])),
    whole("RFC 9110 §7.2", "user information", b"POST {T} HTTP/1.1\r\nHost: u@a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §7.2", "a space", b"POST {T} HTTP/1.1\r\nHost: a b\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §7.2", "a path", b"POST {T} HTTP/1.1\r\nHost: a/x\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §7.2", "a query", b"POST {T} HTTP/1.1\r\nHost: a?x\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §7.2", "a fragment", b"POST {T} HTTP/1.1\r\nHost: a#x\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §7.2", "a backslash", b"POST {T} HTTP/1.1\r\nHost: a\\b\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §7.2", "a scheme", b"POST {T} HTTP/1.1\r\nHost: http://a\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §7.2", "a port that is no number", b"POST {T} HTTP/1.1\r\nHost: a:x\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §7.2", "a port beyond 65535", b"POST {T} HTTP/1.1\r\nHost: a:65536\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 3986 §3.2.3", "an empty port", b"GET /x HTTP/1.1\r\nHost: a:\r\n\r\n", Reads(&["GET /x"])),
    whole("RFC 9110 §7.2", "a signed port", b"POST {T} HTTP/1.1\r\nHost: a:+80\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §7.2", "two ports", b"POST {T} HTTP/1.1\r\nHost: a:1:2\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §7.2", "a list", b"POST {T} HTTP/1.1\r\nHost: a, b\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §7.2", "half a bracket", b"POST {T} HTTP/1.1\r\nHost: [::1\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §7.2", "bytes that are not ASCII", b"POST {T} HTTP/1.1\r\nHost: \xc3\xa4\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §5.2", "a folded one", b"POST {T} HTTP/1.1\r\nHost: a\r\n b\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
    whole("RFC 9110 §7.6.1", "one that Connection names", b"POST {T} HTTP/1.1\r\nHost: a\r\nConnection: Host\r\n{K}Content-Length: 0\r\n\r\n", Refused(400)),
];

#[test]
fn lines_and_fields() {
    run(LINES, "");
}

#[test]
fn request_lines() {
    run(REQUEST_LINES, "");
}

#[test]
fn targets() {
    run(TARGETS, "");
}

#[test]
fn hosts() {
    run(HOSTS, "");
}

#[test]
fn more_than_a_hundred_field_lines_are_a_431() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    for target in ["/x", "/posts"] {
        let lines = |count: usize| {
            let lines = (0..count).map(|n| format!("X-{n}: y\r\n")).collect::<String>();
            format!("POST {target} HTTP/1.1\r\nHost: a\r\nIdempotency-Key: k\r\nContent-Length: 0\r\n{lines}\r\n")
        };
        let before = upstream.count();
        let mut client = Client::connect(gateway.addr);
        client.send(lines(98));
        client.read().expect_problem(431, "headers_too_large");
        assert!(client.at_end());
        assert_eq!(upstream.count(), before);
        assert_eq!(gateway.call(lines(97)).status, 201, "{target}");
    }
}
