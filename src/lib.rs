//! oncegate: a reverse proxy that makes `POST` safe to retry.

pub mod admin;
pub mod clock;
pub mod gateway;
pub mod idempotency;
pub mod ledger;
pub mod server;
pub mod store;
pub mod telemetry;
