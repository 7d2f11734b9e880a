//! Entries: how they expire, how the unknown ones are counted, what strangers may have written in their place.

use super::*;

#[tokio::test]
async fn an_entry_is_gone_when_its_time_is_over() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open(&server.url()).await;
    let at = now_ms(&store) + 300;
    let claim = put(&store, 1, None, value(CLAIMED, "claim")).await;
    let soon = Value { expires_at_ms: Some(at), ..value(COMPLETED, "soon") };
    let version = put(&store, 1, Some(claim), soon.clone()).await;
    put(&store, 2, None, soon.clone()).await;
    assert_eq!(store.get(id(1)).await.unwrap(), Some(Entry { version, value: soon }));
    assert_eq!(server.client().ask(&["PEXPIRETIME", &key(1)]).text(), at.to_string(), "expiry and entry are one write");
    for n in [1, 2] {
        until("it expires", async || store.get(id(n)).await.unwrap().is_none()).await;
        assert!(now_ms(&store) >= at - 1);
        put(&store, n, None, value(CLAIMED, "again")).await;
        assert_eq!(server.client().ask(&["PTTL", &key(n)]).text(), "-1", "a claim does not expire");
    }
    // An expiry that Redis could not take is as good as none.
    put(&store, 3, None, Value { expires_at_ms: Some(u64::MAX), ..value(COMPLETED, "for ever") }).await;
    assert_eq!(store.get(id(3)).await.unwrap().unwrap().value.expires_at_ms, Some(u64::MAX));
}

/// As a failover may lose it.
#[tokio::test]
async fn a_write_that_the_server_has_lost_is_not_taken_for_the_one_in_its_place() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let (store, other) = (open(&server.url()).await, open(&server.url()).await);
    let claim = put(&store, 1, None, value(CLAIMED, "claim")).await;
    let mut client = server.client();
    let servers::Value::Bytes(before) = client.ask(&["GET", &key(1)]) else { panic!() };
    let lost = put(&store, 1, Some(claim), value(COMPLETED, "lost")).await;
    client.ask(&[b"SET".as_slice(), key(1).as_bytes(), &before]);
    until("another millisecond has begun", async || now_ms(&other) * 1000 > lost.0).await;
    let theirs = put(&other, 1, Some(claim), value(COMPLETED, "theirs")).await;
    let held = Entry { version: theirs, value: value(COMPLETED, "theirs") };
    assert_eq!(swap(&store, 1, Some(lost), None).await.unwrap(), Swap::Conflict(Some(held)));
}

#[tokio::test]
async fn unknown_entries_are_counted_and_the_index_forgets_those_that_have_expired() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open(&server.url()).await;
    let before = now_ms(&store);
    let unknown = |at: Option<u64>| Value { expires_at_ms: at, ..value(UNKNOWN, "unknown") };
    let soon = now_ms(&store) + 300;
    let first = put(&store, 1, None, unknown(None)).await;
    for n in 2..10 {
        let claim = put(&store, n, None, value(CLAIMED, "claim")).await;
        put(&store, n, Some(claim), unknown(Some(soon))).await;
    }
    let removed = put(&store, 20, None, unknown(None)).await;
    assert!(matches!(swap(&store, 20, Some(removed), None).await.unwrap(), Swap::Done(_)));
    let changed = put(&store, 21, None, unknown(Some(soon))).await;
    put(&store, 21, Some(changed), unknown(None)).await;

    let status = open(&server.url()).await.status();
    assert_eq!(status.entries[2], 10);
    assert!(!status.created);
    let oldest = status.oldest_ms[2].unwrap();
    assert!((before - 5..=now_ms(&store)).contains(&oldest), "{oldest} is between {before} and now");

    put(&store, 1, Some(first), value(COMPLETED, "resolved")).await;
    until("the others expire", async || store.get(id(9)).await.unwrap().is_none()).await;
    until("the index is swept", async || {
        store.sweep(now_ms(&store)).await.unwrap();
        store.status().swept == 8
    })
    .await;
    assert!(now_ms(&store) >= soon - 1);
    let status = open(&server.url()).await.status();
    assert_eq!(status.entries[2], 1, "the one that does not expire");
    let page = store.list(Some(UNKNOWN), 0, 100).await.unwrap();
    assert_eq!(page.entries.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [id(21)]);
    assert_eq!(page.next, None);
}

#[tokio::test]
async fn claims_are_counted_and_listed_without_looking_at_the_rest() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open(&server.url()).await;
    let lapsing = |at: u64| Value { expires_at_ms: Some(at), ..value(CLAIMED, "claim") };
    let later = now_ms(&store) + 60_000;
    let mut ends = vec![None, Some(value(COMPLETED, "done")), Some(value(UNKNOWN, "unknown"))].into_iter();
    for n in 1..=6 {
        let version = put(&store, n, None, lapsing(later)).await;
        // A renewal.
        let version = put(&store, n, Some(version), lapsing(later + 1)).await;
        if let Some(end) = ends.next() {
            assert!(matches!(swap(&store, n, Some(version), end).await.unwrap(), Swap::Done(_)));
        }
    }
    server.client().ask(&["CONFIG", "RESETSTAT"]);
    let page = store.list(Some(CLAIMED), 0, 100).await.unwrap();
    assert_eq!(page.entries.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [4, 5, 6].map(id));
    assert_eq!(page.next, None);
    assert!(!server.client().ask(&["INFO", "commandstats"]).text().contains("cmdstat_scan"));
    assert_eq!(open(&server.url()).await.status().entries, [3, 0, 1, 0]);
    // One that nobody has made unknown in all its time.
    put(&store, 9, None, lapsing(now_ms(&store) + 200)).await;
    until("it expires", async || store.get(id(9)).await.unwrap().is_none()).await;
    until("the index is swept", async || {
        store.sweep(now_ms(&store)).await.unwrap();
        store.status().swept == 1
    })
    .await;
    assert_eq!(open(&server.url()).await.status().entries, [3, 0, 1, 0]);
}

#[tokio::test]
async fn the_sweep_spares_what_has_not_expired_in_the_server() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open(&server.url()).await;
    let later = now_ms(&store) + 60_000;
    put(&store, 1, None, Value { expires_at_ms: Some(later), ..value(UNKNOWN, "unknown") }).await;
    for _ in 0..16 {
        // A gateway whose clock is far ahead.
        store.sweep(later + 1).await.unwrap();
    }
    assert_eq!(store.status().swept, 0);
    assert_eq!(open(&server.url()).await.status().entries[2], 1);
}

#[tokio::test]
async fn what_is_no_entry_is_damaged_and_never_absent() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open(&server.url()).await;
    let mut client = server.client();
    client.ask(&["SET", &key(1), "short"]);
    client.ask(&["SET", &key(2), ""]);
    client.ask(&["RPUSH", &key(3), "a list"]);
    client.ask(&["SET", &key(4), "12345678\u{9}12345678a tag of the future"]);
    for n in 1..=4 {
        let found = store.get(id(n)).await;
        assert!(matches!(&found, Err(StoreError::Damaged { id: damaged, .. }) if *damaged == id(n)), "{n}: {found:?}");
        for (expected, new) in
            [(None, Some(value(CLAIMED, "x"))), (Some(Version(7)), Some(value(CLAIMED, "x"))), (Some(Version(7)), None)]
        {
            let swapped = swap(&store, n, expected, new).await;
            assert!(matches!(swapped, Err(StoreError::Damaged { .. })), "{n}: {swapped:?}");
        }
    }
    // Listings pass them over.
    put(&store, 5, None, value(CLAIMED, "sound")).await;
    client.ask(&["SET", "og:{aa}:not an id", "x"]);
    client.ask(&["SET", "stranger", "x"]);
    let page = store.list(None, 0, 100).await.unwrap();
    assert_eq!(page.entries.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [id(5)]);
    assert_eq!(store.status().health, Health::Ok);
}

#[tokio::test]
async fn scripts_that_the_server_has_lost_are_sent_again() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open(&server.url()).await;
    for round in 0..3 {
        server.client().ask(&["SCRIPT", "FLUSH"]);
        let version = put(&store, round, None, value(CLAIMED, "claim")).await;
        server.client().ask(&["SCRIPT", "FLUSH"]);
        put(&store, round, Some(version), value(COMPLETED, "done")).await;
    }
    assert!(server.client().ask(&["INFO", "commandstats"]).text().contains("cmdstat_evalsha"), "by digest otherwise");
}

#[tokio::test]
async fn a_write_is_one_command_and_a_read_is_one() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open(&server.url()).await;
    let version = put(&store, 1, None, value(CLAIMED, "claim")).await;
    put(&store, 1, Some(version), value(COMPLETED, "done")).await;
    let mut client = server.client();
    client.ask(&["CONFIG", "RESETSTAT"]);
    let expiring = |value: Value| Value { expires_at_ms: Some(now_ms(&store) + 60_000), ..value };
    let version = put(&store, 2, None, expiring(value(CLAIMED, "claim"))).await;
    put(&store, 2, Some(version), expiring(value(COMPLETED, "done"))).await;
    store.get(id(2)).await.unwrap().unwrap();
    let stats = client.ask(&["INFO", "commandstats"]).text();
    let calls = |command: &str| {
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
        line.map_or(0, |line| line.split(',').next().unwrap().parse::<u64>().unwrap())
    };
    assert_eq!((calls("evalsha"), calls("eval")), (2, 0), "{stats}");
    // The claim has looked at the birthmark, too, and so does each look at the clock.
    assert!((2..=3).contains(&calls("get")), "{stats}");
    // Not set a moment after it: a connection, or a server, may end in between.
    assert!(!stats.contains("expire"), "an expiry is part of the write: {stats}");
}

#[tokio::test]
async fn word_of_the_end_of_a_claim_comes_at_once_and_of_a_renewal_not_at_all() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let (store, other) = (open(&server.url()).await, open(&server.url()).await);
    for round in 0..4_u8 {
        let version = put(&store, round, None, value(CLAIMED, "claim")).await;
        let mut watch = other.watch(id(round));
        let mut client = server.client();
        let channel = key(round);
        until("it is subscribed", async || {
            client.ask(&["PUBSUB", "NUMSUB", &channel])
                == servers::Value::Array(vec![servers::Value::Bytes(channel.clone().into()), servers::Value::Int(1)])
        })
        .await;
        // The pauses between looks grow to a second.
        for _ in 0..4 {
            watch.changed().await;
        }
        let version = put(&store, round, Some(version), value(CLAIMED, "renewed")).await;
        let early = tokio::time::timeout(Duration::from_millis(300), watch.changed()).await;
        assert!(early.is_err(), "a renewal is no news");
        let settle = (round % 2 == 0).then(|| value(COMPLETED, "done"));
        let began = Instant::now();
        assert!(matches!(swap(&store, round, Some(version), settle).await.unwrap(), Swap::Done(_)));
        watch.changed().await;
        assert!(began.elapsed() < Duration::from_millis(700), "by word, not by looking: {:?}", began.elapsed());
        drop(watch);
        until("it is subscribed no more", async || {
            client.ask(&["PUBSUB", "CHANNELS"]) == servers::Value::Array(vec![])
        })
        .await;
    }
    // After the connection was lost, it listens again.
    let version = put(&store, 9, None, value(CLAIMED, "claim")).await;
    let mut watch = other.watch(id(9));
    let mut client = server.client();
    let subscribed = servers::Value::Array(vec![servers::Value::Bytes(key(9).into())]);
    until("it is subscribed", async || client.ask(&["PUBSUB", "CHANNELS"]) == subscribed).await;
    client.ask(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    until("it is subscribed again", async || client.ask(&["PUBSUB", "CHANNELS"]) == subscribed).await;
    for _ in 0..5 {
        watch.changed().await;
    }
    // What it has not heard meanwhile is looked for as soon as it hears again.
    until("it is told to look", async || {
        client.ask(&["CLIENT", "KILL", "TYPE", "pubsub"]);
        let began = Instant::now();
        watch.changed().await;
        began.elapsed() < Duration::from_millis(900)
    })
    .await;
    until("it is subscribed again", async || client.ask(&["PUBSUB", "CHANNELS"]) == subscribed).await;
    for _ in 0..2 {
        watch.changed().await;
    }
    let began = Instant::now();
    put(&store, 9, Some(version), value(COMPLETED, "done")).await;
    watch.changed().await;
    assert!(began.elapsed() < Duration::from_millis(700), "{:?}", began.elapsed());
}
