//! What is left when the storm is over, by the word of every gateway.

use super::history::{Answer, History, classify};
use super::{BODIES, GATEWAYS, Storm, Visit};
use crate::fleet::{LEASE, assert_same};
use crate::support::{Client, Response, eventually, post};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

/// An outcome that could not be recorded is tried again at least as often as that.
const RECORDED_AGAIN: Duration = Duration::from_secs(2);

/// How many keys are asked about at a time.
const AUDITORS: usize = 8;

/// What became of the keys.
#[derive(Default)]
struct Ends {
    final_: u64,
    /// Of those: executed only now.
    fresh: u64,
    unknown: u64,
    /// Of those: a client had got an answer, but the gateway that gave it died before it could record it.
    unrecorded: u64,
}

/// On a connection that stays open: there are many. A store that was slow for a moment is asked again.
fn ask(gateway: &mut Client, key: &str, body: &str) -> Response {
    let began = Instant::now();
    loop {
        gateway.send(post("/posts", key, body));
        let answer = gateway.read();
        if classify(&answer) != Answer::Unavailable || began.elapsed() > LEASE * 3 {
            return answer;
        }
    }
}

impl Storm {
    pub(super) fn audit(&self) {
        self.visits.calm.store(true, Ordering::SeqCst);
        let addrs = self.places.iter().map(|place| *place.addr.lock().unwrap()).collect::<Vec<_>>();
        for place in &self.places {
            let held = place.gateway.lock().unwrap();
            let gateway = held.as_ref().unwrap();
            eventually("the store is back", || (gateway.metric("oncegate_store_unreachable") == 0.0).then_some(()));
            eventually("nothing is late", || (gateway.metric("oncegate_upstream_in_flight") == 0.0).then_some(()));
        }
        thread::sleep(RECORDED_AGAIN);
        let ends = Mutex::new(Ends::default());
        let histories = self.histories.lock().unwrap();
        let keys = Mutex::new(histories.iter());
        thread::scope(|scope| {
            for _ in 0..AUDITORS {
                scope.spawn(|| {
                    let mut gateways = addrs.iter().map(|addr| Client::connect(*addr)).collect::<Vec<_>>();
                    while let Some((key, history)) = { keys.lock().unwrap() }.next() {
                        self.audit_one(&mut gateways, key, history, &ends);
                    }
                });
            }
        });
        let ends = ends.into_inner().unwrap();
        let graves = self.graves.lock().unwrap();
        let unrecorded = graves.iter().map(|dead| dead.log().matches("an outcome could not be recorded").count());
        let unrecorded = unrecorded.sum::<usize>() as u64;
        assert!(ends.unrecorded <= unrecorded, "{} answers forgotten, {unrecorded} not recorded", ends.unrecorded);
        self.judge_visits();
        eprintln!(
            "  {} final ({} of them executed only now), {} unknown ({} of them answered while the store was gone)",
            ends.final_, ends.fresh, ends.unknown, ends.unrecorded
        );
        assert!(ends.final_ > 0, "there was no load");
    }

    fn audit_one(&self, gateways: &mut [Client], key: &str, history: &History, ends: &Mutex<Ends>) {
        let visited = self.visits.by_key.lock().unwrap().get(key).cloned().unwrap_or_default();
        // Those whose owner has died are in progress for a lease.
        let first = self.settled(&mut gateways[0], key);
        let answers = gateways.iter_mut().map(|gateway| ask(gateway, key, BODIES[self.body_of(key)]));
        let answers = answers.collect::<Vec<_>>();
        for answer in &answers {
            match classify(&first) {
                Answer::Final => {
                    assert!(answer.replayed(), "{key}: {answer:?}");
                    assert_same(key, &first, answer);
                }
                _ => assert_eq!(classify(answer), Answer::Unknown, "{key}: {answer:?}"),
            }
        }
        self.judge(key, history, &visited, &first, &mut ends.lock().unwrap());
        let other = ask(&mut gateways[key.len() % GATEWAYS], key, "{\"body\":\"a third\"}");
        assert_eq!(classify(&other), Answer::KeyReused, "{key}: {other:?}");
    }

    /// What the key says once nobody works on it any more: and that has to come.
    fn settled(&self, gateway: &mut Client, key: &str) -> Response {
        let began = Instant::now();
        loop {
            let answer = ask(gateway, key, BODIES[self.body_of(key)]);
            match classify(&answer) {
                Answer::Final | Answer::Unknown => return answer,
                Answer::InProgress | Answer::Unavailable if began.elapsed() < LEASE * 3 => {}
                // The other body has been first.
                Answer::KeyReused if !self.other_bodies.lock().unwrap().contains(key) => {
                    self.other_bodies.lock().unwrap().insert(key.to_owned());
                }
                _ => panic!("{key} is stuck: {answer:?}"),
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn body_of(&self, key: &str) -> usize {
        usize::from(self.other_bodies.lock().unwrap().contains(key))
    }

    fn judge(&self, key: &str, history: &History, visited: &[Visit], end: &Response, ends: &mut Ends) {
        let executed = visited.iter().find_map(|visit| match visit {
            Visit::Executed(number) => Some(*number),
            _ => None,
        });
        if classify(end) == Answer::Final {
            ends.final_ += 1;
            match (&history.seen, executed) {
                (Some(seen), _) => {
                    assert_eq!(seen.body, self.body_of(key), "{key}: answered to another body");
                    assert_same(key, &seen.answer, end);
                }
                (None, Some(number)) => {
                    assert!(end.text().contains(&format!("\"execution\":{number}}}")), "{key}: {end:?}");
                }
                (None, None) => ends.fresh += 1,
            }
            return;
        }
        ends.unknown += 1;
        if let Some(seen) = &history.seen {
            let (place, deaths) = seen.by;
            let died = self.places[place].deaths.load(Ordering::SeqCst) > deaths;
            assert!(!seen.recorded && died, "{key} was answered by gateway {place} with {:?}", seen.answer);
            ends.unrecorded += 1;
        }
        // A claim whose caller was told that the store is unavailable is still to be given back.
        let until = history.ended + LEASE + RECORDED_AGAIN;
        let died = |at: &Instant| (history.began..until).contains(at);
        let explained = self.deaths.lock().unwrap().iter().any(died)
            || visited.iter().any(|visit| !matches!(visit, Visit::Refused))
            || history.seen.is_some();
        assert!(explained, "{key}: unknown without a reason: {visited:?}; {}", self.story(key, history));
    }

    /// What came when, which gateways died or stood still around it, in ms since the key was first sent, and the record.
    fn story(&self, key: &str, history: &History) -> String {
        let ms = |at: &Instant| at.duration_since(history.began).as_secs_f64() * 1000.0;
        let answers = history.answers.iter().map(|(at, from, answer)| format!("{:.0} from {from}: {answer:?}", ms(at)));
        let deaths = self.deaths.lock().unwrap();
        let next = deaths.iter().filter(|at| **at > history.began).take(5).map(|at| format!("{:.0}", ms(at)));
        format!(
            "answers at {}; the next deaths at {}; {:?}",
            answers.collect::<Vec<_>>().join(", "),
            next.collect::<Vec<_>>().join(", "),
            self.record(key)
        )
    }

    /// The record of a key, as a gateway's admin address shows it.
    fn record(&self, key: &str) -> Option<serde_json::Value> {
        let held = self.places[0].gateway.lock().unwrap();
        let mut after = String::new();
        loop {
            let page = held.as_ref().unwrap().admin(&format!("/records?key={key}&limit=1000{after}")).json();
            if let Some(record) = page["records"].as_array()?.first() {
                return Some(record.clone());
            }
            after = format!("&after={}", page["next"].as_str()?);
        }
    }

    fn judge_visits(&self) {
        for (key, visits) in &*self.visits.by_key.lock().unwrap() {
            let runs =
                visits.iter().filter(|visit| matches!(visit, Visit::Executed(_) | Visit::ExecutedUnknown)).count();
            assert!(runs <= 1, "{key} was executed {runs} times: {visits:?}");
            // More than that: after anything but a plain refusal the upstream never sees the key again.
            let earlier = visits.split_last().map_or(&[][..], |(_, earlier)| earlier);
            assert!(earlier.iter().all(|visit| *visit == Visit::Refused), "{key}: {visits:?}");
        }
    }

    pub(super) fn report(&self, stormed: Duration, all: Duration) {
        let counts = &self.counts;
        let of = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::SeqCst);
        let executions = self.visits.by_key.lock().unwrap();
        let executions = executions.values().flatten();
        let executions =
            executions.filter(|visit| matches!(visit, Visit::Executed(_) | Visit::ExecutedUnknown)).count();
        eprintln!(
            "  {:?} seed {}: {} keys, {} requests, {executions} executions; gateways: {} kills, {} stops; store: {} kills, \
             {} pauses; network: {} connections cut, {} answers lost, {} stalls; answers: {} none, {} 503s for the store, \
             {} refused upstream, {} for another body; {:.1} s, with the audit {:.1} s",
            self.server.engine(),
            self.seed,
            self.keys,
            of(&counts.requests),
            of(&counts.kills),
            of(&counts.stops),
            of(&counts.store_kills),
            of(&counts.store_pauses),
            of(&counts.cuts),
            self.proxies.iter().map(crate::proxy::Proxy::lost).sum::<usize>(),
            of(&counts.stalls),
            of(&counts.unanswered),
            of(&counts.unavailable),
            of(&counts.refused),
            of(&counts.other_body),
            stormed.as_secs_f64(),
            all.as_secs_f64(),
        );
    }
}
