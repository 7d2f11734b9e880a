//! A scripted upstream on raw sockets: it records what it receives, byte for byte, and answers as it is told.

use super::{PATIENCE, find};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Received {
    /// Which connection it came on, counted from 0.
    pub connection: usize,
    /// Which request it is, counted from 1.
    pub number: usize,
    /// Request line and headers, as sent.
    pub head: String,
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
    /// Decoded, if it was chunked.
    pub body: Vec<u8>,
}

impl Received {
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    pub fn headers(&self, name: &str) -> Vec<&str> {
        let lines = self.headers.iter().filter(|(line, _)| line.eq_ignore_ascii_case(name));
        lines.map(|(_, value)| value.as_str()).collect()
    }

    pub fn key(&self) -> Option<&str> {
        self.header("idempotency-key")
    }
}

/// The way back to the gateway.
pub struct Reply<'a> {
    stream: &'a mut TcpStream,
    keep: bool,
}

impl Reply<'_> {
    /// A response with a Content-Length.
    pub fn send(&mut self, status: u16, headers: &[(&str, &str)], body: impl AsRef<[u8]>) {
        let body = body.as_ref();
        let mut head = format!("HTTP/1.1 {status} Status\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("Content-Length: {}\r\n\r\n", body.len());
        self.raw(head);
        self.raw(body);
    }

    /// Bytes as they are.
    pub fn raw(&mut self, bytes: impl AsRef<[u8]>) {
        // The gateway may be gone: that is the test's business.
        let _ = self.stream.write_all(bytes.as_ref());
        let _ = self.stream.flush();
    }

    /// Ends the connection after this answer.
    pub fn close(&mut self) {
        self.keep = false;
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Ends the connection with a reset, and no orderly end before it.
    pub fn reset(&mut self) {
        super::reset(self.stream);
        self.keep = false;
    }

    /// Waits until the gateway closes the connection; whether it did so in time.
    pub fn closed_by_peer(&mut self) -> bool {
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        !matches!(self.stream.read(&mut [0; 1024]), Ok(1..) | Err(_)) || {
            matches!(self.stream.read(&mut [0; 1024]), Ok(0))
        }
    }
}

type Script = Arc<dyn Fn(&Received, &mut Reply<'_>) + Send + Sync>;

#[derive(Default)]
struct Log {
    requests: Mutex<Vec<Received>>,
    changed: Condvar,
    connections: Mutex<usize>,
}

/// Dropped, it stops accepting.
pub struct Upstream {
    pub addr: SocketAddr,
    log: Arc<Log>,
}

impl Upstream {
    /// Answers every request with 201 and `{"n":<number of the request>}`.
    pub fn counting() -> Self {
        Self::scripted(|request, reply| {
            reply.send(201, &[("Content-Type", "application/json")], format!("{{\"n\":{}}}", request.number));
        })
    }

    pub fn scripted(script: impl Fn(&Received, &mut Reply<'_>) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Self::on(listener, script)
    }

    /// Holds keyed requests until the gate opens; then `run` and the number of the request.
    pub fn holding(gate: &Gate) -> Self {
        let gate = gate.clone();
        Self::scripted(move |request, reply| {
            if request.key().is_some() {
                gate.wait();
            }
            reply.send(201, &[], format!("run {}", request.number));
        })
    }

    /// On a given port: for an upstream that comes up late.
    pub fn on(listener: TcpListener, script: impl Fn(&Received, &mut Reply<'_>) + Send + Sync + 'static) -> Self {
        let addr = listener.local_addr().unwrap();
        let log = Arc::new(Log::default());
        let (shared, script): (_, Script) = (Arc::clone(&log), Arc::new(script));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { continue };
                let connection = {
                    let mut connections = shared.connections.lock().unwrap();
                    *connections += 1;
                    *connections - 1
                };
                let (shared, script) = (Arc::clone(&shared), Arc::clone(&script));
                std::thread::spawn(move || serve(stream, connection, &shared, &script));
            }
        });
        Self { addr, log }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    pub fn requests(&self) -> Vec<Received> {
        self.log.requests.lock().unwrap().clone()
    }

    pub fn count(&self) -> usize {
        self.log.requests.lock().unwrap().len()
    }

    pub fn connections(&self) -> usize {
        *self.log.connections.lock().unwrap()
    }

    /// How often a key was executed.
    pub fn executions(&self, key: &str) -> usize {
        self.requests().iter().filter(|request| request.key() == Some(key)).count()
    }

    /// Waits until `count` requests have arrived whole, and returns them.
    pub fn wait_for(&self, count: usize) -> Vec<Received> {
        let deadline = Instant::now() + PATIENCE;
        let mut requests = self.log.requests.lock().unwrap();
        while requests.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{count} requests expected upstream, {} arrived", requests.len());
            requests = self.log.changed.wait_timeout(requests, left).unwrap().0;
        }
        requests.clone()
    }
}

fn serve(mut stream: TcpStream, connection: usize, log: &Log, script: &Script) {
    stream.set_nodelay(true).unwrap();
    let mut buffer = Vec::new();
    while let Some(mut request) = receive(&mut stream, &mut buffer, connection) {
        {
            let mut requests = log.requests.lock().unwrap();
            request.number = requests.len() + 1;
            requests.push(request.clone());
            log.changed.notify_all();
        }
        let mut reply = Reply { stream: &mut stream, keep: true };
        script(&request, &mut reply);
        if !reply.keep {
            return;
        }
    }
}

/// Reads one request whole; `None` at the end of the connection.
fn receive(stream: &mut TcpStream, buffer: &mut Vec<u8>, connection: usize) -> Option<Received> {
    let head_len = loop {
        if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        fill(stream, buffer)?;
    };
    let head = String::from_utf8_lossy(&buffer.drain(..head_len).collect::<Vec<_>>()).into_owned();
    let mut lines = head.lines();
    let mut words = lines.next()?.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let headers = super::parse_headers(lines);
    let body = if find(&headers, "transfer-encoding").is_some() {
        super::read_chunked(buffer, |buffer| fill(stream, buffer))?
    } else {
        let len = find(&headers, "content-length").map_or(0, |len| len.parse().unwrap());
        while buffer.len() < len {
            fill(stream, buffer)?;
        }
        buffer.drain(..len).collect()
    };
    Some(Received { connection, number: 0, head, method, target, headers, body })
}

fn fill(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<()> {
    let mut chunk = [0; 65536];
    let len = stream.read(&mut chunk).ok().filter(|len| *len > 0)?;
    buffer.extend_from_slice(&chunk[..len]);
    Some(())
}

/// Something that a script waits for until the test opens it.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    pub fn is_open(&self) -> bool {
        *self.0.0.lock().unwrap()
    }

    pub fn wait(&self) {
        let mut open = self.0.0.lock().unwrap();
        while !*open {
            open = self.0.1.wait(open).unwrap();
        }
    }
}
