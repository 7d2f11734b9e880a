//! An https upstream: whom the gateway trusts, whom it says it is, and that a failed handshake has executed nothing.

use crate::support::gateway::Refusal;
use crate::support::tls::{Authority, Certified};
use crate::support::tls_front::{TlsFront, server};
use crate::support::{Client, Gateway, Upstream, request};
use rcgen::CertificateParams;
use rustls::version::{TLS12, TLS13};
use rustls::{ALL_VERSIONS, ServerConfig};
use std::io::Write;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Files for `[upstream.tls]`, and settings that name them.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// The setting of a key to a file of the same name with this text.
    fn put(&self, key: &str, text: &str) -> String {
        self.put_as(key, key, text)
    }

    fn put_as(&self, name: &str, key: &str, text: &str) -> String {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        format!("upstream.tls.{key} = {:?}\n", path.display().to_string())
    }

    fn identity(&self, certificate: &Certified) -> String {
        self.put("cert", &certificate.cert) + &self.put("key", &certificate.key)
    }
}

fn plain(certificate: &Certified) -> ServerConfig {
    server(certificate, ALL_VERSIONS, None)
}

#[test]
fn a_trusted_upstream_is_spoken_to_in_http_1_1_and_its_connections_are_used_again() {
    let (upstream, authority, files) = (Upstream::counting(), Authority::new("ours"), Files::new());
    for versions in [&[&TLS13][..], &[&TLS12]] {
        let certificate = authority.certify(&["localhost"]);
        let front = TlsFront::new(server(&certificate, versions, None), upstream.addr);
        // Resolved to more than one address, on some of which nobody listens.
        let url = format!("https://localhost:{}", front.addr.port());
        let gateway = Gateway::start_before(&url, &files.put("ca", &authority.pem()));
        let before = upstream.count();
        for key in ["a", "b"] {
            assert_eq!(gateway.post(key, "{}").status, 201);
            assert!(gateway.post(key, "{}").replayed());
            assert_eq!(gateway.call(request("GET", "/x", &[], "")).status, 201);
        }
        assert_eq!(upstream.count(), before + 4);
        let handshakes = front.handshakes();
        let first = handshakes[0].as_ref().unwrap();
        assert_eq!(first.server_name.as_deref(), Some("localhost"));
        assert_eq!(first.alpn.as_deref(), Some("http/1.1"), "though the upstream would rather speak h2");
        assert!(handshakes.len() < 4, "{handshakes:?}");
    }
}

#[test]
fn a_certificate_that_does_not_convince_stops_the_request_before_a_byte_of_it() {
    let (upstream, authority, stranger, files) =
        (Upstream::counting(), Authority::new("ours"), Authority::new("ours"), Files::new());
    let good = authority.certify(&["127.0.0.1"]);
    let front = TlsFront::new(plain(&good), upstream.addr);
    // Pooled connections would not show the next certificate.
    let settings = format!("upstream.idle_timeout = \"0s\"\n{}", files.put("ca", &authority.pem()));
    let gateway = Gateway::start_before(&format!("https://{}", front.addr), &settings);
    let until = |year| move |params: &mut CertificateParams| params.not_after = rcgen::date_time_ymd(year, 1, 1);
    let from = |year| move |params: &mut CertificateParams| params.not_before = rcgen::date_time_ymd(year, 1, 1);
    for (n, (what, bad)) in [
        ("another authority's", stranger.certify(&["127.0.0.1"])),
        ("another name", authority.certify(&["localhost"])),
        ("another address", authority.certify(&["127.0.0.2"])),
        ("expired", authority.certify_with(&["127.0.0.1"], until(2020))),
        ("not valid yet", authority.certify_with(&["127.0.0.1"], from(3000))),
    ]
    .into_iter()
    .enumerate()
    {
        front.set(plain(&bad));
        let key = format!("k{n}");
        for answer in [gateway.post(&key, "{}"), gateway.call(request("GET", "/x", &[], ""))] {
            answer.expect_problem(502, "upstream_unreachable");
            assert_eq!(answer.header("proxy-status"), Some("oncegate; error=tls_certificate_error"), "{what}");
        }
        assert_eq!(upstream.count(), n, "{what}: the upstream has seen nothing");
        // The key is free.
        front.set(plain(&good));
        let made = gateway.post(&key, "{}");
        assert_eq!((made.status, made.replayed(), upstream.executions(&key)), (201, false, 1), "{what}");
    }
}

#[test]
fn server_name_is_whose_certificate_it_has_to_be() {
    let (upstream, authority, files) = (Upstream::counting(), Authority::new("ours"), Files::new());
    let front = TlsFront::new(plain(&authority.certify(&["api.internal"])), upstream.addr);
    let ca = files.put("ca", &authority.pem());
    let url = format!("https://{}", front.addr);
    let settings = format!("upstream.tls.server_name = \"api.internal\"\n{ca}");
    let gateway = Gateway::start_before(&url, &settings);
    assert_eq!(gateway.post("k", "{}").status, 201);
    assert_eq!(front.handshakes()[0].as_ref().unwrap().server_name.as_deref(), Some("api.internal"));
    assert_eq!(upstream.requests()[0].header("host"), Some("api.example"), "the Host is another matter");

    let gateway = Gateway::start_before(&url, &ca);
    gateway.post("k", "{}").expect_problem(502, "upstream_unreachable");
    assert_eq!(upstream.count(), 1);
}

#[test]
fn an_upstream_that_requires_a_certificate_gets_ours_or_no_request() {
    let (upstream, authority, clients, files) =
        (Upstream::counting(), Authority::new("ours"), Authority::new("ours"), Files::new());
    let shown = authority.certify(&["127.0.0.1"]);
    let ca = files.put("ca", &authority.pem());
    // A TLS 1.3 server that sends no tickets may refuse only after the request has been sent: that is unknown.
    for (version, tickets) in [(&TLS13, 2), (&TLS12, 0)] {
        let mut config = server(&shown, &[version], Some(&clients));
        config.send_tls13_tickets = tickets;
        let front = TlsFront::new(config, upstream.addr);
        let url = format!("https://{}", front.addr);
        let before = upstream.count();
        let strangers = files.identity(&authority.certify(&["somebody"]));
        for settings in [ca.clone(), format!("{ca}{strangers}")] {
            let gateway = Gateway::start_before(&url, &settings);
            for n in 0..5 {
                let answer = gateway.post(&format!("k{n}"), "{}");
                answer.expect_problem(502, "upstream_unreachable");
                assert_eq!(answer.header("proxy-status"), Some("oncegate; error=tls_alert_received"));
            }
            assert_eq!(gateway.metric("oncegate_records{state=\"unknown\"}"), 0.0);
            assert_eq!(gateway.metric("oncegate_settled_total{outcome=\"not_executed\"}"), 5.0);
        }
        assert_eq!(upstream.count(), before, "it has seen nothing");
        let ours = files.identity(&clients.certify(&["gateway"]));
        let gateway = Gateway::start_before(&url, &format!("{ca}{ours}"));
        assert_eq!(gateway.post("k", "{}").status, 201);
        assert_eq!(gateway.call(request("GET", "/x", &[], "")).status, 201);
    }
}

#[test]
fn what_is_not_tls_or_says_nothing_is_no_upstream() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for (n, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            if n == 0 {
                let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
            }
            std::mem::forget(stream); // Stays open.
        }
    });
    let (authority, files) = (Authority::new("ours"), Files::new());
    let settings = format!("upstream.connect_timeout = \"300ms\"\n{}", files.put("ca", &authority.pem()));
    let gateway = Gateway::start_before(&format!("https://{addr}"), &settings);
    for error in ["tls_protocol_error", "connection_timeout"] {
        let began = Instant::now();
        let answer = gateway.post("k", "{}");
        answer.expect_problem(502, "upstream_unreachable");
        assert_eq!(answer.header("proxy-status"), Some(format!("oncegate; error={error}").as_str()));
        assert!(began.elapsed() < Duration::from_secs(5), "TLS is part of connect_timeout");
    }
    assert_eq!(gateway.metric("oncegate_records{state=\"unknown\"}"), 0.0);
}

#[test]
fn without_a_ca_the_platforms_authorities_count() {
    let (upstream, authority, files) = (Upstream::counting(), Authority::new("ours"), Files::new());
    let front = TlsFront::new(plain(&authority.certify(&["127.0.0.1"])), upstream.addr);
    let url = format!("https://{}", front.addr);
    let _ = (files.put("roots", &authority.pem()), files.put("none", ""));
    let start = |roots: &str| {
        let path = files.0.path().join(roots).display().to_string();
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let environment = [("SSL_CERT_FILE", path.as_str()), ("SSL_CERT_DIR", "/nonexistent")];
        Gateway::try_start(dir, &url, "", &[], &environment)
    };
    assert_eq!(start("roots").unwrap().post("k", "{}").status, 201);
    let Err(Refusal { code, stderr }) = start("none") else { panic!("there are no authorities") };
    assert_eq!(code, Some(2));
    assert!(stderr.contains("upstream.tls.ca: the platform has no trusted certificates"), "{stderr}");
}

#[test]
fn broken_files_are_configuration_errors_all_at_once() {
    let (authority, files) = (Authority::new("ours"), Files::new());
    let certificate = authority.certify(&["client"]);
    let another = authority.certify(&["client"]);
    let start = |settings: &str| {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        match Gateway::try_start(dir, "https://127.0.0.1:1", settings, &[], &[]) {
            Ok(_) => panic!("it started with {settings}"),
            Err(refusal) => refusal,
        }
    };
    let (cert, key) = (files.put("cert", &certificate.cert), files.put("key", &certificate.key));
    let ca = files.put("ca", &authority.pem());
    let missing = "upstream.tls.ca = \"/nonexistent/ca.pem\"\n";
    for (settings, expected) in [
        (missing.to_owned(), vec!["upstream.tls.ca: /nonexistent/ca.pem: cannot be read"]),
        (files.put_as("0", "ca", "no PEM"), vec!["upstream.tls.ca: ", "has no certificate in it"]),
        (
            files.put_as("1", "ca", "-----BEGIN CERTIFICATE-----\n%\n-----END CERTIFICATE-----\n"),
            vec!["is no PEM file"],
        ),
        (
            files.put_as("2", "ca", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
            vec!["upstream.tls.ca: "],
        ),
        (
            format!("{missing}{cert}{}", files.put_as("3", "key", "secret words")),
            vec!["upstream.tls.ca: /nonexistent/ca.pem", "upstream.tls.key: ", "has no private key in it"],
        ),
    ] {
        let Refusal { code, stderr } = start(&settings);
        assert_eq!(code, Some(2), "{stderr}");
        for part in expected {
            assert!(stderr.contains(part), "{part:?} is not in {stderr}");
        }
        assert!(!stderr.contains("secret words"), "a key file is never quoted: {stderr}");
    }
    std::fs::write(files.0.path().join("key"), &another.key).unwrap();
    let Refusal { code, stderr } = start(&format!("{ca}{cert}{key}"));
    assert_eq!(code, Some(2));
    assert!(stderr.contains("upstream.tls.key: ") && stderr.contains("does not fit the certificate"), "{stderr}");
}

#[test]
fn a_response_that_is_cut_off_without_a_close_notify_is_not_whole() {
    // The front is killed with its runtime: the connection ends without TLS's own end.
    let (authority, files) = (Authority::new("ours"), Files::new());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let front = TlsFront::new(plain(&authority.certify(&["127.0.0.1"])), listener.local_addr().unwrap());
    let gateway = Gateway::start_before(&format!("https://{}", front.addr), &files.put("ca", &authority.pem()));
    let mut client = Client::connect(gateway.addr);
    client.send(request("GET", "/x", &[], ""));
    let (mut server, _) = crate::upgrade::accept(&listener);
    server.send("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf of it");
    let head = client.read_head();
    assert!(head.to_ascii_lowercase().contains("transfer-encoding: chunked"), "{head}");
    assert_eq!(client.read_exactly(14), b"A\r\nhalf of it\r");
    drop(front);
    let mut rest = Vec::new();
    while let Some(more) = client.read_some() {
        rest.extend(more);
    }
    assert!(!rest.ends_with(b"0\r\n\r\n"), "the client learns that it is not whole: {rest:?}");
}

#[test]
fn a_tunnel_goes_through_tls() {
    let (authority, files) = (Authority::new("ours"), Files::new());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let front = TlsFront::new(plain(&authority.certify(&["127.0.0.1"])), listener.local_addr().unwrap());
    let gateway = Gateway::start_before(&format!("https://{}", front.addr), &files.put("ca", &authority.pem()));
    let (mut client, mut server) = crate::upgrade::open(&listener, &gateway);
    let large = vec![b'x'; 300_000];
    client.send(&large);
    assert_eq!(server.read_exactly(large.len()), large);
    client.half_close();
    assert!(server.at_end(), "half-close goes through, too");
    server.send(&large);
    assert_eq!(client.read_exactly(large.len()), large);
    drop(server);
    assert!(client.at_end());
}

#[test]
fn sighup_reads_the_files_again_and_a_broken_one_changes_nothing() {
    let (upstream, old, new, files) =
        (Upstream::counting(), Authority::new("ours"), Authority::new("ours"), Files::new());
    let front = TlsFront::new(plain(&new.certify(&["127.0.0.1"])), upstream.addr);
    let settings = files.put("ca", &old.pem()) + "upstream.idle_timeout = \"0s\"";
    let gateway = Gateway::start_before(&format!("https://{}", front.addr), &settings);
    gateway.post("k", "{}").expect_problem(502, "upstream_unreachable");
    files.put("ca", &new.pem());
    gateway.hang_up();
    gateway.wait_for_log("upstream.tls were read again");
    assert_eq!(gateway.post("k", "{}").status, 201);
    files.put("ca", "nothing");
    gateway.hang_up();
    gateway.wait_for_log("upstream.tls stay as they were");
    assert_eq!(gateway.post("k2", "{}").status, 201);
}
