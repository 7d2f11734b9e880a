//! A short, fresh run of the fuzz targets `differential` and `http`, without a fuzzer: random bytes, from a seed.
//!
//! `FIRST_SEED=s SEEDS=n cargo test --features failpoints --test fuzzed -- --nocapture` runs n seeds from s.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

#[allow(dead_code, reason = "shared with other tests")]
#[path = "audit/random.rs"]
mod random;

#[path = "../fuzz/src/choices.rs"]
mod choices;
#[path = "../fuzz/src/differential/mod.rs"]
mod differential;
#[path = "../fuzz/src/http/mod.rs"]
mod http;
#[path = "../fuzz/src/wire.rs"]
mod wire;
#[path = "../fuzz/src/world.rs"]
mod world;

use random::Random;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::time::{SystemTime, UNIX_EPOCH};

thread_local! {
    /// Panics of tasks are lost otherwise.
    static PANICS: Cell<usize> = const { Cell::new(0) };
}

fn run(check: fn(&[u8]), seeds: u64) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.set(PANICS.get() + 1);
            before(info);
        }));
    });
    let number = |variable: &str| std::env::var(variable).ok().map(|text| text.parse::<u64>().expect(variable));
    let fresh = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64 % 1_000_000_000 * 1000;
    let first = number("FIRST_SEED").unwrap_or_else(fresh);
    let seeds = number("SEEDS").unwrap_or(seeds);
    eprintln!("FIRST_SEED={first} SEEDS={seeds}");
    for seed in first..first + seeds {
        let mut random = Random(seed.wrapping_mul(0x5851_f42d_4c95_7f2d));
        let len = random.below(600);
        let bytes = (0..len).map(|_| random.next() as u8).collect::<Vec<_>>();
        let ended = catch_unwind(AssertUnwindSafe(|| check(&bytes)));
        assert!(ended.is_ok() && PANICS.get() == 0, "FIRST_SEED={seed} SEEDS=1");
    }
}

#[test]
fn the_gateway_answers_as_the_model_says() {
    run(differential::check, 400);
}

#[test]
fn neither_side_sees_what_it_must_not() {
    run(http::check, 400);
}
