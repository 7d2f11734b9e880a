//! Simulation: whole gateways, their store, upstream and clients in one thread, in a time of their own, from a seed. What
//! goes wrong is drawn from the seed too: a failure is found again by it, exactly.
//!
//! `SEEDS=n FIRST_SEED=s cargo test --release --features failpoints --test simulation -- --nocapture` runs n seeds from s;
//! without them it is a short, fresh run.
//!
//! Exactly so with `RUSTFLAGS="--cfg tokio_unstable"`: the runtime draws its own choices from the seed, too.
//!
//! Real: all of the gateway above the store's trait and the streams (connections, HTTP, the pipeline, the ledger, leases,
//! recovery, the sweep). Made up: network, clocks, stores. Not seen, therefore: threads that race, the embedded store's
//! files, what the drivers of Redis and PostgreSQL make of their servers. `tests/{crash,power_cut,fleet}` look there.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

mod audit;
#[path = "simulation/client.rs"]
mod client;
#[path = "simulation/http.rs"]
mod http;
#[path = "simulation/net.rs"]
mod net;
#[path = "simulation/plan.rs"]
mod plan;
#[path = "simulation/run.rs"]
mod run;
#[path = "simulation/store.rs"]
mod store;
#[path = "simulation/upstream.rs"]
mod upstream;
#[path = "simulation/world.rs"]
mod world;

use audit::Tally;
use plan::Plan;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect(variable))
}

#[test]
fn whatever_fails_no_key_is_executed_twice_and_nothing_seen_is_forgotten() {
    let fresh = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64 % 1_000_000_000 * 1000;
    let first = number("FIRST_SEED").unwrap_or_else(fresh);
    let seeds = number("SEEDS").unwrap_or(200);
    eprintln!("FIRST_SEED={first} SEEDS={seeds}");
    let next = AtomicU64::new(first);
    let workers = thread::available_parallelism().map_or(1, usize::from).min(seeds as usize);
    let tallies = thread::scope(|scope| {
        let work = || {
            let mut sum = (0_u64, Tally::default());
            loop {
                let seed = next.fetch_add(1, Ordering::SeqCst);
                if seed >= first + seeds {
                    return sum;
                }
                let tally = one(seed);
                sum.0 += 1;
                sum.1.keys += tally.keys;
                sum.1.calls += tally.calls;
                sum.1.executions += tally.executions;
                sum.1.finals += tally.finals;
                sum.1.unknown += tally.unknown;
            }
        };
        let threads = (0..workers).map(|_| scope.spawn(work)).collect::<Vec<_>>();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| panic!("see above"))).collect::<Vec<_>>()
    });
    let of = |what: fn(&Tally) -> usize| tallies.iter().map(|(_, tally)| what(tally)).sum::<usize>();
    eprintln!(
        "{} seeds: {} keys, {} calls, {} executions; in the end {} final, {} unknown",
        tallies.iter().map(|(seeds, _)| seeds).sum::<u64>(),
        of(|tally| tally.keys),
        of(|tally| tally.calls),
        of(|tally| tally.executions),
        of(|tally| tally.finals),
        of(|tally| tally.unknown),
    );
    assert!(of(|tally| tally.finals) > of(|tally| tally.unknown), "most keys come to an end");
}

fn one(seed: u64) -> Tally {
    let plan = Plan::from_seed(seed);
    let (result, _) = run::run(&plan);
    result.unwrap_or_else(|wrong| {
        eprintln!("FIRST_SEED={seed} SEEDS=1: {plan:#?}\n{}", wrong.join("\n"));
        panic!("seed {seed}: {}", wrong[0]);
    })
}

/// Without the flag the runtime leaves it to chance which of several that wait for one key is woken first.
#[cfg(tokio_unstable)]
#[test]
fn a_seed_is_repeated_exactly() {
    for seed in 1..=6 {
        let plan = Plan::from_seed(seed);
        let seen = || format!("{:#?}", run::run(&plan).1);
        let (first, second) = (seen(), seen());
        let differ = first.lines().zip(second.lines()).find(|(one, other)| one != other);
        assert!(differ.is_none() && first.len() == second.len(), "seed {seed}: {differ:?}");
        assert!(first.len() > 1000, "something has happened");
    }
}
