//! TLS towards clients: certificate, key and the authority of client certificates, loaded and loaded again.

use crate::gateway::client_cert::ClientCert;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// `[server.tls]`: PEM files.
#[derive(Clone, Debug)]
pub struct Options {
    /// The server's certificate, then those of the authorities between it and a root.
    pub cert: PathBuf,
    pub key: PathBuf,
    /// Authorities whose client certificates are accepted; with them, one is required.
    pub client_ca: Option<PathBuf>,
}

/// A file does not serve its purpose.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}: {reason}", file.display())]
pub struct LoadError {
    /// The key of `[server.tls]` that names it.
    pub key: &'static str,
    pub file: PathBuf,
    pub reason: String,
}

const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

impl Options {
    /// Reads the files and checks that they belong together.
    ///
    /// # Errors
    /// The first file that is wrong, and why.
    pub fn load(&self) -> Result<Arc<ServerConfig>, LoadError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let chain = certificates("cert", &self.cert)?;
        let key_error = |reason: String| LoadError { key: "key", file: self.key.clone(), reason };
        let key = PrivateKeyDer::from_pem_slice(&read("key", &self.key)?).map_err(|error| {
            key_error(match error {
                pem::Error::NoItemsFound => "holds no unencrypted private key in PEM form".to_owned(),
                error => format!("is no PEM file: {error}"),
            })
        })?;
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| key_error(error.to_string()))?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(file) => {
                let verifier = WebPkiClientVerifier::builder_with_provider(roots(file)?, provider).build();
                let wrong = |error: rustls::server::VerifierBuilderError| error.to_string();
                builder.with_client_cert_verifier(verifier.map_err(|error| LoadError {
                    key: "client_ca",
                    file: file.clone(),
                    reason: wrong(error),
                })?)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                key_error(format!("does not belong to the certificate in {}", self.cert.display()))
            }
            rustls::Error::InvalidCertificate(why) => {
                LoadError { key: "cert", file: self.cert.clone(), reason: format!("its certificate is invalid: {why}") }
            }
            error => key_error(error.to_string()),
        })?;
        config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
        Ok(Arc::new(config))
    }
}

fn read(key: &'static str, file: &Path) -> Result<Vec<u8>, LoadError> {
    std::fs::read(file).map_err(|error| LoadError {
        key,
        file: file.to_owned(),
        reason: format!("cannot be read: {error}"),
    })
}

/// All certificates of a file, of which there must be one.
fn certificates(key: &'static str, file: &Path) -> Result<Vec<CertificateDer<'static>>, LoadError> {
    let wrong = |reason: String| LoadError { key, file: file.to_owned(), reason };
    let certificates = CertificateDer::pem_slice_iter(&read(key, file)?).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.map_err(|error| wrong(format!("is no PEM file: {error}")))?;
    if certificates.is_empty() {
        return Err(wrong("holds no certificate in PEM form".to_owned()));
    }
    Ok(certificates)
}

fn roots(file: &Path) -> Result<Arc<RootCertStore>, LoadError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("client_ca", file)? {
        roots.add(certificate).map_err(|error| LoadError {
            key: "client_ca",
            file: file.to_owned(),
            reason: format!("one of its certificates is invalid: {error}"),
        })?;
    }
    Ok(Arc::new(roots))
}

/// What new connections are secured with.
pub struct Tls {
    options: Options,
    current: RwLock<Arc<ServerConfig>>,
}

/// A connection after its handshake.
pub(super) struct Secured<S> {
    pub(super) stream: TlsStream<S>,
    /// Whether it is HTTP/2 by ALPN.
    pub(super) http2: bool,
    pub(super) client_cert: Option<ClientCert>,
}

impl Tls {
    /// # Errors
    /// See [`Options::load`].
    pub fn new(options: Options) -> Result<Self, LoadError> {
        let current = RwLock::new(options.load()?);
        Ok(Self { options, current })
    }

    /// Reads the files again, for new connections. What is wrong with them is logged, and changes nothing.
    pub fn reload(&self) {
        match self.options.load() {
            Ok(config) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = config;
                tracing::info!(cert = %self.options.cert.display(), "certificate, key and client_ca were read again");
            }
            Err(error) => tracing::error!(
                key = format!("server.tls.{}", error.key),
                %error,
                "certificate, key and client_ca stay as they were"
            ),
        }
    }

    /// Shakes hands.
    ///
    /// # Errors
    /// The connection's or the protocol's; a client certificate whose holder cannot be told.
    pub(super) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> io::Result<Secured<S>> {
        let config = Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner));
        let stream = TlsAcceptor::from(config).accept(stream).await?;
        let session = stream.get_ref().1;
        let http2 = session.alpn_protocol() == Some(HTTP2);
        let client_cert = session.peer_certificates().and_then(|chain| chain.first());
        let client_cert = client_cert.map(|leaf| ClientCert::of(leaf).map_err(io::Error::other)).transpose()?;
        Ok(Secured { stream, http2, client_cert })
    }
}
