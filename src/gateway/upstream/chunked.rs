//! The chunked transfer coding of responses (RFC 9112 §7.1), read by the letter: where others may see another end, it is
//! malformed.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

/// Bytes that a chunk's line may have, its extensions included.
const LINE_MAX: usize = 4 * 1024;
/// Bytes that the trailers may have.
const TRAILERS_MAX: usize = 16 * 1024;
/// Trailer lines.
const TRAILER_LINES_MAX: usize = 100;

/// How far a chunked body has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunked {
    /// A chunk's line comes next.
    Line,
    /// So many bytes of a chunk are still to come.
    Data(u64),
    /// The end of the line behind a chunk's data.
    DataEnd,
    Trailers,
    Ended,
}

/// A piece of a chunked body.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
    End,
}

impl Chunked {
    /// Takes the next piece out of what has been read; `None`: more has to be read.
    ///
    /// # Errors
    /// What is wrong.
    pub(super) fn take(&mut self, read: &mut BytesMut) -> Result<Option<Piece>, &'static str> {
        loop {
            match *self {
                Self::Line => {
                    let Some(line) = take_line(read, LINE_MAX)? else { return Ok(None) };
                    *self = match chunk_len(&line)? {
                        0 => Self::Trailers,
                        len => Self::Data(len),
                    };
                }
                Self::Data(left) => {
                    if read.is_empty() {
                        return Ok(None);
                    }
                    let (data, left) = take_data(read, left);
                    *self = if left == 0 { Self::DataEnd } else { Self::Data(left) };
                    return Ok(Some(Piece::Data(data)));
                }
                Self::DataEnd => match read.get(..2) {
                    Some(b"\r\n") => {
                        read.advance(2);
                        *self = Self::Line;
                    }
                    None if b"\r\n".starts_with(read) => return Ok(None),
                    _ => return Err("a chunk that is longer than it says"),
                },
                Self::Trailers => {
                    let Some(trailers) = take_trailers(read)? else { return Ok(None) };
                    *self = Self::Ended;
                    return Ok(Some(trailers));
                }
                Self::Ended => return Ok(Some(Piece::End)),
            }
        }
    }
}

/// What has been read of data of which `left` bytes are still to come, and how many are then.
pub(super) fn take_data(read: &mut BytesMut, left: u64) -> (Bytes, u64) {
    let len = usize::try_from(left).map_or(read.len(), |left| left.min(read.len()));
    (read.split_to(len).freeze(), left - len as u64)
}

/// A line without its CRLF. A bare LF ends none, a bare CR is in none.
fn take_line(read: &mut BytesMut, max: usize) -> Result<Option<Bytes>, &'static str> {
    let Some(end) = memchr::memchr2(b'\r', b'\n', read) else {
        return if read.len() > max { Err("an endless line of a chunk") } else { Ok(None) };
    };
    match read.get(end..) {
        Some([b'\r', b'\n', ..]) if end <= max => {
            let line = read.split_to(end).freeze();
            read.advance(2);
            Ok(Some(line))
        }
        Some([b'\r']) if end <= max => Ok(None),
        _ => Err("a chunk's line that does not end with CRLF"),
    }
}

/// `chunk-size [ chunk-ext ]`; blanks may stand before the extensions.
fn chunk_len(line: &[u8]) -> Result<u64, &'static str> {
    let (digits, rest) = line.split_at(line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count());
    let extended = matches!(rest.trim_ascii_start(), [] | [b';', ..]);
    if !extended || rest.iter().any(|&byte| byte.is_ascii_control() && byte != b'\t') {
        return Err("a chunk's line that is none");
    }
    let digits = std::str::from_utf8(digits).map_err(|_| NO_SIZE)?;
    u64::from_str_radix(digits, 16).ok().filter(|_| digits.len() <= 16).ok_or(NO_SIZE)
}

const NO_SIZE: &str = "a chunk without a size that can be read";

/// The trailers and the empty line behind them; `End` where there are none.
fn take_trailers(read: &mut BytesMut) -> Result<Option<Piece>, &'static str> {
    match read.as_ref() {
        [b'\r', b'\n', ..] => {
            read.advance(2);
            return Ok(Some(Piece::End));
        }
        [] | [b'\r'] => return Ok(None),
        _ => {}
    }
    let Some(end) = memchr::memmem::find(read, b"\r\n\r\n") else {
        return if read.len() > TRAILERS_MAX { Err("endless trailers") } else { Ok(None) };
    };
    if end > TRAILERS_MAX {
        return Err("endless trailers");
    }
    let block = read.split_to(end + 4).freeze();
    // The parser takes a bare LF for the end of a line.
    if memchr::memchr_iter(b'\n', &block).any(|at| at.checked_sub(1).and_then(|at| block.get(at)) != Some(&b'\r')) {
        return Err("trailers with a bare LF");
    }
    let mut lines = [httparse::EMPTY_HEADER; TRAILER_LINES_MAX];
    let parsed = match httparse::parse_headers(&block, &mut lines) {
        Ok(httparse::Status::Complete((len, parsed))) if len == block.len() => parsed,
        _ => return Err("trailers that are none"),
    };
    let mut trailers = HeaderMap::with_capacity(parsed.len());
    for line in parsed {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| "trailers that are none")?;
        trailers.append(name, HeaderValue::from_bytes(line.value).map_err(|_| "trailers that are none")?);
    }
    Ok(Some(Piece::Trailers(trailers)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes `text`, which arrives in pieces of `step` bytes: the data, the trailers, and what is left behind the end.
    fn decode(text: &[u8], step: usize) -> Result<(Vec<u8>, HeaderMap, Vec<u8>), &'static str> {
        let (mut chunked, mut read) = (Chunked::Line, BytesMut::new());
        let (mut data, mut trailers) = (Vec::new(), HeaderMap::new());
        let mut arriving = text.chunks(step);
        loop {
            match chunked.take(&mut read)? {
                Some(Piece::Data(bytes)) => data.extend_from_slice(&bytes),
                Some(Piece::Trailers(fields)) => trailers = fields,
                Some(Piece::End) => {
                    read.extend_from_slice(&arriving.collect::<Vec<_>>().concat());
                    return Ok((data, trailers, read.to_vec()));
                }
                None => read.extend_from_slice(arriving.next().ok_or("cut off")?),
            }
        }
    }

    #[test]
    fn a_body_is_read_in_whatever_pieces_it_comes() {
        let text = b"3\r\nabc\r\n00A;x=\"y\"\r\n0123456789\r\n0\r\nX-Sum: 7\r\nX-Sum: 8\r\n\r\nrest";
        for step in 1..=text.len() {
            let (data, trailers, rest) = decode(text, step).unwrap();
            assert_eq!((data.as_slice(), rest.as_slice()), (b"abc0123456789".as_slice(), b"rest".as_slice()), "{step}");
            assert_eq!(trailers.get_all("x-sum").iter().count(), 2);
            assert_eq!(decode(b"0\r\n\r\n", step).unwrap(), (Vec::new(), HeaderMap::new(), Vec::new()));
        }
        assert_eq!(decode(b"2 \t;x\r\nok\r\n0 \r\n\r\n", 1).unwrap().0, b"ok");
    }

    #[test]
    fn what_others_may_read_otherwise_is_refused() {
        let long = [b"1;".as_slice(), &[b'x'; LINE_MAX], b"\r\na\r\n0\r\n\r\n"].concat();
        let trailing = [b"0\r\nX: ".as_slice(), &[b'x'; TRAILERS_MAX], b"\r\n\r\n"].concat();
        for text in [
            b"\r\n".as_slice(),
            b"g\r\n",
            b"-1\r\n",
            b"+1\r\na\r\n0\r\n\r\n",
            b" 1\r\na\r\n0\r\n\r\n",
            b"0x1\r\na\r\n0\r\n\r\n",
            b"1 1\r\na\r\n0\r\n\r\n",
            b"1\na\r\n0\r\n\r\n",
            b"1\r\na\n0\r\n\r\n",
            b"1\r\nab\r\n0\r\n\r\n",
            b"1;a\x00\r\na\r\n0\r\n\r\n",
            b"1;a\rb\r\na\r\n0\r\n\r\n",
            b"10000000000000000\r\n",
            b"00000000000000001\r\na\r\n0\r\n\r\n",
            b"0\r\nX: y\n\r\n\r\n",
            b"0\r\nX: y\n\nX: z\r\n\r\n",
            b"0\r\n: y\r\n\r\n",
            b"0\r\nX y\r\n\r\n",
            b"0\r\nX: a\r\n b\r\n\r\n",
            &long,
            &trailing,
        ] {
            for step in [1, 7, text.len()] {
                let error = decode(text, step).unwrap_err();
                assert_ne!(error, "cut off", "{:?}", String::from_utf8_lossy(text.get(..40).unwrap_or(text)));
            }
        }
        for text in [b"".as_slice(), b"5", b"5\r\nabc", b"3\r\nabc", b"3\r\nabc\r\n", b"0\r\n", b"0\r\nX: y\r\n"] {
            assert_eq!(decode(text, 1).unwrap_err(), "cut off");
        }
    }
}
