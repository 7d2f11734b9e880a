//! HTTP/2 clients: one that keeps to the rules, and one that sends exactly these frames.

use super::client::Response;
use super::{PATIENCE, eventually};
use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request};
use std::future::Future;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

/// A connection of a client that keeps to the rules.
pub struct H2 {
    runtime: Runtime,
    sender: SendRequest<Bytes>,
    connection: JoinHandle<Result<(), h2::Error>>,
}

/// A request under way.
pub struct Sent {
    pub response: ResponseFuture,
    pub body: SendStream<Bytes>,
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// A GET or POST over `http` to `api.example`.
pub fn h2_request(method: &str, path: &str, headers: &[(&str, &str)]) -> Request<()> {
    let mut request = Request::builder().method(method).uri(format!("http://api.example{path}"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

/// A keyed POST by tenant "alice".
pub fn h2_post(path: &str, key: &str) -> Request<()> {
    let headers = [("authorization", "Bearer alice"), ("content-type", "application/json"), ("idempotency-key", key)];
    h2_request("POST", path, &headers)
}

impl H2 {
    /// In clear, with prior knowledge.
    pub fn connect(addr: SocketAddr) -> Self {
        Self::connect_with(addr, &mut h2::client::Builder::new())
    }

    pub fn connect_with(addr: SocketAddr, builder: &mut h2::client::Builder) -> Self {
        let runtime = runtime();
        let stream = runtime.block_on(tokio::net::TcpStream::connect(addr)).unwrap();
        Self::over(runtime, stream, builder)
    }

    /// Over TLS, if the gateway agrees to HTTP/2.
    pub fn connect_tls(addr: SocketAddr, config: rustls::ClientConfig) -> std::io::Result<Self> {
        let runtime = runtime();
        let stream = runtime.block_on(async {
            let stream = tokio::net::TcpStream::connect(addr).await?;
            let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
            connector.connect("localhost".try_into().unwrap(), stream).await
        })?;
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()));
        Ok(Self::over(runtime, stream, &mut h2::client::Builder::new()))
    }

    fn over<S>(runtime: Runtime, stream: S, builder: &mut h2::client::Builder) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = runtime.block_on(builder.handshake(stream)).unwrap();
        let connection = runtime.spawn(connection);
        Self { runtime, sender, connection }
    }

    #[track_caller]
    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, future).await }).expect("it takes too long")
    }

    /// Sends the head of a request; waits for a free stream.
    #[track_caller]
    pub fn try_send(&mut self, request: Request<()>, end: bool) -> Result<Sent, h2::Error> {
        let sender = self.sender.clone();
        let mut sender = self.run(async move { sender.ready().await })?;
        let (response, body) = sender.send_request(request, end)?;
        self.sender = sender;
        Ok(Sent { response, body })
    }

    #[track_caller]
    pub fn send(&mut self, request: Request<()>, body: &str) -> Sent {
        let mut sent = self.try_send(request, body.is_empty()).unwrap();
        if !body.is_empty() {
            // It may have been answered, and its stream reset, without the body.
            let _ = sent.body.send_data(Bytes::copy_from_slice(body.as_bytes()), true);
        }
        sent
    }

    /// The whole response, with its trailers.
    #[track_caller]
    pub fn receive_all(&self, sent: Sent) -> Result<(Response, Option<HeaderMap>), h2::Error> {
        self.run(async move {
            let (head, mut body) = sent.response.await?.into_parts();
            let headers = head.headers.iter();
            let headers = headers.map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect();
            let mut bytes = Vec::new();
            while let Some(chunk) = body.data().await {
                let chunk = chunk?;
                body.flow_control().release_capacity(chunk.len())?;
                bytes.extend_from_slice(&chunk);
            }
            let trailers = body.trailers().await?;
            Ok((Response { status: head.status.as_u16(), headers, body: bytes }, trailers))
        })
    }

    #[track_caller]
    pub fn receive(&self, sent: Sent) -> Response {
        self.receive_all(sent).unwrap().0
    }

    /// The head of the response alone.
    #[track_caller]
    pub fn receive_head(&self, sent: Sent) -> http::Response<RecvStream> {
        self.run(sent.response).unwrap()
    }

    /// One request and its response.
    #[track_caller]
    pub fn call(&mut self, request: Request<()>, body: &str) -> Response {
        let sent = self.send(request, body);
        self.receive(sent)
    }

    /// Whether the connection has ended by itself.
    pub fn ended(&self) -> bool {
        self.connection.is_finished()
    }

    /// Waits until the connection ends; its error, if it did not end in order.
    #[track_caller]
    pub fn wait_for_end(self) -> Result<(), h2::Error> {
        let Self { runtime, sender, connection } = self;
        eventually("the connection ends", || connection.is_finished().then_some(()));
        drop(sender);
        runtime.block_on(connection).unwrap()
    }
}

/// The reason for which a stream was reset.
pub fn reason<T: std::fmt::Debug>(result: Result<T, h2::Error>) -> Option<Reason> {
    result.unwrap_err().reason()
}

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn new(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Self {
        Self { kind, flags, stream, payload: payload.to_vec() }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = u32::try_from(self.payload.len()).unwrap().to_be_bytes()[1..].to_vec();
        bytes.extend([self.kind, self.flags]);
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    /// A number in the payload: the reason of RST_STREAM at 0, of GOAWAY at 4.
    pub fn number_at(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }
}

/// Header fields as HPACK literals without indexing (RFC 7541 §6.2.2).
pub fn hpack(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    let string = |block: &mut Vec<u8>, text: &str| {
        let mut len = text.len();
        if len < 127 {
            block.push(u8::try_from(len).unwrap());
        } else {
            block.push(127);
            len -= 127;
            while len >= 128 {
                block.push(u8::try_from(len % 128 + 128).unwrap());
                len /= 128;
            }
            block.push(u8::try_from(len).unwrap());
        }
        block.extend(text.as_bytes());
    };
    for (name, value) in fields {
        block.push(0);
        string(&mut block, name);
        string(&mut block, value);
    }
    block
}

/// A request's pseudo-header fields, and more.
pub fn fields<'a>(method: &'a str, path: &'a str, more: &[(&'a str, &'a str)]) -> Vec<u8> {
    let pseudo = [(":method", method), (":scheme", "http"), (":authority", "api.example"), (":path", path)];
    hpack(&[&pseudo, more].concat())
}

/// A client that sends exactly these frames.
pub struct RawH2 {
    pub stream: TcpStream,
}

impl RawH2 {
    /// With preface and SETTINGS.
    pub fn connect(addr: SocketAddr) -> Self {
        let mut client = Self::silent(addr);
        client.send(PREFACE);
        client.frame(SETTINGS, 0, 0, &[]);
        client
    }

    pub fn silent(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream }
    }

    /// Sends as much as the gateway takes.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    pub fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> bool {
        self.send(&Frame::new(kind, flags, stream, payload).encode())
    }

    /// A request without a body.
    pub fn request(&mut self, stream: u32, block: &[u8]) -> bool {
        self.frame(HEADERS, END_HEADERS | END_STREAM, stream, block)
    }

    /// The next frame; `None`: the connection has ended.
    #[track_caller]
    pub fn read(&mut self) -> Option<Frame> {
        let mut header = [0; 9];
        self.read_exact(&mut header)?;
        let len = usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
        let mut payload = vec![0; len];
        self.read_exact(&mut payload)?;
        let stream = u32::from_be_bytes(header[5..9].try_into().unwrap());
        Some(Frame { kind: header[3], flags: header[4], stream, payload })
    }

    #[track_caller]
    fn read_exact(&mut self, bytes: &mut [u8]) -> Option<()> {
        match self.stream.read_exact(bytes) {
            Ok(()) => Some(()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("nothing came for {PATIENCE:?}"),
            Err(_) => None,
        }
    }

    /// The next frame of a kind, on a stream; others are skipped. `None`: the connection ended before.
    #[track_caller]
    pub fn wait_for(&mut self, kind: u8, stream: u32) -> Option<Frame> {
        loop {
            let frame = self.read()?;
            if (frame.kind, frame.stream) == (kind, stream) && !(kind == SETTINGS && frame.flags & ACK != 0) {
                return Some(frame);
            }
        }
    }

    /// The reason of the GOAWAY that ends the connection; `None`: it ended without.
    #[track_caller]
    pub fn goaway(&mut self) -> Option<u32> {
        let mut reason = None;
        while let Some(frame) = self.read() {
            if frame.kind == GOAWAY {
                reason = Some(frame.number_at(4));
            }
        }
        reason
    }
}
