//! Which keys count, and for how long.

use super::*;
use crate::gateway::jwt::keys::Times;
use crate::gateway::upstream::{Endpoint, HostPolicy, Options as UpstreamOptions};
use http::HeaderValue;
use http::uri::PathAndQuery;
use std::sync::Mutex;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::Instant;

#[tokio::test]
async fn what_a_key_says_about_itself_limits_it() {
    let signer = Signer::rsa();
    let key = |field: &str, value: Value| {
        let mut jwk = signer.jwk("a");
        jwk[field] = value;
        jwk
    };
    for (field, value) in
        [("alg", json!("RS256")), ("use", json!("sig")), ("key_ops", json!(["sign", "verify"])), ("alg", Value::Null)]
    {
        let world = World::new(options(), &[key(field, value.clone())]);
        assert!(world.verify(signer.token("a", &claims())).await.is_ok(), "{field} {value}");
    }
    let world = World::new(options(), &[key("alg", json!("PS256"))]);
    assert_eq!(world.refusal(signer.token("a", &claims())).await, Refusal::OtherAlgorithm);
    let other = Signer::p256();
    for (field, value) in [
        ("alg", json!("RSA-OAEP")),
        ("alg", json!("ES256")),
        ("alg", json!("none")),
        ("alg", json!("HS256")),
        ("alg", json!(1)),
        ("use", json!("enc")),
        ("key_ops", json!(["encrypt"])),
        ("key_ops", json!([])),
        ("kty", json!("EC")),
        ("kty", json!("rsa")),
        ("kid", json!(1)),
        ("n", json!("")),
        ("n", Value::Null),
        ("n", json!("a+b/")),
        ("n", json!(encode([0xff; 128]))),
        ("n", json!(encode([0xff; 1025]))),
        ("n", json!(encode([0xfe; 256]))),
        ("e", Value::Null),
        ("e", json!(encode([1]))),
        ("e", json!(encode([0]))),
        ("e", json!(encode([4]))),
    ] {
        let world = World::new(options(), &[key(field, value.clone()), other.jwk("b")]);
        let set = world.auth.keys.current().unwrap();
        assert_eq!((set.len(), set.unusable.len()), (1, 1), "{field} {value}");
        assert!(matches!(world.auth.keys.current().unwrap().find("RS256", Some("a")), Found::UnknownKey));
    }
}

#[test]
fn points_that_are_not_on_their_curve_are_no_keys() {
    for (signer, len) in [(Signer::p256(), 32), (Signer::p384(), 48)] {
        for (field, value) in [
            ("x", encode(vec![1; len])),
            ("x", encode(vec![1; len - 1])),
            ("y", encode(vec![1; len + 1])),
            ("y", String::new()),
            ("crv", "P-521".to_owned()),
            ("crv", "Ed25519".to_owned()),
        ] {
            let mut jwk = signer.jwk("a");
            jwk[field] = json!(value);
            assert!(KeySet::parse(set(&[jwk]).as_bytes()).is_err(), "{field} {value}");
        }
    }
    let mut jwk = Signer::ed25519().jwk("a");
    jwk["x"] = json!(encode([1; 31]));
    assert!(KeySet::parse(set(&[jwk]).as_bytes()).is_err());
}

#[test]
fn what_is_no_set_of_keys_is_told_without_quoting_it() {
    let secret = json!({ "kty": "oct", "k": "s3cret", "kid": "s3cret", "alg": 1 }).to_string();
    for (text, what) in [
        ("", "is no JSON"),
        ("{\"keys\": [", "is no JSON (line 1, column 10)"),
        ("[]", "no list \"keys\""),
        ("5", "no list \"keys\""),
        ("{\"keys\": {}}", "no list \"keys\""),
        ("{\"keys\": []}", "no public key"),
        ("{\"keys\": [1, {}]}", "keys[1] is no JWK"),
        (&format!("{{\"keys\": [{secret}]}}"), "keys[0] is no JWK"),
        ("{\"keys\": [{\"kty\": \"oct\", \"k\": \"s3cret\"}]}", "keys[0] is a shared secret"),
    ] {
        let error = KeySet::parse(text.as_bytes()).unwrap_err();
        assert!(error.contains(what) && !error.contains("s3cret"), "{text}: {error}");
    }
}

#[tokio::test]
async fn without_a_kid_only_one_key_may_fit() {
    let (rsa, p256, another) = (Signer::rsa(), Signer::p256(), Signer::p256());
    let world = World::new(options(), &[rsa.jwk("a"), p256.jwk("")]);
    assert!(world.verify(rsa.token("", &claims())).await.is_ok());
    assert!(world.verify(p256.token("", &claims())).await.is_ok());
    let world = World::new(options(), &[p256.jwk("a"), another.jwk("b")]);
    assert_eq!(world.refusal(p256.token("", &claims())).await, Refusal::Several);
    assert!(world.verify(another.token("b", &claims())).await.is_ok());
    assert_eq!(world.refusal(another.token("a", &claims())).await, Refusal::Signature);
    assert_eq!(world.refusal(rsa.token("", &claims())).await, Refusal::UnknownKey);
    assert_eq!(world.refusal(another.token("c", &claims())).await, Refusal::UnknownKey);
}

#[tokio::test]
async fn a_verified_token_is_remembered_until_it_expires_or_the_keys_change() {
    let signer = Signer::ed25519();
    let world = World::new(options(), &[signer.jwk("a")]);
    let token = signer.token("a", &claims());
    world.verify(&token).await.unwrap();
    let digest = *blake3::hash(token.as_bytes()).as_bytes();
    let remembered = world.auth.verified.get(&digest).unwrap();
    assert_eq!(remembered.expires, Millis((NOW_S + 60) * 1000));
    // What is remembered is what counts.
    let marked = Arc::new(Claims { issuer: None, values: Vec::new() });
    world.auth.verified.insert(digest, 1, Verified { claims: Arc::clone(&marked), ..*remembered });
    assert_eq!(*world.verify(&token).await.unwrap(), *marked);
    let expired = world.auth.verify(token.as_bytes(), remembered.expires).await;
    assert_eq!(expired, Err(Refusal::Expired));
    // The same keys again change nothing.
    world.reload().await;
    assert_eq!(*world.verify(&token).await.unwrap(), *marked);
    // Other keys, of which one is the same: it is verified again.
    std::fs::write(&world.file, set(&[Signer::p256().jwk("b"), signer.jwk("a")])).unwrap();
    world.reload().await;
    assert_ne!(*world.verify(&token).await.unwrap(), *marked);
    std::fs::write(&world.file, set(&[Signer::ed25519().jwk("a")])).unwrap();
    world.reload().await;
    assert_eq!(world.refusal(&token).await, Refusal::Signature);
    // A token that has been refused is not remembered at all.
    assert_eq!(world.auth.verified.held().0, 1);
}

#[tokio::test]
async fn what_is_remembered_is_bounded_in_bytes() {
    let signer = Signer::ed25519();
    let world = World::new(options(), &[signer.jwk("a")]);
    let long = "x".repeat(40_000);
    for n in 0..200 {
        world.verify(signer.token("a", &with("sub", json!(format!("{n}{long}"))))).await.unwrap();
    }
    let (tokens, bytes) = world.auth.verified.held();
    assert!((1..=VERIFIED_MAX).contains(&bytes) && (90..110).contains(&tokens), "{tokens} {bytes}");
}

#[tokio::test]
async fn a_key_that_is_not_known_is_looked_for_in_the_file() {
    let (old, new) = (Signer::ed25519(), Signer::ed25519());
    let world = World::new(options(), &[old.jwk("old")]);
    let (old_token, new_token) = (old.token("old", &claims()), new.token("new", &claims()));
    assert!(world.verify(&old_token).await.is_ok());
    std::fs::write(&world.file, set(&[new.jwk("new")])).unwrap();
    // All of them at once: one look serves them all.
    let verified = tokio::join!(world.verify(&new_token), world.verify(&new_token), world.verify(&new_token));
    assert!(verified.0.is_ok() && verified.1.is_ok() && verified.2.is_ok());
    assert_eq!(world.refusal(&old_token).await, Refusal::UnknownKey, "its key is gone");
    // A broken file changes nothing; the next sound one counts.
    std::fs::write(&world.file, "{").unwrap();
    assert_eq!(world.refusal(&old_token).await, Refusal::UnknownKey);
    assert!(world.verify(&new_token).await.is_ok());
    std::fs::write(&world.file, set(&[old.jwk("old")])).unwrap();
    assert!(world.verify(&old_token).await.is_ok());
    // Without a kid, a signature that is wrong may mean a new key.
    std::fs::write(&world.file, set(&[new.jwk("")])).unwrap();
    assert!(world.verify(new.token("", &claims())).await.is_ok());
}

/// Publishes keys, and counts who asks for them.
struct Publisher {
    /// Empty: no answer at all, and the connection stays open.
    answer: Arc<Mutex<String>>,
    count: watch::Receiver<usize>,
    port: u16,
}

impl Publisher {
    async fn new(keys: &[Value]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let answer = Arc::new(Mutex::new(set(keys)));
        let (asked, count) = watch::channel(0);
        let answers = Arc::clone(&answer);
        tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let body = answers.lock().unwrap().clone();
                asked.send_modify(|count| *count += 1);
                if body.is_empty() {
                    open.push(stream);
                    continue;
                }
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
                let _ = stream.write_all((head + &body).as_bytes()).await;
            }
        });
        Self { answer, count, port }
    }

    fn publish(&self, text: &str) {
        *self.answer.lock().unwrap() = text.to_owned();
    }

    async fn asked(&mut self, count: usize) {
        let asked = self.count.wait_for(|asked| *asked >= count);
        tokio::time::timeout(Duration::from_secs(20), asked).await.unwrap().unwrap();
    }

    fn verifier(&self, times: Times) -> Arc<Auth> {
        let long = Duration::from_secs(60);
        let upstream = UpstreamOptions {
            endpoint: Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: self.port },
            tls: None,
            authority: HeaderValue::from_static("a"),
            connect_timeout: long,
            response_timeout: long,
            late_window: Duration::ZERO,
            idle_timeout: Duration::ZERO,
            max_in_flight: 1,
            host: HostPolicy::Upstream,
        };
        let target = PathAndQuery::from_static("/");
        let source = Source::Url { text: "http://a/".to_owned(), upstream: Box::new(upstream), target };
        let auth = Arc::new(Auth::new(options(), Keys::with_times(source, times).unwrap()));
        let looking = Arc::clone(&auth);
        tokio::spawn(async move { looking.keep_fresh().await });
        auth
    }
}

const MS: Duration = Duration::from_millis(1);
const NEVER: Duration = Duration::from_secs(3600);
/// Where nothing is to happen by itself.
const STILL: Times = Times { fetch: Duration::from_secs(20), pause: NEVER, short_pause: NEVER, interval: NEVER };

#[tokio::test]
async fn keys_are_fetched_again_when_nobody_asks() {
    let (old, new) = (Signer::ed25519(), Signer::ed25519());
    let mut publisher = Publisher::new(&[old.jwk("old")]).await;
    let auth = publisher.verifier(Times { interval: MS * 20, ..STILL });
    let old_token = old.token("old", &claims());
    auth.verify(old_token.as_bytes(), NOW).await.unwrap();
    publisher.publish(&set(&[new.jwk("new")]));
    // The one after the next has surely been answered so, and the one before that is over.
    let count = *publisher.count.borrow();
    publisher.asked(count + 3).await;
    assert!(auth.verify(new.token("new", &claims()).as_bytes(), NOW).await.is_ok());
    assert_eq!(auth.verify(old_token.as_bytes(), NOW).await, Err(Refusal::UnknownKey), "remembered, but withdrawn");
}

#[tokio::test]
async fn a_fetch_that_fails_is_tried_again_after_a_pause() {
    let signer = Signer::ed25519();
    let token = signer.token("a", &claims());
    // With keys, and without any so far.
    for (first, times) in [
        (set(&[signer.jwk("a")]), Times { pause: MS * 20, interval: MS * 20, ..STILL }),
        ("nothing".to_owned(), Times { short_pause: MS * 20, interval: MS * 20, ..STILL }),
    ] {
        let mut publisher = Publisher::new(&[]).await;
        publisher.publish(&first);
        let auth = publisher.verifier(times);
        publisher.asked(1).await;
        publisher.publish("nonsense");
        let count = *publisher.count.borrow();
        publisher.asked(count + 4).await;
        let expected = if first == "nothing" { Some(Refusal::NoKeys) } else { None };
        assert_eq!(auth.verify(token.as_bytes(), NOW).await.err(), expected);
        publisher.publish(&set(&[signer.jwk("a")]));
        let count = *publisher.count.borrow();
        publisher.asked(count + 3).await;
        assert!(auth.verify(token.as_bytes(), NOW).await.is_ok());
    }
}

#[tokio::test]
async fn nobody_waits_for_longer_than_a_fetch_may_take() {
    let signer = Signer::ed25519();
    let mut publisher = Publisher::new(&[]).await;
    publisher.publish("");
    let times = Times { fetch: MS * 200, short_pause: MS, ..STILL };
    let auth = publisher.verifier(times);
    publisher.asked(1).await;
    let token = signer.token("a", &claims());
    let began = Instant::now();
    assert_eq!(auth.verify(token.as_bytes(), NOW).await, Err(Refusal::NoKeys));
    assert!(began.elapsed() < MS * 5000);
    // Each fetch is given up: there is another one, which is answered.
    publisher.publish(&set(&[signer.jwk("a")]));
    let mut pace = auth.keys.pace.subscribe();
    let taken = pace.wait_for(|_| auth.keys.current().is_some());
    tokio::time::timeout(MS * 20_000, taken).await.unwrap().unwrap();
    drop(pace);
    assert!(auth.verify(token.as_bytes(), NOW).await.is_ok());
    // The source is silent again: who asks for another key is refused in time, and others notice nothing.
    publisher.publish("");
    let count = *publisher.count.borrow();
    auth.reload();
    publisher.asked(count + 1).await;
    let began = Instant::now();
    assert_eq!(auth.verify(signer.token("b", &claims()).as_bytes(), NOW).await, Err(Refusal::UnknownKey));
    assert!(began.elapsed() < MS * 5000);
    assert!(auth.verify(token.as_bytes(), NOW).await.is_ok());
}

#[tokio::test]
async fn a_token_causes_a_fetch_only_after_the_pause() {
    let signer = Signer::ed25519();
    let mut publisher = Publisher::new(&[signer.jwk("a")]).await;
    let auth = publisher.verifier(Times { short_pause: Duration::ZERO, ..STILL });
    publisher.asked(1).await;
    auth.verify(signer.token("a", &claims()).as_bytes(), NOW).await.unwrap();
    for n in 0..50 {
        let token = signer.token(&format!("x{n}"), &claims());
        assert_eq!(auth.verify(token.as_bytes(), NOW).await, Err(Refusal::UnknownKey));
    }
    assert_eq!(*publisher.count.borrow(), 1);
    // What is known, and what is no signature of ours, never causes one.
    let auth = publisher.verifier(Times { pause: Duration::ZERO, ..STILL });
    publisher.asked(2).await;
    auth.verify(signer.token("a", &claims()).as_bytes(), NOW).await.unwrap();
    for token in [
        Signer::ed25519().token("a", &claims()),
        signer.token_of("EdDSA", "{\"alg\":\"none\",\"kid\":\"x\"}", "{}"),
        signer.token_of("EdDSA", "{\"alg\":\"ES256\",\"kid\":\"a\"}", "{}"),
        "x.y.z".to_owned(),
    ] {
        assert!(auth.verify(token.as_bytes(), NOW).await.is_err());
    }
    assert_eq!(*publisher.count.borrow(), 2);
    assert!(auth.verify(signer.token("x", &claims()).as_bytes(), NOW).await.is_err());
    assert_eq!(*publisher.count.borrow(), 3, "it has waited for that");
}
