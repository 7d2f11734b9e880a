//! Connections: bytes arrive later, in order, or not at all.

use crate::world::now;
use bytes::{Buf, BytesMut};
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// One direction.
#[derive(Default)]
struct Way {
    latency: Duration,
    under_way: VecDeque<(Duration, Vec<u8>)>,
    arrived: BytesMut,
    /// When its end arrives.
    ends: Option<Duration>,
    ended: bool,
    /// Nothing more comes through, and both ends learn of it.
    reset: bool,
    reader_gone: bool,
    reader: Option<Waker>,
}

type SharedWay = Arc<Mutex<Way>>;

fn lock(way: &SharedWay) -> MutexGuard<'_, Way> {
    way.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wake(way: &mut Way) {
    if let Some(reader) = way.reader.take() {
        reader.wake();
    }
}

/// All connections.
#[derive(Clone, Default)]
pub(crate) struct Net(Arc<Mutex<Vec<Weak<Mutex<Way>>>>>);

impl Net {
    /// A connection's two ends.
    pub(crate) fn connection(&self, latency: Duration) -> (End, End) {
        let way = || Arc::new(Mutex::new(Way { latency, ..Way::default() }));
        let (up, down) = (way(), way());
        let mut ways = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ways.extend([Arc::downgrade(&up), Arc::downgrade(&down)]);
        let client = End { read: Arc::clone(&down), write: Arc::clone(&up) };
        (client, End { read: up, write: down })
    }

    /// Hands over what has arrived by now.
    pub(crate) fn step(&self) {
        let mut ways = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ways.retain(|way| {
            let Some(way) = way.upgrade() else { return false };
            let mut way = lock(&way);
            let mut changed = false;
            while way.under_way.front().is_some_and(|(at, _)| *at <= now()) {
                if let Some((_, bytes)) = way.under_way.pop_front() {
                    way.arrived.extend_from_slice(&bytes);
                    changed = true;
                }
            }
            if way.ends.is_some_and(|at| at <= now()) && way.under_way.is_empty() && !way.ended {
                (way.ended, changed) = (true, true);
            }
            if changed {
                wake(&mut way);
            }
            true
        });
    }
}

pub(crate) struct End {
    read: SharedWay,
    write: SharedWay,
}

impl End {
    /// Ends the connection both ways, at once, and drops what is under way.
    pub(crate) fn reset(self) {
        for way in [&self.read, &self.write] {
            let mut way = lock(way);
            way.reset = true;
            way.under_way.clear();
            way.arrived.clear();
            wake(&mut way);
        }
    }
}

impl AsyncRead for End {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut way = lock(&self.read);
        if way.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if !way.arrived.is_empty() {
            let len = way.arrived.len().min(into.remaining());
            into.put_slice(&way.arrived[..len]);
            way.arrived.advance(len);
            return Poll::Ready(Ok(()));
        }
        if way.ended {
            return Poll::Ready(Ok(()));
        }
        way.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, _cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut way = lock(&self.write);
        if way.reset || way.reader_gone {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let at = now() + way.latency;
        way.under_way.push_back((at, bytes.to_vec()));
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut way = lock(&self.write);
        let at = now() + way.latency;
        way.ends.get_or_insert(at);
        Poll::Ready(Ok(()))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        {
            let mut way = lock(&self.write);
            let at = now() + way.latency;
            way.ends.get_or_insert(at);
        }
        lock(&self.read).reader_gone = true;
    }
}
