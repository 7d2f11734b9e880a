//! Two JSON texts have one digest if they differ in whitespace, the order of members and the spelling of strings, and
//! never otherwise: over all that was tried in one run. What is JSON is judged by a second parser, and by serde_json.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use oncegate::idempotency::{FingerprintMode, FingerprintSettings};
use std::collections::{BTreeMap, HashMap};
use std::sync::{LazyLock, Mutex};

const DEPTH_MAX: usize = 128;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Json {
    /// null, true or false.
    Word(&'static str),
    /// By its text.
    Number(String),
    Text(String),
    Array(Vec<Json>),
    Object(BTreeMap<String, Json>),
}

/// What a body is compared by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Body {
    Json(Json),
    Raw(Vec<u8>),
}

/// A parser for what the fingerprint calls JSON: RFC 8259 without repeated names, lone surrogates and deep nesting.
struct Parser<'a>(std::iter::Peekable<std::str::Chars<'a>>);

impl Parser<'_> {
    fn body(bytes: &[u8]) -> Body {
        let parse = || {
            let mut parser = Parser(std::str::from_utf8(bytes).ok()?.chars().peekable());
            let value = parser.value(0)?;
            parser.space();
            parser.0.peek().is_none().then_some(value)
        };
        parse().map_or_else(|| Body::Raw(bytes.to_vec()), Body::Json)
    }

    fn space(&mut self) {
        while self.0.next_if(|c| " \t\r\n".contains(*c)).is_some() {}
    }

    fn token(&mut self, wanted: char) -> Option<()> {
        self.space();
        self.0.next_if_eq(&wanted).map(drop)
    }

    fn value(&mut self, depth: usize) -> Option<Json> {
        self.space();
        match *self.0.peek()? {
            '"' => self.text().map(Json::Text),
            '[' | '{' if depth == DEPTH_MAX => None,
            '[' => {
                self.0.next();
                let mut items = Vec::new();
                if self.token(']').is_some() {
                    return Some(Json::Array(items));
                }
                loop {
                    items.push(self.value(depth + 1)?);
                    if self.token(',').is_none() {
                        return self.token(']').map(|()| Json::Array(items));
                    }
                }
            }
            '{' => {
                self.0.next();
                let mut members = BTreeMap::new();
                if self.token('}').is_some() {
                    return Some(Json::Object(members));
                }
                loop {
                    self.space();
                    let name = self.text()?;
                    self.token(':')?;
                    let value = self.value(depth + 1)?;
                    if members.insert(name, value).is_some() {
                        return None;
                    }
                    if self.token(',').is_none() {
                        return self.token('}').map(|()| Json::Object(members));
                    }
                }
            }
            '-' | '0'..='9' => self.number().map(Json::Number),
            letter => {
                let word = ["null", "true", "false"].into_iter().find(|word| word.starts_with(letter))?;
                word.chars().all(|c| self.0.next() == Some(c)).then_some(Json::Word(word))
            }
        }
    }

    fn digits(&mut self, out: &mut String) -> Option<()> {
        out.push(self.0.next_if(char::is_ascii_digit)?);
        while let Some(digit) = self.0.next_if(char::is_ascii_digit) {
            out.push(digit);
        }
        Some(())
    }

    fn number(&mut self) -> Option<String> {
        let mut text = String::new();
        text.extend(self.0.next_if_eq(&'-'));
        match self.0.next_if_eq(&'0') {
            Some(zero) => text.push(zero),
            None => self.digits(&mut text)?,
        }
        if let Some(point) = self.0.next_if_eq(&'.') {
            text.push(point);
            self.digits(&mut text)?;
        }
        if let Some(letter) = self.0.next_if(|c| "eE".contains(*c)) {
            text.push(letter);
            text.extend(self.0.next_if(|c| "+-".contains(*c)));
            self.digits(&mut text)?;
        }
        Some(text)
    }

    fn unit(&mut self) -> Option<u16> {
        let mut digits = String::new();
        for _ in 0..4 {
            digits.push(self.0.next_if(char::is_ascii_hexdigit)?);
        }
        u16::from_str_radix(&digits, 16).ok()
    }

    fn text(&mut self) -> Option<String> {
        self.0.next_if_eq(&'"')?;
        let mut units = Vec::new();
        loop {
            match self.0.next()? {
                '"' => return String::from_utf16(&units).ok(),
                '\\' => units.push(match self.0.next()? {
                    'b' => 8,
                    't' => 9,
                    'n' => 10,
                    'f' => 12,
                    'r' => 13,
                    c @ ('"' | '\\' | '/') => c as u16,
                    'u' => self.unit()?,
                    _ => return None,
                }),
                c if c < ' ' => return None,
                c => units.extend_from_slice(c.encode_utf16(&mut [0; 2])),
            }
        }
    }
}

/// Deepest nesting, whatever stands inside.
fn depth(bytes: &[u8]) -> usize {
    let mut quoted = false;
    let mut escaped = false;
    let (mut depth, mut deepest) = (0_usize, 0);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'[' | b'{' if !quoted => depth += 1,
            b']' | b'}' if !quoted => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

fn names_serde_json(value: &Json) -> bool {
    match value {
        Json::Array(items) => items.iter().any(names_serde_json),
        Json::Object(members) => {
            members.iter().any(|(name, value)| name.starts_with("$serde") || names_serde_json(value))
        }
        _ => false,
    }
}

/// The same value in another spelling. Out of choices, it goes on plainly.
fn write(value: &Json, choices: &mut Unstructured<'_>, out: &mut String) {
    space(choices, out);
    match value {
        Json::Word(word) => out.push_str(word),
        Json::Number(text) => out.push_str(text),
        Json::Text(text) => write_text(text, choices, out),
        Json::Array(items) => {
            out.push('[');
            for (n, item) in items.iter().enumerate() {
                out.push_str(if n > 0 { "," } else { "" });
                write(item, choices, out);
            }
            space(choices, out);
            out.push(']');
        }
        Json::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            for n in (1..members.len()).rev() {
                members.swap(n, choices.int_in_range(0..=n).unwrap_or(n));
            }
            out.push('{');
            for (n, (name, value)) in members.into_iter().enumerate() {
                out.push_str(if n > 0 { "," } else { "" });
                space(choices, out);
                write_text(name, choices, out);
                space(choices, out);
                out.push(':');
                write(value, choices, out);
            }
            space(choices, out);
            out.push('}');
        }
    }
    space(choices, out);
}

fn space(choices: &mut Unstructured<'_>, out: &mut String) {
    let spaces = ["", "", "", " ", "\t", "\n", "\r\n", "  "];
    out.push_str(choices.choose(&spaces).copied().unwrap_or(""));
}

fn write_text(text: &str, choices: &mut Unstructured<'_>, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        let choice = choices.arbitrary::<u8>().unwrap_or(0) % 4;
        let short = match c {
            '"' => Some("\\\""),
            '\\' => Some("\\\\"),
            '/' => Some("\\/"),
            '\u{8}' => Some("\\b"),
            '\t' => Some("\\t"),
            '\n' => Some("\\n"),
            '\u{c}' => Some("\\f"),
            '\r' => Some("\\r"),
            _ => None,
        };
        match short {
            Some(short) if choice < 2 => out.push_str(short),
            _ if choice == 3 || c < ' ' || c == '"' || c == '\\' => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&if choice == 2 { format!("\\u{unit:04X}") } else { format!("\\u{unit:04x}") });
                }
            }
            _ => out.push(c),
        }
    }
    out.push('"');
}

#[derive(Arbitrary)]
enum Shape {
    Word(u8),
    Number(u8),
    Text(String),
    ShortText(u8),
    Array(Vec<Shape>),
    Object(Vec<(u8, Shape)>),
    Deep(u8, Box<Shape>),
}

const NUMBERS: [&str; 14] = [
    "0",
    "-0",
    "1",
    "1.0",
    "1e0",
    "1E0",
    "1e+0",
    "10",
    "9007199254740993",
    "9007199254740992",
    "-1",
    "0.10",
    "1e999",
    "12",
];
const NAMES: [&str; 12] = ["", "a", "b", "ab", "aa", "0", "1", "~", "a/b", "é", "\u{10ffff}", "\""];

impl Shape {
    /// Members stand as they come, repeated names among them.
    fn write(&self, out: &mut String) {
        let name = |n: u8| NAMES[usize::from(n) % NAMES.len()];
        let plainly = |text: &str, out: &mut String| write_text(text, &mut Unstructured::new(&[]), out);
        let comma = |n: usize| if n > 0 { "," } else { "" };
        match self {
            Self::Word(n) => out.push_str(["null", "true", "false"][usize::from(*n) % 3]),
            Self::Number(n) => out.push_str(NUMBERS[usize::from(*n) % NUMBERS.len()]),
            Self::Text(text) => plainly(text, out),
            Self::ShortText(n) => plainly(name(*n), out),
            Self::Array(items) => {
                out.push('[');
                for (n, item) in items.iter().enumerate() {
                    out.push_str(comma(n));
                    item.write(out);
                }
                out.push(']');
            }
            Self::Object(members) => {
                out.push('{');
                for (n, (key, value)) in members.iter().enumerate() {
                    out.push_str(comma(n));
                    plainly(name(*key), out);
                    out.push(':');
                    value.write(out);
                }
                out.push('}');
            }
            Self::Deep(levels, inner) => {
                let levels = usize::from(*levels) % 20;
                (0..levels).for_each(|level| out.push_str(if level % 2 == 0 { "[" } else { "{\"a\":" }));
                inner.write(out);
                (0..levels).rev().for_each(|level| out.push(if level % 2 == 0 { ']' } else { '}' }));
            }
        }
    }
}

/// The value without what the pointers name; `None`: nothing is left.
fn prune(value: &Json, here: &str, ignored: &[String]) -> Option<Json> {
    if ignored.iter().any(|pointer| pointer == here) {
        return None;
    }
    let at = |token: &str| format!("{here}/{}", token.replace('~', "~0").replace('/', "~1"));
    Some(match value {
        Json::Array(items) => {
            let kept = items.iter().enumerate().filter_map(|(n, item)| prune(item, &at(&n.to_string()), ignored));
            Json::Array(kept.collect())
        }
        Json::Object(members) => {
            let kept =
                members.iter().filter_map(|(name, value)| Some((name.clone(), prune(value, &at(name), ignored)?)));
            Json::Object(kept.collect())
        }
        other => other.clone(),
    })
}

/// Pointers into a value, and a few beside it.
fn pointers(value: &Json, choices: &mut Unstructured<'_>) -> Vec<String> {
    let mut pointers = Vec::new();
    for _ in 0..choices.arbitrary::<u8>().unwrap_or(0) % 4 {
        let mut here = value;
        let mut pointer = String::new();
        for _ in 0..4 {
            let (token, next) = match here {
                Json::Array(items) if !items.is_empty() => {
                    let n = choices.choose_index(items.len()).unwrap_or(0);
                    (n.to_string(), &items[n])
                }
                Json::Object(members) if !members.is_empty() => {
                    let n = choices.choose_index(members.len()).unwrap_or(0);
                    members.iter().nth(n).map(|(name, value)| (name.clone(), value)).unwrap()
                }
                _ => break,
            };
            pointer = format!("{pointer}/{}", token.replace('~', "~0").replace('/', "~1"));
            here = next;
            if choices.ratio(1, 2).unwrap_or(true) {
                break;
            }
        }
        if choices.ratio(1, 8).unwrap_or(false) {
            pointer.push_str("/00");
        }
        if !pointer.is_empty() {
            pointers.push(pointer);
        }
    }
    pointers
}

fn digest(body: &[u8], ignore: &[String]) -> [u8; 32] {
    let settings = FingerprintSettings { mode: FingerprintMode::Json, ignore: ignore.to_vec(), headers: Vec::new() };
    settings.validate().unwrap();
    settings.json_digest(body)
}

/// All bodies of this run, up to a bound: one digest each, and no digest twice.
#[derive(Default)]
struct Seen {
    by_digest: HashMap<[u8; 32], Body>,
    by_body: HashMap<Body, [u8; 32]>,
}

static SEEN: LazyLock<Mutex<Seen>> = LazyLock::new(Mutex::default);
const SEEN_MAX: usize = 100_000;

fn check(bytes: &[u8]) -> Body {
    let body = Parser::body(bytes);
    let digest_here = digest(bytes, &[]);
    // Whitespace behind it counts unless it is JSON.
    let is_json = digest(&[bytes, b" "].concat(), &[]) == digest_here;
    assert_eq!(is_json, matches!(body, Body::Json(_)), "{}", bytes.escape_ascii());
    // serde_json stops one level earlier, takes repeated names, and reads objects with a name of its own as numbers.
    match &body {
        Body::Json(value) if depth(bytes) < DEPTH_MAX && !names_serde_json(value) => {
            assert!(serde_json::from_slice::<serde_json::Value>(bytes).is_ok(), "{}", bytes.escape_ascii());
        }
        Body::Raw(_) if depth(bytes) < DEPTH_MAX => {
            let strict = serde_json::from_slice::<Strict>(bytes);
            assert!(strict.is_err(), "{}", bytes.escape_ascii());
        }
        _ => {}
    }

    if bytes.len() <= 1024 {
        let mut seen = SEEN.lock().unwrap();
        if seen.by_digest.len() > SEEN_MAX {
            *seen = Seen::default();
        }
        let other = seen.by_digest.entry(digest_here).or_insert_with(|| body.clone());
        assert_eq!(*other, body, "two bodies, one digest");
        let other = seen.by_body.entry(body.clone()).or_insert(digest_here);
        assert_eq!(*other, digest_here, "one body, two digests: {}", bytes.escape_ascii());
    }
    body
}

/// Anything that serde_json takes, but no repeated names.
struct Strict;

impl<'de> serde::Deserialize<'de> for Strict {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Strict;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("JSON")
            }

            fn visit_unit<E>(self) -> Result<Strict, E> {
                Ok(Strict)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Strict, E> {
                Ok(Strict)
            }

            fn visit_str<E>(self, _: &str) -> Result<Strict, E> {
                Ok(Strict)
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut items: A) -> Result<Strict, A::Error> {
                while items.next_element::<Strict>()?.is_some() {}
                Ok(Strict)
            }

            // Numbers come here, too: as one member.
            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut members: A) -> Result<Strict, A::Error> {
                let mut names = std::collections::HashSet::new();
                while let Some((name, Strict)) = members.next_entry::<String, Strict>()? {
                    if !names.insert(name) {
                        return Err(serde::de::Error::custom("a name comes twice"));
                    }
                }
                Ok(Strict)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// `bytes` and what it can be rewritten to without becoming another body.
fn check_spellings(bytes: &[u8], choices: &mut Unstructured<'_>) {
    let Body::Json(value) = check(bytes) else { return };
    let mut text = String::new();
    write(&value, choices, &mut text);
    assert_eq!(digest(text.as_bytes(), &[]), digest(bytes, &[]), "{} is {text}", bytes.escape_ascii());

    let ignore = pointers(&value, choices);
    let Some(pruned) = prune(&value, "", &ignore) else { return };
    let mut rest = String::new();
    write(&pruned, &mut Unstructured::new(&[]), &mut rest);
    assert_eq!(digest(text.as_bytes(), &ignore), digest(rest.as_bytes(), &[]), "{text} without {ignore:?} is {rest}");
    assert_eq!(digest(bytes, &ignore) == digest(bytes, &[]), pruned == value);
}

fuzz_target!(|data: &[u8]| {
    let cut = data.len() / 2;
    check_spellings(data, &mut Unstructured::new(&data[cut..]));

    let mut input = Unstructured::new(data);
    if let Ok(shape) = Shape::arbitrary(&mut input) {
        let mut text = String::new();
        shape.write(&mut text);
        check_spellings(text.as_bytes(), &mut input);
    }
    // Brackets that nothing closes, or too many of them, in any mixture.
    if let Some(&byte) = data.first() {
        let few = data.iter().take(64);
        let opening: Vec<u8> =
            few.flat_map(|byte| if byte % 2 == 0 { &b"["[..] } else { b"{\"a\":" }).copied().collect();
        check(&opening.repeat(1 + usize::from(byte)));
    }
});
