//! No writing of a path slips past a route: what RFC 3986 calls equal is equal, and what a chain of differently reading
//! servers takes for the route is at least refused.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use oncegate::gateway::path::{NormalPath, Readings, matches};
use oncegate::gateway::route::Pattern;
use std::sync::LazyLock;

static PATTERNS: LazyLock<Vec<Pattern>> = LazyLock::new(|| {
    let texts = ["/posts", "/v1/posts", "/v1/{ws}/posts", "/a/{*rest}", "/{any}", "/caf%C3%A9/a%2Fb"];
    texts.map(|text| Pattern::parse(text).unwrap()).into()
});

#[derive(Arbitrary, Debug)]
enum Piece {
    Slash,
    Word(u8),
    Special(u8),
    Byte(u8),
    Escaped(u8),
    EscapedTwice(u8),
}

const WORDS: [&str; 9] = ["posts", "v1", "a", "Posts", "p%6fsts", "x", "caf%c3%a9", "a%2fb", "PO%53TS"];
const SPECIALS: [&str; 16] =
    ["..", ".", "%2e%2E", "%2F", "%2f", "%5C", "\\", ";", ";x=y", "%3B", "%3f", "%23", "%00", "%25", "%252F", "//"];

fn write(pieces: &[Piece]) -> Vec<u8> {
    let mut raw = b"/".to_vec();
    for piece in pieces {
        match piece {
            Piece::Slash => raw.push(b'/'),
            Piece::Word(n) => raw.extend_from_slice(WORDS[usize::from(*n) % WORDS.len()].as_bytes()),
            Piece::Special(n) => raw.extend_from_slice(SPECIALS[usize::from(*n) % SPECIALS.len()].as_bytes()),
            Piece::Byte(byte) => raw.push(*byte),
            Piece::Escaped(byte) => raw.extend_from_slice(format!("%{byte:02x}").as_bytes()),
            Piece::EscapedTwice(byte) => raw.extend_from_slice(format!("%25{byte:02X}").as_bytes()),
        }
    }
    raw
}

/// What a server on the way may do to a path before it, or the next one, takes it apart.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Reading {
    Decode,
    Slashes,
    Parameters,
    Tail,
    Dots,
    MergeSlashes,
    Fold,
}

fn unescape(raw: &[u8], wanted: impl Fn(u8) -> bool) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < raw.len() {
        let digits =
            raw.get(at + 1..at + 3).filter(|digits| raw[at] == b'%' && digits.iter().all(u8::is_ascii_hexdigit));
        let byte = digits.map(|digits| u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap());
        match byte.filter(|byte| wanted(*byte)) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(raw[at]);
                at += 1;
            }
        }
    }
    out
}

/// RFC 3986 §5.2.4, step by step.
fn remove_dots(raw: &[u8]) -> Vec<u8> {
    let mut input = raw.to_vec();
    let mut out: Vec<u8> = Vec::new();
    let pop = |out: &mut Vec<u8>| out.truncate(out.iter().rposition(|byte| *byte == b'/').unwrap_or(0));
    while !input.is_empty() {
        if input.starts_with(b"../") {
            input.drain(..3);
        } else if input.starts_with(b"./") || input.starts_with(b"/./") {
            input.drain(..2);
        } else if input == b"/." {
            input = b"/".to_vec();
        } else if input.starts_with(b"/../") {
            input.drain(..3);
            pop(&mut out);
        } else if input == b"/.." {
            input = b"/".to_vec();
            pop(&mut out);
        } else if input == b"." || input == b".." {
            input.clear();
        } else {
            let end = input.iter().skip(1).position(|byte| *byte == b'/').map_or(input.len(), |at| at + 1);
            out.extend(input.drain(..end));
        }
    }
    out
}

fn read(raw: &[u8], reading: Reading) -> Vec<u8> {
    match reading {
        Reading::Decode => unescape(raw, |_| true),
        Reading::Slashes => {
            let decoded = unescape(raw, |byte| byte == b'/' || byte == b'\\');
            decoded.into_iter().map(|byte| if byte == b'\\' { b'/' } else { byte }).collect()
        }
        Reading::Parameters => {
            let segments = raw.split(|byte| *byte == b'/').map(|segment| segment.split(|byte| *byte == b';').next());
            segments.map(Option::unwrap).collect::<Vec<_>>().join(&b'/')
        }
        Reading::Tail => raw.split(|byte| b"?#\0".contains(byte)).next().unwrap().to_vec(),
        Reading::Dots => remove_dots(&unescape(raw, |byte| byte == b'.')),
        Reading::MergeSlashes => {
            let mut merged = raw.to_vec();
            merged.dedup_by(|a, b| *a == b'/' && *b == b'/');
            merged
        }
        Reading::Fold => raw.to_ascii_lowercase(),
    }
}

/// The normalised path as the standard's steps yield it one after the other.
fn segments(raw: &[u8]) -> Vec<Vec<u8>> {
    let path = read(raw, Reading::Dots);
    path.split(|byte| *byte == b'/')
        .filter(|segment| !segment.is_empty())
        .map(|segment| unescape(segment, |_| true))
        .collect()
}

fn check(raw: &[u8], readings: &[Reading]) {
    let path = NormalPath::new(raw);
    assert!(!path.segments.iter().any(|segment| segment.is_empty() || segment == b"." || segment == b".."));
    assert_eq!(NormalPath::new(path.display().as_bytes()), path, "normalised again");
    assert_eq!(path.clone().folded().folded(), path.clone().folded());
    assert_eq!(path.segments, segments(raw), "step by step");

    let mut read_so_far = raw.to_vec();
    for reading in readings {
        read_so_far = read(&read_so_far, *reading);
    }
    let elsewhere = NormalPath::new(&read_so_far);
    let may_be = Readings::new(raw);
    for pattern in PATTERNS.iter() {
        let exact = matches(pattern, true, &path);
        let folded = matches(pattern, false, &path);
        if let Some(params) = &exact {
            assert_eq!(folded.as_ref(), Some(params));
            assert!(params.iter().map(|(name, _)| name.as_str()).eq(pattern.params()));
        }
        if folded.is_some() {
            assert!(may_be.may_match(pattern), "it matches, but may not");
        }
        assert_eq!(folded.is_some(), matches(pattern, false, &path.clone().folded()).is_some());
        if matches(pattern, false, &elsewhere).is_some() {
            assert!(
                may_be.may_match(pattern),
                "{} passes {}, which after {readings:?} is read as {}",
                pattern.as_str(),
                raw.escape_ascii(),
                read_so_far.escape_ascii()
            );
        }
    }
}

/// Writes a path otherwise, in ways that RFC 3986 §6.2.2 or the gateway itself calls equal.
fn rewrite(segments: &[Vec<u8>], choices: &mut Unstructured<'_>) -> Option<Vec<u8>> {
    let mut raw = Vec::new();
    for segment in segments {
        let detour: &[u8] = match choices.arbitrary::<u8>().ok()? % 8 {
            0 => b"/",
            1 => b"/.",
            2 => b"/%2E",
            3 => b"/x%2Fy;z/..",
            4 => b"/x/%2e.",
            _ => b"",
        };
        raw.extend_from_slice(detour);
        raw.push(b'/');
        for &byte in segment {
            let plain = byte.is_ascii_graphic() && !b"/%?#.".contains(&byte);
            match choices.arbitrary::<u8>().ok()? % 4 {
                0 => raw.extend_from_slice(format!("%{byte:02X}").as_bytes()),
                1 => raw.extend_from_slice(format!("%{byte:02x}").as_bytes()),
                _ if plain => raw.push(byte),
                _ => raw.extend_from_slice(format!("%{byte:02X}").as_bytes()),
            }
        }
    }
    if choices.arbitrary().ok()? {
        raw.push(b'/');
    }
    Some(raw)
}

fuzz_target!(|data: &[u8]| {
    let mut input = Unstructured::new(data);
    let Ok((pieces, readings)) = <(Vec<Piece>, [Reading; 5])>::arbitrary(&mut input) else { return };
    let count = usize::from(input.arbitrary::<u8>().unwrap_or(0)) % (readings.len() + 1);
    let raw = write(&pieces);
    check(&raw, &readings[..count]);
    if let Some(rewritten) = rewrite(&NormalPath::new(&raw).segments, &mut input) {
        let (path, other) = (NormalPath::new(&raw), NormalPath::new(&rewritten));
        assert_eq!(path, other, "{} is {}", raw.escape_ascii(), rewritten.escape_ascii());
        check(&rewritten, &readings[..count]);
    }
});
