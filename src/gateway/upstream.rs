//! The way to the upstream: connecting, a pool of idle connections, and sending a request at most once.

mod connect;
pub mod tls;

use super::body::ForwardBody;
use super::headers::{is_soundly_framed, keep_alive_seconds};
use super::reply::BodyError;
use crate::pem::FileError;
use crate::telemetry::Metrics;
use bytes::Bytes;
use connect::Link;
use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// What the upstream sees as `Host`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPolicy {
    /// What the client sent.
    Preserve,
    /// The authority of `upstream.url`.
    Upstream,
    Name(HeaderValue),
}

/// `[upstream]`.
#[derive(Clone, Debug)]
pub struct Options {
    pub endpoint: Endpoint,
    /// `None`: in clear.
    pub tls: Option<Arc<tls::Connector>>,
    /// Host header for requests that bring none: the authority of `upstream.url`, `localhost` for a Unix socket.
    pub authority: HeaderValue,
    pub connect_timeout: Duration,
    pub response_timeout: Duration,
    pub late_window: Duration,
    pub idle_timeout: Duration,
    /// Claimed forwards under way, late ones included.
    pub max_in_flight: usize,
    pub host: HostPolicy,
}

/// The upstream, with its idle connections.
pub struct Upstream {
    options: Options,
    /// Newest last.
    idle: Mutex<VecDeque<Idle>>,
    metrics: Metrics,
}

struct Idle {
    link: Link,
    expires: Instant,
}

/// Idle connections kept at most.
const IDLE_MAX: usize = 1024;

/// Why a request got no response.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Not a byte of it was sent.
    #[error("cannot connect to the upstream: {error}")]
    Unreachable { error: io::Error, proxy_error: &'static str },
    /// It may have been executed.
    #[error("the upstream broke off: {0}")]
    Broken(#[source] hyper::Error),
    /// It has been answered, but not in HTTP as it should be; it may have been executed.
    #[error("the upstream's response is malformed: {0}")]
    Malformed(&'static str),
}

impl Upstream {
    #[must_use]
    pub fn new(options: Options, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self { options, idle: Mutex::new(VecDeque::new()), metrics })
    }

    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Reads the files of `[upstream.tls]` again, for connections to come; `false`: the upstream is spoken to in clear.
    ///
    /// # Errors
    /// All files that cannot be used; then everything stays as it was.
    pub fn reload_tls(&self) -> Result<bool, Vec<FileError>> {
        self.options.tls.as_ref().map_or(Ok(false), |tls| tls.reload().map(|()| true))
    }

    #[must_use]
    pub fn idle_connections(&self) -> usize {
        self.idle().len()
    }

    /// Sends a request and waits for the head of its response. It is sent again, on another connection, only when that
    /// cannot be a second execution: the HTTP library hands it back, which it does only if not a byte of it was written; or
    /// it is safe, without a body, and its pooled connection was closed without a byte of an answer.
    ///
    /// # Errors
    /// See [`SendError`].
    pub async fn send(
        self: &Arc<Self>,
        mut request: Request<ForwardBody>,
    ) -> Result<(Response<Incoming>, Connection), SendError> {
        let upgrade = request.headers().contains_key(UPGRADE);
        // A pooled connection may have been closed by the other side; after two of those a new one is surely better.
        let mut pooled_left = 2_u8;
        loop {
            let pooled = if pooled_left > 0 { self.checkout() } else { None };
            pooled_left = pooled_left.saturating_sub(1);
            let reused = pooled.is_some();
            let mut link = match pooled {
                Some(link) => link,
                None => self.connect().await?,
            };
            link.expect_answer();
            let spare = if reused { repeatable(&request) } else { None };
            let mut failed = match link.sender.try_send_request(request).await {
                Ok(response) => {
                    if reused {
                        self.metrics.upstream_reused.inc();
                    }
                    check(&response, upgrade).inspect_err(|_| link.abort())?;
                    let idle_timeout = self.idle_timeout(&response);
                    let connection = Connection { link, upstream: Arc::clone(self), idle_timeout };
                    return Ok((response, connection));
                }
                Err(failed) => failed,
            };
            request = match (failed.take_message(), spare) {
                (Some(unsent), _) if reused => unsent,
                (Some(_), _) => {
                    let error = io::Error::new(io::ErrorKind::ConnectionReset, failed.into_error());
                    return Err(SendError::Unreachable { error, proxy_error: "connection_terminated" });
                }
                (None, Some(spare)) if !link.answered() => {
                    self.metrics.upstream_retries.inc();
                    pooled_left = 0;
                    spare
                }
                (None, _) => return Err(SendError::Broken(failed.into_error())),
            };
        }
    }

    async fn connect(&self) -> Result<Link, SendError> {
        let link = connect::connect(&self.options).await?;
        self.metrics.upstream_connections.inc();
        Ok(link)
    }

    /// `Keep-Alive: timeout=N` lowers the idle time below N: the race with the upstream's close is its to lose. Zero: the
    /// connection is not used again.
    fn idle_timeout(&self, response: &Response<Incoming>) -> Duration {
        // Whoever sends both lengths may mean the other one (RFC 9112 §6.3).
        if response.headers().contains_key(TRANSFER_ENCODING) && response.headers().contains_key(CONTENT_LENGTH) {
            return Duration::ZERO;
        }
        let told = keep_alive_seconds(response.headers()).map(|seconds| Duration::from_secs(seconds.saturating_sub(1)));
        told.map_or(self.options.idle_timeout, |told| told.min(self.options.idle_timeout))
    }

    fn checkout(&self) -> Option<Link> {
        let now = Instant::now();
        let mut idle = self.idle();
        while let Some(newest) = idle.pop_back() {
            if newest.expires > now && newest.link.sender.is_ready() {
                return Some(newest.link);
            }
        }
        None
    }

    fn put_back(&self, link: Link, idle_timeout: Duration) {
        if idle_timeout.is_zero() || link.sender.is_closed() {
            return;
        }
        let mut idle = self.idle();
        if idle.len() >= IDLE_MAX {
            idle.pop_front();
        }
        idle.push_back(Idle { link, expires: Instant::now() + idle_timeout });
    }

    /// Closes idle connections whose time is over, once a second.
    pub async fn close_idle(&self) {
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        loop {
            let now = ticks.tick().await;
            self.idle().retain(|idle| idle.expires > now && !idle.link.sender.is_closed());
        }
    }

    fn idle(&self) -> MutexGuard<'_, VecDeque<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A copy of a request that may be sent twice, whatever became of the first time: of a safe method (RFC 9110 §9.2.1) and
/// without a body. A request that is intercepted never is one.
fn repeatable(request: &Request<ForwardBody>) -> Option<Request<ForwardBody>> {
    let safe = [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE].contains(request.method());
    if !safe || !request.body().is_end_stream() {
        return None;
    }
    let mut copy = Request::new(ForwardBody::Full(None));
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.headers_mut() = request.headers().clone();
    Some(copy)
}

/// Refuses what the HTTP library takes for a response, but is none to this request.
fn check(response: &Response<Incoming>, upgrade: bool) -> Result<(), SendError> {
    if response.status() == StatusCode::SWITCHING_PROTOCOLS && !upgrade {
        return Err(SendError::Malformed("101 to a request without Upgrade"));
    }
    if !is_soundly_framed(response.headers()) {
        return Err(SendError::Malformed("a response whose end is in doubt"));
    }
    Ok(())
}

/// A connection that is busy with a response. It goes back to the pool once that has been read; dropped before, it is
/// closed.
pub struct Connection {
    link: Link,
    upstream: Arc<Upstream>,
    idle_timeout: Duration,
}

impl Connection {
    /// What came back is not what it should be: the connection ends, whatever is still on its way.
    pub fn abort(self) {
        self.link.abort();
    }

    /// The response has been read to its end.
    pub fn finished(self) {
        let Self { mut link, upstream, idle_timeout } = self;
        if link.sender.is_ready() {
            upstream.put_back(link, idle_timeout);
        } else if !link.sender.is_closed() && !idle_timeout.is_zero() {
            // The connection's task is about to see the end of the response, or still writes an early-answered request.
            tokio::spawn(async move {
                if let Ok(Ok(())) = tokio::time::timeout(idle_timeout, link.sender.ready()).await {
                    upstream.put_back(link, idle_timeout);
                }
            });
        }
    }
}

/// A response body on its way through. It ends if it makes no progress for `patience`.
pub struct Passing {
    body: Incoming,
    connection: Option<Connection>,
    patience: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Passing {
    #[must_use]
    pub fn new(body: Incoming, connection: Connection, patience: Duration) -> Self {
        let mut passing = Self { body, connection: Some(connection), patience, stalled: None };
        if passing.body.is_end_stream() {
            passing.finish();
        }
        passing
    }

    fn finish(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.finished();
        }
    }
}

impl Body for Passing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                this.stalled = None;
                if this.body.is_end_stream() {
                    this.finish();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                this.finish();
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                this.connection = None;
                Poll::Ready(Some(Err(BodyError::Upstream(error))))
            }
            Poll::Pending => {
                let stalled = this.stalled.get_or_insert_with(|| Box::pin(sleep(this.patience)));
                ready!(stalled.as_mut().poll(cx));
                this.connection = None;
                Poll::Ready(Some(Err(BodyError::Stalled)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
