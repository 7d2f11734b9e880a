//! Fingerprints: when two payloads are the same.

use super::record::Fingerprint;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FingerprintMode {
    Json,
    Raw,
    None,
}

/// How payloads are condensed on a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FingerprintSettings {
    pub mode: FingerprintMode,
    /// JSON Pointers (RFC 6901) left out of a JSON body.
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

impl FingerprintSettings {
    /// Checks the JSON Pointers.
    ///
    /// # Errors
    /// One message per pointer that is not an RFC 6901 JSON Pointer.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        todo!()
    }

    /// Identifies these settings (and the version of the algorithm) in records.
    #[must_use]
    pub fn id(&self) -> u64 {
        todo!()
    }

    #[must_use]
    pub fn fingerprint(&self, payload: &Payload<'_>) -> Fingerprint {
        let _ = payload;
        todo!()
    }

    /// Digest of a JSON text alone, compared as the fingerprint compares bodies (`oncegate key --json`).
    #[must_use]
    pub fn json_digest(&self, body: &[u8]) -> [u8; 32] {
        let _ = body;
        todo!()
    }
}
