//! Whatever the end of the log holds, the store opens or says why not, and never panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oncegate::store::embedded::{Durability, Embedded, Engine, Options};
use oncegate::store::log::frame_around;
use std::os::unix::fs::FileExt;

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let options = Options { path: path.clone(), engine: Engine::Sled, create: true, min_free_bytes: 0, durability: Durability::Strict };
    drop(Embedded::open(&options).unwrap());
    let segment = path.join("log").join(format!("{:016x}.seg", 1));
    let file = std::fs::OpenOptions::new().read(true).write(true).open(segment).unwrap();
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).unwrap();
    let uid = u64::from_le_bytes(header[16..24].try_into().unwrap());
    let mut bytes = Vec::new();
    if let Some((&[len, entries, flags], payload)) = data.split_first_chunk() {
        let (payload, behind) = payload.split_at(payload.len().min(usize::from(len)));
        bytes.extend_from_slice(&frame_around(payload, u32::from(entries), u32::from(flags), uid, 1));
        bytes.extend_from_slice(behind);
    }
    file.write_all_at(&bytes, 64).unwrap();
    drop(file);
    if Embedded::open(&options).is_ok() {
        // What was accepted once is accepted again.
        drop(Embedded::open(&options).unwrap());
    }
});
