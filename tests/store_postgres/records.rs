//! Records: their expiry, what is told of them, several gateways, rows that somebody has spoilt.

use super::*;
use std::sync::Arc;
use std::task::Poll;

async fn sweep_all(store: &Postgres, now_ms: u64) {
    while store.sweep(now_ms).await.unwrap() < MS(500) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_entries_stay_until_they_are_swept_each_once() {
    let Some(server) = &*SERVER else { return };
    let options = options(server.url(), MS(20_000));
    let (here, there) = (open(&options).await, open(&options).await);
    let far = here.time().unwrap().now_ms() + 3_600_000;
    for n in 0..1300 {
        let expires = match n % 3 {
            0 => Some(1000),
            1 => Some(far),
            _ => None,
        };
        put(&here, id(n), None, value(COMPLETED, expires, "soon")).await;
    }
    // Replaced by one that lives longer.
    let held = here.get(id(0)).await.unwrap().unwrap();
    put(&here, id(0), Some(held.version), value(COMPLETED, Some(2000), "later")).await;
    sweep_all(&here, 999).await;
    assert_eq!(here.get(id(3)).await.unwrap().unwrap().value.expires_at_ms, Some(1000), "the caller judges");
    // Two at once.
    tokio::join!(sweep_all(&here, 1000), sweep_all(&there, 1000));
    assert_eq!(here.status().swept + there.status().swept, 433);
    assert_eq!(here.get(id(0)).await.unwrap().unwrap().value.bytes, "later");
    assert_eq!(here.get(id(3)).await.unwrap(), None);
    // A gateway whose clock is ahead drops nothing that has not expired by the server's.
    sweep_all(&here, u64::MAX).await;
    assert_eq!(here.status().swept + there.status().swept, 434);
    assert!(here.get(id(1)).await.unwrap().is_some() && here.get(id(2)).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_follow_within_seconds() {
    let Some(server) = &*SERVER else { return };
    let store = open(&options(server.url(), MS(20_000))).await;
    let before_ms = store.time().unwrap().now_ms();
    let mut unknown = Vec::new();
    for n in 0..30 {
        let version = put(&store, id(n), None, value(CLAIMED, None, "claim")).await;
        if n < 10 {
            unknown.push(put(&store, id(n), Some(version), value(UNKNOWN, Some(1 << 50), "?")).await);
        }
    }
    until("it is counted", async || {
        let entries = store.status().entries;
        (entries[0], entries[2]) == (20, 10)
    })
    .await;
    let status = store.status();
    let oldest = status.oldest_ms[2].unwrap();
    assert!(oldest + 5 >= before_ms && oldest <= store.time().unwrap().now_ms(), "{before_ms} {oldest}");
    assert!(status.disk_bytes > 0 && status.batched_writes == 40 && status.bytes_written == 30 * 5 + 10);
    for (n, version) in unknown.into_iter().enumerate() {
        swap(&store, id(n as u64), Some(version), None).await.unwrap();
    }
    until("it is counted", async || store.status().entries[2] == 0 && store.status().oldest_ms[2].is_none()).await;
}

/// Gateways that go through the same records in different orders do not wait for each other in a circle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_change_the_same_records_without_deadlocks() {
    let Some(server) = Server::start(&["deadlock_timeout=60s"]) else { return };
    let options = options(server.url(), MS(20_000));
    let stores = [Arc::new(open(&options).await), Arc::new(open(&options).await)];
    for n in 0..20 {
        put(&stores[0], id(n), None, value(CLAIMED, None, "0")).await;
    }
    let began = Instant::now();
    let tasks: Vec<_> = (0..40_u64)
        .map(|task| {
            let store = Arc::clone(&stores[task as usize % 2]);
            tokio::spawn(async move {
                for step in 0..20 {
                    let n = if task % 4 < 2 { step } else { 19 - step };
                    let mut held = store.get(id(n)).await.unwrap().unwrap();
                    loop {
                        let count: u64 = std::str::from_utf8(&held.value.bytes).unwrap().parse().unwrap();
                        let next = value(CLAIMED, None, &(count + 1).to_string());
                        match swap(&store, id(n), Some(held.version), Some(next)).await.unwrap() {
                            Swap::Done(_) => break,
                            Swap::Conflict(found) => held = found.unwrap(),
                        }
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    for n in 0..20 {
        // Equal contents may be taken for one's own, whose answer was lost: these have no token, so fewer are counted.
        let held = stores[1].get(id(n)).await.unwrap().unwrap();
        let count: u64 = std::str::from_utf8(&held.value.bytes).unwrap().parse().unwrap();
        assert!((1..=40).contains(&count), "{count}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_several_gateways_one_claims() {
    let Some(server) = &*SERVER else { return };
    let options = options(server.url(), MS(20_000));
    let stores = [Arc::new(open(&options).await), Arc::new(open(&options).await), Arc::new(open(&options).await)];
    let tasks: Vec<_> = (0..300_u64)
        .map(|task| {
            let store = Arc::clone(&stores[task as usize % 3]);
            tokio::spawn(async move {
                let mut won = Vec::new();
                for n in 0..20 {
                    let mine = value(CLAIMED, None, &format!("claim {task}"));
                    match swap(&store, id(n), None, Some(mine.clone())).await.unwrap() {
                        Swap::Done(_) => won.push(n),
                        Swap::Conflict(found) => assert_ne!(found.expect("told what is held").value, mine),
                    }
                }
                won
            })
        })
        .collect();
    let mut won = Vec::new();
    for task in tasks {
        won.extend(task.await.unwrap());
    }
    won.sort_unstable();
    assert_eq!(won, (0..20).collect::<Vec<_>>(), "each once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_were_spoilt_are_damaged_and_never_absent() {
    let Some(server) = &*SERVER else { return };
    let options = options(server.url(), MS(20_000));
    let store = open(&options).await;
    for n in 0..6 {
        put(&store, id(n), None, value(CLAIMED, None, "sound")).await;
    }
    let (session, prefix) = (session(&server.url()).await, &options.prefix);
    // What keeps some of such rows out has to go first.
    session.batch_execute(&format!("ALTER TABLE {prefix}_records ALTER value DROP NOT NULL")).await.unwrap();
    for (n, spoilt) in
        [(0, "tag = 9"), (1, "version = -version"), (2, "expires_at = -1"), (3, "value = NULL"), (4, "tag = -1")]
    {
        let sql = format!("UPDATE {prefix}_records SET {spoilt} WHERE id = $1");
        assert_eq!(session.execute(&sql, &[&&id(n).0[..]]).await.unwrap(), 1);
        let damaged =
            |error: Option<StoreError>| matches!(error, Some(StoreError::Damaged { id: of, .. }) if of == id(n));
        assert!(damaged(store.get(id(n)).await.err()), "{spoilt}");
        assert!(damaged(swap(&store, id(n), None, Some(value(CLAIMED, None, "new"))).await.err()), "{spoilt}");
    }
    let odd = format!("INSERT INTO {prefix}_records (version, written_at, tag, id, value) VALUES (1, 1, 0, 'odd', '')");
    session.batch_execute(&odd).await.unwrap();
    // Others in the same batch are none the worse for it.
    let looks = futures(&store, 0..6).await;
    assert_eq!(looks.iter().filter(|look| look.is_ok()).count(), 1);
    let page = store.list(None, 0, 100).await.unwrap();
    assert_eq!(page.entries.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [id(5)], "passed over");
    assert_eq!(store.status().health, Health::Ok);
}

async fn futures(store: &Postgres, ids: std::ops::Range<u64>) -> Vec<Result<Option<Entry>, StoreError>> {
    let mut looks: Vec<_> = ids.map(|n| Box::pin(store.get(id(n)))).collect();
    let mut results: Vec<_> = looks.iter().map(|_| None).collect();
    // All are begun before the first is waited for.
    std::future::poll_fn(|cx| {
        for (look, result) in looks.iter_mut().zip(&mut results) {
            if result.is_none()
                && let Poll::Ready(done) = look.as_mut().poll(cx)
            {
                *result = Some(done);
            }
        }
        if results.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    results.into_iter().flatten().collect()
}
