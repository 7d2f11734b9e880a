//! The admin address: liveness, readiness, metrics; records, for operators.

mod access;
mod document;
mod message;
mod problem;
mod query;
mod records;
mod time;

pub use access::TokenFile;
pub(crate) use records::{Records, RouteRules};

use crate::server::{Address, Listener};
use crate::telemetry::Reading;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// `[admin]`.
#[derive(Clone, Debug)]
pub struct Options {
    pub listen: Address,
    /// Whether a shared store that cannot be reached makes the gateway unready.
    pub ready_needs_store: bool,
    /// Who may see and change records; `None`: whoever reaches the address, which is on this machine alone.
    pub tokens: Option<Arc<TokenFile>>,
}

impl Options {
    /// Whether records would be open to other machines.
    #[must_use]
    pub fn is_exposed_at(&self, address: &Address) -> bool {
        self.tokens.is_none() && !address.is_local()
    }
}

type Answer = Response<Full<Bytes>>;

/// What the admin address tells.
pub struct Admin {
    registry: Registry,
    reading: Box<dyn Fn() -> Reading + Send + Sync>,
    draining: AtomicBool,
    ready_needs_store: bool,
    records: Records,
}

impl Admin {
    #[must_use]
    pub(crate) fn new(
        registry: Registry,
        reading: impl Fn() -> Reading + Send + Sync + 'static,
        ready_needs_store: bool,
        records: Records,
    ) -> Arc<Self> {
        let draining = AtomicBool::new(false);
        Arc::new(Self { registry, reading: Box::new(reading), draining, ready_needs_store, records })
    }

    /// From now on `/readyz` says 503.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Answers on the admin address for as long as the process lives.
    pub async fn serve(self: Arc<Self>, listener: Listener) {
        loop {
            let (stream, unix) = match listener.accept().await {
                Ok((stream, peer)) => (stream.join_runtime(), peer.is_none()),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection on the admin address");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Ok(stream) = stream else { continue };
            let admin = Arc::clone(&self);
            tokio::spawn(async move {
                let service = service_fn(|request: Request<Incoming>| {
                    let admin = Arc::clone(&admin);
                    async move { Ok::<_, Infallible>(admin.answer(request, unix).await) }
                });
                let _ = http1::Builder::new()
                    .half_close(true)
                    .timer(TokioTimer::new())
                    .header_read_timeout(Duration::from_secs(30))
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    }

    async fn answer(&self, request: Request<Incoming>, unix: bool) -> Answer {
        let path = request.uri().path();
        if path.strip_prefix("/records").is_some_and(|below| below.is_empty() || below.starts_with('/')) {
            return self.records.answer(request, unix).await;
        }
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return answer(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET\n".to_owned());
        }
        match path {
            "/livez" => {
                let failed = (self.reading)().store_failed;
                let (status, word) = if failed {
                    (StatusCode::SERVICE_UNAVAILABLE, "the store has failed for good: restart me\n")
                } else {
                    (StatusCode::OK, "ok\n")
                };
                answer(status, "text/plain", word.to_owned())
            }
            "/readyz" => self.readiness(),
            "/metrics" => {
                let mut metrics = String::new();
                match prometheus_client::encoding::text::encode(&mut metrics, &self.registry) {
                    Ok(()) => {
                        answer(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", metrics)
                    }
                    Err(error) => answer(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error}\n")),
                }
            }
            _ => answer(StatusCode::NOT_FOUND, "text/plain", "try /livez, /readyz, /metrics or /records\n".to_owned()),
        }
    }

    fn readiness(&self) -> Answer {
        let reading = (self.reading)();
        let draining = self.draining.load(Ordering::Acquire);
        let store = match (reading.store_failed, reading.store_full, reading.store_unreachable) {
            (true, ..) => "failed",
            (false, true, _) => "full",
            (false, false, true) => "unreachable",
            (false, false, false) => "ok",
        };
        // Whoever shares a store loses it together with all others: taking all of them out would end the pass-through, too.
        let bearable = store == "ok" || store == "unreachable" && !self.ready_needs_store;
        let ready = !draining && bearable;
        let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let body = serde_json::json!({ "ready": ready, "draining": draining, "store": store });
        answer(status, "application/json", format!("{body}\n"))
    }
}

fn answer(status: StatusCode, media_type: &'static str, body: String) -> Answer {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}
