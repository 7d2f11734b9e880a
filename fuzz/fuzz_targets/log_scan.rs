//! Whatever bytes a segment holds, scanning it ends, and never panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oncegate::store::log::{frame_around, scan_bytes};

const UID: u64 = 7;

fuzz_target!(|data: &[u8]| {
    let mut segment = vec![0; 64];
    segment.extend_from_slice(data);
    let (end, _) = scan_bytes(&segment, UID).unwrap();
    assert!(end <= segment.len() as u64);

    // Behind right checksums: the input cut into payloads.
    let mut segment = vec![0; 64];
    let mut rest = data;
    let mut number = 1;
    while let Some((&[len, entries, flags], payload)) = rest.split_first_chunk() {
        let (payload, behind) = payload.split_at(payload.len().min(usize::from(len)));
        segment.extend_from_slice(&frame_around(payload, u32::from(entries), u32::from(flags), UID, number));
        segment.resize(segment.len().next_multiple_of(8), 0);
        rest = behind;
        number += 1;
    }
    let (end, _) = scan_bytes(&segment, UID).unwrap();
    assert!(end <= segment.len() as u64);
});
