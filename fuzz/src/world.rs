//! Time, which stands still while anybody works, and a store with faults.

use bytes::Bytes;
use oncegate::config::{self, Config, Flags};
use oncegate::simulation::simulate_clock;
use oncegate::store::memory::Memory;
use oncegate::store::simulated::{Backend, Simulated};
use oncegate::store::{
    Entry, Page, RecordId, Status, Store, StoreError, StoreTime, Swapped, Tag, Urgency, Value, Version, Watch,
};
use std::cell::Cell;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::runtime::Builder;
use tokio::time::Instant;

/// What all clocks show when a run begins, in milliseconds.
const EPOCH: Duration = Duration::from_secs(1_700_000_000);

thread_local! {
    /// How long the lives before this one took, and when it began.
    static BEFORE: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    static BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Since the run began.
pub(crate) fn now() -> Duration {
    BEFORE.get() + BEGAN.get().map_or(Duration::ZERO, |began| Instant::now().saturating_duration_since(began))
}

pub(crate) fn now_ms() -> u64 {
    now().as_millis() as u64
}

fn since_boot() -> Duration {
    EPOCH + now()
}

/// Begins a run.
pub(crate) fn begin() {
    BEFORE.set(Duration::ZERO);
    BEGAN.set(None);
    simulate_clock(since_boot);
}

/// Runs everything until `life` is over; what is still going on then ends in the midst of it.
pub(crate) fn live<T>(life: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let (output, end) = runtime.block_on(async {
        BEGAN.set(Some(Instant::now()));
        let output = life.await;
        (output, now())
    });
    BEFORE.set(end);
    BEGAN.set(None);
    drop(runtime);
    output
}

pub(crate) fn config(text: &str) -> Config {
    config::parse("made-up", text, [], &Flags::default()).unwrap()
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Fault {
    #[default]
    None,
    /// It takes no claims.
    Full,
    /// For good, until the next start.
    Failed,
    /// Out of reach.
    Away,
}

/// A gateway's own store. What it has acknowledged it keeps.
#[derive(Clone)]
pub(crate) struct MadeUpStore {
    memory: Arc<Memory>,
    fault: Arc<Mutex<Fault>>,
}

/// A future of `Memory`, which is ready at once.
fn at_once<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => unreachable!("memory does not wait"),
    }
}

impl MadeUpStore {
    pub(crate) fn new() -> Self {
        let memory = Memory::new();
        at_once(memory.swap_setting("secret", None, &[7; 32])).unwrap();
        Self { memory: Arc::new(memory), fault: Arc::default() }
    }

    pub(crate) fn open(&self) -> Simulated {
        Box::new(self.clone())
    }

    pub(crate) fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    pub(crate) fn claims(&self) -> u64 {
        self.memory.status().entries[usize::from(oncegate::ledger::tags::CLAIMED.0)]
    }

    fn reach(&self, claims: bool) -> Result<(), StoreError> {
        match *self.fault.lock().unwrap() {
            Fault::Full if claims => Err(StoreError::Full { path: "made-up".to_owned(), min_free_bytes: 1 }),
            Fault::None | Fault::Full => Ok(()),
            Fault::Failed => Err(StoreError::Failed { reason: "a flush has failed".to_owned() }),
            Fault::Away => Err(StoreError::Unavailable { reason: "made-up".to_owned(), may_land_until_ms: None }),
        }
    }
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

fn told<'a, T: Send + 'a>(answer: Result<T, StoreError>) -> Answer<'a, T> {
    Box::pin(async move { answer })
}

impl Backend for MadeUpStore {
    fn get(&self, id: RecordId) -> Answer<'_, Option<Entry>> {
        told(self.reach(false).and_then(|()| at_once(self.memory.get(id))))
    }

    fn swap(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> Answer<'_, Swapped> {
        let swap = || at_once(self.memory.compare_and_swap(id, expected, new, now_ms, urgency));
        // A full store compares first: what it holds already it tells.
        let refuses = |found: Option<Entry>| urgency == Urgency::Claim && found.map(|found| found.version) == expected;
        let found = self.reach(false).and_then(|()| at_once(self.memory.get(id)));
        let swap = found.and_then(|found| self.reach(refuses(found))).and_then(|()| swap());
        told(swap.map(|swap| Swapped { swap, may_land_until_ms: None }))
    }

    fn sweep(&self, now_ms: u64) -> Answer<'_, Duration> {
        told(self.reach(false).and_then(|()| at_once(self.memory.sweep(now_ms))))
    }

    fn list(&self, tag: Option<Tag>, after: u64, visit: usize) -> Answer<'_, Page> {
        told(self.reach(false).and_then(|()| at_once(self.memory.list(tag, after, visit))))
    }

    fn setting(&self, name: &str) -> Answer<'_, Option<Bytes>> {
        told(at_once(self.memory.setting(name)))
    }

    fn swap_setting(&self, name: &str, expected: Option<Bytes>, new: Bytes) -> Answer<'_, bool> {
        told(at_once(self.memory.swap_setting(name, expected.as_deref(), &new)))
    }

    fn unexpiring(&self) -> Result<Vec<(RecordId, Entry)>, StoreError> {
        self.memory.unexpiring()
    }

    fn newest_ms(&self) -> u64 {
        self.memory.newest_ms()
    }

    fn time(&self) -> Option<StoreTime> {
        None
    }

    fn watch(&self, _: RecordId) -> Watch {
        Watch::polling()
    }

    fn status(&self) -> Status {
        Status { created: false, ..self.memory.status() }
    }
}
