//! TLS towards clients: certificates, ALPN, client certificates, reloading.

use crate::support::tls::{Authority, Certified, Files, TlsClient, der};
use crate::support::{Client, Gate, Gateway, H2, Upstream, eventually, h2_post, h2_request, post, request};
use rustls::version::{TLS12, TLS13};
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A gateway with a certificate for `localhost`, and who signed it.
fn secured(upstream: &Upstream, settings: &str) -> (Gateway, Authority, Files) {
    let authority = Authority::new("servers");
    let files = Files::new(&authority.certify(&["localhost"]), None);
    let gateway = Gateway::start(upstream, &format!("{}{settings}", files.settings()));
    (gateway, authority, files)
}

/// The same, which requires certificates signed by the same authority of its clients, and scopes by them.
fn mutual(upstream: &Upstream, settings: &str) -> (Gateway, Authority, Files) {
    let authority = Authority::new("all");
    let files = Files::new(&authority.certify(&["localhost"]), Some(&authority));
    let scope = "idempotency.scope = [\"client-cert\", \"path\"]\n";
    let gateway = Gateway::start(upstream, &format!("{}{scope}{settings}", files.settings()));
    (gateway, authority, files)
}

/// A keyed POST without further credentials.
fn anonymous_post(key: &str) -> String {
    request("POST", "/posts", &[("Idempotency-Key", key)], "{}")
}

#[test]
fn both_protocols_are_served_as_alpn_says() {
    let upstream = Upstream::counting();
    let (gateway, authority, _files) = secured(&upstream, "");
    let mut client = H2::connect_tls(gateway.addr, authority.client(None, &["h2", "http/1.1"])).unwrap();
    assert_eq!(client.call(h2_post("/posts", "k"), "{}").text(), r#"{"n":1}"#);
    for alpn in [&["http/1.1"][..], &["http/1.1", "h2"], &[]] {
        let offered = authority.client(None, alpn);
        if alpn.contains(&"h2") {
            assert!(H2::connect_tls(gateway.addr, offered).is_ok(), "the gateway's preference counts");
            continue;
        }
        let mut client = TlsClient::connect(gateway.addr, offered).unwrap();
        assert!(client.call(&post("/posts", "k", "{}")).unwrap().replayed());
        assert_eq!(client.call(&request("GET", "/x", &[], "")).unwrap().status, 201, "it is kept open");
    }
    assert!(TlsClient::connect(gateway.addr, authority.client(None, &["spdy/3"])).is_err());
    assert_eq!(upstream.executions("k"), 1);
}

#[test]
fn tls_1_2_and_1_3_are_spoken() {
    let upstream = Upstream::counting();
    let (gateway, authority, _files) = secured(&upstream, "");
    for version in [&TLS12, &TLS13] {
        let trusted = authority.client(None, &[]);
        let provider = Arc::clone(trusted.crypto_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(rustls::pki_types::CertificateDer::from(der(&authority.pem()))).unwrap();
        let builder = rustls::ClientConfig::builder_with_provider(provider).with_protocol_versions(&[version]).unwrap();
        let config = builder.with_root_certificates(roots).with_no_client_auth();
        let mut client = TlsClient::connect(gateway.addr, config).unwrap();
        assert_eq!(client.stream.conn.protocol_version(), Some(version.version));
        assert_eq!(client.call(&request("GET", "/x", &[], "")).unwrap().status, 201);
    }
}

#[test]
fn the_upstream_is_told_https() {
    let upstream = Upstream::counting();
    let (gateway, authority, _files) = secured(&upstream, "");
    H2::connect_tls(gateway.addr, authority.client(None, &["h2"])).unwrap().call(h2_request("GET", "/x", &[]), "");
    let mut client = TlsClient::connect(gateway.addr, authority.client(None, &[])).unwrap();
    client.call(&request("GET", "/x", &[("X-Forwarded-Proto", "http")], "")).unwrap();
    for (seen, via) in upstream.requests().iter().zip(["2 oncegate", "1.1 oncegate"]) {
        assert_eq!((seen.headers("x-forwarded-proto"), seen.headers("via")), (vec!["https"], vec![via]));
    }
}

#[test]
fn a_client_certificate_is_required_where_there_is_a_client_ca() {
    let upstream = Upstream::counting();
    let (gateway, authority, _files) = mutual(&upstream, "");
    let stranger = Authority::new("stranger").certify(&["alice"]);
    for shows in [None, Some(&stranger)] {
        let connected = TlsClient::connect(gateway.addr, authority.client(shows, &[]));
        let answer = connected.and_then(|mut client| client.call(&anonymous_post("k")));
        assert!(answer.is_err(), "{answer:?}");
    }
    assert_eq!(upstream.count(), 0);
    let alice = authority.certify(&["alice"]);
    let mut client = TlsClient::connect(gateway.addr, authority.client(Some(&alice), &[])).unwrap();
    assert_eq!(client.call(&anonymous_post("k")).unwrap().status, 201);
}

#[test]
fn a_key_belongs_to_whom_the_client_certificate_names() {
    let upstream = Upstream::counting();
    let (gateway, authority, _files) = mutual(&upstream, "");
    let call = |shows: &Certified| {
        let mut client = TlsClient::connect(gateway.addr, authority.client(Some(shows), &[])).unwrap();
        let answer = client.call(&anonymous_post("k")).unwrap();
        (answer.text(), answer.replayed())
    };
    let (alice, bob) = (authority.certify(&["alice"]), authority.certify(&["bob"]));
    assert_eq!(call(&alice), (r#"{"n":1}"#.to_owned(), false));
    assert_eq!(call(&bob), (r#"{"n":2}"#.to_owned(), false), "another holder, another key");
    assert_eq!(call(&alice), (r#"{"n":1}"#.to_owned(), true), "on another connection");
    assert_eq!(call(&authority.certify(&["alice"])), (r#"{"n":1}"#.to_owned(), true), "with a renewed certificate");
    assert_eq!(call(&authority.certify(&["alice", "bob"])).0, r#"{"n":3}"#);
    let nameless = authority.certify(&[]);
    assert_eq!(call(&nameless), (r#"{"n":4}"#.to_owned(), false));
    assert_eq!(call(&nameless), (r#"{"n":4}"#.to_owned(), true), "the key is what it is known by");
    assert_eq!(call(&authority.certify(&[])).0, r#"{"n":5}"#);
    let mut client = H2::connect_tls(gateway.addr, authority.client(Some(&alice), &["h2"])).unwrap();
    // Another credential beside it does not count, and does no harm.
    let headers = [("idempotency-key", "k"), ("authorization", "Bearer x")];
    let over_http2 = client.call(h2_request("POST", "/posts", &headers), "{}");
    assert_eq!((over_http2.text().as_str(), over_http2.replayed()), (r#"{"n":1}"#, true), "whatever the protocol");
}

#[test]
fn waiters_share_what_was_not_executed_only_with_the_same_certificate() {
    let gate = Gate::default();
    let passed = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        if request.number == 1 {
            passed.wait();
            return reply.send(429, &[], "slow down");
        }
        reply.send(201, &[], "made");
    });
    let authority = Authority::new("all");
    let files = Files::new(&authority.certify(&["localhost"]), Some(&authority));
    let scope = "idempotency.scope = [\"path\"]\nidempotency.replay_auth = \"none\"\n";
    let gateway = Gateway::start(&upstream, &format!("{}{scope}", files.settings()));
    let (alice, bob) = (authority.certify(&["alice"]), authority.certify(&["bob"]));
    std::thread::scope(|threads| {
        let (gateway, authority) = (&gateway, &authority);
        let call = move |shows: Certified| {
            let mut client = TlsClient::connect(gateway.addr, authority.client(Some(&shows), &[])).unwrap();
            client.call(&anonymous_post("k")).unwrap().status
        };
        let first = threads.spawn(move || call(alice));
        upstream.wait_for(1);
        let other = threads.spawn(move || call(bob));
        eventually("the other waits", || (gateway.metric("oncegate_waiters") == 1.0).then_some(()));
        gate.open();
        assert_eq!((first.join().unwrap(), other.join().unwrap()), (429, 201));
    });
}

#[test]
fn sighup_reloads_the_certificate_and_open_connections_stay() {
    let upstream = Upstream::counting();
    let (gateway, authority, files) = secured(&upstream, "");
    let mut open = TlsClient::connect(gateway.addr, authority.client(None, &[])).unwrap();
    let mut open_http2 = H2::connect_tls(gateway.addr, authority.client(None, &["h2"])).unwrap();
    let renewed = authority.certify(&["localhost"]);
    assert_ne!(open.shown(), der(&renewed.cert));
    files.write("cert.pem", &renewed.cert);
    files.write("key.pem", &renewed.key);
    gateway.hang_up();
    gateway.wait_for_log("were read again");
    let mut new = TlsClient::connect(gateway.addr, authority.client(None, &[])).unwrap();
    assert_eq!(new.shown(), der(&renewed.cert));
    for client in [&mut open, &mut new] {
        assert_eq!(client.call(&request("GET", "/x", &[], "")).unwrap().status, 201);
    }
    assert_eq!(open_http2.call(h2_request("GET", "/x", &[]), "").status, 201);
}

#[test]
fn sighup_reloads_the_client_ca() {
    let upstream = Upstream::counting();
    let (gateway, authority, files) = mutual(&upstream, "");
    let other = Authority::new("other");
    let (old, new) = (authority.certify(&["alice"]), other.certify(&["alice"]));
    // Each keeps its sessions, and would resume them.
    let (old, new) = (authority.client(Some(&old), &[]), authority.client(Some(&new), &[]));
    let call = |config: &rustls::ClientConfig| {
        let mut client = TlsClient::connect(gateway.addr, config.clone())?;
        client.call(&anonymous_post("k")).map(|answer| answer.status)
    };
    assert!(call(&old).is_ok() && call(&new).is_err());
    files.write("ca.pem", &other.pem());
    gateway.hang_up();
    gateway.wait_for_log("were read again");
    assert!(call(&old).is_err() && call(&new).is_ok());
}

#[test]
fn files_that_are_broken_keep_the_old_ones_and_the_log_says_which_and_why() {
    let upstream = Upstream::counting();
    let (gateway, authority, files) = mutual(&upstream, "");
    let alice = authority.certify(&["alice"]);
    let shown = || {
        let mut client = TlsClient::connect(gateway.addr, authority.client(Some(&alice), &[])).unwrap();
        assert_eq!(client.call(&request("GET", "/x", &[], "")).unwrap().status, 201);
        client.shown()
    };
    let before = shown();
    let other = authority.certify(&["localhost"]);
    let good = |name: &str| std::fs::read_to_string(files.path(name)).unwrap();
    let (cert, key, ca) = (good("cert.pem"), good("key.pem"), good("ca.pem"));
    let broken = [
        ("cert.pem", "", "holds no certificate"),
        ("cert.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "invalid"),
        ("cert.pem", other.cert.as_str(), "does not belong to the certificate"),
        ("key.pem", "nothing", "holds no unencrypted private key"),
        ("key.pem", other.key.as_str(), "does not belong to the certificate"),
        ("ca.pem", "", "holds no certificate"),
    ];
    for (n, (name, text, reason)) in broken.into_iter().enumerate() {
        files.write(name, text);
        gateway.hang_up();
        let refused =
            |log: String| log.lines().filter(|line| line.contains("stay as they were")).nth(n).map(str::to_owned);
        let line = eventually("it is refused", || refused(gateway.log()));
        let culprit = if reason.contains("belong") { "key.pem" } else { name };
        assert!(line.contains("ERROR") && line.contains(&format!("{culprit}: ")) && line.contains(reason), "{line}");
        assert_eq!(shown(), before, "{name}: {reason}");
        for (name, text) in [("cert.pem", &cert), ("key.pem", &key), ("ca.pem", &ca)] {
            files.write(name, text);
        }
    }
    std::fs::remove_file(files.path("key.pem")).unwrap();
    gateway.hang_up();
    gateway.wait_for_log("cannot be read");
    assert_eq!(shown(), before);
    files.write("key.pem", &key);
    gateway.hang_up();
    gateway.wait_for_log("were read again");
}

#[test]
fn sighup_without_tls_ends_nothing() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    gateway.hang_up();
    gateway.wait_for_log("no [server.tls]");
    assert_eq!(gateway.post("k", "{}").status, 201);
}

#[test]
fn files_that_are_wrong_are_errors_of_the_configuration() {
    let authority = Authority::new("servers");
    let files = Files::new(&authority.certify(&["localhost"]), Some(&authority));
    files.write("other.pem", &authority.certify(&["localhost"]).key);
    files.write("empty.pem", "");
    let path = |name: &str| format!("{:?}", files.path(name).display().to_string());
    let (cert, key, other, empty, none) =
        (path("cert.pem"), path("key.pem"), path("other.pem"), path("empty.pem"), path("none.pem"));
    let upstream = Upstream::counting();
    for (settings, error) in [
        (format!("server.tls.cert = {none}\nserver.tls.key = {key}"), "server.tls.cert: "),
        (format!("server.tls.cert = {empty}\nserver.tls.key = {key}"), "server.tls.cert: "),
        (format!("server.tls.cert = {cert}\nserver.tls.key = {none}"), "server.tls.key: "),
        (format!("server.tls.cert = {cert}\nserver.tls.key = {other}"), "server.tls.key: "),
        (format!("server.tls.cert = {cert}"), "server.tls.key: is missing"),
        (
            format!("server.tls.cert = {cert}\nserver.tls.key = {key}\nserver.tls.client_ca = {empty}"),
            "server.tls.client_ca: ",
        ),
        (
            format!("server.tls.cert = {cert}\nserver.tls.key = {key}\nidempotency.scope = [\"client-cert\"]"),
            "needs server.tls.client_ca",
        ),
    ] {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let refusal = Gateway::try_start(dir, &upstream.url(), &settings, &[], &[]).err().unwrap();
        assert_eq!(refusal.code, Some(2), "{settings}: {refusal:?}");
        assert!(refusal.stderr.contains(error) && refusal.stderr.lines().count() == 1, "{settings}: {refusal:?}");
    }
}

#[test]
fn a_handshake_must_be_over_within_header_timeout() {
    let upstream = Upstream::counting();
    let (gateway, authority, _files) = secured(&upstream, "server.limits.header_timeout = \"200ms\"");
    let hello = {
        let config = Arc::new(authority.client(None, &[]));
        let mut session = rustls::ClientConnection::new(config, "localhost".try_into().unwrap()).unwrap();
        let mut bytes = Vec::new();
        session.write_tls(&mut bytes).unwrap();
        bytes
    };
    for sent in [&[][..], &hello[..1], &hello[..hello.len() - 1], &hello] {
        let started = Instant::now();
        let mut client = Client::connect(gateway.addr);
        client.send(sent);
        while client.read_some().is_some() {}
        assert!(started.elapsed() >= Duration::from_millis(150), "{} bytes", sent.len());
    }
    let mut client = TlsClient::connect(gateway.addr, authority.client(None, &[])).unwrap();
    assert_eq!(client.call(&request("GET", "/x", &[], "")).unwrap().status, 201);
}

#[test]
fn limits_hold_within_tls() {
    let upstream = Upstream::counting();
    let limits = "server.limits.idle_timeout = \"200ms\"\nserver.limits.header_timeout = \"1s\"";
    let (gateway, authority, _files) = secured(&upstream, limits);
    let ended = |alpn: &[&str], sent: &str| {
        let mut client = TlsClient::connect(gateway.addr, authority.client(None, alpn)).unwrap();
        client.stream.write_all(sent.as_bytes()).unwrap();
        let mut rest = Vec::new();
        let _ = std::io::Read::read_to_end(&mut client.stream, &mut rest);
    };
    ended(&[], "");
    ended(&["h2"], "");
    ended(&[], "GET / HTTP/1.1\r\n");
    ended(&["h2"], "PRI * HTTP/2.0\r\n");
    assert_eq!(upstream.count(), 0);
    let _ = H2::connect_tls(gateway.addr, authority.client(None, &["h2"])).unwrap().wait_for_end();
}

#[test]
fn a_unix_socket_stays_plain() {
    let upstream = Upstream::counting();
    let authority = Authority::new("servers");
    let files = Files::new(&authority.certify(&["localhost"]), None);
    let socket = files.path("socket");
    let listen = format!("[\"127.0.0.1:0\", \"unix:{}\"]", socket.display());
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let environment = [("ONCEGATE_SERVER__LISTEN", listen.as_str())];
    let gateway = Gateway::try_start(dir, &upstream.url(), &files.settings(), &[], &environment).unwrap();
    let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    stream.write_all(request("GET", "/x", &[("Connection", "close")], "").as_bytes()).unwrap();
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut stream, &mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    assert_eq!(upstream.requests()[0].header("x-forwarded-proto"), Some("http"));
    let mut client = TlsClient::connect(gateway.addr, authority.client(None, &[])).unwrap();
    assert_eq!(client.call(&request("GET", "/x", &[], "")).unwrap().status, 201);
}

#[test]
fn what_is_not_tls_is_not_answered_as_http() {
    let upstream = Upstream::counting();
    let (gateway, authority, _files) = secured(&upstream, "");
    let mut client = Client::connect(gateway.addr);
    client.send(request("GET", "/x", &[], ""));
    let mut answer = Vec::new();
    while let Some(more) = client.read_some() {
        answer.extend(more);
    }
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    let mut client = TlsClient::connect(gateway.addr, authority.client(None, &[])).unwrap();
    client.stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut client.stream, &mut rest);
    assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 400"), "HTTP/2 over TLS takes ALPN: {rest:?}");
    assert_eq!(upstream.count(), 0);
}

#[test]
fn beyond_max_connections_tls_connections_are_closed() {
    let upstream = Upstream::counting();
    let (gateway, authority, _files) = secured(&upstream, "server.limits.max_connections = 1");
    let mut open = TlsClient::connect(gateway.addr, authority.client(None, &[])).unwrap();
    assert_eq!(open.call(&request("GET", "/x", &[], "")).unwrap().status, 201);
    assert!(TlsClient::connect(gateway.addr, authority.client(None, &[])).is_err());
    assert_eq!(gateway.metric("oncegate_connections_refused_total"), 1.0);
    assert_eq!(open.call(&request("GET", "/x", &[], "")).unwrap().status, 201);
}

#[test]
fn a_drain_over_tls_finishes_what_is_in_flight() {
    let gate = Gate::default();
    let passed = gate.clone();
    let upstream = Upstream::scripted(move |_, reply| {
        passed.wait();
        reply.send(201, &[], "made");
    });
    let (mut gateway, authority, _files) = secured(&upstream, "");
    let mut client = H2::connect_tls(gateway.addr, authority.client(None, &["h2"])).unwrap();
    let sent = client.send(h2_post("/posts", "k"), "{}");
    upstream.wait_for(1);
    gateway.terminate();
    eventually("it listens no more", || Client::try_connect(gateway.addr).err());
    gate.open();
    assert_eq!(client.receive(sent).text(), "made");
    // In order or not: the gateway does not wait for the client's farewell.
    let _ = client.wait_for_end();
    assert_eq!(gateway.wait(), Some(0));
}
