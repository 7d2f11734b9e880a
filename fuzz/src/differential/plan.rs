//! What is sent, when, and what goes wrong meanwhile.

use crate::choices::Choices;
use crate::world::Fault;

/// Times in milliseconds. No two of what they lead to fall on one moment: what comes first then is nobody's promise.
pub(crate) const RESPONSE_TIMEOUT: u64 = 1001;
pub(crate) const LATE_WINDOW: u64 = 3011;
pub(crate) const WAIT_TIMEOUT: u64 = 2053;
pub(crate) const RETENTION: u64 = 20_029;
pub(crate) const UNKNOWN_RETENTION: u64 = 60_031;
/// How long after an outage all that was left undone is done.
const MENDED: u64 = 3000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MissingKey {
    Pass,
    Reject,
    Derive,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compared {
    Json,
    Raw,
    None,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// `concurrent = "conflict"`.
    pub(crate) conflict: bool,
    pub(crate) missing_key: MissingKey,
    pub(crate) compared: Compared,
    /// `unknown_outcome = "forward"`.
    pub(crate) resend: bool,
    /// `on_store_error = "pass"`.
    pub(crate) pass: bool,
    pub(crate) cache: bool,
}

/// Whose key it is, as far as the default scope goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Tenant {
    Bearer(&'static str),
    Anonymous,
    /// It cannot be told.
    Refused,
}

#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) raw: &'static str,
    /// What the upstream sees.
    pub(crate) seen: &'static str,
    /// The normalised path, if it is a route.
    pub(crate) path: Option<&'static str>,
    pub(crate) query: Option<&'static str>,
    /// It is a route under another reading.
    pub(crate) ambiguous: bool,
}

#[derive(Debug)]
pub(crate) struct Who {
    pub(crate) lines: &'static [(&'static str, &'static str)],
    pub(crate) tenant: Tenant,
    /// Named in `Connection`.
    pub(crate) named: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    None,
    Invalid,
    Good(&'static str),
}

#[derive(Debug)]
pub(crate) struct KeyLines {
    pub(crate) lines: &'static [&'static str],
    pub(crate) key: Key,
    pub(crate) named: &'static str,
}

#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) text: &'static str,
    pub(crate) content_type: Option<&'static str>,
    /// Without parameters.
    pub(crate) media: Option<&'static str>,
    /// What two bodies have in common that are the same payload under `fingerprint = "json"`.
    pub(crate) json: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    Empty,
    Small,
    /// Too large to be recorded; so is the next, which does not say so beforehand.
    Large,
    LargeInChunks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    None,
    /// The connection ends before, or in the midst of, the response.
    Cut,
    CutBody,
    Malformed,
    Silent,
}

/// How the upstream answers a request.
#[derive(Debug)]
pub(crate) struct Script {
    pub(crate) delay: u64,
    pub(crate) status: u16,
    pub(crate) retry_after: bool,
    /// `Idempotency-Outcome`.
    pub(crate) word: Option<&'static str>,
    pub(crate) size: Size,
    pub(crate) flaw: Flaw,
    pub(crate) interim: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) at: u64,
    pub(crate) method: &'static str,
    pub(crate) target: &'static Target,
    pub(crate) key: &'static KeyLines,
    pub(crate) who: &'static Who,
    pub(crate) body: &'static Body,
    pub(crate) script: &'static Script,
    pub(crate) chunked: bool,
    /// It has come through a gateway of this kind.
    pub(crate) chained: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Request(usize),
    /// The gateway is killed, and started again.
    Kill,
    Store(Fault),
    /// Whether the upstream can be reached.
    Upstream(bool),
}

#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) settings: Settings,
    pub(crate) requests: Vec<Request>,
    /// By time.
    pub(crate) acts: Vec<(u64, Act)>,
    pub(crate) end: u64,
}

const ACTS_MAX: usize = 40;

impl Plan {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let mut choices = Choices::new(bytes);
        let flags = choices.byte();
        let missing = [MissingKey::Pass, MissingKey::Reject, MissingKey::Derive];
        let compared = [Compared::Json, Compared::Json, Compared::Raw, Compared::None];
        let (missing_key, compared) = (missing[choices.below(3)], compared[choices.below(4)]);
        let settings = Settings {
            conflict: flags & 1 > 0,
            // Without a payload to compare there is none to derive a key from.
            missing_key: if compared == Compared::None { MissingKey::Pass } else { missing_key },
            compared,
            resend: flags & 2 > 0,
            pass: flags & 12 == 12,
            cache: flags & 16 == 0,
        };
        let mut plan = Self { settings, requests: Vec::new(), acts: Vec::new(), end: 0 };
        while choices.are_left() && plan.acts.len() < ACTS_MAX {
            plan.choose(&mut choices);
        }
        plan.end += RESPONSE_TIMEOUT + LATE_WINDOW + WAIT_TIMEOUT + MENDED;
        plan
    }

    fn choose(&mut self, choices: &mut Choices<'_>) {
        const PAUSES: [u64; 12] = [100, 100, 100, 100, 200, 300, 600, 1200, 2500, 5000, 21_000, 62_000];
        let act = choices.byte();
        self.end += if act & 1 > 0 { 100 } else { PAUSES[choices.below(PAUSES.len())] };
        let at = self.end;
        let act = match act >> 1 {
            0..104 => {
                let request = self.request(choices, at);
                self.requests.push(request);
                return self.acts.push((at, Act::Request(self.requests.len() - 1)));
            }
            104..112 => Act::Kill,
            112..118 => Act::Upstream(choices.one_in(2)),
            118..122 => Act::Store(Fault::Full),
            122..124 => Act::Store(Fault::Failed),
            124..126 => Act::Store(Fault::Away),
            _ => Act::Store(Fault::None),
        };
        self.acts.push((at + 50, act));
        if let Act::Store(Fault::None) | Act::Kill = act {
            self.end += MENDED;
        }
    }

    fn request(&self, choices: &mut Choices<'_>, at: u64) -> Request {
        // Mostly alike: what happens, happens between requests with one key.
        let likes = choices.byte();
        if let Some(last) = self.requests.last().filter(|_| likes & 3 == 3) {
            // The same again, but for one thing.
            let mut again = Request { at, ..last.clone() };
            match likes >> 2 & 7 {
                0 | 1 => again.who = choices.of(&WHO),
                2 => again.body = choices.of(&BODIES),
                3 => again.key = choices.of(&KEYS),
                4 => again.target = choices.of(&TARGETS),
                _ => {}
            }
            again.script = choices.of(&SCRIPTS);
            return again;
        }
        let pick =
            |choices: &mut Choices<'_>, bit: u8, all: usize| if likes & bit > 0 { 0 } else { choices.below(all) };
        Request {
            at,
            method: ["POST", "POST", "POST", "GET", "DELETE", "PATCH", "PUT"][pick(choices, 1 | 2, 7)],
            target: &TARGETS[pick(choices, 1 | 4, TARGETS.len())],
            key: &KEYS[pick(choices, 1 | 8, KEYS.len())],
            who: &WHO[pick(choices, 1 | 16, WHO.len())],
            body: &BODIES[pick(choices, 1 | 32, BODIES.len())],
            script: &SCRIPTS[choices.below(SCRIPTS.len())],
            chunked: likes & 64 > 0,
            chained: likes & 192 == 192,
        }
    }
}

const fn target(raw: &'static str, path: &'static str) -> Target {
    Target { raw, seen: raw, path: Some(path), query: None, ambiguous: false }
}

const fn other(raw: &'static str, ambiguous: bool) -> Target {
    Target { raw, seen: raw, path: None, query: None, ambiguous }
}

/// The default routes are `/posts` and `/v1/workspaces/{workspace}/posts`.
static TARGETS: [Target; 20] = [
    target("/posts", "/posts"),
    target("/posts/", "/posts"),
    target("//posts", "/posts"),
    target("/%70osts", "/posts"),
    target("/x/../posts", "/posts"),
    target("/./posts", "/posts"),
    Target { query: Some("x=1"), ..target("/posts?x=1", "/posts") },
    Target { query: Some("x=2"), ..target("/posts?x=2", "/posts") },
    Target { seen: "/posts", ..target("http://a.example/posts", "/posts") },
    target("/v1/workspaces/w1/posts", "/v1/workspaces/w1/posts"),
    target("/v1/workspaces/w%31/posts", "/v1/workspaces/w1/posts"),
    target("/v1/workspaces/w2/posts", "/v1/workspaces/w2/posts"),
    other("/Posts", true),
    other("/posts;a=b", true),
    other("/v1%2Fworkspaces/w1/posts", true),
    other("/x%5C..%5C..%5Cposts", true),
    other("/other", false),
    other("/posts/1", false),
    other("/v1/workspaces/posts", false),
    other("/", false),
];

const LONG: [u8; 256] = [b'k'; 256];
const LONGEST: &str = match std::str::from_utf8(LONG.split_at(255).0) {
    Ok(text) => text,
    Err(_) => "",
};
const TOO_LONG: &str = match std::str::from_utf8(&LONG) {
    Ok(text) => text,
    Err(_) => "",
};

const fn key(lines: &'static [&'static str], key: Key) -> KeyLines {
    KeyLines { lines, key, named: "" }
}

static KEYS: [KeyLines; 20] = [
    key(&["a"], Key::Good("a")),
    key(&["\"a\""], Key::Good("a")),
    key(&["\"a\";p=1"], Key::Good("a")),
    key(&["  a "], Key::Good("a")),
    key(&["b"], Key::Good("b")),
    key(&["A"], Key::Good("A")),
    key(&["\"a\\\"b\""], Key::Good("a\"b")),
    key(&["a\\b"], Key::Good("a\\b")),
    key(&["\"a\\\\b\""], Key::Good("a\\b")),
    key(&[LONGEST], Key::Good(LONGEST)),
    key(&[], Key::None),
    key(&[], Key::None),
    key(&[TOO_LONG], Key::Invalid),
    key(&[""], Key::Invalid),
    key(&["\"\""], Key::Invalid),
    key(&["\"a"], Key::Invalid),
    key(&["a b"], Key::Invalid),
    key(&["a,b"], Key::Invalid),
    key(&["a", "a"], Key::Invalid),
    KeyLines { named: "idempotency-key", ..key(&["a"], Key::Invalid) },
];

const fn who(lines: &'static [(&'static str, &'static str)], tenant: Tenant) -> Who {
    Who { lines, tenant, named: "" }
}

static WHO: [Who; 11] = [
    who(&[("Authorization", "Bearer t1")], Tenant::Bearer("t1")),
    who(&[("Authorization", "Bearer t1")], Tenant::Bearer("t1")),
    who(&[("Authorization", "Bearer t2")], Tenant::Bearer("t2")),
    who(&[("Authorization", "Bearer t1"), ("X-Api-Key", "1")], Tenant::Bearer("t1")),
    who(&[("Authorization", "Bearer t1"), ("Cookie", "a=b")], Tenant::Bearer("t1")),
    who(&[], Tenant::Anonymous),
    who(&[("X-Api-Key", "1")], Tenant::Refused),
    who(&[("Cookie", "a=b")], Tenant::Refused),
    who(&[("Authorization", "DPoP x")], Tenant::Refused),
    who(&[("Authorization", "Bearer t1"), ("Authorization", "Bearer t1")], Tenant::Refused),
    Who { named: "authorization", ..who(&[("Authorization", "Bearer t1")], Tenant::Refused) },
];

const fn json(text: &'static str, json: &'static str) -> Body {
    Body { text, content_type: Some("application/json"), media: Some("application/json"), json }
}

const fn plain(text: &'static str) -> Body {
    Body { text, content_type: Some("text/plain"), media: Some("text/plain"), json: text }
}

const TOO_LARGE: &str = match std::str::from_utf8(&[b'x'; 3000]) {
    Ok(text) => text,
    Err(_) => "",
};
/// `server.limits.max_body`.
pub(crate) const BODY_MAX: usize = 2048;

static BODIES: [Body; 16] = [
    json(r#"{"a":1,"b":[2]}"#, "A"),
    json(r#"{"a":1,"b":[2]}"#, "A"),
    json(r#" { "b" : [ 2 ], "a" : 1 }"#, "A"),
    json(r#"{"\u0061":1,"b":[2]}"#, "A"),
    Body { content_type: Some("application/json; charset=utf-8"), ..json(r#"{"a":1,"b":[2]}"#, "A") },
    Body { content_type: None, media: None, ..json(r#"{"a":1,"b":[2]}"#, "A") },
    Body { content_type: None, media: None, ..json(r#"{"b":[2],"a":1}"#, "A") },
    json(r#"{"a":1.0,"b":[2]}"#, "B"),
    json(r#"{"a":"1","b":[2]}"#, "C"),
    // A repeated name: by its bytes.
    json(r#"{"a":1,"a":1}"#, "D"),
    json(r#"{"a":1, "a":1}"#, "E"),
    json(r#"{"a":"#, "F"),
    plain(r#"{"a":1,"b":[2]}"#),
    plain(r#"{"b":[2],"a":1}"#),
    json("", "G"),
    plain(TOO_LARGE),
];

const fn script(delay: u64, status: u16) -> Script {
    let (word, size, flaw) = (None, Size::Small, Flaw::None);
    Script { delay, status, retry_after: false, word, size, flaw, interim: false }
}

const fn said(status: u16, word: &'static str) -> Script {
    Script { word: Some(word), ..script(7, status) }
}

const fn flawed(delay: u64, flaw: Flaw) -> Script {
    Script { flaw, ..script(delay, 201) }
}

/// All delays end on 07: nothing else does.
static SCRIPTS: [Script; 40] = [
    script(0, 201),
    script(207, 201),
    script(507, 201),
    script(0, 200),
    Script { size: Size::Empty, ..script(0, 204) },
    script(207, 302),
    script(207, 307),
    script(0, 400),
    script(0, 401),
    script(207, 403),
    script(0, 404),
    script(0, 408),
    script(0, 409),
    script(507, 409),
    script(207, 425),
    Script { retry_after: true, ..script(207, 429) },
    script(0, 500),
    script(207, 501),
    script(0, 502),
    script(207, 503),
    Script { retry_after: true, ..script(207, 503) },
    script(0, 504),
    script(0, 505),
    said(201, "not-executed"),
    said(201, "unknown"),
    said(429, "final"),
    said(503, "Final"),
    said(500, "not-executed"),
    flawed(0, Flaw::Cut),
    flawed(207, Flaw::Cut),
    flawed(207, Flaw::CutBody),
    flawed(0, Flaw::Malformed),
    flawed(0, Flaw::Silent),
    script(1507, 201),
    script(2507, 429),
    Script { size: Size::Large, ..script(207, 201) },
    Script { size: Size::LargeInChunks, ..script(7, 201) },
    Script { size: Size::Large, ..flawed(207, Flaw::CutBody) },
    Script { interim: true, ..script(207, 201) },
    // It switches to a protocol that nobody has offered.
    Script { size: Size::Empty, ..script(7, 101) },
];
