//! A process that writes to a store until it is struck, and what it had acknowledged: shared by the tests that cut its
//! power, reorder its writes, and damage what it leaves behind.

pub(crate) mod writer;

use bytes::Bytes;
use oncegate::store::embedded::{Durability, Embedded, Engine, OpenError, Options, Tuning};
use oncegate::store::{Entry, RecordId, Store, Tag, Value, Version};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const CLAIMED: Tag = Tag(0);
const COMPLETED: Tag = Tag(1);
/// Operations until a completed record expires.
const RETENTION: u64 = 1500;

/// So small that rotation, indexing and retirement go on all the time.
pub(crate) fn tuning() -> Tuning {
    Tuning {
        segment_bytes_min: 32 << 10,
        segment_bytes_max: 128 << 10,
        index_bulk: 50,
        memtable_bytes: 64 << 10,
        replay_bytes: 256 << 10,
        verify_first_bytes: 0,
        survey_first_max: 0,
        survey_threads: 2,
    }
}

pub(crate) fn open(path: &Path, engine: Engine, durability: Durability) -> Result<Embedded, OpenError> {
    open_tuned(path, engine, durability, tuning())
}

pub(crate) fn open_tuned(
    path: &Path,
    engine: Engine,
    durability: Durability,
    tuning: Tuning,
) -> Result<Embedded, OpenError> {
    let options = Options { path: path.to_owned(), engine, create: true, min_free_bytes: 1 << 20, durability };
    Embedded::open_tuned(&options, tuning)
}

pub(crate) fn id(n: u64) -> RecordId {
    let hash = xxhash_rust::xxh3::xxh3_128(&n.to_le_bytes());
    RecordId(hash.to_le_bytes())
}

pub(crate) fn claim(n: u64) -> Value {
    Value { tag: CLAIMED, expires_at_ms: None, bytes: Bytes::from(format!("claim {n}")) }
}

/// What becomes of a claim: `None` if it stays as it is.
fn settled(n: u64) -> Option<Option<Value>> {
    match n % 10 {
        0 => None,
        1 => Some(None),
        _ => Some(Some(completed(n))),
    }
}

pub(crate) fn completed(n: u64) -> Value {
    let text = format!("completed {n} {}", "r".repeat((n % 700) as usize));
    Value { tag: COMPLETED, expires_at_ms: Some(expires_at_ms(n)), bytes: Bytes::from(text) }
}

/// Some live long.
fn expires_at_ms(n: u64) -> u64 {
    if n % 10 == 2 { u64::MAX / 2 } else { n + RETENTION }
}

/// What was acknowledged of a key last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Acknowledged {
    Claimed(Version),
    Completed(Version),
    Removed(Version),
}

/// By key.
pub(crate) type Acknowledgements = BTreeMap<u64, Acknowledged>;

/// Notes what a line of the writing process says.
pub(crate) fn note(acknowledged: &mut Acknowledgements, line: &str) {
    let mut words = line.split(' ');
    let what = words.next().unwrap();
    let mut number = || words.next().unwrap().parse::<u64>().unwrap();
    match what {
        "claimed" => drop(acknowledged.insert(number(), Acknowledged::Claimed(Version(number())))),
        "completed" => drop(acknowledged.insert(number(), Acknowledged::Completed(Version(number())))),
        "removed" => drop(acknowledged.insert(number(), Acknowledged::Removed(Version(number())))),
        _ => {}
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    AsAcknowledged,
    /// What was written next was not acknowledged any more, but has landed.
    MovedOn,
}

/// Compares what was found under a key with what was acknowledged of it.
///
/// # Errors
/// If that is wrong: another value, an older one, or none.
pub(crate) fn judge(n: u64, what: Acknowledged, found: Option<&Entry>, now: u64) -> Result<Seen, String> {
    let expired = expires_at_ms(n) <= now;
    match (what, found) {
        (Acknowledged::Claimed(version), Some(entry)) if entry.version == version && entry.value == claim(n) => {
            Ok(Seen::AsAcknowledged)
        }
        (Acknowledged::Completed(version), Some(entry)) if entry.version == version && entry.value == completed(n) => {
            Ok(Seen::AsAcknowledged)
        }
        (Acknowledged::Completed(_), None) if expired => Ok(Seen::AsAcknowledged),
        (Acknowledged::Removed(_), None) => Ok(Seen::AsAcknowledged),
        (Acknowledged::Claimed(_), None) if settled(n) == Some(None) => Ok(Seen::MovedOn),
        (Acknowledged::Claimed(_), None) if expired && settled(n).is_some() => Ok(Seen::MovedOn),
        (Acknowledged::Claimed(version), Some(entry))
            if entry.version > version && settled(n).flatten().as_ref() == Some(&entry.value) =>
        {
            Ok(Seen::MovedOn)
        }
        _ => Err(format!("key {n}: {what:?} was acknowledged, {found:?} was found")),
    }
}

/// All that was acknowledged is there, unless it has expired. Returns how many keys are as acknowledged, and how many have
/// moved on.
pub(crate) async fn verify(store: &Embedded, acknowledged: &Acknowledgements, now: u64) -> (usize, usize) {
    let (mut present, mut moved_on, mut wrong) = (0, 0, Vec::new());
    for (&n, &what) in acknowledged {
        let found = store.get(id(n)).await.unwrap();
        match judge(n, what, found.as_ref(), now) {
            Ok(Seen::AsAcknowledged) => present += usize::from(found.is_some()),
            Ok(Seen::MovedOn) => moved_on += 1,
            Err(text) => wrong.push(text),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    (present, moved_on)
}

pub(crate) fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
    assert!(std::env::var("ONCEGATE_REQUIRE_ALL").as_deref() != Ok("1"), "skipped, but ONCEGATE_REQUIRE_ALL=1: {why}");
}

pub(crate) fn run(program: &str, args: &[&str]) -> bool {
    match Command::new(program).args(args).output() {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            eprintln!("{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
            false
        }
        Err(error) => {
            eprintln!("{program}: {error}");
            false
        }
    }
}

/// An ext4 file system in a file, mounted while it lives.
pub(crate) struct Disk {
    pub(crate) image: PathBuf,
    pub(crate) at: PathBuf,
}

impl Disk {
    pub(crate) fn new(dir: &Path) -> Option<Self> {
        let disk = Self { image: dir.join("image"), at: dir.join("disk") };
        std::fs::create_dir(&disk.at).unwrap();
        std::fs::File::create(&disk.image).unwrap().set_len(128 << 20).unwrap();
        let made = run("mkfs.ext4", &["-q", "-F", disk.image.to_str().unwrap()]);
        (made && disk.mount()).then_some(disk)
    }

    pub(crate) fn mount(&self) -> bool {
        run("mount", &["-t", "ext4", "-o", "loop", self.image.to_str().unwrap(), self.at.to_str().unwrap()])
    }

    pub(crate) fn unmount(&self) -> bool {
        run("umount", &[self.at.to_str().unwrap()])
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).stderr(Stdio::null()).status();
    }
}
