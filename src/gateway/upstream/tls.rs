//! TLS to the upstream: whom to trust, who we are, and what a failed handshake is called.

use super::SendError;
use crate::pem::{FileError, Named};
use rustls::client::ResolvesClientCert;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ProtocolVersion, RootCertStore, SignatureScheme};
use std::cell::Cell;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// `[upstream.tls]`.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whose certificate the upstream has to show; also the name it is asked for (SNI), unless it is an address.
    pub server_name: ServerName<'static>,
    /// PEM file of the authorities to trust; `None`: the platform's.
    pub ca: Option<PathBuf>,
    /// PEM files of the certificate chain and the key that are shown to an upstream that asks for them.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Makes TLS connections.
pub struct Connector {
    options: Options,
    config: RwLock<Arc<ClientConfig>>,
}

/// Says where the key is, not what.
impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.options.fmt(f)
    }
}

impl Connector {
    /// Reads the files.
    ///
    /// # Errors
    /// All files that cannot be used.
    pub fn load(options: Options) -> Result<Self, Vec<FileError>> {
        let config = RwLock::new(Arc::new(read(&options)?));
        Ok(Self { options, config })
    }

    /// Reads the files again, for connections to come. Those that are open are not touched.
    ///
    /// # Errors
    /// All files that cannot be used; then everything stays as it was.
    pub fn reload(&self) -> Result<(), Vec<FileError>> {
        let config = Arc::new(read(&self.options)?);
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// Makes a connection secure. Nothing of a request has been sent if that fails.
    ///
    /// # Errors
    /// [`SendError::Unreachable`], with the RFC 9209 §2.3 error type.
    pub(super) async fn connect(
        &self,
        stream: TcpStream,
        deadline: Instant,
    ) -> Result<TlsStream<TcpStream>, SendError> {
        let config = Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner));
        let began = Instant::now();
        let handshake = ASKED.scope(Cell::new(false), async {
            let stream = TlsConnector::from(config).connect(self.options.server_name.clone(), stream).await?;
            Ok((stream, ASKED.with(Cell::get)))
        });
        let (mut stream, asked) = timeout_at(deadline, handshake).await.map_err(|_| late())?.map_err(failed)?;
        let tls13 = stream.get_ref().1.protocol_version() == Some(ProtocolVersion::TLSv1_3);
        if asked && tls13 {
            // The client's part of a TLS 1.3 handshake ends before the server has judged its certificate (RFC 8446 §2). A
            // refusal that came after the request would leave open whether that was executed. Most servers say something
            // (a session ticket) when they are content; one that does not is given twice as long as the handshake took.
            let left = deadline.saturating_duration_since(Instant::now());
            let patience = (began.elapsed() * 2).max(VERDICT_MIN).min(left);
            if let Ok(verdict) = timeout(patience, verdict(&mut stream)).await {
                verdict.map_err(failed)?;
            }
        }
        Ok(stream)
    }
}

/// How long a server may take at least to judge a certificate: a busy one is slower than its handshake was.
const VERDICT_MIN: Duration = Duration::from_millis(300);

tokio::task_local! {
    /// Whether the server of the handshake under way has asked for a certificate.
    static ASKED: Cell<bool>;
}

/// Reads the first records after the handshake. Whatever they bring stays in the connection.
async fn verdict(stream: &mut TlsStream<TcpStream>) -> io::Result<()> {
    let (tcp, session) = stream.get_mut();
    let mut chunk = [0; 4096];
    loop {
        tcp.readable().await?;
        let mut rest = match tcp.try_read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => chunk.get(..len).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        while !rest.is_empty() {
            session.read_tls(&mut rest)?;
            session.process_new_packets().map_err(io::Error::other)?;
        }
        return Ok(());
    }
}

fn late() -> SendError {
    let error = io::Error::new(io::ErrorKind::TimedOut, "no TLS connection within upstream.connect_timeout");
    SendError::Unreachable { error, proxy_error: "connection_timeout" }
}

fn failed(error: io::Error) -> SendError {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    let proxy_error = match cause {
        Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => "tls_certificate_error",
        Some(rustls::Error::AlertReceived(_)) => "tls_alert_received",
        _ => "tls_protocol_error",
    };
    SendError::Unreachable { error, proxy_error }
}

/// The client's certificate, if it has one.
#[derive(Debug)]
struct Identity(Option<Arc<CertifiedKey>>);

impl ResolvesClientCert for Identity {
    fn resolve(&self, _issuers: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let _ = ASKED.try_with(|asked| asked.set(true));
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

const NO_CERTIFICATE: &str = "has no certificate in it (PEM, -----BEGIN CERTIFICATE-----)";

fn read(options: &Options) -> Result<ClientConfig, Vec<FileError>> {
    let mut errors = Vec::new();
    let roots = match &options.ca {
        Some(path) => Named("ca", path).roots(NO_CERTIFICATE),
        None => platform_roots(),
    };
    let roots = roots.unwrap_or_else(|error| {
        errors.push(error);
        RootCertStore::empty()
    });
    let identity = options.identity.as_ref().map(|(cert, key)| identity(cert, key, &mut errors));
    if !errors.is_empty() {
        return Err(errors);
    }
    let versions =
        ClientConfig::builder_with_provider(Arc::new(default_provider())).with_safe_default_protocol_versions();
    let builder = versions.map_err(|error| vec![FileError { key: "ca", message: error.to_string() }])?;
    let identity = Identity(identity.flatten().map(Arc::new));
    let mut config = builder.with_root_certificates(roots).with_client_cert_resolver(Arc::new(identity));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn platform_roots() -> Result<RootCertStore, FileError> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let why = found.errors.first().map_or_else(String::new, |error| format!(" ({error})"));
        let message = format!("the platform has no trusted certificates{why}; name a PEM file of your authority here");
        return Err(FileError { key: "ca", message });
    }
    Ok(roots)
}

fn identity(cert: &Path, key: &Path, errors: &mut Vec<FileError>) -> Option<CertifiedKey> {
    let key = Named("key", key);
    let chain = Named("cert", cert).certificates(NO_CERTIFICATE).map_err(|error| errors.push(error)).ok();
    let private = key.private_key("has no private key in it (PEM, unencrypted)");
    let private = private.map_err(|error| errors.push(error)).ok();
    let certified = CertifiedKey::from_der(chain?, private?, &default_provider());
    certified.map_err(|error| errors.push(key.error(&format!("does not fit the certificate: {error}")))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair};

    #[test]
    fn a_reload_takes_what_is_sound_and_keeps_what_was_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let write = |name: &str| {
            let key = KeyPair::generate().unwrap();
            let certificate = CertificateParams::new(vec!["client".to_owned()]).unwrap().self_signed(&key).unwrap();
            std::fs::write(path("ca"), certificate.pem()).unwrap();
            std::fs::write(path("cert"), certificate.pem()).unwrap();
            std::fs::write(path(name), key.serialize_pem()).unwrap();
        };
        write("key");
        let options = Options {
            server_name: ServerName::try_from("a").unwrap(),
            ca: Some(path("ca")),
            identity: Some((path("cert"), path("key"))),
        };
        let connector = Connector::load(options).unwrap();
        let config = || Arc::clone(&connector.config.read().unwrap());
        let first = config();
        // A new certificate whose key has not been put in place yet.
        write("another-key");
        let errors = connector.reload().unwrap_err();
        assert_eq!(errors.iter().map(|error| error.key).collect::<Vec<_>>(), ["key"], "{errors:?}");
        assert!(Arc::ptr_eq(&first, &config()));
        std::fs::rename(path("another-key"), path("key")).unwrap();
        connector.reload().unwrap();
        assert!(!Arc::ptr_eq(&first, &config()));

        std::fs::remove_file(path("ca")).unwrap();
        std::fs::write(path("cert"), "").unwrap();
        let errors = connector.reload().unwrap_err();
        assert_eq!(errors.iter().map(|error| error.key).collect::<Vec<_>>(), ["ca", "cert"], "{errors:?}");
        assert!(!format!("{connector:?}").contains("PRIVATE"));
    }
}
