use super::*;
use serde_json::json;
use std::path::PathBuf;
use tokio::task::JoinHandle;

#[path = "../../../tests/it/support/jwt.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the tests of the running program")]
mod signing;

mod keys;

use signing::{Signer, base64url as encode, hmac_token, set};

/// In the year 2033, in seconds and in milliseconds.
const NOW_S: u64 = 2_000_000_000;
const NOW: Millis = Millis(NOW_S * 1000);

fn options() -> Options {
    Options { issuer: None, audience: None, claims: vec!["sub".to_owned()] }
}

fn claims() -> Value {
    json!({ "sub": "alice", "iss": "https://id.example", "exp": NOW_S + 60 })
}

/// The claims with one of them changed, or taken out.
fn with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims.as_object_mut().unwrap().retain(|_, value| *value != json!({ "none": true }));
    claims
}

fn without(name: &str) -> Value {
    with(name, json!({ "none": true }))
}

/// Keys in a file that is looked at whenever a token asks for that.
struct World {
    auth: Arc<Auth>,
    file: PathBuf,
    _dir: tempfile::TempDir,
    fresh: JoinHandle<()>,
}

impl World {
    fn new(options: Options, keys: &[Value]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys.json");
        std::fs::write(&file, set(keys)).unwrap();
        let auth = Arc::new(Auth::new(options, Keys::new(Source::File(file.clone())).unwrap()));
        let looking = Arc::clone(&auth);
        let fresh = tokio::spawn(async move { looking.keep_fresh().await });
        Self { auth, file, _dir: dir, fresh }
    }

    /// Reads the file again, and waits for the end of that.
    async fn reload(&self) {
        let mut pace = self.auth.keys.pace.subscribe();
        let done = pace.borrow_and_update().done;
        self.auth.reload();
        pace.wait_for(|pace| pace.done > done).await.unwrap();
    }

    async fn verify(&self, token: impl AsRef<[u8]>) -> Result<Arc<Claims>, Refusal> {
        self.auth.verify(token.as_ref(), NOW).await
    }

    async fn refusal(&self, token: impl AsRef<[u8]>) -> Refusal {
        let token = token.as_ref();
        match self.verify(token).await {
            Ok(claims) => panic!("{} counts: {claims:?}", String::from_utf8_lossy(token)),
            Err(refusal) => refusal,
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.fresh.abort();
    }
}

#[tokio::test]
async fn every_accepted_algorithm_verifies_with_its_key_and_no_other() {
    let signers = [Signer::rsa(), Signer::p256(), Signer::p384(), Signer::ed25519()];
    let algs: [&[&str]; 4] =
        [&["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"], &["ES256"], &["ES384"], &["EdDSA"]];
    let kids = ["rsa", "p256", "p384", "ed"];
    let keys = signers.iter().zip(kids).map(|(signer, kid)| signer.jwk(kid)).collect::<Vec<_>>();
    let world = World::new(options(), &keys);
    for ((signer, kid), own) in signers.iter().zip(kids).zip(algs) {
        for alg in algs.concat() {
            let token = signer.token_with(&json!({ "alg": alg, "kid": kid }), &claims());
            if own.contains(&alg) {
                let found = world.verify(&token).await.unwrap();
                let expected = Identity { kind: "string", issuer: Some("https://id.example"), value: "alice" };
                assert_eq!(found.get("sub").unwrap(), expected, "{kid} {alg}");
            } else {
                assert_eq!(world.refusal(&token).await, Refusal::OtherAlgorithm, "{kid} {alg}");
            }
        }
    }
    // Signed with one algorithm of a key, and said to be signed with another.
    for (said, real) in [("RS256", "RS384"), ("RS256", "PS256"), ("PS512", "PS256")] {
        let header = json!({ "alg": said, "kid": "rsa" }).to_string();
        let token = signers[0].token_of(real, &header, &claims().to_string());
        assert_eq!(world.refusal(&token).await, Refusal::Signature, "{said} {real}");
    }
}

#[tokio::test]
async fn shared_secrets_and_none_are_refused_whatever_the_set_holds() {
    let signer = Signer::rsa();
    let oct = json!({ "kty": "oct", "k": encode("secret"), "kid": "oct", "alg": "HS256" });
    let world = World::new(options(), &[signer.jwk("a"), oct]);
    for alg in ["HS256", "HS384", "HS512"] {
        for secret in signer.rsa_as_secrets() {
            assert_eq!(world.refusal(hmac_token(alg, "a", &secret, &claims())).await, Refusal::Algorithm);
        }
        assert_eq!(world.refusal(hmac_token(alg, "oct", b"secret", &claims())).await, Refusal::Algorithm);
        assert_eq!(world.refusal(hmac_token(alg, "a", b"", &claims())).await, Refusal::Algorithm);
    }
    let good = signer.token("a", &claims());
    let signature = good.rsplit('.').next().unwrap();
    for alg in ["none", "None", "NONE", "nOnE", "", "RS256 ", "rs256", "ES512", "ES256K", "dir"] {
        for signature in ["", signature] {
            let header = encode(json!({ "alg": alg, "kid": "a" }).to_string());
            let token = format!("{header}.{}.{signature}", encode(claims().to_string()));
            assert_eq!(world.refusal(token).await, Refusal::Algorithm, "{alg:?}");
        }
    }
}

#[tokio::test]
async fn malformed_tokens_are_told() {
    let signer = Signer::p256();
    let world = World::new(options(), &[signer.jwk("a")]);
    let good = signer.token("a", &claims());
    assert!(world.verify(&good).await.is_ok());
    let [header, payload, signature] = good.split('.').collect::<Vec<_>>().try_into().unwrap();
    let of = |header: &str, claims: &str| signer.token_of("ES256", header, claims);
    let (plain, text) = (r#"{"alg":"ES256","kid":"a"}"#, claims().to_string());
    let nested = format!("{}1{}", "[".repeat(200), "]".repeat(200));
    for token in [
        String::new(),
        ".".to_owned(),
        "..".to_owned(),
        "x".to_owned(),
        format!("{header}.{payload}"),
        format!("{good}."),
        format!(".{good}"),
        format!("{header}.{payload}.{signature}.x.y"),
        format!("{header}.{payload}.{signature}="),
        format!("{header}=.{payload}.{signature}"),
        format!("{header}.{payload}.{}+/", &signature[..4]),
        format!(" {good}"),
        format!("{good} x"),
        format!("{}.{payload}.{signature}", encode("{}")),
        format!("{}.{payload}.{signature}", encode("[]")),
        format!("{}.{payload}.{signature}", encode(b"\xff\xfe")),
        of("{\"alg\":\"ES256\",\"kid\":\"a\"", &text),
        of("{\"alg\":\"ES256\",\"kid\":5}", &text),
        of("{\"alg\":\"ES256\",\"kid\":null}", &text),
        of("{\"alg\":[\"ES256\"],\"kid\":\"a\"}", &text),
        of("{\"kid\":\"a\"}", &text),
        of("{\"alg\":\"none\",\"alg\":\"ES256\",\"kid\":\"a\"}", &text),
        of("{\"alg\":\"ES256\",\"kid\":\"b\",\"kid\":\"a\"}", &text),
        of(&format!("{plain} x"), &text),
        of(plain, ""),
        of(plain, "5"),
        of(plain, "\"x\""),
        of(plain, &format!("[{text}]")),
        of(plain, &format!("{text}{text}")),
        of(plain, &text.replace('}', ",\"sub\":\"bob\"}")),
        of(plain, &text.replace('}', ",\"s\\u0075b\":\"bob\"}")),
        of(plain, &text.replace('}', &format!(",\"x\":{nested}}}"))),
        of(plain, &text.replace("alice", "\u{1}")),
        signer.token("a", &without("exp")),
        signer.token("a", &with("exp", json!("2000000060"))),
        signer.token("a", &with("exp", Value::Null)),
        of(plain, "{\"sub\":\"alice\",\"exp\":1e999}"),
        signer.token("a", &with("nbf", json!("x"))),
        signer.token("a", &with("iss", json!(["https://id.example"]))),
        signer.token("a", &with("iss", Value::Null)),
    ] {
        let refusal = world.refusal(&token).await;
        assert!(matches!(refusal, Refusal::Malformed(_)), "{token}: {refusal}");
    }
    for crit in ["[\"b64\"]", "[\"exp\"]", "[]", "null", "\"x\""] {
        let token = of(&format!("{{\"alg\":\"ES256\",\"kid\":\"a\",\"b64\":false,\"crit\":{crit}}}"), &text);
        assert_eq!(world.refusal(token).await, Refusal::Critical, "{crit}");
    }
}

#[tokio::test]
async fn a_changed_byte_breaks_the_signature() {
    for signer in [Signer::rsa(), Signer::p256(), Signer::p384(), Signer::ed25519()] {
        let world = World::new(options(), &[signer.jwk("a")]);
        let good = signer.token("a", &claims());
        let [header, payload, signature] = good.split('.').collect::<Vec<_>>().try_into().unwrap();
        let changed = encode(with("sub", json!("bob")).to_string());
        assert_eq!(world.refusal(format!("{header}.{changed}.{signature}")).await, Refusal::Signature);
        let spaced = encode(format!(" {}", json!({ "alg": signer.alg(), "kid": "a" })));
        assert_eq!(world.refusal(format!("{spaced}.{payload}.{signature}")).await, Refusal::Signature);
        let mut bytes = base64url(signature).unwrap();
        for at in [0, bytes.len() / 2, bytes.len() - 1] {
            bytes[at] ^= 1;
            assert_eq!(world.refusal(format!("{header}.{payload}.{}", encode(&bytes))).await, Refusal::Signature);
            bytes[at] ^= 1;
        }
        for wrong in [Vec::new(), vec![0; bytes.len()], bytes[1..].to_vec(), [&bytes[..], &[0]].concat()] {
            assert_eq!(world.refusal(format!("{header}.{payload}.{}", encode(wrong))).await, Refusal::Signature);
        }
        assert!(world.verify(good).await.is_ok());
    }
}

#[tokio::test]
async fn a_token_never_says_itself_whom_to_trust() {
    let (ours, attacker) = (Signer::p256(), Signer::p256());
    let world = World::new(options(), &[ours.jwk("a")]);
    let header = json!({
        "alg": "ES256", "kid": "a", "jwk": attacker.jwk("a"), "jku": "https://evil.example/jwks.json", "x5u": "https://evil.example/"
    });
    assert_eq!(world.refusal(attacker.token_with(&header, &claims())).await, Refusal::Signature);
    assert!(world.verify(ours.token_with(&header, &claims())).await.is_ok());
}

#[tokio::test]
async fn times_are_those_of_the_gateways_clock() {
    let signer = Signer::ed25519();
    let world = World::new(options(), &[signer.jwk("a")]);
    let at = async |name: &str, value: Value, now: u64| {
        world.auth.verify(signer.token("a", &with(name, value)).as_bytes(), Millis(now)).await.err()
    };
    let s = NOW_S;
    for (exp, now, refusal) in [
        (json!(s), s * 1000 - 1, None),
        (json!(s), s * 1000, Some(Refusal::Expired)),
        (json!(s as f64 + 0.5), s * 1000 + 499, None),
        (json!(s as f64 + 0.5), s * 1000 + 500, Some(Refusal::Expired)),
        (json!(1e30), u64::MAX / 2, None),
        (json!(0), 1, Some(Refusal::Expired)),
        (json!(-1), 1, Some(Refusal::Expired)),
        (json!(-1), 0, Some(Refusal::Expired)),
    ] {
        // Twice: one that has been verified may not live on.
        for _ in 0..2 {
            assert_eq!(at("exp", exp.clone(), now).await, refusal, "exp {exp} at {now}");
        }
    }
    for (nbf, refusal) in [
        (json!(s), None),
        (json!(s + 5), None),
        (json!(s as f64 + 5.001), Some(Refusal::NotYet)),
        (json!(s + 6), Some(Refusal::NotYet)),
        (json!(-5), None),
    ] {
        assert_eq!(at("nbf", nbf.clone(), s * 1000).await, refusal, "nbf {nbf}");
    }
}

#[tokio::test]
async fn issuer_and_audience_have_to_be_ours() {
    let signer = Signer::ed25519();
    let strict = Options {
        issuer: Some("https://id.example".to_owned()),
        audience: Some(vec!["posts".to_owned(), "mails".to_owned()]),
        ..options()
    };
    let world = World::new(strict, &[signer.jwk("a")]);
    let refusal = async |claims: Value| world.verify(signer.token("a", &claims)).await.err();
    for aud in [json!("posts"), json!("mails"), json!(["x", "posts"]), json!([1, "mails"])] {
        assert_eq!(refusal(with("aud", aud.clone())).await, None, "{aud}");
    }
    for aud in [
        json!("Posts"),
        json!("postsx"),
        json!([]),
        json!(["x"]),
        json!([["posts"]]),
        json!({ "posts": 1 }),
        json!(null),
    ] {
        assert_eq!(refusal(with("aud", aud.clone())).await, Some(Refusal::Audience), "{aud}");
    }
    assert_eq!(refusal(claims()).await, Some(Refusal::Audience));
    for iss in ["https://id.example/", "http://id.example", ""] {
        let mut claims = with("iss", json!(iss));
        claims["aud"] = json!("posts");
        assert_eq!(refusal(claims).await, Some(Refusal::Issuer), "{iss}");
    }
    assert_eq!(refusal(without("iss")).await, Some(Refusal::Issuer));

    let world = World::new(options(), &[signer.jwk("a")]);
    for claims in [without("iss"), with("iss", json!("x")), with("aud", json!("x")), with("aud", json!(1))] {
        assert!(world.verify(signer.token("a", &claims)).await.is_ok(), "{claims}");
    }
}

#[tokio::test]
async fn a_claim_has_a_type_and_a_value_or_is_missing() {
    let signer = Signer::ed25519();
    let names = ["sub", "https://example.com/org", "a.b"].map(str::to_owned).to_vec();
    let world = World::new(Options { claims: names, ..options() }, &[signer.jwk("a")]);
    let verify = async |claims: Value| world.verify(signer.token("a", &claims)).await.unwrap();
    for (value, kind, text) in [
        (json!("1"), "string", "1"),
        (json!(1), "number", "1"),
        (json!("true"), "string", "true"),
        (json!(true), "boolean", "true"),
        (json!(false), "boolean", "false"),
        (json!(9_007_199_254_740_993_u64), "number", "9007199254740993"),
        (serde_json::from_str("12345678901234567890123456789").unwrap(), "number", "12345678901234567890123456789"),
    ] {
        let found = verify(with("sub", value.clone())).await;
        let found = found.get("sub").unwrap();
        assert_eq!((found.kind, found.value), (kind, text), "{value}");
    }
    for value in [json!(null), json!(""), json!([]), json!(["alice"]), json!({ "id": 1 })] {
        let found = verify(with("sub", value.clone())).await;
        assert_eq!(found.get("sub").unwrap_err(), Refusal::Claim("sub".to_owned()), "{value}");
    }
    let found = verify(with("https://example.com/org", json!("o"))).await;
    assert_eq!(found.get("https://example.com/org").unwrap().value, "o");
    assert!(verify(with("a", json!({ "b": "o" }))).await.get("a.b").is_err(), "a dot leads nowhere");
    assert!(verify(with("other", json!("o"))).await.get("other").is_err(), "no scope asks for it");
}

/// RFC 6750 §3.
#[test]
fn a_refusal_becomes_a_problem_with_a_challenge() {
    let response = Problem::from(Refusal::Expired).into_response(false);
    assert_eq!(response.status().as_u16(), 401);
    let challenge = "Bearer error=\"invalid_token\", error_description=\"The token has expired\"";
    assert_eq!(response.headers()["www-authenticate"], challenge);
    let response = Problem::from(Refusal::Claim("a\"\\ü\r\n".to_owned())).into_response(false);
    let challenge = response.headers()["www-authenticate"].to_str().unwrap().to_owned();
    assert_eq!(challenge.matches('"').count(), 4, "{challenge}");
    let response = Problem::from(Refusal::NoKeys).into_response(false);
    assert_eq!((response.status().as_u16(), &response.headers()["retry-after"]), (503, &"1".parse().unwrap()));
}

#[test]
fn ids_of_claims_are_the_same_in_every_version_and_all_different() {
    use crate::gateway::path::{NormalPath, Params};
    use crate::gateway::scope::{Part, Request, Secret, tenant};
    use crate::gateway::{Peer, test_support::route_options};
    let route = route_options(&[Part::Jwt("sub".to_owned()), Part::Jwt("org".to_owned()), Part::Path]);
    let claims = |issuer: Option<&str>, sub: Claim, org: Claim| Claims {
        issuer: issuer.map(str::to_owned),
        values: vec![("sub".to_owned(), sub), ("org".to_owned(), org)],
    };
    let text = |text: &str| Claim::String(text.to_owned());
    let id = |claims: Option<&Claims>| {
        let (headers, path, params) = (http::HeaderMap::new(), NormalPath::new(b"/posts"), Params::default());
        let peer = Peer { ip: None, trusted: false, https: false, client_cert: None };
        let request = Request { headers: &headers, path: &path, params: &params, peer: &peer, claims };
        tenant(&Secret([9; 32]), &route, &request).map(|tenant| tenant.record_id(b"key").to_string())
    };
    let all = [
        claims(Some("i"), text("1"), text("o")),
        claims(Some("i"), Claim::Number("1".to_owned()), text("o")),
        claims(Some("i1"), text(""), text("o")),
        claims(None, text("i1"), text("o")),
        claims(None, text("1"), text("o")),
        claims(Some(""), text("1"), text("o")),
        claims(Some("i"), text("1o"), text("")),
        claims(Some("i"), text("o"), text("1")),
        claims(Some("i"), text("true"), text("o")),
        claims(Some("i"), Claim::Boolean(true), text("o")),
    ];
    let ids = all.iter().map(|claims| id(Some(claims)).unwrap()).chain([id(None).unwrap()]);
    assert_eq!(ids.collect::<std::collections::HashSet<_>>().len(), all.len() + 1);
    assert_eq!(id(Some(&all[0])).unwrap(), "bd00b7ea1c5e66043a0c1de5c913932e");
    assert_eq!(id(None).unwrap(), "c86010bb5eb630b077831003e1933214");
    let half = Claims { issuer: None, values: vec![("sub".to_owned(), text("1"))] };
    assert_eq!(id(Some(&half)).unwrap_err().code, Code::TokenInvalid);
}
