//! The running program from outside: one file per promise.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub
)]

mod admin;
mod chaining;
mod clients;
mod cors;
mod disk;
mod edge_sidecar;
mod engines;
mod execution;
mod fingerprint;
mod framing;
mod headers;
mod hostile_upstreams;
mod http2;
mod http2_limits;
mod jwt;
mod jwt_keys;
mod key;
mod library_answers;
mod limits;
mod lookup;
mod observe;
mod outcomes;
mod pass;
mod pool;
mod probe;
mod problems;
mod proxying;
mod records;
mod replay;
mod replay_fields;
mod request_syntax;
mod restart;
mod routes;
mod rows;
mod scope;
mod slow;
mod smuggling;
mod support;
mod tls;
mod tunnel;
mod upgrade;
mod upstream_tls;
mod waiting;
