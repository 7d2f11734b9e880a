//! The way to one server: a queue, and a task that sends what is queued as it comes, many commands in one write, and
//! matches the replies. When the connection is lost, what may have been lost with it is sent again on the next one.

mod session;

use super::cluster::Cluster;
use super::dial::{Common, Connected, DialError, Place};
use super::layout::Request;
use super::resp::Reply;
use crate::store::StoreTime;
use session::Session;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

/// Operations that wait for their turn; beyond, new ones fail at once.
pub(super) const QUEUE_MAX: usize = 4096;
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// Why an operation has no reply.
#[derive(Clone, Debug)]
pub(super) struct Lost {
    pub(super) reason: Arc<str>,
    /// Whether the server may have got it, or may yet.
    pub(super) maybe: bool,
}

/// A reply, and whether an earlier attempt may have done the work already.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) reply: Reply,
    pub(super) again: bool,
}

#[derive(Debug)]
pub(super) struct Op {
    pub(super) request: Request,
    pub(super) until: Instant,
    /// An attempt may have reached the server.
    pub(super) maybe: bool,
    /// Scripts go by text: the server has lost them.
    pub(super) by_text: bool,
    /// A node of a cluster has sent it elsewhere for this once.
    pub(super) asking: bool,
    pub(super) answer: oneshot::Sender<Result<Answer, Lost>>,
}

impl Op {
    pub(super) fn fail(self, reason: &Arc<str>) {
        let _ = self.answer.send(Err(Lost { reason: Arc::clone(reason), maybe: self.maybe }));
    }
}

#[derive(Debug, Default)]
pub(super) struct Stats {
    pub(super) batches: AtomicU64,
    pub(super) batched_writes: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    pub(super) swept: AtomicU64,
}

/// What the link tells of itself.
#[derive(Debug)]
pub(super) struct State {
    down: AtomicBool,
    /// Its server has the first bucket, where all stands that is no record: its time is the store's.
    leads: AtomicBool,
    reason: Mutex<Arc<str>>,
}

impl State {
    fn reason(&self) -> Arc<str> {
        Arc::clone(&self.reason.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The way to whoever has the store, one server or many.
pub(super) enum Way {
    One(Link),
    Cluster(Arc<Cluster>),
}

impl Way {
    pub(super) fn submit(&self, op: Op) {
        match self {
            Self::One(link) => link.submit(op),
            Self::Cluster(cluster) => cluster.submit(op),
        }
    }

    pub(super) fn is_down(&self) -> bool {
        match self {
            Self::One(link) => link.is_down(),
            Self::Cluster(cluster) => cluster.is_down(),
        }
    }

    pub(super) fn queued(&self) -> usize {
        match self {
            Self::One(link) => link.queued(),
            Self::Cluster(cluster) => cluster.queued(),
        }
    }

    /// See [`Cluster::next_node`].
    pub(super) fn next_node(&self, bucket: u8) -> Option<u8> {
        match self {
            Self::One(_) => None,
            Self::Cluster(cluster) => cluster.next_node(bucket),
        }
    }

    pub(super) fn close(&self) {
        if let Self::Cluster(cluster) = self {
            cluster.close();
        }
    }
}

/// Operations go in here.
#[derive(Clone, Debug)]
pub(super) struct Link {
    queue: mpsc::Sender<Op>,
    state: Arc<State>,
}

impl Link {
    /// Queues it, or fails it at once.
    pub(super) fn submit(&self, op: Op) {
        if self.is_down() {
            return op.fail(&self.state.reason());
        }
        match self.queue.try_send(op) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(op)) => op.fail(&Arc::from("too many operations wait for it")),
            // The store was closed: the answer is dropped, and that says so.
            Err(mpsc::error::TrySendError::Closed(_)) => {}
        }
    }

    pub(super) fn is_down(&self) -> bool {
        self.state.down.load(Ordering::Acquire)
    }

    pub(super) fn queued(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }

    /// Whether its server has the first bucket.
    pub(super) fn lead(&self, leads: bool) {
        self.state.leads.store(leads, Ordering::Release);
    }
}

/// An operation that this link cannot bring to its end, and why; for the router of a cluster.
pub(super) type Bounced = (Op, Arc<str>);

pub(super) struct Driver {
    pub(super) common: Arc<Common>,
    pub(super) place: Place,
    pub(super) time: StoreTime,
    pub(super) stats: Arc<Stats>,
    /// Whoever knows another way.
    pub(super) bounce: Option<mpsc::UnboundedSender<Bounced>>,
    queue: mpsc::Receiver<Op>,
    state: Arc<State>,
    /// Goes before the queue: sent already, or taken from it.
    pending: VecDeque<Op>,
}

pub(super) struct Parts {
    pub(super) common: Arc<Common>,
    pub(super) place: Place,
    pub(super) time: StoreTime,
    pub(super) leads: bool,
    pub(super) stats: Arc<Stats>,
    pub(super) bounce: Option<mpsc::UnboundedSender<Bounced>>,
}

impl Driver {
    pub(super) fn new(parts: Parts) -> (Link, Self) {
        let (sender, queue) = mpsc::channel(QUEUE_MAX);
        let Parts { common, place, time, leads, stats, bounce } = parts;
        let (down, leads) = (AtomicBool::new(false), AtomicBool::new(leads));
        let state = Arc::new(State { down, leads, reason: Mutex::new(Arc::from("")) });
        let link = Link { queue: sender, state: Arc::clone(&state) };
        (link, Self { common, place, time, stats, bounce, queue, state, pending: VecDeque::new() })
    }

    fn leads(&self) -> bool {
        self.state.leads.load(Ordering::Acquire)
    }

    /// The server's time has just arrived.
    fn tell_time(&self, now_ms: u64) {
        // One clock for all: the nodes of a cluster may differ.
        if self.leads() {
            self.time.told(now_ms);
        }
    }

    /// Until the task is aborted.
    pub(super) async fn run(mut self, mut connected: Option<Connected>) {
        loop {
            let connected = match connected.take() {
                Some(connected) => connected,
                None => self.reconnect().await,
            };
            let began = Instant::now();
            let mut session = Session::new(&self, connected.connection);
            let reason = std::future::poll_fn(|context| session.poll(&mut self, context)).await;
            tracing::debug!(place = self.common.dialer.place, reason, "the connection to the store is lost");
            let mut unanswered = session.into_unanswered();
            unanswered.append(&mut self.pending);
            self.pending = unanswered;
            if began.elapsed() < BACKOFF_MAX {
                // Whatever ends connections so soon may do so again.
                self.meanwhile(sleep_until(Instant::now() + jittered(BACKOFF_MIN / 5)), false).await;
            }
        }
    }

    async fn reconnect(&mut self) -> Connected {
        let mut backoff = BACKOFF_MIN;
        loop {
            let common = Arc::clone(&self.common);
            let place = self.place.clone();
            let error = match self.meanwhile(async move { common.dialer.connect(&place).await }, false).await {
                Ok(connected) => {
                    self.tell_time(connected.now_ms);
                    if self.state.down.swap(false, Ordering::AcqRel) {
                        tracing::info!(place = self.common.dialer.place, "the store can be reached again");
                    }
                    return connected;
                }
                Err(error) => error,
            };
            let reason: Arc<str> = Arc::from(error.reason());
            *self.state.reason.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&reason);
            if !self.state.down.swap(true, Ordering::AcqRel) {
                let place = &self.common.dialer.place;
                match error {
                    DialError::Unreachable(_) => {
                        tracing::warn!(place, %reason, "the store cannot be reached");
                    }
                    DialError::Barred(_) => {}
                    _ => tracing::error!(place, %reason, "the store cannot be used any more"),
                }
            }
            self.fail_unsent(&reason);
            let wake = Instant::now() + jittered(backoff);
            backoff = (backoff * 2).min(BACKOFF_MAX);
            self.meanwhile(sleep_until(wake), true).await;
        }
    }

    /// Waits for the future; operations whose time is over meanwhile fail, and, if the store is `down`, new ones do.
    async fn meanwhile<F: Future>(&mut self, future: F, down: bool) -> F::Output {
        let mut future = std::pin::pin!(future);
        loop {
            let oldest = self.pending.iter().map(|op| op.until).min();
            let expiry = async {
                match oldest {
                    Some(until) => sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                output = &mut future => return output,
                () = expiry => self.expire(),
                op = self.queue.recv(), if down => match op {
                    Some(op) => {
                        let reason = self.state.reason();
                        self.refuse(op, &reason);
                    }
                    // All senders are gone, and with them the store.
                    None => std::future::pending().await,
                },
            }
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let reason = Arc::from("no answer in time");
        for _ in 0..self.pending.len() {
            match self.pending.pop_front() {
                Some(op) if op.until <= now => op.fail(&reason),
                Some(op) => self.pending.push_back(op),
                None => {}
            }
        }
    }

    /// While the server is slow: fails what waits for its turn and has waited too long. Returns when the next is due.
    fn expire_queued(&mut self, now: Instant) -> Option<Instant> {
        while self.pending.len() < QUEUE_MAX
            && let Ok(op) = self.queue.try_recv()
        {
            self.pending.push_back(op);
        }
        if self.pending.iter().any(|op| op.until <= now) {
            self.expire();
        }
        self.pending.iter().map(|op| op.until).min()
    }

    /// There is no connection: what surely has not reached the server fails now. The rest is worth another try.
    fn fail_unsent(&mut self, reason: &Arc<str>) {
        while let Ok(op) = self.queue.try_recv() {
            self.refuse(op, reason);
        }
        for _ in 0..self.pending.len() {
            match self.pending.pop_front() {
                Some(op) if op.maybe && self.bounce.is_none() => self.pending.push_back(op),
                Some(op) => self.refuse(op, reason),
                None => {}
            }
        }
    }

    fn refuse(&self, op: Op, reason: &Arc<str>) {
        match &self.bounce {
            Some(bounce) => drop(bounce.send((op, Arc::clone(reason)))),
            None => op.fail(reason),
        }
    }
}

/// Between half of it and all of it, so that gateways do not come all at once.
pub(super) fn jittered(pause: Duration) -> Duration {
    let random = getrandom::u32().unwrap_or(u32::MAX);
    pause.mul_f64(0.5 + f64::from(random) / f64::from(u32::MAX) / 2.0)
}
