//! Clients and an upstream that are not to be trusted: neither sees what it must not of the other. See `src/http/mod.rs`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| oncegate_fuzz::http(data));
