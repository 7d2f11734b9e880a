//! Answers that do not arrive, servers that end, stall, or are replaced.

use super::proxy::{Proxy, Way};
use super::*;
use oncegate::store::shared::OpenError;
use rustix::process::Signal;
use std::sync::Arc;
use tokio::sync::watch;

const TIMEOUT: Duration = Duration::from_millis(2000);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_answer_was_lost_is_known_again() {
    let Some(server) = &*SERVER else { return };
    let proxy = Proxy::start(server.port).await;
    let store = open(&options(proxy.url(), MS(20_000))).await;
    let (before, write) = (proxy.accepted(), Way::CutNextAnswerTo("_swap_1($1"));

    proxy.set(write);
    let claimed = put(&store, id(1), None, value(CLAIMED, None, "claim")).await;
    proxy.until(Way::Open).await;
    assert_eq!(store.get(id(1)).await.unwrap().unwrap().version, claimed, "told the version of the write that landed");

    proxy.set(write);
    let settled = put(&store, id(1), Some(claimed), value(COMPLETED, Some(1 << 50), "settled")).await;
    proxy.until(Way::Open).await;
    assert!(settled > claimed);
    assert_eq!(store.get(id(1)).await.unwrap().unwrap().version, settled);

    proxy.set(write);
    assert!(matches!(swap(&store, id(1), Some(settled), None).await.unwrap(), Swap::Done(v) if v > settled));
    proxy.until(Way::Open).await;
    assert_eq!(store.get(id(1)).await.unwrap(), None);
    assert!(proxy.accepted() >= before + 3, "each on a fresh connection");

    // A conflict stays one, for it is somebody else's.
    let others = put(&store, id(2), None, value(CLAIMED, None, "another's")).await;
    proxy.set(write);
    let conflict = swap(&store, id(2), None, Some(value(CLAIMED, None, "mine"))).await.unwrap();
    proxy.until(Way::Open).await;
    assert!(matches!(conflict, Swap::Conflict(Some(Entry { version, .. })) if version == others));

    // Settings and looks, too.
    proxy.set(Way::CutNextAnswerTo("RETURNING 1"));
    assert!(store.swap_setting("secret", None, b"x").await.unwrap());
    proxy.until(Way::Open).await;
    assert!(!store.swap_setting("secret", None, b"y").await.unwrap());
    proxy.set(Way::CutNextAnswerTo("_get_1($1"));
    assert_eq!(store.get(id(2)).await.unwrap().unwrap().version, others);
    proxy.until(Way::Open).await;
    assert_eq!(store.status().health, Health::Ok);
}

/// Tries until it is told that it is written.
async fn insist(store: &Postgres, id: RecordId, expected: Option<Version>, new: Value) -> Version {
    loop {
        match swap(store, id, expected, Some(new.clone())).await {
            Ok(Swap::Done(version)) => return version,
            Err(StoreError::Unavailable { .. }) => tokio::time::sleep(MS(5)).await,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_writes_under_failing_connections_land_once() {
    let Some(server) = &*SERVER else { return };
    let proxy = Arc::new(Proxy::start(server.port).await);
    let store = Arc::new(open(&options(proxy.url(), MS(20_000))).await);
    let (told, mut landed) = watch::channel(0_u64);
    let writers: Vec<_> = (0..32_u64)
        .map(|writer| {
            let (store, told) = (Arc::clone(&store), told.clone());
            tokio::spawn(async move {
                for round in 0..10 {
                    let n = 100 + writer * 10 + round;
                    let claimed = insist(&store, id(n), None, value(CLAIMED, None, &format!("claim {n}"))).await;
                    let done = value(COMPLETED, Some(1 << 50), &format!("settled {n}"));
                    insist(&store, id(n), Some(claimed), done).await;
                    told.send_modify(|landed| *landed += 1);
                }
            })
        })
        .collect();
    drop(told);
    // Only once something has landed since: who connects while nobody else asks would lose one answer after the other.
    for cut in 1_u64.. {
        if landed.wait_for(|landed| *landed >= 8 * cut).await.is_err() {
            break;
        }
        proxy.set(Way::CutNextAnswer);
    }
    proxy.set(Way::Open);
    for writer in writers {
        writer.await.unwrap();
    }
    for n in 100..420 {
        let held = store.get(id(n)).await.unwrap().unwrap();
        assert_eq!(held.value, value(COMPLETED, Some(1 << 50), &format!("settled {n}")));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_answers_an_operation_ends_in_time_and_says_until_when_it_may_land() {
    let Some(server) = &*SERVER else { return };
    let proxy = Proxy::start(server.port).await;
    let store = open(&options(proxy.url(), TIMEOUT)).await;
    let time = store.time().unwrap();
    proxy.set(Way::NoAnswers);
    let (began, began_ms) = (Instant::now(), time.now_ms());
    let claim = swap(&store, id(1), None, Some(value(CLAIMED, None, "claim")));
    let (claimed, looked) = tokio::join!(claim, store.get(id(2)));
    assert!(began.elapsed() < TIMEOUT + SOON, "{:?}", began.elapsed());
    let until = unavailable(claimed).expect("it may have landed");
    assert!(until > time.now_ms() && until < began_ms + 5 * 2000, "{}", until - began_ms);
    assert_eq!(unavailable(looked), None, "a look leaves nothing behind");

    until_health(&store, Health::Unreachable).await;
    let began = Instant::now();
    assert_eq!(unavailable(swap(&store, id(3), None, Some(value(CLAIMED, None, "claim"))).await), None);
    assert!(began.elapsed() < MS(500), "not tried any more: {:?}", began.elapsed());

    proxy.set(Way::Open);
    until_health(&store, Health::Ok).await;
    assert_eq!(store.get(id(1)).await.unwrap().unwrap().value.bytes, "claim", "it had landed");
    assert_eq!(store.get(id(3)).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_queue_is_bounded() {
    let Some(server) = &*SERVER else { return };
    let proxy = Proxy::start(server.port).await;
    let store = Arc::new(open(&options(proxy.url(), MS(4000))).await);
    proxy.set(Way::NoAnswers);
    let began = Instant::now();
    let looks: Vec<_> = (0..6000)
        .map(|n| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { (unavailable(store.get(id(n)).await), began.elapsed()) })
        })
        .collect();
    let mut at_once = 0;
    for look in looks {
        at_once += usize::from(look.await.unwrap().1 < MS(1900));
    }
    // All but those in the queue and on three connections.
    assert!((6000 - 4096 - 3 * 256..=6000 - 4096).contains(&at_once), "{at_once}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_a_killed_server_and_the_store_finds_it_again() {
    let Some(server) = Server::start(&[]) else { return };
    let store = Arc::new(open(&options(server.url(), TIMEOUT)).await);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writers: Vec<_> = (0..16)
        .map(|writer: u64| {
            let (store, stop) = (Arc::clone(&store), Arc::clone(&stop));
            tokio::spawn(async move {
                let (mut n, mut acknowledged) = (writer, Vec::new());
                while !stop.load(Ordering::SeqCst) {
                    match swap(&store, id(n), None, Some(value(CLAIMED, None, "claim"))).await {
                        Ok(Swap::Done(version)) => acknowledged.push((n, version)),
                        Ok(Swap::Conflict(found)) => panic!("{found:?}"),
                        Err(StoreError::Unavailable { .. }) => tokio::time::sleep(MS(5)).await,
                        Err(other) => panic!("{other:?}"),
                    }
                    n += 16;
                }
                acknowledged
            })
        })
        .collect();
    for _ in 0..2 {
        let before = store.status().batched_writes;
        until("it writes", async || store.status().batched_writes > before + 200).await;
        server.kill_9();
        until_health(&store, Health::Unreachable).await;
        let began = Instant::now();
        let _ = unavailable(store.get(id(0)).await);
        assert!(began.elapsed() < SOON);
        server.run();
        until_health(&store, Health::Ok).await;
    }
    stop.store(true, Ordering::SeqCst);
    let mut count = 0;
    for writer in writers {
        for (n, version) in writer.await.unwrap() {
            assert_eq!(store.get(id(n)).await.unwrap().map(|entry| entry.version), Some(version), "claim {n}");
            count += 1;
        }
    }
    assert!(count > 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_was_given_up_does_not_land_after_its_time() {
    let Some(server) = Server::start(&["log_error_verbosity=verbose"]) else { return };
    let timeout = MS(300);
    let store = open(&options(server.url(), timeout)).await;
    let held = put(&store, id(1), None, value(CLAIMED, None, "held")).await;
    let time = store.time().unwrap();
    server.signal_all(Signal::STOP);
    let began = Instant::now();
    let claim = swap(&store, id(2), None, Some(value(CLAIMED, None, "late")));
    let until_ms = unavailable(claim.await).expect("it was sent");
    assert!(began.elapsed() < timeout + SOON);
    until("its time is over", async || time.now_ms() > until_ms).await;
    server.signal_all(Signal::CONT);
    // The server reads what it was sent, and refuses it.
    until("it is refused", async || server.log().contains("OG001")).await;
    until_health(&store, Health::Ok).await;
    assert_eq!(store.get(id(2)).await.unwrap(), None);
    assert_eq!(store.get(id(1)).await.unwrap().unwrap().version, held);
    put(&store, id(2), None, value(CLAIMED, None, "in time")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_is_promoted_is_found() {
    let Some(primary) = Server::start(&[]) else { return };
    let standby = primary.standby();
    let url =
        format!("postgres://postgres@127.0.0.1:{},127.0.0.1:{}/postgres?sslmode=disable", standby.port, primary.port);
    let options = options(url, TIMEOUT);
    let store = open(&options).await;
    let held = put(&store, id(1), None, value(CLAIMED, None, "claim")).await;
    let only_standby = Options { url: standby.url(), ..options.clone() };
    assert!(matches!(Postgres::open(&only_standby).await.err(), Some(OpenError::Unreachable { .. })));
    let watcher = session(&standby.url()).await;
    let lsn = session(&primary.url()).await.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap();
    let (lsn, table) = (lsn.get::<_, String>(0), options.prefix.clone());
    until("the standby has followed", async || {
        let row = watcher.query_one("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", &[&lsn]).await;
        row.unwrap().get::<_, bool>(0)
    })
    .await;
    primary.kill_9();
    until_health(&store, Health::Unreachable).await;
    standby.promote();
    until_health(&store, Health::Ok).await;
    assert_eq!(store.get(id(1)).await.unwrap().unwrap().version, held, "{table}");
    let settled = put(&store, id(1), Some(held), value(COMPLETED, Some(1 << 50), "settled")).await;
    assert!(settled > held);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_in_the_way_leaves_no_backends_behind() {
    let Some(server) = Server::start(&[]) else { return };
    let options = options(server.url(), MS(1000));
    let store = open(&options).await;
    let held = put(&store, id(1), None, value(CLAIMED, None, "claim")).await;
    let prefix = &options.prefix;
    let (locker, watcher) = (session(&server.url()).await, session(&server.url()).await);
    locker.batch_execute(&format!("BEGIN; SELECT FROM {prefix}_records FOR UPDATE")).await.unwrap();
    let backends = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'oncegate'";
    let started = "SELECT max(backend_start)::text FROM pg_stat_activity WHERE application_name = 'oncegate'";
    let newest = async || watcher.query_one(started, &[]).await.unwrap().get::<_, String>(0);
    // All connections stand.
    until("all stand", async || watcher.query_one(backends, &[]).await.unwrap().get::<_, i64>(0) == 3).await;
    let before = newest().await;
    for _ in 0..3 {
        let settled = swap(&store, id(1), Some(held), Some(value(COMPLETED, Some(1 << 50), "settled"))).await;
        assert!(matches!(settled, Err(StoreError::Unavailable { .. })), "{settled:?}");
    }
    assert_eq!(newest().await, before, "none was given up for a new one");
    locker.batch_execute("COMMIT").await.unwrap();
    until("it is settled", async || {
        swap(&store, id(1), Some(held), Some(value(COMPLETED, Some(1 << 50), "settled"))).await.is_ok()
    })
    .await;
}
