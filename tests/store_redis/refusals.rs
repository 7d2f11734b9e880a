//! What it does not open.

use super::*;

#[tokio::test]
async fn strict_takes_a_server_only_that_syncs_each_write_before_it_answers() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    let strict = Options { strict: true, ..options(&server.url()) };
    let mut client = server.client();
    let refused_for = async |name: &str| match error(&strict).await {
        OpenError::NotStrict { reason, .. } => assert!(reason.contains(name), "{name}: {reason}"),
        other => panic!("{other}"),
    };
    refused_for("appendonly").await;
    client.ask(&["CONFIG", "SET", "appendonly", "yes"]);
    refused_for("appendfsync").await;
    client.ask(&["CONFIG", "SET", "appendfsync", "always"]);
    client.ask(&["CONFIG", "SET", "no-appendfsync-on-rewrite", "yes"]);
    refused_for("no-appendfsync-on-rewrite").await;
    client.ask(&["CONFIG", "SET", "no-appendfsync-on-rewrite", "no"]);
    let store = Redis::open(&strict).await.unwrap();
    put(&store, 1, None, value(CLAIMED, "claim")).await;
    // Looked at again on each new connection.
    client.ask(&["CONFIG", "SET", "appendfsync", "everysec"]);
    client.ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    until("it is not trusted any more", async || store.status().health == Health::Unreachable).await;
    let refused = swap(&store, 2, None, Some(value(CLAIMED, "x"))).await;
    assert!(matches!(refused, Err(StoreError::Unavailable { may_land_until_ms: None, .. })), "{refused:?}");
    client.ask(&["CONFIG", "SET", "appendfsync", "always"]);
    until("it is trusted again", async || store.status().health == Health::Ok).await;
    // A managed server that does not tell.
    client.ask(&["ACL", "SETUSER", "default", "-config"]);
    refused_for("CONFIG GET").await;
    drop(open(&server.url()).await);
}

#[tokio::test]
async fn a_server_that_evicts_is_refused_in_any_case() {
    if !installed() {
        return;
    }
    for policy in ["allkeys-lru", "volatile-ttl"] {
        let server = Server::start(&["--maxmemory-policy", policy, "--appendonly", "yes", "--appendfsync", "always"]);
        let relaxed = error(&options(&server.url())).await;
        assert!(matches!(&relaxed, OpenError::Refused { reason, .. } if reason.contains(policy)), "{relaxed}");
        let strict = error(&Options { strict: true, ..options(&server.url()) }).await;
        assert!(matches!(&strict, OpenError::NotStrict { reason, .. } if reason.contains(policy)), "{strict}");
    }
    // One that was told to evict meanwhile is noticed when it is connected to again.
    let server = Server::start(&[]);
    let store = open(&server.url()).await;
    let mut client = server.client();
    client.ask(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]);
    client.ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    until("it is not trusted any more", async || store.status().health == Health::Unreachable).await;
    assert!(swap(&store, 1, None, Some(value(CLAIMED, "claim"))).await.is_err());
    client.ask(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]);
    until("it is trusted again", async || store.status().health == Health::Ok).await;
}

#[tokio::test]
async fn credentials_come_from_the_url_or_the_file_and_are_never_shown() {
    if !installed() {
        return;
    }
    let server = Server::start(&["--requirepass", "pass:word@1"]);
    let address = format!("127.0.0.1:{}", server.port);
    let with = |credentials: &str| options(&format!("redis://{credentials}{address}"));
    for wrong in ["", ":s3cret@", "default:s3cret@", "nobody:s3cret@"] {
        let error = error(&with(wrong)).await;
        assert!(matches!(error, OpenError::Refused { .. }), "{error}");
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");
    }
    let from_file = Options { password: Some("pass:word@1".to_owned()), ..with("default:s3cret@") };
    for right in [with(":pass%3Aword%401@"), with("default:pass%3Aword%401@"), from_file] {
        let store = Redis::open(&right).await.unwrap();
        store.get(id(1)).await.unwrap();
    }
    // A user of its own, with no more rights than it needs.
    let mut client = server.client();
    client.ask(&["AUTH", "pass:word@1"]);
    client.ask(&[
        "ACL",
        "SETUSER",
        "gateway",
        "on",
        ">own",
        "resetkeys",
        "~og:*",
        "resetchannels",
        "&og:*",
        "-@all",
        "+get",
        "+set",
        "+del",
        "+getrange",
        "+strlen",
        "+exists",
        "+scan",
        "+zadd",
        "+zrem",
        "+zcard",
        "+zrange",
        "+eval",
        "+evalsha",
        "+publish",
        "+subscribe",
        "+unsubscribe",
        "+ping",
        "+time",
        "+info",
        "+select",
    ]);
    let store = Redis::open(&with("gateway:own@")).await.unwrap();
    let version = put(&store, 1, None, value(CLAIMED, "claim")).await;
    let version = put(&store, 1, Some(version), value(UNKNOWN, "unknown")).await;
    assert_eq!(store.list(Some(UNKNOWN), 0, 10).await.unwrap().entries.len(), 1);
    assert_eq!(store.list(None, 0, 10).await.unwrap().entries.len(), 1);
    store.sweep(now_ms(&store)).await.unwrap();
    assert!(matches!(swap(&store, 1, Some(version), None).await.unwrap(), Swap::Done(_)));
    // Without the right to publish it works as well: whoever waits looks by himself.
    client.ask(&["ACL", "SETUSER", "gateway", "resetchannels"]);
    let version = put(&store, 2, None, value(CLAIMED, "claim")).await;
    put(&store, 2, Some(version), value(COMPLETED, "done")).await;
    assert_eq!(store.get(id(2)).await.unwrap().unwrap().value, value(COMPLETED, "done"));
    // A right that is missing is said, not taken for absence.
    client.ask(&["ACL", "SETUSER", "gateway", "-get"]);
    let refused = store.get(id(2)).await;
    assert!(
        matches!(&refused, Err(StoreError::Unavailable { reason, .. }) if reason.contains("NOPERM")),
        "{refused:?}"
    );
}

#[tokio::test]
async fn what_is_not_redis_or_not_there_is_said_in_time() {
    if !installed() {
        return;
    }
    let nobody = format!("redis://127.0.0.1:{}", servers::free_port());
    let error_of = async |url: &str| {
        let began = Instant::now();
        let error = error(&Options { timeout: Duration::from_secs(1), ..options(url) }).await;
        assert!(began.elapsed() < Duration::from_secs(3));
        error
    };
    assert!(matches!(error_of(&nobody).await, OpenError::Unreachable { .. }));
    // One that answers nothing, and one that speaks otherwise.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("redis://{}", silent.local_addr().unwrap());
    assert!(matches!(error_of(&url).await, OpenError::Unreachable { .. }));
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("redis://{}", other.local_addr().unwrap());
    let answers = std::thread::spawn(move || {
        use std::io::Write;
        let (mut client, _) = other.accept().unwrap();
        client.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        client
    });
    let error = error_of(&url).await;
    assert!(matches!(&error, OpenError::Unreachable { reason, .. } if reason.contains("protocol")), "{error}");
    drop(answers.join().unwrap());
}

/// Servers repeat what they do not understand.
#[tokio::test]
async fn a_password_that_a_server_repeats_is_not_shown() {
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("redis://:s3cret@{}", other.local_addr().unwrap());
    let answers = std::thread::spawn(move || {
        use std::io::Write;
        let (mut client, _) = other.accept().unwrap();
        client.write_all(b"-ERR unknown command 'AUTH', with args beginning with: 's3cret' \r\n").unwrap();
        client
    });
    let error = error(&options(&url)).await;
    assert!(matches!(&error, OpenError::Refused { reason, .. } if reason == "AUTH: ERR"), "{error}");
    drop(answers.join().unwrap());
}

#[tokio::test]
async fn a_store_of_another_format_and_settings_that_make_no_sense_are_refused() {
    if !installed() {
        return;
    }
    let server = Server::start(&[]);
    server.client().ask(&["SET", "og:{00}:format", "2"]);
    let error_format = error(&options(&server.url())).await;
    assert!(matches!(&error_format, OpenError::Refused { reason, .. } if reason.contains("format")), "{error_format}");
    for prefix in ["", "a{b", "a\n"] {
        let error = error(&Options { prefix: prefix.to_owned(), ..options(&server.url()) }).await;
        assert!(matches!(error, OpenError::Options { key: "prefix", .. }), "{error}");
    }
    // Two gateways with different prefixes do not see each other; those with the same share all.
    let other = Options { prefix: "og2".to_owned(), ..options(&server.url()) };
    let (one, two) = (Redis::open(&other).await.unwrap(), Redis::open(&other).await.unwrap());
    assert_eq!((one.status().created, two.status().created), (true, false));
    put(&one, 1, None, value(CLAIMED, "claim")).await;
    assert!(two.get(id(1)).await.unwrap().is_some());
    let page = two.list(None, 0, 10).await.unwrap();
    assert_eq!(page.entries.len(), 1);
    let replica = Server::start(&["--replicaof", "127.0.0.1", &server.port.to_string()]);
    let error = error(&options(&replica.url())).await;
    assert!(matches!(&error, OpenError::Unreachable { reason, .. } if reason.contains("replica")), "{error}");
}
