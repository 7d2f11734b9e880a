//! A storm: clients that retry through all gateways, while gateways are killed and stopped, their network fails, and the
//! store is killed. Then an audit by what the clients and the upstream have seen.

mod adversary;
mod end;

use crate::audit::random::Random;
use crate::audit::{Call, Did, History, Ill, KeyOf, Promise, Visit, Word};
use crate::fleet::{DATE, Fleet, LEASE};
use crate::http::word;
use crate::server::{Engine, Server};
use crate::support::upstream::Reply;
use crate::support::{Client, Gateway, Received, Upstream, post};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const GATEWAYS: usize = 3;
const RESPONSE_TIMEOUT: Duration = Duration::from_millis(600);
const LATE_WINDOW: Duration = Duration::from_millis(1000);
const SETTINGS: &str = "upstream.response_timeout = \"600ms\"\nupstream.late_window = \"1000ms\"\n\
                        idempotency.wait_timeout = \"300ms\"\nserver.workers = 1\n";
/// So much before its window ends, an answer may come too late all the same: the gateway began to wait earlier.
const LATE: Duration = Duration::from_millis(300);
const PROMISE: Promise = Promise {
    retention: Duration::from_secs(24 * 60 * 60),
    // A lease, and until an outcome that could not be recorded is tried again.
    aftermath: LEASE.saturating_add(Duration::from_secs(2)),
    patience: crate::support::PATIENCE,
};
/// Of a key that is sent with two bodies, which is sent mostly.
const BODIES: [&str; 2] = ["{\"body\":\"one\"}", "{\"body\":\"other\"}"];

#[derive(Default)]
struct Counts {
    kills: AtomicU64,
    stops: AtomicU64,
    cuts: AtomicU64,
    stalls: AtomicU64,
    store_kills: AtomicU64,
    store_pauses: AtomicU64,
}

/// One gateway's place in the fleet: killed, it is started again.
struct Place {
    gateway: Mutex<Option<Gateway>>,
    addr: Mutex<SocketAddr>,
}

/// All that the threads share.
struct Storm {
    seed: u64,
    server: Arc<Server>,
    proxies: Vec<crate::proxy::Proxy>,
    places: Vec<Place>,
    keys: u64,
    next_key: AtomicU64,
    stop: AtomicBool,
    visits: Arc<Visits>,
    /// Gateways that were killed.
    graves: Mutex<Vec<Gateway>>,
    counts: Counts,
}

/// What the upstream does; with the history of all that was seen.
struct Visits {
    seed: u64,
    began: Instant,
    /// From the end on it executes at once.
    calm: AtomicBool,
    history: Mutex<History>,
}

fn key_of(key: &str) -> KeyOf {
    (String::new(), key.to_owned())
}

impl Visits {
    fn upstream(self: &Arc<Self>) -> Upstream {
        let visits = Arc::clone(self);
        Upstream::scripted(move |request, reply| visits.serve(request, reply))
    }

    fn serve(&self, request: &Received, reply: &mut Reply<'_>) {
        let (key, at) = (request.key().expect("a key").to_owned(), self.began.elapsed());
        let mixed = key.bytes().fold(self.seed, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let body = BODIES.iter().position(|body| request.body == body.as_bytes()).unwrap_or(BODIES.len());
        let mut history = self.history.lock().unwrap();
        let nth = history.visits.get(&key_of(&key)).map_or(0, Vec::len);
        let mut random = Random(mixed.wrapping_add(nth as u64));
        let dice = if self.calm.load(Ordering::SeqCst) { 0 } else { random.below(100) };
        let number = random.next();
        let did = match dice {
            0..80 => Did::Executed { number, in_time: true },
            80..84 => Did::ExecutedUnknown,
            84..86 => Did::LostUnknown,
            _ => Did::Refused,
        };
        history.visit(&key_of(&key), Visit { at, body, did });
        drop(history);
        thread::sleep(match dice {
            // Too late for the caller, in time for the record.
            70..74 => RESPONSE_TIMEOUT + random.ms(10, 800),
            // Too late for both.
            74 => RESPONSE_TIMEOUT + LATE_WINDOW + random.ms(50, 300),
            _ if dice % 4 == 3 => random.ms(1, 120),
            _ => Duration::ZERO,
        });
        // Before the answer is there: whoever has it may ask.
        if matches!(did, Did::Executed { .. }) && self.began.elapsed() > at + RESPONSE_TIMEOUT + LATE_WINDOW - LATE {
            let mut history = self.history.lock().unwrap();
            history.visits.get_mut(&key_of(&key)).expect("its own")[nth].did = Did::Executed { number, in_time: false };
        }
        let body = format!("{{\"key\":\"{key}\",\"execution\":{number}}}{}", "x".repeat(random.below(3000) as usize));
        let headers = [
            ("Date", DATE),
            ("Content-Type", "text/plain"),
            ("Location", &format!("/posts/{number}")),
            ("X-Two", "one"),
            ("X-Two", "two"),
            ("Set-Cookie", "not=recorded"),
        ];
        match did {
            // 500 is final, too.
            Did::Executed { .. } => reply.send(if dice % 16 == 15 { 500 } else { 201 }, &headers, body),
            Did::ExecutedUnknown if dice % 2 == 0 => reply.send(502, &[("X-Scripted", "unknown")], "executed"),
            Did::ExecutedUnknown => {
                reply.raw("HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\ncut off");
                reply.reset();
            }
            Did::LostUnknown => reply.reset(),
            Did::Refused => {
                let status = if dice % 2 == 0 { 429 } else { 503 };
                reply.send(status, &[("X-Scripted", "refused"), ("Retry-After", "0")], "");
            }
        }
    }
}

impl Storm {
    /// What all its keys begin with.
    fn key_prefix(&self) -> String {
        format!("s{}-k", self.seed)
    }

    /// Sends keyed requests until all keys are done; one that was begun is mostly brought to its end.
    fn client(&self, thread: u64) {
        let mut random = Random(self.seed ^ (thread + 1).wrapping_mul(0x1234_5678_9abc_def1));
        loop {
            let number = self.next_key.fetch_add(1, Ordering::SeqCst);
            if number >= self.keys {
                return;
            }
            let key = format!("{}{number}", self.key_prefix());
            let two_bodies = random.below(10) == 0;
            let (sends, parallel) = (1 + random.below(6), random.below(3) == 0);
            let choices = (0..sends)
                .map(|_| Attempt {
                    gateway: random.below(GATEWAYS as u64) as usize,
                    body: usize::from(two_bodies && random.below(2) == 0),
                    hangs_up: random.below(8) == 0,
                })
                .collect::<Vec<_>>();
            if parallel {
                thread::scope(|scope| {
                    for choice in &choices {
                        scope.spawn(|| self.attempt(&key, *choice));
                    }
                });
            } else {
                for choice in choices {
                    self.attempt(&key, choice);
                }
            }
            let abandoned = random.below(8) == 0;
            let began = Instant::now();
            while !abandoned {
                let gateway = random.below(GATEWAYS as u64) as usize;
                let body = usize::from(two_bodies && random.below(4) == 0);
                if self.attempt(&key, Attempt { gateway, body, hangs_up: false }) {
                    break;
                }
                assert!(began.elapsed() < crate::support::PATIENCE * 3, "{key} comes to no end");
                thread::sleep(random.ms(1, 20));
            }
        }
    }

    /// One request; whether its answer ends the matter.
    fn attempt(&self, key: &str, choice: Attempt) -> bool {
        let Attempt { gateway, body, hangs_up } = choice;
        let (addr, sent) = (*self.places[gateway].addr.lock().unwrap(), self.visits.began.elapsed());
        let answer = Client::try_connect(addr).ok().and_then(|mut client| {
            client.try_send(post("/posts", key, BODIES[body]));
            if hangs_up {
                client.reset();
                return None;
            }
            client.try_read()
        });
        let word = word(answer.as_ref(), DATE);
        // What is odd is told by the audit.
        let ends = matches!(word, Word::Final { .. } | Word::Unknown | Word::Odd(_));
        let call = Call { sent, ended: self.visits.began.elapsed(), gateway, body, word };
        self.visits.history.lock().unwrap().call(&key_of(key), call);
        ends
    }

    /// Something has been wrong with a gateway since then.
    fn trouble(&self, from: Instant) {
        let from = from - self.visits.began;
        self.visits.history.lock().unwrap().trouble(from, self.visits.began.elapsed(), Ill::Gateway);
    }
}

#[derive(Clone, Copy)]
struct Attempt {
    gateway: usize,
    body: usize,
    hangs_up: bool,
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect(variable))
}

fn storms(engine: Engine) {
    let fresh = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64 % 1_000_000_000;
    let first = number("ONCEGATE_FLEET_FIRST_SEED").unwrap_or_else(fresh);
    for seed in first..first + number("ONCEGATE_FLEET_SEEDS").unwrap_or(1) {
        let Some(server) = Server::start(engine) else { return };
        eprintln!("{engine:?}: ONCEGATE_FLEET_FIRST_SEED={seed}");
        storm(server, seed, number("ONCEGATE_FLEET_KEYS").unwrap_or(400));
    }
}

fn storm(server: Arc<Server>, seed: u64, keys: u64) {
    let (began, clients) = (Instant::now(), number("ONCEGATE_FLEET_CLIENTS").unwrap_or(10));
    let visits = Arc::new(Visits { seed, began, calm: AtomicBool::new(false), history: Mutex::default() });
    let environment = vec![("RUST_LOG", "oncegate=warn,oncegate::run=info")];
    // One of them always asks the store.
    let each = (0..GATEWAYS).map(|n| {
        let cache = if n == 0 { "cache.max_bytes = 0\n" } else { "" };
        (format!("{SETTINGS}{cache}"), environment.clone())
    });
    let Fleet { gateways, proxies, upstream, server, .. } =
        Fleet::of(server, visits.upstream(), &each.collect::<Vec<_>>());
    let places = gateways
        .into_iter()
        .map(|gateway| Place { addr: Mutex::new(gateway.addr), gateway: Mutex::new(Some(gateway)) });
    let storm = Storm {
        seed,
        server,
        proxies,
        places: places.collect(),
        keys,
        next_key: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        visits,
        graves: Mutex::default(),
        counts: Counts::default(),
    };
    thread::scope(|scope| {
        // The adversary stops whatever happens here, a panic included.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let _stop = Stop(&storm.stop);
        let storm = &storm;
        scope.spawn(|| storm.trouble_gateways());
        scope.spawn(|| storm.trouble_networks());
        scope.spawn(|| storm.trouble_the_store());
        let clients = (0..clients).map(|thread| scope.spawn(move || storm.client(thread))).collect::<Vec<_>>();
        for client in clients {
            client.join().unwrap();
        }
    });
    let stormed = began.elapsed();
    let tally = storm.end();
    storm.report(tally, stormed, began.elapsed());
    drop(upstream);
}

fn no_key_is_executed_twice_nothing_seen_is_forgotten_and_none_is_stuck(engine: Engine) {
    storms(engine);
}

for_each_store!(no_key_is_executed_twice_nothing_seen_is_forgotten_and_none_is_stuck);
