//! One client connection: its time limits, its place in the drain.

use super::Limits;
use crate::gateway::reply::{BodyError, ReplyBody};
use crate::gateway::{Gateway, Peer};
use bytes::Bytes;
use http::HeaderValue;
use http::header::CONNECTION;
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
pub(super) async fn serve<S>(stream: S, gateway: Arc<Gateway>, peer: Peer, limits: Limits, drain: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let phase = Arc::new(Phase(AtomicU8::new(IDLE)));
    let io = TimedIo { stream, phase: Arc::clone(&phase), limits: limits.clone(), reading: None, writing: None };
    let peer = Arc::new(peer);
    let service = service_fn(|request| {
        let busy = Busy::new(Arc::clone(&phase));
        let (gateway, peer, drain) = (Arc::clone(&gateway), Arc::clone(&peer), drain.clone());
        async move {
            let mut response = gateway.handle(request, &peer).await;
            if drain.is_cancelled() {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response.map(|body| ServedBody { body, _busy: busy }))
        }
    });
    let connection = http1::Builder::new()
        .half_close(true)
        .max_header_size(limits.max_header_bytes)
        .max_buf_size(limits.max_header_bytes.saturating_add(READ_AHEAD_BYTES))
        .serve_connection(TokioIo::new(io), service);
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

struct Phase(AtomicU8);

/// Marks its connection as busy with a request until the response's last byte is on its way.
struct Busy(Arc<Phase>);

impl Busy {
    fn new(phase: Arc<Phase>) -> Self {
        phase.0.store(BUSY, Ordering::Release);
        Self(phase)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.0.store(IDLE, Ordering::Release);
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
    phase: Arc<Phase>,
    limits: Limits,
    /// Runs while a read is pending; with the phase that it was set for.
    reading: Option<(u8, Pin<Box<Sleep>>)>,
    /// Runs while a write is pending.
    writing: Option<Pin<Box<Sleep>>>,
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
        self.get_mut().timed(cx, |stream, cx| stream.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
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
