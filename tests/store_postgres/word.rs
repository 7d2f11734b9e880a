//! Word of claims that were settled, for those who wait at another gateway.

use super::*;
use std::future::poll_fn;
use tokio::sync::mpsc;
use tokio_postgres::AsyncMessage;

/// Everything that is notified.
async fn overhear(url: &str, prefix: &str) -> mpsc::UnboundedReceiver<String> {
    let (client, mut connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    let (heard, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(notification) = message {
                let _ = heard.send(notification.payload().to_owned());
            }
        }
    });
    client.batch_execute(&format!("LISTEN {prefix}_settled")).await.unwrap();
    // Keeps it open.
    tokio::spawn(async move {
        let _client = client;
        std::future::pending::<()>().await;
    });
    receiver
}

async fn is_marked(session: &tokio_postgres::Client, prefix: &str, id: RecordId) -> bool {
    let sql = format!("SELECT 1 FROM {prefix}_records WHERE id = $1 AND awaited");
    session.query_opt(&sql, &[&&id.0[..]]).await.unwrap().is_some()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_settled_claim_wakes_who_waits_elsewhere_and_nobody_else_is_told() {
    let Some(server) = &*SERVER else { return };
    let options = options(server.url(), MS(20_000));
    let (here, there) = (open(&options).await, open(&options).await);
    let mut heard = overhear(&server.url(), &options.prefix).await;
    let session = session(&server.url()).await;
    // Nobody waits: nothing is said.
    let version = put(&here, id(1), None, value(CLAIMED, None, "claim")).await;
    put(&here, id(1), Some(version), value(COMPLETED, Some(1 << 50), "settled")).await;
    for (n, settled) in [(2, Some(value(COMPLETED, Some(1 << 50), "settled"))), (3, None)] {
        let version = put(&here, id(n), None, value(CLAIMED, None, "claim")).await;
        let mut watch = there.watch(id(n));
        until("it is marked", async || is_marked(&session, &options.prefix, id(n)).await).await;
        let version = put(&here, id(n), Some(version), value(CLAIMED, None, "renewed")).await;
        assert!(is_marked(&session, &options.prefix, id(n)).await, "a renewal leaves the mark");
        // Used up, so that the next look by itself is a second away.
        let mut pause = Duration::ZERO;
        while pause < MS(900) {
            let began = Instant::now();
            watch.changed().await;
            pause = began.elapsed();
        }
        let settling = swap(&here, id(n), Some(version), settled);
        let began = Instant::now();
        let (settling, ()) = tokio::join!(settling, watch.changed());
        assert!(matches!(settling, Ok(Swap::Done(_))));
        assert!(began.elapsed() < MS(800), "by word, not by looking: {:?}", began.elapsed());
        loop {
            let payload = tokio::time::timeout(PATIENCE, heard.recv()).await.unwrap().unwrap();
            if !payload.starts_with("echo") {
                assert_eq!(payload, id(n).to_string(), "of what was waited for, and of the settling alone");
                break;
            }
        }
    }
    assert!(heard.try_recv().is_err(), "once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_settled_before_the_mark_wakes_at_once() {
    let Some(server) = &*SERVER else { return };
    let store = open(&options(server.url(), MS(20_000))).await;
    // The first brings the connection about.
    put(&store, id(1), None, value(CLAIMED, None, "claim")).await;
    let first = store.watch(id(1));
    until("the connection is there", async || {
        let mut watch = store.watch(id(2));
        let began = Instant::now();
        watch.changed().await;
        // The first look by itself comes after 100 ms.
        began.elapsed() < MS(90)
    })
    .await;
    drop(first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_that_was_cut_off_listens_again() {
    let Some(server) = &*SERVER else { return };
    let options = options(server.url(), MS(20_000));
    let store = open(&options).await;
    let session = session(&server.url()).await;
    let version = put(&store, id(1), None, value(CLAIMED, None, "claim")).await;
    let _watch = store.watch(id(1));
    let sql = format!("SELECT pid FROM pg_stat_activity WHERE query = 'LISTEN {}_settled'", options.prefix);
    let listener = async || session.query_opt(&sql, &[]).await.unwrap().map(|row| row.get::<_, i32>(0));
    until("it listens", async || listener().await.is_some()).await;
    let first = listener().await;
    session.query("SELECT pg_terminate_backend($1)", &[&first]).await.unwrap();
    until("it listens again", async || listener().await.is_some_and(|pid| Some(pid) != first)).await;
    // One that begins to be waited for now is marked as before.
    put(&store, id(2), None, value(CLAIMED, None, "claim")).await;
    let _other = store.watch(id(2));
    until("it is marked", async || is_marked(&session, &options.prefix, id(2)).await).await;
    put(&store, id(1), Some(version), value(COMPLETED, Some(1 << 50), "settled")).await;
}
