//! More than one server: sentinels, replicas, a cluster; and TLS.

use super::*;
use oncegate::store::Page;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use servers::{Sentinel, Value as Reply};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_by_sentinels_is_followed() {
    if !installed() {
        return;
    }
    let mut master = Server::start(&[]);
    let replica = master.replica();
    let sentinel = Sentinel::start(&master);
    // The first of them is not there.
    let url = format!("redis+sentinel://127.0.0.1:{},127.0.0.1:{}/main", servers::free_port(), sentinel.port);
    let strict = error(&Options { strict: true, ..options(&url) }).await;
    assert!(matches!(strict, OpenError::NotStrict { .. }), "{strict}");
    let unknown = error(&options(&url.replace("/main", "/other"))).await;
    assert!(matches!(&unknown, OpenError::Refused { reason, .. } if reason.contains("other")), "{unknown}");

    let store = Redis::open(&Options { wait_replicas: 1, ..options(&url) }).await.unwrap();
    let version = put(&store, 1, None, value(CLAIMED, "claim")).await;
    master.kill();
    until("it is known to be gone", async || store.status().health == Health::Unreachable).await;
    until("the replica has taken over", async || store.status().health == Health::Ok).await;
    assert!(replica.client().ask(&["INFO", "replication"]).text().contains("role:master"));
    let held = store.get(id(1)).await.unwrap().unwrap();
    assert_eq!(
        held,
        Entry { version, value: value(CLAIMED, "claim") },
        "it was on the replica before it was acknowledged"
    );
    // Nobody is left to confirm.
    let unconfirmed = swap(&store, 1, Some(version), Some(value(COMPLETED, "done"))).await;
    assert!(matches!(unconfirmed, Err(StoreError::Unavailable { may_land_until_ms: Some(_), .. })), "{unconfirmed:?}");
    // The old master comes back, and is told to be a replica of the new one.
    master.restart();
    let mut found = None;
    until("a replica confirms again", async || {
        found = swap(&store, 1, Some(version), Some(value(COMPLETED, "done"))).await.ok();
        found.is_some()
    })
    .await;
    assert!(matches!(found, Some(Swap::Done(_))), "its own write, which had landed: {found:?}");
    drop(sentinel);
}

/// Names whatever server it is told to, as a sentinel that has heard of a failover too late, or too early.
fn misinformed_sentinel(named: &Arc<AtomicU16>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, named) = (listener.local_addr().unwrap().port(), Arc::clone(named));
    std::thread::spawn(move || {
        for mut client in listener.incoming().map_while(Result::ok) {
            let (mut question, mut piece) = (Vec::new(), [0; 1024]);
            while !question.ends_with(b"main\r\n") {
                match client.read(&mut piece) {
                    Ok(len) if len > 0 => question.extend_from_slice(&piece[..len]),
                    _ => break,
                }
            }
            let port = named.load(Ordering::SeqCst).to_string();
            let _ = write!(client, "*2\r\n$9\r\n127.0.0.1\r\n${}\r\n{port}\r\n", port.len());
        }
    });
    port
}

#[tokio::test]
async fn whom_a_sentinel_names_is_asked_whether_it_is_the_master() {
    if !installed() {
        return;
    }
    let master = Server::start(&[]);
    let replica = master.replica();
    let named = Arc::new(AtomicU16::new(replica.port));
    let url = format!("redis+sentinel://127.0.0.1:{}/main", misinformed_sentinel(&named));
    let error = error(&options(&url)).await;
    assert!(matches!(&error, OpenError::Unreachable { reason, .. } if reason.contains("replica")), "{error}");
    named.store(master.port, Ordering::SeqCst);
    let store = open_hasty(&url, 1000).await;
    let version = put(&store, 1, None, value(CLAIMED, "claim")).await;
    named.store(replica.port, Ordering::SeqCst);
    master.client().ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    until("it is not the master", async || store.status().health == Health::Unreachable).await;
    assert!(store.get(id(1)).await.is_err(), "what a replica holds may be old");
    named.store(master.port, Ordering::SeqCst);
    until("it is found again", async || store.status().health == Health::Ok).await;
    put(&store, 1, Some(version), value(COMPLETED, "done")).await;
}

#[tokio::test]
async fn replicas_that_do_not_confirm_leave_it_open_whether_the_write_lasts() {
    if !installed() {
        return;
    }
    let master = Server::start(&[]);
    let replica = master.replica();
    let waiting = Options { wait_replicas: 1, timeout: Duration::from_secs(1), ..options(&master.url()) };
    let store = Redis::open(&waiting).await.unwrap();
    let version = put(&store, 1, None, value(CLAIMED, "claim")).await;
    assert_eq!(replica.client().ask(&["EXISTS", &key(1)]), Reply::Int(1), "acknowledged is replicated");
    replica.pause();
    let began = Instant::now();
    let swapped = swap(&store, 2, None, Some(value(CLAIMED, "claim"))).await;
    assert!(matches!(swapped, Err(StoreError::Unavailable { may_land_until_ms: Some(_), .. })), "{swapped:?}");
    assert!(began.elapsed() < Duration::from_millis(1500), "{:?}", began.elapsed());
    // The same write once more finds itself in place, and is not more certain for that.
    let swapped = swap(&store, 2, None, Some(value(CLAIMED, "claim"))).await;
    assert!(matches!(swapped, Err(StoreError::Unavailable { may_land_until_ms: Some(_), .. })), "{swapped:?}");
    // On another connection, too, which has written nothing yet.
    let other = Redis::open(&Options { wait_replicas: 0, ..waiting.clone() }).await.unwrap();
    assert!(other.get(id(2)).await.unwrap().is_some());
    assert_eq!(store.get(id(1)).await.unwrap().unwrap().version, version, "reads go on");
    replica.resume();
    put(&store, 2, None, value(CLAIMED, "claim")).await;
    assert_eq!(replica.client().ask(&["EXISTS", &key(2)]), Reply::Int(1));

    // To wait for disks takes a newer server than this one may be.
    let strict_master = Server::strict();
    let strict = Options { strict: true, wait_replicas: 1, ..options(&strict_master.url()) };
    let version = strict_master.client().ask(&["INFO", "server"]).text();
    let version = version.lines().find_map(|line| line.strip_prefix("redis_version:")).unwrap().to_owned();
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap());
    if (numbers.next().unwrap(), numbers.next().unwrap()) < (7, 2) {
        let error = error(&strict).await;
        assert!(matches!(&error, OpenError::NotStrict { reason, .. } if reason.contains("7.2")), "{error}");
    } else {
        let error = error(&Options { timeout: Duration::from_millis(500), ..strict.clone() }).await;
        assert!(matches!(error, OpenError::Unreachable { .. }), "nobody confirms: {error}");
        let replica = strict_master.replica();
        replica.client().ask(&["CONFIG", "SET", "appendonly", "yes"]);
        put(&Redis::open(&strict).await.unwrap(), 1, None, self::value(CLAIMED, "claim")).await;
    }
}

/// The node that has a bucket's slot.
fn owner(nodes: &[Server], bucket: u8) -> &Server {
    let slot = nodes[0].client().ask(&["CLUSTER", "KEYSLOT", &format!("{{{bucket:02x}}}")]);
    let Reply::Int(slot) = slot else { panic!("{slot:?}") };
    &nodes[usize::from(slot > 5460) + usize::from(slot > 10922)]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_is_one_store() {
    if !installed() {
        return;
    }
    let mut nodes = Server::cluster(&[]);
    let url = format!("redis+cluster://127.0.0.1:{},127.0.0.1:{}", servers::free_port(), nodes[1].port);
    let waiting = error(&Options { wait_replicas: 1, ..options(&url) }).await;
    assert!(matches!(waiting, OpenError::Options { key: "wait_replicas", .. }), "{waiting}");
    let store = Redis::open(&Options { timeout: Duration::from_secs(2), ..options(&url) }).await.unwrap();
    assert!(store.status().created);
    let mut versions = Vec::new();
    for n in 0..=255 {
        let version = put(&store, n, None, value(CLAIMED, "claim")).await;
        let tag = if n % 4 == 0 { UNKNOWN } else { COMPLETED };
        versions.push(put(&store, n, Some(version), value(tag, "done")).await);
    }
    assert!(store.swap_setting("name", None, b"value").await.unwrap());
    assert_eq!(store.setting("name").await.unwrap().as_deref(), Some(&b"value"[..]));
    for node in &nodes {
        assert!(node.client().ask(&["DBSIZE"]).text().parse::<u64>().unwrap() > 20, "each has a part");
    }
    for (tag, count) in [(None, 256), (Some(UNKNOWN), 64), (Some(COMPLETED), 192), (Some(CLAIMED), 0)] {
        for visit in [1, 10, 4000] {
            let (mut seen, mut after, mut pages) = (BTreeSet::new(), 0, 0);
            loop {
                let Page { entries, next } = store.list(tag, after, visit).await.unwrap();
                seen.extend(entries.into_iter().map(|(id, _)| id));
                pages += 1;
                assert!(pages < 3000);
                match next {
                    Some(next) => after = next,
                    None => break,
                }
            }
            assert_eq!(seen.len(), count, "{tag:?}, {visit} at a time");
        }
    }
    let second = Redis::open(&options(&url)).await.unwrap();
    assert_eq!((second.status().entries[2], second.status().created), (64, false));

    // A slot that moves to another node takes its entries with it: asked for while it moves, and moved.
    let bucket = (0..=255).find(|bucket| owner(&nodes, *bucket).port == nodes[0].port).unwrap();
    let slot = nodes[0].client().ask(&["CLUSTER", "KEYSLOT", &format!("{{{bucket:02x}}}")]).text();
    let ids: Vec<String> = nodes.iter().map(|node| node.client().ask(&["CLUSTER", "MYID"]).text()).collect();
    nodes[1].client().ask(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &ids[0]]);
    nodes[0].client().ask(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &ids[1]]);
    let keys = nodes[0].client().ask(&["CLUSTER", "GETKEYSINSLOT", &slot, "100"]);
    let Reply::Array(keys) = keys else { panic!("{keys:?}") };
    for key in keys {
        let port = nodes[1].port.to_string();
        nodes[0].client().ask(&["MIGRATE", "127.0.0.1", &port, &key.text(), "0", "5000"]);
    }
    let held = store.get(id(bucket)).await.unwrap().unwrap();
    assert_eq!(held.version, versions[usize::from(bucket)], "while it moves");
    for node in [1, 0, 2] {
        nodes[node].client().ask(&["CLUSTER", "SETSLOT", &slot, "NODE", &ids[1]]);
    }
    let version = put(&store, bucket, Some(held.version), value(COMPLETED, "moved")).await;
    assert_eq!(store.get(id(bucket)).await.unwrap().unwrap().version, version);
    assert_eq!(nodes[1].client().ask(&["EXISTS", &key(bucket)]), Reply::Int(1));
    let redirected = || {
        let stats = nodes[0].client().ask(&["INFO", "errorstats"]).text();
        stats.lines().find_map(|line| line.strip_prefix("errorstat_MOVED:")).unwrap_or_default().to_owned()
    };
    until("the right one is asked at once", async || {
        let before = redirected();
        store.get(id(bucket)).await.unwrap();
        redirected() == before
    })
    .await;

    // One that dies takes its part along; the others go on, until the cluster itself says no. Not the one with the birthmark: it
    // comes back empty.
    nodes[1].client().ask(&["CONFIG", "SET", "cluster-require-full-coverage", "no"]);
    nodes[2].client().ask(&["CONFIG", "SET", "cluster-require-full-coverage", "no"]);
    let lost = (0..=255).find(|b| *b != bucket && owner(&nodes, *b).port == nodes[0].port).unwrap();
    let kept = (0..=255).find(|bucket| owner(&nodes, *bucket).port == nodes[2].port).unwrap();
    nodes[0].kill();
    until("it is known to be gone", async || store.status().health == Health::Unreachable).await;
    let refused = store.get(id(lost)).await;
    assert!(matches!(refused, Err(StoreError::Unavailable { .. })), "{refused:?}");
    assert!(store.get(id(kept)).await.unwrap().is_some());
    nodes[0].restart();
    until("it is back", async || store.status().health == Health::Ok).await;
    until("it takes part again", async || swap(&store, lost, None, Some(value(CLAIMED, "anew"))).await.is_ok()).await;
}

/// What one of them had not got yet is lost once it takes over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strict_cluster_is_given_up_while_it_has_replicas() {
    if !installed() {
        return;
    }
    let arguments = ["--appendonly", "yes", "--appendfsync", "always"];
    let nodes = Server::cluster(&arguments);
    let url = format!("redis+cluster://127.0.0.1:{}", nodes[1].port);
    let store = Redis::open(&Options { strict: true, ..options(&url) }).await.unwrap();
    let bucket = (0..=255).find(|bucket| owner(&nodes, *bucket).port == nodes[0].port).unwrap();
    put(&store, bucket, None, value(CLAIMED, "claim")).await;

    let mut replica = Server::node(&arguments);
    let mut client = replica.client();
    let id = nodes[0].client().ask(&["CLUSTER", "MYID"]).text();
    client.ask(&["CLUSTER", "MEET", "127.0.0.1", &nodes[0].port.to_string()]);
    until("it follows", async || client.try_ask(&["CLUSTER", "REPLICATE", &id]).unwrap() == Reply::Bytes("OK".into()))
        .await;
    until("it is known", async || {
        let claimed = swap(&store, bucket, None, Some(value(CLAIMED, "another"))).await;
        matches!(&claimed, Err(StoreError::Unavailable { reason, .. }) if reason.contains("replicas"))
    })
    .await;
    assert_eq!(store.status().health, Health::Unreachable);
    let others = (0..=255).step_by(16);
    for n in others {
        let claimed = swap(&store, n, None, Some(value(CLAIMED, "another"))).await;
        assert!(matches!(&claimed, Err(StoreError::Unavailable { .. })), "no node is used: {claimed:?}");
    }

    // Without replicas it may be trusted again.
    let id = client.ask(&["CLUSTER", "MYID"]).text();
    replica.kill();
    until("it is trusted again", async || {
        for node in &nodes {
            // Others may still tell of it.
            let _ = node.client().try_ask(&["CLUSTER", "FORGET", &id]);
        }
        store.status().health == Health::Ok
    })
    .await;
    assert!(store.get(self::id(bucket)).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strict_takes_a_cluster_only_whose_nodes_all_sync_and_have_no_replicas() {
    if !installed() {
        return;
    }
    let nodes = Server::cluster(&[]);
    let strict = Options { strict: true, ..options(&format!("redis+cluster://127.0.0.1:{}", nodes[0].port)) };
    let refused_for = async |name: &str| match Redis::open(&strict).await {
        Err(OpenError::NotStrict { reason, .. }) => reason.contains(name),
        _ => false,
    };
    for node in &nodes {
        assert!(refused_for("appendonly").await, "as long as there is one such");
        node.client().ask(&["CONFIG", "SET", "appendonly", "yes"]);
        node.client().ask(&["CONFIG", "SET", "appendfsync", "always"]);
    }
    put(&Redis::open(&strict).await.unwrap(), 1, None, value(CLAIMED, "claim")).await;
    let replica = Server::node(&[]);
    replica.client().ask(&["CLUSTER", "MEET", "127.0.0.1", &nodes[0].port.to_string()]);
    let master = nodes[0].client().ask(&["CLUSTER", "MYID"]).text();
    until("it knows its master", async || {
        let told = replica.client().try_ask(&["CLUSTER", "REPLICATE", &master]).unwrap();
        !matches!(told, Reply::Error(_))
    })
    .await;
    until("a failover could lose something", async || refused_for("replicas").await).await;
    drop(open(&strict.url).await);
}

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "authority");
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Certificate and key, in PEM.
    fn issue(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, &self.0).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

#[tokio::test]
async fn tls_is_verified_on_both_sides() {
    if !installed() {
        return;
    }
    let (authority, stranger) = (Authority::new(), Authority::new());
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).unwrap();
        dir.path().join(name).to_str().unwrap().to_owned()
    };
    let (certificate, key) = authority.issue("127.0.0.1");
    let port = servers::free_port();
    let _server = Server::start(&[
        "--tls-port",
        &port.to_string(),
        "--tls-cert-file",
        &file("cert", &certificate),
        "--tls-key-file",
        &file("key", &key),
        "--tls-ca-cert-file",
        &file("ca", &authority.0.pem()),
        "--tls-auth-clients",
        "yes",
    ]);
    let (client, client_key) = authority.issue("gateway");
    let with = |ca: &Authority, client: Option<(&str, &str)>, host: &str| Options {
        tls: TlsFiles {
            ca: Some(ca.0.pem().into_bytes()),
            client: client.map(|(certificate, key)| (certificate.into(), key.into())),
        },
        ..options(&format!("rediss://{host}:{port}"))
    };
    let own = Some((client.as_str(), client_key.as_str()));
    let store = Redis::open(&with(&authority, own, "127.0.0.1")).await.unwrap();
    let version = put(&store, 1, None, value(CLAIMED, "claim")).await;
    let large = Value { tag: COMPLETED, expires_at_ms: None, bytes: vec![7; 3 << 20].into() };
    put(&store, 1, Some(version), large.clone()).await;
    assert_eq!(store.get(id(1)).await.unwrap().unwrap().value, large);

    let untrusted = error(&with(&stranger, own, "127.0.0.1")).await;
    assert!(matches!(untrusted, OpenError::Unreachable { .. }), "{untrusted}");
    let nameless = error(&with(&authority, None, "127.0.0.1")).await;
    assert!(matches!(nameless, OpenError::Unreachable { .. }), "{nameless}");
    let misnamed = error(&with(&authority, own, "localhost")).await;
    assert!(matches!(misnamed, OpenError::Unreachable { .. }), "{misnamed}");
    for (key, client, ca) in [
        ("tls.ca", own, "no PEM"),
        ("tls.cert", Some(("nothing", client_key.as_str())), ""),
        ("tls.key", Some((client.as_str(), "s3cret")), ""),
    ] {
        let mut wrong = with(&authority, client, "127.0.0.1");
        if !ca.is_empty() {
            wrong.tls.ca = Some(ca.into());
        }
        let error = error(&wrong).await;
        assert!(matches!(&error, OpenError::Options { key: found, .. } if *found == key), "{error}");
        assert!(!error.to_string().contains("s3cret"));
    }
}
