//! What the targets `differential` and `http` run: whole gateways in one thread, in a time of their own, over made-up
//! connections and a made-up store. `tests/fuzzed.rs` compiles the same modules.

mod choices;
mod differential;
mod http;
mod wire;
mod world;

pub use differential::check as differential;
pub use http::check as http;
