//! Request bodies: buffered with a cap for intercepted requests, watched for progress on their way through otherwise.

use super::problem::{Code, Problem};
use crate::ledger::{Budget, Held};
use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep};

/// Reads an intercepted request's body into memory: at most `max` bytes, within `timeout`, within the budget.
///
/// # Errors
/// [`Code::BodyTooLarge`], [`Code::RequestTimeout`], [`Code::Overloaded`]; [`Code::BadRequest`] if the client cut it off.
pub(super) async fn read(mut body: Incoming, max: usize, timeout: Duration, budget: &Budget) -> Result<Held, Problem> {
    let too_large = || {
        Problem::new(Code::BodyTooLarge, format!("The body has more than the {max} bytes that may be sent with a key."))
    };
    // Before the first poll, which asks for the body of a request that expects 100-continue.
    if body.size_hint().lower() > max as u64 {
        return Err(too_large());
    }
    let deadline = Instant::now() + timeout;
    let mut reservation = budget.reservation();
    let mut chunks: Vec<Bytes> = Vec::new();
    let mut len = 0_usize;
    loop {
        let frame = match tokio::time::timeout_at(deadline, body.frame()).await {
            Err(_) => {
                return Err(Problem::new(
                    Code::RequestTimeout,
                    "The body did not arrive in time; send it again, faster.",
                ));
            }
            Ok(None) => break,
            Ok(Some(Err(error))) => {
                let detail = format!("The body broke off or is malformed ({error}); nothing was sent on.");
                return Err(Problem::new(Code::BadRequest, detail));
            }
            Ok(Some(Ok(frame))) => frame,
        };
        // Trailers of a request that is buffered are dropped.
        let Ok(data) = frame.into_data() else { continue };
        len += data.len();
        if len > max {
            return Err(too_large());
        }
        if !reservation.grow(data.len()) {
            return Err(Problem::overloaded());
        }
        chunks.push(data);
    }
    Ok(Held::new(join(chunks, len), reservation))
}

/// One piece of memory out of several; a single piece is not copied.
#[must_use]
pub(super) fn join(mut chunks: Vec<Bytes>, len: usize) -> Bytes {
    if chunks.len() < 2 {
        // A small chunk would keep the whole read buffer that it is cut from.
        return chunks.pop().map_or_else(Bytes::new, |chunk| Bytes::copy_from_slice(&chunk));
    }
    let mut joined = BytesMut::with_capacity(len);
    chunks.iter().for_each(|chunk| joined.extend_from_slice(chunk));
    joined.freeze()
}

/// What is sent upstream.
pub enum ForwardBody {
    /// In memory; `None` once it is written.
    Full(Option<Bytes>),
    /// Streamed from the client.
    Upload(Upload),
}

impl ForwardBody {
    #[must_use]
    pub fn full(bytes: Bytes) -> Self {
        Self::Full(Some(bytes).filter(|bytes| !bytes.is_empty()))
    }
}

/// A client's body on its way through.
pub struct Upload {
    body: Incoming,
    progress: Arc<Progress>,
    /// How long the body may make no progress.
    timeout: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Upload {
    #[must_use]
    pub fn new(body: Incoming, timeout: Duration) -> (Self, Arc<Progress>) {
        let progress =
            Arc::new(Progress { state: AtomicU8::new(RUNNING), frames: AtomicU64::new(0), ended: Notify::new() });
        (Self { body, progress: Arc::clone(&progress), timeout, stalled: None }, progress)
    }
}

const RUNNING: u8 = 0;
const SENT: u8 = 1;
const STALLED: u8 = 2;
const CUT_OFF: u8 = 3;

/// How far an upload has come, for whoever waits for the response to it.
pub struct Progress {
    state: AtomicU8,
    frames: AtomicU64,
    ended: Notify,
}

/// Why an upload did not reach its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UploadFailure {
    Stalled,
    CutOff,
}

impl Progress {
    fn end(&self, state: u8) {
        self.state.store(state, Ordering::Release);
        self.ended.notify_waiters();
    }

    async fn ended(&self) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if self.state.load(Ordering::Acquire) != RUNNING {
                return;
            }
            ended.await;
        }
    }

    /// Waits until the upload has ended (`true`), or has made no progress for `patience`: the upstream does not read.
    pub async fn ended_or_stuck(&self, patience: Duration) -> bool {
        loop {
            let frames = self.frames.load(Ordering::Acquire);
            if tokio::time::timeout(patience, self.ended()).await.is_ok() {
                return true;
            }
            if self.frames.load(Ordering::Acquire) == frames {
                return false;
            }
        }
    }

    /// Whether all of it has been handed to the connection.
    #[must_use]
    pub fn sent(&self) -> bool {
        self.state.load(Ordering::Acquire) == SENT
    }

    #[must_use]
    pub fn failure(&self) -> Option<UploadFailure> {
        match self.state.load(Ordering::Acquire) {
            STALLED => Some(UploadFailure::Stalled),
            CUT_OFF => Some(UploadFailure::CutOff),
            _ => None,
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // Given up by the connection to the upstream: nobody must wait for its end.
        if self.progress.state.load(Ordering::Acquire) == RUNNING {
            self.progress.end(SENT);
        }
    }
}

/// The client's body stopped coming.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    #[error("the client's body made no progress within body_timeout")]
    Stalled,
    #[error("the client's body broke off: {0}")]
    CutOff(#[source] hyper::Error),
}

impl Body for ForwardBody {
    type Data = Bytes;
    type Error = UploadError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UploadError>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Upload(upload) => upload.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_none(),
            Self::Upload(upload) => upload.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Upload(upload) => upload.body.size_hint(),
        }
    }
}

impl Upload {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, UploadError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.stalled = None;
                self.progress.frames.fetch_add(1, Ordering::AcqRel);
                if self.body.is_end_stream() {
                    self.progress.end(SENT);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) => {
                self.progress.end(SENT);
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                self.progress.end(CUT_OFF);
                Poll::Ready(Some(Err(UploadError::CutOff(error))))
            }
            Poll::Pending => {
                let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(self.timeout)));
                std::task::ready!(stalled.as_mut().poll(cx));
                self.progress.end(STALLED);
                Poll::Ready(Some(Err(UploadError::Stalled)))
            }
        }
    }
}
