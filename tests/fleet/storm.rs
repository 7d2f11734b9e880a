//! A storm: clients that retry through all gateways, while gateways are killed and stopped, their network fails, and the
//! store is killed. Then an audit by what the clients and the upstream have seen.

mod adversary;
mod audit;
mod history;

use crate::fleet::{DATE, Fleet, problem};
use crate::random::Random;
use crate::server::{Engine, Server};
use crate::support::upstream::Reply;
use crate::support::{Client, Gateway, Received, Upstream, post};
use history::{Answer, History, classify};
use std::collections::{BTreeMap, BTreeSet};
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
/// Of a key that is sent with two bodies, which is sent mostly.
const BODIES: [&str; 2] = ["{\"body\":\"one\"}", "{\"body\":\"other\"}"];

/// What the upstream did with one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Visit {
    /// With a final answer, in time or not, which bears this number.
    Executed(u64),
    /// Executed, and no gateway can know.
    ExecutedUnknown,
    /// Not executed, but no gateway can know.
    LostUnknown,
    /// Not executed, and the answer says so.
    Refused,
}

#[derive(Default)]
struct Counts {
    requests: AtomicU64,
    /// Without an answer: the gateway was gone, or the client.
    unanswered: AtomicU64,
    refused: AtomicU64,
    unavailable: AtomicU64,
    other_body: AtomicU64,
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
    deaths: AtomicU64,
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
    histories: Mutex<BTreeMap<String, History>>,
    /// Keys that turned out to be the second body's.
    other_bodies: Mutex<BTreeSet<String>>,
    /// When a gateway was killed, or stopped.
    deaths: Mutex<Vec<Instant>>,
    /// Gateways that were killed.
    graves: Mutex<Vec<Gateway>>,
    counts: Counts,
}

/// What the upstream has seen.
struct Visits {
    seed: u64,
    /// From the end on it executes at once.
    calm: AtomicBool,
    by_key: Mutex<BTreeMap<String, Vec<Visit>>>,
}

impl Visits {
    fn upstream(self: &Arc<Self>) -> Upstream {
        let visits = Arc::clone(self);
        Upstream::scripted(move |request, reply| visits.serve(request, reply))
    }

    fn serve(&self, request: &Received, reply: &mut Reply<'_>) {
        let key = request.key().expect("a key").to_owned();
        let mixed = key.bytes().fold(self.seed, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let mut by_key = self.by_key.lock().unwrap();
        let visits = by_key.entry(key.clone()).or_default();
        let mut random = Random(mixed.wrapping_add(visits.len() as u64));
        let dice = if self.calm.load(Ordering::SeqCst) { 0 } else { random.below(100) };
        let number = random.next();
        let visit = match dice {
            0..80 => Visit::Executed(number),
            80..84 => Visit::ExecutedUnknown,
            84..86 => Visit::LostUnknown,
            _ => Visit::Refused,
        };
        visits.push(visit);
        drop(by_key);
        thread::sleep(match dice {
            // Too late for the caller, in time for the record.
            70..74 => RESPONSE_TIMEOUT + random.ms(10, 800),
            // Too late for both.
            74 => RESPONSE_TIMEOUT + LATE_WINDOW + random.ms(50, 300),
            _ if dice % 4 == 3 => random.ms(1, 120),
            _ => Duration::ZERO,
        });
        let body = format!("{{\"key\":\"{key}\",\"execution\":{number}}}{}", "x".repeat(random.below(3000) as usize));
        let headers = [
            ("Date", DATE),
            ("Content-Type", "text/plain"),
            ("Location", &format!("/posts/{number}")),
            ("X-Two", "one"),
            ("X-Two", "two"),
            ("Set-Cookie", "not=recorded"),
        ];
        match visit {
            // 500 is final, too.
            Visit::Executed(_) => reply.send(if dice % 16 == 15 { 500 } else { 201 }, &headers, body),
            Visit::ExecutedUnknown if dice % 2 == 0 => reply.send(502, &[("X-Scripted", "unknown")], "executed"),
            Visit::ExecutedUnknown => {
                reply.raw("HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\ncut off");
                reply.reset();
            }
            Visit::LostUnknown => reply.reset(),
            Visit::Refused => {
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
            self.histories.lock().unwrap().insert(key.clone(), History::new(two_bodies));
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
            self.histories.lock().unwrap().get_mut(&key).unwrap().ended = Instant::now();
        }
    }

    /// One request; whether its answer ends the matter.
    fn attempt(&self, key: &str, choice: Attempt) -> bool {
        self.counts.requests.fetch_add(1, Ordering::Relaxed);
        let Attempt { gateway, body, hangs_up } = choice;
        let place = &self.places[gateway];
        let (addr, deaths) = (*place.addr.lock().unwrap(), place.deaths.load(Ordering::SeqCst));
        let answer = Client::try_connect(addr).ok().and_then(|mut client| {
            client.try_send(post("/posts", key, BODIES[body]));
            if hangs_up {
                client.reset();
                return None;
            }
            client.try_read()
        });
        let mut histories = self.histories.lock().unwrap();
        let history = histories.get_mut(key).unwrap();
        history.answers.push((Instant::now(), gateway, answer.as_ref().map(classify)));
        let Some(answer) = answer else {
            self.counts.unanswered.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        match classify(&answer) {
            Answer::Final => {
                history.see_final(key, body, answer, (gateway, deaths));
                true
            }
            Answer::Unknown => {
                history.see_unknown(key);
                true
            }
            Answer::KeyReused => {
                assert!(history.two_bodies, "{key}: nobody has sent another body");
                self.counts.other_body.fetch_add(1, Ordering::Relaxed);
                false
            }
            Answer::Refused => {
                self.counts.refused.fetch_add(1, Ordering::Relaxed);
                false
            }
            Answer::Unavailable => {
                self.counts.unavailable.fetch_add(1, Ordering::Relaxed);
                false
            }
            Answer::InProgress | Answer::JustUnknown | Answer::TimedOut => false,
            Answer::Odd => panic!("{key}: {:?} {answer:?}", problem(&answer)),
        }
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
    let visits = Arc::new(Visits { seed, calm: AtomicBool::new(false), by_key: Mutex::default() });
    let environment = vec![("RUST_LOG", "oncegate=warn,oncegate::run=info")];
    // One of them always asks the store.
    let each = (0..GATEWAYS).map(|n| {
        let cache = if n == 0 { "cache.max_bytes = 0\n" } else { "" };
        (format!("{SETTINGS}{cache}"), environment.clone())
    });
    let Fleet { gateways, proxies, upstream, server, .. } =
        Fleet::of(server, visits.upstream(), &each.collect::<Vec<_>>());
    let places = gateways.into_iter().map(|gateway| Place {
        addr: Mutex::new(gateway.addr),
        gateway: Mutex::new(Some(gateway)),
        deaths: AtomicU64::new(0),
    });
    let storm = Storm {
        seed,
        server,
        proxies,
        places: places.collect(),
        keys,
        next_key: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        visits,
        histories: Mutex::default(),
        other_bodies: Mutex::default(),
        deaths: Mutex::default(),
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
    storm.audit();
    storm.report(stormed, began.elapsed());
    drop(upstream);
}

fn no_key_is_executed_twice_nothing_seen_is_forgotten_and_none_is_stuck(engine: Engine) {
    storms(engine);
}

for_each_store!(no_key_is_executed_twice_nothing_seen_is_forgotten_and_none_is_stuck);
