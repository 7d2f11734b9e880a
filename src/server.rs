//! Listeners, connections, limits and the drain.

mod connection;
mod frames;
mod http2;
pub mod inherit;
mod timed_io;
pub mod tls;
pub mod workers;

use crate::gateway::Gateway;
use crate::gateway::problem::{Code, Problem};
use crate::gateway::tunnel::KEEPALIVE;
use crate::telemetry::Metrics;
use connection::Setting;
use socket2::SockRef;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tls::Tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tokio::time::Instant;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use workers::Workers;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `host:port`; a name is resolved when bound.
    Tcp(String),
    Unix(PathBuf),
}

impl Address {
    /// Whether only this machine can reach it, as far as the address tells: loopback, or a Unix socket.
    #[must_use]
    pub fn is_local(&self) -> bool {
        let Self::Tcp(address) = self else { return true };
        let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
        let ip = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).parse::<IpAddr>();
        ip.map_or_else(|_| host.eq_ignore_ascii_case("localhost"), |ip| ip.to_canonical().is_loopback())
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// `[server]` and the part of `[server.limits]` that belongs to connections.
#[derive(Clone, Debug)]
pub struct Options {
    pub listen: Vec<Address>,
    /// Worker threads; 0: one per core.
    pub workers: usize,
    pub drain_delay: Duration,
    pub drain_timeout: Duration,
    pub limits: Limits,
    /// Of all TCP addresses; `None`: plain.
    pub tls: Option<Arc<Tls>>,
}

#[derive(Clone, Debug)]
pub struct Limits {
    pub header_timeout: Duration,
    pub idle_timeout: Duration,
    pub write_timeout: Duration,
    pub max_header_bytes: usize,
    pub max_connections: usize,
}

/// A socket that is being listened on.
pub enum Listener {
    Tcp(TcpListener),
    Unix {
        socket: UnixListener,
        path: PathBuf,
        /// Whether the file is to go with the socket.
        owned: bool,
    },
}

/// An address could not be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {error}; choose another address or stop what uses it")]
pub struct BindError {
    address: Address,
    #[source]
    error: io::Error,
}

impl Listener {
    /// Binds an address.
    ///
    /// # Errors
    /// Says which address and why.
    pub async fn bind(address: &Address) -> Result<Self, BindError> {
        let bound = match address {
            Address::Tcp(name) => bind_tcp(name).await.map(Self::Tcp),
            Address::Unix(path) => bind_unix(path).map(|socket| Self::Unix { socket, path: path.clone(), owned: true }),
        };
        bound.map_err(|error| BindError { address: address.clone(), error })
    }

    /// The address it has really got (a port of 0 has become a real one).
    #[must_use]
    pub fn address(&self) -> Address {
        match self {
            Self::Tcp(listener) => {
                let address =
                    listener.local_addr().map_or_else(|error| error.to_string(), |address| address.to_string());
                Address::Tcp(address)
            }
            Self::Unix { path, .. } => Address::Unix(path.clone()),
        }
    }

    /// Accepts one connection; tells the peer's address where there is one.
    ///
    /// # Errors
    /// The operating system's, such as too many open files.
    pub(crate) async fn accept(&self) -> io::Result<(Accepted, Option<IpAddr>)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok((Accepted(Either::Left(stream.into_std()?)), Some(peer.ip())))
            }
            Self::Unix { socket, .. } => {
                let (stream, _) = socket.accept().await?;
                Ok((Accepted(Either::Right(stream.into_std()?)), None))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix { path, owned: true, .. } = self {
            // Left over, it would only be in the way of the next start, which removes it itself.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A client's connection that belongs to no runtime yet.
pub(crate) struct Accepted(Either<std::net::TcpStream, std::os::unix::net::UnixStream>);

impl Accepted {
    /// Gives it to the runtime that this is called within.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn join_runtime(self) -> io::Result<Stream> {
        match self.0 {
            Either::Left(stream) => TcpStream::from_std(stream).map(Stream::Left),
            Either::Right(stream) => UnixStream::from_std(stream).map(Stream::Right),
        }
    }
}

/// A client's connection.
pub(crate) type Stream = Either<TcpStream, UnixStream>;

const BACKLOG: u32 = 1024;

async fn bind_tcp(name: &str) -> io::Result<TcpListener> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in tokio::net::lookup_host(name).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let bound = socket.and_then(|socket| {
            socket.set_reuseaddr(true)?;
            // Accepted connections inherit it.
            SockRef::from(&socket).set_tcp_keepalive(&KEEPALIVE)?;
            socket.bind(address)?;
            socket.listen(BACKLOG)
        });
        match bound {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A socket file that nobody listens on any more is replaced.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    UnixListener::bind(path)
}

/// Serves client connections.
pub struct Server {
    workers: Workers,
    /// One for each worker.
    gateways: Vec<Arc<Gateway>>,
    limits: Limits,
    tls: Option<Arc<Tls>>,
    metrics: Metrics,
    connections: TaskTracker,
    open: Arc<AtomicUsize>,
    /// Cancelled when the drain begins.
    drain: CancellationToken,
    /// Cancelled when the listeners close.
    close: CancellationToken,
}

impl Server {
    /// `gateways`: one for each worker.
    #[must_use]
    pub fn new(
        workers: Workers,
        gateways: Vec<Arc<Gateway>>,
        limits: Limits,
        tls: Option<Arc<Tls>>,
        metrics: Metrics,
    ) -> Arc<Self> {
        Arc::new(Self {
            workers,
            gateways,
            limits,
            tls,
            metrics,
            connections: TaskTracker::new(),
            open: Arc::new(AtomicUsize::new(0)),
            drain: CancellationToken::new(),
            close: CancellationToken::new(),
        })
    }

    /// Accepts connections until the listeners are to close.
    pub async fn accept(self: Arc<Self>, listener: Listener) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.close.cancelled() => return,
            };
            match accepted {
                Ok((stream, ip)) => self.take(stream, ip),
                Err(error) => {
                    // Out of file descriptors, most likely: others will close theirs.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// Gives a connection to a worker. It stays there.
    fn take(&self, stream: Accepted, ip: Option<IpAddr>) {
        let position = self.workers.least_busy();
        let Some((worker, gateway)) = self.workers.iter().zip(&self.gateways).nth(position) else { return };
        let max = self.limits.max_connections;
        // A Unix socket's peers are on this machine.
        let tls = self.tls.clone().filter(|_| matches!(stream.0, Either::Left(_)));
        let one_more = |open: usize| (open < max).then_some(open + 1);
        if self.open.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_err() {
            self.metrics.connections_refused.inc();
            // Saying why over TLS would take a handshake, which is more than a request costs.
            if tls.is_none() {
                worker.runtime.spawn(refuse(stream));
            }
            return;
        }
        let place = Place::new([&self.open, &worker.connections].map(Arc::clone), self.metrics.clone());
        let setting = Setting {
            gateway: Arc::clone(gateway),
            peer: gateway.peer(ip),
            limits: self.limits.clone(),
            drain: self.drain.clone(),
        };
        let serve = async move {
            match (stream.join_runtime(), tls) {
                (Ok(stream), Some(tls)) => connection::serve_tls(stream, &tls, place, setting).await,
                (Ok(stream), None) => connection::serve(stream, None, place, setting).await,
                (Err(error), _) => tracing::warn!(%error, "cannot serve a connection"),
            }
        };
        self.connections.spawn_on(serve, &worker.runtime);
    }

    /// Stops: from now on responses end their connections; the listeners close after `delay`; what is in flight gets
    /// `timeout` from then on. Then every claim that is still open is settled as unknown.
    pub async fn drain(&self, delay: Duration, timeout: Duration) {
        self.drain.cancel();
        tokio::time::sleep(delay).await;
        self.close.cancel();
        self.connections.close();
        let deadline = Instant::now() + timeout;
        if tokio::time::timeout_at(deadline, self.connections.wait()).await.is_err() {
            tracing::warn!(connections = self.connections.len(), "drain_timeout is over with connections still open");
        }
        // They share their tunnels and claims.
        let Some(gateway) = self.gateways.first() else { return };
        // Their connections have left the tracker above.
        let _ = tokio::time::timeout_at(deadline, gateway.tunnels_ended()).await;
        if tokio::time::timeout_at(deadline, gateway.claims_settled()).await.is_err() {
            tracing::warn!(claims = gateway.open_claims(), "drain_timeout is over with claims still open");
        }
        let tunnels = gateway.close_tunnels().await;
        if tunnels > 0 {
            tracing::warn!(tunnels, "drain_timeout is over with tunnels still open");
        }
        gateway.settle_open_claims().await;
        // Callers whose claims were just settled still get their answer.
        let _ = tokio::time::timeout(Duration::from_millis(500), self.connections.wait()).await;
    }
}

/// Serves a client's connection that a simulation has made up, until it ends.
#[cfg(feature = "failpoints")]
pub(crate) async fn serve_simulated(
    stream: crate::gateway::upstream::simulated::Stream,
    gateway: Arc<Gateway>,
    limits: Limits,
    drain: CancellationToken,
    metrics: Metrics,
) {
    let place = Place::new(std::array::from_fn(|_| Arc::new(AtomicUsize::new(1))), metrics);
    let peer = gateway.peer(None);
    connection::serve(stream, None, place, Setting { gateway, peer, limits, drain }).await;
}

/// A connection's place among `max_connections` and those of its worker. It belongs to the stream, which outlives its HTTP
/// as a tunnel.
struct Place {
    open: [Arc<AtomicUsize>; 2],
    metrics: Metrics,
}

impl Place {
    /// The first has been counted already.
    fn new(open: [Arc<AtomicUsize>; 2], metrics: Metrics) -> Self {
        metrics.connections.inc();
        let [_, of_worker] = &open;
        of_worker.fetch_add(1, Ordering::AcqRel);
        Self { open, metrics }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for open in &self.open {
            open.fetch_sub(1, Ordering::AcqRel);
        }
        self.metrics.connections.dec();
    }
}

/// Tells a client that there are too many, without reading its request.
async fn refuse(stream: Accepted) {
    let Ok(mut stream) = stream.join_runtime() else { return };
    let detail = "The gateway has as many connections as it may have; retry after Retry-After seconds.";
    let answer = Problem::new(Code::Overloaded, detail).to_http11();
    let say = async {
        stream.write_all(&answer).await?;
        stream.shutdown().await?;
        // Closing with unread bytes would reset the connection, and the answer with it.
        let mut rest = [0; 4096];
        while stream.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    let _ = tokio::time::timeout(Duration::from_secs(1), say).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn accepted_connections_do_not_outlive_a_peer_that_is_gone() {
        let listener = Listener::bind(&Address::Tcp("127.0.0.1:0".to_owned())).await.unwrap();
        let _client = TcpStream::connect(listener.address().to_string()).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let Stream::Left(accepted) = accepted.join_runtime().unwrap() else { panic!("it is a TCP connection") };
        assert!(SockRef::from(&accepted).keepalive().unwrap());
        assert!(accepted.nodelay().unwrap());
    }
}
