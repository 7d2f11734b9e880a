//! What the answers of real gateways say, for the audit.

use crate::audit::Word;
use crate::support::Response;

/// The code of one of a gateway's own answers.
pub(crate) fn problem(answer: &Response) -> Option<String> {
    let ours = answer.header("content-type") == Some("application/problem+json");
    ours.then(|| answer.json()["code"].as_str().unwrap().to_owned())
}

/// All of an answer that a replay of it gives again, its body as a hash. Its fields stand in an order of their own; `Date` counts where the
/// upstream sent this one: the gateway adds one otherwise.
pub(crate) fn recorded(answer: &Response, date: &str) -> String {
    let dated = answer.header("date") == Some(date);
    let not_recorded = ["idempotency-replayed", "age", "cache-status", "set-cookie", "connection"];
    let lines = answer.headers.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.clone()));
    let counts = |name: &str| !not_recorded.contains(&name) && (dated || name != "date");
    let mut lines = lines.filter(|(name, _)| counts(name)).collect::<Vec<_>>();
    lines.sort();
    format!("{} {lines:?} {} bytes, {:x}", answer.status, answer.body.len(), xxhash_rust::xxh3::xxh3_128(&answer.body))
}

/// Of an upstream that marks what it has not executed, or has not said to have executed, with a field `X-Scripted`, and else
/// answers 201 or 500 with the number of the execution.
pub(crate) fn word(answer: Option<&Response>, date: &str) -> Word {
    let Some(answer) = answer else { return Word::Silence };
    if answer.header("proxy-status").is_some_and(|status| status.contains("proxy_internal_error")) {
        return Word::Odd(format!("{answer:?}"));
    }
    match (answer.status, problem(answer).as_deref(), answer.header("x-scripted")) {
        (201 | 500, None, None) => match execution(&answer.text()) {
            Some(number) => Word::Final { number, content: recorded(answer, date), replayed: answer.replayed() },
            None => Word::Odd(format!("{answer:?}")),
        },
        (409, Some("outcome_unknown"), None) => Word::Unknown,
        (502, None, Some("unknown")) | (502, Some("upstream_broken"), None) => Word::JustUnknown,
        (504, Some("upstream_timeout"), None) => Word::TimedOut,
        (429 | 503, None, Some("refused")) => Word::Refused,
        (409, Some("in_progress"), None) => Word::InProgress,
        (503, Some("store_unavailable" | "overloaded"), None) => Word::Unavailable,
        (422, Some("key_reused"), None) => Word::KeyReused,
        _ => Word::Odd(format!("{answer:?}")),
    }
}

/// What the upstream has put into its answer.
fn execution(text: &str) -> Option<u64> {
    let (_, rest) = text.split_once("\"execution\":")?;
    rest.split_once('}')?.0.parse().ok()
}
