//! The stores of the simulation: one that gateways share over a network, and one of a single gateway's own, with a disk.
//! What they hold is a `Memory`; how writes get there, and what is told of it, is made up here.

use crate::audit::random::Random;
use crate::world::now;
use bytes::Bytes;
use oncegate::store::memory::Memory;
use oncegate::store::shared::Watches;
use oncegate::store::simulated::{Backend, Simulated};
use oncegate::store::{
    Entry, Health, Page, RecordId, Status, Store, StoreError, StoreTime, Swap, Swapped, Tag, Urgency, Value, Version,
    Watch,
};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// For one operation, second tries included.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(400);
/// The store's clock when the simulation begins.
const EPOCH_MS: u64 = 1_700_000_000_000;

/// How much goes wrong.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Of operations, in percent: an answer is lost, or late.
    pub(crate) lossy: u64,
    /// Of writes, in percent: who has sent it is struck when it lands, before he hears of it.
    pub(crate) strikes: u64,
    /// Whether the store drops what has expired by itself.
    pub(crate) expires: bool,
    /// A gateway's own store, on a disk.
    pub(crate) single: bool,
}

#[derive(Clone, Debug)]
enum Request {
    Get(RecordId),
    Swap { id: RecordId, expected: Option<Version>, new: Option<Value>, now_ms: u64 },
    List { tag: Option<Tag>, after: u64, visit: usize },
    Sweep(u64),
}

#[derive(Debug)]
enum Reply {
    Entry(Option<Entry>),
    Swap(Swap),
    Page(Page),
    Pause(Duration),
}

/// A reply, and the store's time when it was made.
type Told = (Result<Reply, StoreError>, u64);

enum Act {
    /// A copy of a request gets there. It counts until `deadline_ms` of the store's clock.
    Land {
        /// The gateway that has sent it.
        from: usize,
        request: Request,
        deadline_ms: u64,
        answer: Option<(Duration, oneshot::Sender<Told>)>,
    },
    Answer(oneshot::Sender<Told>, Told),
    /// Word of a change, to a gateway.
    Word(usize, RecordId),
}

struct Inner {
    memory: Memory,
    random: Random,
    faults: Faults,
    /// In the order in which they happen.
    acts: BTreeMap<(Duration, u64), Act>,
    count: u64,
    /// Out of everybody's reach, and of each gateway's.
    down_until: Duration,
    cut_until: Vec<Duration>,
    clock_ms: i64,
    watches: Vec<Option<Arc<Watches>>>,
    /// A disk: its last write lands then.
    last_land: Duration,
    /// A disk: it takes no claims, or has failed for good.
    full: bool,
    failed: bool,
    /// Gateways that are to be struck now.
    struck: Vec<usize>,
}

#[derive(Clone)]
pub(crate) struct World(Arc<Mutex<Inner>>);

/// A future of `Memory`, which is ready at once.
fn at_once<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => unreachable!("memory does not wait"),
    }
}

impl Inner {
    fn store_ms(&self) -> u64 {
        (EPOCH_MS + now().as_millis() as u64).saturating_add_signed(self.clock_ms)
    }

    fn strikes(&mut self) -> bool {
        let percent = self.faults.strikes;
        self.random.percent(percent)
    }

    fn at(&mut self, at: Duration, act: Act) {
        self.count += 1;
        self.acts.insert((at, self.count), act);
    }

    fn perform(&mut self, request: Request) -> Result<Reply, StoreError> {
        let now_ms = self.store_ms();
        if self.faults.expires && !self.faults.single {
            at_once(self.memory.sweep(now_ms))?;
        }
        Ok(match request {
            Request::Get(id) => Reply::Entry(at_once(self.memory.get(id))?),
            Request::List { tag, after, visit } => Reply::Page(at_once(self.memory.list(tag, after, visit))?),
            Request::Sweep(at) => {
                Reply::Pause(at_once(self.memory.sweep(if self.faults.single { at } else { now_ms }))?)
            }
            Request::Swap { id, expected, new, now_ms } => {
                let wanted = new.clone();
                let swap = at_once(self.memory.compare_and_swap(id, expected, new, now_ms, Urgency::Claim))?;
                let swap = match swap {
                    // An earlier copy of this very write has landed: its bytes bear its token.
                    Swap::Conflict(Some(entry)) if !self.faults.single && Some(&entry.value) == wanted.as_ref() => {
                        Swap::Done(entry.version)
                    }
                    swap => swap,
                };
                if matches!(swap, Swap::Done(_)) && !self.faults.single {
                    for gateway in 0..self.watches.len() {
                        if !self.random.percent(self.faults.lossy) {
                            let at = now() + self.random.ms(1, 8);
                            self.at(at, Act::Word(gateway, id));
                        }
                    }
                }
                Reply::Swap(swap)
            }
        })
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Word(gateway, id) => {
                if let Some(Some(watches)) = self.watches.get(gateway) {
                    watches.wake(id);
                }
            }
            Act::Answer(to, told) => drop(to.send(told)),
            Act::Land { from, request, deadline_ms, answer } => {
                if matches!(request, Request::Swap { .. }) && self.strikes() {
                    self.struck.push(from);
                }
                let told = if self.failed {
                    Err(StoreError::Failed { reason: "a flush has failed".to_owned() })
                } else if self.store_ms() > deadline_ms {
                    // Too late to count; but it tells the time.
                    Err(unavailable(None))
                } else {
                    self.perform(request)
                };
                if let Some((at, to)) = answer {
                    let told = (told, self.store_ms());
                    self.at(at.max(now()), Act::Answer(to, told));
                }
            }
        }
    }
}

impl World {
    pub(crate) fn new(random: Random, faults: Faults, gateways: usize) -> Self {
        let memory = Memory::new();
        at_once(memory.swap_setting("secret", None, &[7; 32])).unwrap();
        Self(Arc::new(Mutex::new(Inner {
            memory,
            random,
            faults,
            acts: BTreeMap::new(),
            count: 0,
            down_until: Duration::ZERO,
            cut_until: vec![Duration::ZERO; gateways],
            clock_ms: 0,
            watches: vec![None; gateways],
            last_land: Duration::ZERO,
            full: false,
            failed: false,
            struck: Vec::new(),
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what is due.
    pub(crate) fn step(&self) {
        let mut inner = self.inner();
        while let Some(first) = inner.acts.first_entry().filter(|first| first.key().0 <= now()) {
            let act = first.remove();
            inner.act(act);
        }
    }

    /// The store as a gateway that starts finds it.
    pub(crate) fn open(&self, gateway: usize) -> Simulated {
        let mut inner = self.inner();
        let shared = if inner.faults.single {
            inner.failed = false;
            None
        } else {
            let (watches, _) = Watches::new();
            inner.watches[gateway] = Some(Arc::clone(&watches));
            Some((StoreTime::new(inner.store_ms()), watches))
        };
        Box::new(Seen { world: self.clone(), gateway, shared })
    }

    /// Gateways whose write has just landed, and that are to be struck for it.
    pub(crate) fn struck(&self) -> Vec<usize> {
        std::mem::take(&mut self.inner().struck)
    }

    pub(crate) fn outage(&self, until: Duration) {
        self.inner().down_until = until;
    }

    pub(crate) fn cut(&self, gateway: usize, until: Duration) {
        self.inner().cut_until[gateway] = until;
    }

    /// Its clock is set, to so much before or after the true time.
    pub(crate) fn set_clock(&self, ms: i64) {
        self.inner().clock_ms = ms;
    }

    pub(crate) fn set_full(&self, full: bool) {
        self.inner().full = full;
    }

    /// A flush fails: what was on its way may have landed, in its order, up to somewhere.
    pub(crate) fn fail(&self) {
        self.crash();
        self.inner().failed = true;
    }

    /// The gateway whose store this is dies: as above, and nobody hears the answers.
    pub(crate) fn crash(&self) {
        let mut inner = self.inner();
        let acts = std::mem::take(&mut inner.acts);
        let landings = acts.values().filter(|act| matches!(act, Act::Land { .. })).count() as u64;
        let mut landing = inner.random.below(landings + 1);
        for act in acts.into_values() {
            if let Act::Land { request, .. } = act
                && landing > 0
            {
                landing -= 1;
                let _ = inner.perform(request);
            }
        }
    }

    /// No faults from now on.
    pub(crate) fn calm(&self) {
        let mut inner = self.inner();
        (inner.faults.lossy, inner.faults.strikes, inner.full) = (0, 0, false);
        (inner.down_until, inner.failed) = (Duration::ZERO, false);
        inner.cut_until.fill(Duration::ZERO);
    }

    /// Whether it would have to be opened anew.
    pub(crate) fn has_failed(&self) -> bool {
        self.inner().failed
    }

    /// What is unknown.
    pub(crate) fn unknown(&self) -> Vec<(RecordId, Entry)> {
        at_once(self.inner().memory.list(Some(oncegate::ledger::tags::UNKNOWN), 0, usize::MAX)).unwrap().entries
    }

    /// Entries of a tag.
    pub(crate) fn count(&self, tag: Tag) -> u64 {
        self.inner().memory.status().entries[usize::from(tag.0)]
    }
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

fn unavailable(may_land_until_ms: Option<u64>) -> StoreError {
    StoreError::Unavailable { reason: "simulated".to_owned(), may_land_until_ms }
}

/// The store as a gateway sees it.
struct Seen {
    world: World,
    gateway: usize,
    /// `None`: it is the gateway's own. Acknowledged is durable then, in order; what is not may be either after a crash.
    shared: Option<(StoreTime, Arc<Watches>)>,
}

/// Sent.
struct Sent {
    answer: oneshot::Receiver<Told>,
    deadline_ms: u64,
    copies: bool,
}

impl Seen {
    /// A reply, and until when another copy of what was sent may land.
    async fn ask(&self, request: Request, urgency: Urgency) -> Result<(Reply, Option<u64>), StoreError> {
        match &self.shared {
            Some((time, _)) => self.ask_over_network(time, request).await,
            None => Ok((self.ask_disk(request, urgency).await?, None)),
        }
    }

    fn send(&self, time: &StoreTime, request: Request) -> Result<Sent, StoreError> {
        let mut inner = self.world.inner();
        if now() < inner.down_until.max(inner.cut_until[self.gateway]) {
            return Err(unavailable(None));
        }
        // Counted by the gateway's idea of the store's clock, which is never ahead.
        let deadline_ms = time.now_ms() + TIMEOUT.as_millis() as u64;
        let (to, answer) = oneshot::channel();
        let (land, reply) = (now() + inner.random.ms(0, 5), inner.random.ms(0, 5));
        let percent = inner.faults.lossy;
        let lossy = inner.random.percent(percent);
        let (mut copies, from) = (false, self.gateway);
        if !lossy {
            inner.at(land, Act::Land { from, request, deadline_ms, answer: Some((land + reply, to)) });
        } else {
            match inner.random.below(4) {
                // Never gets there.
                0 => return Err(unavailable(None)),
                // Lands, perhaps late, and its answer is lost.
                1 => {
                    let land = now() + inner.random.ms(0, 600);
                    inner.at(land, Act::Land { from, request, deadline_ms, answer: None });
                }
                // Late.
                2 => {
                    let (land, reply) = (now() + inner.random.ms(0, 500), inner.random.ms(0, 300));
                    inner.at(land, Act::Land { from, request, deadline_ms, answer: Some((land + reply, to)) });
                }
                // The connection is lost; it is sent once more, and either may be first.
                _ => {
                    copies = true;
                    let earlier = now() + inner.random.ms(0, 600);
                    inner.at(earlier, Act::Land { from, request: request.clone(), deadline_ms, answer: None });
                    let land = now() + inner.random.ms(10, 200);
                    inner.at(land, Act::Land { from, request, deadline_ms, answer: Some((land + reply, to)) });
                }
            }
        }
        Ok(Sent { answer, deadline_ms, copies })
    }

    async fn ask_over_network(&self, time: &StoreTime, request: Request) -> Result<(Reply, Option<u64>), StoreError> {
        let creates = matches!(request, Request::Swap { expected: None, new: Some(_), .. });
        let writes = matches!(request, Request::Swap { .. });
        let Sent { answer, deadline_ms, copies } = self.send(time, request)?;
        let Ok(Ok((told, store_ms))) = timeout(TIMEOUT, answer).await else {
            return Err(unavailable(writes.then_some(deadline_ms)));
        };
        time.told(store_ms);
        // What comes too late may not be the only copy.
        let told = told.map_err(|error| match error {
            StoreError::Unavailable { .. } if copies => unavailable(Some(deadline_ms)),
            error => error,
        });
        Ok((told?, (copies && creates).then_some(deadline_ms)))
    }

    async fn ask_disk(&self, request: Request, urgency: Urgency) -> Result<Reply, StoreError> {
        let answer = {
            let mut inner = self.world.inner();
            if inner.failed {
                return Err(StoreError::Failed { reason: "a flush has failed".to_owned() });
            }
            if inner.full && urgency == Urgency::Claim && matches!(request, Request::Swap { .. }) {
                return Err(StoreError::Full { path: "simulated".to_owned(), min_free_bytes: 1 });
            }
            let (to, answer) = oneshot::channel();
            if let Request::Swap { .. } = request {
                // A group commit: in order.
                let land = (now() + inner.random.ms(1, 8)).max(inner.last_land);
                inner.last_land = land;
                inner.at(
                    land,
                    Act::Land { from: self.gateway, request, deadline_ms: u64::MAX, answer: Some((land, to)) },
                );
            } else {
                let told = (inner.perform(request), 0);
                let _ = to.send(told);
            }
            answer
        };
        match answer.await {
            Ok((told, _)) => told,
            Err(_) => Err(StoreError::Failed { reason: "a flush has failed".to_owned() }),
        }
    }
}

impl Backend for Seen {
    fn get(&self, id: RecordId) -> Answer<'_, Option<Entry>> {
        Box::pin(async move {
            let (Reply::Entry(entry), _) = self.ask(Request::Get(id), Urgency::Settle).await? else { unreachable!() };
            Ok(entry)
        })
    }

    fn swap(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> Answer<'_, Swapped> {
        Box::pin(async move {
            let request = Request::Swap { id, expected, new, now_ms };
            let (Reply::Swap(swap), may_land_until_ms) = self.ask(request, urgency).await? else { unreachable!() };
            Ok(Swapped { swap, may_land_until_ms })
        })
    }

    fn sweep(&self, now_ms: u64) -> Answer<'_, Duration> {
        Box::pin(async move {
            let (Reply::Pause(pause), _) = self.ask(Request::Sweep(now_ms), Urgency::Settle).await? else {
                unreachable!()
            };
            Ok(pause)
        })
    }

    fn list(&self, tag: Option<Tag>, after: u64, visit: usize) -> Answer<'_, Page> {
        Box::pin(async move {
            let request = Request::List { tag, after, visit };
            let (Reply::Page(page), _) = self.ask(request, Urgency::Settle).await? else { unreachable!() };
            Ok(page)
        })
    }

    fn setting(&self, name: &str) -> Answer<'_, Option<Bytes>> {
        let setting = at_once(self.world.inner().memory.setting(name));
        Box::pin(async move { setting })
    }

    fn swap_setting(&self, name: &str, expected: Option<Bytes>, new: Bytes) -> Answer<'_, bool> {
        let swapped = at_once(self.world.inner().memory.swap_setting(name, expected.as_deref(), &new));
        Box::pin(async move { swapped })
    }

    /// What is in a shared store is others' too.
    fn unexpiring(&self) -> Result<Vec<(RecordId, Entry)>, StoreError> {
        if self.shared.is_some() { Ok(Vec::new()) } else { self.world.inner().memory.unexpiring() }
    }

    fn newest_ms(&self) -> u64 {
        self.world.inner().memory.newest_ms()
    }

    fn time(&self) -> Option<StoreTime> {
        self.shared.as_ref().map(|(time, _)| time.clone())
    }

    fn watch(&self, id: RecordId) -> Watch {
        self.shared.as_ref().map_or_else(Watch::polling, |(_, watches)| watches.watch(id))
    }

    fn status(&self) -> Status {
        let inner = self.world.inner();
        let health = match (inner.failed, inner.full) {
            (true, _) => Health::Failed,
            (_, true) => Health::Full,
            _ => Health::Ok,
        };
        Status { health, created: false, ..inner.memory.status() }
    }
}
