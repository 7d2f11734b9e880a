//! HTTP/1.1 on the wire, read by the letter of RFC 9112: of what this parser takes, no other can make something else.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a byte may take that is certain to come.
const SILENCE_MAX: Duration = Duration::from_secs(10);

#[derive(Clone, Debug)]
pub struct Message {
    /// Request line or status line.
    pub start: String,
    pub fields: Vec<(String, Vec<u8>)>,
    /// Decoded, if it was chunked.
    pub body: Vec<u8>,
    /// The whole message as it came.
    pub bytes: Vec<u8>,
}

impl Message {
    /// The one value of a field; `None` if it is on no line or on several.
    pub fn field(&self, name: &str) -> Option<&str> {
        let mut lines = self.fields.iter().filter(|(line, _)| line.eq_ignore_ascii_case(name));
        let (_, value) = lines.next()?;
        lines.next().is_none().then(|| std::str::from_utf8(value).ok())?
    }

    pub fn status(&self) -> u16 {
        self.start.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    /// Method, target and body in one line.
    pub fn echo(&self) -> String {
        let line = self.start.trim_end_matches(" HTTP/1.1");
        format!("{line} {}", String::from_utf8_lossy(&self.body)).trim_end().to_owned()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Request,
    Response,
    /// A response without a body, whatever its fields say.
    ResponseToHead,
}

/// One end of a connection.
pub struct Wire {
    stream: TcpStream,
    buffer: Vec<u8>,
    received: Arc<AtomicUsize>,
}

impl Wire {
    pub fn connect(addr: SocketAddr) -> Self {
        Self::new(TcpStream::connect(addr).unwrap(), Arc::default(), Some(SILENCE_MAX))
    }

    fn new(stream: TcpStream, received: Arc<AtomicUsize>, patience: Option<Duration>) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(patience).unwrap();
        Self { stream, buffer: Vec::new(), received }
    }

    /// Sends as much as the other side takes; it may have answered and closed already.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref());
    }

    /// The next message, by the letter. `None`: the connection ended before its first byte.
    pub fn next(&mut self, kind: Kind) -> Result<Option<Message>, String> {
        if self.buffer.is_empty() && !self.fill()? {
            return Ok(None);
        }
        let mut at = 0;
        let start = self.line(&mut at)?;
        let start = String::from_utf8(start).map_err(|_| "a start line that is not ASCII".to_owned())?;
        check_start(&start, kind)?;
        let fields = self.fields(&mut at)?;
        let message = Message { start, fields, body: Vec::new(), bytes: Vec::new() };
        let body = match framing(&message, kind)? {
            Framing::Len(len) => {
                while self.buffer.len() < at + len {
                    self.more()?;
                }
                let body = self.buffer[at..at + len].to_vec();
                at += len;
                body
            }
            Framing::Chunked => self.chunks(&mut at)?,
            Framing::Close => {
                while self.fill()? {}
                let body = self.buffer[at..].to_vec();
                at = self.buffer.len();
                body
            }
        };
        Ok(Some(Message { body, bytes: self.buffer.drain(..at).collect(), ..message }))
    }

    /// The next final response to a request that is not HEAD.
    pub fn response(&mut self) -> Result<Message, String> {
        loop {
            let message = self.next(Kind::Response)?.ok_or(UNANSWERED)?;
            if message.status() >= 200 {
                return Ok(message);
            }
        }
    }

    /// Waits for the end of the connection; nothing more may come before it.
    pub fn ended(&mut self) -> Result<(), String> {
        let more = self.fill()?;
        if more || !self.buffer.is_empty() {
            return Err(format!("more has come: {:?}", String::from_utf8_lossy(&self.buffer)));
        }
        Ok(())
    }

    /// Everything until the end of the connection.
    pub fn rest(&mut self) -> Result<Vec<u8>, String> {
        while self.fill()? {}
        Ok(std::mem::take(&mut self.buffer))
    }

    /// `false`: the connection has ended.
    fn fill(&mut self) -> Result<bool, String> {
        let mut chunk = [0; 65536];
        match self.stream.read(&mut chunk) {
            Ok(len) => {
                self.received.fetch_add(len, Ordering::AcqRel);
                self.buffer.extend_from_slice(&chunk[..len]);
                Ok(len > 0)
            }
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                let so_far = String::from_utf8_lossy(&self.buffer).into_owned();
                Err(format!("nothing came for {SILENCE_MAX:?}; so far: {so_far:?}"))
            }
            Err(_) => Ok(false),
        }
    }

    fn more(&mut self) -> Result<(), String> {
        if self.fill()? { Ok(()) } else { Err(CUT_OFF.to_owned()) }
    }

    /// The line that begins at `at`, and sets `at` behind its CRLF.
    fn line(&mut self, at: &mut usize) -> Result<Vec<u8>, String> {
        loop {
            if let Some(len) = self.buffer[*at..].iter().position(|&byte| byte == b'\n') {
                let line = &self.buffer[*at..*at + len];
                let Some(line) = line.strip_suffix(b"\r") else {
                    return Err(format!("a bare LF: {:?}", String::from_utf8_lossy(line)));
                };
                if line.iter().any(|byte| matches!(byte, b'\r' | 0)) {
                    return Err(format!("a bare CR or NUL: {:?}", String::from_utf8_lossy(line)));
                }
                let line = line.to_vec();
                *at += len + 1;
                return Ok(line);
            }
            self.more()?;
        }
    }

    fn fields(&mut self, at: &mut usize) -> Result<Vec<(String, Vec<u8>)>, String> {
        let mut fields = Vec::new();
        loop {
            let line = self.line(at)?;
            if line.is_empty() {
                return Ok(fields);
            }
            let wrong = |what: &str| format!("{what}: {:?}", String::from_utf8_lossy(&line));
            let colon = line.iter().position(|&byte| byte == b':').ok_or_else(|| wrong("no colon"))?;
            let (name, value) = line.split_at(colon);
            if name.is_empty() || !name.iter().all(|&byte| is_token(byte)) {
                return Err(wrong("not a field name"));
            }
            let value = value[1..].trim_ascii();
            if value.iter().any(|&byte| byte == 0x7f || byte < b' ' && byte != b'\t') {
                return Err(wrong("a control character"));
            }
            fields.push((String::from_utf8_lossy(name).into_owned(), value.to_vec()));
        }
    }

    /// Chunks without extensions, and trailers that frame nothing.
    fn chunks(&mut self, at: &mut usize) -> Result<Vec<u8>, String> {
        let mut body = Vec::new();
        loop {
            let line = self.line(at)?;
            let digits = !line.is_empty() && line.len() <= 8 && line.iter().all(u8::is_ascii_hexdigit);
            let len = digits.then(|| usize::from_str_radix(std::str::from_utf8(&line).ok()?, 16).ok()).flatten();
            let len = len.ok_or_else(|| format!("a chunk size: {:?}", String::from_utf8_lossy(&line)))?;
            if len == 0 {
                let trailers = self.fields(at)?;
                let framing = ["content-length", "transfer-encoding", "host", "connection", "trailer"];
                match trailers.iter().find(|(name, _)| framing.iter().any(|f| name.eq_ignore_ascii_case(f))) {
                    Some((name, _)) => return Err(format!("{name} as a trailer")),
                    None => return Ok(body),
                }
            }
            while self.buffer.len() < *at + len + 2 {
                self.more()?;
            }
            body.extend_from_slice(&self.buffer[*at..*at + len]);
            *at += len;
            if !self.buffer[*at..].starts_with(b"\r\n") {
                return Err("no CRLF behind a chunk".to_owned());
            }
            *at += 2;
        }
    }
}

/// What [`Wire::next`] says of a message that has begun but not ended.
pub const CUT_OFF: &str = "cut off";
/// What [`Wire::response`] says if there is none.
pub const UNANSWERED: &str = "the connection ended without a response";

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn check_start(line: &str, kind: Kind) -> Result<(), String> {
    let words = line.splitn(3, ' ').collect::<Vec<_>>();
    let right = match (kind, words.as_slice()) {
        (Kind::Request, [method, target, "HTTP/1.1"]) => {
            let one_word = !target.is_empty() && target.bytes().all(|byte| byte > b' ' && byte != 0x7f);
            !method.is_empty() && method.bytes().all(is_token) && one_word && !target.contains('#')
        }
        (Kind::Response | Kind::ResponseToHead, ["HTTP/1.1" | "HTTP/1.0", status, reason]) => {
            let visible = reason.bytes().all(|byte| byte >= b' ' && byte != 0x7f);
            status.len() == 3 && matches!(status.parse(), Ok(100..=999)) && visible
        }
        _ => false,
    };
    right.then_some(()).ok_or_else(|| format!("a start line: {line:?}"))
}

enum Framing {
    Len(usize),
    Chunked,
    Close,
}

fn framing(message: &Message, kind: Kind) -> Result<Framing, String> {
    let all = |name: &str| {
        let lines = message.fields.iter().filter(|(line, _)| line.eq_ignore_ascii_case(name));
        lines.map(|(_, value)| String::from_utf8_lossy(value).into_owned()).collect::<Vec<_>>()
    };
    let (codings, lengths, hosts) = (all("transfer-encoding"), all("content-length"), all("host"));
    if kind == Kind::Request && hosts.len() != 1 {
        return Err(format!("{} Host lines: {:?}", hosts.len(), message.fields));
    }
    let framing = match (codings.as_slice(), lengths.as_slice()) {
        ([], []) if kind == Kind::Request => Framing::Len(0),
        ([], []) => Framing::Close,
        ([coding], []) if coding == "chunked" => Framing::Chunked,
        ([], [len]) => {
            let plain = len.bytes().all(|byte| byte.is_ascii_digit()) && (len == "0" || !len.starts_with('0'));
            let len = plain.then(|| len.parse().ok()).flatten();
            Framing::Len(len.ok_or_else(|| format!("a length: {lengths:?}"))?)
        }
        _ => return Err(format!("framed by {codings:?} and {lengths:?}")),
    };
    let status = if kind == Kind::Request { 0 } else { message.status() };
    match (status, &framing) {
        (100..=199 | 204, Framing::Len(_) | Framing::Chunked) => Err(format!("{status} with a length")),
        (100..=199 | 204 | 304, _) => Ok(Framing::Len(0)),
        _ if kind == Kind::ResponseToHead => Ok(Framing::Len(0)),
        _ => Ok(framing),
    }
}

/// What has come to an upstream.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Messages, and what was wrong with what is none.
    pub messages: Vec<Result<Message, String>>,
    pub bytes: usize,
    pub connections: usize,
}

impl Seen {
    pub fn echoes(&self) -> Result<Vec<String>, String> {
        self.messages.iter().cloned().map(|message| message.map(|message| message.echo())).collect()
    }
}

#[derive(Default)]
struct Shared {
    messages: Mutex<Vec<Result<Message, String>>>,
    connections: AtomicUsize,
    bytes: Arc<AtomicUsize>,
    answer: Mutex<Option<Vec<u8>>>,
}

/// An upstream that reads by the letter, and answers a request with [`Message::echo`] or as it has been told.
pub struct Tap {
    addr: SocketAddr,
    shared: Arc<Shared>,
}

impl Tap {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tap = Self { addr: listener.local_addr().unwrap(), shared: Arc::default() };
        let shared = Arc::clone(&tap.shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                shared.connections.fetch_add(1, Ordering::AcqRel);
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || serve(stream, &shared));
            }
        });
        tap
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// What it has received since this was asked last.
    pub fn seen(&self) -> Seen {
        Seen {
            messages: std::mem::take(&mut self.shared.messages.lock().unwrap()),
            bytes: self.shared.bytes.swap(0, Ordering::AcqRel),
            connections: self.shared.connections.swap(0, Ordering::AcqRel),
        }
    }

    /// From now on answers requests with these bytes (without a length in them, the connection ends), or as before.
    pub fn answer(&self, bytes: Option<&[u8]>) {
        *self.shared.answer.lock().unwrap() = bytes.map(<[u8]>::to_vec);
    }
}

fn serve(stream: TcpStream, shared: &Shared) {
    let mut wire = Wire::new(stream, Arc::clone(&shared.bytes), None);
    loop {
        let message = match wire.next(Kind::Request) {
            Ok(None) => return,
            Ok(Some(message)) => message,
            Err(wrong) => return shared.messages.lock().unwrap().push(Err(wrong)),
        };
        let echo = message.echo();
        let told = shared.answer.lock().unwrap().clone();
        shared.messages.lock().unwrap().push(Ok(message));
        let answer = told.unwrap_or_else(|| {
            let body = if echo.starts_with("HEAD ") { "" } else { echo.as_str() };
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", echo.len()).into_bytes()
        });
        wire.send(&answer);
        let head = String::from_utf8_lossy(&answer).to_ascii_lowercase();
        let bodyless =
            echo.starts_with("HEAD ") || head.starts_with("http/1.1 204") || head.starts_with("http/1.1 304");
        if !bodyless && !head.contains("content-length:") && !head.contains("transfer-encoding:") {
            return;
        }
    }
}
