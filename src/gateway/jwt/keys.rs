//! Where the keys come from, and when they are looked at again.

use super::jwk::KeySet;
use crate::gateway::body::ForwardBody;
use crate::gateway::upstream::{self, SendError, Upstream};
use crate::telemetry::Metrics;
use bytes::Bytes;
use http::header::{ACCEPT, HOST};
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};

/// Bytes that a set may have.
const SET_MAX: usize = 1 << 20;
/// How long a fetch may take, and how long a request waits for one.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
/// From the end of one fetch to the next that a token may cause; also after one that failed.
const FETCH_PAUSE: Duration = Duration::from_secs(10);
/// The same of a file, and of fetches as long as there are no keys at all.
const SHORT_PAUSE: Duration = Duration::from_secs(1);
/// From one fetch to the next when nobody asks.
const FETCH_INTERVAL: Duration = Duration::from_secs(15 * 60);

/// Where keys are published.
pub enum Source {
    File(PathBuf),
    /// With the URL as it was written, for messages.
    Url {
        text: String,
        upstream: Box<upstream::Options>,
        target: PathAndQuery,
    },
}

/// The keys as they are now.
pub struct Keys {
    source: Place,
    /// `None`: there have never been any.
    current: RwLock<Option<Arc<KeySet>>>,
    pace: watch::Sender<Pace>,
    /// A token names a key that is not there.
    asked: Notify,
    /// The operator wants them read again.
    told: Notify,
}

enum Place {
    File(PathBuf),
    Url { text: String, upstream: Arc<Upstream>, target: PathAndQuery },
}

/// How far the looking is.
#[derive(Clone, Copy)]
struct Pace {
    /// How often it has been done.
    done: u64,
    under_way: bool,
    /// When a token may cause the next.
    due: Instant,
}

impl Keys {
    /// Reads a file; what a URL publishes is fetched once [`Self::keep_fresh`] runs.
    ///
    /// # Errors
    /// The file cannot be read, or has no usable key in it; the text names the file.
    pub fn new(source: Source) -> Result<Self, String> {
        let (source, under_way) = match source {
            Source::File(path) => (Place::File(path), false),
            // The first fetch is about to begin: who comes before its end waits for it.
            Source::Url { text, upstream, target } => {
                // The upstream's metrics are about another server.
                let upstream = Upstream::new(*upstream, Metrics::default());
                (Place::Url { text, upstream, target }, true)
            }
        };
        let pace = watch::Sender::new(Pace { done: 0, under_way, due: Instant::now() });
        let keys = Self { source, current: RwLock::default(), pace, asked: Notify::new(), told: Notify::new() };
        if let Place::File(path) = &keys.source {
            keys.take(&read(path)?)?;
        }
        Ok(keys)
    }

    pub(super) fn current(&self) -> Option<Arc<KeySet>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits, for 5 seconds at most, until the source has been looked at once more, unless that was done a moment ago.
    pub(super) async fn look_again(&self) {
        let mut pace = self.pace.subscribe();
        let Pace { done, under_way, due } = *pace.borrow_and_update();
        if !under_way && due > Instant::now() + SHORT_PAUSE {
            return;
        }
        if !under_way {
            self.asked.notify_one();
        }
        let _ = timeout(FETCH_TIMEOUT, pace.wait_for(|pace| pace.done > done)).await;
    }

    /// The keys, once there are any: waits for a fetch that is under way, for 5 seconds at most.
    pub(super) async fn first(&self) -> Option<Arc<KeySet>> {
        let mut pace = self.pace.subscribe();
        let _ = timeout(FETCH_TIMEOUT, pace.wait_for(|pace| !pace.under_way)).await;
        self.current()
    }

    /// Reads the source again because the operator says so, and tells the log what came of it. Blocks.
    pub(crate) fn reload(&self) {
        match &self.source {
            Place::Url { upstream, .. } => {
                if let Err(errors) = upstream.reload_tls() {
                    errors
                        .iter()
                        .for_each(|error| tracing::error!(%error, "the authorities to trust stay as they were"));
                }
                self.told.notify_one();
            }
            Place::File(path) => match read(path).and_then(|text| self.take(&text)) {
                Ok(_) => {
                    tracing::info!(path = %path.display(), "the keys of auth.jwks_file were read again");
                    self.announce();
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), error, "the keys of auth.jwks_file stay as they were");
                }
            },
        }
    }

    /// Looks at the source whenever that is due, for ever.
    pub(crate) async fn keep_fresh(&self) {
        let (mut next, pause) = match &self.source {
            Place::Url { .. } => (Some(Instant::now()), FETCH_PAUSE),
            Place::File(_) => (None, SHORT_PAUSE),
        };
        let mut outage = false;
        self.announce();
        loop {
            let interval = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = interval => {}
                () = self.told.notified() => {}
                () = self.asked.notified() => {
                    let due = self.pace.borrow().due;
                    sleep_until(due).await;
                }
            }
            self.pace.send_modify(|pace| pace.under_way = true);
            let looked = self.look().await;
            self.report(&looked, &mut outage);
            let pause = if self.current().is_none() { SHORT_PAUSE } else { pause };
            let now = Instant::now();
            self.pace.send_modify(|pace| *pace = Pace { done: pace.done + 1, under_way: false, due: now + pause });
            next = next.map(|_| now + if looked.is_ok() { FETCH_INTERVAL } else { pause });
        }
    }

    /// Logs what changes: the keys, the beginning and the end of an outage.
    fn report(&self, looked: &Result<bool, String>, outage: &mut bool) {
        let source = &self.source;
        match looked {
            Err(error) if !*outage => {
                let kept = self.current().map_or(0, |set| set.len());
                tracing::error!(%source, error, kept, "the keys for tokens cannot be had; those that are there stay");
            }
            Ok(true) => self.announce(),
            Ok(false) if *outage => tracing::info!(%source, "the keys for tokens can be had again"),
            _ => {}
        }
        *outage = looked.is_err();
    }

    /// Looks at the source; whether the keys have changed.
    async fn look(&self) -> Result<bool, String> {
        let text = match &self.source {
            Place::File(path) => {
                let path = path.clone();
                let read = tokio::task::spawn_blocking(move || read(&path)).await;
                read.unwrap_or_else(|error| Err(error.to_string()))?
            }
            Place::Url { upstream, target, .. } => {
                let fetched = timeout(FETCH_TIMEOUT, fetch(upstream, target)).await;
                fetched.unwrap_or_else(|_| Err(format!("no answer within {} s", FETCH_TIMEOUT.as_secs())))?
            }
        };
        self.take(&text)
    }

    /// Takes a set in, unless it is the one that is there; whether it is another.
    fn take(&self, text: &[u8]) -> Result<bool, String> {
        let mut set = KeySet::parse(text).map_err(|reason| format!("{}: {reason}", self.source))?;
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|current| current.digest == set.digest) {
            return Ok(false);
        }
        set.generation = current.as_ref().map_or(1, |current| current.generation + 1);
        *current = Some(Arc::new(set));
        Ok(true)
    }

    /// Says what keys there are now.
    fn announce(&self) {
        if let Some(set) = self.current() {
            tracing::info!(source = %self.source, keys = set.len(), left_out = ?set.unusable, "keys for tokens");
        }
    }
}

/// The whole file.
fn read(path: &Path) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| format!("{}: cannot be read: {error}", path.display());
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut text = Vec::new();
    file.take(SET_MAX as u64 + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() > SET_MAX {
        return Err(format!("{}: has more than {SET_MAX} bytes", path.display()));
    }
    Ok(text)
}

/// Redirects are not followed: whoever could send one would say whom to trust.
async fn fetch(upstream: &Arc<Upstream>, target: &PathAndQuery) -> Result<Vec<u8>, String> {
    let mut request = Request::new(ForwardBody::full(Bytes::new()));
    *request.method_mut() = Method::GET;
    *request.uri_mut() = Uri::from(target.clone());
    request.headers_mut().insert(HOST, upstream.options().authority.clone());
    request.headers_mut().insert(ACCEPT, HeaderValue::from_static("application/jwk-set+json, application/json"));
    let response = upstream.send(request, None).await.map_err(|error| match error {
        // It speaks of another upstream.
        SendError::Unreachable { error, .. } => format!("cannot connect: {error}"),
        other => format!("no sound answer: {other}"),
    })?;
    if response.status() != StatusCode::OK {
        return Err(format!("the answer is {}, not 200", response.status().as_u16()));
    }
    let body = Limited::new(response.into_body(), SET_MAX).collect().await;
    Ok(body.map_err(|error| format!("no whole answer: {error}"))?.to_bytes().to_vec())
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Url { text, .. } => f.write_str(text),
        }
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)
    }
}
