//! Answers that are lost, servers that die, servers that stand still.

use super::proxy::Proxy;
use super::*;
use servers::Value as Reply;
use std::sync::Arc;

#[tokio::test]
async fn a_write_whose_answer_is_lost_is_done_once_and_said_to_be_done() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let proxy = Proxy::start(server.port, b"EVAL").await;
    let store = open(&proxy.url()).await;
    put(&store, 100, None, value(CLAIMED, "so that the scripts are known")).await;
    for losses in 1..=2 {
        let n = losses as u8;
        proxy.lose(losses);
        let claimed = put(&store, n, None, value(CLAIMED, "claim")).await;
        proxy.lose(losses);
        let done = put(&store, n, Some(claimed), value(COMPLETED, "done")).await;
        let held = store.get(id(n)).await.unwrap().unwrap();
        assert_eq!(held, Entry { version: done, value: value(COMPLETED, "done") });
        proxy.lose(losses);
        assert!(matches!(swap(&store, n, Some(done), None).await.unwrap(), Swap::Done(_)));
        assert_eq!(store.get(id(n)).await.unwrap(), None);
        proxy.lose(losses);
        assert!(store.swap_setting(&format!("name {n}"), None, b"value").await.unwrap());
        assert!(!store.swap_setting(&format!("name {n}"), None, b"other").await.unwrap());
    }
    assert_eq!(proxy.lost(), 4 + 8);
}

#[tokio::test]
async fn somebody_elses_write_is_not_taken_for_ones_own_because_an_answer_was_lost() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let proxy = Proxy::start(server.port, b"EVAL").await;
    let store = open(&proxy.url()).await;
    let other = open(&server.url()).await;
    let theirs =
        Entry { version: put(&other, 1, None, value(CLAIMED, "theirs")).await, value: value(CLAIMED, "theirs") };
    proxy.lose(1);
    let swapped = swap(&store, 1, None, Some(value(CLAIMED, "mine"))).await.unwrap();
    assert_eq!(swapped, Swap::Conflict(Some(theirs.clone())));
    proxy.lose(1);
    let swapped = swap(&store, 1, Some(Version(theirs.version.0 - 1)), None).await.unwrap();
    assert_eq!(swapped, Swap::Conflict(Some(theirs)));
    assert_eq!(proxy.lost(), 2);
}

#[tokio::test]
async fn a_read_whose_answer_is_lost_is_sent_again() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let proxy = Proxy::start(server.port, b"$3\r\nGET\r\n").await;
    let store = open(&proxy.url()).await;
    put(&store, 1, None, value(CLAIMED, "claim")).await;
    proxy.lose(2);
    assert_eq!(store.get(id(1)).await.unwrap().unwrap().value, value(CLAIMED, "claim"));
    assert_eq!(proxy.lost(), 2);
}

#[tokio::test]
async fn an_answer_that_stays_lost_is_told_with_the_time_when_the_write_can_land_no_more() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let proxy = Proxy::start(server.port, b"EVAL").await;
    let store = open_hasty(&proxy.url(), 400).await;
    put(&store, 100, None, value(CLAIMED, "so that the scripts are known")).await;
    proxy.lose(usize::MAX);
    let (before, began) = (now_ms(&store), Instant::now());
    let swapped = swap(&store, 1, None, Some(value(CLAIMED, "claim"))).await;
    let Err(StoreError::Unavailable { may_land_until_ms: Some(at), .. }) = swapped else { panic!("{swapped:?}") };
    assert!((before + 700..=before + 2000).contains(&at), "{before} {at}");
    assert!(began.elapsed() < Duration::from_millis(1500), "{:?}", began.elapsed());
    assert!(proxy.lost() > 1, "it was tried again");
    proxy.lose(0);
    assert_eq!(store.get(id(1)).await.unwrap().unwrap().value, value(CLAIMED, "claim"), "it has landed");
}

#[tokio::test]
async fn a_write_whose_answer_is_lost_waits_for_the_next_connection_to_tell() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let proxy = Proxy::start(server.port, b"EVAL").await;
    let store = Arc::new(open(&proxy.url()).await);
    put(&store, 100, None, value(CLAIMED, "so that the scripts are known")).await;
    proxy.refuse(true);
    proxy.lose(1);
    let writes = store.clone();
    let writing = tokio::spawn(async move { swap(&writes, 1, None, Some(value(CLAIMED, "claim"))).await });
    until("it was tried in vain", async || proxy.refused() > 1).await;
    assert!(!writing.is_finished());
    proxy.refuse(false);
    let claimed = writing.await.unwrap().unwrap();
    assert!(matches!(claimed, Swap::Done(_)), "{claimed:?}");
}

#[tokio::test]
async fn a_second_try_that_is_refused_leaves_it_open_whether_the_first_has_landed() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let proxy = Proxy::start(server.port, b"EVAL").await;
    let store = Arc::new(open(&proxy.url()).await);
    put(&store, 100, None, value(CLAIMED, "so that the scripts are known")).await;
    proxy.refuse(true);
    proxy.lose(1);
    let writes = store.clone();
    let writing = tokio::spawn(async move { swap(&writes, 1, None, Some(value(CLAIMED, "claim"))).await });
    until("it has landed", async || proxy.lost() == 1).await;
    let mut client = server.client();
    client.ask(&["ACL", "SETUSER", "default", "-set"]);
    proxy.refuse(false);
    let refused = writing.await.unwrap();
    let Err(StoreError::Unavailable { may_land_until_ms: Some(_), reason }) = &refused else { panic!("{refused:?}") };
    assert!(!reason.contains("no answer"), "the server has said it: {reason}");
    client.ask(&["ACL", "SETUSER", "default", "+set"]);
    assert!(store.get(id(1)).await.unwrap().is_some(), "it has landed");
}

/// The connection moves all the time, so it is not given up.
#[tokio::test]
async fn a_write_whose_answer_trickles_in_too_slowly_may_have_landed() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let proxy = Proxy::start(server.port, b"EVAL").await;
    let store = open_hasty(&proxy.url(), 400).await;
    put(&store, 100, None, value(CLAIMED, "so that the scripts are known")).await;
    proxy.trickle(60);
    let claim = swap(&store, 1, None, Some(value(CLAIMED, "claim"))).await;
    assert!(matches!(claim, Err(StoreError::Unavailable { may_land_until_ms: Some(_), .. })), "{claim:?}");
    proxy.trickle(0);
    until("it is found", async || store.get(id(1)).await.is_ok_and(|found| found.is_some())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_a_kill_and_the_store_comes_back_by_itself() {
    if !installed() {
        return;
    }
    let mut server = Server::strict();
    let store = Arc::new(Redis::open(&Options { strict: true, ..options(&server.url()) }).await.unwrap());
    assert!(store.status().created);
    let mut acknowledged = Vec::new();
    for round in 0..3_u8 {
        let tasks: Vec<_> = (0..40)
            .map(|n| {
                let (store, n) = (store.clone(), round * 40 + n);
                tokio::spawn(async move {
                    let mut held = None;
                    loop {
                        let new = value(CLAIMED, &format!("{held:?}"));
                        match swap(&store, n, held, Some(new)).await {
                            Ok(Swap::Done(version)) => held = Some(version),
                            Ok(Swap::Conflict(found)) => panic!("{n}: {held:?}, but {found:?}"),
                            Err(_) => return (n, held),
                        }
                    }
                })
            })
            .collect();
        until("some are written", async || store.status().batched_writes > 1000 * (u64::from(round) + 1)).await;
        server.kill();
        for task in tasks {
            acknowledged.push(task.await.unwrap());
        }
        until("it is known to be gone", async || store.status().health == Health::Unreachable).await;
        let began = Instant::now();
        let refused = swap(&store, 200, None, Some(value(CLAIMED, "x"))).await;
        assert!(matches!(refused, Err(StoreError::Unavailable { may_land_until_ms: None, .. })), "{refused:?}");
        assert!(began.elapsed() < Duration::from_millis(200), "nothing waits for what is known to be gone");
        server.restart();
        until("it is back", async || store.status().health == Health::Ok).await;
        for (n, version) in &acknowledged {
            let found = store.get(id(*n)).await.unwrap().map(|entry| entry.version);
            assert!(found >= *version, "{n}: {version:?} was acknowledged, there is {found:?}");
        }
    }
}

#[tokio::test]
async fn a_server_that_stands_still_is_given_up_in_time_and_what_it_does_late_is_refused() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open_hasty(&server.url(), 400).await;
    put(&store, 100, None, value(CLAIMED, "so that the scripts are known")).await;
    server.pause();
    let began = Instant::now();
    let swapped = swap(&store, 1, None, Some(value(CLAIMED, "late"))).await;
    let Err(StoreError::Unavailable { may_land_until_ms: Some(at), .. }) = swapped else { panic!("{swapped:?}") };
    assert!(began.elapsed() < Duration::from_millis(800), "{:?}", began.elapsed());
    until("it is known to stand still", async || store.status().health == Health::Unreachable).await;
    let began = Instant::now();
    assert!(store.get(id(1)).await.is_err());
    assert!(began.elapsed() < Duration::from_millis(200));
    until("the write can land no more", async || now_ms(&store) > at).await;
    server.resume();
    until("it is back", async || store.status().health == Health::Ok).await;
    // The server has read by now what was written to it before: connections are served by turns.
    for _ in 0..10 {
        assert_eq!(store.get(id(1)).await.unwrap(), None, "it came too late");
    }
    let stats = server.client().ask(&["INFO", "commandstats"]).text();
    assert!(
        stats.contains("cmdstat_evalsha:calls=2,") || stats.contains("cmdstat_evalsha:calls=3,"),
        "it did come: {stats}"
    );
}

/// A renewal, say: its owner has given it up, and may have settled otherwise.
#[tokio::test]
async fn a_change_that_was_given_up_does_not_land_after_its_time() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open_hasty(&server.url(), 400).await;
    let held = put(&store, 1, None, value(CLAIMED, "claim")).await;
    let known = put(&store, 100, None, value(CLAIMED, "claim")).await;
    put(&store, 100, Some(known), value(CLAIMED, "so that the script is known")).await;
    server.pause();
    let swapped = swap(&store, 1, Some(held), Some(value(CLAIMED, "renewed"))).await;
    let Err(StoreError::Unavailable { may_land_until_ms: Some(at), .. }) = swapped else { panic!("{swapped:?}") };
    until("the write can land no more", async || now_ms(&store) > at).await;
    server.resume();
    until("it is back", async || store.status().health == Health::Ok).await;
    let mut client = server.client();
    until("the server has read what was written to it", async || {
        let stats = client.ask(&["INFO", "commandstats"]).text();
        !stats.contains("cmdstat_evalsha:calls=3,")
    })
    .await;
    let entry = Entry { version: held, value: value(CLAIMED, "claim") };
    assert_eq!(store.get(id(1)).await.unwrap(), Some(entry), "it came too late");
}

#[tokio::test]
async fn a_server_that_stands_still_is_noticed_without_traffic() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open_hasty(&server.url(), 400).await;
    let before = now_ms(&store);
    server.pause();
    until("the heartbeat misses it", async || store.status().health == Health::Unreachable).await;
    assert!(now_ms(&store) > before + 1000, "the store's time goes on meanwhile");
    server.resume();
    until("it is back", async || store.status().health == Health::Ok).await;
    let Reply::Array(time) = server.client().ask(&["TIME"]) else { panic!() };
    let server_ms = time[0].text().parse::<u64>().unwrap() * 1000 + time[1].text().parse::<u64>().unwrap() / 1000;
    assert!(now_ms(&store).abs_diff(server_ms) < 500, "{} {server_ms}", now_ms(&store));
}

#[tokio::test]
async fn a_write_that_lands_after_a_pause_is_found_by_the_next_try() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = Arc::new(open_hasty(&server.url(), 3000).await);
    put(&store, 100, None, value(CLAIMED, "so that the scripts are known")).await;
    server.pause();
    let writing = tokio::spawn({
        let store = store.clone();
        async move { put(&store, 1, None, value(CLAIMED, "claim")).await }
    });
    // Longer than one attempt waits, shorter than all of them.
    tokio::time::sleep(Duration::from_millis(1800)).await;
    server.resume();
    let version = writing.await.unwrap();
    assert_eq!(store.get(id(1)).await.unwrap(), Some(Entry { version, value: value(CLAIMED, "claim") }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_queue_is_bounded_and_nothing_in_it_waits_longer_than_the_timeout() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = Arc::new(open_hasty(&server.url(), 1000).await);
    server.pause();
    let began = Instant::now();
    let tasks: Vec<_> = (0..12_000_u32)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut name = [0; 16];
                name[..4].copy_from_slice(&n.to_be_bytes());
                let new = Some(value(CLAIMED, "claim"));
                let swapped = store.compare_and_swap(RecordId(name), None, new, 0, Urgency::Claim).await;
                (swapped, began.elapsed())
            })
        })
        .collect();
    let (mut full, mut latest) = (0, Duration::ZERO);
    for task in tasks {
        match task.await.unwrap() {
            (Err(StoreError::Unavailable { reason, may_land_until_ms }), elapsed) => {
                latest = latest.max(elapsed);
                if reason.contains("too many") {
                    assert_eq!(may_land_until_ms, None, "it was never sent");
                    full += 1;
                }
            }
            (other, _) => panic!("{other:?}"),
        }
    }
    assert!(full > 1000, "{full} were refused at once");
    assert!(latest < Duration::from_millis(2500), "{latest:?}");
    server.resume();
    until("it is back", async || store.status().health == Health::Ok).await;
    assert_eq!(store.get(id(1)).await.unwrap(), None);
}

#[tokio::test]
async fn a_server_without_room_takes_no_claims_but_removals() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open(&server.url()).await;
    let version = put(&store, 1, None, value(CLAIMED, "claim")).await;
    server.client().ask(&["CONFIG", "SET", "maxmemory", "1"]);
    let claim = swap(&store, 2, None, Some(value(CLAIMED, "claim"))).await;
    assert!(matches!(claim, Err(StoreError::Full { .. })), "{claim:?}");
    let settle = store.compare_and_swap(id(1), Some(version), Some(value(COMPLETED, "done")), 0, Urgency::Settle).await;
    assert!(matches!(settle, Err(StoreError::Unavailable { may_land_until_ms: None, .. })), "{settle:?}");
    assert_eq!(store.get(id(1)).await.unwrap().unwrap().version, version, "nothing was written");
    assert!(matches!(swap(&store, 1, Some(version), None).await.unwrap(), Swap::Done(_)));
    server.client().ask(&["CONFIG", "SET", "maxmemory", "0"]);
    put(&store, 2, None, value(CLAIMED, "claim")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_whose_second_try_finds_no_room_may_have_landed() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let proxy = Proxy::start(server.port, b"EVAL").await;
    let store = Arc::new(open(&proxy.url()).await);
    put(&store, 100, None, value(CLAIMED, "so that the scripts are known")).await;
    proxy.lose(1);
    proxy.admit(false);
    let claiming = tokio::spawn({
        let store = store.clone();
        async move { swap(&store, 1, None, Some(value(CLAIMED, "claim"))).await }
    });
    until("the answer is lost", async || proxy.lost() == 1).await;
    server.client().ask(&["CONFIG", "SET", "maxmemory", "1"]);
    proxy.admit(true);
    let claimed = claiming.await.unwrap();
    assert!(matches!(claimed, Err(StoreError::Unavailable { may_land_until_ms: Some(_), .. })), "{claimed:?}");
    assert!(store.get(id(1)).await.unwrap().is_some(), "it has landed");
}

#[tokio::test]
async fn a_server_that_became_a_replica_is_out_of_reach() {
    if !installed() {
        return;
    }
    let (server, other) = (Server::start(&[]), Server::start(&[]));
    let store = open_hasty(&server.url(), 500).await;
    let version = put(&store, 1, None, value(CLAIMED, "claim")).await;
    server.client().ask(&["REPLICAOF", "127.0.0.1", &other.port.to_string()]);
    let refused = swap(&store, 1, Some(version), Some(value(COMPLETED, "done"))).await;
    assert!(matches!(refused, Err(StoreError::Unavailable { may_land_until_ms: None, .. })), "{refused:?}");
    until("it is known", async || store.status().health == Health::Unreachable).await;
    server.client().ask(&["REPLICAOF", "NO", "ONE"]);
    until("it is back", async || store.status().health == Health::Ok).await;
}

#[tokio::test]
async fn a_closed_store_answers_nothing_more_and_its_connections_end() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open(&server.url()).await;
    let watch = store.watch(id(1));
    let mut client = server.client();
    let connections = |client: &mut servers::Client| client.ask(&["CLIENT", "LIST"]).text().lines().count();
    until("both connections stand", async || connections(&mut client) == 3).await;
    store.close();
    assert!(matches!(store.get(id(1)).await, Err(StoreError::Failed { .. })));
    assert_eq!(store.status().health, Health::Failed);
    until("the connections end", async || connections(&mut client) == 1).await;
    drop(watch);
}
