//! The process that writes: this test program, started anew. It tells each acknowledgement on its standard output.

use super::{claim, id, open, settled};
use oncegate::store::embedded::{Durability, Embedded, Engine};
use oncegate::store::{Health, Store, StoreError, Swap, Urgency, Version};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

const PATH: &str = "ONCEGATE_TEST_WRITER_PATH";
const ENGINE: &str = "ONCEGATE_TEST_WRITER_ENGINE";
const FIRST: &str = "ONCEGATE_TEST_WRITER_FIRST";
const RELAXED: &str = "ONCEGATE_TEST_WRITER_RELAXED";
const KEYS: &str = "ONCEGATE_TEST_WRITER_KEYS";
const POSITION: &str = "ONCEGATE_TEST_WRITER_POSITION";
const PATIENCE: Duration = Duration::from_secs(60);

/// What is written, and where.
#[derive(Clone, Debug)]
pub(crate) struct Writing {
    pub(crate) path: PathBuf,
    pub(crate) engine: Engine,
    pub(crate) durability: Durability,
    /// The first key; each is used once.
    pub(crate) first: u64,
    /// So many keys, then the store is closed. `None`: until the store fails or the process is killed.
    pub(crate) keys: Option<u64>,
    /// A file that says how far a recorded disk has come: told with each acknowledgement.
    pub(crate) position: Option<PathBuf>,
}

impl Writing {
    /// What this process was started to write, if it was.
    pub(crate) fn of_this_process() -> Option<Self> {
        let text = |name: &str| std::env::var(name).ok();
        Some(Self {
            path: text(PATH)?.into(),
            engine: if text(ENGINE).unwrap() == "Fjall" { Engine::Fjall } else { Engine::Sled },
            durability: if text(RELAXED).is_some() { Durability::Relaxed } else { Durability::Strict },
            first: text(FIRST).unwrap().parse().unwrap(),
            keys: text(KEYS).map(|keys| keys.parse().unwrap()),
            position: text(POSITION).map(PathBuf::from),
        })
    }

    /// Starts a process for it. `test` is one that calls [`Self::of_this_process`] and [`Self::write`].
    pub(crate) fn start(&self, test: &str) -> Writer {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture"]).stdout(Stdio::piped());
        command.env(PATH, &self.path).env(ENGINE, format!("{:?}", self.engine)).env(FIRST, self.first.to_string());
        if self.durability == Durability::Relaxed {
            command.env(RELAXED, "1");
        }
        if let Some(keys) = self.keys {
            command.env(KEYS, keys.to_string());
        }
        if let Some(position) = &self.position {
            command.env(POSITION, position);
        }
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, receiver) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Writer { child, lines: receiver, reader: Some(reader) }
    }

    /// Writes, and tells of it.
    pub(crate) fn write(&self) {
        let store = Arc::new(open(&self.path, self.engine, self.durability).unwrap());
        let (tell, told) = mpsc::channel::<String>();
        let teller = std::thread::spawn(move || {
            let mut out = std::io::stdout().lock();
            for line in told {
                if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
                    return;
                }
            }
        });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let last = match runtime.block_on(self.run(&store, &tell)) {
            None => {
                store.close();
                "closed"
            }
            // The flush has failed: from now on nothing is acknowledged any more.
            Some(error) => {
                assert!(matches!(error, StoreError::Failed { .. }), "{error}");
                assert_eq!(store.status().health, Health::Failed);
                runtime.block_on(async {
                    for n in 0..20 {
                        let id = id(u64::MAX - n);
                        let swap = store.compare_and_swap(id, None, Some(claim(n)), 1, Urgency::Settle).await;
                        assert!(matches!(swap, Err(StoreError::Failed { .. })), "{swap:?}");
                    }
                });
                "poisoned"
            }
        };
        tell.send(last.to_owned()).unwrap();
        drop((runtime, tell));
        teller.join().unwrap();
        std::thread::park();
    }

    /// Until all keys are written, or the store fails.
    async fn run(&self, store: &Arc<Embedded>, tell: &mpsc::Sender<String>) -> Option<StoreError> {
        let next = Arc::new(AtomicU64::new(self.first));
        let end = self.keys.map_or(u64::MAX, |keys| self.first + keys);
        let position = self.position.as_ref().map(|path| Arc::new(std::fs::File::open(path).unwrap()));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..24 {
            let (store, next) = (store.clone(), next.clone());
            let told = Told { tell: tell.clone(), position: position.clone() };
            tasks.spawn(async move {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= end {
                        return None;
                    }
                    if let Err(error) = one(&store, n, &told).await {
                        return Some(error);
                    }
                }
            });
        }
        let (sweeper, clock) = (store.clone(), next);
        let sweeper = tokio::spawn(async move {
            while let Ok(wait) = sweeper.sweep(clock.load(Ordering::Relaxed)).await {
                tokio::time::sleep(wait.min(Duration::from_millis(5))).await;
            }
        });
        while let Some(ended) = tasks.join_next().await {
            if let Some(error) = ended.unwrap() {
                return Some(error);
            }
        }
        sweeper.abort();
        None
    }
}

/// Where acknowledgements go.
struct Told {
    tell: mpsc::Sender<String>,
    position: Option<Arc<std::fs::File>>,
}

impl Told {
    fn send(&self, what: &str, n: u64, version: Version) {
        use std::os::unix::fs::FileExt;
        let mut line = format!("{what} {n} {}", version.0);
        if let Some(position) = &self.position {
            let mut bytes = [0; 8];
            position.read_exact_at(&mut bytes, 0).unwrap();
            line.push_str(&format!(" {}", u64::from_le_bytes(bytes)));
        }
        self.tell.send(line).unwrap();
    }
}

async fn one(store: &Embedded, n: u64, told: &Told) -> Result<(), StoreError> {
    let Swap::Done(version) = store.compare_and_swap(id(n), None, Some(claim(n)), n, Urgency::Claim).await? else {
        panic!("{n} is new");
    };
    told.send("claimed", n, version);
    let Some(new) = settled(n) else { return Ok(()) };
    let what = if new.is_some() { "completed" } else { "removed" };
    let Swap::Done(version) = store.compare_and_swap(id(n), Some(version), new, n, Urgency::Settle).await? else {
        panic!("{n} is ours");
    };
    told.send(what, n, version);
    Ok(())
}

/// A process that writes.
pub(crate) struct Writer {
    child: Child,
    pub(crate) lines: mpsc::Receiver<String>,
    reader: Option<JoinHandle<()>>,
}

impl Writer {
    /// Hands over what it says, up to the first line that `is_last`.
    pub(crate) fn until(&self, mut is_last: impl FnMut(&str) -> bool) -> Vec<String> {
        let mut said = Vec::new();
        loop {
            let line = self.lines.recv_timeout(PATIENCE).expect("the process goes on writing");
            let last = is_last(&line);
            said.push(line);
            if last {
                return said;
            }
        }
    }

    /// Kills it; returns what it had said that has not been taken yet.
    pub(crate) fn kill(mut self) -> Vec<String> {
        self.end();
        self.lines.try_iter().collect()
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.end();
    }
}
