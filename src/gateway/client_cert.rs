//! Who a client certificate says its holder is.

use x509_cert::certificate::{CertificateInner, Raw};
use x509_cert::der::{self, Decode, Encode};
use x509_cert::ext::pkix::SubjectAltName;

/// A digest of the holder's identity: the subject alternative names (RFC 5280 §4.2.1.6) and the issuer, so that a renewed
/// certificate is the same holder's; without such names, the public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientCert([u8; 32]);

impl ClientCert {
    /// Reads a certificate that has been verified.
    ///
    /// # Errors
    /// The certificate's encoding is not understood: whose it is cannot be told.
    pub fn of(certificate: &[u8]) -> Result<Self, der::Error> {
        // The profile that takes any serial number: authorities of one's own are not always strict.
        let certificate = CertificateInner::<Raw>::from_der(certificate)?;
        let certificate = certificate.tbs_certificate();
        let mut names = match certificate.get_extension::<SubjectAltName>()? {
            Some((_, names)) => names.0.iter().map(Encode::to_der).collect::<Result<Vec<_>, _>>()?,
            None => Vec::new(),
        };
        // An authority may order the names of a renewed certificate anew.
        names.sort_unstable();
        let mut hasher = blake3::Hasher::new();
        let mut feed = |part: &[u8]| {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        };
        if names.is_empty() {
            feed(b"public key");
            feed(&certificate.subject_public_key_info().to_der()?);
        } else {
            feed(b"names");
            feed(&certificate.issuer().to_der()?);
            names.iter().for_each(|name| feed(name));
        }
        Ok(Self(*hasher.finalize().as_bytes()))
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType, SerialNumber};

    fn authority(name: &str) -> CertifiedIssuer<'static, KeyPair> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    fn identity(names: &[SanType], key: &KeyPair, authority: &CertifiedIssuer<'_, KeyPair>, serial: u8) -> ClientCert {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names.to_vec();
        params.serial_number = Some(SerialNumber::from_slice(&[0, 0, serial]));
        ClientCert::of(params.signed_by(key, authority).unwrap().der()).unwrap()
    }

    #[test]
    fn a_holder_is_known_by_names_and_issuer_or_else_by_key() {
        let (ours, theirs) = (authority("ours"), authority("theirs"));
        let (key, other_key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let name = |name: &str| SanType::DnsName(name.try_into().unwrap());
        let alice = identity(&[name("alice"), name("al")], &key, &ours, 1);
        assert_eq!(alice, identity(&[name("al"), name("alice")], &other_key, &ours, 2), "renewed with another key");
        assert_ne!(alice, identity(&[name("alice")], &key, &ours, 1), "all names count");
        assert_ne!(alice, identity(&[name("alic"), name("eal")], &key, &ours, 1), "joined unambiguously");
        assert_ne!(alice, identity(&[name("alice"), name("al")], &key, &theirs, 1));
        let mail = SanType::Rfc822Name("alice".try_into().unwrap());
        assert_ne!(identity(&[mail], &key, &ours, 1), identity(&[name("alice")], &key, &ours, 1), "kinds count");
        let nameless = identity(&[], &key, &ours, 1);
        assert_eq!(nameless, identity(&[], &key, &ours, 2));
        assert_ne!(nameless, identity(&[], &other_key, &ours, 1));
        assert!(ClientCert::of(b"\x30\x03\x02\x01\x00").is_err());
    }
}
