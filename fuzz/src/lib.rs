//! What the targets `differential` and `http` run: whole gateways in one thread, in a time of their own, over made-up
//! connections and a made-up store. `tests/fuzzed.rs` compiles the same modules.

mod choices;
mod differential;
mod http;
mod wire;
mod world;

/// See [`differential::check`].
pub fn differential(bytes: &[u8]) {
    differential::check(bytes);
}

/// See [`http::check`].
pub fn http(bytes: &[u8]) {
    http::check(bytes);
}
