//! Damaged files: bits flip, sectors turn to zeros, files end early, each in a copy of a store that was closed or killed.
//! Opening it is a refusal that says which file is damaged, or every record reads back as it was acknowledged, or as an
//! error: never as another one, an older one, or as absent. Damage in the index does not even cost a record.
//!
//! `ONCEGATE_FLIPS` says how many, with each engine (40); `ONCEGATE_SEED` repeats a run's choices.
//!
//! One kind of damage cannot be told from what a crash leaves: the log's last frame, with nothing behind it, was being
//! written when the process died, or has been damaged since. What it held is left out where it, or all from it on, is hit.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "bit_flips/damage.rs"]
mod damage;
#[path = "bit_flips/judging.rs"]
mod judging;
#[allow(dead_code, reason = "shared with other tests")]
#[path = "audit/random.rs"]
mod random;
#[allow(dead_code, reason = "shared with other tests")]
mod struck;

use damage::Damage;
use judging::{Job, Judge, Judged};
use oncegate::store::embedded::{Durability, Engine};
use random::Random;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use struck::writer::Writing;
use struck::{Acknowledgements, note};

/// Keys that are written before a store is closed or killed.
const KEYS: u64 = 2500;
/// Flips in the copies of one store, before the next one is made.
const FLIPS_PER_STORE: u64 = 100;

#[test]
fn with_sled_no_damage_replays_anything_wrong() {
    // Other processes of this test are this one, started anew.
    if let Some(writing) = Writing::of_this_process() {
        return writing.write();
    }
    if judging::is_judge() {
        return judging::judge_all();
    }
    no_damage_replays_anything_wrong(Engine::Sled);
}

#[test]
fn with_fjall_no_damage_replays_anything_wrong() {
    no_damage_replays_anything_wrong(Engine::Fjall);
}

const FIRST_TEST: &str = "with_sled_no_damage_replays_anything_wrong";

/// A store, and what it had acknowledged.
struct Made {
    path: PathBuf,
    acknowledged: Acknowledgements,
    /// The time by which its records may have expired.
    now: u64,
}

fn make(path: PathBuf, engine: Engine, killed: bool, random: &mut Random) -> Made {
    let keys = (!killed).then_some(KEYS);
    let writing = Writing { path, engine, durability: Durability::Strict, first: 0, keys, position: None };
    let writer = writing.start(FIRST_TEST);
    let mut claims = 0;
    let lines = writer.until(|line| {
        claims += u64::from(line.starts_with("claimed"));
        line == "closed" || killed && claims >= KEYS
    });
    if killed {
        std::thread::sleep(random.ms(0, 100));
    }
    let mut acknowledged = Acknowledgements::new();
    for line in lines.into_iter().chain(writer.kill()) {
        note(&mut acknowledged, &line);
    }
    let now = acknowledged.last_key_value().map_or(0, |(n, _)| *n) + 1000;
    Made { path: writing.path, acknowledged, now }
}

#[derive(Default)]
struct Tally {
    judged: u64,
    refused: u64,
    with_errors: u64,
    panics_of_the_engine: u64,
    /// By kind of file.
    kinds: BTreeMap<&'static str, u64>,
    wrong: Vec<String>,
}

impl Tally {
    fn add(&mut self, seed: u64, damage: &Damage, judged: Judged) {
        self.judged += 1;
        *self.kinds.entry(damage.kind()).or_default() += 1;
        match judged {
            Judged::Refused { .. } if damage.is_harmless() => {
                self.wrong.push(format!("flip {seed}: {damage}: {judged:?}, though no record is in there"));
            }
            Judged::Refused { .. } => self.refused += 1,
            Judged::Sound { errors, engine_panics, .. } => {
                self.with_errors += u64::from(errors > 0);
                self.panics_of_the_engine += engine_panics;
            }
            Judged::Wrong(text) => self.wrong.push(format!("flip {seed}: {damage}: {text}")),
        }
    }
}

fn no_damage_replays_anything_wrong(engine: Engine) {
    let flips: u64 = std::env::var("ONCEGATE_FLIPS").map_or(40, |text| text.parse().expect("ONCEGATE_FLIPS"));
    let seed = std::env::var("ONCEGATE_SEED").map_or_else(
        |_| std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64,
        |text| text.parse().expect("ONCEGATE_SEED"),
    );
    eprintln!("{engine:?}: ONCEGATE_SEED={seed}");
    let mut random = Random(seed);
    let mut tally = Tally::default();
    let mut done = 0;
    while done < flips {
        for killed in [false, true] {
            let count = ((flips - done).min(FLIPS_PER_STORE) / 2).max(1);
            damage_copies(engine, killed, count, &mut random, &mut tally);
            done += count;
        }
    }
    eprintln!(
        "{engine:?}: {} flips, {} refused, {} with errors, {} panics of the engine caught; {:?}",
        tally.judged, tally.refused, tally.with_errors, tally.panics_of_the_engine, tally.kinds
    );
    assert!(tally.wrong.is_empty(), "ONCEGATE_SEED={seed}:\n{}", tally.wrong.join("\n"));
}

fn damage_copies(engine: Engine, killed: bool, count: u64, random: &mut Random, tally: &mut Tally) {
    let dir = tempfile::tempdir().unwrap();
    let made = make(dir.path().join("data"), engine, killed, random);
    let told = dir.path().join("acknowledged");
    std::fs::write(&told, judging::encode(&made.acknowledged)).unwrap();
    let frames = damage::frames(&made.path);
    let mut judge = Judge::start(engine, &told);
    for at in 0..count {
        let mut random = random.fork(at);
        let copy = dir.path().join("copy");
        copy_dir(&made.path, &copy);
        let damage = Damage::choose(&copy, &mut random);
        damage.inflict();
        let job = Job {
            path: copy.clone(),
            survey: random.below(3),
            seed: random.next() >> 1,
            now: made.now,
            uncertain: damage.indistinguishable(&frames, &made.acknowledged),
            heals: damage.is_harmless(),
        };
        let judged = judge.judge(&job);
        let broken = !matches!(judged, Judged::Refused { .. } | Judged::Sound { engine_panics: 0, .. });
        if matches!(judged, Judged::Wrong(_)) {
            eprintln!("{engine:?}, killed: {killed}, flip {at}: {damage}: {judged:?}");
            keep(&made, &copy, &damage);
        }
        tally.add(at, &damage, judged);
        // What a panic leaves behind in an engine's threads must not be taken for damage in the next store.
        if broken {
            judge = Judge::start(engine, &told);
        }
        std::fs::remove_dir_all(&copy).unwrap();
    }
}

/// Keeps a damaged store for who looks for the reason, where `ONCEGATE_KEEP` says.
fn keep(made: &Made, copy: &Path, damage: &Damage) {
    let Some(to) = std::env::var_os("ONCEGATE_KEEP").map(PathBuf::from) else { return };
    let name = (0..).map(|n| to.join(n.to_string())).find(|path| !path.exists()).unwrap();
    let again = name.join("damaged");
    copy_dir(&made.path, &again);
    damage.at(copy, &again).inflict();
    std::fs::write(name.join("acknowledged"), judging::encode(&made.acknowledged)).unwrap();
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        let to = to.join(file.file_name());
        if file.path().is_dir() {
            copy_dir(&file.path(), &to);
        } else {
            copy_file(&std::fs::File::open(file.path()).unwrap(), &to);
        }
    }
}

/// With its holes.
fn copy_file(from: &std::fs::File, to: &Path) {
    use rustix::fs::{SeekFrom, seek};
    use std::os::unix::fs::FileExt;
    let to = std::fs::File::create(to).unwrap();
    let mut at = 0;
    while let Ok(data) = seek(from, SeekFrom::Data(at)) {
        at = seek(from, SeekFrom::Hole(data)).unwrap();
        let mut bytes = vec![0; (at - data) as usize];
        from.read_exact_at(&mut bytes, data).unwrap();
        to.write_all_at(&bytes, data).unwrap();
    }
    to.set_len(from.metadata().unwrap().len()).unwrap();
}
