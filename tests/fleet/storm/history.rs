//! What the clients of one key have seen.

use crate::fleet::{assert_same, problem};
use crate::support::Response;
use std::time::Instant;

/// What an answer says of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Final,
    /// The record says that the outcome is unknown.
    Unknown,
    /// This request's outcome is unknown; the record may not say so yet.
    JustUnknown,
    TimedOut,
    Refused,
    InProgress,
    Unavailable,
    KeyReused,
    Odd,
}

pub(super) fn classify(answer: &Response) -> Answer {
    let broken = answer.header("proxy-status").is_some_and(|status| status.contains("proxy_internal_error"));
    match (answer.status, problem(answer).as_deref(), answer.header("x-scripted")) {
        _ if broken => Answer::Odd,
        (201 | 500, None, None) => Answer::Final,
        (409, Some("outcome_unknown"), None) => Answer::Unknown,
        (502, None, Some("unknown")) | (502, Some("upstream_broken"), None) => Answer::JustUnknown,
        (504, Some("upstream_timeout"), None) => Answer::TimedOut,
        (429 | 503, None, Some("refused")) => Answer::Refused,
        (409, Some("in_progress"), None) => Answer::InProgress,
        (503, Some("store_unavailable"), None) => Answer::Unavailable,
        (422, Some("key_reused"), None) => Answer::KeyReused,
        _ => Answer::Odd,
    }
}

/// What one key has seen.
pub(super) struct History {
    pub(super) seen: Option<Seen>,
    pub(super) unknown: bool,
    pub(super) two_bodies: bool,
    pub(super) began: Instant,
    /// When the last answer came.
    pub(super) ended: Instant,
    /// What came when from which gateway, for whoever reads a failure.
    pub(super) answers: Vec<(Instant, usize, Option<Answer>)>,
}

/// A final answer.
pub(super) struct Seen {
    pub(super) answer: Response,
    pub(super) body: usize,
    /// It came from a record. (Another may have come straight from the upstream, while the store could not be reached.)
    pub(super) recorded: bool,
    /// Which gateway gave it, and how often that place had died before.
    pub(super) by: (usize, u64),
}

impl History {
    pub(super) fn new(two_bodies: bool) -> Self {
        let now = Instant::now();
        Self { seen: None, unknown: false, two_bodies, began: now, ended: now, answers: Vec::new() }
    }

    pub(super) fn see_final(&mut self, key: &str, body: usize, answer: Response, by: (usize, u64)) {
        let recorded = answer.replayed();
        match &mut self.seen {
            Some(seen) => {
                assert_eq!(seen.body, body, "{key}: two bodies, and an answer to both: {:?}, {answer:?}", seen.answer);
                assert_same(key, &seen.answer, &answer);
                seen.recorded |= recorded;
            }
            None => self.seen = Some(Seen { answer, body, recorded, by }),
        }
    }

    /// Its first owner may yet say what became of it.
    pub(super) fn see_unknown(&mut self, key: &str) {
        self.unknown = true;
        if let Some(seen) = &self.seen {
            assert!(!seen.recorded, "{key}: first {:?}, then unknown", seen.answer);
        }
    }
}
