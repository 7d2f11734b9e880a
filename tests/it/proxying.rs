//! What a proxy does to messages on their way, byte for byte: what was sent, what the upstream received, what came back.

use crate::rows::replace;
use crate::support::wire::{Kind, Tap, Wire};
use crate::support::{Client, Gateway, Upstream, request};

struct Row {
    rfc: &'static str,
    name: &'static str,
    send: &'static [u8],
    /// `{UP}`: the upstream's address; `{FWD}`: the lines that every request gets.
    received: &'static [u8],
    /// Empty: 200 and a body that tells method and target.
    reply: &'static [u8],
    /// Without the `date` that a response without one gets.
    answer: &'static [u8],
}

const FWD: &str =
    "via: 1.1 oncegate\r\nx-forwarded-for: 127.0.0.1\r\nx-forwarded-proto: http\r\nx-forwarded-host: a\r\n";
const GET: &[u8] = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n";
const GOT: &[u8] = b"GET /x HTTP/1.1\r\nhost: a\r\n{FWD}\r\n";
const HEAD: &[u8] = b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n";
const HEADED: &[u8] = b"HEAD /x HTTP/1.1\r\nhost: a\r\n{FWD}\r\n";
const ECHO: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nGET /x";

/// What happens to a request.
const fn up(rfc: &'static str, name: &'static str, send: &'static [u8], received: &'static [u8]) -> Row {
    Row { rfc, name, send, received, reply: OK, answer: b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok" }
}
const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// What happens to a response to a GET.
const fn down(rfc: &'static str, name: &'static str, reply: &'static [u8], answer: &'static [u8]) -> Row {
    Row { rfc, name, send: GET, received: GOT, reply, answer }
}

/// What happens to a response to HEAD.
const fn head(rfc: &'static str, name: &'static str, reply: &'static [u8], answer: &'static [u8]) -> Row {
    Row { rfc, name, send: HEAD, received: HEADED, reply, answer }
}

#[rustfmt::skip] // One row, one line.
const REQUESTS: &[Row] = &[
    Row { rfc: "RFC 9110 §7.6", name: "nothing but what a proxy adds", send: GET, received: GOT, reply: b"", answer: ECHO },
    // Names mean the same in either case, and lines of different names in any order (RFC 9110 §5.1, §5.3).
    up("RFC 9110 §5.3", "lines of one name keep their order", b"GET /x HTTP/1.1\r\nX-B: 1\r\nHost: a\r\nX-A: 2\r\nx-b: 3\r\n\r\n", b"GET /x HTTP/1.1\r\nx-b: 1\r\nx-b: 3\r\nhost: a\r\nx-a: 2\r\n{FWD}\r\n"),
    up("RFC 9110 §5.5", "values byte for byte", b"GET /x HTTP/1.1\r\nHost: a\r\nX: \x80\xff \t \xe4,;\"=\\\r\nY:\r\n\r\n", b"GET /x HTTP/1.1\r\nhost: a\r\nx: \x80\xff \t \xe4,;\"=\\\r\ny: \r\n{FWD}\r\n"),
    up("RFC 9112 §3.2", "a target byte for byte", b"GET /%7e//a/../b;c?q=%zz&[]{}|' HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /%7e//a/../b;c?q=%zz&[]{}|' HTTP/1.1\r\nhost: a\r\n{FWD}\r\n"),
    up("RFC 9110 §9.1", "a method of the client's own", b"m-Search /x HTTP/1.1\r\nHost: a\r\n\r\n", b"m-Search /x HTTP/1.1\r\nhost: a\r\n{FWD}\r\n"),
    up("RFC 9110 §7.6.1", "hop-by-hop fields", b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, x-hop ,, X-Hop2\r\nConnection: TE\r\nX-Hop: 1\r\nX-Hop2: 1\r\nx-hop2: 2\r\nKeep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\nTE: trailers\r\nUpgrade: h2c\r\n\r\n", GOT),
    up("RFC 9110 §11.7.2", "credentials for a proxy", b"GET /x HTTP/1.1\r\nHost: a\r\nProxy-Authorization: Basic eDp5\r\n\r\n", GOT),
    up("RFC 9110 §7.6.1", "fields that Connection must not name", b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: X-Forwarded-For, Via\r\nX-Forwarded-For: 9.9.9.9\r\nVia: 1.1 front\r\n\r\n", b"GET /x HTTP/1.1\r\nhost: a\r\nvia: 1.1 front\r\nvia: 1.1 oncegate\r\nx-forwarded-for: 9.9.9.9, 127.0.0.1\r\nx-forwarded-proto: http\r\nx-forwarded-host: a\r\n\r\n"),
    up("RFC 9110 §7.6.3", "Via goes behind a list", b"GET /x HTTP/1.1\r\nHost: a\r\nVia: 1.0 fred, 2 p.example (x)\r\n\r\n", b"GET /x HTTP/1.1\r\nhost: a\r\nvia: 1.0 fred, 2 p.example (x)\r\nvia: 1.1 oncegate\r\nx-forwarded-for: 127.0.0.1\r\nx-forwarded-proto: http\r\nx-forwarded-host: a\r\n\r\n"),
    up("RFC 7239 §4", "what strangers say of where they come from", b"GET /x HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.1.1.1\r\nX-Forwarded-For: 2.2.2.2, 3.3.3.3\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: b\r\nX-Forwarded-Host: c\r\n\r\n", b"GET /x HTTP/1.1\r\nhost: a\r\nx-forwarded-for: 1.1.1.1, 2.2.2.2, 3.3.3.3, 127.0.0.1\r\nx-forwarded-proto: http\r\nx-forwarded-host: a\r\nvia: 1.1 oncegate\r\n\r\n"),
    up("RFC 9112 §3.2.2", "an absolute target", b"GET http://a/y?z HTTP/1.1\r\nHost: A\r\n\r\n", b"GET /y?z HTTP/1.1\r\nhost: a\r\n{FWD}\r\n"),
    up("RFC 9110 §8.6", "a body with a length", b"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nX: y\r\n\r\n\x00\xff", b"PUT /x HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\nx: y\r\n{FWD}\r\n\x00\xff"),
    up("RFC 9112 §7.1", "a chunked body", b"PUT /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", b"PUT /x HTTP/1.1\r\nhost: a\r\n{FWD}transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    up("RFC 9110 §9.3.1", "a chunked body of a GET", b"GET /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", b"GET /x HTTP/1.1\r\nhost: a\r\n{FWD}transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    up("RFC 9110 §6.5", "trailers that are announced", b"PUT /x HTTP/1.1\r\nHost: a\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Sum: 1\r\nX-Not: 2\r\n\r\n", b"PUT /x HTTP/1.1\r\nhost: a\r\ntrailer: X-Sum\r\n{FWD}transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx-sum: 1\r\n\r\n"),
    up("RFC 9110 §6.5.1", "trailers that are not announced", b"PUT /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Sum: 1\r\n\r\n", b"PUT /x HTTP/1.1\r\nhost: a\r\n{FWD}transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    up("RFC 9110 §7.6.2", "Max-Forwards of OPTIONS", b"OPTIONS /x HTTP/1.1\r\nHost: a\r\nMax-Forwards: 10\r\n\r\n", b"OPTIONS /x HTTP/1.1\r\nhost: a\r\nmax-forwards: 9\r\n{FWD}\r\n"),
    up("RFC 9110 §7.6.2", "the last but one hop of TRACE", b"TRACE /x HTTP/1.1\r\nHost: a\r\nMax-Forwards: 1\r\n\r\n", b"TRACE /x HTTP/1.1\r\nhost: a\r\nmax-forwards: 0\r\n{FWD}\r\n"),
    up("RFC 9110 §7.6.2", "Max-Forwards of another method", b"GET /x HTTP/1.1\r\nHost: a\r\nMax-Forwards: 0\r\n\r\n", b"GET /x HTTP/1.1\r\nhost: a\r\nmax-forwards: 0\r\n{FWD}\r\n"),
    up("RFC 9110 §7.6.2", "Max-Forwards that is no number", b"OPTIONS * HTTP/1.1\r\nHost: a\r\nMax-Forwards: x\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nhost: a\r\nmax-forwards: x\r\n{FWD}\r\n"),
    Row { rfc: "RFC 9110 §7.6.2", name: "the last hop of OPTIONS", send: b"OPTIONS * HTTP/1.1\r\nHost: a\r\nMax-Forwards: 0\r\n\r\n", received: b"", reply: b"", answer: b"HTTP/1.1 200 OK\r\nallow: GET, HEAD, POST, PUT, DELETE, PATCH, OPTIONS\r\ncontent-length: 0\r\n\r\n" },
    // An echo would show credentials to a script.
    Row { rfc: "RFC 9110 §7.6.2", name: "the last hop of TRACE", send: b"TRACE /x HTTP/1.1\r\nHost: a\r\nMax-Forwards: 0\r\n\r\n", received: b"", reply: b"", answer: b"HTTP/1.1 405 Method Not Allowed\r\nallow: GET, HEAD, POST, PUT, DELETE, PATCH, OPTIONS\r\ncontent-length: 0\r\n\r\n" },
    up("RFC 9110 §10.1.1", "an expectation of another kind", b"GET /x HTTP/1.1\r\nHost: a\r\nExpect: cake\r\n\r\n", GOT),
    up("RFC 9110 §7.8", "an upgrade of an intercepted POST", b"POST /posts HTTP/1.1\r\nHost: a\r\nIdempotency-Key: k\r\nConnection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 2\r\n\r\n{}", b"POST /posts HTTP/1.1\r\nhost: a\r\nidempotency-key: k\r\ncontent-length: 2\r\n{FWD}\r\n{}"),
    up("RFC 9112 §7.1", "a chunked body of an intercepted POST", b"POST /posts HTTP/1.1\r\nHost: a\r\nIdempotency-Key: k2\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\nX-Sum: 1\r\n\r\n", b"POST /posts HTTP/1.1\r\nhost: a\r\nidempotency-key: k2\r\ncontent-length: 2\r\n{FWD}\r\n{}"),
];

#[rustfmt::skip] // One row, one line.
const RESPONSES: &[Row] = &[
    down("RFC 9110 §5.5", "fields as they are", b"HTTP/1.1 200 Fine\r\nContent-Length: 2\r\nServer: x\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nX: \x80\xff\r\nVia: 1.1 cache\r\n\r\nok", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nserver: x\r\ndate: Sun, 06 Nov 1994 08:49:37 GMT\r\nx: \x80\xff\r\nvia: 1.1 cache\r\n\r\nok"),
    down("RFC 6265 §3", "cookies keep their lines", b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1; Expires=Sun, 06 Nov 1994 08:49:37 GMT\r\nSet-Cookie: b=2\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\nset-cookie: a=1; Expires=Sun, 06 Nov 1994 08:49:37 GMT\r\nset-cookie: b=2\r\ncontent-length: 0\r\n\r\n"),
    down("RFC 9110 §7.6.1", "hop-by-hop fields", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=9\r\nProxy-Connection: close\r\nUpgrade: h2c\r\n\r\nok", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"),
    down("RFC 9110 §11.7.1", "a challenge for a proxy", b"HTTP/1.1 407 X\r\nContent-Length: 2\r\nProxy-Authenticate: Basic realm=x\r\n\r\nok", b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 2\r\n\r\nok"),
    down("RFC 9112 §9.6", "the end of the upstream's connection is not that of the client's", b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"),
    down("RFC 9112 §6.3", "a body that ends with the connection", b"HTTP/1.1 200 OK\r\n\r\nok", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    down("RFC 9112 §6.3", "a body in HTTP/1.0", b"HTTP/1.0 200 OK\r\n\r\nok", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    down("RFC 9112 §7.1", "a chunked body", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    down("RFC 9112 §6.3", "both lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    down("RFC 9110 §8.6", "a list of equal lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 02, 2\r\n\r\nok", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"),
    // Who does not say `TE: trailers` may not want them (RFC 9110 §6.5.1).
    down("RFC 9110 §6.5.1", "trailers for a client that does not ask for them", b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n", b"HTTP/1.1 200 OK\r\ntrailer: X-Sum\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    Row { rfc: "RFC 9110 §10.1.4", name: "trailers for a client that asks for them", send: b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: TE\r\nTE: trailers\r\n\r\n", received: GOT, reply: b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n", answer: b"HTTP/1.1 200 OK\r\ntrailer: X-Sum\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-sum: 1\r\n\r\n" },
    down("RFC 9110 §15.2", "interim responses that nobody asked for", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"),
    down("RFC 9110 §8.6", "204", b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n", b"HTTP/1.1 204 No Content\r\nx: y\r\n\r\n"),
    down("RFC 9110 §8.6", "204 with a length", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"),
    // It may be sent, and the HTTP library does not (RFC 9110 §8.6).
    down("RFC 9110 §15.4.5", "304 with the length of what is not sent", b"HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\nContent-Length: 99\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\n\r\n"),
    down("RFC 9110 §15.4.5", "304 without a length", b"HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\n\r\n"),
    down("RFC 9110 §15", "a status of the upstream's own", b"HTTP/1.1 299 Own\r\nContent-Length: 2\r\n\r\nok", b"HTTP/1.1 299 <none>\r\ncontent-length: 2\r\n\r\nok"),
    head("RFC 9110 §9.3.2", "HEAD with a length", b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n"),
    head("RFC 9110 §9.3.2", "HEAD with a length of zero", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
    head("RFC 9110 §9.3.2", "HEAD with a list of lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 1234, 1234\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n"),
    // A transfer coding says nothing to HEAD; it is not passed on.
    head("RFC 9112 §6.1", "HEAD with a coding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"),
    head("RFC 9112 §6.3", "HEAD with a body", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nPOISON", b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n"),
    head("RFC 9112 §6.3", "HEAD with a response behind", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nPOISON", b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n"),
    head("RFC 9110 §9.3.2", "HEAD without a length", b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: y\r\n\r\n"),
];

/// Each ends its connection.
#[rustfmt::skip] // One row, one line.
const OLD_CLIENTS: &[Row] = &[
    Row { rfc: "RFC 9112 §3.2", name: "HTTP/1.0 without Host", send: b"GET /x HTTP/1.0\r\n\r\n", received: b"GET /x HTTP/1.1\r\nhost: {UP}\r\nvia: 1.0 oncegate\r\nx-forwarded-for: 127.0.0.1\r\nx-forwarded-proto: http\r\nx-forwarded-host: {UP}\r\n\r\n", reply: OK, answer: b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok" },
    Row { rfc: "RFC 9112 §6.1", name: "chunks for HTTP/1.0", send: b"GET /x HTTP/1.0\r\nHost: a\r\n\r\n", received: b"GET /x HTTP/1.1\r\nhost: a\r\nvia: 1.0 oncegate\r\nx-forwarded-for: 127.0.0.1\r\nx-forwarded-proto: http\r\nx-forwarded-host: a\r\n\r\n", reply: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", answer: b"HTTP/1.0 200 OK\r\n\r\nok" },
    // The library says keep-alive and closes all the same: nothing else could end the body.
    Row { rfc: "RFC 9112 §9.3", name: "chunks for HTTP/1.0 with keep-alive", send: b"GET /x HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n", received: b"GET /x HTTP/1.1\r\nhost: a\r\nvia: 1.0 oncegate\r\nx-forwarded-for: 127.0.0.1\r\nx-forwarded-proto: http\r\nx-forwarded-host: a\r\n\r\n", reply: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", answer: b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\n\r\nok" },
    Row { rfc: "RFC 9110 §10.1.1", name: "an expectation in HTTP/1.0 is none", send: b"PUT /x HTTP/1.0\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}", received: b"PUT /x HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\nvia: 1.0 oncegate\r\nx-forwarded-for: 127.0.0.1\r\nx-forwarded-proto: http\r\nx-forwarded-host: a\r\n\r\n{}", reply: OK, answer: b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok" },
    Row { rfc: "RFC 9112 §9.6", name: "Connection: close", send: b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", received: GOT, reply: OK, answer: b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok" },
];

#[rustfmt::skip] // One row, one line.
const TRUSTED: &[Row] = &[
    up("RFC 7239 §4", "what a trusted proxy says of where it comes from", b"GET /x HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.1.1.1\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: b\r\n\r\n", b"GET /x HTTP/1.1\r\nhost: a\r\nx-forwarded-for: 1.1.1.1, 127.0.0.1\r\nx-forwarded-proto: https\r\nx-forwarded-host: b\r\nvia: 1.1 oncegate\r\n\r\n"),
    up("RFC 7239 §4", "what a trusted proxy does not say", b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n", GOT),
];

#[rustfmt::skip] // One row, one line.
const HOST_OF_UPSTREAM: &[Row] = &[
    up("RFC 9110 §7.2", "the upstream's host", b"GET /x HTTP/1.1\r\nX: y\r\nHost: a\r\n\r\n", b"GET /x HTTP/1.1\r\nx: y\r\nhost: {UP}\r\n{FWD}\r\n"),
    up("RFC 9110 §7.2", "the upstream's host, and an absolute target", b"GET http://a/y HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /y HTTP/1.1\r\nhost: {UP}\r\n{FWD}\r\n"),
];

#[rustfmt::skip] // One row, one line.
const HOST_BY_NAME: &[Row] = &[
    up("RFC 9110 §7.2", "a host by name", b"POST /posts HTTP/1.1\r\nHost: a\r\nIdempotency-Key: k\r\nContent-Length: 0\r\n\r\n", b"POST /posts HTTP/1.1\r\nhost: api.internal:81\r\nidempotency-key: k\r\ncontent-length: 0\r\n{FWD}\r\n"),
];

#[track_caller]
fn run(rows: &[Row], settings: &str, ends: bool) {
    let tap = Tap::start();
    // One worker: what is left on a connection to the upstream meets the next request.
    let gateway = Gateway::start_before(&tap.url(), &format!("server.workers = 1\n{settings}"));
    let failures = rows.iter().filter_map(|row| {
        let why = row.check(&tap, &gateway, ends).err()?;
        Some(format!("[{}] {}: {why}", row.rfc, row.name))
    });
    let failures = failures.collect::<Vec<_>>();
    assert!(failures.is_empty(), "{} rows fail:\n{}", failures.len(), failures.join("\n"));
}

impl Row {
    fn check(&self, tap: &Tap, gateway: &Gateway, ends: bool) -> Result<(), String> {
        let up = tap.addr().to_string();
        let received = replace(&replace(self.received, b"{UP}", up.as_bytes()), b"{FWD}", FWD.as_bytes());
        tap.seen();
        tap.answer(Some(self.reply).filter(|reply| !reply.is_empty()));
        let mut wire = Wire::connect(gateway.addr);
        wire.send(self.send);
        let kind = if self.send.starts_with(b"HEAD ") { Kind::ResponseToHead } else { Kind::Response };
        let answer = wire.next(kind)?.ok_or("no answer")?;
        let seen = tap.seen().messages.into_iter().map(|message| message.map(|message| message.bytes));
        let seen = seen.collect::<Result<Vec<_>, _>>()?.concat();
        equal("received", &seen, &received)?;
        equal("answer", &without_date(&answer.bytes, self.reply), self.answer)?;
        if ends {
            return wire.ended();
        }
        // The connection goes on with the next answer, and nothing before it.
        tap.answer(None);
        wire.send("GET /next HTTP/1.1\r\nHost: a\r\n\r\n");
        equal("next", &wire.response()?.body, b"GET /next")
    }
}

fn equal(what: &str, got: &[u8], expected: &[u8]) -> Result<(), String> {
    let text = |bytes: &[u8]| bytes.escape_ascii().to_string().replace("\\r\\n", "\n    ");
    if got == expected {
        Ok(())
    } else {
        Err(format!("{what}\n    {}\n  instead of\n    {}", text(got), text(expected)))
    }
}

/// A response without a date gets one (RFC 9110 §6.6.1); the date of one that has it stays.
fn without_date(answer: &[u8], reply: &[u8]) -> Vec<u8> {
    let has_date = |text: &[u8]| text.windows(8).position(|window| window.eq_ignore_ascii_case(b"\r\ndate: "));
    match has_date(answer) {
        Some(at) if has_date(reply).is_none() => {
            let len = answer[at + 2..].windows(2).position(|window| window == b"\r\n").unwrap() + 2;
            [&answer[..at], &answer[at + len..]].concat()
        }
        _ => answer.to_vec(),
    }
}

#[test]
fn requests_on_their_way() {
    run(REQUESTS, "", false);
}

#[test]
fn responses_on_their_way() {
    run(RESPONSES, "", false);
}

#[test]
fn clients_whose_connections_end() {
    run(OLD_CLIENTS, "", true);
}

#[test]
fn trusted_proxies_are_believed() {
    run(TRUSTED, "server.trusted_proxies = [\"127.0.0.1\"]", false);
}

#[test]
fn the_host_is_what_the_operator_says() {
    run(HOST_OF_UPSTREAM, "upstream.host = \"upstream\"", false);
    run(HOST_BY_NAME, "upstream.host = \"api.internal:81\"", false);
}

#[test]
fn an_http_1_0_client_with_keep_alive_keeps_its_connection() {
    let tap = Tap::start();
    let gateway = Gateway::start_before(&tap.url(), "");
    let mut wire = Wire::connect(gateway.addr);
    for target in ["/1", "/2"] {
        wire.send(format!("GET {target} HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\n\r\n"));
        let answer = wire.response().unwrap();
        assert_eq!(answer.body, format!("GET {target}").as_bytes());
        // RFC 9112 §9.3: without it the client would take the connection for ended.
        assert!(answer.field("connection").is_some_and(|value| value.eq_ignore_ascii_case("keep-alive")), "{answer:?}");
    }
}

#[test]
fn expect_is_answered_here_when_the_body_is_wanted() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let head = "PUT /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n";
    for (framing, body) in [("Content-Length: 2", "{}"), ("Transfer-Encoding: chunked", "2\r\n{}\r\n0\r\n\r\n")] {
        let mut client = Client::connect(gateway.addr);
        client.send(format!("{head}{framing}\r\n\r\n"));
        assert_eq!(client.try_read_any().unwrap().status, 100, "{framing}");
        client.send(body);
        assert_eq!(client.try_read_any().unwrap().status, 201, "{framing}");
        let seen = upstream.requests().pop().unwrap();
        assert_eq!((seen.header("expect"), seen.body.as_slice()), (None, b"{}".as_slice()));
    }
    // RFC 9110 §10.1.1: a final answer at once, where the body does not matter.
    let before = upstream.count();
    for wrong in ["Transfer-Encoding: gzip\r\n", "Content-Length: 2\r\nHost: b\r\n", "Content-Length: +2\r\n"] {
        let mut client = Client::connect(gateway.addr);
        client.send(format!("{head}{wrong}\r\n"));
        client.try_read_any().unwrap().expect_problem(400, "bad_request");
        assert!(client.at_end(), "{wrong}");
    }
    assert_eq!(upstream.count(), before);
}

#[test]
fn large_heads_pass_whole_up_to_their_limit() {
    let fields = (0..60).map(|n| (format!("x-{n}"), "v".repeat(1000))).collect::<Vec<_>>();
    let lines = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect::<String>();
    let answered = lines.clone();
    let upstream = Upstream::scripted(move |_, reply| {
        reply.raw(format!("HTTP/1.1 200 OK\r\n{answered}Content-Length: 2\r\n\r\nok"));
    });
    let gateway = Gateway::start(&upstream, "");
    for target in ["/x", "/posts"] {
        let headers = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect::<Vec<_>>();
        let answer = gateway.call(request("POST", target, &[headers, vec![("Idempotency-Key", "k")]].concat(), "{}"));
        assert_eq!((answer.status, answer.text().as_str()), (200, "ok"), "{target}");
        assert!(fields.iter().all(|(name, value)| answer.header(name) == Some(value)), "{target}: the response's");
        let seen = upstream.requests().pop().unwrap();
        assert!(fields.iter().all(|(name, value)| seen.header(name) == Some(value)), "{target}: the request's");
        assert!(seen.head.contains(&lines), "in their order");
    }
}
