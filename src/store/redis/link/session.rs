//! One connection's life.

use super::{Answer, Driver, Op};
use crate::store::redis::dial::Connection;
use crate::store::redis::resp::{Input, Output, Reply};
use bytes::Buf;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::io::{poll_read_buf, poll_write_buf};

/// Operations in one write.
const BATCH_MAX: usize = 1024;
/// Writes whose replies are still to come. While they are, what arrives gathers for the next.
const BATCHES_MAX: usize = 2;
/// The clock is asked for so often while there is traffic, and once in [`HEARTBEAT`] without.
const CLOCK: Duration = Duration::from_millis(200);
const HEARTBEAT: Duration = Duration::from_secs(5);
const READ: usize = 32 << 10;

/// What a reply belongs to.
enum Slot {
    Op(Op),
    Time,
    /// The store's, see [`crate::store::redis::trust`].
    Birthmark,
    /// The write before `WAIT`.
    Mark,
    /// `WAIT`, for all writes that came before it.
    Wait,
    /// Of `ASKING`, or of an operation that has waited too long.
    Nobody,
}

pub(super) struct Session {
    stream: Pin<Box<dyn crate::store::redis::dial::Duplex>>,
    input: Input,
    output: Output,
    flushing: bool,
    /// In the order of the commands, and whether it is the last of its write.
    slots: VecDeque<(Slot, bool)>,
    batches: usize,
    /// Writes that the server has done, but not the replicas yet.
    unconfirmed: Vec<(Op, Reply)>,
    /// Whether the last mark was written.
    marked: bool,
    /// Answered with "not now": they go first on the next connection.
    again: VecDeque<Op>,
    taken: Vec<Op>,
    tick: Pin<Box<Sleep>>,
    /// When something was last read or written, or began to be waited for.
    moved: Instant,
    asked_time: Instant,
    /// Without progress for so long, while something is waited for, the connection is dead.
    stall: Duration,
    end: Option<String>,
}

impl Session {
    pub(super) fn new(driver: &Driver, connection: Connection) -> Self {
        let now = Instant::now();
        Self {
            stream: Box::into_pin(connection.stream),
            input: connection.input,
            output: Output::default(),
            flushing: false,
            slots: VecDeque::new(),
            batches: 0,
            unconfirmed: Vec::new(),
            marked: false,
            again: VecDeque::new(),
            taken: Vec::new(),
            tick: Box::pin(sleep_until(now + HEARTBEAT)),
            moved: now,
            asked_time: now,
            stall: driver.common.timeout / 2,
            end: None,
        }
    }

    /// All that was sent and not answered, oldest first: it may have been done.
    pub(super) fn into_unanswered(self) -> VecDeque<Op> {
        let waiting = self.slots.into_iter().filter_map(|(slot, _)| match slot {
            Slot::Op(op) => Some(op),
            _ => None,
        });
        let sent = self.unconfirmed.into_iter().map(|(op, _)| op).chain(waiting);
        let mut ops = self.again;
        ops.extend(sent.map(|op| Op { maybe: true, ..op }));
        ops
    }

    /// Ready when the connection is of no use any more, with the reason.
    pub(super) fn poll(&mut self, driver: &mut Driver, context: &mut Context<'_>) -> Poll<String> {
        loop {
            if let Some(reason) = driver.common.dialer.trust.barred() {
                return Poll::Ready(reason.to_string());
            }
            let mut moved = self.poll_write(context);
            moved |= self.poll_read(driver, context);
            if self.end.is_none() && !self.output.has_remaining() && self.batches < BATCHES_MAX {
                moved |= self.take(driver, context);
            }
            if let Some(reason) = self.end.take() {
                return Poll::Ready(reason);
            }
            if !moved {
                ready!(self.tick.as_mut().poll(context));
                if let Some(reason) = self.tick(driver) {
                    return Poll::Ready(reason);
                }
            }
        }
    }

    fn poll_write(&mut self, context: &mut Context<'_>) -> bool {
        let mut moved = false;
        while self.output.has_remaining() {
            match poll_write_buf(self.stream.as_mut(), context, &mut self.output) {
                Poll::Ready(Ok(n)) if n > 0 => (moved, self.flushing) = (true, true),
                Poll::Ready(Ok(_)) => self.end = Some("it takes no more".to_owned()),
                Poll::Ready(Err(error)) => self.end = Some(error.to_string()),
                Poll::Pending => break,
            }
            if self.end.is_some() {
                return moved;
            }
        }
        if self.flushing {
            match self.stream.as_mut().poll_flush(context) {
                Poll::Ready(Ok(())) => self.flushing = false,
                Poll::Ready(Err(error)) => self.end = Some(error.to_string()),
                Poll::Pending => {}
            }
        }
        if moved {
            self.moved = Instant::now();
        }
        moved
    }

    fn poll_read(&mut self, driver: &mut Driver, context: &mut Context<'_>) -> bool {
        self.input.bytes.reserve(READ);
        match poll_read_buf(self.stream.as_mut(), context, &mut self.input.bytes) {
            Poll::Pending => return false,
            Poll::Ready(Ok(0)) => self.end = Some("it closed the connection".to_owned()),
            Poll::Ready(Err(error)) => self.end = Some(error.to_string()),
            Poll::Ready(Ok(_)) => {
                self.moved = Instant::now();
                loop {
                    match self.input.next() {
                        Ok(Some(reply)) => self.answered(driver, reply),
                        Ok(None) => break,
                        Err(_) => {
                            self.end = Some("it answered something that is not Redis's protocol".to_owned());
                            break;
                        }
                    }
                }
            }
        }
        true
    }

    fn take(&mut self, driver: &mut Driver, context: &mut Context<'_>) -> bool {
        let room = BATCH_MAX.saturating_sub(driver.pending.len());
        if driver.queue.poll_recv_many(context, &mut self.taken, room.max(1)).is_pending() && driver.pending.is_empty()
        {
            return false;
        }
        if self.taken.is_empty() && driver.pending.is_empty() {
            // All senders are gone, and with them the store.
            return false;
        }
        let now = Instant::now();
        let mut writes = 0_u64;
        for op in std::mem::take(&mut driver.pending).into_iter().chain(self.taken.drain(..)) {
            if op.until <= now {
                op.fail(&Arc::from("no time left"));
                continue;
            }
            if op.asking {
                self.output.command(1);
                self.output.argument(b"ASKING");
                self.slots.push_back((Slot::Nobody, false));
            }
            let common = &driver.common;
            common.layout.encode(&op.request, op.by_text, &common.dialer.trust, &mut self.output);
            writes += u64::from(op.request.writes());
            self.slots.push_back((Slot::Op(op), false));
        }
        if writes > 0 && driver.common.dialer.wait_replicas > 0 {
            self.wait_for_replicas(driver);
        }
        if now.duration_since(self.asked_time) >= CLOCK {
            self.ask_time(driver, now);
        }
        let Some((_, last)) = self.slots.back_mut().filter(|_| self.output.has_remaining()) else { return true };
        *last = true;
        driver.stats.batches.fetch_add(1, Ordering::Relaxed);
        driver.stats.batched_writes.fetch_add(writes, Ordering::Relaxed);
        driver.stats.bytes_written.fetch_add(self.output.remaining() as u64, Ordering::Relaxed);
        self.batches += 1;
        if self.batches == 1 {
            self.moved = now;
        }
        if now + self.stall < self.tick.deadline() {
            self.tick.as_mut().reset(now + self.stall);
        }
        true
    }

    /// And whether it is still the same store: it may have been emptied meanwhile.
    fn ask_time(&mut self, driver: &Driver, now: Instant) {
        self.asked_time = now;
        self.output.command(1);
        self.output.argument(b"TIME");
        self.slots.push_back((Slot::Time, false));
        if driver.leads() {
            self.output.command(2);
            self.output.argument(b"GET");
            self.output.argument(driver.common.dialer.trust.key());
            self.slots.push_back((Slot::Birthmark, false));
        }
    }

    fn wait_for_replicas(&mut self, driver: &Driver) {
        let dialer = &driver.common.dialer;
        let limit = u64::try_from(self.stall.as_millis()).unwrap_or(u64::MAX) * 2 / 3;
        let replicas = u64::from(dialer.wait_replicas);
        // The server waits for what this very connection wrote last. What another has written before, an earlier attempt
        // perhaps, counts only with a write of our own behind it.
        self.output.command(3);
        self.output.argument(b"SET");
        self.output.argument(&driver.common.layout.mark());
        self.output.argument(b"");
        self.slots.push_back((Slot::Mark, false));
        if dialer.strict {
            self.output.command(4);
            self.output.argument(b"WAITAOF");
            self.output.number(1);
        } else {
            self.output.command(3);
            self.output.argument(b"WAIT");
        }
        self.output.number(replicas);
        self.output.number(limit.max(1));
        self.slots.push_back((Slot::Wait, false));
    }

    fn answered(&mut self, driver: &mut Driver, reply: Reply) {
        let Some((slot, last)) = self.slots.pop_front() else {
            self.end = Some("it answered what nobody asked".to_owned());
            return;
        };
        self.batches -= usize::from(last);
        match slot {
            Slot::Time => {
                if let Some(now_ms) = reply.time_ms() {
                    driver.tell_time(now_ms);
                }
            }
            // What another node says, since the bucket has moved, is of no account.
            Slot::Birthmark => {
                if let Err(reason) = driver.common.dialer.trust.judge(&reply) {
                    self.end = Some(reason.to_string());
                }
            }
            Slot::Nobody => {}
            Slot::Mark => self.marked = !matches!(reply, Reply::Error(_)),
            Slot::Wait => self.confirmed(driver, reply),
            Slot::Op(op) => match reply {
                Reply::Error(error) => self.refused(driver, op, error),
                reply if driver.common.dialer.wait_replicas > 0 && op.request.writes() => {
                    self.unconfirmed.push((op, reply));
                }
                reply => deliver(op, reply),
            },
        }
    }

    fn confirmed(&mut self, driver: &Driver, reply: Reply) {
        let wanted = i64::from(driver.common.dialer.wait_replicas);
        let (enough, told) = match &reply {
            Reply::Int(replicas) => (*replicas >= wanted, format!("{replicas} of {wanted} replicas have it")),
            Reply::Array(both) => {
                let disks = |at: usize| both.get(at).and_then(Reply::int).unwrap_or(0);
                let told = format!("{} own and {} of {wanted} replicas' disks have it", disks(0), disks(1));
                (disks(0) >= 1 && disks(1) >= wanted, told)
            }
            Reply::Error(error) => (false, error.clone()),
            _ => (false, "it does not tell how many replicas have it".to_owned()),
        };
        let reason: Arc<str> = Arc::from(told);
        for (mut op, reply) in self.unconfirmed.drain(..) {
            if enough && self.marked {
                deliver(op, reply);
            } else {
                op.maybe = true;
                op.fail(&reason);
            }
        }
    }

    /// The server has not done it.
    fn refused(&mut self, driver: &mut Driver, mut op: Op, error: String) {
        match error.split(' ').next().unwrap_or_default() {
            "NOSCRIPT" if !op.by_text => {
                op.by_text = true;
                driver.pending.push_back(op);
            }
            "MOVED" | "ASK" | "TRYAGAIN" | "CLUSTERDOWN" if driver.bounce.is_some() => {
                driver.refuse(op, &Arc::from(error));
            }
            "READONLY" | "LOADING" | "MASTERDOWN" | "BUSY" | "TRYAGAIN" | "CLUSTERDOWN" => self.not_here(op, error),
            // As 6.2 tells what went wrong within a script.
            "ERR" if error.contains("READONLY You can't write") => self.not_here(op, error),
            _ => deliver(op, Reply::Error(error)),
        }
    }

    fn not_here(&mut self, op: Op, error: String) {
        self.again.push_back(op);
        self.end = Some(error);
    }

    /// The reason to give the connection up, if there is one.
    fn tick(&mut self, driver: &mut Driver) -> Option<String> {
        let now = Instant::now();
        let waiting = !self.slots.is_empty();
        if waiting && now >= self.moved + self.stall {
            return Some(format!("no answer within {:?}", self.stall));
        }
        let next = if waiting {
            let oldest = self.expire(now).into_iter().chain(driver.expire_queued(now)).min();
            oldest.map_or(self.moved + self.stall, |oldest| oldest.min(self.moved + self.stall))
        } else if now >= self.asked_time + HEARTBEAT {
            self.ask_time(driver, now);
            if let Some((_, last)) = self.slots.back_mut() {
                *last = true;
            }
            self.batches += 1;
            self.moved = now;
            now + self.stall
        } else {
            self.asked_time + HEARTBEAT
        };
        self.tick.as_mut().reset(next);
        None
    }

    /// Fails what was sent and has waited too long; its reply, should it come, is for nobody. Returns when the next is due.
    fn expire(&mut self, now: Instant) -> Option<Instant> {
        for (slot, _) in &mut self.slots {
            match slot {
                Slot::Op(op) if op.until > now => return Some(op.until),
                Slot::Op(_) => {
                    if let Slot::Op(op) = std::mem::replace(slot, Slot::Nobody) {
                        Op { maybe: true, ..op }.fail(&Arc::from("no answer in time"));
                    }
                }
                _ => {}
            }
        }
        None
    }
}

fn deliver(op: Op, reply: Reply) {
    let _ = op.answer.send(Ok(Answer { reply, again: op.maybe }));
}
