//! One client connection: its protocol, its place in the drain.

use super::timed_io::{Busy, TimedIo};
use super::tls::Tls;
use super::{Limits, Place, http2};
use crate::fault;
use crate::gateway::reply::{BodyError, ReplyBody};
use crate::gateway::{Gateway, Peer};
use bytes::Bytes;
use http::header::CONNECTION;
use http::{HeaderValue, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long an idle connection stays open once the drain has begun, so that a request that is on its way is served.
pub(super) const DRAIN_LINGER: Duration = Duration::from_secs(5);

/// What a connection is served with.
pub(super) struct Setting {
    pub(super) gateway: Arc<Gateway>,
    pub(super) peer: Peer,
    pub(super) limits: Limits,
    pub(super) drain: CancellationToken,
}

/// Serves a connection over TLS until it ends: HTTP/2 or HTTP/1.1, as ALPN says (RFC 9113 §3.2). The handshake must be
/// over within `header_timeout`.
pub(super) async fn serve_tls<S>(stream: S, tls: &Tls, place: Place, mut setting: Setting)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    setting.peer.https = true;
    let handshake = timeout(setting.limits.header_timeout, tls.accept(stream));
    let accepted = match unless_drained(&setting.drain, handshake).await {
        Some(Ok(accepted)) => accepted,
        Some(Err(_)) | None => return tracing::debug!("a TLS handshake was not over in time"),
    };
    match accepted {
        Ok(secured) => {
            setting.peer.client_cert = secured.client_cert;
            serve(secured.stream, Some(secured.http2), place, setting).await;
        }
        Err(error) => tracing::debug!(%error, "a TLS handshake failed"),
    }
}

/// Serves a connection until it ends. `negotiated`: whether HTTP/2 was agreed upon; else the first bytes tell.
pub(super) async fn serve<S>(stream: S, negotiated: Option<bool>, place: Place, setting: Setting)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    if let Err(error) = fault::step("after-accept") {
        return tracing::debug!(%error, "a client connection ended before its first request");
    }
    let mut io = TimedIo::new(stream, place, setting.limits.clone());
    let preface = match unless_drained(&setting.drain, io.begins_with_preface()).await {
        Some(Ok(preface)) => preface,
        Some(Err(error)) => return tracing::debug!(%error, "a client connection ended before its first request"),
        None => return,
    };
    let ended =
        if negotiated.unwrap_or(preface) { http2::serve(io, setting).await } else { serve_http1(io, setting).await };
    if let Err(error) = ended {
        tracing::debug!(%error, "a client connection ended early");
    }
}

/// What comes of `future`; `None`: the drain has begun, and it took longer than an idle connection gets then.
async fn unless_drained<F: Future>(drain: &CancellationToken, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    tokio::select! {
        output = future.as_mut() => Some(output),
        () = drain.cancelled() => timeout(DRAIN_LINGER, future).await.ok(),
    }
}

async fn serve_http1<S>(io: TimedIo<S>, setting: Setting) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Setting { gateway, peer, limits, drain } = setting;
    let (phase, peer) = (io.phase(), Arc::new(peer));
    let service = service_fn(|request| {
        let busy = Busy::new(Arc::clone(&phase));
        let (gateway, peer, drain) = (Arc::clone(&gateway), Arc::clone(&peer), drain.clone());
        async move {
            let mut response = gateway.handle(request, &peer).await;
            fault::step("before-answer")?;
            if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                busy.switch();
            } else if drain.is_cancelled() {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, std::io::Error>(response.map(|body| ServedBody { body, _busy: busy }))
        }
    });
    let connection = http1::Builder::new()
        .half_close(true)
        .max_header_size(limits.max_header_bytes)
        .max_buf_size(limits.max_header_bytes.saturating_add(READ_AHEAD_BYTES))
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => ended,
        () = drain.cancelled() => {
            // A request in flight is finished in any case; an idle connection is closed after a while.
            match timeout(DRAIN_LINGER, connection.as_mut()).await {
                Ok(ended) => ended,
                Err(_) => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        }
    }
}

/// Room in the read buffer beside the largest head.
const READ_AHEAD_BYTES: usize = 16 * 1024;

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
