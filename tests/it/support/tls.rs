//! Certificates made for a test, and TLS clients.

use super::client::Response;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An authority that certifies servers and clients.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM form.
#[derive(Clone)]
pub struct Certified {
    pub cert: String,
    pub key: String,
}

impl Certified {
    pub fn der(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let chain = CertificateDer::pem_slice_iter(self.cert.as_bytes()).map(Result::unwrap).collect();
        (chain, PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap())
    }
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for these names, with a key of its own.
    pub fn certify(&self, names: &[&str]) -> Certified {
        self.certify_with(names, |_| {})
    }

    pub fn certify_with(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Certified {
        let names = names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let cert = params.signed_by(&key, &self.0).unwrap();
        Certified { cert: cert.pem(), key: key.serialize_pem() }
    }

    /// This authority, as the only one that is trusted.
    pub fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        roots
    }

    /// What a client trusts and shows.
    pub fn client(&self, shows: Option<&Certified>, alpn: &[&str]) -> ClientConfig {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let builder = builder.with_root_certificates(self.roots());
        let mut config = match shows {
            None => builder.with_no_client_auth(),
            Some(certified) => {
                let (chain, key) = certified.der();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        config
    }
}

/// Files for `[server.tls]`.
pub struct Files {
    pub dir: tempfile::TempDir,
}

impl Files {
    pub fn new(server: &Certified, client_ca: Option<&Authority>) -> Self {
        let files = Self { dir: tempfile::tempdir().unwrap() };
        files.write("cert.pem", &server.cert);
        files.write("key.pem", &server.key);
        if let Some(authority) = client_ca {
            files.write("ca.pem", &authority.pem());
        }
        files
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// The settings that name them.
    pub fn settings(&self) -> String {
        let line = |key: &str, path: &Path| format!("server.tls.{key} = {:?}\n", path.display().to_string());
        let mut text = line("cert", &self.path("cert.pem")) + &line("key", &self.path("key.pem"));
        if self.path("ca.pem").exists() {
            text += &line("client_ca", &self.path("ca.pem"));
        }
        text
    }
}

/// A TLS connection that speaks HTTP/1.1.
pub struct TlsClient {
    pub stream: StreamOwned<ClientConnection, TcpStream>,
}

impl TlsClient {
    /// Shakes hands; an error that the gateway's verdict on the client's certificate causes may come with the first read.
    pub fn connect(addr: SocketAddr, config: ClientConfig) -> std::io::Result<Self> {
        let tcp = TcpStream::connect(addr)?;
        tcp.set_read_timeout(Some(super::PATIENCE))?;
        let session = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
        let mut stream = StreamOwned::new(session, tcp);
        stream.flush()?;
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(Self { stream })
    }

    /// The certificate that the gateway shows.
    pub fn shown(&self) -> Vec<u8> {
        self.stream.conn.peer_certificates().unwrap()[0].to_vec()
    }

    /// One request on this connection, and its response with a length.
    pub fn call(&mut self, request: &str) -> std::io::Result<Response> {
        self.stream.write_all(request.as_bytes())?;
        let mut bytes = Vec::new();
        let head_len = loop {
            if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            self.read_some(&mut bytes)?;
        };
        let head = String::from_utf8_lossy(&bytes[..head_len]).into_owned();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = super::parse_headers(lines);
        let len: usize = super::find(&headers, "content-length").unwrap().parse().unwrap();
        while bytes.len() < head_len + len {
            self.read_some(&mut bytes)?;
        }
        Ok(Response { status, headers, body: bytes.split_off(head_len) })
    }

    fn read_some(&mut self, bytes: &mut Vec<u8>) -> std::io::Result<()> {
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk)? {
            0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
            len => {
                bytes.extend_from_slice(&chunk[..len]);
                Ok(())
            }
        }
    }
}

/// The DER form of a PEM certificate.
pub fn der(pem: &str) -> Vec<u8> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}
