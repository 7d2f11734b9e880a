//! Listeners, connections, limits and the drain.

use std::path::PathBuf;
use std::time::Duration;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `host:port`; a name is resolved when bound.
    Tcp(String),
    Unix(PathBuf),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// `[server]` and the part of `[server.limits]` that belongs to connections.
#[derive(Clone, Debug)]
pub struct Options {
    pub listen: Vec<Address>,
    /// Worker threads; 0: one per core.
    pub workers: usize,
    pub drain_delay: Duration,
    pub drain_timeout: Duration,
    pub limits: Limits,
}

#[derive(Clone, Debug)]
pub struct Limits {
    pub header_timeout: Duration,
    pub idle_timeout: Duration,
    pub write_timeout: Duration,
    pub max_header_bytes: usize,
    pub max_connections: usize,
}
