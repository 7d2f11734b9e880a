//! What `GET /records` is asked for.

use super::document::settled_at;
use super::problem::Problem;
use super::time;
use crate::idempotency::{Millis, Record, Recorded, State, Why};
use crate::ledger::tags;
use crate::store::{Tag, Version};

const LIMIT_DEFAULT: usize = 100;
const LIMIT_MAX: usize = 1000;

/// The parameters of a query, decoded; each may stand once, and only those that are taken may stand.
pub(super) struct Parameters(Vec<(String, String)>);

impl Parameters {
    /// Reads a query. Escapes are decoded, and nothing else: `+` is a plus.
    ///
    /// # Errors
    /// A bad escape, a parameter that stands twice.
    pub(super) fn parse(query: Option<&str>) -> Result<Self, Problem> {
        let mut parameters: Vec<(String, String)> = Vec::new();
        for text in query.unwrap_or_default().split('&').filter(|text| !text.is_empty()) {
            let (name, value) = text.split_once('=').unwrap_or((text, ""));
            let (Some(name), Some(value)) = (decode(name), decode(value)) else {
                return Err(Problem::invalid("The query has an escape that is none, or that is no UTF-8."));
            };
            if parameters.iter().any(|(earlier, _)| *earlier == name) {
                return Err(Problem::invalid(format!("The parameter {name:?} stands twice.")));
            }
            parameters.push((name, value));
        }
        Ok(Self(parameters))
    }

    pub(super) fn take(&mut self, name: &str) -> Option<String> {
        let at = self.0.iter().position(|(found, _)| found == name)?;
        Some(self.0.swap_remove(at).1)
    }

    /// A parameter's value, if `read` understands it.
    fn read<T>(&mut self, name: &str, right: &str, read: impl Fn(&str) -> Option<T>) -> Result<Option<T>, Problem> {
        let Some(text) = self.take(name) else { return Ok(None) };
        let wrong = || Problem::invalid(format!("The parameter {name} is {text:?}; it must be {right}."));
        read(&text).map(Some).ok_or_else(wrong)
    }

    /// `if_token`, which every act takes.
    pub(super) fn if_token(&mut self) -> Result<Option<Version>, Problem> {
        self.take("if_token").map(|text| token(&text)).transpose()
    }

    /// Asserts that all have been taken.
    pub(super) fn finish(&self, known: &str) -> Result<(), Problem> {
        let Some((name, _)) = self.0.first() else { return Ok(()) };
        Err(Problem::invalid(format!("There is no parameter {name:?} here; there are: {known}.")))
    }
}

/// A record's token as it was shown.
pub(super) fn token(text: &str) -> Result<Version, Problem> {
    let wrong = || Problem::invalid("The token is none: give it as the record shows it, or leave it out.");
    digits(text).map(Version).ok_or_else(wrong)
}

fn digits(text: &str) -> Option<u64> {
    text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((plain, escape)) = rest.split_once('%') {
        let (hex, after) = escape.split_at_checked(2)?;
        bytes.extend_from_slice(plain.as_bytes());
        bytes.push(u8::from_str_radix(hex, 16).ok().filter(|_| hex.bytes().all(|byte| byte.is_ascii_hexdigit()))?);
        rest = after;
    }
    bytes.extend_from_slice(rest.as_bytes());
    String::from_utf8(bytes).ok()
}

/// Which records, and how many.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Query {
    state: Option<Tag>,
    pub(super) after: u64,
    pub(super) limit: usize,
    filter: Filter,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Filter {
    route: Option<String>,
    status: Option<u16>,
    since: Option<Millis>,
    until: Option<Millis>,
    key: Option<String>,
}

impl Query {
    /// # Errors
    /// What is wrong with the first bad parameter.
    pub(super) fn parse(query: Option<&str>, now: Millis) -> Result<Self, Problem> {
        let mut parameters = Parameters::parse(query)?;
        let p = &mut parameters;
        let state = p.read("state", "claimed, completed or unknown", |text| match text {
            "claimed" => Some(tags::CLAIMED),
            "completed" => Some(tags::COMPLETED),
            "unknown" => Some(tags::UNKNOWN),
            _ => None,
        })?;
        let limit =
            |text: &str| digits(text).and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=LIMIT_MAX).contains(n));
        let limit = p.read("limit", "a number from 1 to 1000", limit)?.unwrap_or(LIMIT_DEFAULT);
        let after = p.read("after", "what an earlier page says as next", digits)?.unwrap_or(0);
        let status = |text: &str| digits(text).and_then(|n| u16::try_from(n).ok()).filter(|n| (100..1000).contains(n));
        let time = |text: &str| time::parse(text, now);
        let right = "a time such as 2026-01-31T12:00:00Z, or a span back from now such as 90s, 2h or 7d";
        let filter = Filter {
            route: p.take("route"),
            status: p.read("status", "an HTTP status", status)?,
            since: p.read("since", right, time)?,
            until: p.read("until", right, time)?,
            key: p.take("key"),
        };
        parameters.finish("state, route, status, since, until, key, limit, after")?;
        Ok(Self { state, after, limit, filter })
    }

    /// Which entries of the store to look at. In a shared one a claim may count as unknown already.
    pub(super) fn tag(&self, shared: bool) -> Option<Tag> {
        self.state.filter(|tag| !shared || *tag == tags::COMPLETED)
    }

    pub(super) fn wants(&self, record: &Record) -> bool {
        if self.state.is_some_and(|tag| tag != tags::of(record)) {
            return false;
        }
        let Filter { route, status: wanted, since, until, key } = &self.filter;
        let time = settled_at(record).unwrap_or(record.origin.claimed_at);
        route.as_ref().is_none_or(|route| record.origin.route == route.as_bytes())
            && key.as_ref().is_none_or(|key| record.origin.key == key.as_bytes())
            && wanted.is_none_or(|wanted| status(record) == Some(wanted))
            && since.is_none_or(|since| since <= time)
            && until.is_none_or(|until| time < until)
    }
}

/// The status of the response; of an unknown outcome, the one that made it so.
pub(super) fn status(record: &Record) -> Option<u16> {
    match &record.state {
        State::Completed { response: Recorded::Full(response), .. } => Some(response.status),
        State::Completed { response: Recorded::Omitted { status, .. }, .. } => Some(*status),
        State::Unknown { why: Why::Status(status), .. } => Some(*status),
        State::Unknown { .. } | State::Claimed { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(query: &str) -> Result<Query, Problem> {
        Query::parse(Some(query), Millis(100_000))
    }

    #[test]
    fn every_parameter_is_read() {
        let query = "state=unknown&route=/posts/%7Bid%7D&status=502&since=90s&until=1970-01-01T00:01:00Z&key=a%20b+%25&limit=7&after=12";
        let filter = Filter {
            route: Some("/posts/{id}".to_owned()),
            status: Some(502),
            since: Some(Millis(10_000)),
            until: Some(Millis(60_000)),
            key: Some("a b+%".to_owned()),
        };
        assert_eq!(parse(query).unwrap(), Query { state: Some(tags::UNKNOWN), after: 12, limit: 7, filter });
        let all = Query { state: None, after: 0, limit: 100, filter: Filter::default() };
        assert_eq!(Query::parse(None, Millis(0)).unwrap(), all);
        assert_eq!(parse("&").unwrap(), all);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for query in [
            "state=Unknown",
            "state=",
            "status=99",
            "status=1000",
            "status=5xx",
            "since=yesterday",
            "until=7",
            "limit=0",
            "limit=1001",
            "limit=+7",
            "after=x",
            "after=-1",
            "after=18446744073709551616",
            "nothing=1",
            "=",
            "state",
            "limit=1&limit=1",
            "key=%",
            "key=%2",
            "key=%+1",
            "key=%zz",
            "key=%ff",
            "if_token=1",
        ] {
            assert!(parse(query).is_err(), "{query}");
        }
        for wrong in ["", "x", "-1", "+1", "1.0", "18446744073709551616"] {
            assert!(token(wrong).is_err(), "{wrong}");
        }
        assert_eq!(token("18446744073709551615").unwrap(), Version(u64::MAX));
    }
}
