//! What clients write: requests out of a grammar that goes astray now and then, in pieces.

use crate::choices::Choices;

pub(crate) struct Client {
    pub(crate) bytes: Vec<u8>,
    /// Where a piece ends, and how many milliseconds pass then.
    pub(crate) pauses: Vec<(usize, u64)>,
    /// It says no more (half-closes), goes away, or waits.
    pub(crate) end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Wait,
    HalfClose,
    Leave,
}

const REQUESTS_MAX: usize = 6;

pub(crate) fn client(choices: &mut Choices<'_>, number: usize) -> Client {
    let mut bytes = Vec::new();
    for _ in 0..=choices.below(REQUESTS_MAX) {
        let id = format!("{number}.{}", bytes.len());
        request(choices, number, &id, &mut bytes);
    }
    if choices.one_in(4) {
        damage(choices, &mut bytes);
    }
    let mut pauses = Vec::new();
    let mut at = 0;
    if choices.one_in(2) {
        while at < bytes.len() && pauses.len() < 64 {
            let longest = [1, 3, 16, 200][choices.below(4)];
            at += 1 + choices.below(longest);
            pauses.push((at.min(bytes.len()), [0, 0, 0, 0, 0, 0, 1, 700][choices.below(8)]));
        }
    }
    let end = [End::HalfClose, End::HalfClose, End::Wait, End::Leave][choices.below(4)];
    Client { bytes, pauses, end }
}

fn of<'a>(choices: &mut Choices<'_>, odd: usize, usual: &'a [&'a str], unusual: &'a [&'a str]) -> &'a str {
    let from = if choices.one_in(odd) { unusual } else { usual };
    from[choices.below(from.len())]
}

const METHODS: (&[&str], &[&str]) = (
    &["POST", "POST", "POST", "GET", "HEAD", "PUT", "OPTIONS"],
    &["DELETE", "TRACE", "CONNECT", "post", "PO ST", "PO(ST", "PRI", "BREW", "", "POST\t", "PO\0ST"],
);
const TARGETS: (&[&str], &[&str]) = (
    &["/posts", "/posts", "/posts", "/x", "/v1/workspaces/w/posts"],
    &[
        "/posts/",
        "//posts",
        "/%70osts",
        "/x/../posts",
        "/posts?q=1",
        "/Posts",
        "/posts;x",
        "/v1%2Fposts",
        "http://a/posts",
        "http://a/x",
        "http://b/posts",
        "HTTP://a/posts",
        "https://a",
        "http://a?x",
        "http://u@a/x",
        "http:///x",
        "ftp://a/x",
        "*",
        "/x#f",
        "/posts#/../x",
        "a:80",
        "x",
        "?x",
        "",
        "/x y",
        "/\"",
        "/\u{e4}",
        "/x\0",
        "/x\r",
        "/x\n",
        "/*",
    ],
);
const VERSIONS: (&[&str], &[&str]) = (
    &["HTTP/1.1"],
    &[
        "HTTP/1.0",
        "HTTP/1.0",
        "HTTP/1.2",
        "HTTP/2.0",
        "HTTP/0.9",
        "http/1.1",
        "HTTP/1.1 ",
        "HTTP/1.1 x",
        "",
        "ICAP/1.1",
    ],
);
const HOSTS: (&[&str], &[&str]) = (
    &["Host: a"],
    &[
        "",
        "Host: a:80",
        "Host: b",
        "Host: a\r\nHost: a",
        "Host: a\r\nHost: b",
        "Host:",
        "Host: u@a",
        "Host: a b",
        "Host: [::1]:80",
        "Host: a/x",
        "Host : a",
        "Host: a\r\n b",
    ],
);
const KEYS: (&[&str], &[&str]) = (
    &["Idempotency-Key: a", "Idempotency-Key: a", "Idempotency-Key: b", ""],
    &[
        "Idempotency-Key: \"a\"",
        "idempotency-key:a",
        "Idempotency-Key: \"a\";x",
        "Idempotency-Key:",
        "Idempotency-Key: a,b",
        "Idempotency-Key: a\r\nIdempotency-Key: a",
        "Idempotency-Key: \"a",
        "Idempotency_Key: a",
        "Idempotency-Key : a",
        "Idempotency-Key: a\r\n b",
        "Idempotency-Key: \u{e4}",
        "Idempotency-Key: A",
    ],
);
/// Lines that may stand in any request.
const LINES: &[&str] = &[
    "Connection: close",
    "Connection: keep-alive",
    "Connection: X-Hop, close\r\nX-Hop: 1",
    "Connection: x-hop\r\nX-Hop: 1",
    "Connection: idempotency-key",
    "Connection: authorization",
    "Connection: transfer-encoding",
    "Connection: content-length",
    "Connection: host",
    "Connection: Upgrade\r\nUpgrade: websocket",
    "Connection: Upgrade\r\nUpgrade: h2c",
    "Upgrade: websocket",
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c, websocket\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
    "Expect: 100-continue",
    "Expect: 100-continue",
    "Expect: x",
    "TE: trailers",
    "Trailer: X-Sum",
    "Trailer: Content-Length, Host",
    "Max-Forwards: 0",
    "Max-Forwards: 2",
    "Via: 1.1 oncegate",
    "Via: 1.0 fred",
    "X-Forwarded-For: 1.2.3.4",
    "X-Forwarded-Host: z",
    "Cookie: a=b",
    "X-Api-Key: 1",
    "Authorization: Bearer z",
    "Authorization: DPoP x",
    "Content-Type: application/json",
    "Content-Encoding: gzip",
    "Keep-Alive: timeout=5",
    "Proxy-Connection: keep-alive",
    "Proxy-Authorization: Basic x",
    "X: \u{e4}",
    "X:",
    "X: \t y \t",
    "x-two: 1\r\nX-Two: 2",
    "Range: bytes=0-1",
    "If-None-Match: *",
];
const ODD_LINES: &[&str] = &[
    "X : y",
    "X: a\r\n folded",
    " X: y",
    "X: a\0b",
    "X: a\rb",
    "X: a\nY: b",
    ": y",
    "X",
    "X(: y",
    "X\u{e4}: y",
    "X: y\r",
    "GET /hidden HTTP/1.1",
    "X: \x7f",
    "X\t: y",
    "Transfer_Encoding: chunked",
    "Content_Length: 5",
    "\0: \0",
];
const BODIES: &[&str] = &["{}", "{}", "{\"a\":1}", "", HIDDEN, "0\r\n\r\n", "5\r\nhello\r\n0\r\n\r\n"];
pub(crate) const HIDDEN: &str = "GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n";

fn request(choices: &mut Choices<'_>, client: usize, id: &str, to: &mut Vec<u8>) {
    let style = choices.byte();
    // Most are as they should be, or wrong in one place.
    let odd = |place: u8| {
        if style & 0x80 > 0 {
            4
        } else if style % 12 == place {
            1
        } else {
            256
        }
    };
    let eol = of(choices, odd(0), &["\r\n"], &["\n", "\n", "\r", "\r\r\n", "\r\n\r\n", " \r\n"]);
    let method = of(choices, odd(1), METHODS.0, METHODS.1);
    let target = of(choices, odd(2), TARGETS.0, TARGETS.1);
    let version = of(choices, odd(3), VERSIONS.0, VERSIONS.1);
    let mut lines = vec![format!("{method} {target} {version}")];
    lines.push(of(choices, odd(4), HOSTS.0, HOSTS.1).to_owned());
    lines.push(format!("X-Id: {id}"));
    lines.push(format!("Authorization: Bearer {client}"));
    lines.push(of(choices, odd(5), KEYS.0, KEYS.1).to_owned());
    for _ in 0..choices.below(3) {
        lines.push(of(choices, odd(6), LINES, ODD_LINES).to_owned());
    }
    let mut body = choices.of(BODIES).as_bytes().to_vec();
    if choices.one_in(16) {
        // Too large for a request with a key.
        body = vec![b'x'; 1500];
    }
    if choices.one_in(64) {
        lines.push(format!("X-Long: {}", "x".repeat(9000)));
    }
    let (framing, body) = framed(choices, odd(7), odd(8), &body);
    lines.insert(2 + choices.below(lines.len() - 1), framing);
    lines.retain(|line| !line.is_empty());
    // Characters stand for bytes.
    let latin = |text: &str| text.chars().map(|c| c as u32 as u8).collect::<Vec<_>>();
    for line in lines {
        to.extend(latin(&line));
        to.extend(latin(eol));
    }
    to.extend(latin(if eol.ends_with('\n') { eol } else { "\r\n" }));
    to.extend(body);
}

/// The fields that frame a body, and how it is written.
fn framed(choices: &mut Choices<'_>, odd: usize, odd_chunks: usize, body: &[u8]) -> (String, Vec<u8>) {
    let len = body.len();
    if !choices.one_in(odd) {
        return match choices.below(3) {
            0 => ("Transfer-Encoding: chunked".to_owned(), chunked(choices, odd_chunks, body)),
            1 if len == 0 => (String::new(), Vec::new()),
            _ => (format!("Content-Length: {len}"), body.to_vec()),
        };
    }
    const CODINGS: [&str; 12] = [
        "chunked",
        "Chunked",
        "chunked, chunked",
        "identity",
        "gzip, chunked",
        "chunked;q=1",
        "\x0bchunked",
        "\"chunked\"",
        "xchunked",
        "chunked,",
        "chunked\r\nTransfer-Encoding: chunked",
        "",
    ];
    let coding = CODINGS[choices.below(12)];
    let chunks = chunked(choices, odd_chunks, body);
    let written = if choices.one_in(3) { body.to_vec() } else { chunks };
    let length = match choices.below(14) {
        0 => format!("{}", len + 1),
        1 => format!("{}", len.saturating_sub(1)),
        2 => format!("00{len}"),
        3 => format!("+{len}"),
        4 => format!("{len}, {len}"),
        5 => format!("0x{len:x}"),
        6 => "18446744073709551616".to_owned(),
        7 => format!("{len}\r\nContent-Length: {len}"),
        8 => format!("{len}\r\nContent-Length: {}", len + 33),
        9 => format!(" \t{len}\t "),
        10 => format!("{len}\x0b"),
        11 => format!("-{len}"),
        _ => format!("{}", written.len()),
    };
    let space = if choices.one_in(6) { " " } else { "" };
    match choices.below(5) {
        0 => (format!("Transfer-Encoding{space}: {coding}"), written),
        1 => (format!("Content-Length{space}: {length}"), body.to_vec()),
        2 => (format!("Transfer-Encoding{space}: {coding}\r\nContent-Length: {length}"), written),
        3 => (format!("Content-Length{space}: {length}\r\nTransfer-Encoding: {coding}"), written),
        _ => (String::new(), written),
    }
}

fn chunked(choices: &mut Choices<'_>, odd: usize, body: &[u8]) -> Vec<u8> {
    const SIZES: (&[&str], &[&str]) = (
        &[
            "{x}\r\n",
            "{X}\r\n",
            "0{x}\r\n",
            "{x};a=b\r\n",
            "{x} ;a=\"b;c\"\r\n",
            "{x}\t\r\n",
            "0000000000000000000{x}\r\n",
        ],
        &[
            "{x}\n",
            "{x}\r",
            "+{x}\r\n",
            "0x{x}\r\n",
            "{x} {x}\r\n",
            "{x};a\n\r\n",
            "{x};\rb\r\n",
            " {x}\r\n",
            "\r\n",
            "1{x}\r\n",
            "{x}\0\r\n",
            "10000000000000000{x}\r\n",
        ],
    );
    const ENDS: (&[&str], &[&str]) = (&["\r\n"], &["", "\n", "\r", "x\r\n", "\r\n\r\n"]);
    const LAST: (&[&str], &[&str]) = (
        &["0\r\n\r\n", "00;x\r\n\r\n", "0\r\nX-Sum: 1\r\n\r\n", "0\r\nContent-Length: 9\r\nHost: z\r\n\r\n"],
        &[
            "",
            "0\r\n",
            "0\n\n",
            "0\r\n\n",
            "0\r\nX : y\r\n\r\n",
            "0\r\nX: a\nY: b\r\n\r\n",
            "0\r\nX: y\n\nGET /hidden HTTP/1.1\nHost: a\n\n\r\n\r\n",
            "0\r\nGET /hidden HTTP/1.1\r\n\r\n",
            "0\r\n X: y\r\n\r\n",
            "-0\r\n\r\n",
            "0\r\n\r\r\n",
        ],
    );
    let mut text = Vec::new();
    let step = [body.len().max(1), 1, 7][choices.below(3)];
    for chunk in body.chunks(step).take(40) {
        let size = of(choices, odd, SIZES.0, SIZES.1);
        let size = size.replace("{x}", &format!("{:x}", chunk.len())).replace("{X}", &format!("{:X}", chunk.len()));
        text.extend_from_slice(size.as_bytes());
        text.extend_from_slice(chunk);
        text.extend_from_slice(of(choices, odd, ENDS.0, ENDS.1).as_bytes());
    }
    text.extend_from_slice(of(choices, odd, LAST.0, LAST.1).as_bytes());
    text
}

/// Bytes are lost, changed, doubled.
fn damage(choices: &mut Choices<'_>, bytes: &mut Vec<u8>) {
    for _ in 0..=choices.below(3) {
        if bytes.is_empty() {
            return;
        }
        let at = (choices.below(256) * 256 + choices.below(256)) % bytes.len();
        match choices.below(6) {
            0 => drop(bytes.remove(at)),
            1 => bytes[at] = choices.byte(),
            2 => bytes.insert(at, choices.byte()),
            3 => bytes.truncate(at),
            4 => {
                let end = (at + 1 + choices.below(64)).min(bytes.len());
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let piece = choices.take(8).to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
}
