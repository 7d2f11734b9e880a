//! 2,000 slow clients of five kinds at once: others are served meanwhile, each slow one is gone after its limit, and memory
//! stays bounded. `ONCEGATE_SLOW_SECONDS` is the limit (3).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

#[path = "it/support/mod.rs"]
mod support;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::tls::{Authority, Files, TlsClient};
use support::{Gateway, Upstream, eventually, post, request};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const OF_EACH_KIND: usize = 400;
/// How far beyond its limit a client may live on a busy machine.
const SLACK: Duration = Duration::from_secs(20);
/// Resident memory that a slow client may cost on average, in KiB: one that does not read its response costs most.
const KIB_EACH: u64 = 128;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Headers,
    Body,
    Reader,
    Idle,
    Handshake,
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// Where the gateway listens: in clear, and by TLS.
#[derive(Clone)]
struct Addresses {
    clear: PathBuf,
    tls: SocketAddr,
}

impl Kind {
    async fn connect(self, at: &Addresses) -> Box<dyn Stream> {
        match self {
            Self::Handshake => Box::new(TcpStream::connect(at.tls).await.unwrap()),
            _ => Box::new(UnixStream::connect(&at.clear).await.unwrap()),
        }
    }

    /// What is sent at once.
    fn opening(self, n: usize) -> Vec<u8> {
        match self {
            Self::Headers => b"GET / HTTP/1.1\r\nHost: a\r\nX: ".to_vec(),
            Self::Body => post("/posts", &format!("slow-{n}"), "").replace("Length: 0", "Length: 1000").into(),
            Self::Reader => request("GET", "/large", &[], "").into(),
            Self::Idle => Vec::new(),
            // A record of the handshake, of 512 bytes, and how it begins.
            Self::Handshake => vec![22, 3, 1, 2, 0, 1],
        }
    }

    /// Lives until the gateway ends it; how long that was.
    async fn live(self, n: usize, at: Addresses) -> Duration {
        let started = Instant::now();
        let mut stream = self.connect(&at).await;
        let trickles = matches!(self, Self::Headers | Self::Body | Self::Handshake);
        let _ = stream.write_all(&self.opening(n)).await;
        let mut chunk = [0; 1024];
        loop {
            if self == Self::Reader {
                // Reading would be progress. That the connection has ended shows in a write.
                sleep(Duration::from_millis(200)).await;
                if stream.write_all(b"\r\n").await.is_err() {
                    return started.elapsed();
                }
                continue;
            }
            match timeout(Duration::from_secs(1), stream.read(&mut chunk)).await {
                Ok(Ok(0) | Err(_)) => return started.elapsed(),
                Ok(Ok(_)) => {}
                Err(_) if trickles => drop(stream.write_all(b"x").await),
                Err(_) => {}
            }
        }
    }
}

/// Calls, over and over, until told to stop; the longest that one has taken.
fn behave(call: impl Fn(u64) -> u16, stop: &AtomicBool, answered: &AtomicU64) -> Duration {
    let mut longest = Duration::ZERO;
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let started = Instant::now();
        assert_eq!(call(n), 201);
        longest = longest.max(started.elapsed());
        answered.fetch_add(1, Ordering::Relaxed);
    }
    longest
}

fn over_unix(path: &PathBuf, text: &str) -> u16 {
    use std::io::{Read, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(support::PATIENCE)).unwrap();
    stream.write_all(text.replacen("\r\n", "\r\nConnection: close\r\n", 1).as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn slow_clients_hinder_nobody_and_are_gone_after_their_limits() {
    let seconds = std::env::var("ONCEGATE_SLOW_SECONDS").map_or(3, |text| text.parse().unwrap());
    let limit = Duration::from_secs(seconds);
    let upstream = Upstream::scripted(|request, reply| match request.target.as_str() {
        "/large" => reply.send(200, &[], vec![b'x'; 4 << 20]),
        _ => reply.send(201, &[], "{}"),
    });
    let authority = Authority::new("ours");
    let files = Files::new(&authority.certify(&["localhost"]), None);
    let clear = files.path("socket");
    let settings = format!(
        "{}server.limits.header_timeout = \"{seconds}s\"\nserver.limits.body_timeout = \"{seconds}s\"\n\
         cache.max_bytes = \"1MiB\"\nserver.limits.write_timeout = \"{seconds}s\"\nserver.limits.idle_timeout = \"{seconds}s\"\n",
        files.settings()
    );
    let listen = format!("[\"127.0.0.1:0\", \"unix:{}\"]", clear.display());
    let environment = [("ONCEGATE_SERVER__LISTEN", listen.as_str())];
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let gateway = Gateway::try_start(dir, &upstream.url(), &settings, &[], &environment).unwrap();
    let at = Addresses { clear, tls: gateway.addr };

    let idle_kib = gateway.rss_kib();
    let (stop, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let peak_kib = AtomicU64::new(0);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (lives, longest) = std::thread::scope(|scope| {
        let (stop, answered, at) = (&stop, &answered, &at);
        let config = authority.client(None, &[]);
        let callers = [
            scope.spawn(move || {
                behave(|n| over_unix(&at.clear, &post("/posts", &format!("good-{n}"), "{}")), stop, answered)
            }),
            scope.spawn(move || behave(|_| over_unix(&at.clear, &request("GET", "/", &[], "")), stop, answered)),
            scope.spawn(move || {
                let get = request("GET", "/", &[], "");
                let over_tls = |_| TlsClient::connect(at.tls, config.clone()).unwrap().call(&get).unwrap().status;
                behave(over_tls, stop, answered)
            }),
        ];
        let kinds = [Kind::Headers, Kind::Body, Kind::Reader, Kind::Idle, Kind::Handshake];
        let lives = runtime.block_on(async {
            let mut clients = JoinSet::new();
            for n in 0..OF_EACH_KIND {
                for kind in kinds {
                    let at = at.clone();
                    clients.spawn(async move { (kind, kind.live(n, at).await) });
                }
            }
            let mut lives = Vec::new();
            while let Some(ended) = clients.join_next().await {
                lives.push(ended.unwrap());
                peak_kib.fetch_max(gateway.rss_kib(), Ordering::Relaxed);
            }
            lives
        });
        stop.store(true, Ordering::Relaxed);
        let longest = callers.into_iter().map(|caller| caller.join().unwrap()).max().unwrap();
        (lives, longest)
    });
    for (kind, life) in &lives {
        assert!(*life >= limit, "{kind:?} was cut after {life:?}");
        assert!(*life <= limit + SLACK, "{kind:?} lived for {life:?}");
    }
    eventually("all are gone", || (gateway.metric("oncegate_connections") == 0.0).then_some(()));
    let grown_kib = peak_kib.load(Ordering::Relaxed).saturating_sub(idle_kib);
    eprintln!(
        "{} slow clients, limit {limit:?}: {} answers meanwhile, the slowest after {longest:?}; RSS {idle_kib} KiB, at most {grown_kib} KiB more",
        lives.len(),
        answered.load(Ordering::Relaxed)
    );
    assert!(grown_kib <= KIB_EACH * lives.len() as u64, "{grown_kib} KiB");
    let executed = upstream.requests();
    assert!(
        !executed.iter().any(|request| request.key().is_some_and(|key| key.starts_with("slow-"))),
        "none was whole"
    );
}
