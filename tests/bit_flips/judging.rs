//! The judge: a process that opens damaged stores and compares all that they say with what was acknowledged. It may die or
//! hang, and is then replaced.

use crate::random::Random;
use crate::struck::{Acknowledged, Acknowledgements, Seen, claim, completed, id, judge, note, open_tuned, tuning};
use oncegate::store::embedded::{Durability, Embedded, Engine, Tuning};
use oncegate::store::{Store, StoreError, Swap, Urgency};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::panic::PanicHookInfo;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

const TOLD: &str = "ONCEGATE_TEST_JUDGE_TOLD";
const ENGINE: &str = "ONCEGATE_TEST_JUDGE_ENGINE";
const ANSWER: &str = "judged:";
/// A store that has not been judged by then hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// Of address space: an engine that believes a damaged length must not take the machine down.
const MEMORY_MAX: u64 = 6 << 30;

/// A store to be judged.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) path: PathBuf,
    /// How its index is walked through: only where it is asked, meanwhile, or before the store is open.
    pub(crate) survey: u64,
    pub(crate) seed: u64,
    pub(crate) now: u64,
    /// Keys of which nothing is expected.
    pub(crate) uncertain: BTreeSet<u64>,
    /// Whether all records must be readable again at the latest after some starts.
    pub(crate) heals: bool,
}

impl Job {
    fn encode(&self) -> String {
        let uncertain: Vec<_> = self.uncertain.iter().map(u64::to_string).collect();
        let Self { path, survey, seed, now, heals, .. } = self;
        format!("{survey} {seed} {now} {heals} {} {}", uncertain.join(","), path.display())
    }

    fn decode(line: &str) -> Self {
        let mut words = line.splitn(6, ' ');
        let mut word = || words.next().unwrap();
        Self {
            survey: word().parse().unwrap(),
            seed: word().parse().unwrap(),
            now: word().parse().unwrap(),
            heals: word().parse().unwrap(),
            uncertain: word().split(',').filter_map(|n| n.parse().ok()).collect(),
            path: word().into(),
        }
    }

    fn tuning(&self, start: u64) -> Tuning {
        match (self.survey + start) % 3 {
            0 => Tuning { survey_threads: 0, ..tuning() },
            1 => tuning(),
            _ => Tuning { verify_first_bytes: u64::MAX, survey_first_max: u64::MAX, ..tuning() },
        }
    }
}

#[derive(Debug)]
pub(crate) enum Judged {
    Refused {
        _why: String,
    },
    Sound {
        /// Records that could not be read.
        errors: u64,
        engine_panics: u64,
        _first_error: String,
    },
    Wrong(String),
}

pub(crate) fn encode(acknowledged: &Acknowledgements) -> String {
    let line = |(n, what): (&u64, &Acknowledged)| match what {
        Acknowledged::Claimed(version) => format!("claimed {n} {}\n", version.0),
        Acknowledged::Completed(version) => format!("completed {n} {}\n", version.0),
        Acknowledged::Removed(version) => format!("removed {n} {}\n", version.0),
    };
    acknowledged.iter().map(line).collect()
}

/// The judge, seen from the test.
pub(crate) struct Judge {
    child: Child,
    answers: mpsc::Receiver<String>,
}

impl Judge {
    pub(crate) fn start(engine: Engine, told: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", crate::FIRST_TEST, "--nocapture"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.env(TOLD, told).env(ENGINE, format!("{engine:?}")).env("RUST_BACKTRACE", "0");
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, answers) = mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some(answer) = line.strip_prefix(ANSWER)
                    && sender.send(answer.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        Self { child, answers }
    }

    pub(crate) fn judge(&mut self, job: &Job) -> Judged {
        let sent = writeln!(self.child.stdin.as_mut().unwrap(), "{}", job.encode());
        match sent.map_err(|_| mpsc::RecvTimeoutError::Disconnected).and_then(|()| self.answers.recv_timeout(PATIENCE))
        {
            Ok(answer) => decode(&answer),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                Judged::Wrong(format!("it hangs, or is not done within {PATIENCE:?}{}", self.stacks()))
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                Judged::Wrong(format!("the process has died: {:?}", self.child.wait()))
            }
        }
    }

    /// Which of its threads work or wait, as far as that is easily known.
    fn stacks(&self) -> String {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).into_iter().flatten().flatten();
        let text = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        let state = |stat: String| stat.rsplit(')').next().unwrap_or_default().trim().chars().next().unwrap_or('?');
        let tasks = tasks.map(|task| {
            format!(" {}:{}", text(task.path().join("comm")).trim(), state(text(task.path().join("stat"))))
        });
        tasks.collect()
    }
}

impl Drop for Judge {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn decode(answer: &str) -> Judged {
    let (what, rest) = answer.split_once(' ').unwrap();
    match what {
        "refused" => Judged::Refused { _why: rest.to_owned() },
        "sound" => {
            let mut words = rest.splitn(3, ' ');
            let mut number = || words.next().unwrap().parse().unwrap();
            let (errors, engine_panics) = (number(), number());
            Judged::Sound { errors, engine_panics, _first_error: words.next().unwrap_or_default().to_owned() }
        }
        _ => Judged::Wrong(rest.to_owned()),
    }
}

pub(crate) fn is_judge() -> bool {
    std::env::var_os(TOLD).is_some()
}

/// Of the engines' own panics, which the store catches, and of all others.
static ENGINE_PANICS: AtomicU64 = AtomicU64::new(0);
static OTHER_PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn count_panic(info: &PanicHookInfo<'_>) {
    let file = info.location().map_or("", |location| location.file());
    let engines = ["/sled-", "/fjall-", "/lsm-tree-", "/value-log-", "sled::", "fjall::", "lsm_tree::"];
    let is_engine = |text: &str| engines.iter().any(|engine| text.contains(engine));
    // What std's own code panics about is the doing of who called it.
    let ours = file.starts_with("src/") || file.starts_with("tests/");
    let engine = is_engine(file) || !ours && is_engine(&std::backtrace::Backtrace::force_capture().to_string());
    if engine {
        ENGINE_PANICS.fetch_add(1, Ordering::Relaxed);
    } else {
        OTHER_PANICS.lock().unwrap().push(info.to_string().replace('\n', " "));
    }
}

/// What the judge does: a line in, a line out.
pub(crate) fn judge_all() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    setrlimit(Resource::As, Rlimit { current: Some(MEMORY_MAX), maximum: Some(MEMORY_MAX) }).unwrap();
    std::panic::set_hook(Box::new(count_panic));
    let engine = if std::env::var(ENGINE).unwrap() == "Fjall" { Engine::Fjall } else { Engine::Sled };
    let mut acknowledged = Acknowledgements::new();
    let told = std::fs::read_to_string(std::env::var(TOLD).unwrap()).unwrap();
    told.lines().for_each(|line| note(&mut acknowledged, line));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for line in std::io::stdin().lines() {
        let job = Job::decode(&line.unwrap());
        ENGINE_PANICS.store(0, Ordering::Relaxed);
        let mut answer = runtime.block_on(judge_one(&job, engine, &acknowledged));
        let others = std::mem::take(&mut *OTHER_PANICS.lock().unwrap());
        if !others.is_empty() {
            answer = format!("wrong panics: {}", others.join("; "));
        }
        println!("\n{ANSWER}{}", answer.replace('\n', " / "));
    }
}

/// Opens the store some times, the last ones after it has been written to again.
async fn judge_one(job: &Job, engine: Engine, acknowledged: &Acknowledgements) -> String {
    let mut acknowledged = acknowledged.clone();
    let mut now = job.now;
    acknowledged.retain(|n, _| !job.uncertain.contains(n));
    let mut random = Random(job.seed);
    let (mut errors, mut first_error) = (0, String::new());
    for start in 0..4 {
        let store = match open_tuned(&job.path, engine, Durability::Strict, job.tuning(start)) {
            Ok(store) => store,
            Err(error) => {
                let (path, error) = (job.path.to_str().unwrap(), error.to_string());
                return match error.contains(path) {
                    true => format!("refused start {start}: {error}"),
                    false => format!("wrong start {start}: a refusal that names no file: {error}"),
                };
            }
        };
        let mut reading = Reading { now, errors: 0, first_error: String::new() };
        // All of them once, then some.
        let percent = if start == 0 { 100 } else { 25 };
        let mut result = reading.some(percent, &store, &acknowledged, &mut random).await;
        if result.is_ok() && random.percent(30) {
            go_on(&store, &mut acknowledged, &mut now).await;
            reading.now = now;
            result = reading.some(25, &store, &acknowledged, &mut random).await;
        }
        store.close();
        drop(store);
        let_go(&job.path);
        if let Err(wrong) = result {
            return format!("wrong start {start}: {wrong}");
        }
        if start == 3 && job.heals && reading.errors > 0 {
            return format!("wrong start {start}: still {} errors: {}", reading.errors, reading.first_error);
        }
        errors += reading.errors;
        if first_error.is_empty() {
            first_error = reading.first_error;
        }
        if reading.errors == 0 && start > 0 {
            break;
        }
    }
    format!("sound {errors} {} {first_error}", ENGINE_PANICS.load(Ordering::Relaxed))
}

/// Waits until sled's threads have let go of its file: to whoever opens it before, it is an index to be made anew. One that
/// has panicked may never do so.
fn let_go(path: &Path) {
    let Ok(file) = std::fs::File::open(path.join("index/db")) else { return };
    for _ in 0..100 {
        if file.try_lock().is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

struct Reading {
    now: u64,
    errors: u64,
    first_error: String,
}

impl Reading {
    /// Asks for so many of the keys, in any order, with a read or an attempt to claim it.
    async fn some(
        &mut self,
        percent: u64,
        store: &Embedded,
        acknowledged: &Acknowledgements,
        random: &mut Random,
    ) -> Result<(), String> {
        let mut order = Vec::new();
        for (n, what) in acknowledged {
            if random.percent(percent) {
                order.push((random.next(), *n, *what));
            }
        }
        order.sort_unstable_by_key(|(place, ..)| *place);
        for (_, n, what) in order {
            // What may be absent may be claimed, too.
            let there = n % 10 == 0 || n % 10 == 2 && matches!(what, Acknowledged::Completed(_));
            let found = if there && random.percent(30) {
                match store.compare_and_swap(id(n), None, Some(claim(n)), self.now, Urgency::Claim).await {
                    Ok(Swap::Conflict(found)) => Ok(found),
                    Ok(Swap::Done(_)) => {
                        return Err(format!("key {n}: {what:?} was acknowledged; it was claimed again"));
                    }
                    Err(error) => Err(error),
                }
            } else {
                store.get(id(n)).await
            };
            match found {
                Ok(found) => drop::<Seen>(judge(n, what, found.as_ref(), self.now)?),
                Err(StoreError::Damaged { .. } | StoreError::Failed { .. }) if self.errors > 0 => self.errors += 1,
                Err(error @ (StoreError::Damaged { .. } | StoreError::Failed { .. })) => {
                    self.errors = 1;
                    self.first_error = error.to_string();
                }
                Err(other) => return Err(format!("key {n}: {other}")),
            }
        }
        Ok(())
    }
}

/// Writes more, sweeps, and so has the index changed; whatever goes wrong is told to whoever reads.
async fn go_on(store: &Embedded, acknowledged: &mut Acknowledgements, now: &mut u64) {
    for n in *now..*now + 25 {
        let claimed = store.compare_and_swap(id(n), None, Some(claim(n)), n, Urgency::Claim).await;
        let Ok(Swap::Done(version)) = claimed else { continue };
        let settled = store.compare_and_swap(id(n), Some(version), Some(completed(n)), n, Urgency::Settle).await;
        match settled {
            Ok(Swap::Done(version)) => drop(acknowledged.insert(n, Acknowledged::Completed(version))),
            // Nobody knows what became of it.
            _ => drop(acknowledged.remove(&n)),
        }
    }
    *now += 25;
    for _ in 0..40 {
        match store.sweep(*now).await {
            Ok(wait) if wait < Duration::from_millis(500) => {}
            _ => break,
        }
    }
}
