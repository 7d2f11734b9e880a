//! The pure core: what an idempotency key, its record and its fingerprint are, and what may happen to
//! them. No IO, no clock, no randomness: `std`, `bytes`, a hash and a JSON parser.

pub mod codec;
pub mod fingerprint;
pub mod outcome;
pub mod record;
mod step;

pub use fingerprint::{FingerprintMode, FingerprintSettings};
pub use outcome::OutcomeTable;
pub use record::{ClaimToken, Fingerprint, Millis, Origin, Record, Recorded, Response, State, Why};
pub use step::{
    Concurrent, Decision, Event, Evidence, Outcome, Policy, RejectReason, Resolution, Step, UnknownOutcome, Verdict,
    Write, droppable_at, lapsed, step,
};
