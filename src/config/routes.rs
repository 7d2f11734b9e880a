//! `[[routes]]` and `[idempotency]`: any key of the latter may stand in the former, and beats it there.

use super::questions::{self, Questions};
use super::reader::{At, Errors, Node, Section, Value, boolean, choice, count, duration, size, string};
use super::sections::COUNT_MAX;
use crate::gateway::route::Pattern;
use crate::gateway::scope::{Part, is_credential};
use crate::gateway::{MissingKey, Mode, OnStoreError, ReplayAuth, RouteOptions};
use crate::idempotency::outcome::OutcomeLists;
use crate::idempotency::{Concurrent, FingerprintMode, FingerprintSettings, OutcomeTable, Policy, UnknownOutcome};
use http::HeaderName;
use std::time::Duration;

const DEFAULT_ROUTES: [&str; 2] = ["/posts", "/v1/workspaces/{workspace}/posts"];
const DEFAULT_CREDENTIAL_HEADERS: [&str; 4] = ["cookie", "x-api-key", "api-key", "x-auth-token"];
const TICK: Duration = Duration::from_millis(1);
/// How an outcome table's messages about `[idempotency.outcomes]` begin.
const GENERAL_OUTCOMES: &str = "[idempotency.outcomes] ";

/// Values that were written, each with its place.
#[derive(Clone, Default)]
struct Written {
    mode: Option<(Mode, At)>,
    header: Option<(HeaderName, At)>,
    missing_key: Option<(MissingKey, At)>,
    scope: Option<(Vec<Part>, At)>,
    fingerprint: Option<(FingerprintMode, At)>,
    concurrent: Option<(Concurrent, At)>,
    wait_timeout: Option<(Duration, At)>,
    retention: Option<(Duration, At)>,
    unknown_retention: Option<(Duration, At)>,
    unknown_outcome: Option<(UnknownOutcome, At)>,
    on_store_error: Option<(OnStoreError, At)>,
    max_recorded_body: Option<(u64, At)>,
    max_waiters_per_key: Option<(usize, At)>,
    drop_headers: Option<(Vec<HeaderName>, At)>,
    fingerprint_ignore: Option<(Vec<String>, At)>,
    fingerprint_headers: Option<(Vec<HeaderName>, At)>,
    credential_headers: Option<(Vec<HeaderName>, At)>,
    trusted_headers: Option<(Vec<HeaderName>, At)>,
    replay_auth: Option<(ReplayAuth, At)>,
    questions: Questions,
    outcomes: OutcomeLists,
    outcomes_at: Option<At>,
    /// Where each list of outcomes was written, by its name.
    outcome_lists_at: Vec<(&'static str, At)>,
    /// Keys that were written, but wrongly: nothing is concluded from their defaults.
    wrong: Vec<&'static str>,
}

/// Reads `[idempotency]`'s keys from wherever they stand.
fn written(section: &mut Section<'_>) -> Written {
    let mut written = Written::default();
    macro_rules! key {
        ($name:ident, $parse:expr) => {
            key!($name, read, $parse)
        };
        ($name:ident, $read:ident, $parse:expr) => {
            let (at, before) = (section.at(stringify!($name)), section.errors.count());
            written.$name = section.$read(stringify!($name), $parse).map(|value| (value, at));
            if section.errors.count() > before {
                written.wrong.push(stringify!($name));
            }
        };
    }
    key!(mode, choice(&[("enforce", Mode::Enforce), ("observe", Mode::Observe)]));
    key!(header, key_header);
    let missing = [("pass", MissingKey::Pass), ("reject", MissingKey::Reject), ("derive", MissingKey::Derive)];
    key!(missing_key, choice(&missing));
    key!(scope, read_list, part);
    let modes = [("json", FingerprintMode::Json), ("raw", FingerprintMode::Raw), ("none", FingerprintMode::None)];
    key!(fingerprint, choice(&modes));
    key!(concurrent, choice(&[("wait", Concurrent::Wait), ("conflict", Concurrent::Conflict)]));
    // Zero: do not wait.
    key!(wait_timeout, duration(Duration::ZERO));
    key!(retention, duration(TICK));
    key!(unknown_retention, duration(TICK));
    key!(unknown_outcome, unknown_outcome);
    key!(on_store_error, choice(&[("reject", OnStoreError::Reject), ("pass", OnStoreError::Pass)]));
    key!(max_recorded_body, size(0));
    key!(max_waiters_per_key, count(0, COUNT_MAX));
    key!(drop_headers, read_list, header_name);
    key!(fingerprint_ignore, read_list, string);
    key!(fingerprint_headers, read_list, header_name);
    key!(credential_headers, read_list, header_name);
    key!(trusted_headers, read_list, header_name);
    key!(replay_auth, replay_auth);
    if let Some(message) = written.scope.as_ref().and_then(|(scope, _)| scope_error(scope)) {
        let at = written.scope.take().map_or(At::Nowhere, |(_, at)| at);
        section.add(&at, "scope", &message);
        written.wrong.push("scope");
    }
    written.questions = questions::written(section);
    let name = section.key("outcomes");
    if let Some(node) = section.take("outcomes") {
        written.outcomes_at = Some(node.at.clone());
        let mut lists = Section::new(&name, Some(node), section.errors);
        let names = ["final", "not_executed", "unknown"];
        written.outcome_lists_at = names.map(|list| (list, lists.at(list))).to_vec();
        written.outcomes.final_ = lists.read_list("final", string);
        written.outcomes.not_executed = lists.read_list("not_executed", string);
        written.outcomes.unknown = lists.read_list("unknown", string);
        lists.finish();
    }
    written
}

/// The header that bears the key. What frames or routes a message, or is a credential, cannot.
fn key_header(value: &Value) -> Result<HeaderName, String> {
    use http::header::{
        AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, EXPECT, HOST, TE, TRAILER, TRANSFER_ENCODING,
        UPGRADE, VIA,
    };
    const TAKEN: [HeaderName; 12] = [
        AUTHORIZATION,
        CONNECTION,
        CONTENT_LENGTH,
        CONTENT_TYPE,
        COOKIE,
        EXPECT,
        HOST,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
        UPGRADE,
        VIA,
    ];
    let name = header_name(value)?;
    if TAKEN.contains(&name) {
        return Err(format!("{name} has another meaning in HTTP; choose a header of its own for the key"));
    }
    Ok(name)
}

fn unknown_outcome(value: &Value) -> Result<UnknownOutcome, String> {
    // Its age is known once the upstream's time limits are.
    let lookup = UnknownOutcome::Lookup { min_age_ms: u64::MAX };
    choice(&[("hold", UnknownOutcome::Hold), ("forward", UnknownOutcome::Forward), ("lookup", lookup)])(value)
}

fn replay_auth(value: &Value) -> Result<ReplayAuth, String> {
    choice(&[("scope", ReplayAuth::Scope), ("probe", ReplayAuth::Probe), ("none", ReplayAuth::None)])(value)
}

fn header_name(value: &Value) -> Result<HeaderName, String> {
    let text = string(value)?;
    HeaderName::try_from(text.as_str()).map_err(|_| format!("{text:?} is no header name"))
}

fn scope_error(parts: &[Part]) -> Option<String> {
    if parts.is_empty() {
        return Some("needs at least one part, such as \"authorization\"".to_owned());
    }
    let twice = parts.iter().enumerate().find(|(n, part)| parts.iter().take(*n).any(|earlier| earlier == *part));
    twice.map(|(_, part)| format!("names {part} twice"))
}

fn part(value: &Value) -> Result<Part, String> {
    let text = string(value)?;
    let part = match text.split_once(':') {
        None => match text.as_str() {
            "authorization" => Some(Part::Authorization),
            "host" => Some(Part::Host),
            "path" => Some(Part::Path),
            "client-cert" => Some(Part::ClientCert),
            _ => None,
        },
        Some((_, "")) => None,
        // A cookie's name is a token (RFC 6265 §4.1.1), as a header's: no request could bear another.
        Some(("cookie", name)) => HeaderName::try_from(name).is_ok().then(|| Part::Cookie(name.to_owned())),
        Some(("path", name)) => Some(Part::PathParam(name.to_owned())),
        Some(("jwt", claim)) => Some(Part::Jwt(claim.to_owned())),
        // The same header, whichever way it is written.
        Some(("header", name)) => match HeaderName::try_from(name) {
            Ok(name) if name == http::header::AUTHORIZATION => Some(Part::Authorization),
            Ok(name) => Some(Part::Header(name)),
            Err(_) => None,
        },
        Some(_) => None,
    };
    part.ok_or_else(|| {
        format!(
            "{text:?} is no part of a scope; there are authorization, client-cert, cookie:NAME, header:NAME, host, \
             jwt:CLAIM, path and path:NAME"
        )
    })
}

/// What `[server]` and `[auth]` do not have, and did not mean to have: neither written nor miswritten.
#[derive(Clone, Copy)]
pub(super) struct Absent {
    pub(super) trusted_proxies: bool,
    /// Certificates that clients must show.
    pub(super) client_certs: bool,
    /// Keys for tokens.
    pub(super) token_keys: bool,
}

/// All routes, in order. `upstream_wait`: how long the upstream may be at work on a request.
pub(super) fn resolve(
    routes: Option<Node>,
    idempotency: Option<Node>,
    absent: Absent,
    upstream_wait: Duration,
    errors: &mut Errors,
) -> Vec<RouteOptions> {
    let mut section = Section::new("idempotency", idempotency, errors);
    let general = written(&mut section);
    section.finish();
    if let Err(messages) = OutcomeTable::new(&general.outcomes, &OutcomeLists::default()) {
        messages.iter().for_each(|message| outcome_error("idempotency", &general, message, errors));
    }
    let nodes = match routes {
        None => DEFAULT_ROUTES.into_iter().map(default_route).collect(),
        Some(Node { value: Value::Array(nodes), .. }) => nodes,
        Some(Node { at, .. }) => {
            errors.add(&at, "routes", "must be a list of tables: [[routes]]");
            Vec::new()
        }
    };
    let mut resolved: Vec<RouteOptions> = Vec::new();
    for (n, node) in nodes.into_iter().enumerate() {
        let at = node.at.clone();
        let name = format!("routes[{n}]");
        let Some(route) = route(&name, node, &general, absent, upstream_wait, errors) else { continue };
        let same = |other: &&RouteOptions| same_paths(other, &route);
        if let Some(other) = resolved.iter().find(same) {
            let message = format!("{} matches the same paths as {}", route.pattern.as_str(), other.pattern.as_str());
            errors.add(&at, &format!("{name}.path"), &message);
        }
        resolved.push(route);
    }
    resolved
}

fn default_route(path: &str) -> Node {
    let mut node = Node::empty_table();
    if let Value::Table(table) = &mut node.value {
        table.insert("path".to_owned(), Node::string(path, At::Nowhere));
    }
    node
}

/// Whether two routes match the very same paths: parameter names do not count, nor does case if either ignores it.
fn same_paths(one: &RouteOptions, other: &RouteOptions) -> bool {
    let fold = !(one.case_sensitive && other.case_sensitive);
    one.pattern.shape(fold) == other.pattern.shape(fold)
}

fn route(
    name: &str,
    node: Node,
    general: &Written,
    absent: Absent,
    upstream_wait: Duration,
    errors: &mut Errors,
) -> Option<RouteOptions> {
    let at = node.at.clone();
    let mut section = Section::new(name, Some(node), errors);
    let has_path = section.at("path") != At::Nowhere || at == At::Nowhere;
    let pattern = section.read("path", |value| Pattern::parse(&string(value)?));
    if pattern.is_none() && !has_path {
        section.add(&at, "path", "is missing; write one such as \"/posts\"");
    }
    let case_sensitive = section.read("case_sensitive", boolean).unwrap_or(true);
    let own = written(&mut section);
    section.finish();
    // The other keys are checked all the same.
    let broken = pattern.is_none();
    let pattern = pattern.or_else(|| Pattern::parse("/broken").ok())?;
    let merged = Merged { own: &own, general, at: &at, name };

    let outcomes = OutcomeTable::new(&general.outcomes, &own.outcomes).unwrap_or_else(|messages| {
        // The general ones have been reported.
        let own_messages = messages.iter().filter(|message| !message.starts_with(GENERAL_OUTCOMES));
        own_messages.for_each(|message| outcome_error(name, &own, message, errors));
        OutcomeTable::default()
    });
    let names = |names: &[&'static str]| names.iter().map(|name| HeaderName::from_static(name)).collect::<Vec<_>>();
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let fingerprint_headers = merged.get(|w| &w.fingerprint_headers).unwrap_or_default();
    let default = Policy::default();
    let ask = questions::Merged { own: &own.questions, general: &general.questions, name, pattern: &pattern };
    let replay_auth = merged.get(|w| &w.replay_auth).unwrap_or(ReplayAuth::Scope);
    let (at_auth, table) = merged.place(|w| &w.replay_auth);
    let wanted = (&at_auth, &*format!("{table}.replay_auth"));
    let probe = (replay_auth == ReplayAuth::Probe && !broken).then(|| ask.probe(wanted, errors)).flatten();
    let mut unknown_outcome = merged.get(|w| &w.unknown_outcome).unwrap_or(default.unknown_outcome);
    let mut lookup = None;
    if let UnknownOutcome::Lookup { min_age_ms } = &mut unknown_outcome
        && !broken
    {
        let (at_outcome, table) = merged.place(|w| &w.unknown_outcome);
        let wanted = (&at_outcome, &*format!("{table}.unknown_outcome"));
        if let Some((options, min_age)) = ask.lookup(wanted, upstream_wait, errors) {
            *min_age_ms = ms(min_age);
            lookup = Some(options);
        }
    }
    let options = RouteOptions {
        pattern,
        case_sensitive,
        mode: merged.get(|w| &w.mode).unwrap_or(Mode::Enforce),
        header: merged.get(|w| &w.header).unwrap_or(HeaderName::from_static("idempotency-key")),
        missing_key: merged.get(|w| &w.missing_key).unwrap_or(MissingKey::Pass),
        scope: merged.get(|w| &w.scope).unwrap_or_else(|| vec![Part::Authorization, Part::Path]),
        fingerprint: FingerprintSettings {
            mode: merged.get(|w| &w.fingerprint).unwrap_or(FingerprintMode::Json),
            ignore: merged.get(|w| &w.fingerprint_ignore).unwrap_or_default(),
            headers: fingerprint_headers.iter().map(|name| name.as_str().to_owned()).collect(),
        },
        policy: Policy {
            retention_ms: merged.get(|w| &w.retention).map_or(default.retention_ms, ms),
            unknown_retention_ms: merged.get(|w| &w.unknown_retention).map_or(default.unknown_retention_ms, ms),
            concurrent: merged.get(|w| &w.concurrent).unwrap_or(default.concurrent),
            unknown_outcome,
            ..default
        },
        outcomes,
        wait_timeout: merged.get(|w| &w.wait_timeout).unwrap_or(Duration::from_secs(10)),
        max_waiters_per_key: merged.get(|w| &w.max_waiters_per_key).unwrap_or(1024),
        on_store_error: merged.get(|w| &w.on_store_error).unwrap_or(OnStoreError::Reject),
        max_recorded_body: usize::try_from(merged.get(|w| &w.max_recorded_body).unwrap_or(1 << 20))
            .unwrap_or(usize::MAX),
        drop_headers: merged.get(|w| &w.drop_headers).unwrap_or_else(|| names(&["set-cookie"])),
        credential_headers: merged.get(|w| &w.credential_headers).unwrap_or_else(|| names(&DEFAULT_CREDENTIAL_HEADERS)),
        trusted_headers: merged.get(|w| &w.trusted_headers).unwrap_or_default(),
        replay_auth,
        lookup,
        probe,
    };
    contradictions(&options, &merged, absent, broken, errors);
    (!broken).then_some(options)
}

/// Reports what is wrong with an outcome table: a bad entry at its list, a contradiction of two lists at the table.
fn outcome_error(table: &str, written: &Written, message: &str, errors: &mut Errors) {
    let message = message.strip_prefix(GENERAL_OUTCOMES).or(message.strip_prefix("outcomes.")).unwrap_or(message);
    let list = written.outcome_lists_at.iter().find_map(|(list, at)| {
        let entry = message.strip_prefix(list)?.strip_prefix(": ").filter(|entry| entry.contains("is no entry"))?;
        Some((list, at, entry))
    });
    match list {
        Some((list, at, entry)) => errors.add(at, &format!("{table}.outcomes.{list}"), entry),
        None => {
            let at = written.outcomes_at.clone().unwrap_or(At::Nowhere);
            errors.add(&at, &format!("{table}.outcomes"), message);
        }
    }
}

/// A route's own keys before the general ones.
struct Merged<'a> {
    own: &'a Written,
    general: &'a Written,
    at: &'a At,
    name: &'a str,
}

impl Merged<'_> {
    fn get<T: Clone>(&self, field: impl Fn(&Written) -> &Option<(T, At)>) -> Option<T> {
        field(self.own).as_ref().or(field(self.general).as_ref()).map(|(value, _)| value.clone())
    }

    /// Where a key was written, and in which table; a default belongs to the route.
    fn place<T>(&self, field: impl Fn(&Written) -> &Option<(T, At)>) -> (At, &str) {
        match (field(self.own), field(self.general)) {
            (Some((_, at)), _) => (at.clone(), self.name),
            (None, Some((_, at))) => (at.clone(), "idempotency"),
            (None, None) => (self.at.clone(), self.name),
        }
    }

    /// Whether none of these keys was miswritten.
    fn sound(&self, keys: &[&str]) -> bool {
        !keys.iter().any(|key| self.own.wrong.contains(key) || self.general.wrong.contains(key))
    }
}

/// Settings that cannot stand together.
fn contradictions(route: &RouteOptions, merged: &Merged<'_>, absent: Absent, no_pattern: bool, errors: &mut Errors) {
    let mut add = |(at, table): (At, &str), key: &str, message: &str| {
        errors.add(&at, &format!("{table}.{key}"), message);
    };
    let scope_at = || merged.place(|w| &w.scope);
    let judged = merged.sound(&["scope", "replay_auth", "credential_headers", "trusted_headers"]);
    if judged && route.replay_auth == ReplayAuth::Scope && !route.scope.iter().any(|part| is_credential(part, route)) {
        add(
            scope_at(),
            "scope",
            "has no part that only the key's owner can send, so anyone could read anyone's answers; add \
             \"authorization\", a \"cookie:\" or a \"header:\" of credential_headers or trusted_headers, or write \
             replay_auth = \"probe\" or \"none\"",
        );
    }
    for part in &route.scope {
        if let Part::PathParam(param) = part
            && !no_pattern
            && !route.pattern.params().any(|name| name == param)
        {
            let message = format!("names the path parameter {param}, which {} has not", route.pattern.as_str());
            add(scope_at(), "scope", &message);
        }
    }
    if absent.client_certs && route.scope.contains(&Part::ClientCert) {
        let message = "has \"client-cert\", which needs server.tls.client_ca and an address that is no Unix socket: \
                       without them no client shows a certificate";
        add(scope_at(), "scope", message);
    }
    if absent.token_keys
        && let Some(part) = route.scope.iter().find(|part| matches!(part, Part::Jwt(_)))
    {
        let message = format!("has \"{part}\", which needs auth.jwks_file or auth.jwks_url: no token can be verified");
        add(scope_at(), "scope", &message);
    }
    if !route.trusted_headers.is_empty() && absent.trusted_proxies {
        let message = "needs server.trusted_proxies: from anyone else these headers are refused";
        add(merged.place(|w| &w.trusted_headers), "trusted_headers", message);
    }
    if let Some(both) = route.trusted_headers.iter().find(|name| route.credential_headers.contains(name)) {
        let message = format!("names {both}, which is in credential_headers too: it is either a secret or an identity");
        add(merged.place(|w| &w.trusted_headers), "trusted_headers", &message);
    }
    if route.missing_key == MissingKey::Derive && route.fingerprint.mode == FingerprintMode::None {
        let message = "\"derive\" needs a fingerprint: with \"none\" all payloads would get one key";
        add(merged.place(|w| &w.missing_key), "missing_key", message);
    }
    if let Err(messages) = route.fingerprint.validate() {
        messages.iter().for_each(|message| add(merged.place(|w| &w.fingerprint_ignore), "fingerprint_ignore", message));
    }
}
