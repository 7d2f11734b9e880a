//! `kill -9` at random instants and at chosen points: no key is executed twice, and what a client was told stays true.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub
)]

#[path = "it/support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use support::{Client, Gateway, Received, Response, Upstream, post};

/// What the upstream has really done, by key; it knows nothing of the gateway.
#[derive(Clone, Default)]
struct Audit(Arc<Mutex<HashMap<String, usize>>>);

impl Audit {
    fn execute(&self, request: &Received) -> usize {
        let mut executions = self.0.lock().unwrap();
        let count = executions.entry(request.key().unwrap().to_owned()).or_default();
        *count += 1;
        *count
    }

    fn executions(&self, key: &str) -> usize {
        self.0.lock().unwrap().get(key).copied().unwrap_or(0)
    }
}

/// An upstream in all moods. What it does with a key depends on the key's number, and for some on how often it came.
fn moody_upstream(audit: &Audit) -> Upstream {
    let audit = audit.clone();
    let seen = Mutex::new(HashMap::<String, usize>::new());
    Upstream::scripted(move |request, reply| {
        let key = request.key().unwrap().to_owned();
        let times = {
            let mut seen = seen.lock().unwrap();
            let times = seen.entry(key.clone()).or_default();
            *times += 1;
            *times
        };
        let number: usize = key.trim_start_matches('k').parse().unwrap();
        let executed = |audit: &Audit| format!("{{\"key\":\"{key}\",\"run\":{}}}", audit.execute(request));
        match number % 8 {
            // Throttles the first attempt: nothing executed.
            0 if times == 1 => reply.send(429, &[], "later"),
            1 if times == 1 => reply.send(503, &[("Retry-After", "0")], "later"),
            // Executes, and the answer is lost.
            2 => {
                executed(&audit);
                reply.reset();
            }
            // Executes and says that something went wrong.
            3 => {
                executed(&audit);
                reply.send(502, &[], "bad");
            }
            4 => {
                let body = executed(&audit);
                std::thread::sleep(Duration::from_millis(10)); // A slow API, that is all.
                reply.send(200, &[("X-Key", &key)], body);
            }
            5 => {
                let body = executed(&audit) + &"x".repeat(20_000);
                reply.send(201, &[("Location", "/posts/1")], body);
            }
            _ => {
                let body = executed(&audit);
                reply.send(201, &[("X-Key", &key), ("Date", "Sun, 06 Nov 1994 08:49:37 GMT")], body);
            }
        }
    })
}

/// What a replay must repeat.
fn essence(response: &Response) -> (u16, Vec<(String, String)>, Vec<u8>) {
    let volatile = ["age", "cache-status", "idempotency-replayed", "date", "content-length"];
    let mut headers = response.headers.clone();
    headers.retain(|(name, value)| {
        !volatile.contains(&name.to_ascii_lowercase().as_str()) || value.starts_with("Sun, 06 Nov 1994")
    });
    headers.sort();
    (response.status, headers, response.body.clone())
}

/// What clients have been told, by key.
#[derive(Default)]
struct Told {
    finals: HashMap<String, Response>,
    unknown: Vec<String>,
    requests: usize,
}

fn attempt(addr: SocketAddr, key: &str) -> Option<Response> {
    let mut client = Client::try_connect(addr).ok()?;
    client.try_send(post("/posts", key, &format!("{{\"key\":\"{key}\"}}")));
    client.try_read()
}

fn code(response: &Response) -> Option<String> {
    let problem = response.header("content-type") == Some("application/problem+json");
    problem.then(|| response.json()["code"].as_str().unwrap().to_owned())
}

/// Where the gateway is; nowhere while it is being restarted.
struct Address(Mutex<Option<SocketAddr>>, Condvar);

impl Address {
    fn set(&self, addr: Option<SocketAddr>) {
        *self.0.lock().unwrap() = addr;
        self.1.notify_all();
    }

    fn get(&self) -> SocketAddr {
        let mut addr = self.0.lock().unwrap();
        loop {
            if let Some(addr) = *addr {
                return addr;
            }
            addr = self.1.wait(addr).unwrap();
        }
    }
}

/// Retries a key until the answer is final or the outcome unknown; `None`: told to stop first.
fn insist(key: &str, gateway: &Address, stop: &AtomicBool, told: &Mutex<Told>) -> Option<()> {
    while !stop.load(Ordering::Acquire) {
        told.lock().unwrap().requests += 1;
        let Some(response) = attempt(gateway.get(), key) else { continue };
        let mut told = told.lock().unwrap();
        match (response.status, code(&response).as_deref()) {
            (200 | 201, None) => match told.finals.get(key) {
                Some(earlier) => assert_eq!(essence(earlier), essence(&response), "{key} was told two things"),
                None => drop(told.finals.insert(key.to_owned(), response)),
            },
            (409, Some("outcome_unknown")) => told.unknown.push(key.to_owned()),
            // The first caller of an execution that ended unknown.
            (502 | 504, _) | (503 | 429, _) | (409, Some("in_progress")) => continue,
            other => panic!("{key}: {other:?} {response:?}"),
        }
        return Some(());
    }
    None
}

/// Steele, Lea and Flood's SplitMix64: a seed repeats a run's choices.
struct SplitMix(u64);

impl SplitMix {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

struct Storm {
    kills: usize,
    /// A failpoint for each new process, if any.
    failpoint: fn(&mut SplitMix) -> Option<String>,
}

fn storm(storm: &Storm) {
    let seed: u64 = std::env::var("ONCEGATE_SEED").map_or_else(
        |_| std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64,
        |seed| seed.parse().unwrap(),
    );
    println!("ONCEGATE_SEED={seed}");
    let mut rng = SplitMix(seed);

    let audit = Audit::default();
    let upstream = moody_upstream(&audit);
    let settings = "upstream.response_timeout = \"2s\"\nupstream.late_window = \"1s\"\n\
                    idempotency.max_recorded_body = \"64KiB\"";
    let mut gateway = Gateway::start(&upstream, settings);
    let address = Address(Mutex::new(Some(gateway.addr)), Condvar::new());
    let (stop, told, next_key) = (AtomicBool::new(false), Mutex::new(Told::default()), AtomicUsize::new(0));
    let mut by_themselves = 0;
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while !stop.load(Ordering::Acquire) {
                    let number = next_key.fetch_add(1, Ordering::AcqRel);
                    let key = format!("k{number}");
                    // Some keys are sent by two at once, some again afterwards.
                    std::thread::scope(|scope| {
                        if number % 5 == 0 {
                            scope.spawn(|| insist(&key, &address, &stop, &told));
                        }
                        insist(&key, &address, &stop, &told);
                    });
                    if number % 3 == 0 {
                        insist(&key, &address, &stop, &told);
                    }
                }
            });
        }
        for _ in 0..storm.kills {
            // The random instant of the kill. With a failpoint the process may have ended by itself.
            std::thread::sleep(Duration::from_micros(rng.below(60_000)));
            by_themselves += usize::from(gateway.ended());
            address.set(None);
            gateway.kill();
            let failpoint = (storm.failpoint)(&mut rng);
            let variable = failpoint.as_deref().map(|value| ("ONCEGATE_FAILPOINT", value));
            gateway = gateway.again(variable.as_slice()).unwrap();
            address.set(Some(gateway.addr));
        }
        stop.store(true, Ordering::Release);
        // The last process may still end at its failpoint.
        gateway.kill();
        gateway = gateway.again(&[("ONCEGATE_FAILPOINT", "")]).unwrap();
        address.set(Some(gateway.addr));
    });

    let told = told.into_inner().unwrap();
    let keys = next_key.into_inner();
    let twice = (0..keys).map(|n| format!("k{n}")).filter(|key| audit.executions(key) > 1).collect::<Vec<_>>();
    assert!(twice.is_empty(), "executed more than once: {twice:?}");
    for (key, first) in &told.finals {
        let replay = gateway.call(post("/posts", key, &format!("{{\"key\":\"{key}\"}}")));
        assert!(replay.replayed(), "{key}: {replay:?}");
        assert_eq!(essence(&replay), essence(first), "{key}");
        assert_eq!(audit.executions(key), 1, "{key}");
    }
    for key in &told.unknown {
        let retry = gateway.call(post("/posts", key, &format!("{{\"key\":\"{key}\"}}")));
        retry.expect_problem(409, "outcome_unknown");
    }
    assert_eq!(gateway.metric("oncegate_records{state=\"claimed\"}"), 0.0);
    println!(
        "{} kills ({by_themselves} at a failpoint), {} requests, {keys} keys, {} answered, {} told unknown, 0 executed twice",
        storm.kills,
        told.requests,
        told.finals.len(),
        told.unknown.len()
    );
    assert!(!told.finals.is_empty());
}

fn kills() -> usize {
    std::env::var("ONCEGATE_KILLS").map_or(20, |kills| kills.parse().unwrap())
}

#[test]
fn killed_at_random_instants_under_load_no_key_runs_twice_and_every_answer_replays() {
    storm(&Storm { kills: kills(), failpoint: |_| None });
}

#[cfg(feature = "failpoints")]
mod failpoints {
    use super::*;

    const POINTS: [&str; 4] = ["after-claim-commit", "after-forward", "before-settle-commit", "after-settle-commit"];

    #[test]
    fn killed_at_failpoints_under_load_no_key_runs_twice_and_every_answer_replays() {
        storm(&Storm {
            kills: kills(),
            failpoint: |rng| {
                let point = POINTS[usize::try_from(rng.below(4)).unwrap()];
                Some(format!("{point}:{}", 1 + rng.below(40)))
            },
        });
    }

    /// What is left of a key after its gateway died at a point.
    enum Left {
        Unknown,
        Replayed,
        New,
    }

    /// One request dies at the point; then a new gateway is asked.
    fn die_at(point: &str, answer: u16, executions: usize, left: &Left) {
        let upstream =
            Upstream::scripted(move |request, reply| reply.send(answer, &[], format!("run {}", request.number)));
        let mut first = Gateway::start(&upstream, "");
        first.kill();
        let mut gateway = first.again(&[("ONCEGATE_FAILPOINT", point)]).unwrap();
        let mut client = Client::connect(gateway.addr);
        client.send(post("/posts", "k", "{}"));
        assert!(client.try_read().is_none(), "{point}: it answered");
        assert_eq!(gateway.wait(), None, "{point}: aborted");
        assert_eq!(upstream.count(), executions, "{point} {answer}");
        let gateway = gateway.again(&[("ONCEGATE_FAILPOINT", "")]).unwrap();
        let retry = gateway.post("k", "{}");
        match left {
            Left::Unknown => retry.expect_problem(409, "outcome_unknown"),
            Left::Replayed => assert_eq!((retry.status, retry.replayed()), (answer, true), "{point}"),
            Left::New => assert_eq!((retry.status, retry.replayed()), (answer, false), "{point}"),
        }
        let again = usize::from(matches!(left, Left::New));
        assert_eq!(upstream.count(), executions + again, "{point} {answer}");
    }

    #[test]
    fn between_claim_and_forward_the_outcome_is_unknown_and_nothing_was_executed() {
        die_at("after-claim-commit", 201, 0, &Left::Unknown);
    }

    #[test]
    fn between_forward_and_settle_the_outcome_is_unknown() {
        for answer in [201, 429, 502] {
            die_at("after-forward", answer, 1, &Left::Unknown);
            die_at("before-settle-commit", answer, 1, &Left::Unknown);
        }
    }

    #[test]
    fn after_the_settle_the_record_stands() {
        die_at("after-settle-commit", 201, 1, &Left::Replayed);
        die_at("after-settle-commit", 429, 1, &Left::New);
        die_at("after-settle-commit", 502, 1, &Left::Unknown);
    }
}
