//! The suite against PostgreSQL: one server, tables of its own for each test.

#[path = "../servers/postgres.rs"]
mod servers;

use super::*;
use oncegate::store::postgres::Postgres;
use oncegate::store::shared::{Options as SharedOptions, TlsFiles};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// Lives as long as the process does.
static SERVER: LazyLock<Option<servers::Server>> = LazyLock::new(|| servers::Server::start(&[]));

struct InPostgres(SharedOptions);

impl Backend for InPostgres {
    type Store = Postgres;
    async fn open(&self) -> Postgres {
        Postgres::open(&self.0).await.unwrap()
    }
    const DURABLE: bool = true;
}

/// `None`: there is no server here, which was said.
fn in_postgres() -> Option<InPostgres> {
    static TABLES: AtomicU32 = AtomicU32::new(0);
    let url = SERVER.as_ref()?.url();
    Some(InPostgres(SharedOptions {
        url,
        password: None,
        prefix: format!("t{}", TABLES.fetch_add(1, Ordering::Relaxed)),
        timeout: Duration::from_secs(20),
        start_timeout: Duration::ZERO,
        strict: true,
        wait_replicas: 0,
        migrate: true,
        tls: TlsFiles::default(),
    }))
}

macro_rules! suite_in_postgres {
    ($($test:ident),+) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            if let Some(backend) = in_postgres() {
                super::$test(backend).await;
            }
        })+
    };
}

suite_in_postgres!(
    swaps_only_what_was_expected,
    versions_never_repeat,
    one_of_many_wins,
    a_dropped_future_does_not_lose_the_write,
    settings_are_kept,
    values_of_all_sizes,
    a_closed_store_says_so,
    a_listing_shows_what_is_held_oldest_first,
    a_listing_shows_expired_entries_until_they_are_swept,
    what_stays_unchanged_is_listed_whatever_happens_meanwhile,
    a_listing_goes_on_where_its_place_is_gone,
    any_cursor_will_do,
    a_listing_goes_on_after_a_restart,
    a_page_of_large_records_is_short
);
