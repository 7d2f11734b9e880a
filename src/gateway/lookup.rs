//! `unknown_outcome = "lookup"`: the upstream is asked what became of a request.

use super::forward::{Exchange, Forward, exchange, outcome_word};
use super::problem::{Problem, is_a_gateways};
use super::question::{Asked, Template, question};
use super::reply::{recordable, to_omitted, to_recorded};
use super::{GatewayInquiry, SharedClaim, unavailable};
use crate::idempotency::outcome::Class;
use crate::idempotency::{OutcomeTable, Recorded, Verdict};
use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::response;
use std::time::Duration;
use tokio::time::timeout;

/// `lookup` of a route.
#[derive(Clone, Debug)]
pub struct Options {
    pub path: Template,
    /// Knows no class but [`Class::NotExecuted`] for statuses that prove that nothing was executed.
    pub not_executed: OutcomeTable,
    pub timeout: Duration,
}

impl Forward {
    /// Asks what became of the request whose outcome is unknown, and acts on the answer.
    ///
    /// # Errors
    /// The drain is over, or the store fails: whatever `on_store_error` says, what may have been executed is not sent again.
    pub(super) async fn look_up(&self, inquiry: GatewayInquiry) -> Result<SharedClaim, Problem> {
        let verdict = tokio::select! {
            biased;
            () = self.gateway.give_up.cancelled() => return Err(Problem::draining()),
            verdict = self.ask(inquiry.key()) => verdict,
        };
        let word = match &verdict {
            Verdict::Executed(_) => "executed",
            Verdict::NotExecuted => "not_executed",
            Verdict::Undecided => "undecided",
        };
        self.gateway.metrics.lookup(word);
        tracing::info!(record = %inquiry.id(), verdict = word, "the upstream was asked what became of a request");
        inquiry.tell(verdict).await.map_err(|error| unavailable(&error))
    }

    async fn ask(&self, key: &Bytes) -> Verdict {
        let (Some(options), Some((path, params))) = (&self.route.options.lookup, &self.asked) else {
            return Verdict::Undecided;
        };
        let asked = Asked { pattern: &self.route.options.pattern, path, params };
        let Some(target) = options.path.target(key, &asked) else { return Verdict::Undecided };
        let request = question(target, self.parts.headers.clone(), &self.route.options.header);
        let exchange = exchange(&self.gateway, request, self.route.options.max_recorded_body, &|| true);
        match timeout(options.timeout, exchange).await {
            Ok((Exchange::Complete(head, body), _reservation)) => self.verdict(options, &head, Some(body)),
            Ok((Exchange::Large(large), _)) => self.verdict(options, &large.head, None),
            Ok((Exchange::Failed(_) | Exchange::Malformed(_), _)) | Err(_) => Verdict::Undecided,
        }
    }

    /// What the answer says; `body`: unless it is too large to be recorded.
    fn verdict(&self, options: &Options, head: &response::Parts, body: Option<Bytes>) -> Verdict {
        let status = head.status.as_u16();
        // A gateway on the way has answered by itself: of the question, not of what was asked for.
        if is_a_gateways(&head.headers, body.as_deref()) {
            return Verdict::Undecided;
        }
        match outcome_word(head) {
            Some(Class::NotExecuted) => return Verdict::NotExecuted,
            Some(Class::Unknown) => return Verdict::Undecided,
            // It was executed; whether this is its answer, the status says.
            Some(Class::Final) if !head.status.is_success() => return Verdict::Undecided,
            Some(Class::Final) | None => {}
        }
        if head.status.is_success() {
            return Verdict::Executed(match body {
                Some(body) => {
                    let kept = recordable(&head.headers, &self.route.options.drop_headers);
                    Recorded::Full(to_recorded(head.status, &kept, body))
                }
                None => to_omitted(head.status, &head.headers),
            });
        }
        match options.not_executed.classify(status, head.headers.contains_key(RETRY_AFTER)) {
            Class::NotExecuted => Verdict::NotExecuted,
            Class::Final | Class::Unknown => Verdict::Undecided,
        }
    }
}
