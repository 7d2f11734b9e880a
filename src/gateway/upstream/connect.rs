//! Making connections to the upstream.

use super::{Endpoint, Options, SendError};
use crate::gateway::tunnel::KEEPALIVE;
use socket2::SockRef;
use std::io;
use std::net::SocketAddr;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

/// A connection's bytes.
pub(in crate::gateway) type Stream = Either<TcpStream, Either<Local, Box<TlsStream<TcpStream>>>>;

#[cfg(not(feature = "failpoints"))]
type Local = UnixStream;
#[cfg(feature = "failpoints")]
type Local = Either<UnixStream, super::simulated::Stream>;

#[cfg(not(feature = "failpoints"))]
fn local(stream: UnixStream) -> Local {
    stream
}

#[cfg(feature = "failpoints")]
fn local(stream: UnixStream) -> Local {
    Either::Left(stream)
}

/// Connects within `connect_timeout`: name resolution, all addresses and TLS together.
///
/// # Errors
/// [`SendError::Unreachable`].
pub(super) async fn connect(options: &Options) -> Result<Stream, SendError> {
    let deadline = Instant::now() + options.connect_timeout;
    match &options.endpoint {
        Endpoint::Tcp { host, port } => {
            let stream = connect_tcp(host, *port, deadline).await.map_err(unreachable)?;
            match &options.tls {
                Some(tls) => Ok(Either::Right(Either::Right(Box::new(tls.connect(stream, deadline).await?)))),
                None => Ok(Either::Left(stream)),
            }
        }
        Endpoint::Unix(path) => {
            let stream = timeout_at(deadline, UnixStream::connect(path)).await.unwrap_or_else(|_| Err(timed_out()));
            Ok(Either::Right(Either::Left(local(stream.map_err(unreachable)?))))
        }
        #[cfg(feature = "failpoints")]
        Endpoint::Simulated(connector) => {
            let stream = timeout_at(deadline, connector.connect()).await.unwrap_or_else(|_| Err(timed_out()));
            Ok(Either::Right(Either::Left(Either::Right(stream.map_err(unreachable)?))))
        }
    }
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no connection within upstream.connect_timeout")
}

fn unreachable(error: io::Error) -> SendError {
    let proxy_error = match error.kind() {
        io::ErrorKind::TimedOut => "connection_timeout",
        io::ErrorKind::ConnectionRefused => "connection_refused",
        io::ErrorKind::NotFound => "dns_error",
        _ => "destination_unavailable",
    };
    SendError::Unreachable { error, proxy_error }
}

/// Resolves the name anew and tries its addresses.
async fn connect_tcp(host: &str, port: u16, deadline: Instant) -> io::Result<TcpStream> {
    let resolved = timeout_at(deadline, tokio::net::lookup_host((host, port))).await.map_err(|_| timed_out())?;
    let addresses = resolved.map_err(|error| io::Error::new(io::ErrorKind::NotFound, error))?.collect();
    connect_any(addresses, deadline).await
}

/// Tries all addresses in turn; what is left of the time is shared among those to come.
async fn connect_any(addresses: Vec<SocketAddr>, deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the upstream's name has no address");
    let count = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
    for (address, to_come) in addresses.into_iter().zip((1..=count).rev()) {
        let now = Instant::now();
        let share = now + deadline.saturating_duration_since(now) / to_come;
        match timeout_at(share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                stream.set_nodelay(true)?;
                SockRef::from(&stream).set_tcp_keepalive(&KEEPALIVE)?;
                return Ok(stream);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = timed_out(),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, SockAddr, Socket, Type};
    use std::time::Duration;
    use tokio::net::TcpListener;

    /// An address that keeps whoever comes waiting, since its queue is full; and what keeps it so.
    fn silent(ip: [u8; 4]) -> (SocketAddr, Vec<Socket>) {
        let socket = || Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let full = socket();
        full.bind(&SockAddr::from(SocketAddr::from((ip, 0)))).unwrap();
        full.listen(0).unwrap();
        let address = full.local_addr().unwrap().as_socket().unwrap();
        let mut sockets = vec![full];
        for _ in 0..4 {
            let waits = socket();
            waits.set_nonblocking(true).unwrap();
            let _ = waits.connect(&SockAddr::from(address));
            sockets.push(waits);
        }
        (address, sockets)
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_leaves_time_for_the_next() {
        let (silent, _sockets) = silent([127, 0, 0, 2]);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = listener.local_addr().unwrap();
        let refuses = SocketAddr::from(([127, 0, 0, 3], good.port()));
        let began = Instant::now();
        let deadline = began + Duration::from_millis(900);
        let stream = connect_any(vec![refuses, silent, good], deadline).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), good);
        assert!(SockRef::from(&stream).keepalive().unwrap(), "a tunnel over it does not outlive its peer");
        assert!(began.elapsed() >= Duration::from_millis(400), "half of what was left went to the silent one");

        let began = Instant::now();
        let error = connect_any(vec![silent], began + Duration::from_millis(100)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let error = connect_any(vec![refuses], began + Duration::from_secs(9)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(connect_any(Vec::new(), began).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
