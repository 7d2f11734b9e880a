//! An HTTP/2 connection (RFC 9113): its streams, their limits, its end. The HTTP library frames and parses, and bounds
//! heads, CONTINUATION and bursts of resets by itself.

use super::connection::{DRAIN_LINGER, Setting};
use super::timed_io::TimedIo;
use crate::gateway::reply::{BodyError, ReplyBody};
use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH};
use http::{Method, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

/// Requests at once on one connection; more are refused by the HTTP library with `REFUSED_STREAM`.
const STREAMS_MAX: u32 = 128;
/// Of a request body, sent but not yet read by the gateway: per stream, and per connection.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// Of a response body, handed over but not yet written, per stream.
const SEND_BUFFER_BYTES: usize = 64 * 1024;
/// A response body goes out in pieces of this size, so that a slow reader's progress shows.
const PIECE_BYTES: usize = 16 * 1024;
/// Streams that the client has reset before they were accepted (CVE-2023-44487): more end the connection.
const PENDING_RESETS_MAX: usize = 20;
/// Streams that had to be reset because of what the client sent (CVE-2025-8671): more end the connection.
const ERROR_RESETS_MAX: usize = 1024;
/// Requests that the client has given up before they were answered: more than these, and more than half of all, end the
/// connection.
const CANCELLED_MAX: usize = 100;

/// Serves a connection until it ends.
pub(super) async fn serve<S>(mut io: TimedIo<S>, setting: Setting) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    io.follow_frames();
    let Setting { gateway, peer, limits, drain } = setting;
    let streams = Streams::new(limits.write_timeout);
    let peer = Arc::new(peer);
    let service = service_fn(move |request: hyper::Request<_>| {
        let (gateway, peer) = (Arc::clone(&gateway), Arc::clone(&peer));
        async move {
            let stream = STREAM.get();
            let head = request.method() == Method::HEAD;
            let response = gateway.handle(request, &peer).await;
            stream.answered.store(true, Ordering::Release);
            Ok::<_, Infallible>(served(response, head, stream))
        }
    });
    let connection = http2::Builder::new(streams.clone())
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .max_header_list_size(u32::try_from(limits.max_header_bytes).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(PENDING_RESETS_MAX)
        .max_local_error_reset_streams(ERROR_RESETS_MAX)
        .serve_connection(TokioIo::new(io), service);
    let mut connection = pin!(connection);
    let mut closing = false;
    loop {
        let idle_max = if closing { DRAIN_LINGER } else { limits.idle_timeout };
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = drain.cancelled(), if !closing => {}
            // A client that does not answer the GOAWAY is not waited for.
            () = streams.idle(idle_max) => if closing { return Ok(()) },
            () = streams.0.abused.notified() => {
                tracing::debug!("a client gives up most of its requests before they are answered");
                return Ok(());
            }
        }
        connection.as_mut().graceful_shutdown();
        closing = true;
    }
}

/// The response as HTTP/2 has it: no field about the connection (RFC 9113 §8.2.2), and no body to HEAD.
fn served(mut response: Response<ReplyBody>, head: bool, stream: Arc<Stream>) -> Response<StreamBody> {
    response.headers_mut().remove(CONNECTION);
    if head && !response.body().is_end_stream() {
        let len = response.body().size_hint().exact();
        *response.body_mut() = ReplyBody::Full(None);
        if let Some(len) = len {
            response.headers_mut().entry(CONTENT_LENGTH).or_insert(len.into());
        }
    }
    response.map(|body| StreamBody { body, rest: Bytes::new(), stream })
}

tokio::task_local! {
    /// The stream that the task serves.
    static STREAM: Arc<Stream>;
}

/// How far a stream is, for whoever times it.
struct Stream {
    answered: AtomicBool,
    /// Pieces of the body that were handed over.
    pieces: AtomicU64,
    /// Whether the last of them waits for the client's window: the body is not asked for more before it has been taken.
    waits_for_reader: AtomicBool,
}

/// The streams of a connection; runs each in a task of its own.
#[derive(Clone)]
struct Streams(Arc<Shared>);

struct Shared {
    write_timeout: Duration,
    started: Instant,
    open: AtomicUsize,
    /// When the last one ended, in milliseconds since `started`.
    idle_since_ms: AtomicU64,
    opened: AtomicUsize,
    cancelled: AtomicUsize,
    abused: Notify,
}

impl Streams {
    fn new(write_timeout: Duration) -> Self {
        Self(Arc::new(Shared {
            write_timeout,
            started: Instant::now(),
            open: AtomicUsize::new(0),
            idle_since_ms: AtomicU64::new(0),
            opened: AtomicUsize::new(0),
            cancelled: AtomicUsize::new(0),
            abused: Notify::new(),
        }))
    }

    /// Ready once no stream has been open for `limit`, counted from this call or later. Wakes once a limit, not with every
    /// stream.
    async fn idle(&self, limit: Duration) {
        let mut until = Instant::now() + limit;
        loop {
            sleep_until(until).await;
            let now = Instant::now();
            let idle_since = self.0.started + Duration::from_millis(self.0.idle_since_ms.load(Ordering::Acquire));
            until = if self.0.open.load(Ordering::Acquire) > 0 { now } else { idle_since } + limit;
            if until <= now {
                return;
            }
        }
    }
}

/// Counts a stream as open, until dropped.
struct Open(Arc<Shared>, Arc<Stream>);

impl Drop for Open {
    fn drop(&mut self) {
        let Self(shared, stream) = self;
        let now_ms = u64::try_from(shared.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        shared.idle_since_ms.store(now_ms, Ordering::Release);
        shared.open.fetch_sub(1, Ordering::AcqRel);
        if !stream.answered.load(Ordering::Acquire) {
            let cancelled = shared.cancelled.fetch_add(1, Ordering::AcqRel) + 1;
            if cancelled > CANCELLED_MAX && cancelled > shared.opened.load(Ordering::Acquire) / 2 {
                shared.abused.notify_one();
            }
        }
    }
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, future: F) {
        let stream = Arc::new(Stream {
            answered: AtomicBool::new(false),
            pieces: AtomicU64::new(0),
            waits_for_reader: AtomicBool::new(false),
        });
        self.0.open.fetch_add(1, Ordering::AcqRel);
        self.0.opened.fetch_add(1, Ordering::AcqRel);
        let open = Open(Arc::clone(&self.0), Arc::clone(&stream));
        let task = STREAM.scope(Arc::clone(&stream), future);
        tokio::spawn(async move {
            let limit = open.0.write_timeout;
            let mut task = pin!(task);
            // With the number of the piece that it was set for.
            let mut stalled: Option<(u64, Pin<Box<Sleep>>)> = None;
            // Given up, the task drops the stream, which resets it; the connection goes on.
            poll_fn(|cx| {
                if task.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(());
                }
                if !stream.waits_for_reader.load(Ordering::Acquire) {
                    stalled = None;
                    return Poll::Pending;
                }
                let piece = stream.pieces.load(Ordering::Acquire);
                if stalled.as_ref().is_none_or(|(set_for, _)| *set_for != piece) {
                    stalled = Some((piece, Box::pin(sleep(limit))));
                }
                if let Some((_, timer)) = &mut stalled {
                    ready!(timer.as_mut().poll(cx));
                }
                Poll::Ready(())
            })
            .await;
        });
    }
}

/// A response body in pieces.
struct StreamBody {
    body: ReplyBody,
    /// Of a frame that was too large, what is still to be handed over.
    rest: Bytes,
    stream: Arc<Stream>,
}

impl Body for StreamBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        this.stream.waits_for_reader.store(false, Ordering::Release);
        let mut data = std::mem::take(&mut this.rest);
        if data.is_empty() {
            data = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => data,
                    Err(frame) => return Poll::Ready(Some(Ok(frame))),
                },
                end => return Poll::Ready(end),
            };
        }
        if data.len() > PIECE_BYTES {
            this.rest = data.split_off(PIECE_BYTES);
        }
        this.stream.pieces.fetch_add(1, Ordering::AcqRel);
        this.stream.waits_for_reader.store(true, Ordering::Release);
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.rest.is_empty() { self.body.size_hint() } else { SizeHint::new() }
    }
}
