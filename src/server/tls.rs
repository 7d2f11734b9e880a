//! TLS towards clients: certificate, key and the authority of client certificates, loaded and loaded again.

use crate::gateway::client_cert::ClientCert;
use crate::pem::{FileError, Named};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::WebPkiClientVerifier;
use std::fmt;
use std::io;
use std::path::PathBuf;
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

const NO_CERTIFICATE: &str = "holds no certificate in PEM form";
const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

impl Options {
    /// Reads the files and checks that they belong together.
    ///
    /// # Errors
    /// The first file that is wrong, and why.
    fn load(&self) -> Result<Arc<ServerConfig>, FileError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let (cert, key) = (Named("cert", &self.cert), Named("key", &self.key));
        let chain = cert.certificates(NO_CERTIFICATE)?;
        let private_key = key.private_key("holds no unencrypted private key in PEM form")?;
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| key.error(&error.to_string()))?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(file) => {
                let authorities = Named("client_ca", file);
                let roots = Arc::new(authorities.roots(NO_CERTIFICATE)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|error| authorities.error(&error.to_string()))?)
            }
        };
        let mut config = builder.with_single_cert(chain, private_key).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                key.error(&format!("does not belong to the certificate in {}", self.cert.display()))
            }
            rustls::Error::InvalidCertificate(why) => cert.error(&format!("its certificate is invalid: {why}")),
            error => key.error(&error.to_string()),
        })?;
        config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
        Ok(Arc::new(config))
    }
}

/// What new connections are secured with.
pub struct Tls {
    options: Options,
    current: RwLock<Arc<ServerConfig>>,
}

/// Says where the key is, not what.
impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.options.fmt(f)
    }
}

/// A connection after its handshake.
pub(super) struct Secured<S> {
    pub(super) stream: TlsStream<S>,
    /// Whether it is HTTP/2 by ALPN.
    pub(super) http2: bool,
    pub(super) client_cert: Option<ClientCert>,
}

impl Tls {
    /// Reads the files and checks that they belong together.
    ///
    /// # Errors
    /// The first file that is wrong, and why.
    pub fn load(options: Options) -> Result<Self, FileError> {
        let current = RwLock::new(options.load()?);
        Ok(Self { options, current })
    }

    /// Whether clients must show a certificate.
    #[must_use]
    pub fn asks_for_certificates(&self) -> bool {
        self.options.client_ca.is_some()
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
