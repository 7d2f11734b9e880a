//! A record as JSON: what an operator needs to know of it, and nothing that a client has sent or been told in confidence.

use super::query::status;
use super::time;
use crate::idempotency::{Millis, Record, Recorded, State, Why};
use crate::ledger::Shown;
use serde_json::{Value, json};

/// When the record's outcome became known, or known to be unknown.
pub(super) fn settled_at(record: &Record) -> Option<Millis> {
    match record.state {
        State::Claimed { .. } => None,
        State::Completed { completed_at, .. } => Some(completed_at),
        State::Unknown { since, .. } => Some(since),
    }
}

pub(super) fn of(shown: &Shown) -> Value {
    let Shown { id, version, record, in_flight } = shown;
    let origin = &record.origin;
    let (state, why) = match &record.state {
        State::Claimed { .. } => ("claimed", None),
        State::Completed { .. } => ("completed", None),
        State::Unknown { why, .. } => ("unknown", Some(reason(*why))),
    };
    let (recorded, sizes) = match &record.state {
        State::Completed { response: Recorded::Full(response), .. } => {
            let fields = response.headers.iter().map(|(name, value)| name.len() + value.len());
            (Some("full"), Some((fields.sum::<usize>(), response.body.len())))
        }
        State::Completed { response: Recorded::Omitted { .. }, .. } => (Some("omitted"), None),
        State::Claimed { .. } | State::Unknown { .. } => (None, None),
    };
    json!({
        "id": id.to_string(),
        "token": version.0.to_string(),
        "state": state,
        "key": String::from_utf8_lossy(&origin.key),
        // Nothing else is ever recorded.
        "method": "POST",
        "path": String::from_utf8_lossy(&origin.path),
        "route": String::from_utf8_lossy(&origin.route),
        "claimed_at": time::format(origin.claimed_at),
        "settled_at": settled_at(record).map(time::format),
        "expires_at": record.expires_at().map(time::format),
        "attempts": origin.attempts,
        "status": status(record),
        "why": why,
        "in_flight": in_flight,
        "recorded": recorded,
        "header_bytes": sizes.map(|(headers, _)| headers),
        "body_bytes": sizes.map(|(_, body)| body),
    })
}

fn reason(why: Why) -> &'static str {
    match why {
        Why::Reset => "reset",
        Why::Timeout => "timeout",
        Why::Malformed => "malformed",
        Why::Status(_) => "status",
        Why::Crash => "crash",
        Why::Lease => "lease",
        Why::Abandoned => "abandoned",
        Why::Shutdown => "shutdown",
        Why::EarlierSend => "earlier_send",
    }
}
