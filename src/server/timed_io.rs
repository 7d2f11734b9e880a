//! A client connection's bytes under their time limits, whatever the protocol.

use super::frames::{Frames, PREFACE};
use super::{Limits, Place};
use crate::gateway::problem::{Code, Problem};
use crate::timer::Timer;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// Between requests.
const IDLE: u8 = 0;
/// The first byte of a head has arrived, its end has not.
const HEAD: u8 = 1;
/// A request is being served; its body and its response have limits of their own.
const BUSY: u8 = 2;
/// A tunnel, which may be silent for as long as it likes.
const TUNNEL: u8 = 3;

/// How far an HTTP/1 connection is.
pub(super) struct Phase(AtomicU8);

/// Marks its connection as busy with a request until the response's last byte is on its way.
pub(super) struct Busy(Arc<Phase>);

impl Busy {
    pub(super) fn new(phase: Arc<Phase>) -> Self {
        phase.0.store(BUSY, Ordering::Release);
        Self(phase)
    }

    /// The response switches to another protocol: HTTP ends here.
    pub(super) fn switch(&self) {
        self.0.0.store(TUNNEL, Ordering::Release);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.0.0.compare_exchange(BUSY, IDLE, Ordering::AcqRel, Ordering::Acquire);
    }
}

/// A stream that ends when its peer is too slow: silent for `idle_timeout` between requests, longer than
/// `header_timeout` from the first byte of a head to its end, or not reading for `write_timeout`.
pub(super) struct TimedIo<S> {
    stream: S,
    /// Among `max_connections`, for as long as the stream lives: a tunnel outlives its request.
    _place: Place,
    phase: Arc<Phase>,
    limits: Limits,
    /// Follows the frames, once the connection turned out to be HTTP/2.
    frames: Option<Frames>,
    /// What has been read to tell the protocol by, and how much of it has been taken.
    prefix: ([u8; PREFACE.len()], usize, usize),
    /// What a pending read waits for, and for how long already.
    awaited: Option<Awaited>,
    reading: Timer,
    /// Runs while a write is pending.
    writing: Timer,
    /// What is being said in the place of the HTTP library's refusal, and how much of it has been written.
    refusal: Option<(Vec<u8>, usize)>,
}

/// What a read waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Awaited {
    FirstByte,
    /// With its number, where a connection may be in another one by the next look.
    RestOfHead(u64),
}

impl<S: AsyncRead + AsyncWrite + Unpin> TimedIo<S> {
    pub(super) fn new(stream: S, place: Place, limits: Limits) -> Self {
        Self {
            stream,
            _place: place,
            phase: Arc::new(Phase(AtomicU8::new(IDLE))),
            limits,
            frames: None,
            prefix: ([0; PREFACE.len()], 0, 0),
            awaited: None,
            reading: Timer::default(),
            writing: Timer::default(),
            refusal: None,
        }
    }

    pub(super) fn phase(&self) -> Arc<Phase> {
        Arc::clone(&self.phase)
    }

    /// Reads as far as it takes to tell whether the client begins with HTTP/2's preface. What was read is read again.
    ///
    /// # Errors
    /// The connection's; it was silent for too long, say.
    pub(super) async fn begins_with_preface(&mut self) -> io::Result<bool> {
        let mut read = [0; PREFACE.len()];
        let mut len = 0;
        while let Some(free) = read.get_mut(len..).filter(|free| !free.is_empty()) {
            let more = self.read(free).await?;
            len += more;
            if more == 0 || read.get(..len) != PREFACE.get(..len) {
                break;
            }
        }
        self.prefix = (read, len, 0);
        Ok(len == PREFACE.len() && read == *PREFACE)
    }

    /// From now on the limits are HTTP/2's: a head is what the frames say, and a connection without requests is the
    /// caller's to end, in order.
    pub(super) fn follow_frames(&mut self) {
        self.frames = Some(Frames::new(Instant::now()));
    }

    /// What a pending read waits for, and how long it may; `None`: for ever.
    fn awaited(&self) -> Option<(Awaited, std::time::Duration)> {
        if let Some(frames) = &self.frames {
            return frames.open_head().map(|number| (Awaited::RestOfHead(number), self.limits.header_timeout));
        }
        match self.phase.0.load(Ordering::Acquire) {
            IDLE => Some((Awaited::FirstByte, self.limits.idle_timeout)),
            HEAD => Some((Awaited::RestOfHead(0), self.limits.header_timeout)),
            _ => None,
        }
    }

    /// Whether what is being written may be a refusal of the HTTP library's own.
    fn may_refuse(&self) -> bool {
        self.frames.is_none() && self.phase.0.load(Ordering::Acquire) < BUSY
    }

    fn poll_read_raw(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (prefix, len, taken) = &mut self.prefix;
        if let Some(rest) = prefix.get(*taken..*len).filter(|rest| !rest.is_empty()) {
            let rest = rest.get(..buf.remaining()).unwrap_or(rest);
            buf.put_slice(rest);
            *taken += rest.len();
            // Together with what has come behind it: the HTTP library looks less closely at a head that comes in pieces.
            // A failure shows again at the next read.
            if buf.remaining() > 0 {
                let _ = Pin::new(&mut self.stream).poll_read(cx, buf);
            }
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

/// The problem in whose place `written` is a refusal of the HTTP library's own: it knows no bodies. Such an answer bears
/// nothing but a length of zero, `Connection: close` and the date.
fn library_refusal(written: &[u8]) -> Option<Problem> {
    let head = std::str::from_utf8(written).ok()?.strip_prefix("HTTP/1.1 ")?.strip_suffix("\r\n\r\n")?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.get(..3)?;
    let (mut empty, mut closes) = (false, false);
    for line in lines {
        match line.split_once(": ")? {
            ("content-length", "0") => empty = true,
            ("connection", "close") => closes = true,
            ("date", _) => {}
            _ => return None,
        }
    }
    let problem = match status {
        "400" => Problem::new(Code::BadRequest, "The request is not well-formed HTTP/1.1; nothing was sent on."),
        "414" => Problem::new(Code::TargetTooLong, "The request's target is too long; shorten it."),
        "431" => Problem::new(Code::HeadersTooLarge, "The request's header fields are too large; send less."),
        _ => return None,
    };
    (empty && closes).then_some(problem)
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TimedIo<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled = this.poll_read_raw(cx, buf);
        if polled.is_ready() {
            if let Some(frames) = &mut this.frames {
                let read = buf.filled().get(before..).unwrap_or_default();
                if frames.feed(read, Instant::now()).is_err() {
                    return Poll::Ready(Err(io::Error::other("a flood of HTTP/2 frames that ask for nothing")));
                }
            } else {
                let first_byte = this.phase.0.compare_exchange(IDLE, HEAD, Ordering::AcqRel, Ordering::Acquire);
                if first_byte.is_ok() {
                    this.awaited = None;
                }
            }
            return polled;
        }
        let Some((awaited, limit)) = this.awaited() else {
            this.awaited = None;
            return Poll::Pending;
        };
        if this.awaited.replace(awaited) != Some(awaited) {
            this.reading.stop();
        }
        ready!(this.reading.poll(cx, limit));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncWrite + Unpin> TimedIo<S> {
    fn timed<T>(
        &mut self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let polled = poll(Pin::new(&mut self.stream), cx);
        if polled.is_ready() {
            self.writing.stop();
            return polled;
        }
        let limit = self.limits.write_timeout;
        ready!(self.writing.poll(cx, limit));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TimedIo<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.refusal.is_none() && this.may_refuse() {
            this.refusal = library_refusal(buf).map(|problem| (problem.to_http11(), 0));
        }
        let Some((text, mut written)) = this.refusal.take() else {
            return this.timed(cx, |stream, cx| stream.poll_write(cx, buf));
        };
        while let Some(rest) = text.get(written..).filter(|rest| !rest.is_empty()) {
            match this.timed(cx, |stream, cx| stream.poll_write(cx, rest)) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(more)) => written += more,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    this.refusal = Some((text, written));
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // The library's own refusals are written in one piece.
        if self.refusal.is_some() || bufs.len() == 1 && self.may_refuse() {
            return self.poll_write(cx, bufs.first().map_or(&[], |buf| buf));
        }
        // A short response goes out cheaper in one piece than as a list of pieces.
        let mut joined = [0; SHORT];
        let len = join(bufs, &mut joined);
        self.get_mut().timed(cx, |stream, cx| match len.and_then(|len| joined.get(..len)) {
            Some(joined) => stream.poll_write(cx, joined),
            None => stream.poll_write_vectored(cx, bufs),
        })
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().timed(cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().timed(cx, |stream, cx| stream.poll_shutdown(cx))
    }
}

/// Up to so many bytes are copied in order to be written in one piece.
const SHORT: usize = 1024;

/// Copies the pieces together, if they fit. Returns their length.
fn join(pieces: &[IoSlice<'_>], joined: &mut [u8; SHORT]) -> Option<usize> {
    let mut len = 0;
    for piece in pieces {
        let end = len + piece.len();
        joined.get_mut(len..end)?.copy_from_slice(piece);
        len = end;
    }
    Some(len)
}

#[cfg(test)]
mod tests {
    #[test]
    fn pieces_are_joined_if_they_fit() {
        use super::{SHORT, join};
        let mut joined = [0; SHORT];
        let pieces = [b"ab".as_slice(), b"", b"cde"].map(std::io::IoSlice::new);
        assert_eq!(join(&pieces, &mut joined), Some(5));
        assert_eq!(&joined[..5], b"abcde");
        let whole = [[1; SHORT].as_slice()].map(std::io::IoSlice::new);
        assert_eq!(join(&whole, &mut joined), Some(SHORT));
        let more = [[1; SHORT].as_slice(), b"x"].map(std::io::IoSlice::new);
        assert_eq!(join(&more, &mut joined), None);
    }

    use super::*;

    #[test]
    fn only_the_librarys_own_refusals_are_given_a_body() {
        let code = |text: &str| library_refusal(text.as_bytes()).map(|problem| problem.code);
        let plain = "content-length: 0\r\nconnection: close\r\ndate: Tue, 24 Nov 2026 13:55:34 GMT\r\n\r\n";
        let own = "HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(code(own), Some(Code::HeadersTooLarge));
        assert_eq!(code(&format!("HTTP/1.1 414 URI Too Long\r\n{plain}")), Some(Code::TargetTooLong));
        assert_eq!(code(&format!("HTTP/1.1 400 Bad Request\r\n{plain}")), Some(Code::BadRequest));
        for other in [
            format!("HTTP/1.1 404 Not Found\r\n{plain}"),
            format!("HTTP/1.1 400 Bad Request\r\nx-from: upstream\r\n{plain}"),
            "HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n".to_owned(),
            "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}".to_owned(),
            "\r\n".to_owned(),
            String::new(),
        ] {
            assert_eq!(code(&other), None, "{other}");
        }
    }
}
