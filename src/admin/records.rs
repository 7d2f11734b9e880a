//! The records API: list, show, resolve, forget.

use super::access::{self, TokenFile};
use super::problem::{Code, Problem};
use super::query::{self, Parameters, Query};
use super::{Answer, answer, document, message};
use crate::gateway::GatewayLedger;
use crate::idempotency::{Event, Policy, Record, Resolution};
use crate::ledger::{Act, Acted, Refusal};
use crate::store::{RecordId, StoreError, Version};
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, SET_COOKIE};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode};
use http_body::Body;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// What a route says about its records.
#[derive(Clone, Debug)]
pub(crate) struct RouteRules {
    /// Its pattern, as configured.
    pub(crate) pattern: String,
    pub(crate) policy: Policy,
    /// Largest recorded body, in bytes.
    pub(crate) max_recorded_body: usize,
    /// Response headers that are not recorded.
    pub(crate) drop_headers: Vec<HeaderName>,
}

impl RouteRules {
    /// Where no route is configured: the defaults.
    pub(super) fn unconfigured() -> Self {
        Self {
            pattern: String::new(),
            policy: Policy::default(),
            max_recorded_body: 1 << 20,
            drop_headers: vec![SET_COOKIE],
        }
    }
}

/// Bytes of a request beside the response that it bears.
const BODY_EXTRA: usize = 64 << 10;
/// Time for a request's body to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Bodies held at a time; others wait, within that time.
const BODIES_MAX: usize = 8;

pub(crate) struct Records {
    ledger: GatewayLedger,
    tokens: Option<Arc<TokenFile>>,
    rules: Arc<[RouteRules]>,
    /// Largest body of a request, in bytes.
    body_max: usize,
    bodies: Semaphore,
}

impl Records {
    pub(crate) fn new(ledger: GatewayLedger, tokens: Option<Arc<TokenFile>>, mut rules: Vec<RouteRules>) -> Self {
        if rules.is_empty() {
            rules.push(RouteRules::unconfigured());
        }
        let largest = rules.iter().map(|rules| rules.max_recorded_body).max().unwrap_or(0);
        let (body_max, bodies) = (largest.saturating_add(BODY_EXTRA), Semaphore::new(BODIES_MAX));
        Self { ledger, tokens, rules: rules.into(), body_max, bodies }
    }

    /// Answers a request for `/records` or what is below it; `unix`: it has come over a Unix socket.
    pub(super) async fn answer(&self, request: Request<Incoming>, unix: bool) -> Answer {
        let (head, body) = request.into_parts();
        let mut response = match self.route(&head, body, unix).await {
            Ok(document) => answer(StatusCode::OK, "application/json", format!("{document}\n")),
            Err(problem) => problem.into_response(),
        };
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }

    async fn route(&self, head: &Parts, body: Incoming, unix: bool) -> Result<Value, Problem> {
        let who = access::check(self.tokens.as_deref(), head, unix)?;
        let is_read = matches!(head.method, Method::GET | Method::HEAD);
        let below = head.uri.path().strip_prefix("/records").unwrap_or_default();
        let Some(below) = below.strip_prefix('/') else {
            return if is_read { self.list(head).await } else { Err(Problem::method("GET, HEAD")) };
        };
        let (id, rest) = below.split_once('/').map_or((below, None), |(id, rest)| (id, Some(rest)));
        let id = parse_id(id).ok_or_else(Problem::not_found)?;
        match (rest, &head.method) {
            (None, &Method::DELETE) => self.forget(who, id, head, &body).await,
            (None, _) if is_read => self.show(id, head).await,
            (None, _) => Err(Problem::method("GET, HEAD, DELETE")),
            (Some("resolve"), &Method::POST) => self.resolve(who, id, head, body).await,
            (Some("resolve"), _) => Err(Problem::method("POST")),
            (Some(_), _) => Err(Problem::not_found()),
        }
    }

    async fn list(&self, head: &Parts) -> Result<Value, Problem> {
        let query = Query::parse(head.uri.query(), self.ledger.now())?;
        let shared = self.rules.iter().any(|rules| rules.policy.lease_ms.is_some());
        let (tag, policy) = (query.tag(shared), |record: &Record| self.policy(record));
        let listed = self.ledger.list(tag, query.after, query.limit, policy, |record| query.wants(record)).await;
        let listed = listed.map_err(|error| unavailable(&error.to_string()))?;
        let records = listed.records.iter().map(document::of).collect::<Vec<_>>();
        Ok(json!({ "records": records, "next": listed.next.map(|next| next.to_string()) }))
    }

    fn policy(&self, record: &Record) -> Policy {
        of_route(&self.rules, record).map_or_else(Policy::default, |rules| rules.policy)
    }

    async fn show(&self, id: RecordId, head: &Parts) -> Result<Value, Problem> {
        Parameters::parse(head.uri.query())?.finish("none")?;
        let shown = self
            .ledger
            .show(id, |record| self.policy(record))
            .await
            .map_err(|error: StoreError| unavailable(&error.to_string()))?;
        shown.as_ref().map(document::of).ok_or_else(Problem::not_found)
    }

    async fn forget(&self, who: Arc<str>, id: RecordId, head: &Parts, body: &Incoming) -> Result<Value, Problem> {
        let if_version = if_token(head)?;
        if !body.is_end_stream() {
            return Err(Problem::invalid("A record is forgotten without a body."));
        }
        self.act(who, id, if_version, |_| Ok(Event::Forget)).await
    }

    async fn resolve(&self, who: Arc<str>, id: RecordId, head: &Parts, body: Incoming) -> Result<Value, Problem> {
        let media_type = MediaType::of(&head.headers)?;
        let in_query = if_token(head)?;
        // Only who waits here holds a body; what was read is let go with the permit.
        let read = async {
            let permit = self.bodies.acquire().await;
            (self.read(body).await, permit)
        };
        let too_slow = || Problem::new(Code::RequestTimeout, "The body has not arrived in time; nothing was changed.");
        let (body, _permit) = timeout(BODY_TIMEOUT, read).await.map_err(|_| too_slow())?;
        let (resolution, in_body) = match media_type {
            MediaType::Message => (Given::Response(body?), None),
            MediaType::Json => Given::parse(&body?)?,
        };
        if in_query.is_some() && in_body.is_some() {
            return Err(Problem::invalid("if_token stands both in the query and in the body."));
        }
        let if_version = in_query.or(in_body);
        match resolution {
            Given::NotExecuted => self.act(who, id, if_version, |_| Ok(Event::Resolve(Resolution::NotExecuted))).await,
            Given::Response(message) => {
                let message = message::parse(&message).map_err(response_invalid)?;
                let resolve = |rules: &RouteRules| Ok(Event::Resolve(Resolution::Response(message.record(rules)?)));
                self.act(who, id, if_version, resolve).await
            }
        }
    }

    /// A request's body, whole.
    async fn read(&self, body: Incoming) -> Result<Bytes, Problem> {
        let too_large = || {
            let detail =
                format!("The body is larger than the largest response that is recorded: {} bytes.", self.body_max);
            Problem::new(Code::BodyTooLarge, detail)
        };
        if body.size_hint().lower() > self.body_max as u64 {
            return Err(too_large());
        }
        match Limited::new(body, self.body_max).collect().await {
            Ok(read) => Ok(read.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
            Err(_) => Err(Problem::invalid("The body has broken off; nothing was changed.")),
        }
    }

    async fn act(
        &self,
        who: Arc<str>,
        id: RecordId,
        if_version: Option<Version>,
        event: impl FnOnce(&RouteRules) -> Result<Event, String> + Send + 'static,
    ) -> Result<Value, Problem> {
        let rules = Arc::clone(&self.rules);
        let decide = move |record: &Record| {
            let rules = of_route(&rules, record).cloned().unwrap_or_else(RouteRules::unconfigured);
            event(&rules).map(|event| (rules.policy, event))
        };
        let acted = self.ledger.act(Act { id, if_version, who, decide: Box::new(decide) }).await;
        let Acted { before, after } = acted.map_err(refused)?;
        Ok(json!({
            "id": id.to_string(),
            "before": document::of(&before),
            "after": after.as_ref().map(document::of),
        }))
    }
}

/// A route that is configured no more leaves its records to the first one's rules.
fn of_route<'a>(rules: &'a [RouteRules], record: &Record) -> Option<&'a RouteRules> {
    rules.iter().find(|rules| rules.pattern.as_bytes() == record.origin.route).or(rules.first())
}

fn parse_id(text: &str) -> Option<RecordId> {
    let hex = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let id = u128::from_str_radix(text, 16).ok().filter(|_| hex)?;
    Some(RecordId(id.to_be_bytes()))
}

/// The condition of an act, from its query, which says nothing else.
fn if_token(head: &Parts) -> Result<Option<Version>, Problem> {
    let mut parameters = Parameters::parse(head.uri.query())?;
    let if_version = parameters.if_token()?;
    parameters.finish("if_token")?;
    Ok(if_version)
}

fn response_invalid(why: String) -> Problem {
    Problem::new(Code::ResponseInvalid, format!("The response cannot be replayed: {why}."))
}

fn unavailable(why: &str) -> Problem {
    Problem::new(Code::StoreUnavailable, format!("The store did not answer: {why}."))
}

fn refused(refusal: Refusal<String>) -> Problem {
    match refusal {
        Refusal::NotFound => Problem::not_found(),
        Refusal::InFlight => {
            let detail =
                "Its request is under way, or its outcome has yet to be written; try again once it is settled.";
            Problem::new(Code::RecordInFlight, detail)
        }
        Refusal::NotUnknown => {
            let detail = "Its outcome is known; only an unknown one is resolved. It can be forgotten.";
            Problem::new(Code::RecordNotUnknown, detail)
        }
        Refusal::Changed => {
            let detail = "The record is not any more what it was; look at it again. Nothing was changed.";
            Problem::new(Code::RecordChanged, detail)
        }
        Refusal::Refused(why) => response_invalid(why),
        Refusal::Store(why) => unavailable(&why),
    }
}

/// What a resolve's body may be. No page can make a browser send these without asking first.
enum MediaType {
    Json,
    Message,
}

impl MediaType {
    fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let mut lines = headers.get_all(CONTENT_TYPE).iter();
        let line = lines.next().filter(|_| lines.next().is_none()).and_then(|line| line.to_str().ok());
        let essence = line.and_then(|line| line.split(';').next()).unwrap_or_default().trim();
        if essence.eq_ignore_ascii_case("application/json") {
            Ok(Self::Json)
        } else if essence.eq_ignore_ascii_case("message/http") {
            Ok(Self::Message)
        } else {
            Err(Problem::invalid("Content-Type must be application/json, or message/http for a response message."))
        }
    }
}

/// What the operator says.
enum Given {
    NotExecuted,
    /// A response message.
    Response(Bytes),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    not_executed: Option<bool>,
    response: Option<String>,
    if_token: Option<String>,
}

impl Given {
    fn parse(body: &[u8]) -> Result<(Self, Option<Version>), Problem> {
        let right = "{\"not_executed\": true} or {\"response\": \"HTTP/1.1 201 Created\\r\\n…\"}, each with \"if_token\" or without";
        let document: Document = serde_json::from_slice(body)
            .map_err(|error| Problem::invalid(format!("The body is not understood ({error}); it must be {right}.")))?;
        let given = match (document.not_executed, document.response) {
            (Some(true), None) => Self::NotExecuted,
            (None, Some(message)) => Self::Response(message.into()),
            _ => return Err(Problem::invalid(format!("The body must be {right}."))),
        };
        Ok((given, document.if_token.as_deref().map(query::token).transpose()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_32_hex_digits() {
        let id = RecordId(*b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\xff");
        assert_eq!(parse_id("000102030405060708090a0b0c0d0eff"), Some(id));
        assert_eq!(parse_id("000102030405060708090A0B0C0D0EFF"), Some(id));
        for wrong in ["", "00", "000102030405060708090a0b0c0d0ef", "+00102030405060708090a0b0c0d0eff", &"0".repeat(33)]
        {
            assert_eq!(parse_id(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_resolution_says_one_thing() {
        let parse = |text: &str| Given::parse(text.as_bytes());
        assert!(matches!(parse(r#"{"not_executed": true}"#), Ok((Given::NotExecuted, None))));
        let (given, version) = parse(r#"{"response": "a\r\n", "if_token": "7"}"#).ok().unwrap();
        assert!(matches!(given, Given::Response(message) if message == "a\r\n"));
        assert_eq!(version, Some(Version(7)));
        for wrong in [
            "",
            "{}",
            "[]",
            "null",
            "true",
            r#"{"not_executed": false}"#,
            r#"{"not_executed": 1}"#,
            r#"{"response": {}}"#,
            r#"{"not_executed": true, "response": "a"}"#,
            r#"{"not_executed": true, "if_token": 7}"#,
            r#"{"not_executed": true, "if_token": "x"}"#,
            r#"{"not_executed": true, "iftoken": "7"}"#,
            r#"{"not_executed": true, "not_executed": true}"#,
            r#"{"not_executed": true} x"#,
            r#"{"if_token": "7"}"#,
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
