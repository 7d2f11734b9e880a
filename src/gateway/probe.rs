//! `replay_auth = "probe"`: before anyone gets what a record holds, the upstream is asked whether he may see it.

use super::forward::{Exchange, Unrecorded, exchange};
use super::headers::{IDEMPOTENCY_OUTCOME, prepare_request};
use super::problem::{Code, Problem};
use super::question::{Asked, Template, question};
use super::reply::recordable;
use super::{Gateway, Intercepted, Route, Unrecorded as SharedResponse};
use crate::ledger::Credentials;
use http::header::HOST;
use http::uri::PathAndQuery;
use http::{HeaderMap, StatusCode};
use moka::ops::compute::Op;
use moka::sync::Cache;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout_at};

/// `probe` of a route.
#[derive(Clone, Debug)]
pub struct Options {
    pub path: Template,
    /// How long a verdict counts.
    pub cache: Duration,
    pub timeout: Duration,
}

/// Verdicts kept.
const VERDICTS_MAX: u64 = 10_000;
/// Bytes of a denial that is kept; one with a longer body is for one caller alone.
const DENIAL_MAX: usize = 4 << 10;

/// Who asks, and what for: the credentials with the target and the host that they are shown to.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Name {
    credentials: [u8; 32],
    target: PathAndQuery,
    host: Vec<u8>,
}

#[derive(Clone)]
enum Verdict {
    Allowed,
    Denied(SharedResponse),
}

/// No verdict for anyone else.
enum Unkept {
    Denied(SharedResponse),
    Failed(Problem),
}

/// One question, asked once for all who want to know it meanwhile.
type Answer = OnceCell<(Verdict, Instant)>;

/// What the upstream has said, for all workers.
pub(super) struct Probes {
    answers: Cache<Name, Arc<Answer>>,
}

impl Default for Probes {
    fn default() -> Self {
        Self { answers: Cache::new(VERDICTS_MAX) }
    }
}

/// A caller who may get what a record holds, if the upstream says so.
pub(super) struct Caller {
    route: Arc<Route>,
    credentials: Credentials,
    target: Option<PathAndQuery>,
    headers: HeaderMap,
}

impl Gateway {
    /// The caller of an intercepted request, on a route that probes.
    pub(super) fn caller(&self, intercepted: &Intercepted, credentials: Credentials) -> Option<Box<Caller>> {
        let Intercepted { parts, route, path, params, peer, .. } = intercepted;
        let probe = route.options.probe.as_ref()?;
        let asked = Asked { pattern: &route.options.pattern, path, params };
        let target = probe.path.target(b"", &asked);
        let mut headers = parts.headers.clone();
        prepare_request(&mut headers, parts.version, peer);
        self.set_host(&mut headers);
        Some(Box::new(Caller { route: Arc::clone(route), credentials, target, headers }))
    }

    /// Asks the upstream, unless it has answered lately. `Some`: its refusal, which is the caller's answer.
    ///
    /// # Errors
    /// [`Code::ProbeFailed`] if it says neither.
    pub(super) async fn probe(&self, caller: &Caller) -> Result<Option<SharedResponse>, Problem> {
        let (Some(options), Some(target)) = (&caller.route.options.probe, &caller.target) else {
            return Err(failed());
        };
        let host = caller.headers.get(HOST).map(|host| host.as_bytes().to_vec()).unwrap_or_default();
        let name = Name { credentials: caller.credentials.0, target: target.clone(), host };
        let arrived = Instant::now();
        let deadline = arrived + options.timeout;
        loop {
            let answer = self.probes.answers.get_with(name.clone(), Arc::default);
            let asked = answer.get_or_try_init(|| self.ask(caller, target));
            let asked = timeout_at(deadline, asked).await.map_err(|_| self.probe_failed(&"it took too long"))?;
            let (verdict, asked_at) = match asked {
                Ok(answer) => answer,
                Err(Unkept::Denied(response)) => return Ok(Some(response)),
                Err(Unkept::Failed(problem)) => return Err(problem),
            };
            // What was asked after the caller came is as fresh as can be.
            if *asked_at >= arrived || asked_at.elapsed() < options.cache {
                return Ok(match verdict {
                    Verdict::Allowed => None,
                    Verdict::Denied(response) => Some(Arc::clone(response)),
                });
            }
            // Asked anew, by whoever is the first to put another question in its place.
            self.probes.answers.entry(name.clone()).and_compute_with(|there| match there {
                Some(there) if Arc::ptr_eq(there.value(), &answer) => Op::Put(Arc::default()),
                _ => Op::Nop,
            });
        }
    }

    async fn ask(&self, caller: &Caller, target: &PathAndQuery) -> Result<(Verdict, Instant), Unkept> {
        let asked_at = Instant::now();
        let options = &caller.route.options;
        let request = question(target.clone(), caller.headers.clone(), &options.header);
        let (answer, _reservation) = exchange(self, request, options.max_recorded_body).await;
        let (head, body) = match answer {
            Exchange::Complete(head, body) => (head, Some(body)),
            Exchange::Large(large) => (large.head, None),
            Exchange::Failed(error) => return Err(Unkept::Failed(self.probe_failed(&error))),
            Exchange::Malformed(what) => return Err(Unkept::Failed(self.probe_failed(&what))),
        };
        let verdict = match (head.status, body) {
            (status, _) if status.is_success() => Verdict::Allowed,
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, Some(body)) => {
                let mut headers = recordable(&head.headers, &options.drop_headers);
                headers.remove(&IDEMPOTENCY_OUTCOME);
                let large = body.len() > DENIAL_MAX;
                let denial = Arc::new(Unrecorded::Response { status: head.status, headers, body });
                if large {
                    self.metrics.probe("denied");
                    return Err(Unkept::Denied(denial));
                }
                Verdict::Denied(denial)
            }
            (status, _) => return Err(Unkept::Failed(self.probe_failed(&format!("it was answered {status}")))),
        };
        self.metrics.probe(if matches!(verdict, Verdict::Allowed) { "allowed" } else { "denied" });
        Ok((verdict, asked_at))
    }

    fn probe_failed(&self, reason: &dyn std::fmt::Display) -> Problem {
        tracing::warn!(%reason, "a probe has failed");
        self.metrics.probe("failed");
        failed()
    }
}

fn failed() -> Problem {
    Problem::new(
        Code::ProbeFailed,
        "Whether you may see the answer could not be found out; retry after Retry-After seconds.",
    )
}
