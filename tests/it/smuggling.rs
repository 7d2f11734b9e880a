//! Where one request ends and the next begins. What arrives is refused before the upstream sees any of it, or the upstream
//! reads what no parser can read in two ways.

use crate::rows::Expect::{Cut, Last, Reads, Refused, ThenRefused};
use crate::rows::{HIDDEN, Row, framed, run, whole};
use crate::support::{Client, Gateway, Upstream, request};

#[rustfmt::skip] // One row, one line.
const LENGTHS: &[Row] = &[
    framed("RFC 9112 §6.2", "one length", b"Content-Length: 2\r\n\r\n{}", Reads(&["POST {T} {}"])),
    framed("RFC 9112 §6.2", "a body that looks like a request", b"Content-Length: 33\r\n\r\n{HIDDEN}", Reads(&["POST {T} {HIDDEN}"])),
    framed("RFC 9112 §6.3", "no length, no body", b"\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n", Reads(&["POST {T}", "GET /2"])),
    framed("RFC 9110 §5.5", "white space around a length", b"Content-Length: \t 2 \t\r\n\r\n{}", Reads(&["POST {T} {}"])),
    framed("RFC 9110 §5.6.2", "a name in other case", b"cOnTeNt-LeNgTh:2\r\n\r\n{}", Reads(&["POST {T} {}"])),
    // Some parsers take it for octal: the upstream gets it without.
    framed("RFC 9112 §6.2", "leading zeros", b"Content-Length: 0033\r\n\r\n{HIDDEN}", Reads(&["POST {T} {HIDDEN}"])),
    framed("RFC 9112 §6.2", "zero, twice", b"Content-Length: 00\r\n\r\n", Reads(&["POST {T}"])),
    framed("RFC 9110 §8.6", "two equal lengths become one", b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", Reads(&["POST {T} {}"])),
    framed("RFC 9110 §8.6", "two lengths, the first less", b"Content-Length: 2\r\nContent-Length: 35\r\n\r\n{}{HIDDEN}", Refused(400)),
    framed("RFC 9110 §8.6", "two lengths, the first more", b"Content-Length: 35\r\nContent-Length: 2\r\n\r\n{}{HIDDEN}", Refused(400)),
    framed("RFC 9110 §8.6", "two lengths, another field between", b"Content-Length: 2\r\nX: y\r\nContent-Length: 35\r\n\r\n{}{HIDDEN}", Refused(400)),
    framed("RFC 9110 §8.6", "a list of equal lengths", b"Content-Length: 2, 2\r\n\r\n{}", Refused(400)),
    framed("RFC 9110 §8.6", "a list of lengths", b"Content-Length: 2, 35\r\n\r\n{}{HIDDEN}", Refused(400)),
    framed("RFC 9110 §8.6", "a list with an empty member", b"Content-Length: 2,\r\n\r\n{}", Refused(400)),
    framed("RFC 9112 §6.3", "an empty length", b"Content-Length: \r\n\r\n{HIDDEN}", Refused(400)),
    framed("RFC 9112 §6.3", "a plus sign", b"Content-Length: +2\r\n\r\n{}{HIDDEN}", Refused(400)),
    framed("RFC 9112 §6.3", "a minus sign", b"Content-Length: -0\r\n\r\n{HIDDEN}", Refused(400)),
    framed("RFC 9112 §6.3", "a hexadecimal length", b"Content-Length: 0x2\r\n\r\n{}{HIDDEN}", Refused(400)),
    framed("RFC 9112 §6.3", "an underscore in a length", b"Content-Length: 3_3\r\n\r\n{HIDDEN}", Refused(400)),
    framed("RFC 9112 §6.3", "a fraction", b"Content-Length: 2.0\r\n\r\n{}", Refused(400)),
    framed("RFC 9112 §6.3", "an exponent", b"Content-Length: 1e1\r\n\r\n{}", Refused(400)),
    framed("RFC 9112 §6.3", "a parameter", b"Content-Length: 2;x\r\n\r\n{}", Refused(400)),
    framed("RFC 9112 §6.3", "a space within", b"Content-Length: 3 3\r\n\r\n{HIDDEN}", Refused(400)),
    framed("RFC 9112 §6.3", "a digit that is not ASCII", b"Content-Length: \xef\xbc\x92\r\n\r\n{}", Refused(400)),
    framed("RFC 9112 §6.3", "quotes", b"Content-Length: \"2\"\r\n\r\n{}", Refused(400)),
    framed("RFC 9110 §5.5", "a NUL within", b"Content-Length: 3\x003\r\n\r\n{HIDDEN}", Refused(400)),
    framed("RFC 9110 §5.5", "a NUL behind", b"Content-Length: 2\x00\r\n\r\n{}", Refused(400)),
    framed("RFC 9110 §5.5", "a vertical tab before", b"Content-Length: \x0b2\r\n\r\n{}", Refused(400)),
    framed("RFC 9112 §6.3", "more than 64 bits", b"Content-Length: 18446744073709551618\r\n\r\n{}{HIDDEN}", Refused(400)),
    framed("RFC 9112 §6.3", "twenty nines", b"Content-Length: 99999999999999999999\r\n\r\n{}", Refused(400)),
    framed("RFC 9112 §5.1", "a space before the colon", b"Content-Length : 2\r\n\r\n{}{HIDDEN}", Refused(400)),
    framed("RFC 9112 §5.2", "a folded length", b"Content-Length:\r\n 2\r\n\r\n{}", Refused(400)),
    framed("RFC 9112 §5.2", "a folded digit", b"Content-Length: 3\r\n 3\r\n\r\n{HIDDEN}", Refused(400)),
    framed("RFC 9112 §2.2", "a bare CR before a length", b"X: y\rContent-Length: 33\r\n\r\n{HIDDEN}", Refused(400)),
    framed("RFC 9110 §7.6.1", "a length named hop-by-hop", b"Connection: content-length\r\nContent-Length: 33\r\n\r\n{HIDDEN}", Refused(400)),
];

#[rustfmt::skip] // One row, one line.
const CODINGS: &[Row] = &[
    framed("RFC 9112 §7.1", "chunked", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", Reads(&["POST {T} {}"])),
    framed("RFC 9112 §7", "a coding in other case", b"TRANSFER-ENCODING: cHuNkEd\r\n\r\n2\r\n{}\r\n0\r\n\r\n", Reads(&["POST {T} {}"])),
    framed("RFC 9110 §5.5", "white space around a coding", b"Transfer-Encoding: \t chunked \t\r\n\r\n2\r\n{}\r\n0\r\n\r\n", Reads(&["POST {T} {}"])),
    framed("RFC 9112 §5.1", "a space before the colon", b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §5.1", "a tab before the colon", b"Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.1", "a NUL before the colon", b"Transfer-Encoding\x00: chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.5", "a vertical tab before a coding", b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.5", "a form feed behind a coding", b"Transfer-Encoding: chunked\x0c\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.5", "a NUL behind a coding", b"Transfer-Encoding: chunked\x00\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9110 §5.5", "a backspace within a coding", b"Transfer-Encoding: chun\x08ked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "a no-break space before a coding", b"Transfer-Encoding: \xa0chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "a letter before a coding", b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "a letter behind a coding", b"Transfer-Encoding: chunkedx\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "half a coding", b"Transfer-Encoding: chunk\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "no coding", b"Transfer-Encoding:\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "identity", b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.3", "identity and a length", b"Transfer-Encoding: identity\r\nContent-Length: 33\r\n\r\n{HIDDEN}", Refused(400)),
    framed("RFC 9112 §6.1", "identity behind chunked", b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "identity before chunked", b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "another coding", b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "two codings", b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "chunked twice in a list", b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "an empty member behind", b"Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "an empty member before", b"Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §7", "a parameter", b"Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §7", "quotes", b"Transfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §7", "two words", b"Transfer-Encoding: chunked chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "two lines", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "two lines, the first unknown", b"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "two lines, the second unknown", b"Transfer-Encoding: chunked\r\nTransfer-encoding: cow\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.1", "two lines, the second empty", b"Transfer-Encoding: chunked\r\nTransfer-Encoding:\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §5.2", "a folded coding", b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §5.2", "a second coding folded", b"Transfer-Encoding: chunked\r\n\t, identity\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §2.2", "a coding behind a bare CR", b"X: y\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §2.2", "a coding behind CR CR LF", b"X: y\r\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §6.1", "a coding in HTTP/1.0", b"POST {T} HTTP/1.0\r\nHost: a\r\n{K}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Refused(400)),
    whole("RFC 9112 §6.1", "a coding and a length in HTTP/1.0", b"POST {T} HTTP/1.0\r\nHost: a\r\n{K}Content-Length: 33\r\nTransfer-Encoding: chunked\r\n\r\n{HIDDEN}", Refused(400)),
    // The name says it: not the field that frames. What comes is read by the length alone.
    framed("RFC 9110 §5.1", "an underscore in the name", b"Transfer_Encoding: chunked\r\nContent-Length: 38\r\n\r\n0\r\n\r\n{HIDDEN}", Reads(&["POST {T} 0\r\n\r\n{HIDDEN}"])),
    framed("RFC 9110 §7.6.1", "a coding named hop-by-hop", b"Connection: transfer-encoding\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", Reads(&["POST {T} {}"])),
];

/// RFC 9112 §6.1: the coding counts, the length goes, and the connection ends, so that left-over bytes are nobody's request.
#[rustfmt::skip] // One row, one line.
const BOTH: &[Row] = &[
    framed("RFC 9112 §6.1", "CL.TE", b"Content-Length: 38\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{HIDDEN}", Last(&["POST {T}"])),
    framed("RFC 9112 §6.1", "CL.TE with half a request behind", b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG", Last(&["POST {T}"])),
    framed("RFC 9112 §6.1", "TE.CL", b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n21\r\n{HIDDEN}\r\n0\r\n\r\n", Last(&["POST {T} {HIDDEN}"])),
    framed("RFC 9112 §6.1", "TE.CL with a request behind", b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n2\r\n{}\r\n0\r\n\r\n{HIDDEN}", Last(&["POST {T} {}"])),
    framed("RFC 9112 §6.1", "a length of zero and a coding", b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n{HIDDEN}", Last(&["POST {T} {}"])),
    framed("RFC 9112 §6.1", "the right length and a coding", b"Content-Length: 12\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", Last(&["POST {T} {}"])),
    framed("RFC 9112 §6.1", "two lengths and a coding", b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n{HIDDEN}", Last(&["POST {T} {}"])),
    // A line may end with LF alone (RFC 9112 §2.2), so this is a coding; whoever reads it otherwise never sees it so.
    framed("RFC 9112 §2.2", "a coding behind a bare LF", b"Content-Length: 38\r\nX: y\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{HIDDEN}", Last(&["POST {T}"])),
    framed("RFC 9112 §6.1", "a length, and an obscured coding", b"Content-Length: 38\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n{HIDDEN}", Refused(400)),
    framed("RFC 9112 §5.1", "a length, and a coding with a space before the colon", b"Content-Length: 38\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n{HIDDEN}", Refused(400)),
    framed("RFC 9112 §6.1", "TE.TE: one right, one obscured, and a length", b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\nTransfer-encoding: identity\r\n\r\n21\r\n{HIDDEN}\r\n0\r\n\r\n", Refused(400)),
    framed("RFC 9112 §6.3", "a malformed length before a coding", b"Content-Length: +4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Refused(400)),
];

#[rustfmt::skip] // One row, one line.
const CHUNKS: &[Row] = &[
    framed("RFC 9112 §7.1.1", "an extension", b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0;c\r\n\r\n", Reads(&["POST {T} {}"])),
    framed("RFC 9112 §7.1.1", "a quoted extension", b"Transfer-Encoding: chunked\r\n\r\n2;a=\"b;c\"\r\n{}\r\n0\r\n\r\n", Reads(&["POST {T} {}"])),
    framed("RFC 9112 §7.1.1", "an extension that looks like a chunk", b"Transfer-Encoding: chunked\r\n\r\n2;\r\n{}\r\n0\r\n\r\n", Reads(&["POST {T} {}"])),
    framed("RFC 9112 §7.1.1", "white space before an extension", b"Transfer-Encoding: chunked\r\n\r\n2 ;a=b\r\n{}\r\n0\r\n\r\n", Reads(&["POST {T} {}"])),
    framed("RFC 9112 §7.1", "white space behind a size", b"Transfer-Encoding: chunked\r\n\r\n2 \r\n{}\r\n0\r\n\r\n", Reads(&["POST {T} {}"])),
    framed("RFC 9112 §7.1", "leading zeros and either case", b"Transfer-Encoding: chunked\r\n\r\n00021\r\n{HIDDEN}\r\n0A\r\n0123456789\r\n00\r\n\r\n", Reads(&["POST {T} {HIDDEN}0123456789"])),
    framed("RFC 9112 §7.1", "no chunk at all", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n", Reads(&["POST {T}", "GET /2"])),
    framed("RFC 9112 §7.1.1", "an extension with a bare LF", b"Transfer-Encoding: chunked\r\n\r\n2;\nxx\r\n21\r\n{HIDDEN}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1.1", "an extension with a bare CR", b"Transfer-Encoding: chunked\r\n\r\n2;a\rb\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1.1", "an extension of the last chunk with a bare LF", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0;\n\r\n{HIDDEN}", Cut),
    framed("RFC 9112 §7.1", "a size that ends with a bare LF", b"Transfer-Encoding: chunked\r\n\r\n2\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "a size that ends with a bare CR", b"Transfer-Encoding: chunked\r\n\r\n2\r{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "a size that ends with CR CR LF", b"Transfer-Encoding: chunked\r\n\r\n2\r\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "a last chunk that ends with a bare LF", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\n\n{HIDDEN}", Cut),
    framed("RFC 9112 §7.1", "an end of CR CR LF", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\r\n{HIDDEN}", Cut),
    framed("RFC 9112 §7.1.1", "endless extensions", b"Transfer-Encoding: chunked\r\n\r\n2;{LONG}\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "a plus sign", b"Transfer-Encoding: chunked\r\n\r\n+2\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "a minus sign", b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "a prefix 0x", b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "an underscore", b"Transfer-Encoding: chunked\r\n\r\n0_2\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "white space before a size", b"Transfer-Encoding: chunked\r\n\r\n 2\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "white space within a size", b"Transfer-Encoding: chunked\r\n\r\n0 2\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "no size", b"Transfer-Encoding: chunked\r\n\r\n\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "an extension without a size", b"Transfer-Encoding: chunked\r\n\r\n;a\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "no digit", b"Transfer-Encoding: chunked\r\n\r\ng\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "a NUL within a size", b"Transfer-Encoding: chunked\r\n\r\n2\x00\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "a size of 65 bits", b"Transfer-Encoding: chunked\r\n\r\n10000000000000002\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "a size of 80 bits", b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n{}\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "no CRLF behind a chunk", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "a bare LF behind a chunk", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "a bare CR behind a chunk", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "a chunk longer than its size", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}xx\r\n0\r\n\r\n", Cut),
    framed("RFC 9112 §7.1", "a body without chunks", b"Transfer-Encoding: chunked\r\n\r\n{HIDDEN}", Cut),
];

/// What a trailer says never frames, routes or identifies.
#[rustfmt::skip] // One row, one line.
const TRAILERS: &[Row] = &[
    framed("RFC 9110 §6.5.1", "framing as trailers", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nContent-Length: 33\r\nTransfer-Encoding: chunked\r\nHost: b\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n", Reads(&["POST {T} {}", "GET /2"])),
    framed("RFC 9110 §6.5.1", "framing as announced trailers", b"Trailer: Content-Length, Transfer-Encoding, Host\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nContent-Length: 33\r\nTransfer-Encoding: chunked\r\nHost: b\r\n\r\n", Reads(&["POST {T} {}"])),
    framed("RFC 9110 §6.5.1", "a key as a trailer", b"Trailer: Idempotency-Key\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nIdempotency-Key: other\r\n\r\n", Reads(&["POST {T} {}"])),
    framed("RFC 9112 §7.1.2", "a trailer that is announced", b"Trailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Sum: 1\r\n\r\n", Reads(&["POST {T} {}"])),
    framed("RFC 9112 §5.1", "a trailer with a space before the colon", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX : y\r\n\r\n", Cut),
    framed("RFC 9110 §5.1", "a trailer without a name", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n: y\r\n\r\n", Cut),
    framed("RFC 9112 §5", "a trailer without a colon", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nGET /hidden HTTP/1.1\r\n\r\n", Cut),
    framed("RFC 9110 §5.5", "a trailer with a NUL", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: a\x00b\r\n\r\n", Cut),
    // The library reads on to a line that is empty by the letter, and drops what it finds behind the trailers: lost, but
    // nobody's request.
    framed("RFC 9112 §7.1", "an end of LF alone", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\n{HIDDEN}", Reads(&["POST {T} {}"])),
    framed("RFC 9112 §2.2", "trailers that end with LF alone", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: y\n\nGET /hidden HTTP/1.1\nHost: a\n\n\r\n\r\n", Reads(&["POST {T} {}"])),
    framed("RFC 9112 §2.2", "a bare LF between trailers", b"Trailer: X, Y\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: a\nY: b\r\n\r\n", Cut),
    framed("RFC 9112 §2.2", "a bare CR in a trailer", b"Trailer: X, Y\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: a\rY: b\r\n\r\n", Cut),
    framed("RFC 9110 §6.5", "endless trailers", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: {LONG}\r\n\r\n", Cut),
    framed("RFC 9112 §5.2", "a folded trailer", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: a\r\n b\r\n\r\n", Cut),
];

#[rustfmt::skip] // One row, one line.
const SEQUENCES: &[Row] = &[
    whole("RFC 9112 §9.3.2", "three at once", b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\nGET /3 HTTP/1.1\r\nHost: a\r\n\r\n", Reads(&["GET /1", "GET /2", "GET /3"])),
    framed("RFC 9112 §9.3.2", "a POST, a GET, a chunked PUT", b"Content-Length: 2\r\n\r\n{}GET /2 HTTP/1.1\r\nHost: a\r\n\r\nPUT /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n3\r\n0\r\n\r\n", Reads(&["POST {T} {}", "GET /2", "PUT /3 3"])),
    framed("RFC 9112 §9.3.2", "a GET behind a chunked POST", b"Transfer-Encoding: chunked\r\n\r\n21\r\n{HIDDEN}\r\n0\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n", Reads(&["POST {T} {HIDDEN}", "GET /2"])),
    framed("RFC 9112 §2.2", "empty lines between requests", b"Content-Length: 2\r\n\r\n{}\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n", Reads(&["POST {T} {}", "GET /2"])),
    framed("RFC 9112 §2.2", "garbage behind a request", b"Content-Length: 2\r\n\r\n{}garbage\r\n\r\n", ThenRefused(&["POST {T} {}"], 400)),
    framed("RFC 9112 §6.3", "a body longer than its length", b"Content-Length: 2\r\n\r\n{}{}\r\n\r\n", ThenRefused(&["POST {T} {}"], 400)),
    framed("RFC 9112 §9.3.2", "a refused request behind one that is served", b"Content-Length: 2\r\n\r\n{}POST /posts HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: x\r\n\r\n{HIDDEN}", ThenRefused(&["POST {T} {}"], 400)),
    framed("RFC 9112 §9.6", "a request behind Connection: close", b"Connection: close\r\nContent-Length: 2\r\n\r\n{}{HIDDEN}", Last(&["POST {T} {}"])),
    whole("RFC 9112 §9.3", "a request behind one in HTTP/1.0", b"POST {T} HTTP/1.0\r\nHost: a\r\n{K}Content-Length: 2\r\n\r\n{}{HIDDEN}", Last(&["POST {T} {}"])),
    // CL.0, 0.CL and TE.0: some servers take no body with these methods. A body is a body, whatever the method.
    whole("RFC 9110 §9.3.1", "a GET with a length", b"GET /x HTTP/1.1\r\nHost: a\r\nContent-Length: 33\r\n\r\n{HIDDEN}", Reads(&["GET /x {HIDDEN}"])),
    whole("RFC 9110 §9.3.1", "a GET with a coding", b"GET /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n21\r\n{HIDDEN}\r\n0\r\n\r\n", Reads(&["GET /x {HIDDEN}"])),
    whole("RFC 9110 §9.3.7", "OPTIONS with a coding", b"OPTIONS / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n21\r\n{HIDDEN}\r\n0\r\n\r\n", Reads(&["OPTIONS / {HIDDEN}"])),
    whole("RFC 9110 §9.3.5", "DELETE with a length", b"DELETE /x HTTP/1.1\r\nHost: a\r\nContent-Length: 33\r\n\r\n{HIDDEN}", Reads(&["DELETE /x {HIDDEN}"])),
    whole("RFC 9110 §9.3.8", "TRACE with a length", b"TRACE /x HTTP/1.1\r\nHost: a\r\nContent-Length: 33\r\n\r\n{HIDDEN}", Reads(&["TRACE /x {HIDDEN}"])),
    whole("RFC 9110 §9.1", "an unknown method with a length", b"BREW /x HTTP/1.1\r\nHost: a\r\nContent-Length: 33\r\n\r\n{HIDDEN}", Reads(&["BREW /x {HIDDEN}"])),
    whole("RFC 9110 §7.8", "an upgrade that is not granted, with a request behind", b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n", Reads(&["GET /x", "GET /2"])),
];

#[test]
fn lengths() {
    run(LENGTHS, "");
}

#[test]
fn transfer_codings() {
    run(CODINGS, "");
}

#[test]
fn both_a_length_and_a_transfer_coding() {
    run(BOTH, "");
}

#[test]
fn chunks() {
    run(CHUNKS, "");
}

#[test]
fn trailers() {
    run(TRAILERS, "");
}

#[test]
fn sequences_of_requests() {
    run(SEQUENCES, "");
}

#[test]
fn the_unread_chunks_of_a_refused_request_are_never_the_next_request() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_body = \"16B\"");
    let chunks = format!("Transfer-Encoding: chunked\r\n\r\n21\r\n{HIDDEN}\r\n0\r\n\r\n");
    for (key, code) in [("Idempotency-Key:", "key_invalid"), ("Idempotency-Key: k", "body_too_large")] {
        let head = format!("POST /posts HTTP/1.1\r\nHost: a\r\n{key}\r\n");
        for at in [0, 1, chunks.len() - HIDDEN.len() - 8] {
            let text = format!("{head}{chunks}");
            let (first, rest) = text.split_at(head.len() + at);
            let mut client = Client::connect(gateway.addr);
            client.send(first);
            client.try_send(rest);
            assert_eq!(client.read().json()["code"], code);
            client.try_send(request("GET", "/next", &[("Connection", "close")], ""));
            if let Some(next) = client.try_read() {
                assert_eq!(next.status, 201, "{next:?}");
                assert!(client.at_end());
            }
        }
    }
    assert!(upstream.requests().iter().all(|seen| seen.target == "/next"), "{:?}", upstream.requests());
}
