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

/// How often the source is looked at.
#[derive(Clone, Copy)]
pub(super) struct Times {
    /// How long a fetch may take, and how long a request waits for one.
    pub(super) fetch: Duration,
    /// From the end of one fetch to the next that a token may cause; also after one that failed.
    pub(super) pause: Duration,
    /// The same of a file, and of fetches as long as there are no keys at all. A look that is due by then is waited for.
    pub(super) short_pause: Duration,
    /// From one fetch to the next when nobody asks.
    pub(super) interval: Duration,
}

const TIMES: Times = Times {
    fetch: Duration::from_secs(5),
    pause: Duration::from_secs(10),
    short_pause: Duration::from_secs(1),
    interval: Duration::from_secs(15 * 60),
};

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
    times: Times,
    /// `None`: there have never been any.
    current: RwLock<Option<Arc<KeySet>>>,
    pub(super) pace: watch::Sender<Pace>,
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
pub(super) struct Pace {
    /// How often it has been done.
    pub(super) done: u64,
    under_way: bool,
    /// When a token may cause the next.
    due: Instant,
}

impl Keys {
    /// Reads a file; what a URL publishes is fetched once `keep_fresh` runs.
    ///
    /// # Errors
    /// The file cannot be read, or has no usable key in it; the text names the file.
    pub fn new(source: Source) -> Result<Self, String> {
        Self::with_times(source, TIMES)
    }

    pub(super) fn with_times(source: Source, times: Times) -> Result<Self, String> {
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
        let (asked, told) = (Notify::new(), Notify::new());
        let keys = Self { source, times, current: RwLock::default(), pace, asked, told };
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
        if !under_way && due > Instant::now() + self.times.short_pause {
            return;
        }
        if !under_way {
            self.asked.notify_one();
        }
        let _ = timeout(self.times.fetch, pace.wait_for(|pace| pace.done > done)).await;
    }

    /// The keys, once there are any: waits for a fetch that is under way, for 5 seconds at most.
    pub(super) async fn first(&self) -> Option<Arc<KeySet>> {
        let mut pace = self.pace.subscribe();
        let _ = timeout(self.times.fetch, pace.wait_for(|pace| !pace.under_way)).await;
        self.current()
    }

    /// Has the source looked at again because the operator says so. Blocks.
    pub(crate) fn reload(&self) {
        if let Place::Url { upstream, .. } = &self.source
            && let Err(errors) = upstream.reload_tls()
        {
            errors.iter().for_each(|error| tracing::error!(%error, "the authorities to trust stay as they were"));
        }
        self.told.notify_one();
    }

    /// Looks at the source whenever that is due, for ever.
    pub(crate) async fn keep_fresh(&self) {
        let Times { pause, short_pause, interval, .. } = self.times;
        let (mut next, pause) = match &self.source {
            Place::Url { .. } => (Some(Instant::now()), pause),
            Place::File(_) => (None, short_pause),
        };
        let mut outage = false;
        self.announce();
        loop {
            let unasked = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            let mut told = false;
            tokio::select! {
                () = unasked => {}
                () = self.told.notified() => told = true,
                () = self.asked.notified() => {
                    let due = self.pace.borrow().due;
                    sleep_until(due).await;
                }
            }
            self.pace.send_modify(|pace| pace.under_way = true);
            let looked = self.look().await;
            self.report(&looked, told, &mut outage);
            let pause = if self.current().is_none() { short_pause } else { pause };
            let now = Instant::now();
            self.pace.send_modify(|pace| *pace = Pace { done: pace.done + 1, under_way: false, due: now + pause });
            next = next.map(|_| now + if looked.is_ok() { interval } else { pause });
        }
    }

    /// Logs what changes: the keys, the beginning and the end of an outage; where the operator has asked, what came of it.
    fn report(&self, looked: &Result<bool, String>, told: bool, outage: &mut bool) {
        let source = &self.source;
        match looked {
            Err(error) if told || !*outage => {
                let kept = self.current().map_or(0, |set| set.len());
                tracing::error!(%source, error, kept, "the keys for tokens cannot be had; those that are there stay");
            }
            Ok(_) if *outage => tracing::info!(%source, "the keys for tokens can be had again"),
            Ok(_) if told => tracing::info!(%source, "the keys for tokens were read again"),
            _ => {}
        }
        if *looked == Ok(true) {
            self.announce();
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
                let fetched = timeout(self.times.fetch, fetch(upstream, target)).await;
                fetched.unwrap_or_else(|_| Err(format!("no answer within {} ms", self.times.fetch.as_millis())))?
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
    // The errors' own words are about the API.
    let response = upstream.send(request, None).await.map_err(|error| match error {
        SendError::Unreachable { error, .. } => format!("cannot connect: {error}"),
        SendError::Broken(error) => format!("the connection broke off: {error}"),
        SendError::Malformed(what) => format!("the answer is malformed: {what}"),
        SendError::TimedOut | SendError::Upload(_) | SendError::Withheld => "no answer".to_owned(),
    })?;
    if response.status() != StatusCode::OK {
        return Err(format!("the answer is {}, not 200", response.status().as_u16()));
    }
    let body = Limited::new(response.into_body(), SET_MAX).collect().await;
    Ok(body.map_err(|error| format!("the answer did not come to its end: {error}"))?.to_bytes().to_vec())
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
