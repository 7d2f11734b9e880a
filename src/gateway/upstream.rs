//! The way to the upstream: connecting, a pool of idle connections, and sending a request at most once.

use super::body::ForwardBody;
use super::headers::keep_alive_seconds;
use super::reply::BodyError;
use crate::telemetry::Metrics;
use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, Sleep, sleep, timeout_at};

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
    sender: SendRequest<ForwardBody>,
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

    #[must_use]
    pub fn idle_connections(&self) -> usize {
        self.idle().len()
    }

    /// Sends a request and waits for the head of its response. Another connection is tried only when the HTTP library
    /// hands the request back, which it does only if not a byte of it was written.
    ///
    /// # Errors
    /// See [`SendError`].
    pub async fn send(
        self: &Arc<Self>,
        mut request: Request<ForwardBody>,
    ) -> Result<(Response<Incoming>, Connection), SendError> {
        // A pooled connection may have been closed by the other side; after two of those a new one is surely better.
        let mut pooled_left = 2;
        loop {
            let pooled = if pooled_left > 0 { self.checkout() } else { None };
            pooled_left -= 1;
            let reused = pooled.is_some();
            let mut sender = match pooled {
                Some(sender) => sender,
                None => self.connect().await?,
            };
            match sender.try_send_request(request).await {
                Ok(response) => {
                    if reused {
                        self.metrics.upstream_reused.inc();
                    }
                    let idle_timeout = self.idle_timeout(&response);
                    let connection = Connection { sender, upstream: Arc::clone(self), idle_timeout };
                    return Ok((response, connection));
                }
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) if reused => request = unsent,
                    Some(_) => {
                        let error = io::Error::new(io::ErrorKind::ConnectionReset, failed.into_error());
                        return Err(SendError::Unreachable { error, proxy_error: "connection_terminated" });
                    }
                    None => return Err(SendError::Broken(failed.into_error())),
                },
            }
        }
    }

    /// `Keep-Alive: timeout=N` lowers the idle time below N: the race with the upstream's close is its to lose.
    fn idle_timeout(&self, response: &Response<Incoming>) -> Duration {
        let told = keep_alive_seconds(response.headers()).map(|seconds| Duration::from_secs(seconds.saturating_sub(1)));
        told.map_or(self.options.idle_timeout, |told| told.min(self.options.idle_timeout))
    }

    fn checkout(&self) -> Option<SendRequest<ForwardBody>> {
        let now = Instant::now();
        let mut idle = self.idle();
        while let Some(newest) = idle.pop_back() {
            if newest.expires > now && newest.sender.is_ready() {
                return Some(newest.sender);
            }
        }
        None
    }

    fn put_back(&self, sender: SendRequest<ForwardBody>, idle_timeout: Duration) {
        if idle_timeout.is_zero() || sender.is_closed() {
            return;
        }
        let mut idle = self.idle();
        if idle.len() >= IDLE_MAX {
            idle.pop_front();
        }
        idle.push_back(Idle { sender, expires: Instant::now() + idle_timeout });
    }

    /// Closes idle connections whose time is over, once a second.
    pub async fn close_idle(&self) {
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        loop {
            let now = ticks.tick().await;
            self.idle().retain(|idle| idle.expires > now && !idle.sender.is_closed());
        }
    }

    fn idle(&self) -> MutexGuard<'_, VecDeque<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connect(&self) -> Result<SendRequest<ForwardBody>, SendError> {
        let deadline = Instant::now() + self.options.connect_timeout;
        let sender = match &self.options.endpoint {
            Endpoint::Tcp { host, port } => {
                let stream = connect_tcp(host, *port, deadline).await.map_err(unreachable)?;
                handshake(stream).await
            }
            Endpoint::Unix(path) => {
                let stream = timeout_at(deadline, UnixStream::connect(path)).await.unwrap_or_else(|_| Err(timed_out()));
                handshake(stream.map_err(unreachable)?).await
            }
        };
        self.metrics.upstream_connections.inc();
        sender.map_err(|error| unreachable(io::Error::other(error)))
    }
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no connection within upstream.connect_timeout")
}

fn unreachable(error: io::Error) -> SendError {
    let proxy_error = match error.kind() {
        io::ErrorKind::TimedOut => "connection_timeout",
        io::ErrorKind::ConnectionRefused => "connection_refused",
        io::ErrorKind::NotFound => "dns_error",
        _ => "destination_unavailable",
    };
    SendError::Unreachable { error, proxy_error }
}

/// Resolves the name anew and tries all its addresses in turn; what is left of the time is shared among those to come.
async fn connect_tcp(host: &str, port: u16, deadline: Instant) -> io::Result<TcpStream> {
    let resolved = timeout_at(deadline, tokio::net::lookup_host((host, port))).await.map_err(|_| timed_out())?;
    let addresses = resolved.map_err(|error| io::Error::new(io::ErrorKind::NotFound, error))?.collect::<Vec<_>>();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the upstream's name has no address");
    let count = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
    for (address, to_come) in addresses.into_iter().zip((1..=count).rev()) {
        let now = Instant::now();
        let share = now + deadline.saturating_duration_since(now) / to_come;
        match timeout_at(share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = timed_out(),
        }
    }
    Err(last)
}

async fn handshake<T>(stream: T) -> hyper::Result<SendRequest<ForwardBody>>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::Builder::new().handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        // What goes wrong is told to whoever waits for a response.
        let _ = connection.await;
    });
    Ok(sender)
}

/// A connection that is busy with a response. It goes back to the pool once that has been read; dropped before, it is
/// closed.
pub struct Connection {
    sender: SendRequest<ForwardBody>,
    upstream: Arc<Upstream>,
    idle_timeout: Duration,
}

impl Connection {
    /// The response has been read to its end.
    pub fn finished(self) {
        let Self { mut sender, upstream, idle_timeout } = self;
        if sender.is_ready() {
            upstream.put_back(sender, idle_timeout);
        } else if !sender.is_closed() {
            // The connection's task is about to see the end of the response, or still writes an early-answered request.
            tokio::spawn(async move {
                if let Ok(Ok(())) = tokio::time::timeout(idle_timeout, sender.ready()).await {
                    upstream.put_back(sender, idle_timeout);
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
