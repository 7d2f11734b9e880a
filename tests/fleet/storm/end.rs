//! What is left when the storm is over, by the word of every gateway, and the audit of all that was seen.

use super::{BODIES, GATEWAYS, PROMISE, Storm, key_of};
use crate::audit::{Call, Ill, Tally, Word};
use crate::fleet::{DATE, LEASE};
use crate::http::word;
use crate::support::{Client, eventually, post};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// An outcome that could not be recorded is tried again at least as often as that.
const RECORDED_AGAIN: Duration = Duration::from_secs(2);
/// How many keys are asked about at a time.
const AUDITORS: usize = 32;

impl Storm {
    pub(super) fn end(&self) -> Tally {
        self.visits.calm.store(true, Ordering::SeqCst);
        let addrs = self.places.iter().map(|place| *place.addr.lock().unwrap()).collect::<Vec<_>>();
        for place in &self.places {
            let held = place.gateway.lock().unwrap();
            let gateway = held.as_ref().unwrap();
            eventually("the store is back", || (gateway.metric("oncegate_store_unreachable") == 0.0).then_some(()));
            eventually("nothing is late", || (gateway.metric("oncegate_upstream_in_flight") == 0.0).then_some(()));
        }
        thread::sleep(RECORDED_AGAIN);
        let keys = self.visits.history.lock().unwrap().calls.keys().cloned().collect::<Vec<_>>();
        let keys = Mutex::new(keys.into_iter());
        thread::scope(|scope| {
            for _ in 0..AUDITORS {
                scope.spawn(|| {
                    let mut gateways = addrs.iter().map(|addr| Client::connect(*addr)).collect::<Vec<_>>();
                    while let Some((_, key)) = { keys.lock().unwrap() }.next() {
                        self.ask_all(&mut gateways, &key);
                    }
                });
            }
        });
        let mut history = self.visits.history.lock().unwrap();
        // All the time answers of the store were lost, or it was gone: an answer may have been given that is not recorded.
        history.trouble(Duration::ZERO, self.visits.began.elapsed(), Ill::Loss);
        let tally = history.check(&PROMISE).unwrap_or_else(|wrong| {
            let gateways = history.troubles.iter().filter(|trouble| trouble.ill == Ill::Gateway).collect::<Vec<_>>();
            panic!("{}\nGateways stood still: {gateways:?}", wrong.join("\n"))
        });
        let graves = self.graves.lock().unwrap();
        let unrecorded = graves.iter().map(|dead| dead.log().matches("an outcome could not be recorded").count());
        let unrecorded = unrecorded.sum::<usize>();
        assert!(tally.forgotten <= unrecorded, "{} answers forgotten, {unrecorded} not recorded", tally.forgotten);
        assert!(tally.finals > 0, "there was no load");
        tally
    }

    fn ask_all(&self, gateways: &mut [Client], key: &str) {
        // Those whose owner has died are in progress for a lease.
        let body = self.settled_body(&mut gateways[0], key);
        for (number, gateway) in gateways.iter_mut().enumerate() {
            let call = self.ask(gateway, number, key, body);
            self.visits.history.lock().unwrap().end(&key_of(key), call);
        }
        let other = self.ask(&mut gateways[key.len() % GATEWAYS], 0, key, BODIES.len());
        assert_eq!(other.word, Word::KeyReused, "{key}");
    }

    /// On a connection that stays open: there are many. A store that was slow for a moment is asked again.
    fn ask(&self, client: &mut Client, gateway: usize, key: &str, body: usize) -> Call {
        let began = Instant::now();
        loop {
            let sent = self.visits.began.elapsed();
            client.send(post("/posts", key, BODIES.get(body).unwrap_or(&"{\"body\":\"a third\"}")));
            let word = word(Some(&client.read()), DATE);
            if word != Word::Unavailable || began.elapsed() > LEASE * 3 {
                return Call { sent, ended: self.visits.began.elapsed(), gateway, body, word };
            }
        }
    }

    /// Which body the key belongs to, once nobody works on it any more: and that has to come.
    fn settled_body(&self, gateway: &mut Client, key: &str) -> usize {
        let (began, mut body) = (Instant::now(), 0);
        loop {
            match self.ask(gateway, 0, key, body).word {
                Word::Final { .. } | Word::Unknown => return body,
                Word::InProgress | Word::Unavailable if began.elapsed() < LEASE * 3 => {}
                // The other body has been first.
                Word::KeyReused if body == 0 => body = 1,
                word => panic!("{key} is stuck: {word:?}"),
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub(super) fn report(&self, tally: Tally, stormed: Duration, all: Duration) {
        let counts = &self.counts;
        let of = |count: &AtomicU64| count.load(Ordering::SeqCst);
        let history = self.visits.history.lock().unwrap();
        let words = |wanted: &Word| history.calls.values().flatten().filter(|call| call.word == *wanted).count();
        eprintln!(
            "  {:?} seed {}: {tally:?}; gateways: {} kills, {} stops; store: {} kills, {} pauses; \
             network: {} connections cut, {} answers lost, {} stalls; answers: {} none, {} 503s for the store, \
             {} refused upstream, {} for another body; {:.1} s, with the audit {:.1} s",
            self.server.engine(),
            self.seed,
            of(&counts.kills),
            of(&counts.stops),
            of(&counts.store_kills),
            of(&counts.store_pauses),
            of(&counts.cuts),
            self.proxies.iter().map(crate::proxy::Proxy::lost).sum::<usize>(),
            of(&counts.stalls),
            words(&Word::Silence),
            words(&Word::Unavailable),
            words(&Word::Refused),
            words(&Word::KeyReused),
            stormed.as_secs_f64(),
            all.as_secs_f64(),
        );
    }
}
