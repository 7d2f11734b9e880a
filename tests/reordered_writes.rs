//! Power cuts below the file system: ext4 stands on a disk that records writes and flushes. From the record any state is
//! built that a real disk may be in after its power was cut: all that was written before the last flush is there; of what
//! was written since, any part is, sectors of a torn write and later writes without earlier ones included. In each of them
//! the store must open by itself with everything that was acknowledged by then.
//!
//! `ONCEGATE_REORDERS` says how many states, with each engine (12); `ONCEGATE_SEED` repeats a run's choices, though not
//! what was recorded.
//!
//! Needs root, a loop device, ext4 and FUSE. Says so loudly where it has to be skipped.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "reordered_writes/disk.rs"]
mod disk;
#[allow(dead_code, reason = "shared with other tests")]
#[path = "audit/random.rs"]
mod random;
#[allow(dead_code, reason = "shared with other tests")]
mod struck;

use disk::{Recorded, RecordingDisk};
use oncegate::store::Store;
use oncegate::store::embedded::{Durability, Engine};
use random::Random;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use struck::writer::Writing;
use struck::{Acknowledgements, Disk, note, open, run, skip, verify};

const DISK_BYTES: u64 = 64 << 20;
const SECTOR: usize = 512;
/// Keys that are claimed in one recording, and states that are built from it.
const KEYS: usize = 1500;
const STATES_PER_RECORDING: u64 = 50;
const NEEDS: &str = "needs root, a loop device, ext4 and FUSE, to record what is written below a file system";

#[test]
fn with_sled_nothing_acknowledged_is_lost_however_writes_are_reordered() {
    // The process that writes is this one, started anew.
    match Writing::of_this_process() {
        Some(writing) => writing.write(),
        None => nothing_acknowledged_is_lost(Engine::Sled),
    }
}

#[test]
fn with_fjall_nothing_acknowledged_is_lost_however_writes_are_reordered() {
    nothing_acknowledged_is_lost(Engine::Fjall);
}

fn seed() -> u64 {
    std::env::var("ONCEGATE_SEED").map_or_else(
        |_| std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64,
        |text| text.parse().expect("ONCEGATE_SEED"),
    )
}

fn nothing_acknowledged_is_lost(engine: Engine) {
    let states: u64 = std::env::var("ONCEGATE_REORDERS").map_or(12, |text| text.parse().expect("ONCEGATE_REORDERS"));
    let seed = seed();
    eprintln!("{engine:?}: ONCEGATE_SEED={seed}");
    let mut random = Random(seed);
    for done in (0..states).step_by(STATES_PER_RECORDING as usize) {
        let dir = tempfile::tempdir().unwrap();
        let Some(recording) = record(dir.path(), engine) else { return cannot() };
        let states = (states - done).min(STATES_PER_RECORDING);
        let cuts = recording.cuts(states, &mut random);
        let mut built = Built::new(&recording);
        for cut in cuts {
            built.flush_until(cut);
            let state = built.after_a_cut(cut, &mut random);
            check(dir.path(), engine, &recording, &state);
        }
    }
}

/// What a package cannot bring is not asked of continuous integration either: a kernel with FUSE.
fn cannot() {
    if Path::new("/dev/fuse").exists() {
        skip(NEEDS);
    } else {
        eprintln!("SKIPPED: there is no /dev/fuse; {NEEDS}");
    }
}

/// What a disk was told while a store was written, and when what was acknowledged.
struct Recording {
    /// What it held before.
    begin: Vec<u8>,
    recorded: Vec<Recorded>,
    /// Lines of the writing process, each with how much had been recorded by then.
    told: Vec<(usize, String)>,
}

fn record(dir: &Path, engine: Engine) -> Option<Recording> {
    let (image, file, at) = (dir.join("image"), dir.join("recorded"), dir.join("disk"));
    std::fs::File::create(&image).unwrap().set_len(DISK_BYTES).unwrap();
    if !run("mkfs.ext4", &["-q", "-F", "-E", "nodiscard,lazy_itable_init=0", image.to_str().unwrap()]) {
        return None;
    }
    let begin = std::fs::read(&image).unwrap();
    let position = dir.join("position");
    let disk = RecordingDisk::serve(&file, begin.clone(), &position)
        .inspect_err(|error| eprintln!("serving a file over FUSE: {error}"))
        .ok()?;
    std::fs::create_dir(&at).unwrap();
    let mounted = Disk { image: disk.file.clone(), at };
    if !mounted.mount() {
        return None;
    }
    let path = mounted.at.join("data");
    let (keys, position) = (None, Some(position));
    let writing = Writing { path, engine, durability: Durability::Strict, first: 0, keys, position };
    let writer = writing.start("with_sled_nothing_acknowledged_is_lost_however_writes_are_reordered");
    let mut claims = 0;
    let mut lines = writer.until(|line| {
        claims += usize::from(line.starts_with("claimed"));
        claims >= KEYS
    });
    lines.extend(writer.kill());
    let recorded = disk.recorded();
    assert!(mounted.unmount());
    let told = lines.into_iter().filter_map(|line| {
        let (what, position) = line.rsplit_once(' ')?;
        Some((position.parse().ok().filter(|_| what.contains(' '))?, what.to_owned()))
    });
    Some(Recording { begin, recorded, told: told.filter(|(_, what)| what.split(' ').count() == 3).collect() })
}

impl Recording {
    /// Places of the record where the power is cut, in order.
    fn cuts(&self, count: u64, random: &mut Random) -> Vec<usize> {
        let mut cuts: Vec<_> = (0..count).map(|_| 1 + random.below(self.recorded.len() as u64) as usize).collect();
        cuts.sort_unstable();
        cuts
    }

    fn acknowledged_by(&self, cut: usize) -> Acknowledgements {
        let mut acknowledged = Acknowledgements::new();
        // Several tasks tell, so that lines may be out of order; of one key they are in order.
        self.told.iter().filter(|(position, _)| *position <= cut).for_each(|(_, line)| note(&mut acknowledged, line));
        acknowledged
    }
}

/// The disk, as far as it has been built from the record.
struct Built<'a> {
    recording: &'a Recording,
    content: Vec<u8>,
    /// All until there is on the disk for good.
    flushed: usize,
}

/// What a disk held after a cut.
struct State {
    cut: usize,
    content: Vec<u8>,
    /// For whoever looks for the reason.
    text: String,
}

impl<'a> Built<'a> {
    fn new(recording: &'a Recording) -> Self {
        Self { recording, content: recording.begin.clone(), flushed: 0 }
    }

    /// Goes on to the last flush before the cut.
    fn flush_until(&mut self, cut: usize) {
        let flush = self.recording.recorded[..cut].iter().rposition(|what| matches!(what, Recorded::Flush));
        self.go_to(flush.unwrap_or(0).max(self.flushed));
    }

    fn go_to(&mut self, end: usize) {
        for what in &self.recording.recorded[self.flushed..end] {
            if let Recorded::Write { offset, data } = what {
                put(&mut self.content, *offset as usize, data);
            }
        }
        self.flushed = end;
    }

    /// Adds any part, in any order, of what was written since.
    fn after_a_cut(&self, cut: usize, random: &mut Random) -> State {
        let mut content = self.content.clone();
        let mut writes: Vec<(u64, usize, &[u8])> = Vec::new();
        for what in &self.recording.recorded[self.flushed..cut] {
            if let Recorded::Write { offset, data } = what {
                writes.push((random.next(), *offset as usize, data));
            }
        }
        let (all, share) = (writes.len(), [0, 20, 50, 80, 100][random.below(5) as usize]);
        let (shuffled, torn) = (random.percent(50), random.percent(50));
        if shuffled {
            writes.sort_unstable_by_key(|(place, ..)| *place);
        }
        let mut sectors = 0;
        for (_, offset, data) in writes {
            let whole = random.percent(share);
            for (at, sector) in data.chunks(SECTOR).enumerate() {
                if if torn { random.percent(share) } else { whole } {
                    put(&mut content, offset + at * SECTOR, sector);
                    sectors += 1;
                }
            }
        }
        let text =
            format!("of {all} writes after the last flush {sectors} sectors, shuffled: {shuffled}, torn: {torn}");
        State { cut, content, text }
    }
}

fn put(content: &mut [u8], at: usize, data: &[u8]) {
    content[at..at + data.len()].copy_from_slice(data);
}

/// The file system is mounted, the store opens by itself, and all that was acknowledged is there.
fn check(dir: &Path, engine: Engine, recording: &Recording, state: &State) {
    let acknowledged = recording.acknowledged_by(state.cut);
    let found = catch_unwind(AssertUnwindSafe(|| found_in(dir, engine, &acknowledged, state)));
    let (cut, of) = (state.cut, recording.recorded.len());
    match found {
        Ok((present, moved_on)) => eprintln!(
            "{engine:?}, cut at {cut} of {of}, {}: {present} of {} present, {moved_on} had moved on",
            state.text,
            acknowledged.len()
        ),
        Err(panic) => {
            eprintln!("{engine:?}, cut at {cut} of {of}, {}: wrong", state.text);
            std::panic::resume_unwind(panic);
        }
    }
}

fn found_in(dir: &Path, engine: Engine, acknowledged: &Acknowledgements, state: &State) -> (usize, usize) {
    let disk = Disk { image: dir.join("state"), at: dir.join("after") };
    write_sparse(&disk.image, &state.content);
    std::fs::create_dir_all(&disk.at).unwrap();
    assert!(disk.mount(), "the file system is mounted");
    let store = open(&disk.at.join("data"), engine, Durability::Strict).expect("it opens without an operator's hand");
    // Keys that were begun and not acknowledged count as well.
    let now = acknowledged.last_key_value().map_or(0, |(n, _)| *n) + 1000;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let found = runtime.block_on(verify(&store, acknowledged, now));
    store.close();
    drop(store);
    assert!(disk.unmount());
    found
}

/// Writes what is not zero.
fn write_sparse(path: &Path, content: &[u8]) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(content.len() as u64).unwrap();
    for (at, piece) in content.chunks(4096).enumerate() {
        if piece.iter().any(|&byte| byte != 0) {
            file.write_all_at(piece, at as u64 * 4096).unwrap();
        }
    }
}

/// That such a test would notice: a disk that forgets what it was told to flush loses what was acknowledged.
#[test]
fn a_disk_that_lies_about_flushes_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let Some(recording) = record(dir.path(), Engine::Fjall) else { return cannot() };
    let mut random = Random(seed());
    let cut = recording.recorded.len();
    let mut built = Built::new(&recording);
    // Half of all flushes never happened.
    built.go_to(cut / 2);
    let state = State { cut, ..built.after_a_cut(cut / 2, &mut random) };
    let noticed = catch_unwind(AssertUnwindSafe(|| check(dir.path(), Engine::Fjall, &recording, &state)));
    assert!(noticed.is_err(), "it was not noticed");
}
