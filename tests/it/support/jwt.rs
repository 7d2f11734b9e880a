//! Signing keys and tokens made for a test.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    self as aws, EcdsaKeyPair, EcdsaSigningAlgorithm, Ed25519KeyPair, KeyPair, RsaEncoding, RsaKeyPair,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

pub enum Signer {
    Rsa(RsaKeyPair),
    Ec(&'static str, EcdsaKeyPair),
    Ed(Ed25519KeyPair),
}

pub fn base64url(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

impl Signer {
    pub fn rsa() -> Self {
        Self::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap())
    }

    pub fn p256() -> Self {
        Self::ec("P-256", &aws::ECDSA_P256_SHA256_FIXED_SIGNING)
    }

    pub fn p384() -> Self {
        Self::ec("P-384", &aws::ECDSA_P384_SHA384_FIXED_SIGNING)
    }

    pub fn ed25519() -> Self {
        Self::Ed(Ed25519KeyPair::generate().unwrap())
    }

    fn ec(curve: &'static str, alg: &'static EcdsaSigningAlgorithm) -> Self {
        Self::Ec(curve, EcdsaKeyPair::generate(alg).unwrap())
    }

    /// The algorithm of a key that has only one; RS256 for RSA.
    pub fn alg(&self) -> &'static str {
        match self {
            Self::Rsa(_) => "RS256",
            Self::Ec("P-256", _) => "ES256",
            Self::Ec(..) => "ES384",
            Self::Ed(_) => "EdDSA",
        }
    }

    /// The public key as an issuer publishes it, with `kid` where it is not empty.
    pub fn jwk(&self, kid: &str) -> Value {
        let mut jwk = match self {
            Self::Rsa(pair) => {
                let (n, e) = rsa_components(pair.public_key().as_ref());
                json!({ "kty": "RSA", "n": base64url(n), "e": base64url(e) })
            }
            Self::Ec(curve, pair) => {
                // An uncompressed point.
                let (x, y) = pair.public_key().as_ref()[1..].split_at((pair.public_key().as_ref().len() - 1) / 2);
                json!({ "kty": "EC", "crv": curve, "x": base64url(x), "y": base64url(y) })
            }
            Self::Ed(pair) => json!({ "kty": "OKP", "crv": "Ed25519", "x": base64url(pair.public_key()) }),
        };
        if !kid.is_empty() {
            jwk["kid"] = json!(kid);
        }
        jwk
    }

    /// The public key in the forms in which it may be mistaken for a shared secret.
    pub fn rsa_as_secrets(&self) -> Vec<Vec<u8>> {
        let Self::Rsa(pair) = self else { panic!("this is no RSA key") };
        let pkcs1 = pair.public_key().as_ref().to_vec();
        let spki = aws_lc_rs::encoding::AsDer::as_der(pair.public_key()).unwrap();
        let spki: &[u8] = spki.as_ref();
        let (n, _) = rsa_components(&pkcs1);
        let pem = |what: &str, der: &[u8]| {
            let text = base64::engine::general_purpose::STANDARD.encode(der);
            let lines = text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line).into_owned() + "\n");
            format!("-----BEGIN {what}-----\n{}-----END {what}-----\n", lines.collect::<String>()).into_bytes()
        };
        vec![
            pem("PUBLIC KEY", spki),
            pem("RSA PUBLIC KEY", &pkcs1),
            spki.to_vec(),
            n.clone(),
            base64url(n).into_bytes(),
            pkcs1,
        ]
    }

    pub fn sign(&self, alg: &str, message: &[u8]) -> Vec<u8> {
        let encoding: &'static dyn RsaEncoding = match (self, alg) {
            (Self::Ec(_, pair), _) => return pair.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec(),
            (Self::Ed(pair), _) => return pair.sign(message).as_ref().to_vec(),
            (_, "RS384") => &aws::RSA_PKCS1_SHA384,
            (_, "RS512") => &aws::RSA_PKCS1_SHA512,
            (_, "PS256") => &aws::RSA_PSS_SHA256,
            (_, "PS384") => &aws::RSA_PSS_SHA384,
            (_, "PS512") => &aws::RSA_PSS_SHA512,
            _ => &aws::RSA_PKCS1_SHA256,
        };
        let Self::Rsa(pair) = self else { unreachable!() };
        let mut signature = vec![0; pair.public_modulus_len()];
        pair.sign(encoding, &SystemRandom::new(), message, &mut signature).unwrap();
        signature
    }

    /// A token with this key's algorithm, and `kid` where it is not empty.
    pub fn token(&self, kid: &str, claims: &Value) -> String {
        let mut header = json!({ "alg": self.alg(), "typ": "JWT" });
        if !kid.is_empty() {
            header["kid"] = json!(kid);
        }
        self.token_with(&header, claims)
    }

    /// Signed with the algorithm that the header names, as far as this key can.
    pub fn token_with(&self, header: &Value, claims: &Value) -> String {
        self.token_of(header["alg"].as_str().unwrap_or_default(), &header.to_string(), &claims.to_string())
    }

    /// Of any texts.
    pub fn token_of(&self, alg: &str, header: &str, claims: &str) -> String {
        let signed = format!("{}.{}", base64url(header), base64url(claims));
        format!("{signed}.{}", base64url(self.sign(alg, signed.as_bytes())))
    }
}

/// A token signed with a shared secret.
pub fn hmac_token(alg: &str, kid: &str, secret: &[u8], claims: &Value) -> String {
    use aws_lc_rs::hmac;
    let algorithm = match alg {
        "HS384" => hmac::HMAC_SHA384,
        "HS512" => hmac::HMAC_SHA512,
        _ => hmac::HMAC_SHA256,
    };
    let header = json!({ "alg": alg, "kid": kid });
    let signed = format!("{}.{}", base64url(header.to_string()), base64url(claims.to_string()));
    let signature = hmac::sign(&hmac::Key::new(algorithm, secret), signed.as_bytes());
    format!("{signed}.{}", base64url(signature))
}

/// What an issuer publishes.
pub fn set(keys: &[Value]) -> String {
    json!({ "keys": keys }).to_string()
}

/// Modulus and exponent of an RSAPublicKey (RFC 8017 §A.1.1): a sequence of two integers.
fn rsa_components(der: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (sequence, _) = der_value(der);
    let (n, rest) = der_value(sequence);
    let (e, _) = der_value(rest);
    let unsigned = |bytes: &[u8]| bytes.iter().copied().skip_while(|byte| *byte == 0).collect();
    (unsigned(n), unsigned(e))
}

/// The first value, and what comes behind it.
fn der_value(der: &[u8]) -> (&[u8], &[u8]) {
    let (len, start) = match der[1] {
        len @ 0..0x80 => (usize::from(len), 2),
        form => {
            let bytes = usize::from(form & 0x7f);
            (der[2..2 + bytes].iter().fold(0, |len, byte| len << 8 | usize::from(*byte)), 2 + bytes)
        }
    };
    der[start..].split_at(len)
}
