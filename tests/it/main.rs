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

mod chaining;
mod execution;
mod fingerprint;
mod key;
mod problems;
mod routes;
mod scope;
mod support;
