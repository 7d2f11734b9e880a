//! Carries operations to the server: few connections, each with a batch under way; lost ones are made anew, and what was
//! under way on them is sent again.

use super::connect::{Connection, Connector};
use super::exchange::{self, Failure};
use super::queue::{Answer, Batch, Fate, Op, Param, State, Work, unavailable};
use crate::store::shared::{ANOTHER, OpenError};
use crate::store::{StoreError, StoreTime};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tokio_postgres::Row;

/// Connections that carry operations. While one waits for its commit, the next batch gathers for another.
const CONNECTIONS: usize = 3;
/// Each connection is checked so often, with work and without.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Before what another transaction was in the way of is sent again.
const AGAIN: Duration = Duration::from_millis(2);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) batches: AtomicU64,
    pub(super) batched_writes: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    pub(super) swept: AtomicU64,
}

pub(super) struct Driver {
    pub(super) connector: Connector,
    pub(super) time: StoreTime,
    pub(super) counters: Counters,
    state: Mutex<State>,
    /// There may be something to take.
    work: Notify,
    closed: watch::Sender<bool>,
    /// Whoever makes a connection holds it: while there is none to be had, one tries.
    gate: tokio::sync::Mutex<Backoff>,
    /// Attempts in a row that came to no end.
    stalls: AtomicU32,
}

/// A connection that takes part, and since when.
struct Link {
    connection: Connection,
    generation: u64,
    live: Live,
}

/// Counts among the open connections.
struct Live(Arc<Driver>);

impl Drop for Live {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.live = state.live.saturating_sub(1);
    }
}

/// The pause before the next attempt.
struct Backoff(Duration);

impl Backoff {
    fn pause(&mut self) -> Duration {
        let full = self.0;
        self.0 = (full * 2).min(BACKOFF_MAX);
        // Half of it to all of it: gateways do not come in step.
        let part = getrandom::u32().unwrap_or(0) % 1024;
        full / 2 + full * part / 2048
    }
}

impl Driver {
    /// Begins with a connection. Its tasks run on the runtime that calls, until it is closed.
    pub(super) fn start(connector: Connector, first: Connection, time: StoreTime) -> Arc<Self> {
        let driver = Arc::new(Self {
            connector,
            time,
            counters: Counters::default(),
            state: Mutex::default(),
            work: Notify::new(),
            closed: watch::Sender::new(false),
            gate: tokio::sync::Mutex::new(Backoff(BACKOFF_MIN)),
            stalls: AtomicU32::new(0),
        });
        let mut first = Some(driver.link(first, 0));
        for _ in 0..CONNECTIONS {
            tokio::spawn(Arc::clone(&driver).work(first.take()));
        }
        driver
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was accepted is still written, as far as that is possible; nothing more is accepted.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.closed.send_replace(true);
    }

    /// Ready when the store was closed.
    pub(super) async fn is_closed(&self) {
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }

    /// # Errors
    /// [`StoreError::Unavailable`]; [`StoreError::Failed`] once it was closed; what the answer itself is, if it cannot be read.
    pub(super) async fn perform(&self, work: Work) -> Result<Answer, StoreError> {
        let fate = Arc::new(Fate::default());
        let (reply, answer) = oneshot::channel();
        let deadline = Instant::now() + self.connector.timeout;
        self.state().push(Op::new(work, deadline, Arc::clone(&fate), reply))?;
        self.work.notify_one();
        match timeout_at(deadline, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(unavailable("no answer in time", fate.give_up())),
        }
    }

    /// # Errors
    /// As [`Self::perform`].
    pub(super) async fn query(&self, sql: &str, params: Vec<Param>) -> Result<Vec<Row>, StoreError> {
        match self.perform(Work::Query { sql: sql.to_owned(), params }).await? {
            Answer::Rows(rows) => Ok(rows),
            Answer::Entry(_) | Answer::Swap(_) => Ok(Vec::new()),
        }
    }

    fn link(self: &Arc<Self>, connection: Connection, generation: u64) -> Link {
        let mut state = self.state();
        state.live += 1;
        if state.out_of_reach.take().is_some() {
            tracing::info!(place = %self.connector.place, "the store can be reached again");
        }
        drop(state);
        Link { connection, generation, live: Live(Arc::clone(self)) }
    }

    async fn work(self: Arc<Self>, mut link: Option<Link>) {
        loop {
            if link.is_none() {
                link = self.connect().await;
            }
            let Some(connected) = link.take() else { break };
            let ended = self.serve(&connected).await;
            let Link { connection, live, .. } = connected;
            drop(live);
            let Some(reason) = ended else {
                connection.end().await;
                break;
            };
            tracing::debug!(place = %self.connector.place, reason, "a connection to the store has ended");
        }
        let mut state = self.state();
        // The last one turns out the light.
        if state.live == 0 {
            state.refuse_all();
        }
    }

    /// A new connection, sooner or later; `None`: the store was closed.
    async fn connect(self: &Arc<Self>) -> Option<Link> {
        let attempts = async {
            let mut backoff = self.gate.lock().await;
            if self.stalls.load(Ordering::Relaxed) > 1 {
                // It lets us in, but then it does not answer.
                sleep(backoff.pause()).await;
            }
            loop {
                let generation = self.state().generation;
                match self.connector.connect().await {
                    Ok((connection, time)) => {
                        self.time.told(time);
                        if self.stalls.load(Ordering::Relaxed) == 0 {
                            *backoff = Backoff(BACKOFF_MIN);
                        }
                        return self.link(connection, generation);
                    }
                    Err(error) => self.not_reached(&error),
                }
                sleep(backoff.pause()).await;
            }
        };
        tokio::select! {
            link = attempts => Some(link),
            () = self.is_closed() => None,
        }
    }

    fn not_reached(&self, error: &OpenError) {
        let mut state = self.state();
        if state.live > 0 {
            return;
        }
        let reason = match error {
            OpenError::Options { reason, .. }
            | OpenError::Unreachable { reason, .. }
            | OpenError::Refused { reason, .. } => reason.clone(),
            OpenError::NotStrict { reason, .. } => format!("it may lose what it has acknowledged: {reason}"),
            OpenError::Another { .. } => ANOTHER.to_owned(),
            OpenError::Missing { .. } => error.to_string(),
        };
        state.refuse_unsent(&reason, Instant::now());
        let is_new = state.out_of_reach.as_ref() != Some(&reason);
        let before = state.out_of_reach.replace(reason);
        drop(state);
        match error {
            // Also when it could not be reached before.
            OpenError::Another { .. } if is_new => tracing::error!("{error}"),
            OpenError::NotStrict { .. } if before.is_none() => tracing::error!("{error}"),
            _ if before.is_none() => tracing::warn!("{error}; trying again"),
            _ => {}
        }
    }

    /// Works until the connection is of no more use, and says why; `None`: the store was closed, and nothing is left.
    async fn serve(&self, link: &Link) -> Option<String> {
        let mut next_check = Instant::now() + HEARTBEAT;
        loop {
            if next_check <= Instant::now() {
                if let Err(reason) = self.check(link).await {
                    return Some(reason);
                }
                next_check = Instant::now() + HEARTBEAT;
            }
            let batch = {
                let mut state = self.state();
                if state.generation != link.generation {
                    return Some("another connection has stalled".to_owned());
                }
                let batch = state.take(Instant::now());
                if batch.is_none() && state.closed {
                    return None;
                }
                batch
            };
            let ended = match batch {
                Some(batch) => self.attempt(link, batch).await,
                None => self.idle(link, next_check).await,
            };
            if let Err(reason) = ended {
                return Some(reason);
            }
        }
    }

    /// Until there may be something to do.
    async fn idle(&self, link: &Link, next_check: Instant) -> Result<(), String> {
        tokio::select! {
            () = self.work.notified() => Ok(()),
            () = self.is_closed() => Ok(()),
            () = link.connection.gone() => Err("the server has closed it".to_owned()),
            () = sleep_until(next_check) => Ok(()),
        }
    }

    /// Whether the server still answers, still takes writes, still keeps its promises, and still has the same store.
    async fn check(&self, link: &Link) -> Result<(), String> {
        let connector = &self.connector;
        let checks = async { tokio::join!(connector.check(&link.connection), connector.recognize(&link.connection)) };
        let (time, same) = timeout(connector.timeout, checks).await.map_err(|_| "no heartbeat".to_owned())?;
        if let Err(OpenError::Another { .. }) = &same {
            // The other connections lead there as well.
            self.state().generation += 1;
            self.work.notify_waiters();
        }
        let time = time.and_then(|time| same.map(|()| time)).map_err(|error| error.to_string())?;
        self.time.told(time);
        Ok(())
    }

    /// Sends a batch and answers it. What remains without an answer goes back into the queue.
    ///
    /// # Errors
    /// The connection is of no more use.
    async fn attempt(&self, link: &Link, mut batch: Batch) -> Result<(), String> {
        let whole = self.connector.timeout;
        // Only a new entry has to be refused by the server once its time is over, but then all that were sent with it are.
        let deadline_ms = self.time.now_ms().saturating_add(2 * millis(whole));
        // A commit may take its time after the server's last look at the clock.
        let landed_by_ms = deadline_ms.saturating_add(millis(whole));
        batch.swaps.retain_mut(|op| op.send(landed_by_ms));
        let is_query = batch.query.is_some();
        if let Some(query) = &mut batch.query
            && !query.send(landed_by_ms)
        {
            batch.query = None;
        }
        // Half of the time an operation has: the other half is for the next connection.
        let limit = if is_query { whole } else { whole / 2 };
        let run = exchange::run(self, &link.connection.client, &mut batch, deadline_ms);
        let failures = match timeout(limit, run).await {
            Ok(failures) => {
                self.stalls.store(0, Ordering::Relaxed);
                failures
            }
            Err(_) => {
                self.stalls.fetch_add(1, Ordering::Relaxed);
                if !is_query {
                    self.state().generation += 1;
                }
                vec![Failure::Lost("no answer in time".to_owned())]
            }
        };
        if failures.iter().any(|failure| matches!(failure, Failure::Again)) {
            sleep(AGAIN).await;
        }
        self.finish(batch, failures)
    }

    fn finish(&self, batch: Batch, failures: Vec<Failure>) -> Result<(), String> {
        let Batch { gets, swaps, query, ids } = batch;
        let is_query = query.is_some() || ids.is_empty();
        let mut unanswered: Vec<Op> = gets.into_iter().chain(swaps).chain(query).collect();
        let mut ended = Ok(());
        for failure in failures {
            match failure {
                Failure::Lost(reason) => {
                    unanswered.iter_mut().for_each(Op::lost);
                    ended = Err(reason);
                }
                Failure::Again => unanswered.iter_mut().for_each(Op::take_back),
                Failure::Elsewhere(reason) => {
                    unanswered.iter_mut().for_each(Op::take_back);
                    self.stalls.fetch_add(1, Ordering::Relaxed);
                    ended = Err(reason);
                }
                Failure::Refused { reason, may_pass } => {
                    unanswered.iter_mut().for_each(Op::take_back);
                    if unanswered.len() == 1 {
                        let refuse = if may_pass { Op::refuse } else { Op::refuse_for_good };
                        unanswered.drain(..).for_each(|op| refuse(op, &reason));
                    }
                    // One of them is to blame.
                    unanswered.iter_mut().for_each(|op| op.alone = true);
                }
            }
        }
        let mut state = self.state();
        state.give_back(&ids, is_query, unanswered);
        let more = state.len() > 0;
        drop(state);
        if more {
            self.work.notify_one();
        }
        ended
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
