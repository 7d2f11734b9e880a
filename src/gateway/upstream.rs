//! The way to the upstream: connecting, a pool of idle connections, and sending a request at most once.

mod chunked;
mod connect;
mod exchange;
mod head;
#[cfg(feature = "failpoints")]
pub mod simulated;
pub mod tls;

use super::body::ForwardBody;
use super::reply::BodyError;
use crate::fault;
use crate::pem::FileError;
use crate::telemetry::Metrics;
use crate::timer::Timer;
use bytes::Bytes;
use exchange::{Failure, Link, Outgoing};
use head::Head;
use http::{HeaderValue, Method, Request, Response};
use http_body::{Body, Frame, SizeHint};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Tcp {
        host: String,
        port: u16,
    },
    Unix(PathBuf),
    #[cfg(feature = "failpoints")]
    Simulated(simulated::Connector),
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

pub use exchange::Incoming;

/// The upstream, with one worker's idle connections to it.
pub struct Upstream {
    options: Options,
    /// Newest last.
    idle: Mutex<VecDeque<Idle>>,
    /// Told when there is one again.
    some_idle: Notify,
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
    /// Not a byte of it was sent: its claim might not have lived long enough.
    #[error("the request was withheld")]
    Withheld,
    /// Not a byte of it was sent.
    #[error("cannot connect to the upstream: {error}")]
    Unreachable { error: io::Error, proxy_error: &'static str },
    /// It may have been executed.
    #[error("the upstream broke off: {0}")]
    Broken(#[source] io::Error),
    /// The client's body broke off, or (`None`) made no progress; the request may have been executed.
    #[error("the client's body did not come to its end")]
    Upload(#[source] Option<hyper::Error>),
    /// It may have been executed.
    #[error("the upstream took too long")]
    TimedOut,
    /// It has been answered, but not in HTTP as it should be; it may have been executed.
    #[error("the upstream's response is malformed: {0}")]
    Malformed(&'static str),
}

/// How long an exchange may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From one piece of the client's body to the next.
    pub body: Duration,
    /// For the upstream to take more of the request.
    pub write: Duration,
    /// From the end of the request to the head of the response.
    pub response: Duration,
}

impl Upstream {
    #[must_use]
    pub fn new(options: Options, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self { options, idle: Mutex::default(), some_idle: Notify::new(), metrics })
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
    /// cannot be a second execution: not a byte of it was written; or it is safe (RFC 9110 §9.2.1), without a body, and its
    /// pooled connection ended without a byte of an answer. A request that is intercepted is never safe.
    ///
    /// Without `patience` it is the caller who ends what takes too long.
    ///
    /// # Errors
    /// See [`SendError`].
    pub async fn send(
        self: &Arc<Self>,
        request: Request<ForwardBody>,
        patience: Option<Patience>,
    ) -> Result<Response<Incoming>, SendError> {
        self.send_if(request, patience, &|| true).await
    }

    /// As [`Self::send`], if `may_send` says so once there is a connection, right before the first byte.
    ///
    /// # Errors
    /// [`SendError::Withheld`] if it does not.
    pub async fn send_if(
        self: &Arc<Self>,
        request: Request<ForwardBody>,
        patience: Option<Patience>,
        may_send: &(dyn Fn() -> bool + Sync),
    ) -> Result<Response<Incoming>, SendError> {
        let safe = [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE].contains(request.method());
        let mut out = Outgoing::new(request);
        // A pooled connection may have been closed by the other side; after two of those a new one is surely better.
        let mut pooled_left = 2_u8;
        loop {
            let pooled = if pooled_left > 0 { self.checkout().await } else { None };
            pooled_left = pooled_left.saturating_sub(1);
            let reused = pooled.is_some();
            let mut link = match pooled {
                Some(link) => link,
                // Rare, and large: what it takes is not part of every request.
                None => Box::pin(self.connect()).await?,
            };
            if !may_send() {
                return Err(SendError::Withheld);
            }
            let exchanged = match fault::step("before-send") {
                Ok(()) => out.exchange(&mut link, patience, self.options.idle_timeout).await,
                Err(error) => Err(Failure::Unsent(error)),
            };
            let Head { response, framing, keep } = match exchanged {
                Ok(head) => head,
                Err(Failure::Unsent(_)) if reused => continue,
                Err(Failure::Unsent(error)) => {
                    return Err(SendError::Unreachable { error, proxy_error: "connection_terminated" });
                }
                Err(Failure::Unanswered(_)) if reused && safe && out.rewind() => {
                    self.metrics.upstream_retries.inc();
                    pooled_left = 0;
                    continue;
                }
                Err(Failure::Unanswered(error)) => return Err(SendError::Broken(error)),
                Err(Failure::Final(error)) => return Err(error),
            };
            if reused {
                self.metrics.upstream_reused.inc();
            }
            let body = Incoming::new(link, out.unsent(), framing, keep, Arc::clone(self));
            return Ok(response.map(|()| body));
        }
    }

    async fn connect(&self) -> Result<Link, SendError> {
        fault::step("before-connect")
            .map_err(|error| SendError::Unreachable { error, proxy_error: "connection_refused" })?;
        let link = Link::new(connect::connect(&self.options).await?);
        self.metrics.upstream_connections.inc();
        Ok(link)
    }

    /// The connection that was used last, if it is still of use.
    async fn checkout(&self) -> Option<Link> {
        poll_fn(|cx| {
            let now = Instant::now();
            while let Some(mut newest) = self.idle().pop_back() {
                if newest.expires > now && newest.link.is_quiet(cx) {
                    return Poll::Ready(Some(newest.link));
                }
            }
            Poll::Ready(None)
        })
        .await
    }

    fn put_back(&self, link: Link, idle_timeout: Duration) {
        let mut idle = self.idle();
        if idle.len() >= IDLE_MAX {
            idle.pop_front();
        }
        if idle.is_empty() {
            self.some_idle.notify_one();
        }
        idle.push_back(Idle { link, expires: Instant::now() + idle_timeout });
    }

    /// Closes idle connections whose time is over, or that the other side has closed, once a second.
    pub async fn close_idle(&self) {
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let now = ticks.tick().await;
            while self.idle_connections() == 0 {
                self.some_idle.notified().await;
            }
            // Whoever takes one looks for himself.
            let mut nobody = Context::from_waker(Waker::noop());
            self.idle().retain_mut(|idle| idle.expires > now && idle.link.is_quiet(&mut nobody));
        }
    }

    fn idle(&self) -> MutexGuard<'_, VecDeque<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A response body on its way through. It ends if it makes no progress for `patience`.
pub struct Passing {
    body: Incoming,
    patience: Duration,
    stalled: Timer,
}

impl Passing {
    #[must_use]
    pub fn new(body: Incoming, patience: Duration) -> Self {
        Self { body, patience, stalled: Timer::default() }
    }
}

impl Body for Passing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            this.stalled.stop();
            return Poll::Ready(frame);
        }
        ready!(this.stalled.poll(cx, this.patience));
        Poll::Ready(Some(Err(BodyError::Stalled)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
