//! Request bodies: buffered with a cap for intercepted requests, handed on as they come otherwise.

use super::observe::Tee;
use super::problem::{Code, Problem};
use crate::ledger::{Budget, Held};
use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::time::Instant;

/// Reads an intercepted request's body into memory: at most `max` bytes, until `deadline`, within the budget.
///
/// # Errors
/// [`Code::BodyTooLarge`], [`Code::RequestTimeout`], [`Code::Overloaded`]; [`Code::BadRequest`] if the client cut it off.
pub(super) async fn read(mut body: Incoming, max: usize, deadline: Instant, budget: &Budget) -> Result<Held, Problem> {
    let too_large = || {
        Problem::new(Code::BodyTooLarge, format!("The body has more than the {max} bytes that may be sent with a key."))
    };
    // Before the first poll, which asks for the body of a request that expects 100-continue.
    if body.size_hint().lower() > max as u64 {
        return Err(too_large());
    }
    let mut reservation = budget.reservation();
    let mut chunks: Vec<Bytes> = Vec::new();
    let mut len = 0_usize;
    let mut waited = false;
    loop {
        // What has come along with the head is handed on right after the first look: no timer for that.
        let early = if waited { None } else { Some(first_look(&mut body).await) };
        waited = true;
        let frame = match early.flatten() {
            Some(frame) => Ok(frame),
            None => tokio::time::timeout_at(deadline, body.frame()).await,
        };
        let frame = match frame {
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

/// The first frame, unless the client keeps it waiting (`None`).
async fn first_look(body: &mut Incoming) -> Option<Option<hyper::Result<Frame<Bytes>>>> {
    let mut looked = false;
    poll_fn(|cx| match Pin::new(&mut *body).poll_frame(cx) {
        Poll::Ready(frame) => Poll::Ready(Some(frame)),
        Poll::Pending if looked => Poll::Ready(None),
        Poll::Pending => {
            looked = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await
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
    Upload(Incoming),
    /// The same, under observation.
    Observed(Box<Tee>),
}

impl ForwardBody {
    #[must_use]
    pub fn full(bytes: Bytes) -> Self {
        Self::Full(Some(bytes).filter(|bytes| !bytes.is_empty()))
    }
}

impl Body for ForwardBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Upload(body) => Pin::new(body).poll_frame(cx),
            Self::Observed(body) => Pin::new(&mut **body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_none(),
            Self::Upload(body) => body.is_end_stream(),
            Self::Observed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Upload(body) => body.size_hint(),
            Self::Observed(body) => body.size_hint(),
        }
    }
}
