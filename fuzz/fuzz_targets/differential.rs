//! A random sequence of requests, outages and restarts: the gateway answers as a model of its promises says. See `src/differential/mod.rs`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| oncegate_fuzz::differential(data));
