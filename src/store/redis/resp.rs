//! The protocol (RESP2): commands out, replies in.

use bytes::{Buf, Bytes, BytesMut};
use memchr::memchr;
use std::collections::VecDeque;
use std::io::IoSlice;

/// The longest string that a reply may hold: that of the server's own default (`proto-max-bulk-len`).
const BULK_MAX: usize = 512 << 20;
/// The longest line: an error, a number.
const LINE_MAX: usize = 64 << 10;
const ELEMENTS_MAX: usize = 1 << 20;
const DEPTH_MAX: u8 = 8;
/// Strings from this length on are not copied out of the read buffer, nor into the write buffer.
const LARGE: usize = 8 << 10;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Status(Bytes),
    Error(String),
    Int(i64),
    Bulk(Bytes),
    Nil,
    Array(Vec<Self>),
}

impl Reply {
    pub(super) fn bulk(self) -> Option<Bytes> {
        match self {
            Self::Bulk(bytes) | Self::Status(bytes) => Some(bytes),
            _ => None,
        }
    }

    pub(super) fn int(&self) -> Option<i64> {
        match self {
            Self::Int(int) => Some(*int),
            Self::Bulk(bytes) => std::str::from_utf8(bytes).ok()?.parse().ok(),
            _ => None,
        }
    }

    pub(super) fn array(self) -> Option<Vec<Self>> {
        match self {
            Self::Array(array) => Some(array),
            _ => None,
        }
    }

    /// That of `TIME`, in milliseconds.
    pub(super) fn time_ms(self) -> Option<u64> {
        let [seconds, micros] = <[Self; 2]>::try_from(self.array()?).ok()?;
        let (seconds, micros) = (u64::try_from(seconds.int()?).ok()?, u64::try_from(micros.int()?).ok()?);
        seconds.checked_mul(1000)?.checked_add(micros / 1000)
    }
}

/// Whatever answers there speaks another protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotResp;

/// Takes replies out of what was read.
#[derive(Debug, Default)]
pub(super) struct Input {
    pub(super) bytes: BytesMut,
    /// Before so many bytes are there, the next reply is not whole.
    needed: usize,
}

impl Input {
    /// The next reply, if it is here whole.
    ///
    /// # Errors
    /// The bytes are no reply.
    pub(super) fn next(&mut self) -> Result<Option<Reply>, NotResp> {
        if self.bytes.len() < self.needed.max(1) {
            return Ok(None);
        }
        let mut cursor = Cursor { bytes: &self.bytes, at: 0 };
        if cursor.bytes.first() == Some(&b'$')
            && let Some(Some(len)) = cursor.length(BULK_MAX)?
            && len >= LARGE
        {
            let start = cursor.at;
            return Ok(self.take_large(start, len));
        }
        cursor.at = 0;
        match cursor.reply(DEPTH_MAX)? {
            Parsed::Whole(reply) => {
                let used = cursor.at;
                self.bytes.advance(used);
                self.needed = 0;
                Ok(Some(reply))
            }
            Parsed::Needs(len) => {
                self.wait_for(len);
                Ok(None)
            }
        }
    }

    fn take_large(&mut self, start: usize, len: usize) -> Option<Reply> {
        if self.bytes.len() < start + len + 2 {
            self.wait_for(start + len + 2);
            return None;
        }
        self.bytes.advance(start);
        let bulk = self.bytes.split_to(len).freeze();
        self.bytes.advance(2);
        self.needed = 0;
        Some(Reply::Bulk(bulk))
    }

    fn wait_for(&mut self, len: usize) {
        self.needed = len;
        // Room at once, but not more than a step ahead of what has come.
        self.bytes.reserve(len.saturating_sub(self.bytes.len()).min(8 << 20));
    }
}

enum Parsed {
    Whole(Reply),
    /// At least so many bytes from the start on.
    Needs(usize),
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn line(&mut self) -> Result<Option<&'a [u8]>, NotResp> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some(end) = memchr(b'\n', rest) else {
            return if rest.len() > LINE_MAX { Err(NotResp) } else { Ok(None) };
        };
        self.at += end + 1;
        rest.get(..end).and_then(|line| line.strip_suffix(b"\r")).map(Some).ok_or(NotResp)
    }

    /// A line's number. The outer `None`: the line is not whole; the inner one: "null".
    fn length(&mut self, max: usize) -> Result<Option<Option<usize>>, NotResp> {
        let Some(line) = self.line()? else { return Ok(None) };
        match number(line.get(1..).unwrap_or_default())? {
            -1 => Ok(Some(None)),
            len => match usize::try_from(len) {
                Ok(len) if len <= max => Ok(Some(Some(len))),
                _ => Err(NotResp),
            },
        }
    }

    fn reply(&mut self, depth: u8) -> Result<Parsed, NotResp> {
        let more = Parsed::Needs(self.bytes.len() + 1);
        let Some(kind) = self.bytes.get(self.at) else { return Ok(more) };
        let whole = match kind {
            b'$' => match self.length(BULK_MAX)? {
                None => return Ok(more),
                Some(None) => Reply::Nil,
                Some(Some(len)) => {
                    let end = self.at + len;
                    let Some(bulk) = self.bytes.get(self.at..end + 2) else { return Ok(Parsed::Needs(end + 2)) };
                    self.at = end + 2;
                    Reply::Bulk(Bytes::copy_from_slice(bulk.strip_suffix(b"\r\n").ok_or(NotResp)?))
                }
            },
            b'*' => match self.length(ELEMENTS_MAX)? {
                None => return Ok(more),
                Some(None) => Reply::Nil,
                Some(Some(len)) => {
                    let depth = depth.checked_sub(1).ok_or(NotResp)?;
                    let mut array = Vec::with_capacity(len.min(1024));
                    for _ in 0..len {
                        match self.reply(depth)? {
                            Parsed::Whole(reply) => array.push(reply),
                            needs @ Parsed::Needs(_) => return Ok(needs),
                        }
                    }
                    Reply::Array(array)
                }
            },
            b':' | b'+' | b'-' => {
                let kind = *kind;
                let Some(line) = self.line()? else { return Ok(more) };
                let text = line.get(1..).unwrap_or_default();
                match kind {
                    b':' => Reply::Int(number(text)?),
                    b'+' => Reply::Status(Bytes::copy_from_slice(text)),
                    _ => Reply::Error(String::from_utf8_lossy(text).into_owned()),
                }
            }
            _ => return Err(NotResp),
        };
        Ok(Parsed::Whole(whole))
    }
}

fn number(text: &[u8]) -> Result<i64, NotResp> {
    std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).ok_or(NotResp)
}

/// What is to be written: small pieces in one buffer, large values as they are.
#[derive(Debug, Default)]
pub(super) struct Output {
    chunks: VecDeque<Bytes>,
    tail: BytesMut,
}

impl Output {
    /// Begins a command of so many arguments, its name included.
    pub(super) fn command(&mut self, arguments: usize) {
        self.prefixed(b'*', arguments);
    }

    pub(super) fn argument(&mut self, bytes: &[u8]) {
        self.prefixed(b'$', bytes.len());
        self.raw(bytes);
        self.raw(b"\r\n");
    }

    pub(super) fn number(&mut self, number: u64) {
        let mut digits = [0; 20];
        self.argument(decimal(number, &mut digits));
    }

    /// Begins an argument of that length, which [`Self::raw`] and [`Self::shared`] fill and [`Self::end`] ends.
    pub(super) fn begin(&mut self, len: usize) {
        self.prefixed(b'$', len);
    }

    pub(super) fn end(&mut self) {
        self.raw(b"\r\n");
    }

    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
    }

    pub(super) fn shared(&mut self, bytes: &Bytes) {
        if bytes.len() < LARGE {
            self.raw(bytes);
        } else {
            self.seal();
            self.chunks.push_back(bytes.clone());
        }
    }

    /// The whole of it, written once, for later use.
    pub(super) fn into_bytes(mut self) -> Bytes {
        self.copy_to_bytes(self.remaining())
    }

    fn prefixed(&mut self, kind: u8, len: usize) {
        let mut digits = [0; 20];
        self.raw(&[kind]);
        self.raw(decimal(len as u64, &mut digits));
        self.raw(b"\r\n");
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.chunks.push_back(self.tail.split().freeze());
        }
    }
}

fn decimal(mut number: u64, digits: &mut [u8; 20]) -> &[u8] {
    let mut used = 0;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        used += 1;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    digits.get(20 - used..).unwrap_or_default()
}

impl Buf for Output {
    fn remaining(&self) -> usize {
        self.chunks.iter().map(Bytes::len).sum::<usize>() + self.tail.len()
    }

    fn chunk(&self) -> &[u8] {
        self.chunks.front().map_or(&self.tail, AsRef::as_ref)
    }

    fn chunks_vectored<'a>(&'a self, to: &mut [IoSlice<'a>]) -> usize {
        let tail = Some(self.tail.as_ref()).filter(|tail| !tail.is_empty());
        let pieces = self.chunks.iter().map(AsRef::as_ref).chain(tail);
        to.iter_mut().zip(pieces).map(|(to, piece)| *to = IoSlice::new(piece)).count()
    }

    fn advance(&mut self, mut n: usize) {
        while n > 0 {
            match self.chunks.front_mut() {
                Some(front) if front.len() > n => {
                    front.advance(n);
                    return;
                }
                Some(front) => {
                    n -= front.len();
                    self.chunks.pop_front();
                }
                None => {
                    self.tail.advance(n.min(self.tail.len()));
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bulk(text: &str) -> Reply {
        Reply::Bulk(Bytes::copy_from_slice(text.as_bytes()))
    }

    /// Both a small string and one that is not copied.
    fn sample() -> (Vec<u8>, Vec<Reply>) {
        let large = "x".repeat(LARGE);
        let text = format!(
            "+OK\r\n:-7\r\n$0\r\n\r\n$-1\r\n-ERR no\r\n${LARGE}\r\n{large}\r\n\
             *3\r\n$2\r\n\r\n\r\n*0\r\n*-1\r\n*1\r\n${LARGE}\r\n{large}\r\n:9223372036854775807\r\n"
        );
        let replies = vec![
            Reply::Status(Bytes::from_static(b"OK")),
            Reply::Int(-7),
            bulk(""),
            Reply::Nil,
            Reply::Error("ERR no".to_owned()),
            bulk(&large),
            Reply::Array(vec![bulk("\r\n"), Reply::Array(vec![]), Reply::Nil]),
            Reply::Array(vec![bulk(&large)]),
            Reply::Int(i64::MAX),
        ];
        (text.into_bytes(), replies)
    }

    fn read(pieces: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Result<Vec<Reply>, NotResp> {
        let (mut input, mut replies) = (Input::default(), Vec::new());
        for piece in pieces {
            input.bytes.extend_from_slice(piece.as_ref());
            while let Some(reply) = input.next()? {
                replies.push(reply);
            }
        }
        Ok(replies)
    }

    #[test]
    fn replies_are_understood_however_they_arrive() {
        let (bytes, replies) = sample();
        assert_eq!(read([&bytes]), Ok(replies.clone()));
        assert_eq!(read(bytes.chunks(1)), Ok(replies.clone()));
        for size in [2, 3, 7, 64, 1000, 8191] {
            assert_eq!(read(bytes.chunks(size)), Ok(replies.clone()), "{size} at a time");
        }
    }

    #[test]
    fn what_is_no_reply_is_said_to_be_none() {
        let deep = "*1\r\n".repeat(20);
        let long = format!("+{}", "x".repeat(LINE_MAX + 2));
        for wrong in [
            "HTTP/1.1 400\r\n",
            "\r\n",
            ":x\r\n",
            "$-2\r\n",
            "$99999999999\r\n",
            "*9999999\r\n",
            "+a\n",
            "$1\r\nabc",
            &deep,
            &long,
        ] {
            assert_eq!(read([wrong]), Err(NotResp), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(prop::sample::select(&b"$*:+-0123\r\nab"[..]), 0..60)) {
            let whole = read([&bytes]);
            let pieces = read(bytes.chunks(1));
            if let (Ok(whole), Ok(pieces)) = (whole, pieces) {
                prop_assert_eq!(whole, pieces);
            }
        }
    }

    #[test]
    fn commands_are_written_with_large_values_as_they_are() {
        let large = Bytes::from(vec![b'y'; LARGE]);
        let mut out = Output::default();
        out.command(3);
        out.argument(b"SET");
        out.number(0);
        out.begin(LARGE + 1);
        out.raw(b"!");
        out.shared(&large);
        out.end();
        let mut expected = format!("*3\r\n$3\r\nSET\r\n$1\r\n0\r\n${}\r\n!", LARGE + 1).into_bytes();
        expected.extend_from_slice(&large);
        expected.extend_from_slice(b"\r\n");
        assert_eq!(out.remaining(), expected.len());
        let mut slices = [IoSlice::new(&[]); 8];
        assert_eq!(out.chunks_vectored(&mut slices), 3);
        assert_eq!(slices[1].as_ptr(), large.as_ptr());
        // Taken away in pieces of any size.
        let mut written = Vec::new();
        while out.has_remaining() {
            let n = out.chunk().len().min(7);
            written.extend_from_slice(&out.chunk()[..n]);
            out.advance(n);
        }
        assert_eq!(written, expected);
        for number in [0, 9, 10, 1 << 40, u64::MAX] {
            assert_eq!(decimal(number, &mut [0; 20]), number.to_string().as_bytes());
        }
    }
}
