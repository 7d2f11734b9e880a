//! Servers that are not the store any more: emptied, or another one in their place.

use super::*;
use servers::{Client, Value as Reply};

const FORMAT: &str = "og:{00}:format";
const BIRTHMARK: &str = "og:{00}:birthmark";

fn keys(client: &mut Client) -> Reply {
    client.ask(&["DBSIZE"])
}

/// The store's answer to a claim: another store, and surely nothing written.
#[track_caller]
fn disowned(claimed: &Result<Swap, StoreError>) {
    let Err(StoreError::Unavailable { reason, may_land_until_ms: None }) = claimed else { panic!("{claimed:?}") };
    assert!(reason.contains("not the store that the gateway started with"), "{reason}");
}

async fn claim(store: &Redis, n: u8) -> Result<Swap, StoreError> {
    swap(store, n, None, Some(value(CLAIMED, "claim"))).await
}

#[tokio::test]
async fn a_store_that_is_emptied_takes_no_claim_until_it_is_back() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open(&server.url()).await;
    put(&store, 1, None, value(CLAIMED, "claim")).await;
    let mut client = server.client();
    let birthmark = client.ask(&["GET", BIRTHMARK]).text();
    client.ask(&["FLUSHALL"]);
    // On the connection that stands.
    disowned(&claim(&store, 2).await);
    assert_eq!(store.status().health, Health::Unreachable);
    for n in 3..10 {
        disowned(&claim(&store, n).await);
    }
    assert_eq!(keys(&mut client), Reply::Int(0), "nothing was written");
    // Whoever starts now begins a new store, and is alone with it.
    let new = open(&server.url()).await;
    assert!(new.status().created);
    put(&new, 1, None, value(CLAIMED, "anew")).await;
    client.ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    until("the new one is back", async || new.get(id(1)).await.is_ok_and(|found| found.is_some())).await;
    disowned(&claim(&store, 2).await);
    new.close();
    // A backup is brought back.
    client.ask(&["FLUSHALL"]);
    client.ask(&["MSET", FORMAT, "1", BIRTHMARK, &birthmark]);
    until("it is the store again", async || store.status().health == Health::Ok).await;
    put(&store, 2, None, value(CLAIMED, "claim")).await;
}

#[tokio::test]
async fn a_store_that_is_emptied_is_missed_without_traffic() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let store = open(&server.url()).await;
    let mut client = server.client();
    client.ask(&["FLUSHALL"]);
    until("it is missed", async || store.status().health == Health::Unreachable).await;
    assert!(store.get(id(1)).await.is_err());
    assert_eq!(keys(&mut client), Reply::Int(0));
}

#[tokio::test]
async fn a_server_that_comes_back_empty_is_another_store() {
    if !installed() {
        return;
    }
    // Nothing of it is on disk.
    let mut server = Server::start(&[]);
    let store = open(&server.url()).await;
    put(&store, 1, None, value(CLAIMED, "claim")).await;
    let birthmark = server.client().ask(&["GET", BIRTHMARK]).text();
    server.kill();
    until("it is known to be gone", async || store.status().health == Health::Unreachable).await;
    server.restart();
    let mut claimed = claim(&store, 1).await;
    until("it is known to be another", async || {
        claimed = claim(&store, 1).await;
        matches!(&claimed, Err(StoreError::Unavailable { reason, .. }) if reason.contains("not the store"))
    })
    .await;
    disowned(&claimed);
    let mut client = server.client();
    assert_eq!(keys(&mut client), Reply::Int(0), "nothing was written");
    client.ask(&["MSET", FORMAT, "1", BIRTHMARK, &birthmark]);
    until("it is the store again", async || store.status().health == Health::Ok).await;
    put(&store, 1, None, value(CLAIMED, "claim")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_is_emptied_is_refused_by_all_its_nodes() {
    if !installed() {
        return;
    }
    let nodes = Server::cluster(&[]);
    let store = open(&format!("redis+cluster://127.0.0.1:{}", nodes[0].port)).await;
    for n in (0..=255).step_by(5) {
        put(&store, n, None, value(CLAIMED, "claim")).await;
    }
    let mut found = nodes.iter().map(|node| node.client().try_ask(&["GET", BIRTHMARK]).unwrap());
    let at = found.position(|found| matches!(found, Reply::Bytes(_))).unwrap();
    let birthmark = nodes[at].client().ask(&["GET", BIRTHMARK]).text();
    nodes.iter().for_each(|node| drop(node.client().ask(&["FLUSHALL"])));
    until("it is missed", async || store.status().health == Health::Unreachable).await;
    for n in (0..=255).step_by(5) {
        disowned(&claim(&store, n).await);
    }
    // The one node with the birthmark is enough for all to be trusted again.
    assert!(nodes.iter().all(|node| keys(&mut node.client()) == Reply::Int(0)), "nothing was written");
    nodes[at].client().ask(&["SET", BIRTHMARK, &birthmark]);
    until("it is the store again", async || store.status().health == Health::Ok).await;
    for n in (0..=255).step_by(5) {
        put(&store, n, None, value(CLAIMED, "claim")).await;
    }
}
