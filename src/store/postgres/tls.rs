//! TLS to the server, for the driver: the certificate is always verified, its name included.

use crate::store::shared::TlsFiles;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

#[derive(Clone)]
pub(super) struct MakeTls(TlsConnector);

impl MakeTls {
    /// # Errors
    /// The key of `[store.tls]`, and what is wrong with its file.
    pub(super) fn new(files: &TlsFiles, direct: bool) -> Result<Self, (&'static str, String)> {
        let roots = roots(files.ca.as_deref()).map_err(|reason| ("tls.ca", reason))?;
        let provider = ClientConfig::builder_with_provider(Arc::new(default_provider()));
        let versions = provider.with_safe_default_protocol_versions().map_err(|error| ("tls.ca", error.to_string()))?;
        let builder = versions.with_root_certificates(roots);
        let mut config = match &files.client {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => {
                let chain = certificates(cert).map_err(|reason| ("tls.cert", reason))?;
                // The parser's own words may quote the file.
                let key = PrivateKeyDer::from_pem_slice(key)
                    .map_err(|_| ("tls.key", "has no private key in it (PEM, unencrypted)".to_owned()))?;
                builder
                    .with_client_auth_cert(chain, key)
                    .map_err(|error| ("tls.key", format!("does not fit the certificate: {error}")))?
            }
        };
        if direct {
            config.alpn_protocols = vec![b"postgresql".to_vec()];
        }
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| format!("is no PEM file: {error}"))?;
    if found.is_empty() { Err("has no certificate in it (PEM)".to_owned()) } else { Ok(found) }
}

/// Those of the platform may be none: then no certificate is good, and that is what the handshake says.
fn roots(ca: Option<&[u8]>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    match ca {
        None => drop(roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs)),
        Some(ca) => {
            for certificate in certificates(ca)? {
                roots.add(certificate).map_err(|error| format!("one of its certificates is invalid: {error}"))?;
            }
        }
    }
    Ok(roots)
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> MakeTlsConnect<S> for MakeTls {
    type Stream = Secure<S>;
    type TlsConnect = Connect;
    type Error = io::Error;

    fn make_tls_connect(&mut self, host: &str) -> io::Result<Connect> {
        // Over a Unix socket there is no name, and no TLS.
        let name = ServerName::try_from(host.to_owned()).ok();
        Ok(Connect { connector: self.0.clone(), name })
    }
}

pub(super) struct Connect {
    connector: TlsConnector,
    name: Option<ServerName<'static>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> TlsConnect<S> for Connect {
    type Stream = Secure<S>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Secure<S>>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        Box::pin(async move {
            let name =
                self.name.ok_or_else(|| io::Error::other("the host is no name that a certificate could bear"))?;
            Ok(Secure(self.connector.connect(name, stream).await?))
        })
    }
}

/// The driver wants a trait of its own on the stream.
pub(super) struct Secure<S>(TlsStream<S>);

impl<S: AsyncRead + AsyncWrite + Unpin> tokio_postgres::tls::TlsStream for Secure<S> {
    /// The certificate was verified: binding the password to it as well would add nothing.
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Secure<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Secure<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
