//! What troubles the fleet.

use super::{Random, Storm};
use crate::fleet::{LEASE, signal};
use crate::support::PATIENCE;
use rustix::process::Signal;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

impl Storm {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Sleeps, unless the storm is over.
    fn pause(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        while Instant::now() < until {
            if self.stopped() {
                return false;
            }
            thread::sleep(Duration::from_millis(10).min(until.saturating_duration_since(Instant::now())));
        }
        !self.stopped()
    }

    fn random(&self, which: u64) -> Random {
        Random(self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(which))
    }

    /// Kills gateways and starts them again, and stops some, beyond their leases and for moments.
    pub(super) fn trouble_gateways(&self) {
        let mut random = self.random(1);
        while self.pause(random.ms(50, 400)) {
            let place = random.below(self.places.len() as u64) as usize;
            match random.below(100) {
                0..60 => {
                    let downtime = random.ms(0, 200);
                    self.kill(place, downtime);
                }
                60..73 => self.freeze(place, LEASE + random.ms(50, 700)),
                _ => self.freeze(place, random.ms(20, 400)),
            }
        }
    }

    fn kill(&self, number: usize, downtime: Duration) {
        let place = &self.places[number];
        let mut held = place.gateway.lock().unwrap();
        let mut old = held.take().unwrap();
        let struck = Instant::now();
        old.kill();
        self.counts.kills.fetch_add(1, Ordering::SeqCst);
        thread::sleep(downtime);
        self.proxies[number].forgive();
        let began = Instant::now();
        let new = loop {
            // It cannot start while the store is out of reach.
            match old.again(&[]) {
                Ok(gateway) => break gateway,
                Err(refusal) if refusal.code == Some(1) && began.elapsed() < PATIENCE => {}
                Err(refusal) => panic!("a gateway did not start again: {refusal:?}"),
            }
            thread::sleep(Duration::from_millis(50));
        };
        *place.addr.lock().unwrap() = new.addr;
        *held = Some(new);
        self.trouble(struck);
        self.graves.lock().unwrap().push(old);
    }

    fn freeze(&self, place: usize, time: Duration) {
        let held = self.places[place].gateway.lock().unwrap();
        let gateway = held.as_ref().unwrap();
        let struck = Instant::now();
        signal(gateway, Signal::STOP);
        self.counts.stops.fetch_add(1, Ordering::SeqCst);
        self.pause(time);
        signal(gateway, Signal::CONT);
        self.trouble(struck);
    }

    /// Cuts, delays and stalls the gateways' connections to the store, and loses its answers.
    pub(super) fn trouble_networks(&self) {
        let mut random = self.random(2);
        while self.pause(random.ms(20, 250)) {
            let number = random.below(self.proxies.len() as u64) as usize;
            let proxy = &self.proxies[number];
            match random.below(100) {
                0..25 => {
                    self.counts.cuts.fetch_add(proxy.cut() as u64, Ordering::Relaxed);
                }
                25..70 => {
                    let more = random.below(4) as usize + 1;
                    // Mostly those to claims and outcomes. Who connects while nobody else asks would lose one after the other
                    // of any others: so would a gateway that starts (it is held meanwhile, as one that stands still is).
                    let marker = if random.below(4) > 0 { self.key_prefix() } else { String::new() };
                    if !marker.is_empty() || self.places[number].gateway.try_lock().is_ok() {
                        (proxy.losses()..more).for_each(|_| proxy.lose_answer_to(&marker));
                    }
                }
                70..80 => {
                    self.counts.stalls.fetch_add(1, Ordering::Relaxed);
                    proxy.stall(true);
                    self.pause(random.ms(20, 900));
                    proxy.stall(false);
                }
                80..90 => {
                    self.counts.stalls.fetch_add(1, Ordering::Relaxed);
                    proxy.hold("");
                    self.pause(random.ms(20, 900));
                    proxy.release();
                }
                _ => {
                    proxy.delay(random.ms(2, 60));
                    self.pause(random.ms(100, 400));
                    proxy.delay(Duration::ZERO);
                }
            }
        }
        self.proxies.iter().for_each(crate::proxy::Proxy::mend);
    }

    /// Kills the store and starts it again, and stops it for moments.
    pub(super) fn trouble_the_store(&self) {
        let mut random = self.random(3);
        let mut first = true;
        while self.pause(random.ms(if first { 500 } else { 2000 }, if first { 1500 } else { 6000 })) {
            if std::mem::take(&mut first) || random.below(3) > 0 {
                self.server.kill();
                self.counts.store_kills.fetch_add(1, Ordering::Relaxed);
                thread::sleep(random.ms(10, 700));
                self.server.restart();
            } else {
                self.server.pause();
                self.counts.store_pauses.fetch_add(1, Ordering::Relaxed);
                thread::sleep(random.ms(20, 900));
                self.server.resume();
            }
        }
    }
}
