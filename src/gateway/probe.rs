//! `replay_auth = "probe"`: before anyone gets what a record holds, the upstream is asked whether he may see it.

use super::forward::{Exchange, Unrecorded, exchange};
use super::headers::prepare_request;
use super::memo::{self, Memo};
use super::problem::{Code, Problem};
use super::question::{Asked, Template, question};
use super::reply::recordable;
use super::{Gateway, Intercepted, Route, Unrecorded as SharedResponse};
use crate::ledger::Credentials;
use http::header::HOST;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, StatusCode};
use std::sync::{Arc, Mutex, PoisonError};
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
/// Bytes of a denial's body. A longer one says neither yes nor no.
const BODY_MAX: usize = 1 << 20;
/// Bytes of a denial that is kept; one with a longer body is for those who wait for it.
const DENIAL_MAX: usize = 4 << 10;

/// Who asks, and what for: the credentials with the host and the target that they are shown to.
fn name(credentials: &Credentials, host: &[u8], target: &PathAndQuery) -> memo::Name {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&credentials.0).update(&(host.len() as u64).to_le_bytes()).update(host);
    *hasher.update(target.as_str().as_bytes()).finalize().as_bytes()
}

enum Verdict {
    Allowed,
    Denied(SharedResponse),
    Failed(Problem),
}

/// What the upstream has said, asked once for all who want to know it meanwhile.
struct Answer {
    verdict: Verdict,
    asked_at: Instant,
    answered_at: Instant,
}

impl Answer {
    /// For those who come later, too: neither a failure nor a denial with a long body is.
    fn is_kept(&self) -> bool {
        match &self.verdict {
            Verdict::Allowed => true,
            Verdict::Denied(response) => response.body_len() <= DENIAL_MAX,
            Verdict::Failed(_) => false,
        }
    }
}

/// What the upstream has said, for all workers.
pub(super) struct Probes {
    answers: Memo<Mutex<Arc<OnceCell<Answer>>>>,
}

impl Default for Probes {
    fn default() -> Self {
        Self { answers: Memo::new(VERDICTS_MAX) }
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
        let host = caller.headers.get(HOST).map(HeaderValue::as_bytes).unwrap_or_default();
        let name = name(&caller.credentials, host, target);
        let arrived = Instant::now();
        // Of a question that was under way already, the answer may be too old to count, and another is asked.
        let deadline = arrived + options.timeout * 2;
        loop {
            let slot = self.probes.answers.get_or_default(name);
            let cell = Arc::clone(&slot.lock().unwrap_or_else(PoisonError::into_inner));
            let asked = cell.get_or_init(|| async {
                let asked_at = Instant::now();
                let verdict = timeout_at(asked_at + options.timeout, self.ask(caller, target)).await;
                let verdict = verdict.unwrap_or_else(|_| probe_failed(&"it took too long"));
                self.metrics.probe(match verdict {
                    Verdict::Allowed => "allowed",
                    Verdict::Denied(_) => "denied",
                    Verdict::Failed(_) => "failed",
                });
                Answer { verdict, asked_at, answered_at: Instant::now() }
            });
            let answer = timeout_at(deadline, asked).await.map_err(|_| failed())?;
            // What was asked after the caller came is as fresh as can be; what is not kept, those share who waited for it.
            let (kept, asked_at) = (answer.is_kept(), answer.asked_at);
            let counts = asked_at >= arrived
                || if kept { asked_at.elapsed() < options.cache } else { answer.answered_at >= arrived };
            if !kept || !counts {
                let mut there = slot.lock().unwrap_or_else(PoisonError::into_inner);
                if Arc::ptr_eq(&there, &cell) {
                    *there = Arc::default();
                }
            }
            if counts {
                return match &answer.verdict {
                    Verdict::Allowed => Ok(None),
                    Verdict::Denied(response) => Ok(Some(Arc::clone(response))),
                    Verdict::Failed(problem) => Err(problem.clone()),
                };
            }
        }
    }

    async fn ask(&self, caller: &Caller, target: &PathAndQuery) -> Verdict {
        let options = &caller.route.options;
        let request = question(target.clone(), caller.headers.clone(), &options.header);
        let (answer, _reservation) = exchange(self, request, BODY_MAX, &|| true).await;
        let (head, body) = match answer {
            Exchange::Complete(head, body) => (head, Some(body)),
            Exchange::Large(large) => (large.head, None),
            Exchange::Failed(error) => return probe_failed(&error),
            Exchange::Malformed(what) => return probe_failed(&what),
        };
        match (head.status, body) {
            (status, _) if status.is_success() => Verdict::Allowed,
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, Some(body)) => {
                let headers = recordable(&head.headers, &options.drop_headers);
                Verdict::Denied(Arc::new(Unrecorded::Response { status: head.status, headers, body }))
            }
            (status, _) => probe_failed(&format!("it was answered {status}")),
        }
    }
}

fn probe_failed(reason: &dyn std::fmt::Display) -> Verdict {
    tracing::warn!(%reason, "a probe has failed");
    Verdict::Failed(failed())
}

fn failed() -> Problem {
    Problem::new(
        Code::ProbeFailed,
        "Whether you may see the answer could not be found out; retry after Retry-After seconds.",
    )
}
