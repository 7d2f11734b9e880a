//! One client connection: its time limits, its place in the drain.

use super::{Limits, Place};
use crate::gateway::problem::{Code, Problem};
use crate::gateway::reply::{BodyError, ReplyBody};
use crate::gateway::{Gateway, Peer};
use bytes::Bytes;
use http::header::CONNECTION;
use http::{HeaderValue, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};
use tokio_util::sync::CancellationToken;

/// How long an idle connection stays open once the drain has begun, so that a request that is on its way is served.
const DRAIN_LINGER: Duration = Duration::from_secs(5);

/// Serves a connection until it ends.
pub(super) async fn serve<S>(
    stream: S,
    place: Place,
    gateway: Arc<Gateway>,
    peer: Peer,
    limits: Limits,
    drain: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let phase = Arc::new(Phase(AtomicU8::new(IDLE)));
    let io = TimedIo {
        stream,
        _place: place,
        phase: Arc::clone(&phase),
        limits: limits.clone(),
        reading: None,
        writing: None,
        refusal: None,
    };
    let peer = Arc::new(peer);
    let service = service_fn(|request| {
        let busy = Busy::new(Arc::clone(&phase));
        let (gateway, peer, drain) = (Arc::clone(&gateway), Arc::clone(&peer), drain.clone());
        async move {
            let mut response = gateway.handle(request, &peer).await;
            if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                busy.switch();
            } else if drain.is_cancelled() {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response.map(|body| ServedBody { body, _busy: busy }))
        }
    });
    let connection = http1::Builder::new()
        .half_close(true)
        .max_header_size(limits.max_header_bytes)
        .max_buf_size(limits.max_header_bytes.saturating_add(READ_AHEAD_BYTES))
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = drain.cancelled() => {
            // A request in flight is finished in any case; an idle connection is closed after a while.
            match tokio::time::timeout(DRAIN_LINGER, connection.as_mut()).await {
                Ok(ended) => ended,
                Err(_) => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a client connection ended early");
    }
}

/// Room in the read buffer beside the largest head.
const READ_AHEAD_BYTES: usize = 16 * 1024;

/// Between requests.
const IDLE: u8 = 0;
/// The first byte of a head has arrived, its end has not.
const HEAD: u8 = 1;
/// A request is being served; its body and its response have limits of their own.
const BUSY: u8 = 2;
/// A tunnel, which may be silent for as long as it likes.
const TUNNEL: u8 = 3;

struct Phase(AtomicU8);

/// Marks its connection as busy with a request until the response's last byte is on its way.
struct Busy(Arc<Phase>);

impl Busy {
    fn new(phase: Arc<Phase>) -> Self {
        phase.0.store(BUSY, Ordering::Release);
        Self(phase)
    }

    /// The response switches to another protocol: HTTP ends here.
    fn switch(&self) {
        self.0.0.store(TUNNEL, Ordering::Release);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = self.0.0.compare_exchange(BUSY, IDLE, Ordering::AcqRel, Ordering::Acquire);
    }
}

struct ServedBody {
    body: ReplyBody,
    _busy: Busy,
}

impl Body for ServedBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A stream that ends when its peer is too slow: silent for `idle_timeout` between requests, longer than
/// `header_timeout` from the first byte of a head to its end, or not reading for `write_timeout`.
struct TimedIo<S> {
    stream: S,
    _place: Place,
    phase: Arc<Phase>,
    limits: Limits,
    /// Runs while a read is pending; with the phase that it was set for.
    reading: Option<(u8, Pin<Box<Sleep>>)>,
    /// Runs while a write is pending.
    writing: Option<Pin<Box<Sleep>>>,
    /// What is being said in the place of the HTTP library's refusal, and how much of it has been written.
    refusal: Option<(Vec<u8>, usize)>,
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

impl<S: AsyncRead + Unpin> AsyncRead for TimedIo<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        if polled.is_ready() {
            let first_byte = this.phase.0.compare_exchange(IDLE, HEAD, Ordering::AcqRel, Ordering::Acquire);
            if first_byte.is_ok() {
                this.reading = None;
            }
            return polled;
        }
        let phase = this.phase.0.load(Ordering::Acquire);
        let limit = match phase {
            IDLE => this.limits.idle_timeout,
            HEAD => this.limits.header_timeout,
            _ => {
                this.reading = None;
                return Poll::Pending;
            }
        };
        if this.reading.as_ref().is_none_or(|(set_for, _)| *set_for != phase) {
            this.reading = Some((phase, Box::pin(sleep(limit))));
        }
        if let Some((_, timer)) = &mut this.reading {
            ready!(timer.as_mut().poll(cx));
        }
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
            self.writing = None;
            return polled;
        }
        let limit = self.limits.write_timeout;
        ready!(self.writing.get_or_insert_with(|| Box::pin(sleep(limit))).as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TimedIo<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.refusal.is_none() && this.phase.0.load(Ordering::Acquire) < BUSY {
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
        if self.refusal.is_some() || self.phase.0.load(Ordering::Acquire) < BUSY && bufs.len() == 1 {
            return self.poll_write(cx, bufs.first().map_or(&[], |buf| buf));
        }
        self.get_mut().timed(cx, |stream, cx| stream.poll_write_vectored(cx, bufs))
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

#[cfg(test)]
mod tests {
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
