//! Different tenants, keys or payloads never share an id: over all that was tried in one run, not just within one input.
#![no_main]

use arbitrary::Arbitrary;
use http::header::{AUTHORIZATION, COOKIE, HOST};
use http::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;
use oncegate::config::{Flags, parse};
use oncegate::gateway::path::NormalPath;
use oncegate::gateway::scope::{Part, Request, Secret, Tenant, tenant};
use oncegate::gateway::{Peer, RouteOptions};
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex};

/// Pieces of values: short ones, and what the joining itself is made of.
const PIECES: [&[u8]; 16] = [
    b"",
    b"a",
    b"b",
    b"A",
    b"ab",
    b"key",
    b"segment",
    b"path",
    b"host",
    b"derived",
    b"authorization",
    b"\0",
    b"\x01",
    b"\x01\0\0\0\0\0\0\0",
    b"\x03\0\0\0\0\0\0\0key\x01",
    b"\x07\0\0\0\0\0\0\0segment\x01\x01\0\0\0\0\0\0\0",
];

#[derive(Arbitrary, Clone, Debug)]
struct Text(Vec<u8>);

impl Text {
    fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|n| PIECES[usize::from(*n) % PIECES.len()]).copied().collect()
    }

    /// As far as a header can bear it.
    fn header(&self) -> HeaderValue {
        let bytes = self.bytes().into_iter().filter(|byte| byte.is_ascii_graphic() && !b";=".contains(byte));
        HeaderValue::from_bytes(&bytes.collect::<Vec<_>>()).unwrap()
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Authorization,
    CookieA,
    CookieB,
    HeaderA,
    HeaderB,
    Host,
    Path,
    ParamA,
    ParamB,
}

#[derive(Arbitrary, Clone, Debug)]
struct Input {
    scope: Vec<Kind>,
    authorization: Option<Text>,
    cookie_a: Option<Text>,
    cookie_b: Option<Text>,
    header_a: Option<Text>,
    header_b: Option<Text>,
    host: Option<Text>,
    path: Vec<Text>,
    param_a: Option<Text>,
    param_b: Option<Text>,
    key: Text,
    payload: u8,
}

/// Neighbours of an input, in which the same bytes stand elsewhere.
#[derive(Clone, Copy)]
enum Move {
    /// A piece of one header to the other.
    AToB,
    BToA,
    /// Of the path to the parameter, and back.
    PathToParam,
    ParamToPath,
    SplitSegment,
    JoinSegments,
    SwapParts,
    DropPart,
    /// What may stand right before the key, to the key, and back.
    PathToKey,
    ParamToKey,
    KeyToParam,
    Absent,
}

const MOVES: [Move; 12] = [
    Move::AToB,
    Move::BToA,
    Move::PathToParam,
    Move::ParamToPath,
    Move::SplitSegment,
    Move::JoinSegments,
    Move::SwapParts,
    Move::DropPart,
    Move::PathToKey,
    Move::ParamToKey,
    Move::KeyToParam,
    Move::Absent,
];

impl Move {
    fn apply(self, input: &mut Input) -> Option<()> {
        match self {
            Self::AToB => input.header_b.as_mut()?.0.insert(0, input.header_a.as_mut()?.0.pop()?),
            Self::BToA => {
                let front = Some(&mut input.header_b.as_mut()?.0).filter(|pieces| !pieces.is_empty())?.remove(0);
                input.header_a.get_or_insert(Text(Vec::new())).0.push(front);
            }
            Self::PathToParam => input.param_a = Some(input.path.pop()?),
            Self::ParamToPath => input.path.push(input.param_a.take()?),
            Self::SplitSegment => {
                let last = input.path.last_mut()?;
                let tail = last.0.split_off(last.0.len() / 2);
                input.path.push(Text(tail));
            }
            Self::JoinSegments => {
                let tail = input.path.pop()?;
                input.path.last_mut()?.0.extend(tail.0);
            }
            Self::SwapParts => input.scope.reverse(),
            Self::DropPart => drop(input.scope.pop()?),
            Self::ParamToKey => input.key.0.insert(0, input.param_b.as_mut()?.0.pop()?),
            Self::PathToKey => input.key.0.insert(0, input.path.last_mut()?.0.pop()?),
            Self::KeyToParam => {
                let front = Some(&mut input.key.0).filter(|pieces| !pieces.is_empty())?.remove(0);
                input.param_b.get_or_insert(Text(Vec::new())).0.push(front);
            }
            Self::Absent => input.header_b = None,
        }
        Some(())
    }
}

static ROUTE: LazyLock<RouteOptions> = LazyLock::new(|| {
    let text = "[[routes]]\npath = \"/{a}/{b}\"\nscope = [\"path\"]\ncredential_headers = []\nreplay_auth = \"none\"";
    parse("", text, [], &Flags::default()).unwrap().gateway.routes.remove(0)
});

/// What makes the id, in a form whose equality is beyond doubt.
type Identity = (Vec<(String, Option<Vec<Vec<u8>>>)>, Result<Vec<u8>, u8>);

const NAMES: [HeaderName; 2] = [HeaderName::from_static("x-a"), HeaderName::from_static("x-b")];

struct Asked {
    headers: HeaderMap,
    path: NormalPath,
    params: Vec<(String, Vec<u8>)>,
    parts: Vec<(Part, Option<Vec<Vec<u8>>>)>,
}

impl Asked {
    fn new(input: &Input, respell: bool) -> Self {
        let space = if respell { " " } else { "" };
        let spaced = |value: &HeaderValue| {
            HeaderValue::from_bytes(&[space.as_bytes(), value.as_bytes(), space.as_bytes()].concat()).unwrap()
        };
        let mut headers = HeaderMap::new();
        let header = |text: &Option<Text>| text.as_ref().map(Text::header);
        for (name, value) in [
            (AUTHORIZATION, &input.authorization),
            (NAMES[0].clone(), &input.header_a),
            (NAMES[1].clone(), &input.header_b),
        ] {
            if let Some(value) = header(value) {
                headers.insert(name, spaced(&value));
            }
        }
        if let Some(host) = header(&input.host) {
            let host = if respell { host.as_bytes().to_ascii_uppercase() } else { host.as_bytes().to_vec() };
            headers.insert(HOST, HeaderValue::from_bytes(&host).unwrap());
        }
        let cookies = [("a", &input.cookie_a), ("b", &input.cookie_b), ("c", &input.header_a)];
        let pair =
            |(name, value): (&str, &Option<Text>)| Some([name.as_bytes(), b"=", header(value)?.as_bytes()].concat());
        let mut cookies: Vec<_> = cookies.into_iter().filter_map(pair).collect();
        if respell {
            cookies.reverse();
        }
        if !cookies.is_empty() {
            headers.insert(COOKIE, HeaderValue::from_bytes(&cookies.join(&b"; "[..])).unwrap());
        }
        let path = NormalPath { segments: input.path.iter().map(Text::bytes).collect() };
        let params = [("a", &input.param_a), ("b", &input.param_b)];
        let params = params.map(|(name, value)| Some((name.to_owned(), value.as_ref()?.bytes())));
        let present = |value: &Option<Text>| {
            let value = header(value)?;
            (!value.is_empty()).then(|| vec![value.as_bytes().to_vec()])
        };
        let param = |value: &Option<Text>| value.as_ref().map(|value| vec![value.bytes()]);
        let parts = input.scope.iter().map(|kind| match kind {
            Kind::Authorization => (Part::Authorization, present(&input.authorization)),
            Kind::CookieA => (Part::Cookie("a".to_owned()), present(&input.cookie_a)),
            Kind::CookieB => (Part::Cookie("b".to_owned()), present(&input.cookie_b)),
            Kind::HeaderA => (Part::Header(NAMES[0].clone()), present(&input.header_a)),
            Kind::HeaderB => (Part::Header(NAMES[1].clone()), present(&input.header_b)),
            Kind::Host => (Part::Host, header(&input.host).map(|host| vec![host.as_bytes().to_ascii_lowercase()])),
            Kind::Path => (Part::Path, Some(path.segments.clone())),
            Kind::ParamA => (Part::PathParam("a".to_owned()), param(&input.param_a)),
            Kind::ParamB => (Part::PathParam("b".to_owned()), param(&input.param_b)),
        });
        Self { headers, parts: parts.collect(), path, params: params.into_iter().flatten().collect() }
    }

    /// `None`: refused.
    fn tenant(&self, secret: u8) -> Option<Tenant> {
        let mut route = ROUTE.clone();
        route.scope = self.parts.iter().map(|(part, _)| part.clone()).collect();
        let peer = Peer { ip: None, trusted: true, https: false, client_cert: None };
        let request =
            Request { headers: &self.headers, path: &self.path, params: &self.params, peer: &peer, claims: None };
        tenant(&Secret([secret; 32]), &route, &request).ok()
    }
}

/// All ids of this run, up to a bound, and what each was made of.
static SEEN: LazyLock<Mutex<HashMap<Vec<u8>, Identity>>> = LazyLock::new(Mutex::default);
const SEEN_MAX: usize = 300_000;

fn check(input: &Input) {
    let asked = Asked::new(input, false);
    let Some(tenant) = asked.tenant(1) else { return };
    let parts: Vec<_> = asked.parts.iter().map(|(part, value)| (part.to_string(), value.clone())).collect();
    let key = input.key.bytes();
    let derived = tenant.derive_key(&[input.payload; 32]);
    let id = tenant.record_id(&key);
    assert_eq!(derived.len(), 64);

    let mut seen = SEEN.lock().unwrap();
    if seen.len() > SEEN_MAX {
        seen.clear();
    }
    let derived_id = derived.as_bytes()[..32]
        .chunks(2)
        .map(|hex| u8::from_str_radix(std::str::from_utf8(hex).unwrap(), 16).unwrap());
    for (id, made_of) in [(id.0.to_vec(), Ok(key.clone())), (derived_id.collect(), Err(input.payload))] {
        let identity = (parts.clone(), made_of);
        let earlier = seen.entry(id).or_insert_with(|| identity.clone());
        assert_eq!(*earlier, identity, "two identities, one id");
    }

    // Spelled otherwise, it is the same tenant; under another secret nothing is the same.
    let again = Asked::new(input, true).tenant(1).expect("no more is wrong with it");
    assert_eq!(again.derive_key(&[input.payload; 32]), derived);
    assert_eq!(again.record_id(&key), id);
    assert_ne!(asked.tenant(2).unwrap().record_id(&key), id);
}

fuzz_target!(|input: Input| {
    check(&input);
    for change in MOVES {
        let mut neighbour = input.clone();
        if change.apply(&mut neighbour).is_some() {
            check(&neighbour);
        }
    }
});
