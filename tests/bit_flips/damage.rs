//! What is done to which file, and what of the log cannot be told from a torn end then.

use crate::random::Random;
use crate::struck::{Acknowledgements, id};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const SECTOR: u64 = 512;
const SEGMENT_HEADER: u64 = 64;
const FRAME_HEADER: usize = 64;
const ENTRY_HEADER: usize = 56;
const FRAME_MAGIC: [u8; 4] = 0x4d52_464f_u32.to_le_bytes();

#[derive(Clone, Copy, Debug)]
enum What {
    Flip {
        offset: u64,
        bit: u32,
    },
    Zero {
        offset: u64,
        len: u64,
    },
    Truncate {
        len: u64,
    },
    /// A byte in a file that has none.
    Garbage,
}

#[derive(Clone, Debug)]
pub(crate) struct Damage {
    file: PathBuf,
    kind: &'static str,
    what: What,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = std::fs::metadata(&self.file).map_or(0, |meta| meta.len());
        write!(f, "{}, {} ({len} bytes): {:?}", self.kind, self.file.display(), self.what)
    }
}

fn kind_of(file: &Path) -> &'static str {
    let text = file.to_str().unwrap();
    match file.file_name().unwrap().to_str().unwrap() {
        _ if text.contains("/index/") => "index",
        "store" => "store",
        "head" => "head",
        "lock" => "lock",
        name if name.ends_with(".sum") => "summary",
        name if name.ends_with(".seg") => match is_blank(file) {
            true => "spare",
            false => "segment",
        },
        name => panic!("what is {name}?"),
    }
}

fn is_blank(segment: &Path) -> bool {
    std::fs::read(segment).unwrap().iter().skip(SEGMENT_HEADER as usize).all(|&byte| byte == 0)
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for file in std::fs::read_dir(dir).unwrap() {
        let path = file.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

impl Damage {
    /// Every kind of file gets its share.
    pub(crate) fn choose(store: &Path, random: &mut Random) -> Self {
        let mut by_kind: BTreeMap<&'static str, Vec<PathBuf>> = BTreeMap::new();
        for file in files(store) {
            by_kind.entry(kind_of(&file)).or_default().push(file);
        }
        let kind = match random.below(100) {
            0..=49 => "index",
            50..=74 => "segment",
            75..=84 => "summary",
            85..=88 => "spare",
            89..=92 => "store",
            93..=97 => "head",
            _ => "lock",
        };
        let Some(files) = by_kind.get(kind) else { return Self::choose(store, random) };
        let file = match random.percent(50) {
            true => files[random.below(files.len() as u64) as usize].clone(),
            false => by_size(files, random),
        };
        let what = choose_what(&std::fs::read(&file).unwrap(), random);
        Self { file, kind, what }
    }

    pub(crate) fn kind(&self) -> &'static str {
        self.kind
    }

    /// Nothing that only this file says.
    pub(crate) fn is_harmless(&self) -> bool {
        matches!(self.kind, "index" | "summary" | "lock")
    }

    pub(crate) fn inflict(&self) {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&self.file).unwrap();
        match self.what {
            What::Flip { offset, bit } => {
                let mut byte = [0];
                file.read_exact_at(&mut byte, offset).unwrap();
                file.write_all_at(&[byte[0] ^ 1 << bit], offset).unwrap();
            }
            What::Zero { offset, len } => file.write_all_at(&vec![0; len as usize], offset).unwrap(),
            What::Truncate { len } => file.set_len(len).unwrap(),
            What::Garbage => file.write_all_at(b"x", 0).unwrap(),
        }
    }

    /// The same, to another copy.
    pub(crate) fn at(&self, copy: &Path, other: &Path) -> Self {
        Self { file: other.join(self.file.strip_prefix(copy).unwrap()), ..self.clone() }
    }

    /// Keys of which the log then says no more than after a crash: the damage reaches its last frame.
    pub(crate) fn indistinguishable(&self, frames: &Frames, acknowledged: &Acknowledgements) -> BTreeSet<u64> {
        let (from, to) = match self.what {
            What::Flip { offset, .. } => (offset, offset + 1),
            What::Zero { offset, len } => (offset, offset + len),
            What::Truncate { len } => (len, u64::MAX),
            What::Garbage => return BTreeSet::new(),
        };
        let Some(last) = frames.list.last() else { return BTreeSet::new() };
        if self.file.file_name() != frames.file.file_name() || to <= last.start {
            return BTreeSet::new();
        }
        let hit = frames.list.iter().filter(|frame| frame.end > from);
        let ids: BTreeSet<[u8; 16]> = hit.flat_map(|frame| frame.ids.iter().copied()).collect();
        acknowledged.keys().copied().filter(|&n| ids.contains(&id(n).0)).collect()
    }
}

fn by_size(files: &[PathBuf], random: &mut Random) -> PathBuf {
    use std::os::unix::fs::MetadataExt;
    let sizes: Vec<u64> = files.iter().map(|file| std::fs::metadata(file).unwrap().blocks() + 1).collect();
    let mut at = random.below(sizes.iter().sum());
    for (file, size) in files.iter().zip(sizes) {
        if at < size {
            return file.clone();
        }
        at -= size;
    }
    unreachable!("it is below the sum");
}

fn choose_what(bytes: &[u8], random: &mut Random) -> What {
    let len = bytes.len() as u64;
    if len == 0 {
        return What::Garbage;
    }
    // Seldom where nothing has been written.
    let mut offset = random.below(len);
    for _ in 0..50 {
        let around = (offset as usize).saturating_sub(16)..(offset as usize + 16).min(bytes.len());
        if bytes[around].iter().any(|&byte| byte != 0) {
            break;
        }
        offset = random.below(len);
    }
    match random.below(20) {
        0..=15 => What::Flip { offset, bit: random.below(8) as u32 },
        16 | 17 => {
            let offset = offset / SECTOR * SECTOR;
            What::Zero { offset, len: SECTOR.min(len - offset) }
        }
        18 => {
            let offset = offset / 4096 * 4096;
            What::Zero { offset, len: 4096.min(len - offset) }
        }
        _ => What::Truncate { len: offset },
    }
}

/// The frames of the last segment that has any.
pub(crate) struct Frames {
    file: PathBuf,
    list: Vec<Frame>,
}

struct Frame {
    start: u64,
    end: u64,
    ids: Vec<[u8; 16]>,
}

pub(crate) fn frames(store: &Path) -> Frames {
    let mut segments = files(&store.join("log")).into_iter().filter(|file| kind_of(file) == "segment");
    let file = segments.next_back().unwrap();
    let bytes = std::fs::read(&file).unwrap();
    let mut list = Vec::new();
    let mut at = SEGMENT_HEADER as usize;
    while bytes.get(at..at + 4) == Some(&FRAME_MAGIC[..]) {
        let payload_len = u32::from_le_bytes(bytes[at + 40..at + 44].try_into().unwrap()) as usize;
        let Some(payload) = bytes.get(at + FRAME_HEADER..at + FRAME_HEADER + payload_len) else { break };
        let end = at + FRAME_HEADER + payload_len;
        list.push(Frame { start: at as u64, end: end as u64, ids: ids(payload) });
        at = end;
    }
    let uid = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
    let (valid, _) = oncegate::store::log::scan_bytes(&bytes, uid).unwrap();
    list.retain(|frame| frame.end <= valid);
    assert_eq!(list.last().map(|frame| frame.end), Some(valid), "the frames are not where they should be");
    Frames { file, list }
}

fn ids(payload: &[u8]) -> Vec<[u8; 16]> {
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some(header) = payload.get(at..at + ENTRY_HEADER) {
        found.push(header[8..24].try_into().unwrap());
        let len = u32::from_le_bytes(header[48..52].try_into().unwrap()) as usize;
        at += (ENTRY_HEADER + len).next_multiple_of(8);
    }
    found
}
