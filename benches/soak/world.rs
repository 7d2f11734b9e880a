//! What clients and upstream have seen of each request, as long as it matters.

use crate::random::Random;
use crate::script::{Script, text};
use crate::wire::Message;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub(crate) const RETENTION: Duration = Duration::from_secs(180);
pub(crate) const UNKNOWN_RETENTION: Duration = Duration::from_secs(60);
pub(crate) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);
pub(crate) const LATE_WINDOW: Duration = Duration::from_secs(3);
/// By when each forward is settled.
pub(crate) const SETTLED: Duration = Duration::from_secs(4);
/// What a gateway may be late by that is stopped at times, on a machine where others work, too.
pub(crate) const SLACK: Duration = Duration::from_secs(2);
/// Of a key, after its first request.
const REMEMBERED: Duration = Duration::from_secs(420);
/// Around an outage: until both sides have noticed.
const AROUND: Duration = Duration::from_millis(500);
const SHOWN_MAX: u64 = 40;

/// What may become of a request at the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Bears a key.
    Keyed,
    /// Bears none: sent on as it is.
    Unkeyed,
    /// Is never to arrive.
    Refused,
}

/// One request's arrival at the upstream.
pub(crate) struct Visit {
    pub(crate) serial: u64,
    pub(crate) script: Script,
    pub(crate) arrived: Instant,
    pub(crate) responded: Option<Instant>,
    /// A client has its final answer.
    pub(crate) seen: bool,
}

/// One client's request, until when it went on.
#[derive(Clone, Copy)]
pub(crate) struct Attempt {
    pub(crate) sent: Instant,
    pub(crate) ended: Option<Instant>,
}

pub(crate) struct Key {
    pub(crate) purpose: Purpose,
    pub(crate) began: Instant,
    pub(crate) attempts: Vec<Attempt>,
    pub(crate) visits: Vec<Visit>,
}

impl Key {
    /// The last visit by which something was executed.
    pub(crate) fn executed(&self) -> Option<&Visit> {
        self.visits.iter().rev().find(|visit| !visit.script.refuses())
    }
}

#[derive(Default)]
pub(crate) struct Keys {
    pub(crate) keys: HashMap<u64, Key>,
    /// By their first request.
    order: VecDeque<u64>,
}

/// When the upstream could not be reached.
#[derive(Default)]
pub(crate) struct Outages(VecDeque<(Instant, Option<Instant>)>);

impl Outages {
    pub(crate) fn within(&self, from: Instant, to: Instant) -> bool {
        self.0.iter().any(|&(begun, ended)| begun <= to + AROUND && ended.is_none_or(|ended| from <= ended + AROUND))
    }
}

pub(crate) struct World {
    pub(crate) name: &'static str,
    pub(crate) started: Instant,
    pub(crate) keys: Mutex<Keys>,
    pub(crate) outages: Mutex<Outages>,
    next: AtomicU64,
    serial: AtomicU64,
    /// Odd while the gateway is stopped or the upstream away.
    disturbed: AtomicU64,
    violations: AtomicU64,
    /// What fresh posts took that the upstream answered at once, undisturbed, since the last sample.
    pub(crate) latencies: Mutex<Vec<Duration>>,
    pub(crate) answers: Mutex<BTreeMap<String, u64>>,
}

impl World {
    pub(crate) fn new(name: &'static str) -> Self {
        Self {
            name,
            started: Instant::now(),
            keys: Mutex::default(),
            outages: Mutex::default(),
            next: AtomicU64::new(2),
            serial: AtomicU64::new(1),
            disturbed: AtomicU64::new(0),
            violations: AtomicU64::new(0),
            latencies: Mutex::default(),
            answers: Mutex::default(),
        }
    }

    pub(crate) fn violated(&self, what: &str) {
        if self.violations.fetch_add(1, Ordering::Relaxed) < SHOWN_MAX {
            println!("{} VIOLATION after {:.1?}: {what}", self.name, self.started.elapsed());
        }
    }

    pub(crate) fn violations(&self) -> u64 {
        self.violations.load(Ordering::Relaxed)
    }

    pub(crate) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Even: nothing is being disturbed. What is the same afterwards has not been meanwhile.
    pub(crate) fn disturbances(&self) -> u64 {
        self.disturbed.load(Ordering::SeqCst)
    }

    /// Latencies do not count while something is done to the gateway, and a little longer.
    pub(crate) fn disturb(&self, act: impl FnOnce()) {
        self.disturbed.fetch_add(1, Ordering::SeqCst);
        act();
        std::thread::sleep(AROUND);
        self.disturbed.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn outage_begins(&self) {
        let mut outages = self.outages.lock().unwrap();
        outages.0.push_back((Instant::now(), None));
        while outages.0.front().is_some_and(|(begun, _)| begun.elapsed() > 2 * REMEMBERED) {
            outages.0.pop_front();
        }
    }

    pub(crate) fn outage_ends(&self) {
        let mut outages = self.outages.lock().unwrap();
        outages.0.back_mut().unwrap().1 = Some(Instant::now());
    }

    /// A client begins a request; which of the key's it is.
    pub(crate) fn begins(&self, number: u64, purpose: Purpose) -> usize {
        let mut keys = self.keys.lock().unwrap();
        let Keys { keys, order } = &mut *keys;
        let now = Instant::now();
        let key = keys.entry(number).or_insert_with(|| {
            order.push_back(number);
            Key { purpose, began: now, attempts: Vec::new(), visits: Vec::new() }
        });
        key.attempts.push(Attempt { sent: now, ended: None });
        let at = key.attempts.len() - 1;
        // None of those that are so old is sent again.
        while let Some(oldest) = order.front().copied().filter(|number| keys[number].began.elapsed() > REMEMBERED) {
            order.pop_front();
            keys.remove(&oldest);
        }
        at
    }

    /// A key that has been used, of the last so many or of all that are still tried again.
    pub(crate) fn used(&self, random: &mut Random, last: u64) -> Option<u64> {
        let keys = self.keys.lock().unwrap();
        let Keys { keys, order } = &*keys;
        let found = (0..8).find_map(|_| {
            let back = random.below(last.min(order.len() as u64).max(1)) as usize;
            let number = *order.get(order.len().checked_sub(back + 1)?)?;
            (keys[&number].purpose == Purpose::Keyed).then_some(number)
        });
        found.filter(|number| keys[number].began.elapsed() < 2 * RETENTION)
    }

    /// A key whose record surely lasts another minute.
    pub(crate) fn completed(&self, random: &mut Random) -> Option<u64> {
        let number = self.used(random, 5000)?;
        let keys = self.keys.lock().unwrap();
        let visit = keys.keys.get(&number)?.executed()?;
        let lasts = visit.seen && visit.responded?.elapsed() + UNKNOWN_RETENTION < RETENTION;
        lasts.then_some(number)
    }

    /// A request arrives at the upstream: may it? Its serial number.
    pub(crate) fn arrived(&self, number: u64, script: Script, request: &Message) -> u64 {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let mut keys = self.keys.lock().unwrap();
        let arrived = Instant::now();
        let Some(key) = keys.keys.get_mut(&number) else {
            self.violated(&format!("{number} arrives when it has long been forgotten"));
            return serial;
        };
        let bears = request.field("idempotency-key").map(str::to_owned);
        if bears != (key.purpose == Purpose::Keyed).then(|| key_text(number)) {
            self.violated(&format!("{number} is {:?}, and arrives with the key {bears:?}", key.purpose));
        }
        if request.body != payload(number) {
            self.violated(&format!("{number} arrives with another payload"));
        }
        if let Some(prior) = key.executed()
            && let Some(why) = self.too_early(key.purpose, prior, arrived)
        {
            self.violated(&format!("{number} is executed again ({script:?} after {:?}): {why}", prior.script));
        }
        key.visits.push(Visit { serial, script, arrived, responded: None, seen: false });
        serial
    }

    fn too_early(&self, purpose: Purpose, prior: &Visit, arrived: Instant) -> Option<String> {
        if purpose == Purpose::Unkeyed {
            return Some("nobody sent it twice".to_owned());
        }
        let disturbed = self.outages.lock().unwrap().within(prior.arrived, prior.arrived + SETTLED);
        let free = match prior.responded {
            None if prior.script != Script::Lost => return Some("the first is under way".to_owned()),
            Some(responded) if prior.script.is_final() && (prior.seen || !disturbed) => responded + RETENTION,
            _ => prior.arrived + UNKNOWN_RETENTION,
        };
        // The gateway counts milliseconds.
        let early = free.saturating_duration_since(arrived + Duration::from_millis(5));
        (!early.is_zero()).then(|| format!("{early:.3?} too early"))
    }

    pub(crate) fn responds(&self, number: u64, serial: u64) {
        let mut keys = self.keys.lock().unwrap();
        let visit = keys.keys.get_mut(&number).and_then(|key| key.visits.iter_mut().find(|it| it.serial == serial));
        if let Some(visit) = visit {
            visit.responded = Some(Instant::now());
        }
    }

    pub(crate) fn counts(&self, label: String) {
        *self.answers.lock().unwrap().entry(label).or_default() += 1;
    }
}

/// Two tenants share each key's text.
pub(crate) fn key_text(number: u64) -> String {
    format!("key-{:08x}", number / 2)
}

pub(crate) fn payload(number: u64) -> Vec<u8> {
    text(number, 60 + number.wrapping_mul(31) as usize % 700)
}
