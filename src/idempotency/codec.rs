//! Records as bytes: versioned, and refusing what it does not know.
//!
//! Version 1, in this order. `int` is an unsigned LEB128 number in its shortest form, `bytes` an `int` length and
//! that many bytes; an option is 0, or 1 and the value.
//!
//! ```text
//! version = 1        1 byte
//! state              1 byte: 0 claimed, 1 completed, 2 completed without its body, 3 unknown
//! token              16 bytes
//! fingerprint        settings: 8 bytes, little-endian; digest: 32 bytes
//! key, key_header, path, route   bytes each
//! claimed_at, attempts           int each
//! ── claimed:    lease_until   option of int
//! ── completed:  completed_at, expires_at, status   int each; number of headers: int; name, value …: bytes; body: bytes
//! ── without:    completed_at, expires_at, status   int each; location: option of bytes
//! ── unknown:    since, expires_at   int each; why: 1 byte, for a status that status: int
//! ```
//!
//! Every record has exactly one encoding, and no byte is left over. What a version knows never changes: whatever is
//! added (a state, a reason, a field) takes a new version, so that an older oncegate says which one wrote it instead of
//! misreading it. Damage is the store's to detect: there is no checksum here.

use super::record::{ClaimToken, Fingerprint, Millis, Origin, Record, Recorded, Response, State, Why};
use bytes::Bytes;

const VERSION: u8 = 1;

const CLAIMED: u8 = 0;
const COMPLETED: u8 = 1;
const OMITTED: u8 = 2;
const UNKNOWN: u8 = 3;

/// Encodes a record in the newest version of the format.
#[must_use]
pub fn encode(record: &Record) -> Bytes {
    let Record { origin, fingerprint, token, state } = record;
    let mut out = Vec::with_capacity(capacity(record));
    out.push(VERSION);
    out.push(match state {
        State::Claimed { .. } => CLAIMED,
        State::Completed { response: Recorded::Full(_), .. } => COMPLETED,
        State::Completed { response: Recorded::Omitted { .. }, .. } => OMITTED,
        State::Unknown { .. } => UNKNOWN,
    });
    out.extend_from_slice(&token.0);
    out.extend_from_slice(&fingerprint.settings.to_le_bytes());
    out.extend_from_slice(&fingerprint.digest);
    for field in [&origin.key, &origin.key_header, &origin.path, &origin.route] {
        put_bytes(&mut out, field);
    }
    put_int(&mut out, origin.claimed_at.0);
    put_int(&mut out, origin.attempts.into());
    match state {
        State::Claimed { lease_until } => match lease_until {
            None => out.push(0),
            Some(until) => {
                out.push(1);
                put_int(&mut out, until.0);
            }
        },
        State::Completed { response, completed_at, expires_at } => {
            put_int(&mut out, completed_at.0);
            put_int(&mut out, expires_at.0);
            put_recorded(&mut out, response);
        }
        State::Unknown { why, since, expires_at } => {
            put_int(&mut out, since.0);
            put_int(&mut out, expires_at.0);
            put_why(&mut out, *why);
        }
    }
    Bytes::from(out)
}

fn put_recorded(out: &mut Vec<u8>, response: &Recorded) {
    match response {
        Recorded::Full(Response { status, headers, body }) => {
            put_int(out, (*status).into());
            put_int(out, headers.len() as u64);
            for (name, value) in headers {
                put_bytes(out, name);
                put_bytes(out, value);
            }
            put_bytes(out, body);
        }
        Recorded::Omitted { status, location } => {
            put_int(out, (*status).into());
            match location {
                None => out.push(0),
                Some(location) => {
                    out.push(1);
                    put_bytes(out, location);
                }
            }
        }
    }
}

fn put_why(out: &mut Vec<u8>, why: Why) {
    out.push(match why {
        Why::Reset => 0,
        Why::Timeout => 1,
        Why::Malformed => 2,
        Why::Status(_) => 3,
        Why::Crash => 4,
        Why::Lease => 5,
        Why::Abandoned => 6,
        Why::Shutdown => 7,
        Why::EarlierSend => 8,
    });
    if let Why::Status(status) = why {
        put_int(out, status.into());
    }
}

fn put_int(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_int(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// About as many bytes as the encoding takes, rather more than fewer.
fn capacity(record: &Record) -> usize {
    let Origin { key, key_header, path, route, .. } = &record.origin;
    let response = match &record.state {
        State::Completed { response: Recorded::Full(Response { headers, body, .. }), .. } => {
            headers.iter().map(|(name, value)| name.len() + value.len() + 4).sum::<usize>() + body.len()
        }
        State::Completed { response: Recorded::Omitted { location, .. }, .. } => {
            location.as_ref().map_or(0, Bytes::len)
        }
        State::Claimed { .. } | State::Unknown { .. } => 0,
    };
    128 + key.len() + key_header.len() + path.len() + route.len() + response
}

/// Why stored bytes are not a record. Such bytes mean "outcome unknown", never "absent".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("the record has format version {0}, which this oncegate does not know; a newer one wrote it")]
    Version(u8),
    #[error("the record is malformed: {0}")]
    Malformed(&'static str),
}

/// Decodes what [`encode`] of this or an earlier version has written. Copies nothing: the record's fields share `bytes`.
///
/// # Errors
/// If the bytes are of an unknown version, cut off, have bytes left over, or hold an unknown tag.
pub fn decode(bytes: &Bytes) -> Result<Record, DecodeError> {
    let mut input = Reader(bytes.clone());
    match input.byte()? {
        VERSION => {}
        other => return Err(DecodeError::Version(other)),
    }
    let state = input.byte()?;
    let token = ClaimToken(input.array()?);
    let fingerprint = Fingerprint { settings: u64::from_le_bytes(input.array()?), digest: input.array()? };
    let origin = Origin {
        key: input.bytes()?,
        key_header: input.bytes()?,
        path: input.bytes()?,
        route: input.bytes()?,
        claimed_at: input.millis()?,
        attempts: u32::try_from(input.int()?).map_err(|_| OUT_OF_RANGE)?,
    };
    let state = match state {
        CLAIMED => State::Claimed { lease_until: input.option(Reader::millis)? },
        COMPLETED | OMITTED => {
            let (completed_at, expires_at) = (input.millis()?, input.millis()?);
            let response = if state == COMPLETED { input.full()? } else { input.omitted()? };
            State::Completed { response, completed_at, expires_at }
        }
        UNKNOWN => {
            let (since, expires_at) = (input.millis()?, input.millis()?);
            State::Unknown { why: input.why()?, since, expires_at }
        }
        _ => return Err(DecodeError::Malformed("unknown state")),
    };
    if !input.0.is_empty() {
        return Err(DecodeError::Malformed("bytes are left over"));
    }
    Ok(Record { origin, fingerprint, token, state })
}

const CUT_OFF: DecodeError = DecodeError::Malformed("cut off");
const OUT_OF_RANGE: DecodeError = DecodeError::Malformed("a number is out of range");

/// What has not been read yet.
struct Reader(Bytes);

impl Reader {
    fn byte(&mut self) -> Result<u8, DecodeError> {
        self.array().map(|[byte]| byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let array = *self.0.first_chunk().ok_or(CUT_OFF)?;
        bytes::Buf::advance(&mut self.0, N);
        Ok(array)
    }

    fn int(&mut self) -> Result<u64, DecodeError> {
        let mut value = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let byte = self.byte()?;
            let low = u64::from(byte & 0x7f);
            if low << shift >> shift != low {
                return Err(OUT_OF_RANGE);
            }
            value |= low << shift;
            if byte < 0x80 {
                // A last byte of 0 would be a second way to write the same number.
                return if byte == 0 && shift > 0 {
                    Err(DecodeError::Malformed("a number is padded"))
                } else {
                    Ok(value)
                };
            }
        }
        Err(OUT_OF_RANGE)
    }

    fn bytes(&mut self) -> Result<Bytes, DecodeError> {
        let len = usize::try_from(self.int()?).map_err(|_| CUT_OFF)?;
        if len > self.0.len() {
            return Err(CUT_OFF);
        }
        Ok(self.0.split_to(len))
    }

    fn millis(&mut self) -> Result<Millis, DecodeError> {
        self.int().map(Millis)
    }

    fn status(&mut self) -> Result<u16, DecodeError> {
        u16::try_from(self.int()?).map_err(|_| OUT_OF_RANGE)
    }

    fn option<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, DecodeError>) -> Result<Option<T>, DecodeError> {
        match self.byte()? {
            0 => Ok(None),
            1 => read(self).map(Some),
            _ => Err(DecodeError::Malformed("neither absent nor present")),
        }
    }

    fn full(&mut self) -> Result<Recorded, DecodeError> {
        let status = self.status()?;
        let count = self.int()?;
        // Collecting what may fail reserves no memory for a count that may lie.
        let headers = (0..count).map(|_| Ok((self.bytes()?, self.bytes()?))).collect::<Result<_, DecodeError>>()?;
        Ok(Recorded::Full(Response { status, headers, body: self.bytes()? }))
    }

    fn omitted(&mut self) -> Result<Recorded, DecodeError> {
        Ok(Recorded::Omitted { status: self.status()?, location: self.option(Reader::bytes)? })
    }

    fn why(&mut self) -> Result<Why, DecodeError> {
        Ok(match self.byte()? {
            0 => Why::Reset,
            1 => Why::Timeout,
            2 => Why::Malformed,
            3 => Why::Status(self.status()?),
            4 => Why::Crash,
            5 => Why::Lease,
            6 => Why::Abandoned,
            7 => Why::Shutdown,
            8 => Why::EarlierSend,
            _ => return Err(DecodeError::Malformed("unknown reason")),
        })
    }
}
