//! Making connections to the upstream.

use super::{Endpoint, Options, SendError};
use crate::gateway::body::ForwardBody;
use crate::gateway::tunnel::KEEPALIVE;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};

/// A connection as the HTTP library keeps it, and whether anything has come back on it.
pub(super) struct Link {
    pub(super) sender: SendRequest<ForwardBody>,
    answered: Arc<AtomicBool>,
    task: AbortHandle,
}

impl Link {
    /// Ends the connection at once, even one that still has a request to write.
    pub(super) fn abort(&self) {
        self.task.abort();
    }

    /// A new exchange begins: nothing has come back for it yet.
    pub(super) fn expect_answer(&self) {
        self.answered.store(false, Ordering::Release);
    }

    /// Whether a byte has come back since.
    pub(super) fn answered(&self) -> bool {
        self.answered.load(Ordering::Acquire)
    }
}

/// Connects within `connect_timeout`: name resolution, all addresses and TLS together.
///
/// # Errors
/// [`SendError::Unreachable`].
pub(super) async fn connect(options: &Options) -> Result<Link, SendError> {
    let deadline = Instant::now() + options.connect_timeout;
    match &options.endpoint {
        Endpoint::Tcp { host, port } => {
            let stream = connect_tcp(host, *port, deadline).await.map_err(unreachable)?;
            match &options.tls {
                Some(tls) => handshake(tls.connect(stream, deadline).await?).await,
                None => handshake(stream).await,
            }
        }
        Endpoint::Unix(path) => {
            let stream = timeout_at(deadline, UnixStream::connect(path)).await.unwrap_or_else(|_| Err(timed_out()));
            handshake(stream.map_err(unreachable)?).await
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

/// Bytes read ahead of a client that takes them slowly; a response's head may not be larger.
const READ_BUFFER_MAX: usize = 64 * 1024;

async fn handshake<T>(stream: T) -> Result<Link, SendError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let answered = Arc::new(AtomicBool::new(false));
    let stream = Watched { stream, answered: Arc::clone(&answered) };
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(READ_BUFFER_MAX)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| unreachable(io::Error::other(error)))?;
    let task = tokio::spawn(async move {
        // What goes wrong is told to whoever waits for a response.
        let _ = connection.with_upgrades().await;
    });
    Ok(Link { sender, answered, task: task.abort_handle() })
}

/// A stream that notes whether anything has been read from it.
struct Watched<S> {
    stream: S,
    answered: Arc<AtomicBool>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            this.answered.store(true, Ordering::Release);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
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
