//! Records as bytes: what one version has written, every later one reads.
//!
//! A file of `tests/golden` is never changed or removed once it has been released. A new version adds its own; to write
//! them, run the test once with `ONCEGATE_WRITE_GOLDEN=1`: it writes only those that are missing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use bytes::Bytes;
use oncegate::idempotency::codec::{DecodeError, decode, encode};
use oncegate::idempotency::{ClaimToken, Fingerprint, Millis, Origin, Record, Recorded, Response, State, Why};
use proptest::prelude::*;
use std::path::Path;

fn record(state: State) -> Record {
    Record {
        origin: Origin {
            key: Bytes::from_static(b"8e03978e-40d5-43dd-bc93-6894a57f9324"),
            key_header: Bytes::from_static(b"\"8e03978e-40d5-43dd-bc93-6894a57f9324\""),
            path: Bytes::from_static(b"/v1/workspaces/ws_1/posts"),
            route: Bytes::from_static(b"/v1/workspaces/{workspace}/posts"),
            claimed_at: Millis(1_767_225_600_000),
            attempts: 1,
        },
        fingerprint: Fingerprint { settings: 0x0123_4567_89ab_cdef, digest: std::array::from_fn(|i| i as u8) },
        token: ClaimToken(std::array::from_fn(|i| 0xf0 | i as u8)),
        state,
    }
}

fn unknown(why: Why) -> Record {
    record(State::Unknown { why, since: Millis(1_767_225_630_000), expires_at: Millis(1_767_830_430_000) })
}

fn completed(response: Recorded) -> Record {
    record(State::Completed {
        response,
        completed_at: Millis(1_767_225_600_250),
        expires_at: Millis(1_767_312_000_250),
    })
}

/// Every golden record of version 1, with the name of its file.
fn golden_v1() -> Vec<(&'static str, Record)> {
    let header = |name: &'static [u8], value: &'static [u8]| (Bytes::from_static(name), Bytes::from_static(value));
    let full = Recorded::Full(Response {
        status: 201,
        headers: vec![
            header(b"content-type", b"application/json"),
            header(b"x-obs-text", b"caf\xe9"),
            header(b"x-empty", b""),
            header(b"warning", b"1"),
            header(b"warning", b"2"),
        ],
        body: Bytes::from_static(b"{\"id\":9007199254740993}"),
    });
    let long_body = vec![b'.'; 20_000];
    let mut resent = unknown(Why::EarlierSend);
    resent.origin.attempts = u32::MAX;
    let extreme = Record {
        origin: Origin {
            key: Bytes::from_static(b"k"),
            key_header: Bytes::from_static(b"k"),
            path: Bytes::new(),
            route: Bytes::new(),
            claimed_at: Millis(0),
            attempts: 0,
        },
        fingerprint: Fingerprint { settings: u64::MAX, digest: [0xff; 32] },
        token: ClaimToken([0; 16]),
        state: State::Claimed { lease_until: Some(Millis(u64::MAX)) },
    };
    let empty = Response { status: u16::MAX, headers: Vec::new(), body: Bytes::new() };
    let long = Response { status: 200, headers: Vec::new(), body: long_body.into() };
    let location = Some(Bytes::from_static(b"/v1/workspaces/ws_1/posts/7"));
    vec![
        ("record-v1-claimed.bin", record(State::Claimed { lease_until: None })),
        ("record-v1-claimed-lease.bin", record(State::Claimed { lease_until: Some(Millis(1_767_225_630_000)) })),
        ("record-v1-claimed-extreme.bin", extreme),
        ("record-v1-completed.bin", completed(full)),
        ("record-v1-completed-empty.bin", completed(Recorded::Full(empty))),
        ("record-v1-completed-long.bin", completed(Recorded::Full(long))),
        ("record-v1-omitted.bin", completed(Recorded::Omitted { status: 200, location: None })),
        ("record-v1-omitted-location.bin", completed(Recorded::Omitted { status: 201, location })),
        ("record-v1-unknown-reset.bin", unknown(Why::Reset)),
        ("record-v1-unknown-timeout.bin", unknown(Why::Timeout)),
        ("record-v1-unknown-malformed.bin", unknown(Why::Malformed)),
        ("record-v1-unknown-status.bin", unknown(Why::Status(504))),
        ("record-v1-unknown-crash.bin", unknown(Why::Crash)),
        ("record-v1-unknown-lease.bin", unknown(Why::Lease)),
        ("record-v1-unknown-abandoned.bin", unknown(Why::Abandoned)),
        ("record-v1-unknown-shutdown.bin", unknown(Why::Shutdown)),
        ("record-v1-unknown-earlier-send.bin", resent),
    ]
}

#[test]
fn golden_records_of_version_1_are_read_and_written_alike() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<_> = std::fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("record-v1-"))
        .collect();
    for (name, expected) in golden_v1() {
        let path = directory.join(name);
        if !path.exists() && std::env::var_os("ONCEGATE_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, encode(&expected)).unwrap();
            continue;
        }
        let bytes = Bytes::from(std::fs::read(&path).unwrap_or_else(|error| panic!("{name}: {error}")));
        assert_eq!(decode(&bytes).as_ref(), Ok(&expected), "{name}");
        assert_eq!(encode(&expected), bytes, "{name}");
        files.retain(|file| file != name);
    }
    assert!(files.is_empty() || std::env::var_os("ONCEGATE_WRITE_GOLDEN").is_some(), "nobody checks {files:?}");
}

/// The layout as documented, byte for byte, so that the golden files are not merely what the code happened to write.
#[test]
fn the_layout_is_the_documented_one() {
    let mut record = completed(Recorded::Full(Response {
        status: 300,
        headers: vec![(Bytes::from_static(b"a"), Bytes::from_static(b"bc"))],
        body: Bytes::from_static(b"xyz"),
    }));
    record.origin = Origin {
        key: Bytes::from_static(b"k"),
        key_header: Bytes::from_static(b"\"k\""),
        path: Bytes::from_static(b"/p"),
        route: Bytes::from_static(b"/{p}"),
        claimed_at: Millis(127),
        attempts: 128,
    };
    record.state = match record.state {
        State::Completed { response, .. } => {
            State::Completed { response, completed_at: Millis(1 << 14), expires_at: Millis((1 << 14) + 1) }
        }
        other => other,
    };
    let mut expected = vec![1, 1];
    expected.extend(0xf0..=0xff);
    expected.extend([0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01]);
    expected.extend(0..32);
    expected.extend(*b"\x01k\x03\"k\"\x02/p\x04/{p}");
    expected.extend([0x7f, 0x80, 0x01]);
    expected.extend([0x80, 0x80, 0x01, 0x81, 0x80, 0x01]);
    expected.extend([0xac, 0x02, 1]);
    expected.extend(*b"\x01a\x02bc\x03xyz");
    assert_eq!(encode(&record), expected);
    assert_eq!(decode(&expected.into()), Ok(record));
}

#[test]
fn every_truncation_and_every_byte_too_many_is_refused() {
    for (name, record) in golden_v1() {
        let bytes = encode(&record);
        for len in (0..bytes.len()).filter(|len| *len < 400 || bytes.len() - len < 100) {
            assert_eq!(decode(&bytes.slice(..len)), Err(DecodeError::Malformed("cut off")), "{name} cut to {len}");
        }
        let longer = Bytes::from([&bytes[..], &[0]].concat());
        assert_eq!(decode(&longer), Err(DecodeError::Malformed("bytes are left over")), "{name}");
    }
}

#[test]
fn other_versions_are_refused_by_their_number() {
    let mut bytes = encode(&unknown(Why::Crash)).to_vec();
    for version in (0..=u8::MAX).filter(|version| *version != 1) {
        bytes[0] = version;
        assert_eq!(decode(&bytes.clone().into()), Err(DecodeError::Version(version)));
    }
    assert_eq!(decode(&Bytes::from_static(&[2])), Err(DecodeError::Version(2)), "whatever comes after it");
    assert!(DecodeError::Version(2).to_string().contains("format version 2"));
}

#[test]
fn unknown_tags_are_refused() {
    let patched = |record: &Record, at_end: usize, byte: u8| {
        let mut bytes = encode(record).to_vec();
        let at = bytes.len() - at_end;
        bytes[at] = byte;
        decode(&bytes.into())
    };
    let claimed = record(State::Claimed { lease_until: None });
    let omitted = completed(Recorded::Omitted { status: 200, location: None });
    let neither = Err(DecodeError::Malformed("neither absent nor present"));
    for byte in 2..=u8::MAX {
        assert_eq!(patched(&claimed, 1, byte), neither);
        assert_eq!(patched(&omitted, 1, byte), neither);
    }
    for byte in 9..=u8::MAX {
        assert_eq!(patched(&unknown(Why::Crash), 1, byte), Err(DecodeError::Malformed("unknown reason")));
    }
    let mut bytes = encode(&claimed).to_vec();
    for byte in 4..=u8::MAX {
        bytes[1] = byte;
        assert_eq!(decode(&bytes.clone().into()), Err(DecodeError::Malformed("unknown state")));
    }
}

#[test]
fn numbers_beyond_their_range_or_padded_are_refused() {
    // The record with `attempts` at its end replaced: two bytes (attempts, no lease) make room for others.
    let with_tail = |tail: &[u8]| {
        let bytes = encode(&record(State::Claimed { lease_until: None }));
        decode(&[&bytes[..bytes.len() - 2], tail].concat().into())
    };
    let attempts = |tail: &[u8]| with_tail(tail).map(|record| record.origin.attempts);
    let lease = |tail: &[u8]| with_tail(tail).map(|record| record.state);
    let out_of_range = Err(DecodeError::Malformed("a number is out of range"));
    assert_eq!(attempts(&[0xff, 0xff, 0xff, 0xff, 0x0f, 0]), Ok(u32::MAX));
    assert_eq!(attempts(&[0x80, 0x80, 0x80, 0x80, 0x10, 0]), out_of_range);
    assert_eq!(attempts(&[0x81, 0x00, 0]), Err(DecodeError::Malformed("a number is padded")));
    assert_eq!(attempts(&[0x80, 0x00, 0]), Err(DecodeError::Malformed("a number is padded")));
    let out_of_range = Err(DecodeError::Malformed("a number is out of range"));
    let mut long = vec![1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    assert_eq!(lease(&long), Ok(State::Claimed { lease_until: Some(Millis(u64::MAX)) }));
    long[11] = 0x02;
    assert_eq!(lease(&long), out_of_range);
    long[11] = 0x03;
    assert_eq!(lease(&long), out_of_range);
    long[11] = 0x81;
    long.push(0);
    assert_eq!(lease(&long), out_of_range);

    let bytes = encode(&unknown(Why::Status(u16::MAX)));
    let mut beyond = bytes.to_vec();
    *beyond.last_mut().unwrap() = 0x04;
    assert_eq!(decode(&beyond.into()), Err(DecodeError::Malformed("a number is out of range")));
}

#[test]
fn a_length_beyond_the_input_reserves_no_memory() {
    let bytes = encode(&completed(Recorded::Full(Response { status: 200, headers: Vec::new(), body: Bytes::new() })));
    let huge: &[u8] = &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    let count = [&bytes[..bytes.len() - 2], huge].concat();
    assert_eq!(decode(&count.into()), Err(DecodeError::Malformed("cut off")));
    let body = [&bytes[..bytes.len() - 1], huge].concat();
    assert_eq!(decode(&body.into()), Err(DecodeError::Malformed("cut off")));
    let one_too_many = [&bytes[..bytes.len() - 2], &[2, 0, 0, 0][..]].concat();
    assert_eq!(decode(&one_too_many.into()), Err(DecodeError::Malformed("cut off")));
}

/// The most headers that fit: empty names and values.
#[test]
fn headers_of_two_bytes_each_are_read() {
    let headers = vec![(Bytes::new(), Bytes::new()); 1000];
    let record = completed(Recorded::Full(Response { status: 200, headers, body: Bytes::new() }));
    assert_eq!(decode(&encode(&record)), Ok(record));
}

#[test]
fn decoding_copies_nothing() {
    let body = Bytes::from(vec![7; 100_000]);
    let bytes = encode(&completed(Recorded::Full(Response { status: 200, headers: Vec::new(), body })));
    let State::Completed { response: Recorded::Full(response), .. } = decode(&bytes).unwrap().state else {
        panic!("not what was encoded");
    };
    assert!(bytes.as_ptr_range().contains(&response.body.as_ptr()), "the body was copied");
}

fn any_bytes(max: usize) -> impl Strategy<Value = Bytes> {
    prop::collection::vec(any::<u8>(), 0..max).prop_map(Bytes::from)
}

fn any_millis() -> impl Strategy<Value = Millis> {
    prop_oneof![any::<u64>(), 0..300_u64, Just(u64::MAX)].prop_map(Millis)
}

fn any_state() -> impl Strategy<Value = State> {
    let why = prop_oneof![
        Just(Why::Reset),
        Just(Why::Timeout),
        Just(Why::Malformed),
        any::<u16>().prop_map(Why::Status),
        Just(Why::Crash),
        Just(Why::Lease),
        Just(Why::Abandoned),
        Just(Why::Shutdown),
        Just(Why::EarlierSend),
    ];
    let headers = prop::collection::vec((any_bytes(20), any_bytes(200)), 0..8);
    let recorded = prop_oneof![
        (any::<u16>(), headers, any_bytes(300)).prop_map(|(status, headers, body)| Recorded::Full(Response {
            status,
            headers,
            body
        })),
        (any::<u16>(), prop::option::of(any_bytes(200)))
            .prop_map(|(status, location)| Recorded::Omitted { status, location }),
    ];
    prop_oneof![
        prop::option::of(any_millis()).prop_map(|lease_until| State::Claimed { lease_until }),
        (recorded, any_millis(), any_millis()).prop_map(|(response, completed_at, expires_at)| State::Completed {
            response,
            completed_at,
            expires_at
        }),
        (why, any_millis(), any_millis()).prop_map(|(why, since, expires_at)| State::Unknown {
            why,
            since,
            expires_at
        }),
    ]
}

prop_compose! {
    fn any_record()(
        (key, key_header, path, route) in (any_bytes(300), any_bytes(300), any_bytes(300), any_bytes(40)),
        claimed_at in any_millis(),
        attempts: u32,
        (settings, digest, token) in any::<(u64, [u8; 32], [u8; 16])>(),
        state in any_state(),
    ) -> Record {
        let origin = Origin { key, key_header, path, route, claimed_at, attempts };
        Record { origin, fingerprint: Fingerprint { settings, digest }, token: ClaimToken(token), state }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_encoded_is_decoded(record in any_record()) {
        prop_assert_eq!(decode(&encode(&record)), Ok(record));
    }

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), known: bool) {
        if let (true, [version, state, ..]) = (known, &mut bytes[..]) {
            (*version, *state) = (1, *state % 4);
        }
        let bytes = Bytes::from(bytes);
        if let Ok(record) = decode(&bytes) {
            prop_assert_eq!(encode(&record), bytes, "one record, one encoding");
        }
    }

    /// Damage is refused or gives another record; never a panic, never the same record from other bytes.
    #[test]
    fn damaged_records_never_panic(record in any_record(), flips in prop::collection::vec((any::<prop::sample::Index>(), 1..=u8::MAX), 1..4)) {
        let mut bytes = encode(&record).to_vec();
        for (at, mask) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= mask;
        }
        let bytes = Bytes::from(bytes);
        if let Ok(decoded) = decode(&bytes) {
            prop_assert_eq!(encode(&decoded), bytes);
        }
    }
}
