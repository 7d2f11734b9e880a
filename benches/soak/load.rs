//! The load: requests of all kinds at a steady pace, each by one of a number of clients.

use crate::random::Random;
use crate::script::{Reply, Script};
use crate::wire::{Kind, Message, Reader};
use crate::world::{Purpose, World, key_text, payload};
use socket2::SockRef;
use std::io::{Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const CLIENTS: usize = 100;
/// With the duplicates 400 requests a second.
const EVENTS_PER_S: f64 = 380.0;
const PATIENCE: Duration = Duration::from_secs(20);
/// Well below the time after which the gateway closes an idle connection.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// Keys begun in the last ten seconds.
const RECENT: u64 = 2400;

#[derive(Clone, Copy)]
pub(crate) enum Job {
    Post {
        number: u64,
        script: Script,
        fresh: bool,
    },
    /// A key that has a record, with another payload.
    Altered(u64),
    HangUp {
        number: u64,
        reset: bool,
    },
    /// Half a body; then nothing more, or the end.
    Half {
        number: u64,
        stalls: bool,
    },
    Unkeyed {
        number: u64,
        script: Script,
    },
    Get {
        number: u64,
        script: Script,
    },
    Malformed(u64),
}

/// What passes through is not cut off: its client would get half an answer, rightly.
fn pass_script(random: &mut Random) -> Script {
    match random.below(50) {
        0 => Script::Lost,
        1 => Script::Busy,
        2 => Script::Failed,
        3 => Script::Large,
        4 => Script::Throttled,
        _ => Script::After(0),
    }
}

fn choose(world: &World, random: &mut Random) -> Vec<Job> {
    let now = Script::After(0);
    let fresh = |script| Job::Post { number: world.number(), script, fresh: true };
    let again = |number: Option<u64>| number.map(|number| Job::Post { number, script: now, fresh: false });
    match random.below(1000) {
        0..480 => vec![fresh(now)],
        480..530 => vec![fresh(Script::faulty(random))],
        530..550 => vec![fresh(if random.percent(30) { Script::faulty(random) } else { now }); 4],
        550..700 => again(world.used(random, RECENT)).into_iter().collect(),
        700..830 => again(world.used(random, u64::MAX)).into_iter().collect(),
        830..900 => vec![Job::Get { number: world.number(), script: pass_script(random) }],
        900..935 => vec![Job::Unkeyed { number: world.number(), script: pass_script(random) }],
        935..960 => vec![Job::Malformed(random.next())],
        960..980 => vec![Job::HangUp { number: world.number(), reset: random.percent(50) }],
        980..990 => vec![Job::Half { number: world.number(), stalls: random.percent(30) }],
        _ => world.completed(random).map(Job::Altered).into_iter().collect(),
    }
}

/// Until `end`; waits for the last answers.
pub(crate) fn run(world: &Arc<World>, gateway: SocketAddr, mut random: Random, end: Instant) {
    let (jobs, clients) = clients(world, gateway);
    let (begun, mut events) = (Instant::now(), 0.0);
    loop {
        let due = begun + Duration::from_secs_f64(events / EVENTS_PER_S);
        if due >= end {
            break;
        }
        thread::sleep(due.saturating_duration_since(Instant::now()));
        for job in choose(world, &mut random) {
            jobs.send(job).unwrap();
        }
        events += 1.0;
    }
    drop(jobs);
    for client in clients {
        client.join().unwrap();
    }
}

/// The keys of the last seconds once more: none of them may be in progress any more.
pub(crate) fn revisit(world: &Arc<World>, gateway: SocketAddr, mut random: Random) {
    let (jobs, clients) = clients(world, gateway);
    for _ in 0..500 {
        if let Some(number) = world.used(&mut random, 2 * RECENT) {
            jobs.send(Job::Post { number, script: Script::After(0), fresh: false }).unwrap();
        }
    }
    drop(jobs);
    for client in clients {
        client.join().unwrap();
    }
}

fn clients(world: &Arc<World>, gateway: SocketAddr) -> (SyncSender<Job>, Vec<JoinHandle<()>>) {
    let (send, receive) = sync_channel(2000);
    let receive = Arc::new(Mutex::new(receive));
    let clients = (0..CLIENTS).map(|_| {
        let (world, receive) = (Arc::clone(world), Arc::clone(&receive));
        thread::spawn(move || Client { world, gateway, kept: None }.run(&receive))
    });
    (send, clients.collect())
}

struct Connection {
    stream: TcpStream,
    reader: Reader,
    used: Instant,
}

impl Connection {
    fn open(gateway: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(gateway)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream, reader: Reader::new(Kind::Response), used: Instant::now() })
    }

    fn exchange(&mut self, bytes: &[u8]) -> Result<Message> {
        self.stream.write_all(bytes)?;
        self.reader.read(&mut self.stream)
    }
}

/// A request's text. The script says what the upstream is to do, should it get that far.
fn request(method: &str, number: u64, script: Script, key: Option<&str>, body: &[u8]) -> Vec<u8> {
    let key = key.map_or(String::new(), |key| format!("Idempotency-Key: {key}\r\n"));
    let len = if method == "POST" { format!("Content-Length: {}\r\n", body.len()) } else { String::new() };
    let head = format!(
        "{method} /posts HTTP/1.1\r\nHost: soak.example\r\nAuthorization: Bearer tenant-{}\r\n\
         Content-Type: application/json\r\n{key}X-Number: {number}\r\nX-Script: {}\r\n{len}\r\n",
        number % 2,
        script.text()
    );
    [head.as_bytes(), body].concat()
}

fn keyed(number: u64, script: Script, body: &[u8]) -> Vec<u8> {
    request("POST", number, script, Some(&key_text(number)), body)
}

struct Client {
    world: Arc<World>,
    gateway: SocketAddr,
    kept: Option<Connection>,
}

impl Client {
    fn run(&mut self, jobs: &Mutex<Receiver<Job>>) {
        loop {
            let job = jobs.lock().unwrap().recv();
            match job {
                Err(_) => return,
                Ok(Job::Post { number, script, fresh }) => self.post(number, script, fresh),
                Ok(Job::Unkeyed { number, script }) => {
                    self.judged(number, script, Purpose::Unkeyed);
                }
                Ok(Job::Altered(number)) => self.alter(number),
                Ok(Job::HangUp { number, reset }) => self.hang_up(number, reset),
                Ok(Job::Half { number, stalls }) => self.half(number, stalls),
                Ok(Job::Get { number, script }) => self.get(number, script),
                Ok(Job::Malformed(choice)) => self.malformed(choice),
            }
        }
    }

    /// Over the connection that is kept, if there is one.
    fn exchange(&mut self, bytes: &[u8]) -> Result<Message> {
        let mut connection = match self.kept.take().filter(|kept| kept.used.elapsed() < IDLE_MAX) {
            Some(kept) => kept,
            None => Connection::open(self.gateway)?,
        };
        let answer = connection.exchange(bytes)?;
        if answer.field("connection").is_none_or(|value| !value.eq_ignore_ascii_case("close")) {
            connection.used = Instant::now();
            self.kept = Some(connection);
        }
        Ok(answer)
    }

    fn post(&mut self, number: u64, script: Script, fresh: bool) {
        let before = self.world.disturbances();
        let begun = Instant::now();
        let label = self.judged(number, script, Purpose::Keyed);
        let took = begun.elapsed();
        let undisturbed = before.is_multiple_of(2) && before == self.world.disturbances();
        if fresh && script == Script::After(0) && undisturbed && label == "201" {
            self.world.latencies.lock().unwrap().push(took);
        }
    }

    fn judged(&mut self, number: u64, script: Script, purpose: Purpose) -> String {
        let attempt = self.world.begins(number, purpose);
        let body = payload(number);
        let bytes = match purpose {
            Purpose::Unkeyed => request("POST", number, script, None, &body),
            _ => keyed(number, script, &body),
        };
        let sent = Instant::now();
        let label = match self.exchange(&bytes) {
            Ok(answer) => self.world.judge(number, attempt, &answer),
            Err(error) => {
                self.world.abandoned(number, attempt);
                // A large answer is under way already when the upstream goes away.
                let outage = self.world.outages.lock().unwrap().within(sent, Instant::now());
                if !(outage && script == Script::Large) {
                    self.world.violated(&format!("{number} ({script:?}) gets no answer: {error}"));
                }
                "no answer".to_owned()
            }
        };
        self.world.counts(label.clone());
        label
    }

    fn alter(&mut self, number: u64) {
        let answer = self.exchange(&keyed(number, Script::After(0), &payload(number + 1)));
        self.expect("altered", answer, 422, "key_reused");
    }

    fn expect(&self, what: &str, answer: Result<Message>, status: u16, code: &str) {
        let (got, body) = match answer {
            Ok(answer) => (answer.status(), String::from_utf8_lossy(&answer.body).into_owned()),
            Err(error) => (0, error.to_string()),
        };
        if got != status || !(body.is_empty() || body.contains(&format!("\"code\":\"{code}\""))) {
            self.world.violated(&format!("{what}: {got} {body} instead of {status} {code}"));
        }
        self.world.counts(format!("{got} {code}"));
    }

    /// The whole request, and then nobody is there for the answer.
    fn hang_up(&self, number: u64, reset: bool) {
        let attempt = self.world.begins(number, Purpose::Keyed);
        if let Ok(mut connection) = Connection::open(self.gateway) {
            let _ = connection.stream.write_all(&keyed(number, Script::After(0), &payload(number)));
            if reset {
                let _ = SockRef::from(&connection.stream).set_linger(Some(Duration::ZERO));
            }
        }
        self.world.abandoned(number, attempt);
        self.world.counts("hung up".to_owned());
    }

    fn half(&self, number: u64, stalls: bool) {
        let attempt = self.world.begins(number, Purpose::Refused);
        let bytes = keyed(number, Script::After(0), &payload(number));
        let Ok(mut connection) = Connection::open(self.gateway) else { return };
        let sent = connection.stream.write_all(&bytes[..bytes.len() - 20]);
        if stalls {
            let answer = sent.and_then(|()| connection.reader.read(&mut connection.stream));
            self.expect("half a body", answer, 408, "request_timeout");
        } else {
            self.world.counts("half a body".to_owned());
        }
        self.world.abandoned(number, attempt);
    }

    fn get(&mut self, number: u64, script: Script) {
        let sent = Instant::now();
        let answer = self.exchange(&request("GET", number, script, None, b""));
        let outage = self.world.outages.lock().unwrap().within(sent, Instant::now());
        let label = match &answer {
            Ok(answer) if answer.field("x-serial").is_some() => {
                let said = Reply::of(script, number);
                if answer.status() != said.status || answer.body != said.body {
                    self.world.violated(&format!("GET gets {} instead of {}", answer.status(), said.status));
                }
                format!("GET {}", answer.first)
            }
            Ok(answer) => {
                let expected = if script == Script::Lost { 504 } else { 0 };
                if answer.status() != expected && !(outage && answer.status() == 502) {
                    self.world.violated(&format!("GET ({script:?}) gets {}", answer.status()));
                }
                format!("GET {}, the gateway's", answer.first)
            }
            Err(error) => {
                if !(outage && script == Script::Large) {
                    self.world.violated(&format!("GET ({script:?}) gets no answer: {error}"));
                }
                "GET no answer".to_owned()
            }
        };
        self.world.counts(label);
    }

    /// Each on a connection of its own, which the gateway mostly closes.
    fn malformed(&self, choice: u64) {
        let head = "POST /posts HTTP/1.1\r\nHost: soak.example\r\n";
        let bearer = "Authorization: Bearer tenant-0\r\n";
        let end = "Content-Length: 2\r\n\r\n{}";
        let (text, status, code) = match choice % 8 {
            0 => (format!("{head}{bearer}Idempotency-Key: \"open\r\n{end}"), 400, "key_invalid"),
            1 => (format!("{head}{bearer}Idempotency-Key: a\r\nIdempotency-Key: b\r\n{end}"), 400, "key_invalid"),
            2 => (format!("{head}X-Api-Key: secret\r\nIdempotency-Key: a\r\n{end}"), 400, "scope_missing"),
            3 => (format!("{head}{bearer}No colon\r\nIdempotency-Key: a\r\n{end}"), 400, "bad_request"),
            4 => {
                let declared = "Content-Length: 2000000\r\n\r\n";
                (format!("{head}{bearer}Idempotency-Key: a\r\n{declared}"), 413, "body_too_large")
            }
            5 => (format!("{head}{bearer}Idempotency-Key: a\r\nContent-Length: 1x\r\n\r\n"), 400, "bad_request"),
            6 => {
                let path = head.replace("/posts", "/POSTS");
                (format!("{path}{bearer}Idempotency-Key: a\r\n{end}"), 400, "path_ambiguous")
            }
            _ => {
                let fields = "X-Filler: ........................................\r\n".repeat(1300);
                (format!("{head}{bearer}Idempotency-Key: a\r\n{fields}{end}"), 431, "headers_too_large")
            }
        };
        let answer = Connection::open(self.gateway).and_then(|mut connection| connection.exchange(text.as_bytes()));
        // The answer may be lost with what was not read of so long a head.
        if status == 431 && answer.is_err() {
            return self.world.counts("431 lost".to_owned());
        }
        self.expect("malformed", answer, status, code);
    }
}
