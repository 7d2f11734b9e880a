//! `jwt:CLAIM` in the scope: a key belongs to whom a verified token names, whichever token it is.

use crate::support::jwt::{Signer, base64url, hmac_token, set};
use crate::support::{Gateway, Response, Upstream, request};
use serde_json::{Value, json};
use std::time::{SystemTime, UNIX_EPOCH};
use tempfile::TempDir;

pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Claims of a sound token for `sub`; no two alike.
pub fn claims(sub: &str) -> Value {
    static COUNT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    json!({ "sub": sub, "iss": "https://id.example", "aud": ["posts", "x"], "exp": now() + 600, "jti": n })
}

fn with(name: &str, value: Value) -> Value {
    let mut claims = claims("alice");
    claims[name] = value;
    claims
}

fn without(name: &str) -> Value {
    let mut claims = claims("alice");
    claims.as_object_mut().unwrap().remove(name);
    claims
}

/// A keyed POST with a bearer token.
pub fn send(gateway: &Gateway, key: &str, token: &str) -> Response {
    send_as(gateway, key, &format!("Bearer {token}"))
}

fn send_as(gateway: &Gateway, key: &str, authorization: &str) -> Response {
    gateway.call(request("POST", "/posts", &[("Authorization", authorization), ("Idempotency-Key", key)], "{}"))
}

/// Keys in a file.
pub struct Issuer {
    dir: TempDir,
    pub signer: Signer,
}

impl Issuer {
    pub fn new(signer: Signer) -> Self {
        let issuer = Self { dir: tempfile::tempdir().unwrap(), signer };
        issuer.publish(&set(&[issuer.signer.jwk("k1")]));
        issuer
    }

    pub fn publish(&self, keys: &str) {
        std::fs::write(self.dir.path().join("keys.json"), keys).unwrap();
    }

    /// The scope `jwt:sub` and `path`, with these keys.
    pub fn settings(&self) -> String {
        let file = self.dir.path().join("keys.json").display().to_string();
        format!("idempotency.scope = [\"jwt:sub\", \"path\"]\nauth.jwks_file = {file:?}\n")
    }

    pub fn token(&self, claims: &Value) -> String {
        self.signer.token("k1", claims)
    }
}

/// What RFC 6750 §3 asks for, and nothing of the token.
#[track_caller]
pub fn expect_refused(answer: &Response, what: &str) {
    answer.expect_problem(401, "token_invalid");
    let challenge = answer.header("www-authenticate").unwrap();
    let description = challenge.strip_prefix("Bearer error=\"invalid_token\", error_description=\"");
    let description = description.and_then(|rest| rest.strip_suffix('"')).unwrap_or_else(|| panic!("{challenge}"));
    assert!(description.contains(what), "{what:?} is not in {description:?}");
    let detail = answer.json()["detail"].to_string();
    assert!(detail.contains(what), "{what:?} is not in {detail}");
}

#[test]
fn a_retry_with_a_rotated_token_gets_its_replay_and_another_subject_does_not() {
    for signer in [Signer::rsa(), Signer::p256(), Signer::p384(), Signer::ed25519()] {
        let (upstream, issuer) = (Upstream::counting(), Issuer::new(signer));
        let gateway = Gateway::start(&upstream, &issuer.settings());
        let (first, second) = (issuer.token(&claims("alice")), issuer.token(&claims("alice")));
        assert_ne!(first, second);
        let made = send(&gateway, "k", &first);
        assert_eq!((made.status, made.replayed()), (201, false), "{made:?}");
        let seen = upstream.requests()[0].header("authorization").unwrap().to_owned();
        assert_eq!(seen, format!("Bearer {first}"), "the upstream judges the token, too");
        for token in [&first, &second] {
            let again = send(&gateway, "k", token);
            assert_eq!((again.status, again.replayed(), &again.body), (201, true, &made.body), "{again:?}");
        }
        assert!(send_as(&gateway, "k", &format!("bEARER   {second}  ")).replayed());
        let others = send(&gateway, "k", &issuer.token(&claims("bob")));
        assert_eq!((others.status, others.replayed()), (201, false), "{others:?}");
        assert_eq!(upstream.count(), 2);
    }
}

#[test]
fn subjects_of_two_issuers_and_values_of_two_types_are_strangers() {
    let (upstream, issuer) = (Upstream::counting(), Issuer::new(Signer::ed25519()));
    let gateway = Gateway::start(&upstream, &issuer.settings());
    let tenants = [
        with("sub", json!("1")),
        with("sub", json!(1)),
        with("sub", json!("true")),
        with("sub", json!(true)),
        with("iss", json!("https://other.example")),
        without("iss"),
        with("sub", json!(9_007_199_254_740_992_u64)),
        with("sub", json!(9_007_199_254_740_993_u64)),
    ];
    for replayed in [false, true] {
        for claims in &tenants {
            let answer = send(&gateway, "k", &issuer.token(claims));
            assert_eq!((answer.status, answer.replayed()), (201, replayed), "{claims}: {answer:?}");
        }
    }
    assert_eq!(upstream.count(), tenants.len());
}

#[test]
fn a_token_that_does_not_verify_reaches_neither_record_nor_upstream() {
    let (upstream, issuer, attacker) = (Upstream::counting(), Issuer::new(Signer::rsa()), Signer::rsa());
    let oct = json!({ "kty": "oct", "kid": "oct", "k": base64url("secret") });
    issuer.publish(&set(&[issuer.signer.jwk("k1"), oct]));
    let settings = issuer.settings() + "auth.issuer = \"https://id.example\"\nauth.audience = \"posts\"\n";
    let gateway = Gateway::start(&upstream, &settings);
    // There is a record that might be shown.
    assert_eq!(send(&gateway, "k", &issuer.token(&claims("alice"))).status, 201);
    let good = issuer.token(&claims("alice"));
    let [header, payload, signature] = good.split('.').collect::<Vec<_>>().try_into().unwrap();
    let none = base64url("{\"alg\":\"none\"}");
    let twice = claims("alice").to_string().replace("\"sub\"", "\"sub\":\"bob\",\"sub\"");
    let kid = |kid: &str| json!({ "alg": "RS256", "kid": kid });
    let mut refused = vec![
        (format!("{none}.{payload}."), "algorithm"),
        (format!("{none}.{payload}.{signature}"), "algorithm"),
        (attacker.token("k1", &claims("alice")), "signature"),
        (
            attacker.token_with(&json!({ "alg": "RS256", "kid": "k1", "jwk": attacker.jwk("k1") }), &claims("alice")),
            "signature",
        ),
        (attacker.token("k2", &claims("alice")), "not known"),
        (issuer.signer.token_with(&json!({ "alg": "RS256", "kid": "k1", "crit": ["exp"] }), &claims("alice")), "crit"),
        (issuer.token(&with("exp", json!(now() - 1))), "expired"),
        (issuer.token(&with("nbf", json!(now() + 60))), "not valid yet"),
        (issuer.token(&with("iss", json!("https://evil.example"))), "another issuer"),
        (issuer.token(&without("iss")), "another issuer"),
        (issuer.token(&with("aud", json!("mails"))), "another audience"),
        (issuer.token(&without("aud")), "another audience"),
        (issuer.token(&without("exp")), "no exp"),
        (issuer.token(&without("sub")), "no claim sub"),
        (issuer.token(&with("sub", Value::Null)), "no claim sub"),
        (issuer.token(&with("sub", json!(["alice"]))), "no claim sub"),
        (issuer.signer.token_of("RS256", &kid("k1").to_string(), &twice), "malformed"),
        (format!("{header}.{payload}"), "malformed"),
        (format!("{header}.{payload}."), "signature"),
        (format!("{header}.{payload}.{signature}="), "malformed"),
        (format!("{header}.{payload}.{signature}.{signature}.{signature}"), "malformed"),
        (format!("{header} .{payload}.{signature}"), "malformed"),
        (format!("{good},{good}"), "malformed"),
        ("..".to_owned(), "malformed"),
        ("alice".to_owned(), "malformed"),
        (String::new(), "malformed"),
        ("\u{e4}.\u{e4}.\u{e4}".to_owned(), "malformed"),
    ];
    for secret in issuer.signer.rsa_as_secrets() {
        refused.push((hmac_token("HS256", "k1", &secret, &claims("alice")), "algorithm"));
    }
    refused.push((hmac_token("HS256", "oct", b"secret", &claims("alice")), "algorithm"));
    let records = gateway.metric("oncegate_records{state=\"completed\"}");
    for (n, (token, what)) in refused.iter().enumerate() {
        for key in ["k", &format!("fresh{n}")] {
            expect_refused(&send(&gateway, key, token), what);
        }
    }
    assert_eq!(upstream.count(), 1);
    assert_eq!(gateway.metric("oncegate_records{state=\"completed\"}"), records);
    assert_eq!(gateway.metric("oncegate_records{state=\"claimed\"}"), 0.0);
    let counted = gateway.metric("oncegate_requests_total{route=\"/posts\",result=\"rejected\"}");
    assert_eq!(counted, 2.0 * refused.len() as f64);
    let log = gateway.log();
    for (token, _) in &refused {
        for part in token.split(['.', ',']).filter(|part| part.len() > 20) {
            assert!(!log.contains(part), "a token is in the log");
        }
    }
    assert!(send(&gateway, "k", &good).replayed(), "a sound one still counts");
}

#[test]
fn without_a_bearer_token_the_rules_of_all_scopes_hold() {
    let (upstream, issuer) = (Upstream::counting(), Issuer::new(Signer::ed25519()));
    let gateway = Gateway::start(&upstream, &issuer.settings());
    let post = |headers: &[(&str, &str)]| {
        gateway.call(request("POST", "/posts", &[headers, &[("Idempotency-Key", "k")]].concat(), "{}"))
    };
    // All who show nothing are one tenant.
    assert!(!post(&[]).replayed());
    assert!(post(&[]).replayed());
    assert!(post(&[("Authorization", "")]).replayed());
    let bearer = format!("Bearer {}", issuer.token(&claims("alice")));
    let refused: [&[(&str, &str)]; 8] = [
        &[("Authorization", "Basic YWxpY2U6eA==")],
        &[("Authorization", "DPoP x.y.z")],
        &[("Authorization", "Bearerx.y.z")],
        &[("X-Api-Key", "a")],
        &[("Cookie", "a=b")],
        &[("Authorization", &bearer), ("Authorization", &bearer)],
        &[("Authorization", &bearer), ("Authorization", "")],
        &[("Authorization", &bearer), ("Connection", "authorization")],
    ];
    for headers in refused {
        let answer = post(headers);
        answer.expect_problem(400, "scope_missing");
        assert_eq!(answer.header("www-authenticate"), None);
    }
    assert_eq!(upstream.count(), 1);
    let detail = post(&[("X-Api-Key", "a")]).json()["detail"].to_string();
    assert!(detail.contains("jwt:sub"), "it says what to send: {detail}");
    // Where no key is to be protected no token is looked at.
    for text in [
        request("POST", "/posts", &[("Authorization", "Bearer x")], "{}"),
        request("GET", "/posts", &[("Authorization", "Bearer x"), ("Idempotency-Key", "k")], ""),
        request("POST", "/other", &[("Authorization", "Bearer x"), ("Idempotency-Key", "k")], "{}"),
    ] {
        assert_eq!(gateway.call(text).status, 201);
    }
}

#[test]
fn other_parts_may_stand_beside_it() {
    let (upstream, issuer) = (Upstream::counting(), Issuer::new(Signer::ed25519()));
    let settings =
        issuer.settings().replace("\"jwt:sub\"", "\"jwt:sub\", \"jwt:https://x.example/org\", \"header:x-shop\"");
    let gateway = Gateway::start(&upstream, &settings);
    let post = |org: &str, shop: &str| {
        let bearer = format!("Bearer {}", issuer.token(&with("https://x.example/org", json!(org))));
        let headers = [("Authorization", bearer.as_str()), ("X-Shop", shop), ("Idempotency-Key", "k")];
        gateway.call(request("POST", "/posts", &headers, "{}"))
    };
    for (org, shop) in [("a", "1"), ("b", "1"), ("a", "2")] {
        assert!(!post(org, shop).replayed());
        assert!(post(org, shop).replayed());
    }
    expect_refused(&send(&gateway, "k", &issuer.token(&claims("alice"))), "no claim https://x.example/org");
    assert_eq!(upstream.count(), 3);
}

#[test]
fn a_missing_key_is_derived_for_the_subject() {
    let (upstream, issuer) = (Upstream::counting(), Issuer::new(Signer::ed25519()));
    let gateway = Gateway::start(&upstream, &format!("{}idempotency.missing_key = \"derive\"\n", issuer.settings()));
    let post =
        |token: &str| gateway.call(request("POST", "/posts", &[("Authorization", &format!("Bearer {token}"))], "{}"));
    assert!(!post(&issuer.token(&claims("alice"))).replayed());
    assert!(post(&issuer.token(&claims("alice"))).replayed());
    assert!(!post(&issuer.token(&claims("bob"))).replayed());
    expect_refused(&post("x"), "malformed");
    assert_eq!(upstream.count(), 2);
}

#[test]
fn records_outlive_a_restart_and_settings_of_auth_do_not_change_ids() {
    let (upstream, issuer) = (Upstream::counting(), Issuer::new(Signer::ed25519()));
    let gateway = Gateway::start(&upstream, &issuer.settings());
    assert_eq!(send(&gateway, "k", &issuer.token(&claims("alice"))).status, 201);
    let gateway = gateway.restart();
    assert!(send(&gateway, "k", &issuer.token(&claims("alice"))).replayed());
    let mut gateway = gateway;
    gateway.kill();
    let environment = [("ONCEGATE_AUTH__ISSUER", "https://id.example"), ("ONCEGATE_AUTH__AUDIENCE", "posts")];
    let mut gateway = gateway.again(&environment).unwrap();
    assert!(send(&gateway, "k", &issuer.token(&claims("alice"))).replayed());
    gateway.kill();
    let another = [("ONCEGATE_IDEMPOTENCY__SCOPE", "[\"jwt:email\", \"path\"]")];
    let refusal = gateway.again(&another).err().unwrap();
    assert_eq!(refusal.code, Some(2), "{refusal:?}");
    assert!(refusal.stderr.contains("jwt:sub") && refusal.stderr.contains("jwt:email"), "{refusal:?}");
}

#[test]
fn an_answer_to_a_gateway_in_front_says_that_nothing_was_executed() {
    let (upstream, issuer) = (Upstream::counting(), Issuer::new(Signer::ed25519()));
    let gateway = Gateway::start(&upstream, &issuer.settings());
    let headers = [("Authorization", "Bearer x"), ("Idempotency-Key", "k"), ("Via", "1.1 oncegate")];
    let answer = gateway.call(request("POST", "/posts", &headers, "{}"));
    expect_refused(&answer, "malformed");
    assert_eq!(answer.header("idempotency-outcome"), Some("not-executed"));
}

#[test]
fn keys_that_cannot_be_used_stop_the_start() {
    let issuer = Issuer::new(Signer::ed25519());
    let secret = json!({ "kty": "oct", "kid": "a", "k": base64url("s3cret-41c7") });
    let encrypting = {
        let mut jwk = issuer.signer.jwk("a");
        jwk["use"] = json!("enc");
        jwk
    };
    for (text, what) in [
        (Some("{".to_owned()), "is no JSON"),
        (Some(set(&[])), "no public key"),
        (Some(set(&[secret])), "is a shared secret"),
        (Some(set(&[encrypting])), "\"use\" other than \"sig\""),
        (None, "cannot be read"),
    ] {
        match text {
            Some(text) => issuer.publish(&text),
            None => std::fs::remove_file(issuer.dir.path().join("keys.json")).unwrap(),
        }
        let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
        let refusal = Gateway::try_start(dir, "http://127.0.0.1:1", &issuer.settings(), &[], &[]).err().unwrap();
        assert_eq!(refusal.code, Some(2), "{refusal:?}");
        assert!(refusal.stderr.contains("auth.jwks_file: ") && refusal.stderr.contains("keys.json: "), "{refusal:?}");
        assert!(refusal.stderr.contains(what) && !refusal.stderr.contains("s3cret"), "{what}: {refusal:?}");
    }
}
