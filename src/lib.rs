//! oncegate: a reverse proxy that makes `POST` safe to retry.
//!
//! One idea: **what may happen to an idempotency key is decided by one pure function**, [`idempotency::step`], without IO,
//! clock or randomness; everything else carries bytes to and from it. That is what lets "at most once" be checked
//! exhaustively (`tests/model.rs`) instead of hoped for.
//!
//! # Life of a request
//!
//! ```text
//! server      accept, a worker, TLS, HTTP/1.1 or 2, time limits    server.rs, server/{workers,tls,connection,http2,timed_io}.rs
//! gateway     check → route → no: pass through, streaming          gateway.rs, gateway/{headers,path,route,pass}.rs
//!                     Upgrade → 101: a tunnel                      gateway/tunnel.rs
//!                     mode = "observe": what would be done         gateway/observe.rs
//!             key → scope → body (capped) → fingerprint            gateway/{key,scope,body}.rs, idempotency/fingerprint.rs
//!                   jwt: part → a token is verified                gateway/jwt.rs, gateway/jwt/*
//! ledger      hot cache? replay. In flight here? wait.             gateway/arrival.rs, ledger.rs, ledger/{hot_cache,slots}.rs
//!             claim in the store: durable before a byte is sent    ledger/lead.rs, store.rs, store/*
//!             In flight at another gateway? watch, wait.           ledger/elsewhere.rs, store/shared/watch.rs
//!             Unknown? ask the upstream (lookup). May he see it?   gateway/{lookup,probe,question}.rs
//! gateway     forward in a task of its own, settle, reply          gateway/{forward,upstream,reply,problem}.rs, gateway/upstream/*
//!             shared store: does the claim still live? → send      ledger/{claim,lease}.rs
//!             its gateway is gone? → unknown                       ledger/lapse.rs
//! ```
//!
//! # Code map
//!
//! - [`idempotency`]: records, the decision, the outcome table, fingerprints, the record's format. Pure.
//! - [`store`]: opaque bytes under an id, changed by compare-and-swap. The embedded store is a log, which is the truth, and
//!   an index that is rebuilt from it at will. Stores that several gateways share, in Redis or PostgreSQL, tell their own
//!   time (`store/shared/time.rs`), and word of changes.
//! - [`ledger`]: the shell of the core: step → compare-and-swap → act, once the write has landed. Slots for keys in flight,
//!   waiters, the hot cache of completed records, the budget of buffered bytes; in a shared store leases, renewed while
//!   their owner works, claims whose answer was lost, and those whose gateway is gone.
//! - [`gateway`]: the request pipeline; what the gateway itself answers; the way to the upstream, with an HTTP/1.1 client that
//!   knows whether a byte of a request was written; bearer tokens verified for `jwt:` scopes, and where the keys come from.
//! - [`server`]: listeners, TLS, connections, their limits, the drain.
//! - [`admin`], [`telemetry`]: liveness, readiness, metrics, logs; records in operators' hands (`admin/records.rs` →
//!   `ledger/operator.rs`).
//! - [`config`]: the configuration file, the environment and the flags, resolved into each module's own options.
//! - [`pem`]: certificates and keys from files, for TLS on both sides.
//! - `timer`: time limits that are set once a request.
//! - `command` (in the program, not in this library): `oncegate records`, a client of the admin address.
//! - [`run`]: wires it all together. `simulation` (with the feature `failpoints`) does so without sockets, disks and clocks. [`clock`]: the one place that reads the system's clocks.
//!
//! Who may import whom is checked by `tests/tidy.rs`: `main`, `run` → everything; server → gateway → ledger →
//! {idempotency, store}; server, gateway → pem, timer; admin → ledger, telemetry, server's addresses; idempotency, store, pem, timer → nothing
//! of ours.
//!
//! # Invariants
//!
//! 1. Only [`idempotency::step`] decides, recovery and operators included.
//! 2. Nothing reaches the upstream before its claim is durable, or after it may have lapsed.
//! 3. A final response is durable before the caller sees it, unless the store fails at that moment: then the caller gets
//!    it, and the claim stays.
//! 4. A claimed forward lives in its own task; no client can cancel it.
//! 5. Every claim settles: by its task, by a drop guard (as unknown), at the next start, or by its lease (as unknown).
//! 6. The hot cache holds only completed records, which never change until they are forgotten; evicted never means unseen.
//!    Only the holder of a key's slot puts into it, so what was forgotten does not come back.
//! 7. Every queue, body, wait and loop has a configured limit. An outcome that waits for the store counts as its request did,
//!    and the drain waits for it.
//! 8. After a failed flush the store is failed for good: it acknowledges nothing more and never retries the flush.
//! 9. Network input, configuration and stored bytes never cause a panic.
//! 10. A client's connection stays on one worker, a thread with a runtime and upstream connections of its own. A
//!     pass-through allocates no body box, spawns no task per request, but for a tunnel (the HTTP library does, for an
//!     HTTP/2 stream), and meets no lock that another worker takes.

pub mod admin;
pub mod clock;
pub mod config;
mod fault;
pub mod gateway;
pub mod idempotency;
pub mod ledger;
pub mod pem;
pub mod run;
pub mod server;
#[cfg(feature = "failpoints")]
pub mod simulation;
pub mod store;
pub mod telemetry;
mod timer;
