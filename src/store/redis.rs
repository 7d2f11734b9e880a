//! A store in Redis (6.2 or later; Valkey), shared by several gateways.
//!
//! One operation is one round trip: `GET`, or a script that compares and writes. What all requests ask at a time goes out
//! in one write (`link`). Entries expire by Redis itself, at the very time they name.
//!
//! What is acknowledged is as safe as the server makes it. Without an append-only file a restart forgets all, or all since
//! the last snapshot; with `appendfsync everysec` a power cut may take the last two seconds. With `always`, and
//! `no-appendfsync-on-rewrite no` (else a rewrite of the file suspends it), nothing that was acknowledged is lost with the
//! server: that is what `strict` asks for. A failover is another matter: replicas lag, and whatever the new master has not got
//! is gone, however safe it was on the old one's disk. `wait_replicas` acknowledges only what so many replicas have, and
//! then it depends on one of these being promoted. A master that restarts empty, before anybody has noticed, empties its
//! replicas too: it should not restart by itself without an append-only file.

mod cluster;
mod dial;
mod layout;
mod link;
mod listing;
mod resp;
mod tls;
mod trust;
mod upkeep;
mod url;
mod word;

use self::url::{Mode, Target};
use super::shared::{OpenError, Options, Watches};
use super::{
    Entry, Health, OLDEST_TRACKED, Page, RecordId, Status, Store, StoreError, StoreTime, Swap, Swapped, Tag, Urgency,
    Value, Version, Watch,
};
use bytes::Bytes;
use cluster::Cluster;
use dial::{Common, DialError, Dialer, Place};
use layout::{FORMAT, LATE, Layout, Listed, OTHER, Request};
use link::{Answer, Driver, Lost, Op, Parts, Stats, Way};
use resp::{Output, Reply};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use upkeep::Survey;

/// The store. Its tasks run on the runtime that has opened it.
pub struct Redis {
    core: Arc<Core>,
    watches: Arc<Watches>,
    created: bool,
    tasks: Mutex<Vec<AbortHandle>>,
}

/// What operations need.
struct Core {
    common: Arc<Common>,
    way: Way,
    time: StoreTime,
    stats: Arc<Stats>,
    survey: Mutex<Survey>,
    closed: AtomicBool,
}

impl Redis {
    /// Connects, looks whether the server may be trusted as `options` ask, and starts the store's tasks.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(options: &Options) -> Result<Self, OpenError> {
        if options.prefix.is_empty() || options.prefix.contains(|c: char| c == '{' || c == '}' || c.is_control()) {
            let reason = "is empty, or has a brace or a control character in it".to_owned();
            return Err(OpenError::Options { key: "prefix", reason });
        }
        let is_cluster = Target::parse(options)?.mode == Mode::Cluster;
        let layout = Layout::new(&options.prefix, !is_cluster);
        let dialer = Dialer::new(options, layout.birthmark())?;
        let common = Arc::new(Common { dialer, layout, timeout: options.timeout });
        // Dropped, it ends its tasks.
        let opened =
            if is_cluster { Self::cluster(Arc::clone(&common)).await } else { Self::one(Arc::clone(&common)).await };
        let mut store = opened.map_err(|error| error.at(&common.dialer.place))?;
        let core = Arc::clone(&store.core);
        store.created = core.mark_format(options).await?;
        core.learn_birthmark().await?;
        core.survey().await.map_err(|error| core.refused(&error))?;
        store.keep(tokio::spawn(upkeep::run(core)).abort_handle());
        Ok(store)
    }

    /// One server at a time.
    async fn one(common: Arc<Common>) -> Result<Self, DialError> {
        let connected = common.dialer.connect(&Place::Master).await?;
        if !connected.appends {
            warn_of_memory(&common);
        }
        let (time, stats) = (StoreTime::new(connected.now_ms), Arc::new(Stats::default()));
        let (watches, interests) = Watches::new();
        let (link, driver) = Driver::new(Parts {
            common: Arc::clone(&common),
            place: Place::Master,
            time: time.clone(),
            leads: true,
            stats: Arc::clone(&stats),
            bounce: None,
        });
        let tasks = [
            tokio::spawn(driver.run(Some(connected))).abort_handle(),
            tokio::spawn(word::listen(Arc::clone(&common), Arc::clone(&watches), interests)).abort_handle(),
        ];
        Ok(Self::new(common, Way::One(link), time, stats, watches, tasks.into()))
    }

    /// Nobody tells of changes there: each word would go to all nodes.
    async fn cluster(common: Arc<Common>) -> Result<Self, DialError> {
        let stats = Arc::new(Stats::default());
        let (cluster, bounced, time) = Cluster::open(Arc::clone(&common), Arc::clone(&stats)).await?;
        let (watches, _) = Watches::new();
        let task = tokio::spawn(Arc::clone(&cluster).route(bounced)).abort_handle();
        Ok(Self::new(common, Way::Cluster(cluster), time, stats, watches, vec![task]))
    }

    fn new(
        common: Arc<Common>,
        way: Way,
        time: StoreTime,
        stats: Arc<Stats>,
        watches: Arc<Watches>,
        tasks: Vec<AbortHandle>,
    ) -> Self {
        let (survey, closed) = (Mutex::default(), AtomicBool::new(false));
        let core = Arc::new(Core { common, way, time, stats, survey, closed });
        Self { core, watches, created: false, tasks: Mutex::new(tasks) }
    }

    fn keep(&self, task: AbortHandle) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.close();
    }
}

/// A write, for what must be known of it afterwards.
#[derive(Clone, Copy)]
struct Write {
    id: RecordId,
    urgency: Urgency,
    /// Until then it may land.
    deadline_ms: u64,
}

impl Core {
    fn submit(&self, request: Request) -> oneshot::Receiver<Result<Answer, Lost>> {
        let (answer, receiver) = oneshot::channel();
        let until = Instant::now() + self.common.timeout;
        let op = Op { request, until, maybe: false, by_text: false, asking: false, answer };
        if !self.closed.load(Ordering::Acquire) {
            self.way.submit(op);
        }
        receiver
    }

    /// The reply, if it is no error. `may_land_until_ms`: for what is lost on its way.
    async fn wait(
        receiver: oneshot::Receiver<Result<Answer, Lost>>,
        may_land_until_ms: Option<u64>,
    ) -> Result<Answer, StoreError> {
        match receiver.await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(lost)) => Err(StoreError::Unavailable {
                reason: lost.reason.to_string(),
                may_land_until_ms: may_land_until_ms.filter(|_| lost.maybe),
            }),
            Err(_) => Err(StoreError::Failed { reason: "the store was closed".to_owned() }),
        }
    }

    /// Asks for something that is not a record's.
    async fn ask(&self, request: Request) -> Result<Reply, StoreError> {
        let deadline_ms = Some(self.deadline_ms()).filter(|_| request.writes());
        Self::wait(self.submit(request), deadline_ms).await.and_then(accepted)
    }

    /// Until when a write that begins now may land.
    fn deadline_ms(&self) -> u64 {
        self.time.now_ms().saturating_add(millis(self.common.timeout).saturating_mul(2))
    }

    fn command(arguments: &[&[u8]]) -> Bytes {
        let mut out = Output::default();
        out.command(arguments.len());
        arguments.iter().for_each(|argument| out.argument(argument));
        out.into_bytes()
    }

    fn plain(bucket: u8, arguments: &[&[u8]]) -> Request {
        Request::Plain { bucket, command: Self::command(arguments) }
    }

    /// Whether it was this call that has made the store.
    async fn mark_format(&self, options: &Options) -> Result<bool, OpenError> {
        let key = self.common.layout.format();
        let get = || self.ask(Self::plain(0, &[b"GET", &key]));
        if !options.create && get().await.map_err(|error| self.refused(&error))? == Reply::Nil {
            options.may_create()?;
        }
        let set = Request::PlainWrite { command: Self::command(&[b"SET", &key, FORMAT.as_bytes(), b"NX"]) };
        let set = self.ask(set).await.map_err(|error| self.refused(&error))?;
        if set != Reply::Nil {
            return Ok(true);
        }
        match get().await.map_err(|error| self.refused(&error))? {
            Reply::Bulk(found) if found == FORMAT.as_bytes() => Ok(false),
            found => {
                let found = found.bulk().map(|found| String::from_utf8_lossy(&found).into_owned());
                let reason = format!("what it holds has the format {found:?}; this version writes {FORMAT:?}");
                Err(OpenError::Refused { place: self.common.dialer.place.clone(), reason })
            }
        }
    }

    /// By which this store is known again; made now, if it has none yet.
    async fn learn_birthmark(&self) -> Result<(), OpenError> {
        let key = self.common.layout.birthmark();
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| {
            let reason = format!("the operating system gave no randomness for its birthmark: {error}");
            OpenError::Refused { place: self.common.dialer.place.clone(), reason }
        })?;
        let fresh = format!("{:032x}", u128::from_be_bytes(random));
        let set = Request::PlainWrite { command: Self::command(&[b"SET", &key, fresh.as_bytes(), b"NX"]) };
        self.ask(set).await.map_err(|error| self.refused(&error))?;
        // Another gateway may have been faster.
        let found = self.ask(Self::plain(0, &[b"GET", &key])).await.map_err(|error| self.refused(&error))?;
        let found = found.bulk().ok_or_else(|| self.refused(&odd(None)))?;
        self.common.dialer.trust.learn(found);
        Ok(())
    }

    fn refused(&self, error: &StoreError) -> OpenError {
        let place = self.common.dialer.place.clone();
        match error {
            // Redis begins what it refuses with a word in capitals.
            StoreError::Unavailable { reason, .. } if !reason.starts_with(|c: char| c.is_ascii_uppercase()) => {
                OpenError::Unreachable { place, reason: reason.clone() }
            }
            StoreError::Unavailable { reason, .. } => OpenError::Refused { place, reason: reason.clone() },
            error => OpenError::Refused { place, reason: error.to_string() },
        }
    }

    async fn write(&self, request: Request, write: Write) -> Result<Answer, StoreError> {
        let answer = Self::wait(self.submit(request), Some(write.deadline_ms)).await?;
        let Reply::Error(error) = answer.reply else { return Ok(answer) };
        if error.starts_with("WRONGTYPE") || error.contains("WRONGTYPE Operation") {
            let detail = "something that is not a string stands under its key".to_owned();
            return Err(StoreError::Damaged { id: write.id, detail });
        }
        // Of a second try it says nothing about the first.
        if error.contains("OOM command not allowed") && write.urgency == Urgency::Claim && !answer.again {
            let path = format!("{} (its maxmemory is used up)", self.common.dialer.place);
            return Err(StoreError::Full { path, min_free_bytes: 1 });
        }
        if is_too_large(&error) && (write.urgency == Urgency::Settle || !answer.again) {
            return Err(StoreError::Refused { reason: error });
        }
        // An attempt before may have done it.
        Err(StoreError::Unavailable {
            reason: error,
            may_land_until_ms: Some(write.deadline_ms).filter(|_| answer.again),
        })
    }

    async fn create(&self, id: RecordId, value: Value, urgency: Urgency) -> Result<Swapped, StoreError> {
        let deadline_ms = self.deadline_ms();
        let request = Request::Create { id, value: value.clone(), deadline_ms };
        let answer = self.write(request, Write { id, urgency, deadline_ms }).await?;
        let swap = match answer.reply {
            Reply::Int(version) => Swap::Done(Version(u64::try_from(version).unwrap_or(0))),
            Reply::Bulk(bytes) => told(Layout::entry(id, bytes)?, Some(&value)),
            Reply::Nil => Swap::Conflict(None),
            Reply::Status(status) if status == LATE => return Err(late()),
            Reply::Status(status) if status == OTHER => {
                return Err(StoreError::Unavailable {
                    reason: self.common.dialer.trust.disown().to_string(),
                    // An earlier attempt may have come before the store was emptied.
                    may_land_until_ms: Some(deadline_ms).filter(|_| answer.again),
                });
            }
            _ => return Err(odd(Some(deadline_ms))),
        };
        Ok(Swapped { swap, may_land_until_ms: Some(deadline_ms).filter(|_| answer.again) })
    }

    async fn update(
        &self,
        id: RecordId,
        expected: Version,
        new: Option<Value>,
        urgency: Urgency,
    ) -> Result<Swap, StoreError> {
        let (now_ms, deadline_ms) = (self.time.now_ms(), self.deadline_ms());
        // Never one that this entry has borne. Nor, but for the same millisecond, one that was written by another
        // gateway in its place on a server that has lost this write.
        let version = Version(expected.0.saturating_add(1).max(now_ms.saturating_mul(1000)));
        let removes = new.is_none();
        let written = new.clone().map(|value| (version, value));
        let request = Request::Update { id, expected, new: written, now_ms, deadline_ms };
        let answer = self.write(request, Write { id, urgency, deadline_ms }).await?;
        match answer.reply {
            Reply::Int(_) => Ok(Swap::Done(version)),
            Reply::Bulk(bytes) => Ok(told(Layout::entry(id, bytes)?, new.as_ref())),
            Reply::Nil if removes && answer.again => Ok(Swap::Done(version)),
            Reply::Nil => Ok(Swap::Conflict(None)),
            Reply::Status(status) if status == LATE => Err(late()),
            _ => Err(odd(Some(deadline_ms))),
        }
    }
}

/// Of a question.
async fn reply_of(receiver: oneshot::Receiver<Result<Answer, Lost>>) -> Result<Reply, StoreError> {
    Core::wait(receiver, None).await.and_then(accepted)
}

fn accepted(answer: Answer) -> Result<Reply, StoreError> {
    match answer.reply {
        Reply::Error(reason) => Err(StoreError::Unavailable { reason, may_land_until_ms: None }),
        reply => Ok(reply),
    }
}

/// `proto-max-bulk-len`, as the protocol, a command and a script tell it. What else is refused is so whatever the record, and
/// may be mended: memory, rights, a disk.
fn is_too_large(error: &str) -> bool {
    ["invalid bulk length", "exceeds maximum allowed size"].iter().any(|told| error.contains(told))
}

fn warn_of_memory(common: &Common) {
    let place = &common.dialer.place;
    tracing::warn!(
        place,
        "the server has no append-only file: when it restarts, keys are forgotten and may be executed again"
    );
}

/// What stands there is our own write if it equals it: then the answer to an earlier attempt was lost.
fn told(found: Entry, new: Option<&Value>) -> Swap {
    if Some(&found.value) == new { Swap::Done(found.version) } else { Swap::Conflict(Some(found)) }
}

/// An earlier attempt has not landed either, nor will it: it had the same deadline.
fn late() -> StoreError {
    let reason = "it came to the store too late".to_owned();
    StoreError::Unavailable { reason, may_land_until_ms: None }
}

fn odd(may_land_until_ms: Option<u64>) -> StoreError {
    StoreError::Unavailable { reason: "it answered something unheard of".to_owned(), may_land_until_ms }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Store for Redis {
    async fn get(&self, id: RecordId) -> Result<Option<Entry>, StoreError> {
        match Core::wait(self.core.submit(Request::Get(id)), None).await?.reply {
            Reply::Bulk(bytes) => Layout::entry(id, bytes).map(Some),
            Reply::Nil => Ok(None),
            Reply::Error(error) if error.starts_with("WRONGTYPE") => Err(StoreError::Damaged {
                id,
                detail: "something that is not a string stands under its key".to_owned(),
            }),
            Reply::Error(reason) => Err(StoreError::Unavailable { reason, may_land_until_ms: None }),
            _ => Err(odd(None)),
        }
    }

    async fn compare_and_swap(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> Result<Swap, StoreError> {
        Ok(self.swap_minding_copies(id, expected, new, now_ms, urgency).await?.swap)
    }

    async fn swap_minding_copies(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        _now_ms: u64,
        urgency: Urgency,
    ) -> Result<Swapped, StoreError> {
        if new.as_ref().is_some_and(|new| usize::from(new.tag.0) >= Tag::COUNT) {
            return Err(StoreError::Failed { reason: "a bad tag".to_owned() });
        }
        let swap = match (expected, new) {
            (None, Some(value)) => return self.core.create(id, value, urgency).await,
            // To remove what is not there.
            (None, None) => match self.get(id).await? {
                Some(found) => Swap::Conflict(Some(found)),
                None => Swap::Done(Version(self.core.time.now_ms().saturating_mul(1000))),
            },
            // A version is never there again: of an update at most one copy lands.
            (Some(expected), new) => self.core.update(id, expected, new, urgency).await?,
        };
        Ok(Swapped { swap, may_land_until_ms: None })
    }

    /// Redis drops what has expired; this clears the index of claimed and unknown entries.
    async fn sweep(&self, now_ms: u64) -> Result<Duration, StoreError> {
        self.core.sweep(now_ms).await
    }

    /// None: they are others' too.
    fn unexpiring(&self) -> Result<Vec<(RecordId, Entry)>, StoreError> {
        Ok(Vec::new())
    }

    /// In no order, but claimed and unknown ones (by bucket, then by age). A page may have a few entries more than asked
    /// for: Redis gives those together whose hashes collide.
    async fn list(&self, tag: Option<Tag>, after: u64, visit: usize) -> Result<Page, StoreError> {
        self.core.list(tag, after, visit).await
    }

    /// 0: the clock is the store's.
    fn newest_ms(&self) -> u64 {
        0
    }

    async fn setting(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        let key = self.core.common.layout.setting(name);
        Ok(self.core.ask(Core::plain(0, &[b"GET", &key])).await?.bulk())
    }

    async fn swap_setting(&self, name: &str, expected: Option<&[u8]>, new: &[u8]) -> Result<bool, StoreError> {
        let (expected, new) = (expected.map(Bytes::copy_from_slice), Bytes::copy_from_slice(new));
        let request = Request::SetSetting { name: name.to_owned(), expected, new };
        Ok(self.core.ask(request).await? == Reply::Int(1))
    }

    fn time(&self) -> Option<StoreTime> {
        Some(self.core.time.clone())
    }

    fn watch(&self, id: RecordId) -> Watch {
        self.watches.watch(id)
    }

    /// Of the entries only claimed and unknown ones are counted, as of some seconds ago; to count others, Redis would have to
    /// look at each.
    fn status(&self) -> Status {
        let core = &self.core;
        let out_of_reach = core.way.is_down() || core.common.dialer.trust.is_barred();
        let health = match (core.closed.load(Ordering::Acquire), out_of_reach) {
            (true, _) => Health::Failed,
            (_, true) => Health::Unreachable,
            _ => Health::Ok,
        };
        let survey = *core.survey.lock().unwrap_or_else(PoisonError::into_inner);
        let mut status = Status {
            health,
            created: self.created,
            entries: [0; Tag::COUNT],
            oldest_ms: [None; Tag::COUNT],
            queue_len: core.way.queued() as u64,
            batches: core.stats.batches.load(Ordering::Relaxed),
            batched_writes: core.stats.batched_writes.load(Ordering::Relaxed),
            bytes_written: core.stats.bytes_written.load(Ordering::Relaxed),
            swept: core.stats.swept.load(Ordering::Relaxed),
            disk_bytes: 0,
        };
        for (listed, count) in Listed::ALL.into_iter().zip(survey.counts) {
            if let Some(entries) = status.entries.get_mut(usize::from(listed.tag().0)) {
                *entries = count;
            }
        }
        if let Some(oldest) = status.oldest_ms.get_mut(usize::from(OLDEST_TRACKED.0)) {
            *oldest = survey.oldest_ms;
        }
        status
    }

    fn close(&self) {
        self.core.closed.store(true, Ordering::Release);
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).drain(..).for_each(|task| task.abort());
        self.core.way.close();
    }
}
