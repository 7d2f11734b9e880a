//! `kill -9` under load: no key is executed twice, and nothing that a client has seen is forgotten.
//!
//! `ONCEGATE_KILLS` says how often (20, or 8 with fjall), `ONCEGATE_PAIRS` how many pairs of faults are tried (60, or `all`);
//! `ONCEGATE_SEED` repeats a run's choices.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

#[path = "it/support/mod.rs"]
mod support;

#[allow(dead_code, reason = "shared with other tests")]
mod audit;
#[path = "audit/http.rs"]
mod http;

#[cfg(feature = "failpoints")]
#[path = "crash/failpoints.rs"]
mod failpoints;
#[cfg(feature = "failpoints")]
#[path = "crash/sweep.rs"]
mod sweep;

use audit::random::Random;
use audit::{Call, Did, History, Ill, KeyOf, Promise, Visit, Word};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use support::{Client, Gateway, Received, Upstream, post};

const CLIENTS: u64 = 6;
/// The gateway's own.
const PROMISE: Promise = Promise {
    retention: Duration::from_secs(24 * 60 * 60),
    aftermath: Duration::from_millis(200),
    patience: Duration::from_secs(60),
};
const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";

/// All that the threads share.
struct World {
    seed: u64,
    began: Instant,
    /// Where the gateway listens at present.
    gateway: Mutex<SocketAddr>,
    /// When the one before it died.
    struck: Mutex<Duration>,
    stop: AtomicBool,
    /// From the end on the upstream executes at once.
    calm: AtomicBool,
    history: Mutex<History>,
}

fn key_of(key: &str) -> KeyOf {
    (String::new(), key.to_owned())
}

fn body_of(key: &str) -> String {
    format!("{{\"for\":\"{key}\"}}")
}

impl World {
    fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            seed,
            began: Instant::now(),
            gateway: Mutex::new(([127, 0, 0, 1], 1).into()),
            struck: Mutex::default(),
            stop: AtomicBool::new(false),
            calm: AtomicBool::new(false),
            history: Mutex::default(),
        })
    }

    /// The gateway is dead, or dies now.
    fn strike(&self) {
        *self.struck.lock().unwrap() = self.began.elapsed();
    }

    /// Another one serves in its place.
    fn succeed(&self, gateway: &Gateway) {
        *self.gateway.lock().unwrap() = gateway.addr;
        let from = *self.struck.lock().unwrap();
        self.history.lock().unwrap().trouble(from, self.began.elapsed(), Ill::Gateway);
    }

    fn upstream(self: &Arc<Self>) -> Upstream {
        let world = Arc::clone(self);
        Upstream::scripted(move |request, reply| world.serve(request, reply))
    }

    fn serve(&self, request: &Received, reply: &mut support::upstream::Reply<'_>) {
        let key = request.key().expect("a key").to_owned();
        let visited = self.history.lock().unwrap().visits.get(&key_of(&key)).map_or(0, Vec::len) as u64;
        let mixed = key.bytes().fold(self.seed, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let mut random = Random(mixed.wrapping_add(visited));
        let dice = if self.calm.load(Ordering::SeqCst) { 0 } else { random.below(100) };
        let number = random.next();
        let did = match dice {
            0..80 => Did::Executed { number, in_time: true },
            80..85 => Did::ExecutedUnknown,
            85..87 => Did::LostUnknown,
            _ => Did::Refused,
        };
        let visit = Visit { at: self.began.elapsed(), body: 0, did };
        self.history.lock().unwrap().visit(&key_of(&key), visit);
        if dice % 5 == 4 {
            thread::sleep(Duration::from_millis(random.below(80)));
        }
        let body = format!("{{\"key\":\"{key}\",\"execution\":{number}}}") + &"x".repeat(random.below(3000) as usize);
        let headers = [
            ("Date", DATE),
            ("Content-Type", "text/plain"),
            ("Location", &format!("/posts/{key}")),
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
            Did::Refused if dice % 2 == 0 => reply.send(429, &[("X-Scripted", "refused"), ("Retry-After", "0")], ""),
            Did::Refused => reply.send(503, &[("X-Scripted", "refused"), ("Retry-After", "0")], ""),
        }
    }

    /// Sends keyed requests until told to stop; a key that was begun is brought to its end.
    fn client(&self, thread: u64) {
        let mut random = Random(self.seed ^ (thread + 1).wrapping_mul(0x1234_5678_9abc_def1));
        let mut number = 0;
        while !self.stop.load(Ordering::SeqCst) {
            number += 1;
            let key = format!("t{thread}-k{number}");
            let (sends, parallel, abandoned) = (1 + random.below(6), random.below(3) == 0, random.below(8) == 0);
            if parallel {
                thread::scope(|scope| {
                    for _ in 0..sends {
                        scope.spawn(|| self.attempt(&key));
                    }
                });
            } else {
                for _ in 0..sends {
                    self.attempt(&key);
                }
            }
            while !abandoned && !self.attempt(&key) {
                thread::sleep(Duration::from_millis(random.below(3)));
            }
        }
    }

    /// One request; whether its answer ends the matter.
    fn attempt(&self, key: &str) -> bool {
        let call = self.call(key);
        // What is odd is told by the audit.
        let ends = matches!(call.word, Word::Final { .. } | Word::Unknown | Word::Odd(_));
        self.history.lock().unwrap().call(&key_of(key), call);
        ends
    }

    fn call(&self, key: &str) -> Call {
        let sent = self.began.elapsed();
        let addr = *self.gateway.lock().unwrap();
        let answer = Client::try_connect(addr).ok().and_then(|mut client| {
            client.try_send(post("/posts", key, &body_of(key)));
            client.try_read()
        });
        let word = http::word(answer.as_ref(), DATE);
        Call { sent, ended: self.began.elapsed(), gateway: 0, body: 0, word }
    }

    /// The last gateway's word on every key, and the audit of all that was seen.
    fn audit(&self, what: &str, crashes: u64) {
        self.calm.store(true, Ordering::SeqCst);
        let keys = self.history.lock().unwrap().calls.keys().cloned().collect::<Vec<_>>();
        for key in keys {
            let call = self.call(&key.1);
            self.history.lock().unwrap().end(&key, call);
        }
        let history = self.history.lock().unwrap();
        let tally = history.check(&PROMISE).unwrap_or_else(|wrong| panic!("{}", wrong.join("\n")));
        let lost = history.calls.values().flatten().filter(|call| call.word == Word::Silence).count();
        eprintln!("{what}: seed {}, {crashes} crashes, {lost} calls without an answer, {tally:?}", self.seed);
        assert!(tally.finals > 0 && tally.executions > 0 && lost > 0, "there was no load");
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect(variable))
}

fn seed() -> u64 {
    let seed = number("ONCEGATE_SEED")
        .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64);
    eprintln!("ONCEGATE_SEED={seed}");
    seed
}

/// Puts load on a gateway while `disturb` makes it die and starts it again, and then audits.
fn under_load(
    what: &str,
    settings: &str,
    rounds: u64,
    mut disturb: impl FnMut(&World, Gateway, &mut Random) -> (Gateway, u64),
) {
    let rounds = number("ONCEGATE_KILLS").unwrap_or(rounds);
    let world = World::new(seed());
    let upstream = world.upstream();
    let mut random = Random(world.seed);
    let mut gateway = Gateway::start(&upstream, settings);
    *world.gateway.lock().unwrap() = gateway.addr;
    let mut crashes = 0;
    // It has to outlive the clients, which bring to an end what they have begun.
    let _gateway = thread::scope(|scope| {
        // The clients stop whatever happens here, a panic included.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let _stop = Stop(&world.stop);
        for thread in 0..CLIENTS {
            let world = &world;
            scope.spawn(move || world.client(thread));
        }
        for _ in 0..rounds {
            let (next, died) = disturb(&world, gateway, &mut random);
            (gateway, crashes) = (next, crashes + died);
            world.succeed(&gateway);
        }
        // The last one dies no more.
        world.strike();
        gateway.kill();
        gateway = gateway.again(&[("ONCEGATE_FAILPOINT", "")]).unwrap();
        world.succeed(&gateway);
        crashes += 1;
        thread::sleep(Duration::from_millis(200));
        gateway
    });
    world.audit(what, crashes);
}

fn kill_at_a_random_instant(world: &World, mut gateway: Gateway, random: &mut Random) -> (Gateway, u64) {
    let longest = if random.below(4) == 0 { 5_000 } else { 300_000 };
    thread::sleep(Duration::from_micros(random.below(longest)));
    world.strike();
    gateway.kill();
    let mut died = 1;
    // Some die again while they recover.
    while random.below(4) == 0 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_oncegate"))
            .args(["serve", "--config"])
            .arg(gateway.dir().path().join("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_micros(random.below(60_000)));
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "a gateway ended by itself: {ended:?}");
        child.kill().unwrap();
        child.wait().unwrap();
        died += 1;
    }
    (gateway.again(&[]).unwrap_or_else(|refusal| panic!("the gateway did not start again: {refusal:?}")), died)
}

#[test]
fn kill_9_at_random_instants_executes_nothing_twice_and_forgets_nothing() {
    under_load("kill -9", "", 20, kill_at_a_random_instant);
}

#[test]
fn kill_9_without_a_hot_cache_and_with_relaxed_durability() {
    let settings = "cache.max_bytes = 0\nstore.durability = \"relaxed\"";
    under_load("kill -9, relaxed", settings, 20, kill_at_a_random_instant);
}

#[test]
fn kill_9_with_fjall_executes_nothing_twice_and_forgets_nothing() {
    under_load("kill -9, fjall", "cache.max_bytes = 0\nstore.engine = \"fjall\"", 8, kill_at_a_random_instant);
}

/// Each start has another engine than the one before: its index is made anew from the log.
#[test]
fn kill_9_between_changes_of_the_engine_forgets_nothing() {
    under_load("kill -9, changing engines", "cache.max_bytes = 0", 8, |world, gateway, random| {
        let config = gateway.dir().path().join("config.toml");
        let text = std::fs::read_to_string(&config).unwrap();
        let (from, to) = ("store.engine = \"fjall\"\n", "");
        let changed = if text.contains(from) { text.replace(from, to) } else { format!("{from}{text}") };
        std::fs::write(&config, changed).unwrap();
        kill_at_a_random_instant(world, gateway, random)
    });
}
