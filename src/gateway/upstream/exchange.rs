//! One request and its response over one connection, without a task of its own: whoever waits for the response drives
//! both directions.

use super::chunked::{Chunked, Piece, take_data};
use super::connect::Stream;
use super::head::{Asked, Framing, HEAD_MAX, Head, put_field, take};
use super::{Patience, SendError, Upstream};
use crate::fault;
use crate::gateway::body::ForwardBody;
use crate::gateway::headers::list;
use crate::gateway::reply::BodyError;
use crate::timer::Timer;
use bytes::{Buf, Bytes, BytesMut};
use http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HOST, MAX_FORWARDS,
    SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING,
};
use http::{HeaderMap, HeaderName, Request};
use http_body::{Body, Frame, SizeHint};
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::AsyncWrite;
use tokio::time::timeout;
use tokio_util::io::poll_read_buf;

/// Bytes read at once; more where a response turns out to be large, up to [`HEAD_MAX`].
const READ_LEN: usize = 8 * 1024;

/// A connection.
pub(super) struct Link {
    stream: Stream,
    /// Read, but not taken yet.
    read: BytesMut,
    read_len: usize,
    /// Runs while an exchange waits.
    timer: Timer,
}

impl Link {
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream, read: BytesMut::new(), read_len: READ_LEN, timer: Timer::default() }
    }

    /// Whether nothing has come on an idle connection: neither its end nor bytes that nobody has asked for.
    pub(super) fn is_quiet(&mut self, cx: &mut Context<'_>) -> bool {
        self.read.is_empty() && self.poll_read(cx).is_pending()
    }

    /// Reads more; zero bytes are the end.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.read.reserve(self.read_len);
        let len = ready!(poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.read))?;
        if len >= self.read_len {
            self.read_len = (self.read_len * 2).min(HEAD_MAX);
        }
        Poll::Ready(Ok(len))
    }
}

/// A request on its way.
pub(super) struct Outgoing {
    head: Bytes,
    asked: Asked,
    body: ForwardBody,
    framing: BodyFraming,
    /// Fields that `Trailer` announces.
    announced: Vec<HeaderName>,
    /// Being written: the head, a chunk's line, data, and what ends it.
    queue: [Bytes; 4],
    /// Whether the body has been taken to its end.
    taken: bool,
    /// Whether all of it is on its way.
    flushed: bool,
    /// Whether the head has waited for the first of the body, to be written with it.
    waited: bool,
    /// Whether a byte may have been written.
    touched: bool,
    /// Grows with whatever is taken or written.
    moved: u64,
}

/// How the end of a request's body is told.
#[derive(Clone, Copy, PartialEq, Eq)]
enum BodyFraming {
    /// So many bytes are still to come.
    Length(u64),
    Chunked,
}

/// Why an exchange came to no response.
pub(super) enum Failure {
    /// Not a byte of the request was written.
    Unsent(io::Error),
    /// Nothing has come back.
    Unanswered(io::Error),
    Final(SendError),
}

impl Outgoing {
    pub(super) fn new(request: Request<ForwardBody>) -> Self {
        let head = super::head::encode(&request);
        let asked = Asked::by(&request);
        let (parts, body) = request.into_parts();
        let framing = match parts.headers.contains_key(TRANSFER_ENCODING) {
            true => BodyFraming::Chunked,
            false => BodyFraming::Length(crate::gateway::headers::declared_length(&parts.headers).unwrap_or(0)),
        };
        let announced = list(&parts.headers, &TRAILER).filter_map(|name| HeaderName::from_bytes(name).ok());
        let announced = announced.filter(may_be_trailer).collect();
        let queue = [head.clone(), Bytes::new(), Bytes::new(), Bytes::new()];
        let (taken, flushed, waited, touched) = (false, false, false, false);
        Self { head, asked, body, framing, announced, queue, taken, flushed, waited, touched, moved: 0 }
    }

    /// What is still to be written, once the head of the response is there.
    pub(super) fn unsent(self) -> Option<Box<Self>> {
        if self.flushed { None } else { Some(Box::new(self)) }
    }

    /// Makes it ready to be sent once more, if all of it is still there; only for what may be executed twice.
    pub(super) fn rewind(&mut self) -> bool {
        if !matches!(self.body, ForwardBody::Full(None)) {
            return false;
        }
        let [head, ..] = &mut self.queue;
        *head = self.head.clone();
        (self.flushed, self.touched) = (false, false);
        true
    }

    /// Writes what there is to write; ready once all is on its way.
    fn poll_write(&mut self, cx: &mut Context<'_>, stream: &mut Stream) -> Poll<Result<(), WriteError>> {
        loop {
            let [_, _, data, end] = &self.queue;
            if !self.taken && data.is_empty() && end.is_empty() {
                match self.poll_body(cx) {
                    Poll::Ready(taken) => taken?,
                    Poll::Pending if self.nothing_queued() => return Poll::Pending,
                    Poll::Pending if !self.waited => {
                        // What has come along with the head is handed on right after this.
                        self.waited = true;
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    Poll::Pending => {}
                }
            }
            while !self.nothing_queued() {
                ready!(self.poll_queue(cx, stream)).map_err(WriteError::Stream)?;
            }
            if self.taken {
                if !self.flushed {
                    ready!(Pin::new(&mut *stream).poll_flush(cx)).map_err(WriteError::Stream)?;
                    self.flushed = true;
                }
                return Poll::Ready(Ok(()));
            }
        }
    }

    fn nothing_queued(&self) -> bool {
        self.queue.iter().all(Bytes::is_empty)
    }

    fn poll_queue(&mut self, cx: &mut Context<'_>, stream: &mut Stream) -> Poll<io::Result<()>> {
        // Of a TLS record that failed half-way, a part may have gone.
        self.touched |= !matches!(stream, Stream::Left(_) | Stream::Right(tokio_util::either::Either::Left(_)));
        let mut slices = [IoSlice::new(&[]); 4];
        let mut count = 0;
        for (slice, bytes) in slices.iter_mut().zip(self.queue.iter().filter(|bytes| !bytes.is_empty())) {
            *slice = IoSlice::new(bytes);
            count += 1;
        }
        let stream = Pin::new(stream);
        let mut written = match slices.get(..count) {
            Some([only]) => ready!(stream.poll_write(cx, only))?,
            several => ready!(stream.poll_write_vectored(cx, several.unwrap_or_default()))?,
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.touched = true;
        self.moved += 1;
        for bytes in &mut self.queue {
            let len = written.min(bytes.len());
            bytes.advance(len);
            written -= len;
        }
        Poll::Ready(Ok(()))
    }

    /// Queues the next of the body.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), WriteError>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx)).transpose().map_err(WriteError::Upload)?;
        self.moved += 1;
        let [_, line, data, end] = &mut self.queue;
        let broken = |what| WriteError::Stream(io::Error::new(io::ErrorKind::InvalidData, what));
        match (frame.map(Frame::into_data), &mut self.framing) {
            (None, BodyFraming::Chunked) => (*end, self.taken) = (Bytes::from_static(b"0\r\n\r\n"), true),
            (None, BodyFraming::Length(0)) => self.taken = true,
            (None, BodyFraming::Length(_)) => return Poll::Ready(Err(broken("a body shorter than its length"))),
            (Some(Ok(bytes)), _) if bytes.is_empty() => {}
            (Some(Ok(bytes)), BodyFraming::Chunked) => {
                *line = Bytes::from(format!("{:X}\r\n", bytes.len()));
                *data = bytes;
                self.taken = self.body.is_end_stream();
                *end = Bytes::from_static(if self.taken { b"\r\n0\r\n\r\n" } else { b"\r\n" });
            }
            (Some(Ok(bytes)), BodyFraming::Length(left)) => {
                *left = left.checked_sub(bytes.len() as u64).ok_or_else(|| broken("a body longer than its length"))?;
                *data = bytes;
                self.taken = *left == 0 && self.body.is_end_stream();
            }
            (Some(Err(frame)), BodyFraming::Chunked) => {
                *end = last_chunk(frame.into_trailers().unwrap_or_default(), &self.announced);
                self.taken = true;
            }
            (Some(Err(_)), BodyFraming::Length(_)) => {}
        }
        Poll::Ready(Ok(()))
    }

    /// Sends it and waits for the head of the response; the rest of the request may still be on its way then.
    pub(super) async fn exchange(
        &mut self,
        link: &mut Link,
        patience: Option<Patience>,
        idle_timeout: Duration,
    ) -> Result<Head, Failure> {
        let mut receiving = Receiving { failed: None, answered: false, interim: 0, idle_timeout };
        let mut running = None;
        let result = poll_fn(|cx| {
            if let Poll::Ready(result) = self.poll_exchange(cx, link, &mut receiving) {
                return Poll::Ready(result);
            }
            let Some(patience) = patience else { return Poll::Pending };
            let (awaited, limit) = match self.flushed || receiving.failed.is_some() {
                true => (Awaited::Response, patience.response),
                false if self.nothing_queued() => (Awaited::Body(self.moved), patience.body),
                false => (Awaited::Write(self.moved), patience.write),
            };
            if running.replace(awaited) != Some(awaited) {
                link.timer.stop();
            }
            ready!(link.timer.poll(cx, limit));
            let body = matches!(awaited, Awaited::Body(_));
            Poll::Ready(Err(Failure::Final(if body { SendError::Upload(None) } else { SendError::TimedOut })))
        })
        .await;
        link.timer.stop();
        result
    }

    fn poll_exchange(
        &mut self,
        cx: &mut Context<'_>,
        link: &mut Link,
        receiving: &mut Receiving,
    ) -> Poll<Result<Head, Failure>> {
        if !self.flushed && receiving.failed.is_none() {
            match self.poll_write(cx, &mut link.stream) {
                Poll::Ready(Ok(())) => {
                    if let Err(error) = fault::step("after-send") {
                        return Poll::Ready(Err(Failure::Unanswered(error)));
                    }
                }
                Poll::Ready(Err(WriteError::Stream(error))) if !self.touched => {
                    return Poll::Ready(Err(Failure::Unsent(error)));
                }
                // It may have been refused for a reason, which it tells before it closes.
                Poll::Ready(Err(WriteError::Stream(error))) => receiving.failed = Some(error),
                Poll::Ready(Err(WriteError::Upload(error))) => {
                    return Poll::Ready(Err(Failure::Final(SendError::Upload(Some(error)))));
                }
                Poll::Pending if !self.touched => return Poll::Pending,
                Poll::Pending => {}
            }
        }
        loop {
            let len = match ready!(link.poll_read(cx)) {
                Ok(0) => Err(receiving.failed.take().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into())),
                other => other,
            };
            if let Err(error) = len {
                return Poll::Ready(Err(match receiving.answered {
                    true => Failure::Final(SendError::Broken(error)),
                    false => Failure::Unanswered(error),
                }));
            }
            receiving.answered = true;
            match take(&mut link.read, &self.asked, &mut receiving.interim, receiving.idle_timeout) {
                Ok(None) => {}
                Ok(Some(head)) => return Poll::Ready(Ok(head)),
                Err(what) => return Poll::Ready(Err(Failure::Final(SendError::Malformed(what)))),
            }
        }
    }
}

/// How far an exchange is.
struct Receiving {
    /// Why no more of the request can be written.
    failed: Option<io::Error>,
    /// A byte has come back.
    answered: bool,
    interim: usize,
    idle_timeout: Duration,
}

/// What an exchange waits for, and how far it was then.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Awaited {
    Body(u64),
    Write(u64),
    Response,
}

/// Why a request could not be written to its end.
enum WriteError {
    Upload(hyper::Error),
    Stream(io::Error),
}

/// The end of a chunked body, with those trailers that were announced.
fn last_chunk(trailers: HeaderMap, announced: &[HeaderName]) -> Bytes {
    let mut block = BytesMut::from("0\r\n");
    for (name, value) in trailers.iter().filter(|(name, _)| announced.contains(name)) {
        put_field(&mut block, name, value);
    }
    block.extend_from_slice(b"\r\n");
    block.freeze()
}

/// RFC 9110 §6.5.1: what frames, routes, authenticates or describes the content must not come behind it.
fn may_be_trailer(name: &HeaderName) -> bool {
    let never = [
        AUTHORIZATION,
        CACHE_CONTROL,
        CONTENT_ENCODING,
        CONTENT_LENGTH,
        CONTENT_RANGE,
        CONTENT_TYPE,
        HOST,
        MAX_FORWARDS,
        SET_COOKIE,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
    ];
    !never.contains(name)
}

/// A response's body. Read to its end, its connection goes back to the pool; dropped before, the connection is closed.
pub struct Incoming {
    /// `None` once the body has ended.
    link: Option<Link>,
    left: Left,
    /// Of the request, where the response has overtaken it.
    unsent: Option<Box<Outgoing>>,
    keep: Duration,
    upstream: Arc<Upstream>,
}

/// What is left of a body.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Left {
    Length(u64),
    Chunked(Chunked),
    UntilClose,
    Switched,
}

impl Incoming {
    /// `unsent`: the request, if all of it has not been written yet.
    pub(super) fn new(
        link: Link,
        unsent: Option<Box<Outgoing>>,
        framing: Framing,
        keep: Duration,
        upstream: Arc<Upstream>,
    ) -> Self {
        let left = match framing {
            Framing::Length(len) => Left::Length(len),
            Framing::Chunked => Left::Chunked(Chunked::Line),
            Framing::Close => Left::UntilClose,
            Framing::Switched => Left::Switched,
        };
        let mut body = Self { link: Some(link), left, unsent, keep, upstream };
        if left == Left::Length(0) {
            body.finish();
        }
        body
    }

    /// The connection of a response that switches protocols, with what has been read behind its head; `None`: it does
    /// not, or the request has not been sent to its end.
    pub fn into_tunnel(self) -> Option<(Bytes, Stream)> {
        let link = self.link.filter(|_| self.left == Left::Switched && self.unsent.is_none())?;
        Some((link.read.freeze(), link.stream))
    }

    /// The response has been read to its end.
    fn finish(&mut self) {
        let Some(mut link) = self.link.take() else { return };
        let keep = self.keep;
        // Nobody has asked for what comes behind a response.
        if keep.is_zero() || !link.read.is_empty() {
            return;
        }
        // Idle, it does not keep what a large response took.
        if link.read_len > READ_LEN {
            (link.read, link.read_len) = (BytesMut::new(), READ_LEN);
        }
        let upstream = Arc::clone(&self.upstream);
        match self.unsent.take() {
            None => upstream.put_back(link, keep),
            Some(mut out) => drop(tokio::spawn(async move {
                let written = poll_fn(|cx| out.poll_write(cx, &mut link.stream));
                if let Ok(Ok(())) = timeout(keep, written).await {
                    upstream.put_back(link, keep);
                }
            })),
        }
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame<Bytes>>, BodyError>> {
        let Some(link) = &mut self.link else { return Poll::Ready(Ok(None)) };
        // The upstream may wait for the rest of the request before it says the rest of its response.
        if let Some(out) = &mut self.unsent {
            match out.poll_write(cx, &mut link.stream) {
                Poll::Ready(Ok(())) => self.unsent = None,
                Poll::Ready(Err(_)) => (self.unsent, self.keep) = (None, Duration::ZERO),
                Poll::Pending => {}
            }
        }
        loop {
            if let Left::Chunked(chunked) = &mut self.left {
                match chunked.take(&mut link.read).map_err(BodyError::Malformed)? {
                    Some(Piece::Data(data)) => return Poll::Ready(Ok(Some(Frame::data(data)))),
                    Some(Piece::Trailers(trailers)) => return Poll::Ready(Ok(Some(Frame::trailers(trailers)))),
                    Some(Piece::End) => break,
                    None => {}
                }
            } else if !link.read.is_empty() {
                let data = match &mut self.left {
                    Left::Length(left) => {
                        let data;
                        (data, *left) = take_data(&mut link.read, *left);
                        data
                    }
                    _ => link.read.split().freeze(),
                };
                if self.left == Left::Length(0) {
                    self.finish();
                }
                return Poll::Ready(Ok(Some(Frame::data(data))));
            }
            match ready!(link.poll_read(cx)).map_err(BodyError::Upstream)? {
                0 if self.left == Left::UntilClose => break,
                0 => return Poll::Ready(Err(BodyError::Upstream(io::ErrorKind::UnexpectedEof.into()))),
                _ => {}
            }
        }
        self.finish();
        Poll::Ready(Ok(None))
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let polled = ready!(this.poll_data(cx));
        if polled.is_err() {
            this.link = None;
        }
        Poll::Ready(polled.transpose())
    }

    fn is_end_stream(&self) -> bool {
        self.link.is_none() || self.left == Left::Switched
    }

    fn size_hint(&self) -> SizeHint {
        match self.left {
            Left::Length(left) => SizeHint::with_exact(left),
            Left::Switched => SizeHint::with_exact(0),
            Left::Chunked(_) | Left::UntilClose if self.link.is_none() => SizeHint::with_exact(0),
            Left::Chunked(_) | Left::UntilClose => SizeHint::new(),
        }
    }
}
