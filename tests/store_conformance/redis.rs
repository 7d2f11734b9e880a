//! The suite against Redis. What it asks of sweeping and of counting is asked in `store_redis`: Redis expires by itself.

use super::shared::Shifted;
use super::*;
use crate::redis_server::{Server, installed};
use oncegate::store::redis::Redis;
use oncegate::store::shared::{Options, TlsFiles};
use std::sync::OnceLock;

pub(super) struct InRedis {
    server: Server,
    ahead: Duration,
    base_ms: OnceLock<u64>,
}

fn in_redis(ahead: Duration) -> InRedis {
    InRedis { server: Server::start(&[]), ahead, base_ms: OnceLock::new() }
}

impl Backend for InRedis {
    type Store = Shifted<Redis>;
    async fn open(&self) -> Self::Store {
        let options = Options {
            url: self.server.url(),
            password: None,
            prefix: "suite*".to_owned(),
            timeout: Duration::from_secs(10),
            start_timeout: Duration::ZERO,
            strict: false,
            wait_replicas: 0,
            create: true,
            migrate: true,
            tls: TlsFiles::default(),
        };
        Shifted::new(Redis::open(&options).await.unwrap(), self.ahead, &self.base_ms)
    }
    const DURABLE: bool = true;
    const COUNTS: bool = false;
}

macro_rules! suite_in_redis {
    ($ahead:expr; $($test:ident),+) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            if installed() {
                super::$test(in_redis($ahead)).await;
            }
        })+
    };
}

suite_in_redis!(
    Duration::from_secs(3600);
    swaps_only_what_was_expected,
    versions_never_repeat,
    one_of_many_wins,
    a_chain_of_swaps_loses_none,
    a_dropped_future_does_not_lose_the_write,
    settings_are_kept,
    values_of_all_sizes,
    a_closed_store_says_so,
    a_listing_shows_what_is_held_oldest_first,
    a_listing_goes_on_where_its_place_is_gone,
    any_cursor_will_do,
    a_listing_goes_on_after_a_restart,
    a_page_of_large_records_is_short
);

// What expires after a second there does so.
suite_in_redis!(Duration::ZERO; what_stays_unchanged_is_listed_whatever_happens_meanwhile);
