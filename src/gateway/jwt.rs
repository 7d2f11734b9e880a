//! Bearer tokens (RFC 6750) that are JWTs (RFC 7519), verified as RFC 8725 wants it, for the scope's `jwt:` parts.

mod jwk;
mod keys;
#[cfg(test)]
mod tests;

use super::memo::Memo;
use super::problem::{Code, Problem};
use crate::idempotency::Millis;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jwk::{Found, KeySet};
pub use keys::{Keys, Source};
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde_json::Value;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::Arc;

/// `[auth]`, but for where the keys come from.
#[derive(Clone, Debug)]
pub struct Options {
    /// What `iss` has to be.
    pub issuer: Option<String>,
    /// One of these has to be in `aud`; `None`: it is not looked at.
    pub audience: Option<Vec<String>>,
    /// The claims that some scope names.
    pub claims: Vec<String>,
}

/// Verifies tokens, for all workers.
pub struct Auth {
    options: Options,
    keys: Keys,
    /// By the token's digest: a signature costs more than all else that a replay takes.
    verified: Memo<Verified>,
}

/// A token that has been verified.
struct Verified {
    claims: Arc<Claims>,
    /// Not from this moment on.
    expires: Millis,
    /// The set of keys by which it was: with another one, it has to be verified again.
    generation: u64,
}

/// What a verified token says, as far as a scope asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// A subject is unique within its issuer alone (RFC 7519 §4.1.2).
    issuer: Option<String>,
    values: Vec<(String, Claim)>,
}

impl Claims {
    /// Bytes in memory, about.
    fn weight(&self) -> usize {
        let values = self.values.iter().map(|(name, claim)| name.len() + claim.parts().1.len());
        OVERHEAD_BYTES + self.issuer.as_ref().map_or(0, String::len) + values.sum::<usize>()
    }
}

/// A claim's value; `"1"` and `1` are two.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Claim {
    String(String),
    /// As it is written: a large one must not be rounded into its neighbour.
    Number(String),
    Boolean(bool),
}

/// Whom a claim names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity<'a> {
    /// The value's type.
    pub(super) kind: &'static str,
    pub(super) issuer: Option<&'a str>,
    pub(super) value: &'a str,
}

/// Why a token does not count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("The token is malformed: {0}")]
    Malformed(&'static str),
    #[error("The token is signed with an algorithm that is not accepted")]
    Algorithm,
    #[error("The token demands an extension (crit) that is not known here")]
    Critical,
    #[error("The token is signed with a key that is not known here")]
    UnknownKey,
    #[error("The token is signed with an algorithm that its key is not for")]
    OtherAlgorithm,
    #[error("The token names no key (kid), and more than one could be meant")]
    Several,
    #[error("The token's signature is wrong")]
    Signature,
    #[error("The token has expired")]
    Expired,
    #[error("The token is not valid yet")]
    NotYet,
    #[error("The token is from another issuer")]
    Issuer,
    #[error("The token is for another audience")]
    Audience,
    #[error("The token has no claim {0} that tells whose key this is")]
    Claim(String),
    /// Not the token's fault: there are no keys yet.
    #[error("The keys to verify the token with cannot be had")]
    NoKeys,
}

/// How much earlier than `nbf` a token counts, since two clocks never agree, in milliseconds. There is no such leeway for
/// `exp`.
const LEEWAY_MS: u64 = 5000;
/// Bytes that verified tokens may take in memory.
const VERIFIED_MAX: u64 = 4 << 20;
/// What one of them weighs besides its claims.
const OVERHEAD_BYTES: usize = 300;

impl Auth {
    #[must_use]
    pub fn new(options: Options, keys: Keys) -> Self {
        Self { options, keys, verified: Memo::new(VERIFIED_MAX) }
    }

    /// Looks for new keys whenever that is due, for ever.
    pub(crate) async fn keep_fresh(&self) {
        self.keys.keep_fresh().await;
    }

    /// Has the keys read again because the operator says so. Blocks.
    pub(crate) fn reload(&self) {
        self.keys.reload();
    }

    /// Verifies a token at the time `now`. May wait, for 5 seconds at most, for keys to be fetched.
    ///
    /// # Errors
    /// Why it does not count.
    pub async fn verify(&self, token: &[u8], now: Millis) -> Result<Arc<Claims>, Refusal> {
        let mut set = match self.keys.current() {
            Some(set) => set,
            None => self.keys.first().await.ok_or(Refusal::NoKeys)?,
        };
        let digest = *blake3::hash(token).as_bytes();
        if let Some(verified) = self.verified.get(&digest)
            && verified.generation == set.generation
            && now < verified.expires
        {
            return Ok(Arc::clone(&verified.claims));
        }
        let token = Token::parse(token)?;
        let mut signed = token.check(&set);
        if signed == Err(Refusal::UnknownKey) || signed == Err(Refusal::Signature) && token.kid.is_none() {
            // The issuer may have a new key.
            self.keys.look_again().await;
            let newer = self.keys.current().filter(|newer| newer.generation != set.generation);
            if let Some(newer) = newer {
                set = newer;
                signed = token.check(&set);
            }
        }
        signed?;
        let (claims, expires) = self.judge(&token.claims()?, now)?;
        let claims = Arc::new(claims);
        let verified = Verified { claims: Arc::clone(&claims), expires, generation: set.generation };
        self.verified.insert(digest, claims.weight(), verified);
        Ok(claims)
    }

    /// Judges what a signed token says, and takes out what scopes ask for; also says when it expires.
    fn judge(&self, members: &Members, now: Millis) -> Result<(Claims, Millis), Refusal> {
        let expires = members.time("exp")?.ok_or(Refusal::Malformed("it has no exp"))?;
        if now >= expires {
            return Err(Refusal::Expired);
        }
        if members.time("nbf")?.is_some_and(|from| from > now.plus(LEEWAY_MS)) {
            return Err(Refusal::NotYet);
        }
        let issuer = members.string("iss")?;
        if self.options.issuer.as_deref().is_some_and(|only| issuer != Some(only)) {
            return Err(Refusal::Issuer);
        }
        if self.options.audience.as_ref().is_some_and(|ours| !members.is_for(ours)) {
            return Err(Refusal::Audience);
        }
        let value = |name: &String| Some((name.clone(), Claim::of(members.get(name)?)?));
        let values = self.options.claims.iter().filter_map(value).collect();
        Ok((Claims { issuer: issuer.map(str::to_owned), values }, expires))
    }
}

/// What a request's token says, where there is one and it is to be verified; see [`Auth::verify`].
pub(super) async fn claims(
    auth: Option<&Auth>,
    token: Option<&[u8]>,
    now: impl FnOnce() -> Millis,
) -> Result<Option<Arc<Claims>>, Refusal> {
    let (Some(auth), Some(token)) = (auth, token) else { return Ok(None) };
    // What this takes is not part of every request.
    Box::pin(auth.verify(token, now())).await.map(Some)
}

impl Claims {
    /// Whom a claim names.
    ///
    /// # Errors
    /// [`Refusal::Claim`] if there is no such claim, or none that could tell anybody apart.
    pub(super) fn get(&self, name: &str) -> Result<Identity<'_>, Refusal> {
        let claim = self.values.iter().find(|(known, _)| known == name);
        let (kind, value) = claim.ok_or_else(|| Refusal::Claim(name.to_owned()))?.1.parts();
        Ok(Identity { kind, issuer: self.issuer.as_deref(), value })
    }
}

impl Claim {
    /// `None`: it could not tell anybody apart.
    fn of(value: &Value) -> Option<Self> {
        match value {
            Value::String(text) if text.is_empty() => None,
            Value::String(text) => Some(Self::String(text.clone())),
            Value::Number(number) => Some(Self::Number(number.to_string())),
            Value::Bool(value) => Some(Self::Boolean(*value)),
            Value::Null | Value::Array(_) | Value::Object(_) => None,
        }
    }

    fn parts(&self) -> (&'static str, &str) {
        match self {
            Self::String(text) => ("string", text),
            Self::Number(text) => ("number", text),
            Self::Boolean(value) => ("boolean", if *value { "true" } else { "false" }),
        }
    }
}

/// Without the tokens that have been verified.
impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("options", &self.options).field("keys", &self.keys).finish()
    }
}

/// A token in its parts (RFC 7515 §7.1), of which the header has been read.
struct Token<'a> {
    alg: String,
    kid: Option<String>,
    /// What the signature is of.
    signed: &'a [u8],
    payload: &'a [u8],
    signature: Vec<u8>,
}

impl<'a> Token<'a> {
    fn parse(token: &'a [u8]) -> Result<Self, Refusal> {
        let malformed = |what| move || Refusal::Malformed(what);
        let mut parts = token.split(|&byte| byte == b'.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Refusal::Malformed("it does not have three parts"));
        };
        let signed = token.get(..header.len() + 1 + payload.len()).unwrap_or_default();
        let signature = base64url(signature).ok_or_else(malformed("its signature is no base64url"))?;
        let header = base64url(header).and_then(|header| Members::parse(&header));
        let header = header.ok_or_else(malformed("its header is no JSON object in base64url"))?;
        let alg = header.string("alg")?.ok_or_else(malformed("its header has no alg"))?;
        if !jwk::is_accepted(alg) {
            return Err(Refusal::Algorithm);
        }
        // RFC 7515 §4.1.11: what is listed must be understood.
        if header.get("crit").is_some() {
            return Err(Refusal::Critical);
        }
        let kid = header.string("kid")?.map(str::to_owned);
        Ok(Self { alg: alg.to_owned(), kid, signed, payload, signature })
    }

    /// Checks the signature. Nothing that the token itself brings (jwk, jku, x5c) says whom to trust.
    fn check(&self, set: &KeySet) -> Result<(), Refusal> {
        match set.find(&self.alg, self.kid.as_deref()) {
            Found::One(key) => key.verify_sig(self.signed, &self.signature).map_err(|_| Refusal::Signature),
            Found::UnknownKey => Err(Refusal::UnknownKey),
            Found::OtherAlgorithm => Err(Refusal::OtherAlgorithm),
            Found::Several => Err(Refusal::Several),
        }
    }

    fn claims(&self) -> Result<Members, Refusal> {
        let members = base64url(self.payload).and_then(|payload| Members::parse(&payload));
        members.ok_or(Refusal::Malformed("its claims are no JSON object in base64url"))
    }
}

/// A JSON object, no two of whose members bear one name: which of them counts, readers would not agree on (RFC 7515 §4,
/// RFC 7519 §4).
struct Members(HashMap<String, Value>);

impl Members {
    fn parse(text: &[u8]) -> Option<Self> {
        serde_json::from_slice(text).ok()
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    fn string(&self, name: &str) -> Result<Option<&str>, Refusal> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(Refusal::Malformed("one of alg, kid and iss is no string")),
        }
    }

    /// A NumericDate (RFC 7519 §2): seconds, perhaps with a fraction.
    fn time(&self, name: &str) -> Result<Option<Millis>, Refusal> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let seconds = value.as_f64().ok_or(Refusal::Malformed("one of exp and nbf is no number"))?;
        // Saturates; nothing but zero comes of what is negative.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let ms = (seconds * 1000.0) as u64;
        Ok(Some(Millis(ms)))
    }

    /// Whether one of `ours` is its audience (RFC 7519 §4.1.3).
    fn is_for(&self, ours: &[String]) -> bool {
        let is_ours = |value: &Value| value.as_str().is_some_and(|audience| ours.iter().any(|our| our == audience));
        match self.get("aud") {
            Some(Value::Array(audiences)) => audiences.iter().any(is_ours),
            other => other.is_some_and(is_ours),
        }
    }
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = HashMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    match members.entry(name) {
                        Entry::Occupied(_) => return Err(A::Error::custom("a name twice")),
                        Entry::Vacant(entry) => entry.insert(map.next_value()?),
                    };
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// Without padding, and in the one way in which bytes can be written (RFC 7515 §2).
fn base64url(text: impl AsRef<[u8]>) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoKeys => {
                let detail = "The token cannot be verified at the moment, so nothing was sent; retry after Retry-After \
                              seconds.";
                Problem::new(Code::ProbeFailed, detail)
            }
            refusal => Problem::token_invalid(&refusal.to_string()),
        }
    }
}
