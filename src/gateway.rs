//! The request pipeline, in path order.

mod arrival;
mod body;
pub mod client_cert;
pub mod cors;
mod forward;
pub mod headers;
pub mod identity;
pub mod jwt;
pub mod key;
pub mod lookup;
mod memo;
mod observe;
mod options;
mod pass;
pub mod path;
pub mod probe;
pub mod problem;
pub mod question;
pub mod reply;
pub mod route;
pub mod scope;
pub mod tunnel;
pub mod upstream;

use crate::idempotency::fingerprint::Payload;
use crate::idempotency::{Fingerprint, Millis, Origin};
use crate::ledger::{Arrival, Budget, ClaimResult, Inquiry, Ledger};
use crate::store::{AnyStore, StoreError};
use crate::telemetry::{Metrics, Outcome, RouteMetrics};
use bytes::Bytes;
use client_cert::ClientCert;
use headers::via_names_us;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, Response};
use hyper::body::Incoming;
use key::Key;
use observe::{Model, Observed};
pub use options::{MissingKey, Mode, OnStoreError, Options, ReplayAuth, RouteOptions};
use path::{NormalPath, Params, Readings};
use probe::Probes;
use problem::{Asker, Code, Problem};
use reply::ReplyBody;
use scope::Secret;
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tunnel::Tunnels;
use upstream::Upstream;

/// Who sent a request.
#[derive(Clone, Debug)]
pub struct Peer {
    /// `None` on a Unix socket.
    pub ip: Option<IpAddr>,
    /// Whether it is one of `server.trusted_proxies`.
    pub trusted: bool,
    /// Whether it came by TLS.
    pub https: bool,
    /// Whom its certificate names, where one is required.
    pub client_cert: Option<ClientCert>,
}

/// A response that waiters with the same credentials may share when nothing was executed.
pub(crate) type Unrecorded = Arc<forward::Unrecorded>;
pub(crate) type GatewayLedger = Ledger<AnyStore, Unrecorded>;
type GatewayInquiry = Inquiry<AnyStore, Unrecorded>;
type SharedClaim = ClaimResult<AnyStore, Unrecorded>;

/// The gateway: everything that the requests of one worker share, most of it with those of the others.
#[derive(Clone)]
pub struct Gateway {
    options: Arc<Options>,
    routes: Vec<Arc<Route>>,
    unrouted: RouteMetrics,
    ledger: GatewayLedger,
    upstream: Arc<Upstream>,
    secret: Secret,
    budget: Budget,
    in_flight: Arc<Semaphore>,
    metrics: Metrics,
    /// Tasks that hold claims.
    claims: TaskTracker,
    /// Cancelled when the drain's time is over.
    give_up: CancellationToken,
    tunnels: Arc<Tunnels>,
    probes: Arc<Probes>,
    model: Arc<Model>,
}

struct Route {
    options: RouteOptions,
    /// [`crate::idempotency::FingerprintSettings::id`].
    fingerprint_settings: u64,
    metrics: RouteMetrics,
    /// What would have been done, in [`Mode::Observe`].
    observed: RouteMetrics,
}

/// A response, and how it is counted.
type Counted = (Response<ReplyBody>, Outcome);

impl Gateway {
    #[must_use]
    pub(crate) fn new(options: Options, ledger: GatewayLedger, secret: Secret, metrics: Metrics) -> Arc<Self> {
        let route = |options: &RouteOptions| {
            let observed = metrics.observed(options.pattern.as_str(), options.mode == Mode::Observe);
            let metrics = metrics.route(options.pattern.as_str());
            let fingerprint_settings = options.fingerprint.id();
            Arc::new(Route { options: options.clone(), fingerprint_settings, metrics, observed })
        };
        Arc::new(Self {
            routes: options.routes.iter().map(route).collect(),
            unrouted: metrics.route("-"),
            ledger,
            upstream: Upstream::new(options.upstream.clone(), metrics.clone()),
            secret,
            budget: Budget::new(options.max_buffered, metrics.clone()),
            in_flight: Arc::new(Semaphore::new(options.upstream.max_in_flight)),
            claims: TaskTracker::new(),
            give_up: CancellationToken::new(),
            tunnels: Arc::default(),
            probes: Arc::default(),
            model: Arc::default(),
            options: Arc::new(options),
            metrics,
        })
    }

    /// The same gateway for another worker, with connections to the upstream of its own.
    #[must_use]
    pub(crate) fn for_another_worker(&self) -> Arc<Self> {
        let upstream = Upstream::new(self.options.upstream.clone(), self.metrics.clone());
        Arc::new(Self { upstream, ..self.clone() })
    }

    /// Who is at the other end of a connection from `ip` (`None`: a Unix socket, whose peers are local and trusted), before
    /// any TLS.
    #[must_use]
    pub fn peer(&self, ip: Option<IpAddr>) -> Peer {
        let trusted = |ip: IpAddr| self.options.trusted_proxies.iter().any(|net| net.contains(&ip.to_canonical()));
        Peer { ip, trusted: ip.is_none_or(trusted), https: false, client_cert: None }
    }

    #[must_use]
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Waits until no claim is open; late ones count, and those whose outcome waits for the store.
    pub async fn claims_settled(&self) {
        self.claims.close();
        self.claims.wait().await;
        self.ledger.settled_behind().await;
    }

    /// Settles as unknown every claim that is still open, and returns once all are settled. What the store does not take
    /// now is left to become unknown.
    pub async fn settle_open_claims(&self) {
        self.give_up.cancel();
        self.ledger.stop_trying();
        self.claims_settled().await;
    }

    /// How many claims are open.
    #[must_use]
    pub fn open_claims(&self) -> usize {
        self.claims.len()
    }

    /// Answers one request.
    pub async fn handle(self: &Arc<Self>, mut request: Request<Incoming>, peer: &Peer) -> Response<ReplyBody> {
        let asker =
            Asker { chained: via_names_us(request.headers()), reader: self.options.cors.reader(request.headers()) };
        if self.give_up.is_cancelled() {
            self.unrouted.count(Outcome::failed);
            return Problem::draining().answer(&asker);
        }
        let host = &self.options.upstream.authority;
        if let Err(problem) = headers::check(&mut request, host) {
            self.unrouted.count(Outcome::rejected);
            return problem.answer(&asker);
        }
        if request.method() != Method::POST {
            return self.pass(request, peer, &self.unrouted, &asker, None).await;
        }
        let path = NormalPath::new(request.uri().path().as_bytes());
        let Some((route, path, params)) = self.route(path) else {
            if let Some(problem) = self.ambiguous(&request) {
                self.unrouted.count(Outcome::rejected);
                return problem.answer(&asker);
            }
            return self.pass(request, peer, &self.unrouted, &asker, None).await;
        };
        let route = Arc::clone(route);
        let key = key::parse(request.headers(), &route.options.header);
        if route.options.mode == Mode::Observe {
            let keyless = matches!(key, Ok(None)) && route.options.missing_key == MissingKey::Pass;
            let observed = (!keyless).then(|| Observed::new(self, &route, &request, (path, params), peer, key));
            return Box::pin(self.pass(request, peer, &route.metrics, &asker, observed)).await;
        }
        let key = match key {
            Ok(key) => key,
            Err(problem) => {
                route.metrics.count(Outcome::rejected);
                return problem.answer(&asker);
            }
        };
        if key.is_none() && route.options.missing_key == MissingKey::Pass {
            return self.pass(request, peer, &route.metrics, &asker, None).await;
        }
        let (parts, body) = request.into_parts();
        let intercepted = Box::new(Intercepted { parts, route, path, params, key, peer: peer.clone() });
        // What this takes is not part of every request that passes through.
        Box::pin(self.intercept(intercepted, body, &asker)).await
    }

    /// The route that a normalised path belongs to: the first that matches, in the order of the configuration.
    fn route(&self, path: NormalPath) -> Option<(&Arc<Route>, NormalPath, Params)> {
        let (route, params) = self.routes.iter().find_map(|route| {
            let params = path::matches(&route.options.pattern, route.options.case_sensitive, &path)?;
            Some((route, params))
        })?;
        Some((route, if route.options.case_sensitive { path } else { path.folded() }, params))
    }

    /// A keyed POST whose path some upstreams would read as a route of ours must not slip past unprotected.
    fn ambiguous<B>(&self, request: &Request<B>) -> Option<Problem> {
        let enforced = |route: &&Arc<Route>| route.options.mode == Mode::Enforce;
        let keyed = |route: &&Arc<Route>| enforced(route) && request.headers().contains_key(&route.options.header);
        let mut routes = self.routes.iter().filter(keyed).peekable();
        routes.peek()?;
        let readings = Readings::new(request.uri().path().as_bytes());
        let route = routes.find(|route| readings.may_match(&route.options.pattern))?;
        let pattern = route.options.pattern.as_str();
        let detail = format!("Some servers read this path as {pattern}; send the path in its plain form.");
        Some(Problem::new(Code::PathAmbiguous, detail))
    }

    /// A POST on a route of ours that bears a key, or has to.
    async fn intercept(
        self: &Arc<Self>,
        intercepted: Box<Intercepted>,
        body: Incoming,
        asker: &Asker,
    ) -> Response<ReplyBody> {
        let started = Instant::now();
        let route = Arc::clone(&intercepted.route);
        let mut record = None;
        let (response, outcome) = match self.decide(intercepted, body, started, &mut record).await {
            // The upstream's answer to this very request is left as it is.
            Ok((response, outcome @ (Outcome::forwarded | Outcome::passed))) => (response, outcome),
            Ok((mut response, outcome)) => {
                if let Some(reader) = &asker.reader {
                    reader.admit_to_shared(response.headers_mut());
                }
                (response, outcome)
            }
            Err(problem) => {
                let outcome = problem.code.result();
                (problem.answer(asker), outcome)
            }
        };
        route.metrics.count(outcome);
        tracing::info!(
            record = record.map(|id: crate::store::RecordId| tracing::field::display(id)),
            route = route.options.pattern.as_str(),
            result = outcome.as_str(),
            status = response.status().as_u16(),
            ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "keyed request"
        );
        response
    }

    /// Key, scope, body, fingerprint; then whatever the record says.
    async fn decide(
        self: &Arc<Self>,
        mut intercepted: Box<Intercepted>,
        body: Incoming,
        started: Instant,
        record: &mut Option<crate::store::RecordId>,
    ) -> Result<Counted, Problem> {
        let Intercepted { parts, route, path, params, key, peer, .. } = &mut *intercepted;
        let options = &route.options;
        if key.is_none() && options.missing_key == MissingKey::Reject {
            let detail = format!("This request needs the header {}, with a key of its own.", options.header);
            return Err(Problem::new(Code::KeyMissing, detail));
        }
        let token = scope::bearer(options, &parts.headers)?;
        let claims = jwt::claims(self.options.auth.as_deref(), token, || self.ledger.now()).await?;
        let asked = scope::Request { headers: &parts.headers, path, params, peer, claims: claims.as_deref() };
        let tenant = scope::tenant(&self.secret, options, &asked)?;
        // The token may have waited for its key.
        let began = if claims.is_some() { Instant::now() } else { started };
        let body = body::read(body, self.options.max_body, began + self.options.body_timeout, &self.budget).await?;
        let fingerprint = fingerprint(route, parts, path, &body.bytes);
        let key = match key.take() {
            Some(key) => key,
            None => {
                let key = derived(&tenant.derive_key(&fingerprint.digest))?;
                parts.headers.insert(&options.header, key.header.clone());
                key
            }
        };
        let id = tenant.record_id(&key.decoded);
        *record = Some(id);
        let answer = self.ledger.answer_from_cache(id, &options.policy, fingerprint);
        if let Some(answer) = &answer
            && options.probe.is_none()
        {
            return self.answer(answer, false);
        }
        let credentials = scope::credentials(&self.secret, options, &parts.headers, peer);
        let arrival = Arrival {
            id,
            origin: Origin {
                key: key.decoded,
                key_header: Bytes::copy_from_slice(key.header.as_bytes()),
                path: Bytes::from(path.display()),
                route: Bytes::copy_from_slice(options.pattern.as_str().as_bytes()),
                claimed_at: Millis(0),
                attempts: 1,
            },
            fingerprint,
            credentials,
            policy: options.policy,
            max_waiters: options.max_waiters_per_key,
        };
        let caller = self.caller(&intercepted, credentials);
        // What this takes is not part of every replay.
        Box::pin(async move {
            match answer {
                Some(answer) => self.show(answer, false, caller.as_deref()).await,
                None => self.settle_on(arrival, body, intercepted, caller.as_deref()).await,
            }
        })
        .await
    }
}

/// A request on its way through the pipeline.
struct Intercepted {
    parts: Parts,
    route: Arc<Route>,
    path: NormalPath,
    params: Params,
    /// Taken once the record's id is known.
    key: Option<Key>,
    peer: Peer,
}

fn derived(key: &str) -> Result<Key, Problem> {
    let header = HeaderValue::try_from(key).map_err(|_| Problem::new(Code::KeyInvalid, "No key could be derived."))?;
    Ok(Key { decoded: Bytes::copy_from_slice(key.as_bytes()), header })
}

fn fingerprint(route: &Route, parts: &Parts, path: &NormalPath, body: &[u8]) -> Fingerprint {
    let options = &route.options;
    let lines =
        |name: &HeaderName| parts.headers.get_all(name).into_iter().map(HeaderValue::as_bytes).collect::<Vec<_>>();
    let named = |name: &String| HeaderName::try_from(name.as_str()).map(|name| lines(&name)).unwrap_or_default();
    let headers = options.fingerprint.headers.iter().map(named).collect::<Vec<_>>();
    let digest = options.fingerprint.digest(&Payload {
        method: parts.method.as_str(),
        path: &path.segments,
        query: parts.uri.query().map(str::as_bytes),
        content_type: &lines(&CONTENT_TYPE),
        content_encoding: &lines(&CONTENT_ENCODING),
        headers: &headers,
        body,
    });
    Fingerprint { settings: route.fingerprint_settings, digest }
}

fn unavailable(error: &StoreError) -> Problem {
    tracing::warn!(%error, "the store is unavailable");
    Problem::store_unavailable()
}

#[cfg(test)]
mod test_support {
    use super::{MissingKey, Mode, OnStoreError, ReplayAuth, RouteOptions, route, scope};
    use crate::idempotency::{FingerprintSettings, OutcomeTable, Policy};
    use http::HeaderName;
    use std::time::Duration;

    /// The default route `/posts`, with another scope.
    pub(super) fn route_options(scope: &[scope::Part]) -> RouteOptions {
        RouteOptions {
            pattern: route::Pattern::parse("/posts").unwrap(),
            mode: Mode::Enforce,
            case_sensitive: true,
            header: HeaderName::from_static("idempotency-key"),
            missing_key: MissingKey::Pass,
            scope: scope.to_vec(),
            fingerprint: FingerprintSettings::default(),
            policy: Policy::default(),
            outcomes: OutcomeTable::default(),
            wait_timeout: Duration::from_secs(10),
            max_waiters_per_key: 1024,
            on_store_error: OnStoreError::Reject,
            max_recorded_body: 1 << 20,
            drop_headers: vec![http::header::SET_COOKIE],
            credential_headers: ["cookie", "x-api-key", "api-key", "x-auth-token"]
                .map(HeaderName::from_static)
                .to_vec(),
            trusted_headers: Vec::new(),
            replay_auth: ReplayAuth::Scope,
            lookup: None,
            probe: None,
        }
    }
}
