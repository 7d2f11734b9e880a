//! Several gateways over one shared store, a real Redis or PostgreSQL: what they promise together, and under attack.
//!
//! `ONCEGATE_FLEET_SEEDS` says how many storms are run for each store (1), `ONCEGATE_FLEET_FIRST_SEED` repeats their
//! choices, `ONCEGATE_FLEET_KEYS` says how many keys each has (400) and `ONCEGATE_FLEET_CLIENTS` how many
//! clients send them (10).

#![allow(clippy::duplicated_attributes, reason = "what a server is used for differs from suite to suite")]
#![allow(clippy::while_immutable_condition, reason = "another thread changes it")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

#[allow(dead_code, reason = "shared with other tests")]
#[path = "../audit/mod.rs"]
mod audit;
#[path = "../audit/http.rs"]
mod http;
#[path = "../servers/postgres.rs"]
#[allow(dead_code, unreachable_pub)]
mod postgres_server;
#[path = "../servers/redis.rs"]
#[allow(dead_code, unreachable_pub)]
mod redis_server;
#[path = "../it/support/mod.rs"]
mod support;

/// Each of these functions of the module is a test for each store.
macro_rules! for_each_store {
    ($($promise:ident)*) => {
        mod redis {
            $(#[test] fn $promise() { super::$promise($crate::server::Engine::Redis) })*
        }
        mod postgres {
            $(#[test] fn $promise() { super::$promise($crate::server::Engine::Postgres) })*
        }
    };
}

mod clocks;
mod fleet;
mod leases;
mod outages;
mod proxy;
mod server;
mod starts;
mod storm;
mod waiting;
