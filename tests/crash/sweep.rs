//! Every step between accept and acknowledge going wrong in every way, alone and in pairs.
//!
//! All alone and a sample of the pairs; `ONCEGATE_PAIRS=all` takes all pairs.

use crate::http::problem;
use crate::support::{Client, Gateway, Response, Upstream, post};
use crate::{Random, number, seed};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// In the order in which a request passes them, and whether the step can fail. A point of the store is passed for the claim
/// and for the outcome.
const POINTS: [(&str, bool); 16] = [
    ("after-accept", true),
    ("before-claim", true),
    ("before-append", true),
    ("before-sync", true),
    ("after-sync", true),
    ("after-claim-commit", false),
    ("before-connect", true),
    ("before-send", true),
    ("after-send", true),
    ("after-forward", true),
    ("before-settle-commit", false),
    ("before-append:2", true),
    ("before-sync:2", true),
    ("after-sync:2", true),
    ("after-settle-commit", false),
    ("before-answer", true),
];
/// Shorter than a delay (400 ms), so that delays lead to time limits.
const SETTINGS: &str = "upstream.response_timeout = \"300ms\"\nupstream.late_window = \"200ms\"\n\
                        idempotency.wait_timeout = \"300ms\"";
/// For a key to come to its end.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, PartialEq, Eq)]
struct Fault {
    point: &'static str,
    action: &'static str,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.point, self.action)
    }
}

fn faults() -> Vec<Fault> {
    let of = |(point, fails): (&'static str, bool)| {
        let actions = ["abort", "panic", "delay", "error"].into_iter().take(if fails { 4 } else { 3 });
        actions.map(move |action| Fault { point, action })
    };
    POINTS.into_iter().flat_map(of).collect()
}

/// What became of one key.
struct Story {
    upstream: Upstream,
    /// Answers that bear what the upstream said.
    seen: Vec<Response>,
    /// Those that may yet strike, and all of them.
    faults: Vec<Fault>,
    all: Vec<Fault>,
}

impl Story {
    fn spec(&self) -> String {
        self.faults.iter().map(Fault::to_string).collect::<Vec<_>>().join(",")
    }

    /// With the faults that are left. They may strike as it starts, since that writes, too; then without.
    fn start_again(&mut self, gateway: &Gateway) -> Gateway {
        let started = gateway.again(&[("ONCEGATE_FAILPOINT", &self.spec())]).or_else(|refusal| {
            assert!(!self.faults.is_empty(), "it did not start again: {refusal:?}");
            self.faults.clear();
            gateway.again(&[("ONCEGATE_FAILPOINT", "")])
        });
        started.unwrap_or_else(|refusal| panic!("it did not start again: {refusal:?}"))
    }

    /// One answer; `None`: none came.
    fn ask(addr: std::net::SocketAddr) -> Option<Response> {
        let mut client = Client::try_connect(addr).ok()?;
        client.try_send(post("/posts", "k", "{}"));
        client.try_read()
    }

    /// Whether this is an end: the upstream's answer, or that nobody knows it.
    fn note(&mut self, answer: Response) -> bool {
        match (answer.status, problem(&answer).as_deref()) {
            (201, None) => {
                self.seen.push(answer);
                true
            }
            (409, Some("outcome_unknown")) => true,
            (409, Some("in_progress")) | (502 | 504, Some(_)) => false,
            (503, Some("store_unavailable" | "overloaded")) => false,
            _ => panic!("{answer:?}"),
        }
    }

    /// Duplicates at once, and retries until there is an end, or the store has failed; the process is started again with the
    /// other fault when it dies. The gateway as it is then.
    fn tell(&mut self, mut gateway: Gateway) -> Gateway {
        let addr = gateway.addr;
        let answers = thread::scope(|scope| {
            let duplicates = [0; 2].map(|_| scope.spawn(move || Self::ask(addr)));
            duplicates.map(|duplicate| duplicate.join().unwrap())
        });
        let mut ended = answers.into_iter().flatten().fold(false, |ended, answer| self.note(answer) | ended);
        let until = Instant::now() + PATIENCE;
        while !ended {
            assert!(Instant::now() < until, "it does not come to an end");
            match Self::ask(gateway.addr) {
                Some(answer) if problem(&answer).as_deref() == Some("store_unavailable") => break,
                Some(answer) => ended = self.note(answer),
                None if gateway.has_ended() => {
                    let died = self.faults.iter().position(|fault| fault.action == "abort");
                    self.faults.remove(died.expect("it died by itself"));
                    gateway = self.start_again(&gateway);
                }
                None => {}
            }
        }
        gateway
    }

    /// By a gateway with which nothing is wrong any more. How the key ended.
    fn end(&mut self, mut gateway: Gateway) -> &'static str {
        let delays_alone = self.all.iter().all(|fault| fault.action == "delay");
        // An outcome that cannot be recorded is delivered all the same.
        let lossy = |fault: &Fault| fault.point.ends_with(":2") && ["error", "panic"].contains(&fault.action);
        let may_lose = self.all.iter().any(lossy);
        gateway.kill();
        self.faults.clear();
        gateway = self.start_again(&gateway);
        let executed_before = self.upstream.executions("k");
        let answer = gateway.post("k", "{}");
        let code = problem(&answer);
        let end = match (answer.status, code.as_deref()) {
            (201, None) if executed_before == 0 => "only now",
            (201, None) => "replayed",
            (409, Some("outcome_unknown")) => "unknown",
            _ => panic!("{answer:?}"),
        };
        assert!(self.upstream.executions("k") <= 1, "executed {} times", self.upstream.executions("k"));
        if end == "unknown" {
            assert!(self.seen.is_empty() || may_lose, "unknown after {:?}", self.seen);
        }
        assert!(
            end == "unknown" || self.seen.iter().all(|seen| seen.body == answer.body),
            "{:?}, but {answer:?}",
            self.seen
        );
        assert!(!delays_alone || end == "replayed", "{end}");
        assert_eq!(gateway.post("other", "{}").status, 201);
        assert_eq!(self.upstream.executions("other"), 1);
        end
    }
}

fn run(faults: Vec<Fault>) -> &'static str {
    let upstream = Upstream::scripted(|request, reply| reply.send(201, &[], format!("run {}", request.number)));
    let mut story = Story { upstream, seen: Vec::new(), all: faults.clone(), faults };
    let (dir, spec) = (Arc::new(tempfile::tempdir().unwrap()), story.spec());
    let environment = [("ONCEGATE_FAILPOINT", spec.as_str())];
    let gateway = Gateway::try_start(dir, &story.upstream.url(), SETTINGS, &[], &environment).unwrap();
    let gateway = story.tell(gateway);
    story.end(gateway)
}

#[test]
fn whatever_step_goes_wrong_alone_or_with_another_nothing_is_executed_twice() {
    let faults = faults();
    let mut cases = faults.iter().map(|fault| vec![*fault]).collect::<Vec<_>>();
    let mut pairs = Vec::new();
    for (at, first) in faults.iter().enumerate() {
        let others = faults[at + 1..].iter().filter(|second| second.point != first.point);
        pairs.extend(others.map(|second| vec![*first, *second]));
    }
    if std::env::var("ONCEGATE_PAIRS").as_deref() != Ok("all") {
        let mut random = Random(seed());
        let wanted = number("ONCEGATE_PAIRS").unwrap_or(60) as usize;
        while pairs.len() > wanted {
            pairs.swap_remove(random.below(pairs.len() as u64) as usize);
        }
    }
    cases.append(&mut pairs);
    let (next, ends) = (AtomicUsize::new(0), Mutex::new(BTreeMap::<_, usize>::new()));
    // Most of them wait most of the time.
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let name = case.iter().map(Fault::to_string).collect::<Vec<_>>().join(",");
                    let end = std::panic::catch_unwind(|| run(case.clone())).unwrap_or_else(|_| panic!("{name}"));
                    *ends.lock().unwrap().entry(end).or_default() += 1;
                }
            });
        }
    });
    eprintln!("{} cases: {:?}", cases.len(), ends.lock().unwrap());
    assert_eq!(ends.lock().unwrap().len(), 3, "every end has been seen");
}
