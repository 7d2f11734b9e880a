//! A client on a raw socket: sends exactly these bytes, reads exactly one response.

use super::{PATIENCE, find};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Whether it was answered from a record.
    pub fn replayed(&self) -> bool {
        self.header("idempotency-replayed") == Some("true")
    }

    /// Asserts that it is one of the gateway's own answers.
    #[track_caller]
    pub fn expect_problem(&self, status: u16, code: &str) {
        assert_eq!((self.status, self.header("content-type")), (status, Some("application/problem+json")), "{self:?}");
        let body = self.json();
        assert_eq!(body["code"], code, "{body}");
        assert_eq!(body["status"], status, "{body}");
        assert_eq!(body["type"], format!("urn:oncegate:problem:{code}"), "{body}");
        assert!(body["title"].as_str().is_some_and(|title| !title.is_empty()), "{body}");
        assert!(body["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{body}");
    }
}

pub struct Client {
    pub stream: TcpStream,
    buffer: Vec<u8>,
}

impl From<TcpStream> for Client {
    fn from(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, buffer: Vec::new() }
    }
}

impl Client {
    pub fn connect(addr: SocketAddr) -> Self {
        Self::try_connect(addr).unwrap()
    }

    /// Nobody may be listening.
    pub fn try_connect(addr: SocketAddr) -> std::io::Result<Self> {
        TcpStream::connect(addr).map(Self::from)
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// Sends as much as the gateway takes; it may have answered and closed already.
    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref());
    }

    pub fn half_close(&mut self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    pub fn reset(self) {
        super::reset(&self.stream);
    }

    /// The next response to a request that is not HEAD.
    #[track_caller]
    pub fn read(&mut self) -> Response {
        self.try_read().unwrap_or_else(|| panic!("the connection ended without a response: {:?}", self.buffer))
    }

    /// `None`: the connection ended before a response was whole.
    pub fn try_read(&mut self) -> Option<Response> {
        loop {
            let response = self.try_read_any()?;
            if response.status >= 200 {
                return Some(response);
            }
        }
    }

    /// As `try_read`, interim responses included.
    pub fn try_read_any(&mut self) -> Option<Response> {
        let head_len = loop {
            if let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            self.fill()?;
        };
        let head = String::from_utf8_lossy(&self.buffer.drain(..head_len).collect::<Vec<_>>()).into_owned();
        let mut lines = head.lines();
        let status: u16 = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let headers = super::parse_headers(lines);
        let body = if status < 200 || status == 204 || status == 304 {
            Vec::new()
        } else if find(&headers, "transfer-encoding").is_some() {
            let Self { stream, buffer } = self;
            super::read_chunked(buffer, |buffer| fill(stream, buffer))?
        } else if let Some(len) = find(&headers, "content-length") {
            let len: usize = len.parse().unwrap();
            while self.buffer.len() < len {
                self.fill()?;
            }
            self.buffer.drain(..len).collect()
        } else {
            while self.fill().is_some() {}
            std::mem::take(&mut self.buffer)
        };
        Some(Response { status, headers, body })
    }

    /// Everything up to the end of a head. What comes behind it stays to be read.
    #[track_caller]
    pub fn read_head(&mut self) -> String {
        loop {
            if let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                return String::from_utf8(self.buffer.drain(..at + 4).collect()).unwrap();
            }
            self.fill().unwrap_or_else(|| panic!("the connection ended within a head: {:?}", self.buffer));
        }
    }

    #[track_caller]
    pub fn read_exactly(&mut self, len: usize) -> Vec<u8> {
        while self.buffer.len() < len {
            self.fill().unwrap_or_else(|| panic!("the connection ended: {:?}", self.buffer));
        }
        self.buffer.drain(..len).collect()
    }

    /// Whether the connection ends, whatever comes before that.
    pub fn ends(&mut self) -> bool {
        while self.fill().is_some() {}
        true
    }

    /// Some more bytes, as they come.
    pub fn read_some(&mut self) -> Option<Vec<u8>> {
        if self.buffer.is_empty() {
            self.fill()?;
        }
        Some(std::mem::take(&mut self.buffer))
    }

    /// Gives back what was read from the stream directly.
    pub fn put_back(&mut self, bytes: Vec<u8>) {
        self.buffer.splice(0..0, bytes);
    }

    /// Whether the gateway has ended the connection, with nothing more to read. Waits for it.
    pub fn at_end(&mut self) -> bool {
        self.buffer.is_empty()
            && match self.stream.read(&mut [0; 1]) {
                Ok(len) => len == 0,
                Err(error) => error.kind() == ErrorKind::ConnectionReset,
            }
    }

    fn fill(&mut self) -> Option<()> {
        fill(&mut self.stream, &mut self.buffer)
    }
}

fn fill(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<()> {
    let mut chunk = [0; 65536];
    match stream.read(&mut chunk) {
        Ok(0) => None,
        Ok(len) => {
            buffer.extend_from_slice(&chunk[..len]);
            Some(())
        }
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            panic!("nothing came for {PATIENCE:?}; so far: {:?}", String::from_utf8_lossy(buffer))
        }
        Err(_) => None,
    }
}

/// The text of a request with a Content-Length (where there is a body or the method is POST).
pub fn request(method: &str, target: &str, headers: &[(&str, &str)], body: &str) -> String {
    let mut text = format!("{method} {target} HTTP/1.1\r\nHost: api.example\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    if method == "POST" || !body.is_empty() {
        text += &format!("Content-Length: {}\r\n", body.len());
    }
    text + "\r\n" + body
}

/// A keyed POST of a JSON body by tenant "alice".
pub fn post(target: &str, key: &str, body: &str) -> String {
    let headers = [("Authorization", "Bearer alice"), ("Content-Type", "application/json"), ("Idempotency-Key", key)];
    request("POST", target, &headers, body)
}

/// Sends one request on a connection of its own.
#[track_caller]
pub fn call(addr: SocketAddr, request: impl AsRef<[u8]>) -> Response {
    let mut client = Client::connect(addr);
    client.send(request);
    client.read()
}
