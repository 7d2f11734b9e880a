//! TLS to the server: verified fully, against the authorities given or the system's.

use super::dial::DialError;
use crate::store::shared::{OpenError, TlsFiles};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::sync::Arc;
use tokio_rustls::TlsConnector;

fn wrong(key: &'static str, reason: impl std::fmt::Display) -> OpenError {
    OpenError::Options { key, reason: reason.to_string() }
}

/// # Errors
/// [`OpenError::Options`]: a file is not what it should be.
pub(super) fn connector(files: &TlsFiles) -> Result<TlsConnector, OpenError> {
    let mut roots = RootCertStore::empty();
    match &files.ca {
        Some(pem) => {
            for certificate in certificates("tls.ca", pem)? {
                roots.add(certificate).map_err(|error| wrong("tls.ca", error))?;
            }
        }
        None => drop(roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs)),
    }
    if roots.is_empty() {
        return Err(wrong(
            "tls.ca",
            "the platform has no trusted certificates; name a PEM file of your authority here",
        ));
    }
    let builder =
        ClientConfig::builder_with_provider(Arc::new(default_provider())).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| wrong("tls", error))?.with_root_certificates(roots);
    let config = match &files.client {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let chain = certificates("tls.cert", chain)?;
            // The parser's own words may quote the key.
            let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| wrong("tls.key", "has no private key in it"))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| wrong("tls.key", error))?
        }
    };
    Ok(TlsConnector::from(Arc::new(config)))
}

fn certificates(key: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, OpenError> {
    let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| wrong(key, format!("is no PEM file: {error}")))?;
    if found.is_empty() { Err(wrong(key, "has no certificate in it")) } else { Ok(found) }
}

pub(super) fn name(host: &str) -> Result<ServerName<'static>, DialError> {
    ServerName::try_from(host.to_owned())
        .map_err(|_| DialError::Refused(format!("{host:?} is no name that a certificate could bear")))
}
