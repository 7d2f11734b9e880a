//! Both ends of a proxy in one thread: the upstream that answers it, and the clients that load it.
//!
//! One epoll loop on raw sockets, so that the far ends cost little and never keep a proxy waiting for a change of
//! threads. Each client connection has one request in flight; requests are counted, not timed.

use crate::http::{self, Answer, Answers, Reader, Reply, malformed};
use rustix::event::epoll;
use std::collections::HashSet;
use std::io::{ErrorKind, IoSlice, Read, Result, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const LISTENER: u64 = u64::MAX;
/// Without a single answer for so long, a run is given up.
const STALLED: Duration = Duration::from_secs(20);

/// What to send.
pub trait Source {
    /// Writes the next request's head; asked once per request, in order.
    fn next(&mut self, head: &mut Vec<u8>);
    /// The body that all requests share.
    fn body(&self) -> &[u8];
}

/// How a load went.
pub struct Loaded {
    /// Nanoseconds from the time when a request was due to the end of its answer.
    pub latencies: Vec<u64>,
    pub elapsed: Duration,
    /// Answers that were marked as replays.
    pub replayed: usize,
}

/// What the upstream was asked to do.
#[derive(Default)]
pub struct Executions {
    pub count: usize,
    /// Of them, those with a key that had come before.
    pub repeated: usize,
    keys: HashSet<u128>,
}

enum Role {
    Upstream { reader: Reader<Answer>, answer: Option<Answer> },
    Client { reader: Reader<Reply>, head: Vec<u8>, due: Instant },
}

struct Connection {
    stream: TcpStream,
    role: Role,
    /// Bytes of the message under way that are written.
    written: usize,
    /// Whether epoll tells when it can be written to.
    waits_to_write: bool,
}

pub struct Ends {
    epoll: OwnedFd,
    listener: TcpListener,
    address: SocketAddr,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    events: Vec<epoll::Event>,
    scratch: Vec<u8>,
    answers: Answers,
    executions: Executions,
    /// Until it is true, requests wait for their answers, on these connections.
    hold: Option<Arc<AtomicBool>>,
    held: Vec<usize>,
}

/// The clients' side of one load.
struct Load<'a> {
    source: &'a mut dyn Source,
    count: usize,
    sent: usize,
    /// Between two requests; `None`: as fast as answers come.
    interval: Option<Duration>,
    started: Instant,
    idle: Vec<usize>,
    latencies: Vec<u64>,
    replayed: usize,
}

impl Load<'_> {
    /// When the next request is due.
    fn due(&self, now: Instant) -> Option<Instant> {
        if self.sent == self.count {
            return None;
        }
        match self.interval {
            None => Some(now),
            Some(interval) => {
                let due = self.started + interval.mul_f64(self.sent as f64);
                (due <= now).then_some(due)
            }
        }
    }
}

impl Ends {
    pub fn new() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
        let nothing = epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        Ok(Self {
            epoll,
            address: listener.local_addr()?,
            listener,
            connections: Vec::new(),
            free: Vec::new(),
            events: vec![nothing; 256],
            scratch: vec![0; 128 << 10],
            answers: Answers::new(),
            executions: Executions::default(),
            hold: None,
            held: Vec::new(),
        })
    }

    /// Where the upstream listens.
    pub fn upstream(&self) -> SocketAddr {
        self.address
    }

    /// What has come to the upstream since this was asked last.
    pub fn take_executions(&mut self) -> Executions {
        std::mem::take(&mut self.executions)
    }

    /// The upstream answers nothing until `open` is true.
    pub fn hold_until(&mut self, open: Arc<AtomicBool>) {
        self.hold = Some(open);
    }

    fn release(&mut self) -> Result<()> {
        if self.hold.take_if(|open| open.load(Ordering::Acquire)).is_some() {
            for at in std::mem::take(&mut self.held) {
                if let Some(connection) = &mut self.connections[at] {
                    write(&self.epoll, at, connection, &[], &self.answers)?;
                }
            }
        }
        Ok(())
    }

    /// Opens connections for `load`.
    pub fn connect(&mut self, to: SocketAddr, count: usize) -> Result<Vec<usize>> {
        (0..count)
            .map(|_| {
                let stream = TcpStream::connect(to)?;
                let role = Role::Client { reader: Reader::new(), head: Vec::new(), due: Instant::now() };
                self.add(stream, role)
            })
            .collect()
    }

    pub fn disconnect(&mut self, clients: Vec<usize>) {
        for at in clients {
            self.close(at);
        }
    }

    /// Sends `count` requests, at most one at a time on each of the connections, and waits for all answers.
    pub fn load(
        &mut self,
        clients: &[usize],
        source: &mut dyn Source,
        count: usize,
        interval: Option<Duration>,
    ) -> Result<Loaded> {
        let started = Instant::now();
        let (idle, latencies) = (clients.to_vec(), Vec::with_capacity(count));
        let mut load = Load { source, count, sent: 0, interval, started, idle, latencies, replayed: 0 };
        let mut progress = (0, started);
        loop {
            let now = Instant::now();
            while let Some(due) = load.due(now) {
                let Some(at) = load.idle.pop() else { break };
                load.sent += 1;
                self.send(at, due, load.source)?;
            }
            let done = load.latencies.len();
            if done == count {
                let (elapsed, replayed) = (started.elapsed(), load.replayed);
                return Ok(Loaded { latencies: load.latencies, elapsed, replayed });
            }
            if done > progress.0 {
                progress = (done, now);
            } else if now - progress.1 > STALLED {
                return Err(malformed(&format!("{done} of {count} answers, and no more of them")));
            }
            // A paced load spins: a timer would come late, and this core has nothing else to do.
            let wait = match (interval, &self.hold) {
                (Some(_), _) => Duration::ZERO,
                (None, Some(_)) => Duration::from_millis(1),
                (None, None) => Duration::from_secs(1),
            };
            self.turn(wait, Some(&mut load))?;
            self.release()?;
        }
    }

    /// Answers as the upstream while `running` says so; it is asked every few milliseconds.
    pub fn serve_while(&mut self, mut running: impl FnMut() -> Result<bool>) -> Result<()> {
        let mut asked = Instant::now();
        loop {
            self.turn(Duration::from_millis(2), None)?;
            if asked.elapsed() >= Duration::from_millis(2) {
                if !running()? {
                    return Ok(());
                }
                asked = Instant::now();
            }
        }
    }

    fn add(&mut self, stream: TcpStream, role: Role) -> Result<usize> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let at = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        epoll::add(&self.epoll, &stream, epoll::EventData::new_u64(at as u64), epoll::EventFlags::IN)?;
        self.connections[at] = Some(Connection { stream, role, written: 0, waits_to_write: false });
        Ok(at)
    }

    fn close(&mut self, at: usize) {
        // Closed, a descriptor leaves epoll by itself. An event of this turn that was meant for it can only make its
        // successor read once in vain.
        if self.connections[at].take().is_some() {
            self.free.push(at);
        }
    }

    fn turn(&mut self, wait: Duration, mut load: Option<&mut Load<'_>>) -> Result<()> {
        let timeout = rustix::event::Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        };
        let mut events = std::mem::take(&mut self.events);
        let count = match epoll::wait(&self.epoll, &mut events[..], Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => 0,
            result => result?,
        };
        for event in &events[..count] {
            match event.data.u64() {
                LISTENER => self.accept()?,
                at => self.ready(at as usize, event.flags, load.as_deref_mut())?,
            }
        }
        self.events = events;
        Ok(())
    }

    fn accept(&mut self) -> Result<()> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    self.add(stream, Role::Upstream { reader: Reader::new(), answer: None })?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn ready(&mut self, at: usize, flags: epoll::EventFlags, load: Option<&mut Load<'_>>) -> Result<()> {
        let Some(connection) = &mut self.connections[at] else { return Ok(()) };
        if flags.contains(epoll::EventFlags::OUT) {
            let body = load.as_ref().map_or(&[][..], |load| load.source.body());
            write(&self.epoll, at, connection, body, &self.answers)?;
        }
        if !flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            return Ok(());
        }
        let read = match connection.stream.read(&mut self.scratch) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            result => result,
        };
        match (&mut connection.role, read) {
            (Role::Upstream { reader, answer }, Ok(len @ 1..)) => {
                let executions = &mut self.executions;
                let begin = |head: &[u8]| {
                    if let Some(key) = http::key(head)? {
                        executions.repeated += usize::from(!executions.keys.insert(key));
                    }
                    executions.count += 1;
                    Answer::to(head)
                };
                reader.feed(&self.scratch[..len], begin, |found| *answer = Some(found))?;
                if answer.is_some() && self.hold.is_some() {
                    self.held.push(at);
                } else if answer.is_some() {
                    write(&self.epoll, at, connection, &[], &self.answers)?;
                }
            }
            // The proxy closes a connection of its pool.
            (Role::Upstream { .. }, _) => self.close(at),
            (Role::Client { reader, due, .. }, Ok(len @ 1..)) => {
                let (due, load) = (*due, load.ok_or_else(|| malformed("an answer that nobody asked for"))?);
                let mut complete = None;
                reader.feed(&self.scratch[..len], Reply::of, |reply| complete = Some(reply))?;
                match complete {
                    None => {}
                    Some(Reply { status: 200..300, replayed }) => {
                        load.replayed += usize::from(replayed);
                        load.latencies.push(u64::try_from(due.elapsed().as_nanos()).unwrap_or(u64::MAX));
                        match load.due(Instant::now()) {
                            Some(due) => {
                                load.sent += 1;
                                self.send(at, due, load.source)?;
                            }
                            None => load.idle.push(at),
                        }
                    }
                    Some(Reply { status, .. }) => {
                        let text = String::from_utf8_lossy(&self.scratch[..len]);
                        return Err(malformed(&format!("{status} where 2xx was due: {text}")));
                    }
                }
            }
            (Role::Client { .. }, Ok(_)) => return Err(malformed("the proxy closed a client's connection")),
            (Role::Client { .. }, Err(error)) => return Err(error),
        }
        Ok(())
    }

    fn send(&mut self, at: usize, when: Instant, source: &mut dyn Source) -> Result<()> {
        let Some(connection) = &mut self.connections[at] else { return Err(malformed("a closed connection")) };
        if let Role::Client { head, due, .. } = &mut connection.role {
            source.next(head);
            *due = when;
        }
        write(&self.epoll, at, connection, source.body(), &self.answers)
    }
}

/// Writes what is left of the message under way; what the socket does not take is written when it can be.
fn write(epoll: &OwnedFd, at: usize, connection: &mut Connection, body: &[u8], answers: &Answers) -> Result<()> {
    let (head, body) = match &connection.role {
        Role::Upstream { answer: Some(answer), .. } => (answers.bytes(*answer), &[][..]),
        Role::Upstream { answer: None, .. } => return Ok(()),
        Role::Client { head, .. } => (&head[..], body),
    };
    let total = head.len() + body.len();
    let mut blocked = false;
    while connection.written < total && !blocked {
        let in_head = connection.written.min(head.len());
        let parts = [IoSlice::new(&head[in_head..]), IoSlice::new(&body[connection.written - in_head..])];
        match connection.stream.write_vectored(&parts) {
            Ok(written) => connection.written += written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => blocked = true,
            Err(error) => return Err(error),
        }
    }
    if !blocked {
        connection.written = 0;
        if let Role::Upstream { answer, .. } = &mut connection.role {
            *answer = None;
        }
    }
    if blocked != connection.waits_to_write {
        connection.waits_to_write = blocked;
        let flags = if blocked { epoll::EventFlags::IN | epoll::EventFlags::OUT } else { epoll::EventFlags::IN };
        epoll::modify(epoll, connection.stream.as_fd(), epoll::EventData::new_u64(at as u64), flags)?;
    }
    Ok(())
}
