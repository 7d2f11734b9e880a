//! Certificates and keys from PEM files (RFC 7468), for TLS on both sides.

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::path::Path;
use zeroize::Zeroizing;

/// A file that a setting names does not serve its purpose.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct FileError {
    /// The key of the table that names the file, such as `cert`.
    pub key: &'static str,
    /// Which file it is, and what is wrong with it.
    pub message: String,
}

/// A file, and the key that names it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Named<'a>(pub(crate) &'static str, pub(crate) &'a Path);

impl Named<'_> {
    pub(crate) fn error(self, reason: &str) -> FileError {
        FileError { key: self.0, message: format!("{}: {reason}", self.1.display()) }
    }

    /// Wiped when it is dropped: it may hold a key.
    fn read(self) -> Result<Zeroizing<Vec<u8>>, FileError> {
        std::fs::read(self.1).map(Zeroizing::new).map_err(|error| self.error(&format!("cannot be read: {error}")))
    }

    /// All certificates; `none` says that there is not one.
    ///
    /// # Errors
    /// The file cannot be read, is malformed, or holds none.
    pub(crate) fn certificates(self, none: &str) -> Result<Vec<CertificateDer<'static>>, FileError> {
        let found = CertificateDer::pem_slice_iter(&self.read()?).collect::<Result<Vec<_>, _>>();
        let found = found.map_err(|error| self.error(&format!("is no PEM file: {error}")))?;
        if found.is_empty() { Err(self.error(none)) } else { Ok(found) }
    }

    /// The certificates, as authorities to trust.
    ///
    /// # Errors
    /// As [`Self::certificates`]; or one of them is invalid.
    pub(crate) fn roots(self, none: &str) -> Result<RootCertStore, FileError> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates(none)? {
            let added = roots.add(certificate);
            added.map_err(|error| self.error(&format!("one of its certificates is invalid: {error}")))?;
        }
        Ok(roots)
    }

    /// The private key, unencrypted; `none` says that there is none.
    ///
    /// # Errors
    /// The file cannot be read, or holds none that is understood. The parser's own words may quote the file, so they are
    /// not passed on.
    pub(crate) fn private_key(self, none: &str) -> Result<PrivateKeyDer<'static>, FileError> {
        PrivateKeyDer::from_pem_slice(&self.read()?).map_err(|_| self.error(none))
    }
}
