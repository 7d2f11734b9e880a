//! Where the keys for tokens come from: rotation, outages, and what is never asked for.

use crate::jwt::{Issuer, claims, expect_refused, send};
use crate::support::jwt::{Signer, set};
use crate::support::tls::Authority;
use crate::support::tls_front::{TlsFront, server};
use crate::support::{Gate, Gateway, Reply, Upstream, eventually};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How a server of keys answers.
type Answer = Arc<dyn Fn(&mut Reply<'_>) + Send + Sync>;

/// A server of keys that answers as it is told.
struct Published {
    server: Upstream,
    answer: Arc<Mutex<Answer>>,
}

impl Published {
    fn new(keys: &str) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").unwrap(), keys)
    }

    fn on(listener: TcpListener, keys: &str) -> Self {
        let answer: Arc<Mutex<Answer>> = Arc::new(Mutex::new(Arc::new(|_: &mut Reply<'_>| {})));
        let shared = Arc::clone(&answer);
        let server = Upstream::on(listener, move |_, reply| {
            let answer = Arc::clone(&shared.lock().unwrap());
            answer(reply);
        });
        let published = Self { server, answer };
        published.set(keys);
        published
    }

    fn set(&self, keys: &str) {
        let keys = keys.to_owned();
        self.answer(move |reply| reply.send(200, &[("Content-Type", "application/jwk-set+json")], &keys));
    }

    fn answer(&self, answer: impl Fn(&mut Reply<'_>) + Send + Sync + 'static) {
        *self.answer.lock().unwrap() = Arc::new(answer);
    }

    fn settings(&self) -> String {
        settings(&format!("{}/tenants/1/jwks.json?v=2", self.server.url()))
    }
}

fn settings(url: &str) -> String {
    format!("idempotency.scope = [\"jwt:sub\", \"path\"]\nauth.jwks_url = \"{url}\"\n")
}

/// How long after a fetch no token causes another.
const PAUSE: Duration = Duration::from_secs(10);

/// A server of keys that nobody has reached yet counts as one that is down.
#[track_caller]
fn expect_unavailable(gateway: &Gateway, token: &str) {
    let answer = send(gateway, "k", token);
    answer.expect_problem(503, "probe_failed");
    assert_eq!((answer.header("retry-after"), answer.header("www-authenticate")), (Some("1"), None));
}

#[test]
fn a_rotated_file_counts_once_a_token_names_a_new_key() {
    let (upstream, issuer, next) = (Upstream::counting(), Issuer::new(Signer::p256()), Signer::p256());
    let gateway = Gateway::start(&upstream, &issuer.settings());
    let old = issuer.token(&claims("alice"));
    assert_eq!(send(&gateway, "k", &old).status, 201);
    issuer.publish(&set(&[next.jwk("k2")]));
    assert!(send(&gateway, "k", &next.token("k2", &claims("alice"))).replayed(), "no restart, no signal");
    expect_refused(&send(&gateway, "k", &old), "not known");
    issuer.publish("{");
    expect_refused(&send(&gateway, "k", &old), "not known");
    gateway.wait_for_log("the keys for tokens cannot be had");
    assert!(send(&gateway, "k", &next.token("k2", &claims("alice"))).replayed(), "a broken file keeps what was");
    assert_eq!(upstream.count(), 1);
}

#[test]
fn sighup_reads_the_file_again_and_a_broken_one_changes_nothing() {
    let (upstream, issuer, next) = (Upstream::counting(), Issuer::new(Signer::p256()), Signer::p256());
    let gateway = Gateway::start(&upstream, &issuer.settings());
    let old = issuer.token(&claims("alice"));
    assert_eq!(send(&gateway, "k", &old).status, 201);
    issuer.publish("{");
    gateway.hang_up();
    gateway.wait_for_log("the keys for tokens cannot be had; those that are there stay");
    assert!(send(&gateway, "k", &old).replayed());
    // The same name for another key: only a signal says that it is one.
    issuer.publish(&set(&[next.jwk("k1")]));
    gateway.hang_up();
    gateway.wait_for_log("the keys for tokens can be had again");
    expect_refused(&send(&gateway, "k", &old), "signature");
    assert!(send(&gateway, "k", &next.token("k1", &claims("alice"))).replayed());
    assert_eq!(upstream.count(), 1);
}

#[test]
fn keys_are_fetched_at_start_and_for_a_new_key_but_once_for_all_who_ask() {
    let (old, new) = (Signer::ed25519(), Signer::rsa());
    let (upstream, published) = (Upstream::counting(), Published::new(&set(&[old.jwk("old")])));
    let gateway = Gateway::start(&upstream, &published.settings());
    assert_eq!(send(&gateway, "k", &old.token("old", &claims("alice"))).status, 201);
    let asked = &published.server.requests()[0];
    assert_eq!((asked.method.as_str(), asked.target.as_str()), ("GET", "/tenants/1/jwks.json?v=2"));
    assert_eq!(asked.header("host"), Some(published.server.addr.to_string().as_str()));
    assert_eq!(asked.headers("authorization").len() + asked.headers("cookie").len(), 0);

    // Just after a fetch there is none, whatever tokens say.
    for n in 0..20 {
        expect_refused(&send(&gateway, "k", &new.token(&format!("x{n}"), &claims("alice"))), "not known");
    }
    assert_eq!(published.server.count(), 1);

    // Many at once, while the fetch is held up: all wait for that one.
    let gate = Gate::default();
    let (held, keys) = (gate.clone(), set(&[new.jwk("new")]));
    published.answer(move |reply| {
        held.wait();
        reply.send(200, &[], &keys);
    });
    eventually("a token causes a fetch again", || {
        // The pause has to pass.
        std::thread::sleep(Duration::from_millis(200));
        let began = Instant::now();
        std::thread::scope(|scope| {
            let token = |n: usize| new.token("new", &claims(&format!("u{n}")));
            let calls = (0..20).map(|n| {
                scope.spawn({
                    let (gateway, token) = (&gateway, token(n));
                    move || send(gateway, "k", &token)
                })
            });
            let calls = calls.collect::<Vec<_>>();
            let asked = eventually("all are refused, or one has asked", || {
                let asked = published.server.count() > 1;
                (asked || calls.iter().all(|call| call.is_finished())).then_some(asked)
            });
            if asked {
                gate.open();
            }
            let statuses = calls.into_iter().map(|call| call.join().unwrap().status).collect::<Vec<_>>();
            // Some of them may have come before the pause was over.
            assert!(statuses.iter().all(|status| [201, 401].contains(status)), "{statuses:?}");
            assert!(began.elapsed() < PAUSE);
            asked.then(|| assert!(statuses.contains(&201), "{statuses:?}"))
        })
    });
    assert_eq!(published.server.count(), 2, "one fetch served them all");
    assert_eq!(send(&gateway, "k2", &new.token("new", &claims("alice"))).status, 201);
    expect_refused(&send(&gateway, "k", &old.token("old", &claims("alice"))), "not known");
}

#[test]
fn sighup_fetches_the_keys_again_at_once() {
    let (old, new) = (Signer::ed25519(), Signer::ed25519());
    let (upstream, published) = (Upstream::counting(), Published::new(&set(&[old.jwk("old")])));
    let gateway = Gateway::start(&upstream, &published.settings());
    assert_eq!(send(&gateway, "k", &old.token("old", &claims("alice"))).status, 201);
    published.set(&set(&[new.jwk("new")]));
    gateway.hang_up();
    published.server.wait_for(2);
    eventually("the new key counts", || {
        send(&gateway, "k", &new.token("new", &claims("alice"))).replayed().then_some(())
    });
    expect_refused(&send(&gateway, "k", &old.token("old", &claims("alice"))), "not known");
}

#[test]
fn keys_stay_while_their_source_is_down_or_talks_nonsense() {
    let signer = Signer::ed25519();
    let (upstream, published) = (Upstream::counting(), Published::new(&set(&[signer.jwk("k1")])));
    let elsewhere = Published::new(&set(&[Signer::ed25519().jwk("k1")]));
    let gateway = Gateway::start(&upstream, &published.settings());
    assert_eq!(send(&gateway, "k", &signer.token("k1", &claims("alice"))).status, 201);
    let location = elsewhere.server.url();
    let large = format!("{{\"keys\":[],\"x\":\"{}\"}}", "x".repeat(1 << 20));
    let nonsense: [(&str, Answer); 7] = [
        ("the answer is 500", Arc::new(|reply| reply.send(500, &[], "oops"))),
        ("the answer is 302", Arc::new(move |reply| reply.send(302, &[("Location", &location)], ""))),
        ("the answer is 204", Arc::new(|reply| reply.send(204, &[], ""))),
        ("length limit exceeded", Arc::new(move |reply| reply.send(200, &[], &large))),
        ("is no JSON", Arc::new(|reply| reply.send(200, &[], "<html>"))),
        ("no public key", Arc::new(|reply| reply.send(200, &[], "{\"keys\":[]}"))),
        ("the connection broke off", Arc::new(|reply| reply.reset())),
    ];
    let count = nonsense.len();
    for (n, (what, answer)) in nonsense.into_iter().enumerate() {
        *published.answer.lock().unwrap() = answer;
        gateway.hang_up();
        published.server.wait_for(2 * n + 2);
        let line = gateway.wait_for_log(what);
        assert!(line.contains("the keys for tokens cannot be had"), "{line}");
        assert!(send(&gateway, "k", &signer.token("k1", &claims("alice"))).replayed(), "{what}");
        // The end of each outage is told, and so the next one is, too.
        published.set(&set(&[signer.jwk("k1")]));
        gateway.hang_up();
        published.server.wait_for(2 * n + 3);
        eventually("the end is told", || (gateway.log().matches("can be had again").count() > n).then_some(()));
    }
    assert_eq!(gateway.log().matches("cannot be had").count(), count);
    assert_eq!(elsewhere.server.count(), 0, "redirects are not followed");
}

#[test]
fn a_source_that_was_never_there_executes_nothing() {
    let signer = Signer::ed25519();
    // Nobody listens yet, and nobody else will.
    let placeholder = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = placeholder.local_addr().unwrap();
    let silent = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    drop(placeholder);
    silent.set_reuse_address(true).unwrap();
    silent.bind(&addr.into()).unwrap();
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, &settings(&format!("http://{addr}/")));
    let token = signer.token("k1", &claims("alice"));
    gateway.wait_for_log("the keys for tokens cannot be had");
    for _ in 0..3 {
        expect_unavailable(&gateway, &token);
        expect_unavailable(&gateway, "not even a token");
    }
    assert_eq!(upstream.count(), 0);
    assert_eq!(gateway.metric("oncegate_records{state=\"claimed\"}"), 0.0);
    // Others are served meanwhile.
    assert_eq!(gateway.call(crate::support::request("GET", "/x", &[], "")).status, 201);
    silent.listen(16).unwrap();
    let published = Published::on(silent.into(), &set(&[signer.jwk("k1")]));
    eventually("it comes up", || (send(&gateway, "k", &token).status == 201).then_some(()));
    assert_eq!(upstream.executions("k"), 1);
    assert_eq!(published.server.count(), 1);
    assert_eq!(gateway.log().matches("cannot be had").count(), 1, "an outage is told once");
}

#[test]
fn a_slow_source_holds_nobody_up_for_long() {
    let signer = Signer::ed25519();
    let (upstream, published) = (Upstream::counting(), Published::new(""));
    let gate = Gate::default();
    let (held, keys) = (gate.clone(), set(&[signer.jwk("k1")]));
    published.answer(move |reply| {
        held.wait();
        reply.send(200, &[], &keys);
    });
    let gateway = Gateway::start(&upstream, &published.settings());
    published.server.wait_for(1);
    let token = signer.token("k1", &claims("alice"));
    let began = Instant::now();
    expect_unavailable(&gateway, &token);
    let waited = began.elapsed();
    assert!(waited > Duration::from_secs(1) && waited < Duration::from_secs(9), "{waited:?}");
    gateway.wait_for_log("no answer within 5000 ms");
    assert_eq!(upstream.count(), 0);
    gate.open();
    eventually("the next fetch is answered", || (send(&gateway, "k", &token).status == 201).then_some(()));
    // A request that comes while the first fetch is under way waits for it.
    let gate = Gate::default();
    let (held, keys) = (gate.clone(), set(&[signer.jwk("k1")]));
    published.answer(move |reply| {
        held.wait();
        reply.send(200, &[], &keys);
    });
    let before = published.server.count();
    let gateway = Gateway::start(&upstream, &published.settings());
    published.server.wait_for(before + 1);
    let mut client = crate::support::Client::connect(gateway.addr);
    let bearer = format!("Bearer {token}");
    let headers = [("Authorization", bearer.as_str()), ("Idempotency-Key", "other")];
    client.send(crate::support::request("POST", "/posts", &headers, "{}"));
    gate.open();
    assert_eq!(client.read().status, 201);
}

#[test]
fn a_source_with_tls_has_to_show_a_certificate_that_the_platform_trusts() {
    let (signer, authority, dir) = (Signer::ed25519(), Authority::new("ours"), tempfile::tempdir().unwrap());
    let (upstream, published) = (Upstream::counting(), Published::new(&set(&[signer.jwk("k1")])));
    let front = |names: &[&str]| {
        TlsFront::new(server(&authority.certify(names), rustls::ALL_VERSIONS, None), published.server.addr)
    };
    let roots = dir.path().join("roots.pem");
    std::fs::write(&roots, authority.pem()).unwrap();
    let start = |front: &TlsFront| {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let settings = settings(&format!("https://localhost:{}/jwks.json", front.addr.port()));
        let environment = [("SSL_CERT_FILE", roots.to_str().unwrap()), ("SSL_CERT_DIR", "/nonexistent")];
        Gateway::try_start(dir, &upstream.url(), &settings, &[], &environment).unwrap()
    };
    let good = front(&["localhost"]);
    let gateway = start(&good);
    assert_eq!(send(&gateway, "k", &signer.token("k1", &claims("alice"))).status, 201);
    assert_eq!(good.handshakes()[0].as_ref().unwrap().server_name.as_deref(), Some("localhost"));
    let before = published.server.count();
    let bad = front(&["other.example"]);
    let gateway = start(&bad);
    bad.wait_for(1);
    let line = gateway.wait_for_log("the keys for tokens cannot be had");
    assert!(line.contains("cannot connect: invalid peer certificate"), "{line}");
    expect_unavailable(&gateway, &signer.token("k1", &claims("alice")));
    assert_eq!(published.server.count(), before, "it was asked nothing");
}
