//! Sockets that a service manager holds and passes on (`sd_listen_fds(3)`): they outlive the process, so that clients that
//! connect during a restart wait in the socket's queue instead of being refused.

use super::{Address, Listener};
use listenfd::ListenFd;
use std::io;
use std::net::SocketAddr;
use tokio::net::{TcpListener, UnixListener};

/// Passed sockets that nobody has asked for yet.
pub struct Inherited(Vec<Listener>);

/// A passed socket is of no use.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    #[error("socket {number} that the service manager passed cannot be listened on: {error}")]
    Unusable {
        number: usize,
        #[source]
        error: io::Error,
    },
    #[error(
        "the service manager passed a socket that listens on {address}, but neither server.listen nor admin.listen has \
         this address"
    )]
    Unclaimed { address: Address },
}

impl Inherited {
    /// Takes over what `LISTEN_FDS` and `LISTEN_PID` announce.
    ///
    /// # Errors
    /// If it is no listening stream socket.
    pub fn take_all() -> Result<Self, InheritError> {
        let mut passed = ListenFd::from_env();
        let mut listeners = Vec::with_capacity(passed.len());
        for number in 0..passed.len() {
            // One that is no TCP socket is left at its place.
            let taken = match passed.take_tcp_listener(number) {
                Ok(listener) => listener.map(tcp).transpose(),
                Err(_) => passed.take_unix_listener(number).and_then(|listener| listener.map(unix).transpose()),
            };
            listeners.extend(taken.map_err(|error| InheritError::Unusable { number, error })?);
        }
        Ok(Self(listeners))
    }

    /// The socket that listens on `address`, if it was passed.
    pub async fn take(&mut self, address: &Address) -> Option<Listener> {
        let wanted: Vec<SocketAddr> = match address {
            Address::Tcp(name) => tokio::net::lookup_host(name).await.map(Iterator::collect).unwrap_or_default(),
            Address::Unix(_) => Vec::new(),
        };
        let is_it = |listener: &Listener| match listener {
            Listener::Tcp(socket) => socket.local_addr().is_ok_and(|local| wanted.contains(&local)),
            Listener::Unix { .. } => listener.address() == *address,
        };
        self.0.iter().position(is_it).map(|at| self.0.swap_remove(at))
    }

    /// All that were wanted have been taken.
    ///
    /// # Errors
    /// If one is left over.
    pub fn finish(self) -> Result<(), InheritError> {
        self.0.first().map_or(Ok(()), |left| Err(InheritError::Unclaimed { address: left.address() }))
    }
}

fn tcp(listener: std::net::TcpListener) -> io::Result<Listener> {
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener).map(Listener::Tcp)
}

fn unix(listener: std::os::unix::net::UnixListener) -> io::Result<Listener> {
    let path = listener.local_addr()?.as_pathname().map(std::path::Path::to_owned);
    let path = path.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it has no path"))?;
    listener.set_nonblocking(true)?;
    // The file belongs to whoever made it.
    UnixListener::from_std(listener).map(|socket| Listener::Unix { socket, path, owned: false })
}
