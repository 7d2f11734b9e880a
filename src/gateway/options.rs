//! What the gateway is told by the configuration.

use super::cors::AllowOrigins;
use super::{jwt, lookup, probe, route, scope, tunnel, upstream};
use crate::idempotency::{FingerprintSettings, OutcomeTable, Policy};
use http::HeaderName;
use ipnet::IpNet;
use std::sync::Arc;
use std::time::Duration;

/// Everything the gateway needs to know that is not about connections.
#[derive(Clone, Debug)]
pub struct Options {
    pub routes: Vec<RouteOptions>,
    pub trusted_proxies: Vec<IpNet>,
    /// Whose pages may read the gateway's own answers.
    pub cors: AllowOrigins,
    /// Largest body of an intercepted request with a key, in bytes.
    pub max_body: usize,
    /// Bytes of buffered bodies, all requests together.
    pub max_buffered: usize,
    pub body_timeout: Duration,
    pub tunnels: tunnel::Limits,
    pub upstream: upstream::Options,
    /// Where a scope has a `jwt:` part.
    pub auth: Option<Arc<jwt::Auth>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Enforce,
    /// Change nothing, but count and log what would have been done.
    Observe,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingKey {
    Pass,
    Reject,
    Derive,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnStoreError {
    Reject,
    Pass,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayAuth {
    Scope,
    /// Whom the upstream lets see it.
    Probe,
    /// Whoever knows tenant and key gets the replay.
    None,
}

/// One `[[routes]]` entry with `[idempotency]` merged in.
#[derive(Clone, Debug)]
pub struct RouteOptions {
    pub pattern: route::Pattern,
    pub case_sensitive: bool,
    pub mode: Mode,
    /// The header that bears the key.
    pub header: HeaderName,
    pub missing_key: MissingKey,
    pub scope: Vec<scope::Part>,
    pub fingerprint: FingerprintSettings,
    pub policy: Policy,
    pub outcomes: OutcomeTable,
    pub wait_timeout: Duration,
    pub max_waiters_per_key: usize,
    pub on_store_error: OnStoreError,
    pub max_recorded_body: usize,
    pub drop_headers: Vec<HeaderName>,
    pub credential_headers: Vec<HeaderName>,
    pub trusted_headers: Vec<HeaderName>,
    pub replay_auth: ReplayAuth,
    /// With [`crate::idempotency::UnknownOutcome::Lookup`].
    pub lookup: Option<lookup::Options>,
    /// With [`ReplayAuth::Probe`].
    pub probe: Option<probe::Options>,
}
