//! Upgrade (RFC 9110 §7.8): what a client may offer, what the upstream may accept, and the bytes between them after that.

use super::Gateway;
use super::headers::{connection_names, list, strip_hop_by_hop};
use super::reply::ReplyBody;
use super::upstream::Connection;
use crate::telemetry::Metrics;
use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, UPGRADE};
use http::{HeaderMap, HeaderValue, Request, Response, Version};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use socket2::TcpKeepalive;
use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// When a tunnel ends though neither side has ended it. An open tunnel may be silent for as long as it likes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long one side may take no bytes while there are some for it.
    pub write_timeout: Duration,
    /// How long a tunnel may be silent that one side has closed already.
    pub half_closed_timeout: Duration,
}

/// Of the sockets at both ends: a tunnel may be silent for long, and must not outlive a peer that is gone without a word.
pub const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(15));

/// An upgrade that a client offers.
pub(super) struct Offer {
    /// The protocols, as the value of `Upgrade`.
    protocols: HeaderValue,
    client: OnUpgrade,
}

/// What speaks HTTP itself would carry requests past this gateway, keyed ones among them.
const NEVER_OFFERED: [&[u8]; 4] = [b"h2c", b"h2", b"http", b"tls"];

impl Offer {
    /// The upgrade that a request offers, if it may be passed on. `Upgrade` counts in HTTP/1.1 alone, and only where
    /// `Connection` names it.
    pub(super) fn of(request: &mut Request<Incoming>) -> Option<Self> {
        if request.version() != Version::HTTP_11 {
            return None;
        }
        let protocols = offered(request.headers())?;
        Some(Self { protocols, client: request.extensions_mut().remove()? })
    }

    /// Puts the offer back among the fields of a request that has been stripped of what is hop-by-hop.
    pub(super) fn write(&self, headers: &mut HeaderMap) {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, self.protocols.clone());
    }

    /// Whether the head of a 101 accepts what was offered, and nothing else.
    pub(super) fn accepted_by(&self, headers: &HeaderMap) -> bool {
        let was_offered = |protocol: &[u8]| {
            let mut offered = self.protocols.as_bytes().split(|&byte| byte == b',').map(<[u8]>::trim_ascii);
            offered.any(|offered| offered.eq_ignore_ascii_case(protocol))
        };
        headers.contains_key(UPGRADE) && list(headers, &UPGRADE).all(was_offered)
    }
}

fn offered(headers: &HeaderMap) -> Option<HeaderValue> {
    if !connection_names(headers, &UPGRADE) {
        return None;
    }
    let may_pass = |protocol: &&[u8]| {
        let name = protocol.split(|&byte| byte == b'/').next().unwrap_or_default().trim_ascii();
        !name.is_empty() && !NEVER_OFFERED.iter().any(|never| never.eq_ignore_ascii_case(name))
    };
    let protocols = list(headers, &UPGRADE).filter(may_pass).collect::<Vec<_>>().join(b", ".as_slice());
    HeaderValue::from_bytes(&protocols).ok().filter(|protocols| !protocols.is_empty())
}

/// All tunnels.
#[derive(Default)]
pub(super) struct Tunnels {
    tasks: TaskTracker,
    /// Cancelled when they have had their time.
    close: CancellationToken,
}

impl Gateway {
    /// Waits until no tunnel is open.
    pub async fn tunnels_ended(&self) {
        self.tunnels.tasks.close();
        self.tunnels.tasks.wait().await;
    }

    /// Ends every tunnel, those that open later included, and returns how many there were.
    pub async fn close_tunnels(&self) -> usize {
        let open = self.tunnels.tasks.len();
        self.tunnels.close.cancel();
        self.tunnels_ended().await;
        open
    }

    /// Answers the client with the upstream's 101, and carries bytes both ways from then on, in a task of its own.
    pub(super) fn open_tunnel(
        self: &Arc<Self>,
        offer: Offer,
        mut response: Response<Incoming>,
        connection: Connection,
    ) -> Response<ReplyBody> {
        let upstream = hyper::upgrade::on(&mut response);
        let (mut parts, _) = response.into_parts();
        let accepted = list(&parts.headers, &UPGRADE).collect::<Vec<_>>().join(b", ".as_slice());
        strip_hop_by_hop(&mut parts.headers);
        parts.headers.remove(CONTENT_LENGTH);
        parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        if let Ok(accepted) = HeaderValue::from_bytes(&accepted) {
            parts.headers.insert(UPGRADE, accepted);
        }
        parts.version = Version::HTTP_11;
        parts.extensions.clear();

        let (limits, close) = (self.options.tunnels, self.tunnels.close.clone());
        let open = Open::new(self.metrics.clone());
        self.tunnels.tasks.spawn(async move {
            let _open = open;
            let carried = async {
                // The client's side is there once the 101 has been written.
                let ends = tokio::try_join!(offer.client, upstream).map_err(io::Error::other)?;
                // Until then the connection's own task works for it.
                drop(connection);
                carry(TokioIo::new(ends.0), TokioIo::new(ends.1), limits).await
            };
            tokio::select! {
                carried = carried => if let Err(error) = carried {
                    tracing::debug!(%error, "a tunnel ended early");
                },
                () = close.cancelled() => tracing::debug!("a tunnel was closed by the drain"),
            }
        });
        Response::from_parts(parts, ReplyBody::full(Bytes::new()))
    }
}

/// Counts a tunnel as long as it lives.
struct Open(Metrics);

impl Open {
    fn new(metrics: Metrics) -> Self {
        metrics.tunnels.inc();
        Self(metrics)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.tunnels.dec();
    }
}

/// Carries bytes between two streams until both directions have ended. The end of one direction ends only the write half
/// of the other side.
async fn carry<C, U>(mut client: C, mut upstream: U, limits: Limits) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let (mut up, mut down) = (Direction::new(limits.write_timeout), Direction::new(limits.write_timeout));
    let mut silent: Option<Pin<Box<Sleep>>> = None;
    poll_fn(|cx| {
        let up_ended = up.poll(cx, &mut client, &mut upstream)?.is_ready();
        let down_ended = down.poll(cx, &mut upstream, &mut client)?.is_ready();
        if up_ended && down_ended {
            return Poll::Ready(Ok(()));
        }
        let moved = std::mem::take(&mut up.moved) | std::mem::take(&mut down.moved);
        if up_ended || down_ended {
            // A side that has vanished looks like one that has only finished speaking.
            if moved {
                silent = None;
            }
            let silent = silent.get_or_insert_with(|| Box::pin(sleep(limits.half_closed_timeout)));
            ready!(silent.as_mut().poll(cx));
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "half-closed and silent")));
        }
        Poll::Pending
    })
    .await
}

/// Bytes read at once, and held at most while the other side takes none.
const CHUNK_LEN: usize = 16 * 1024;

/// One direction of a tunnel. A silent one holds no memory but its own.
struct Direction {
    /// Read, but not written yet.
    held: Vec<u8>,
    written: usize,
    phase: Phase,
    unflushed: bool,
    /// Whether bytes have moved since somebody looked.
    moved: bool,
    write_timeout: Duration,
    /// Runs while a write is pending.
    stalled: Option<Pin<Box<Sleep>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// The source has ended, the sink does not know yet.
    Ending,
    Ended,
}

impl Direction {
    fn new(write_timeout: Duration) -> Self {
        let (held, written, phase) = (Vec::new(), 0, Phase::Open);
        Self { held, written, phase, unflushed: false, moved: false, write_timeout, stalled: None }
    }

    /// Moves what can be moved; ready once this direction has ended. A sink that takes no more ends its direction alone:
    /// what it has still to say is on its way.
    fn poll<R, W>(&mut self, cx: &mut Context<'_>, source: &mut R, sink: &mut W) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.phase == Phase::Ended {
            return Poll::Ready(Ok(()));
        }
        match ready!(self.advance(cx, source, sink)) {
            Err(Failure::Sink(error)) if error.kind() != io::ErrorKind::TimedOut => {}
            Err(Failure::Sink(error) | Failure::Source(error)) => return Poll::Ready(Err(error)),
            Ok(()) => {}
        }
        self.phase = Phase::Ended;
        self.held = Vec::new();
        Poll::Ready(Ok(()))
    }

    fn advance<R, W>(&mut self, cx: &mut Context<'_>, source: &mut R, sink: &mut W) -> Poll<Result<(), Failure>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut space = [MaybeUninit::uninit(); CHUNK_LEN];
        // A direction that never has to wait must not keep the other one, or other tasks, from running.
        for _ in 0..16 {
            while let Some(rest) = self.held.get(self.written..).filter(|rest| !rest.is_empty()) {
                let polled = Pin::new(&mut *sink).poll_write(cx, rest);
                self.written += ready!(self.timed(cx, polled))?;
            }
            (self.held, self.written) = (Vec::new(), 0);
            if self.phase != Phase::Open {
                let polled = Pin::new(&mut *sink).poll_shutdown(cx);
                return self.timed(cx, polled);
            }
            let mut chunk = ReadBuf::uninit(&mut space);
            match Pin::new(&mut *source).poll_read(cx, &mut chunk) {
                Poll::Ready(Ok(())) if chunk.filled().is_empty() => self.phase = Phase::Ending,
                Poll::Ready(Ok(())) => {
                    let mut rest = chunk.filled();
                    self.moved = true;
                    self.unflushed = true;
                    while !rest.is_empty() {
                        let polled = Pin::new(&mut *sink).poll_write(cx, rest);
                        match self.timed(cx, polled) {
                            Poll::Ready(written) => rest = rest.get(written?..).unwrap_or_default(),
                            Poll::Pending => {
                                self.held = rest.to_vec();
                                return Poll::Pending;
                            }
                        }
                    }
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Failure::Source(error))),
                Poll::Pending => {
                    if self.unflushed {
                        let polled = Pin::new(&mut *sink).poll_flush(cx);
                        ready!(self.timed(cx, polled))?;
                        self.unflushed = false;
                    }
                    return Poll::Pending;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// What became of a write, which may stay pending for `write_timeout`.
    fn timed<T: Written>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<Result<T, Failure>> {
        match polled {
            Poll::Ready(Ok(written)) if written.nothing() => {
                Poll::Ready(Err(Failure::Sink(io::ErrorKind::WriteZero.into())))
            }
            Poll::Ready(result) => {
                self.stalled = None;
                self.moved = true;
                Poll::Ready(result.map_err(Failure::Sink))
            }
            Poll::Pending => {
                let timeout = self.write_timeout;
                ready!(self.stalled.get_or_insert_with(|| Box::pin(sleep(timeout))).as_mut().poll(cx));
                Poll::Ready(Err(Failure::Sink(io::ErrorKind::TimedOut.into())))
            }
        }
    }
}

/// Which side a direction failed at.
enum Failure {
    Source(io::Error),
    Sink(io::Error),
}

/// The result of a write or a flush.
trait Written {
    fn nothing(&self) -> bool;
}

impl Written for usize {
    fn nothing(&self) -> bool {
        *self == 0
    }
}

impl Written for () {
    fn nothing(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    #[tokio::test]
    async fn what_a_side_has_said_arrives_though_it_takes_nothing_any_more() {
        let (client, mut client_peer) = duplex(64);
        let (upstream, mut upstream_peer) = duplex(64);
        upstream_peer.write_all(b"bye").await.unwrap();
        drop(upstream_peer);
        client_peer.write_all(b"too late").await.unwrap();
        let limits = Limits { write_timeout: Duration::from_secs(5), half_closed_timeout: Duration::from_secs(5) };
        let mut heard = Vec::new();
        let (carried, read) = tokio::join!(carry(client, upstream, limits), client_peer.read_to_end(&mut heard));
        carried.unwrap();
        read.unwrap();
        assert_eq!(heard, b"bye");
    }
}
