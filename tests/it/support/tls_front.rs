//! A TLS server before an upstream in clear.

use super::eventually;
use super::tls::{Authority, Certified};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::server::WebPkiClientVerifier;
use rustls::{ServerConfig, SupportedProtocolVersion};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;

/// A server that shows this certificate, and asks for one of `clients` where there is such an authority.
pub fn server(
    shown: &Certified,
    versions: &[&'static SupportedProtocolVersion],
    clients: Option<&Authority>,
) -> ServerConfig {
    let provider = Arc::new(default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(versions);
    let builder = match clients {
        None => builder.unwrap().with_no_client_auth(),
        Some(authority) => {
            let roots = Arc::new(authority.roots());
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build().unwrap();
            builder.unwrap().with_client_cert_verifier(verifier)
        }
    };
    let (chain, key) = shown.der();
    let mut config = builder.with_single_cert(chain, key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config
}

/// What a handshake was about: the name asked for, the protocol agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handshake {
    pub server_name: Option<String>,
    pub alpn: Option<String>,
    pub resumed: bool,
}

/// A TLS server that hands what it decrypts to `behind`. A failed handshake reaches nobody.
pub struct TlsFront {
    pub addr: SocketAddr,
    config: Arc<Mutex<Arc<ServerConfig>>>,
    handshakes: Arc<Mutex<Vec<Result<Handshake, String>>>>,
    _runtime: Runtime,
}

impl TlsFront {
    pub fn new(config: ServerConfig, behind: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let addr = listener.local_addr().unwrap();
        let config = Arc::new(Mutex::new(Arc::new(config)));
        let handshakes = Arc::new(Mutex::new(Vec::new()));
        let (shared, log) = (Arc::clone(&config), Arc::clone(&handshakes));
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (config, log) = (Arc::clone(&shared.lock().unwrap()), Arc::clone(&log));
                tokio::spawn(async move {
                    let mut stream = match TlsAcceptor::from(config).accept(stream).await {
                        Ok(stream) => stream,
                        Err(error) => return log.lock().unwrap().push(Err(error.to_string())),
                    };
                    let session = stream.get_ref().1;
                    log.lock().unwrap().push(Ok(Handshake {
                        server_name: session.server_name().map(str::to_owned),
                        alpn: session.alpn_protocol().map(|name| String::from_utf8_lossy(name).into_owned()),
                        resumed: session.handshake_kind() == Some(rustls::HandshakeKind::Resumed),
                    }));
                    let mut behind = TcpStream::connect(behind).await.unwrap();
                    let _ = copy_bidirectional(&mut stream, &mut behind).await;
                });
            }
        });
        Self { addr, config, handshakes, _runtime: runtime }
    }

    /// From the next connection on.
    pub fn set(&self, config: ServerConfig) {
        *self.config.lock().unwrap() = Arc::new(config);
    }

    pub fn handshakes(&self) -> Vec<Result<Handshake, String>> {
        self.handshakes.lock().unwrap().clone()
    }

    /// Waits until so many handshakes have ended, well or not.
    #[track_caller]
    pub fn wait_for(&self, count: usize) -> Vec<Result<Handshake, String>> {
        eventually("handshakes", || Some(self.handshakes()).filter(|handshakes| handshakes.len() >= count))
    }
}
