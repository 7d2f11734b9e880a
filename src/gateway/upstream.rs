//! The way to the upstream.

use http::HeaderValue;
use std::path::PathBuf;
use std::time::Duration;

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
