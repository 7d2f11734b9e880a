//! `kill -9` under load: no key is executed twice, and nothing that a client has seen is forgotten.
//!
//! `ONCEGATE_KILLS` says how often (20, or 8 with fjall), `ONCEGATE_PAIRS` how many pairs of faults are tried (60, or `all`);
//! `ONCEGATE_SEED` repeats a run's choices.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

#[path = "it/support/mod.rs"]
mod support;

#[allow(dead_code, reason = "shared with other tests")]
#[path = "audit/random.rs"]
mod random;

#[cfg(feature = "failpoints")]
#[path = "crash/failpoints.rs"]
mod failpoints;
#[cfg(feature = "failpoints")]
#[path = "crash/sweep.rs"]
mod sweep;

use random::Random;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use support::{Client, Gateway, Received, Response, Upstream, post};

const CLIENTS: u64 = 6;

/// What the upstream did with one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Visit {
    /// Executed, with a final answer (which the gateway may have been too dead to read).
    Executed,
    /// Executed, and the gateway cannot know.
    ExecutedUnknown,
    /// Not executed, but the gateway cannot know.
    LostUnknown,
    /// Not executed, and the answer says so.
    Refused,
}

/// What one key has seen.
#[derive(Default)]
struct History {
    body: String,
    /// The first answer that was final.
    answer: Option<Response>,
    unknown: bool,
    /// Whether a gateway died between its first request and its last answer.
    crossed_a_crash: bool,
}

#[derive(Default)]
struct Counts {
    requests: AtomicU64,
    lost: AtomicU64,
    refused: AtomicU64,
    unavailable: AtomicU64,
}

/// All that the threads share.
struct World {
    seed: u64,
    /// Where the gateway listens at present, and how often one has died: counted before its successor's address is known.
    gateway: Mutex<SocketAddr>,
    deaths: AtomicU64,
    stop: AtomicBool,
    /// From the end on the upstream executes at once.
    calm: AtomicBool,
    visits: Mutex<BTreeMap<String, Vec<Visit>>>,
    histories: Mutex<BTreeMap<String, History>>,
    counts: Counts,
}

impl World {
    fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            seed,
            gateway: Mutex::new(([127, 0, 0, 1], 1).into()),
            deaths: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            calm: AtomicBool::new(false),
            visits: Mutex::default(),
            histories: Mutex::default(),
            counts: Counts::default(),
        })
    }

    fn upstream(self: &Arc<Self>) -> Upstream {
        let world = Arc::clone(self);
        Upstream::scripted(move |request, reply| world.serve(request, reply))
    }

    fn serve(&self, request: &Received, reply: &mut support::upstream::Reply<'_>) {
        let key = request.key().expect("a key").to_owned();
        let number = self.visits.lock().unwrap().get(&key).map_or(0, Vec::len) as u64;
        let mixed = key.bytes().fold(self.seed, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let mut random = Random(mixed.wrapping_add(number));
        let dice = if self.calm.load(Ordering::SeqCst) { 0 } else { random.below(100) };
        let visit = match dice {
            0..80 => Visit::Executed,
            80..85 => Visit::ExecutedUnknown,
            85..87 => Visit::LostUnknown,
            _ => Visit::Refused,
        };
        self.visits.lock().unwrap().entry(key.clone()).or_default().push(visit);
        if dice % 5 == 4 {
            thread::sleep(Duration::from_millis(random.below(80)));
        }
        let body =
            format!("{{\"key\":\"{key}\",\"execution\":{}}}", random.next()) + &"x".repeat(random.below(3000) as usize);
        let headers = [
            ("Date", "Sun, 06 Nov 1994 08:49:37 GMT"),
            ("Content-Type", "text/plain"),
            ("Location", &format!("/posts/{key}")),
            ("X-Two", "one"),
            ("X-Two", "two"),
            ("Set-Cookie", "not=recorded"),
        ];
        match visit {
            // 500 is final, too.
            Visit::Executed => reply.send(if dice % 16 == 15 { 500 } else { 201 }, &headers, body),
            Visit::ExecutedUnknown if dice % 2 == 0 => reply.send(502, &[("X-Scripted", "unknown")], "executed"),
            Visit::ExecutedUnknown => {
                reply.raw("HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\ncut off");
                reply.reset();
            }
            Visit::LostUnknown => reply.reset(),
            Visit::Refused if dice % 2 == 0 => reply.send(429, &[("X-Scripted", "refused"), ("Retry-After", "0")], ""),
            Visit::Refused => reply.send(503, &[("X-Scripted", "refused"), ("Retry-After", "0")], ""),
        }
    }

    /// Sends keyed requests until told to stop; a key that was begun is brought to its end.
    fn client(&self, thread: u64) {
        let mut random = Random(self.seed ^ (thread + 1).wrapping_mul(0x1234_5678_9abc_def1));
        let mut number = 0;
        while !self.stop.load(Ordering::SeqCst) {
            number += 1;
            let key = format!("t{thread}-k{number}");
            let body = format!("{{\"n\":{}}}", random.next());
            let deaths = self.deaths.load(Ordering::SeqCst);
            self.histories.lock().unwrap().insert(key.clone(), History { body: body.clone(), ..History::default() });
            let request = post("/posts", &key, &body);
            let (sends, parallel, abandoned) = (1 + random.below(6), random.below(3) == 0, random.below(8) == 0);
            if parallel {
                thread::scope(|scope| {
                    for _ in 0..sends {
                        scope.spawn(|| self.attempt(&key, &request));
                    }
                });
            } else {
                for _ in 0..sends {
                    self.attempt(&key, &request);
                }
            }
            while !abandoned && !self.attempt(&key, &request) {
                thread::sleep(Duration::from_millis(random.below(3)));
            }
            let crossed = self.deaths.load(Ordering::SeqCst) != deaths;
            self.histories.lock().unwrap().get_mut(&key).unwrap().crossed_a_crash |= crossed;
        }
    }

    /// One request; whether its answer ends the matter.
    fn attempt(&self, key: &str, request: &str) -> bool {
        self.counts.requests.fetch_add(1, Ordering::Relaxed);
        let addr = *self.gateway.lock().unwrap();
        let answer = Client::try_connect(addr).ok().and_then(|mut client| {
            client.try_send(request);
            client.try_read()
        });
        let Some(answer) = answer else {
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
            self.histories.lock().unwrap().get_mut(key).unwrap().crossed_a_crash = true;
            return false;
        };
        let code = problem(&answer);
        match (answer.status, code.as_deref(), answer.header("x-scripted")) {
            (201 | 500, None, None) => {
                let mut histories = self.histories.lock().unwrap();
                let history = histories.get_mut(key).unwrap();
                assert!(!history.unknown, "{key}: first unknown, then {answer:?}");
                match &history.answer {
                    Some(first) => assert_same(key, first, &answer),
                    None => history.answer = Some(answer),
                }
                true
            }
            (409, Some("outcome_unknown"), None) => {
                let mut histories = self.histories.lock().unwrap();
                let history = histories.get_mut(key).unwrap();
                assert!(history.answer.is_none(), "{key}: first {:?}, then unknown", history.answer);
                history.unknown = true;
                true
            }
            (429 | 503, None, Some("refused")) => {
                self.counts.refused.fetch_add(1, Ordering::Relaxed);
                false
            }
            (409, Some("in_progress"), None) | (502, None, Some("unknown")) | (502, Some("upstream_broken"), None) => {
                false
            }
            (503, Some("store_unavailable" | "overloaded"), None) => {
                self.counts.unavailable.fetch_add(1, Ordering::Relaxed);
                false
            }
            _ => panic!("{key}: {answer:?}"),
        }
    }

    /// The last gateway's word on every key.
    fn audit(&self, what: &str, crashes: u64) {
        self.calm.store(true, Ordering::SeqCst);
        let before = self.visits.lock().unwrap().clone();
        let addr = *self.gateway.lock().unwrap();
        let histories = self.histories.lock().unwrap();
        let (mut final_, mut unknown, mut fresh) = (0_u64, 0_u64, 0_u64);
        for (key, history) in &*histories {
            let answer = support::call(addr, post("/posts", key, &history.body));
            let visits = before.get(key).map_or(&[][..], Vec::as_slice);
            let explained = history.crossed_a_crash
                || visits.iter().any(|visit| matches!(visit, Visit::ExecutedUnknown | Visit::LostUnknown));
            match (answer.status, problem(&answer).as_deref()) {
                (201 | 500, None) => {
                    assert!(!history.unknown, "{key}: first unknown, then {answer:?}");
                    let ran = visits.contains(&Visit::Executed);
                    assert_eq!(answer.replayed(), ran, "{key}: {visits:?} {answer:?}");
                    match &history.answer {
                        Some(first) => assert_same(key, first, &answer),
                        // Given up by its client before there was an answer.
                        None if ran => {}
                        None => fresh += 1,
                    }
                    final_ += 1;
                }
                (409, Some("outcome_unknown")) => {
                    assert!(history.answer.is_none(), "{key}: first {:?}, then unknown", history.answer);
                    assert!(explained, "{key}: unknown without a reason: {visits:?}");
                    unknown += 1;
                }
                _ => panic!("{key}: {visits:?} {answer:?}"),
            }
        }
        let mut executed = 0_u64;
        for (key, visits) in &*self.visits.lock().unwrap() {
            let runs = visits.iter().filter(|visit| matches!(visit, Visit::Executed | Visit::ExecutedUnknown)).count();
            assert!(runs <= 1, "{key} was executed {runs} times: {visits:?}");
            // More than that: after anything but a plain refusal the upstream never sees the key again.
            let earlier = visits.split_last().map_or(&[][..], |(_, earlier)| earlier);
            assert!(earlier.iter().all(|visit| *visit == Visit::Refused), "{key}: {visits:?}");
            executed += runs as u64;
        }
        let counts = &self.counts;
        let [requests, lost, refused, unavailable] =
            [&counts.requests, &counts.lost, &counts.refused, &counts.unavailable].map(|n| n.load(Ordering::Relaxed));
        eprintln!(
            "{what}: seed {}, {crashes} crashes, {requests} requests ({lost} lost, {refused} refused upstream, \
             {unavailable} unavailable), {} keys: {executed} executed, {final_} final ({fresh} of them run only now), \
             {unknown} unknown",
            self.seed,
            histories.len(),
        );
        assert!(final_ > 0 && executed > 0 && lost > 0, "there was no load");
    }
}

fn problem(answer: &Response) -> Option<String> {
    let ours = answer.header("content-type") == Some("application/problem+json");
    ours.then(|| answer.json()["code"].as_str().unwrap().to_owned())
}

/// Whether two answers are the same up to the marks of a replay and what is not recorded.
#[track_caller]
fn assert_same(key: &str, first: &Response, second: &Response) {
    let plain = |answer: &Response| {
        let not_recorded = ["idempotency-replayed", "age", "cache-status", "set-cookie", "connection"];
        let lines = answer.headers.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.clone()));
        let mut lines = lines.filter(|(name, _)| !not_recorded.contains(&name.as_str())).collect::<Vec<_>>();
        lines.sort();
        (answer.status, lines, answer.text())
    };
    assert_eq!(plain(first), plain(second), "{key}");
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
            *world.gateway.lock().unwrap() = gateway.addr;
        }
        // The last one dies no more.
        gateway.kill();
        world.deaths.fetch_add(1, Ordering::SeqCst);
        gateway = gateway.again(&[("ONCEGATE_FAILPOINT", "")]).unwrap();
        *world.gateway.lock().unwrap() = gateway.addr;
        crashes += 1;
        thread::sleep(Duration::from_millis(200));
        gateway
    });
    world.audit(what, crashes);
}

fn kill_at_a_random_instant(world: &World, mut gateway: Gateway, random: &mut Random) -> (Gateway, u64) {
    let longest = if random.below(4) == 0 { 5_000 } else { 300_000 };
    thread::sleep(Duration::from_micros(random.below(longest)));
    gateway.kill();
    world.deaths.fetch_add(1, Ordering::SeqCst);
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
