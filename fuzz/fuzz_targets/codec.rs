//! Every record has one encoding, every encoding one record, and no other bytes are a record.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use oncegate::idempotency::codec::{DecodeError, decode, encode};
use oncegate::idempotency::{ClaimToken, Fingerprint, Millis, Origin, Record, Recorded, Response, State, Why};

#[derive(Arbitrary, Debug)]
struct Fields {
    token: [u8; 16],
    fingerprint: (u64, [u8; 32]),
    origin: [Vec<u8>; 4],
    claimed_at: u64,
    attempts: u32,
    state: Raw,
    /// Where to damage the encoding, and how.
    damage: (usize, u8),
}

#[derive(Arbitrary, Debug)]
enum Raw {
    Claimed(Option<u64>),
    Full { at: (u64, u64), status: u16, headers: Vec<(Vec<u8>, Vec<u8>)>, body: Vec<u8> },
    Omitted { at: (u64, u64), status: u16, location: Option<Vec<u8>> },
    Unknown { at: (u64, u64), why: u8, status: u16 },
}

impl From<Fields> for Record {
    fn from(fields: Fields) -> Self {
        let [key, key_header, path, route] = fields.origin.map(Bytes::from);
        let state = match fields.state {
            Raw::Claimed(lease_until) => State::Claimed { lease_until: lease_until.map(Millis) },
            Raw::Full { at, status, headers, body } => {
                let headers = headers.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
                let response = Recorded::Full(Response { status, headers, body: body.into() });
                State::Completed { response, completed_at: Millis(at.0), expires_at: Millis(at.1) }
            }
            Raw::Omitted { at, status, location } => {
                let response = Recorded::Omitted { status, location: location.map(Bytes::from) };
                State::Completed { response, completed_at: Millis(at.0), expires_at: Millis(at.1) }
            }
            Raw::Unknown { at, why, status } => {
                let why = match why % 9 {
                    0 => Why::Reset,
                    1 => Why::Timeout,
                    2 => Why::Malformed,
                    3 => Why::Status(status),
                    4 => Why::Crash,
                    5 => Why::Lease,
                    6 => Why::Abandoned,
                    7 => Why::Shutdown,
                    _ => Why::EarlierSend,
                };
                State::Unknown { why, since: Millis(at.0), expires_at: Millis(at.1) }
            }
        };
        Self {
            origin: Origin {
                key,
                key_header,
                path,
                route,
                claimed_at: Millis(fields.claimed_at),
                attempts: fields.attempts,
            },
            fingerprint: Fingerprint { settings: fields.fingerprint.0, digest: fields.fingerprint.1 },
            token: ClaimToken(fields.token),
            state,
        }
    }
}

/// What holds for any bytes: an error that says what is wrong, or a record that is written as just these bytes.
fn check(bytes: &Bytes) -> Result<Record, DecodeError> {
    let decoded = decode(bytes);
    match &decoded {
        Ok(record) => {
            assert_eq!(encode(record), bytes, "one record, two encodings");
            assert_eq!(bytes[0], 1);
        }
        Err(DecodeError::Version(version)) => assert!(bytes[0] == *version && *version != 1),
        Err(DecodeError::Malformed(_)) => assert!(bytes.first().is_none_or(|version| *version == 1)),
    }
    decoded
}

fuzz_target!(|data: &[u8]| {
    let _ = check(&Bytes::copy_from_slice(data));

    let Ok(fields) = Fields::arbitrary(&mut Unstructured::new(data)) else { return };
    let (at, mask) = fields.damage;
    let record = Record::from(fields);
    let encoding = encode(&record);
    assert_eq!(check(&encoding).as_ref(), Ok(&record));

    // No encoding is the beginning of another.
    let at = at % encoding.len();
    assert!(check(&encoding.slice(..at)).is_err(), "cut off at {at}");
    let mut damaged = encoding.to_vec();
    damaged.push(mask);
    assert!(check(&Bytes::from(damaged.clone())).is_err(), "a byte too many");
    damaged.pop();
    damaged[at] ^= mask.max(1);
    assert_ne!(check(&Bytes::from(damaged)), Ok(record), "another byte at {at}");
});
