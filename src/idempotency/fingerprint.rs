//! Fingerprints: when two payloads are the same.
//!
//! A payload is written out as one unambiguous byte string (every part with its length before it) whose hash is the
//! digest. A JSON body is written in a canonical form, so that whitespace and the order of object members do not count;
//! anything doubtful falls back to the raw bytes, under another tag: a raw body never equals a JSON one.

mod json;
mod multipart;

use super::record::Fingerprint;
use json::Pointer;

/// Part of every settings id and digest: payloads condensed by different algorithms are never compared.
const ALGORITHM: &[u8] = b"oncegate fingerprint 1";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FingerprintMode {
    /// JSON bodies are compared by their meaning, others as under [`FingerprintMode::Raw`].
    Json,
    /// All bodies are compared by their bytes, but for the boundary of a multipart body.
    Raw,
    /// Nothing is compared: any payload is the same as any other.
    None,
}

/// How payloads are condensed on a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FingerprintSettings {
    pub mode: FingerprintMode,
    /// JSON Pointers (RFC 6901) left out of a JSON body, as if the members and elements they name were not there.
    pub ignore: Vec<String>,
    /// Lower-case names of request headers that belong to the payload.
    pub headers: Vec<String>,
}

impl Default for FingerprintSettings {
    fn default() -> Self {
        Self { mode: FingerprintMode::Json, ignore: Vec::new(), headers: Vec::new() }
    }
}

/// One request, as far as its fingerprint is concerned.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    pub method: &'a str,
    /// Segments of the normalised path, fully decoded.
    pub path: &'a [Vec<u8>],
    /// The raw query without `?`; absent and empty differ.
    pub query: Option<&'a [u8]>,
    /// The raw `Content-Type` values, one per header line.
    pub content_type: &'a [&'a [u8]],
    /// The raw `Content-Encoding` values, one per header line.
    pub content_encoding: &'a [&'a [u8]],
    /// For each name in [`FingerprintSettings::headers`], in that order, the header's values, one per line.
    pub headers: &'a [Vec<&'a [u8]>],
    pub body: &'a [u8],
}

/// How the body was written out.
#[derive(Clone, Copy)]
#[repr(u8)]
enum BodyTag {
    Raw = 0,
    Json = 1,
    Multipart = 2,
}

impl FingerprintSettings {
    /// Checks the JSON Pointers.
    ///
    /// # Errors
    /// One message per pointer that is not an RFC 6901 JSON Pointer, or is the empty one: that would leave out every body.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let errors: Vec<String> = self.ignore.iter().filter_map(|pointer| json::pointer_error(pointer)).collect();
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// Identifies these settings (and the version of the algorithm) in records: the same in every release and on every
    /// machine. Settings without effect, and the order of a list, do not count.
    #[must_use]
    pub fn id(&self) -> u64 {
        let mut text = Vec::with_capacity(256);
        put(&mut text, ALGORITHM);
        match self.mode {
            FingerprintMode::None => text.push(b'n'),
            FingerprintMode::Raw => {
                text.push(b'r');
                put_set(&mut text, &self.headers);
            }
            FingerprintMode::Json => {
                text.push(b'j');
                put_set(&mut text, &self.headers);
                put_set(&mut text, &self.ignore);
            }
        }
        let [a, b, c, d, e, f, g, h, ..] = *blake3::hash(&text).as_bytes();
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }

    /// Condenses a payload. Takes memory of about the body's length, once.
    #[must_use]
    pub fn fingerprint(&self, payload: &Payload<'_>) -> Fingerprint {
        Fingerprint { settings: self.id(), digest: self.digest(payload) }
    }

    /// The digest alone, for who has kept the settings' [`FingerprintSettings::id`].
    #[must_use]
    pub fn digest(&self, payload: &Payload<'_>) -> [u8; 32] {
        if self.mode == FingerprintMode::None {
            return [0; 32];
        }
        let mut text = Vec::with_capacity(256 + payload.body.len());
        put(&mut text, ALGORITHM);
        put(&mut text, payload.method.as_bytes());
        put_all(&mut text, payload.path);
        match payload.query {
            None => text.push(0),
            Some(query) => {
                text.push(1);
                put(&mut text, query);
            }
        }
        let media_types: Vec<Vec<u8>> = payload.content_type.iter().copied().map(media_type).collect();
        put_all(&mut text, &media_types);
        let encodings = content_encodings(payload.content_encoding);
        put_all(&mut text, &encodings);
        self.put_headers(&mut text, payload.headers);

        // An encoded body is opaque here, and so is one whose type is written twice: who reads it may follow either.
        match (media_types.as_slice(), payload.content_type) {
            _ if !encodings.is_empty() => raw_digest(text, payload.body),
            ([], _) if self.mode == FingerprintMode::Json => self.json_or_raw_digest(text, payload.body),
            ([media], _) if self.mode == FingerprintMode::Json && is_json(media) => {
                self.json_or_raw_digest(text, payload.body)
            }
            ([media], [value]) if media.starts_with(b"multipart/") => match multipart::boundary(value) {
                Some(boundary) => {
                    text.push(BodyTag::Multipart as u8);
                    multipart::segments(payload.body, &boundary).for_each(|segment| put(&mut text, segment));
                    *blake3::hash(&text).as_bytes()
                }
                None => raw_digest(text, payload.body),
            },
            _ => raw_digest(text, payload.body),
        }
    }

    /// Digest of a JSON text alone, compared as the fingerprint compares bodies (`oncegate key --json`): with the ignored
    /// pointers left out, and by its raw bytes where it is no JSON. The mode does not count.
    #[must_use]
    pub fn json_digest(&self, body: &[u8]) -> [u8; 32] {
        let mut text = Vec::with_capacity(64 + body.len());
        put(&mut text, b"oncegate json 1");
        self.json_or_raw_digest(text, body)
    }

    fn json_or_raw_digest(&self, mut text: Vec<u8>, body: &[u8]) -> [u8; 32] {
        let start = text.len();
        text.push(BodyTag::Json as u8);
        let ignore: Vec<Pointer> = self.ignore.iter().filter_map(|pointer| json::parse_pointer(pointer)).collect();
        let ignore: Vec<&[_]> = ignore.iter().map(Vec::as_slice).collect();
        if json::canonicalize(body, &ignore, &mut text).is_some() {
            return *blake3::hash(&text).as_bytes();
        }
        text.truncate(start);
        raw_digest(text, body)
    }

    fn put_headers(&self, text: &mut Vec<u8>, values: &[Vec<&[u8]>]) {
        let values = values.iter().map(Vec::as_slice).chain(std::iter::repeat(&[] as &[&[u8]]));
        let mut headers: Vec<_> = self.headers.iter().zip(values).collect();
        headers.sort_unstable();
        headers.dedup();
        put_len(text, headers.len());
        for (name, values) in headers {
            put(text, name.as_bytes());
            put_all(text, values);
        }
    }
}

fn raw_digest(mut text: Vec<u8>, body: &[u8]) -> [u8; 32] {
    text.push(BodyTag::Raw as u8);
    text.extend_from_slice(body);
    *blake3::hash(&text).as_bytes()
}

/// The type and subtype of a `Content-Type` in lower case, without parameters (RFC 9110 §8.3.1).
fn media_type(content_type: &[u8]) -> Vec<u8> {
    content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii().to_ascii_lowercase()
}

fn is_json(media_type: &[u8]) -> bool {
    media_type == b"application/json" || media_type.ends_with(b"+json")
}

/// The codings in the order in which they were applied, in lower case; `identity` is none (RFC 9110 §8.4.1).
fn content_encodings(lines: &[&[u8]]) -> Vec<Vec<u8>> {
    lines
        .iter()
        .flat_map(|line| line.split(|byte| *byte == b','))
        .map(|coding| coding.trim_ascii().to_ascii_lowercase())
        .filter(|coding| !coding.is_empty() && coding != b"identity")
        .collect()
}

fn put_len(text: &mut Vec<u8>, len: usize) {
    text.extend_from_slice(&(len as u64).to_le_bytes());
}

fn put(text: &mut Vec<u8>, part: &[u8]) {
    put_len(text, part.len());
    text.extend_from_slice(part);
}

fn put_all(text: &mut Vec<u8>, parts: &[impl AsRef<[u8]>]) {
    put_len(text, parts.len());
    parts.iter().for_each(|part| put(text, part.as_ref()));
}

fn put_set(text: &mut Vec<u8>, parts: &[String]) {
    let mut parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    parts.sort_unstable();
    parts.dedup();
    put_all(text, &parts);
}
