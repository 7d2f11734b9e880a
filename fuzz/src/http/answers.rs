//! What the upstream writes: responses out of a grammar that goes astray now and then.

use crate::choices::Choices;

/// Stands for the number of the visit that is answered; as long as that.
const TOKEN: &str = "[visit ????]";

pub(crate) fn token(visit: usize) -> String {
    format!("[visit {visit:04}]")
}

#[derive(Clone, Debug)]
pub(crate) struct Script {
    /// It answers once the head is there; it never reads the rest.
    pub(crate) early: bool,
    pub(crate) delay: u64,
    text: Vec<u8>,
    /// Where pieces of it end.
    pub(crate) pieces: Vec<usize>,
    /// What it says if the protocol is switched.
    pub(crate) switches: bool,
    /// Whether the connection ends behind it.
    pub(crate) close: bool,
}

impl Script {
    pub(crate) fn text(&self, visit: usize) -> Vec<u8> {
        replace(&self.text, TOKEN.as_bytes(), token(visit).as_bytes())
    }

    /// Whether it says that nothing was executed, or something like it.
    pub(crate) fn may_free(&self) -> bool {
        let text = crate::wire::text(&self.text).to_ascii_lowercase();
        let frees = ["307", "308", "401", "403", "407", "421", "425", "429", "503", "idempotency-outcome"];
        frees.iter().any(|word| text.contains(word))
    }
}

fn replace(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut text = text.to_vec();
    for at in 0..text.len() {
        if text[at..].starts_with(from) {
            text[at..at + to.len()].copy_from_slice(to);
        }
    }
    text
}

/// As the upstream answers when it has no further word.
pub(crate) fn plain() -> Script {
    let text = format!("HTTP/1.1 201 Created\r\nContent-Length: {}\r\n\r\n{TOKEN}", TOKEN.len()).into_bytes();
    Script { early: false, delay: 0, text, pieces: Vec::new(), switches: false, close: false }
}

fn of<'a>(choices: &mut Choices<'_>, odd: usize, usual: &'a [&'a str], unusual: &'a [&'a str]) -> &'a str {
    let from = if choices.one_in(odd) { unusual } else { usual };
    from[choices.below(from.len())]
}

const VERSIONS: (&[&str], &[&str]) =
    (&["HTTP/1.1"], &["HTTP/1.0", "HTTP/1.0", "HTTP/2", "http/1.1", "HTTP/1.1x", "HTTP/1.2", "", "ICY"]);
const STATUSES: (&[&str], &[&str]) = (
    &["201 Created", "200 OK", "200 ", "409 Conflict", "500 Oops", "404 Not Found"],
    &[
        "204 No Content",
        "304 Not Modified",
        "429 Slow",
        "503 Busy",
        "502 Bad",
        "408 Late",
        "100 Continue",
        "101 Switching",
        "199 x",
        "2x0 OK",
        "99 x",
        "1000 x",
        "200",
        "-200 x",
        "200\tOK",
        "302 Found",
        "600 x",
        "200 O\0K",
        "205 Reset",
    ],
);
const LINES: &[&str] = &[
    "Date: Sun, 06 Nov 1994 08:49:37 GMT",
    "Content-Type: text/plain",
    "Connection: close",
    "Connection: keep-alive",
    "Connection: X-Hop\r\nX-Hop: 1",
    "Keep-Alive: timeout=2",
    "Set-Cookie: a=b",
    "Location: /posts/1",
    "Retry-After: 1",
    "Idempotency-Outcome: final",
    "Idempotency-Outcome: not-executed",
    "Idempotency-Outcome: unknown",
    "Trailer: X-Sum",
    "Upgrade: websocket",
    "Connection: Upgrade\r\nUpgrade: websocket",
    "Age: 7",
    "Cache-Status: x; hit",
    "X: \u{e4}",
    "X:",
    "Idempotency-Replayed: true",
    "Proxy-Authenticate: Basic",
    "X-Two: 1\r\nx-two: 2",
    "Via: 1.1 y",
    "Vary: *",
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
    "X\u{e4}: y",
    "X: \x7f",
    "Transfer-Encoding : chunked",
    "Connection: content-length",
    "Connection: transfer-encoding, set-cookie",
];

pub(crate) fn script(choices: &mut Choices<'_>) -> Script {
    let style = choices.byte();
    let odd = |place: u8| {
        if style & 0x80 > 0 {
            4
        } else if style % 10 == place {
            1
        } else {
            256
        }
    };
    let mut text = String::new();
    for _ in 0..[0, 0, 0, 0, 0, 1, 2, 70][choices.below(8)] {
        text += "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n";
    }
    let eol = of(choices, odd(0), &["\r\n"], &["\n", "\r", "\r\r\n", "\r\n\r\n"]);
    let status = of(choices, odd(2), STATUSES.0, STATUSES.1);
    text += &format!("{} {status}{eol}", of(choices, odd(1), VERSIONS.0, VERSIONS.1));
    for _ in 0..choices.below(4) {
        text += &format!("{}{eol}", of(choices, odd(3), LINES, ODD_LINES));
    }
    let body = match choices.below(12) {
        0 => String::new(),
        1 => format!("{TOKEN:.<1500}"),
        2 => format!("{TOKEN}{TOKEN}{TOKEN}"),
        _ => TOKEN.to_owned(),
    };
    let framing = odd(4);
    let sound = framing > 4 && !text.contains("101");
    text += &framed(choices, framing, odd(5), eol, &body);
    let mut text = text.chars().map(|c| c as u32 as u8).collect::<Vec<_>>();
    let mut pieces = Vec::new();
    match choices.below(8) {
        0 if style % 10 == 6 => text.truncate(choices.below(256) % (text.len() + 1)),
        1 if style % 10 == 6 => {
            let at = choices.below(256) % text.len();
            text[at] = choices.byte();
        }
        // What nobody has asked for. Were it to come later, it would be the answer to the next request.
        2..=5 if style % 10 == 7 => text.extend_from_slice(&plain().text),
        6 if style % 10 == 7 => text.extend_from_slice(b"garbage\r\n\r\n"),
        _ if sound && style & 0x80 == 0 => {
            let mut at = 0;
            for _ in 0..choices.below(6) {
                at += 1 + choices.below(60);
                pieces.push(at.min(text.len()));
            }
        }
        _ => {}
    }
    Script {
        early: choices.one_in(12),
        delay: [0, 0, 0, 0, 1, 300, 1500, 4000][choices.below(8)],
        switches: status.starts_with("101"),
        text,
        pieces,
        close: choices.one_in(5),
    }
}

/// The fields that frame a body, the end of the head, and the body.
fn framed(choices: &mut Choices<'_>, odd: usize, odd_chunks: usize, eol: &str, body: &str) -> String {
    let len = body.len();
    let chunks = chunked(choices, odd_chunks, body);
    if !choices.one_in(odd) {
        return match choices.below(3) {
            0 => format!("Transfer-Encoding: chunked{eol}{eol}{chunks}"),
            _ => format!("Content-Length: {len}{eol}{eol}{body}"),
        };
    }
    match choices.below(16) {
        // It ends with the connection.
        0 | 1 => format!("{eol}{body}"),
        2 => format!("Content-Length: {}{eol}{eol}{body}", len + 1),
        3 => format!("Content-Length: {}{eol}{eol}{body}", len.saturating_sub(1)),
        4 => format!("Content-Length: +{len}{eol}{eol}{body}"),
        5 => format!("Content-Length: {len}, {len}{eol}{eol}{body}"),
        6 => format!("Content-Length: {len}{eol}Content-Length: {len}{eol}{eol}{body}"),
        7 => format!("Content-Length: {len}{eol}Content-Length: 0{eol}{eol}{body}"),
        8 => format!("Content-Length: {len}{eol}Transfer-Encoding: chunked{eol}{eol}{chunks}"),
        9 => format!("Transfer-Encoding: gzip, chunked{eol}{eol}{chunks}"),
        10 => format!("Transfer-Encoding: chunked{eol}Transfer-Encoding: chunked{eol}{eol}{chunks}"),
        11 => format!("Transfer-Encoding: identity{eol}Content-Length: {len}{eol}{eol}{body}"),
        12 => format!("Content-Length: 00{len}{eol}{eol}{body}"),
        13 => format!("Content-Length: 18446744073709551616{eol}{eol}{body}"),
        14 => format!("Content-Length:{eol}{eol}{body}"),
        _ => format!("Transfer-Encoding: chunked{eol}{eol}{body}"),
    }
}

fn chunked(choices: &mut Choices<'_>, odd: usize, body: &str) -> String {
    const SIZES: (&[&str], &[&str]) = (
        &["{x}\r\n", "0{x}\r\n", "{x};a=b\r\n"],
        &["{x}\n", "0x{x}\r\n", "+{x}\r\n", "1{x}\r\n", "{x};\n\r\n", "\r\n", " {x}\r\n"],
    );
    const LAST: (&[&str], &[&str]) = (
        &[
            "0\r\n\r\n",
            "0;x\r\n\r\n",
            "0\r\nX-Sum: 1\r\n\r\n",
            "0\r\nContent-Length: 9\r\nTransfer-Encoding: x\r\n\r\n",
        ],
        &[
            "",
            "0\r\n",
            "0\n\n",
            "0\r\nX : y\r\n\r\n",
            "0\r\nX: a\nY: b\r\n\r\n",
            "0\r\nX: a\rY: b\r\n\r\n",
            "0\r\nHTTP/1.1 200 OK\r\n\r\n",
        ],
    );
    let mut text = String::new();
    if !body.is_empty() {
        let size = of(choices, odd, SIZES.0, SIZES.1).replace("{x}", &format!("{:x}", body.len()));
        text += &format!("{size}{body}{}", of(choices, odd, &["\r\n"], &["", "\n", "x\r\n"]));
    }
    text + of(choices, odd, LAST.0, LAST.1)
}
