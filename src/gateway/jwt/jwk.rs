//! Public keys (RFC 7517), and what each of them may verify (RFC 7518 §3.3 to §3.5, RFC 8037).

use super::base64url;
use aws_lc_rs::signature::{
    self as aws, ParsedPublicKey, RsaParameters, RsaPublicKeyComponents, VerificationAlgorithm,
};
use serde::Deserialize;
use serde_json::Value;

/// The algorithms of RSA keys.
static RSA: [(&str, &RsaParameters); 6] = [
    ("RS256", &aws::RSA_PKCS1_2048_8192_SHA256),
    ("RS384", &aws::RSA_PKCS1_2048_8192_SHA384),
    ("RS512", &aws::RSA_PKCS1_2048_8192_SHA512),
    ("PS256", &aws::RSA_PSS_2048_8192_SHA256),
    ("PS384", &aws::RSA_PSS_2048_8192_SHA384),
    ("PS512", &aws::RSA_PSS_2048_8192_SHA512),
];

/// A curve: the key type that it belongs to, its algorithm, and the length of a coordinate in bytes.
struct Curve {
    kty: &'static str,
    crv: &'static str,
    alg: &'static str,
    verifies: &'static dyn VerificationAlgorithm,
    len: usize,
}

static CURVES: [Curve; 3] = [
    Curve { kty: "EC", crv: "P-256", alg: "ES256", verifies: &aws::ECDSA_P256_SHA256_FIXED, len: 32 },
    Curve { kty: "EC", crv: "P-384", alg: "ES384", verifies: &aws::ECDSA_P384_SHA384_FIXED, len: 48 },
    Curve { kty: "OKP", crv: "Ed25519", alg: "EdDSA", verifies: &aws::ED25519, len: 32 },
];

/// Bits of an RSA modulus (RFC 7518 §3.3 for the lower bound).
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// Whether tokens signed in this way are accepted at all: neither "none" nor an algorithm with a shared secret is.
pub(super) fn is_accepted(alg: &str) -> bool {
    RSA.iter().any(|(name, _)| *name == alg) || CURVES.iter().any(|curve| curve.alg == alg)
}

/// A key as it is written.
#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    key_ops: Option<Vec<String>>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

/// A key that can be used.
#[derive(Debug)]
struct Key {
    kid: Option<String>,
    /// One per algorithm that it may verify.
    verifies: Vec<(&'static str, ParsedPublicKey)>,
}

/// The keys of one issuer at one time.
#[derive(Debug)]
pub(super) struct KeySet {
    keys: Vec<Key>,
    /// Why others of the set are not among them.
    pub(super) unusable: Vec<String>,
    /// Of the text that it was read from.
    pub(super) digest: blake3::Hash,
    /// Counts the sets that there have been.
    pub(super) generation: u64,
}

/// What a set has for a token.
pub(super) enum Found<'a> {
    One(&'a ParsedPublicKey),
    /// A newer set may have it.
    UnknownKey,
    /// The key that the token names is for other algorithms.
    OtherAlgorithm,
    /// The token names none, and several would do.
    Several,
}

impl KeySet {
    /// Reads a JWK set (RFC 7517 §5). Keys that are not understood, are symmetric or are not for signatures are left out.
    ///
    /// # Errors
    /// It is no such set, or has no usable key in it. The words never quote it: it may hold a secret by mistake.
    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        let set: Value = serde_json::from_slice(text)
            .map_err(|error| format!("is no JSON (line {}, column {})", error.line(), error.column()))?;
        let listed = set.get("keys").and_then(Value::as_array);
        let listed = listed.ok_or("is no JWK set: it has no list \"keys\" (RFC 7517 §5)")?;
        let (mut keys, mut unusable) = (Vec::new(), Vec::new());
        for (n, value) in listed.iter().enumerate() {
            match Key::parse(value) {
                Ok(key) => keys.push(key),
                Err(reason) => unusable.push(format!("keys[{n}] {reason}")),
            }
        }
        if keys.is_empty() {
            let reasons = unusable.iter().take(5).fold(String::new(), |reasons, reason| reasons + "; " + reason);
            return Err(format!("has no public key that could verify a token{reasons}"));
        }
        Ok(Self { keys, unusable, digest: blake3::hash(text), generation: 0 })
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    /// The one key that fits a token.
    pub(super) fn find(&self, alg: &str, kid: Option<&str>) -> Found<'_> {
        let mut named = self.keys.iter().filter(|key| kid.is_none() || key.kid.as_deref() == kid).peekable();
        if named.peek().is_none() {
            return Found::UnknownKey;
        }
        let mut fitting = named.filter_map(|key| key.verifies.iter().find(|(name, _)| *name == alg));
        match (fitting.next(), fitting.next()) {
            (Some((_, key)), None) => Found::One(key),
            (Some(_), Some(_)) => Found::Several,
            (None, _) if kid.is_none() => Found::UnknownKey,
            (None, _) => Found::OtherAlgorithm,
        }
    }
}

impl Key {
    fn parse(value: &Value) -> Result<Self, &'static str> {
        let jwk = Jwk::deserialize(value).map_err(|_| "is no JWK (RFC 7517 §4)")?;
        if jwk.usage.as_deref().is_some_and(|usage| usage != "sig") {
            return Err("has a \"use\" other than \"sig\"");
        }
        if jwk.key_ops.as_ref().is_some_and(|ops| !ops.iter().any(|op| op == "verify")) {
            return Err("has \"key_ops\" without \"verify\"");
        }
        let may = |alg: &str| jwk.alg.as_deref().is_none_or(|only| only == alg);
        let verifies = match jwk.kty.as_str() {
            "RSA" => rsa(&jwk, may)?,
            "EC" | "OKP" => curve(&jwk, may)?,
            "oct" => return Err("is a shared secret"),
            _ => return Err("has a \"kty\" other than \"RSA\", \"EC\" and \"OKP\""),
        };
        if verifies.is_empty() {
            return Err("has an \"alg\" that is not accepted, or not one of its key type");
        }
        Ok(Self { kid: jwk.kid, verifies })
    }
}

type Verifies = Vec<(&'static str, ParsedPublicKey)>;

/// RFC 7518 §6.3.1.
fn rsa(jwk: &Jwk, may: impl Fn(&str) -> bool) -> Result<Verifies, &'static str> {
    let number = |field: &Option<String>| {
        let bytes = field.as_deref().and_then(base64url)?;
        // Some issuers write a sign byte in front.
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        bytes.get(zeros..).map(<[u8]>::to_vec)
    };
    let (Some(n), Some(e)) = (number(&jwk.n), number(&jwk.e)) else { return Err("lacks a sound \"n\" or \"e\"") };
    let bits = n.len() * 8 - n.first().map_or(0, |byte| byte.leading_zeros() as usize);
    if !RSA_BITS.contains(&bits) {
        return Err("is an RSA key of fewer than 2048 bits, or of more than 8192");
    }
    // With 1 as its exponent anybody could sign.
    let odd = |number: &[u8]| number.last().is_some_and(|byte| byte % 2 == 1);
    if !odd(&n) || !odd(&e) || e == [1] {
        return Err("is no sound RSA key");
    }
    let components = RsaPublicKeyComponents { n, e };
    let allowed = RSA.iter().filter(|(alg, _)| may(alg));
    let parsed = allowed.map(|(alg, parameters)| Some((*alg, components.to_parsed_public_key(parameters).ok()?)));
    parsed.collect::<Option<_>>().ok_or("is no sound RSA key")
}

/// RFC 7518 §6.2.1 and RFC 8037 §2: coordinates have their full length.
fn curve(jwk: &Jwk, may: impl Fn(&str) -> bool) -> Result<Verifies, &'static str> {
    let named = CURVES.iter().find(|curve| curve.kty == jwk.kty && jwk.crv.as_deref() == Some(curve.crv));
    let curve = named.ok_or("has a \"crv\" other than \"P-256\", \"P-384\" and \"Ed25519\"")?;
    let coordinate = |field: &Option<String>| {
        let bytes = field.as_deref().and_then(base64url).filter(|bytes| bytes.len() == curve.len);
        bytes.ok_or("lacks a coordinate of the right length")
    };
    let x = coordinate(&jwk.x)?;
    // An uncompressed point (SEC 1 §2.3.3).
    let point = if curve.kty == "EC" { [vec![4], x, coordinate(&jwk.y)?].concat() } else { x };
    if !may(curve.alg) {
        return Ok(Vec::new());
    }
    let key = ParsedPublicKey::new(curve.verifies, point).map_err(|_| "is no point of its curve")?;
    Ok(vec![(curve.alg, key)])
}
