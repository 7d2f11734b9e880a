//! Gateways whose clocks are wrong by an hour, each its own way: the store's clock is the one that counts.

use crate::fleet::{Fleet, LEASE, takes};
use crate::server::{Engine, Server};
use crate::support::{Gate, Gateway, Upstream, eventually, skip};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const IMPATIENT: &str = "idempotency.wait_timeout = \"100ms\"\ncache.max_bytes = 0\n";
const HOUR: i64 = 3600;

/// A gateway an hour ahead, one an hour behind, and one whose clock is right.
fn skewed(engine: Engine, upstream: Upstream, further: &str) -> Option<Fleet> {
    let multiarch = ["x86_64-linux-gnu", "aarch64-linux-gnu"];
    let library = multiarch.map(|arch| format!("/usr/lib/{arch}/faketime/libfaketimeMT.so.1"));
    let Some(library) = library.iter().find(|path| Path::new(path).exists()) else {
        skip("libfaketime is not installed");
        return None;
    };
    let server = Server::shared(engine)?;
    let faked = |offset: &'static str| {
        let variables = [("LD_PRELOAD", library.as_str()), ("FAKETIME", offset), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")];
        (format!("{IMPATIENT}{further}"), variables.to_vec())
    };
    let right = (format!("{IMPATIENT}{further}"), Vec::new());
    let fleet = Fleet::of(server, upstream, &[faked("+3600s"), faked("-3600s"), right]);
    let offsets = fleet.gateways.iter().map(offset_s).collect::<Vec<_>>();
    for (offset, wanted) in offsets.iter().zip([HOUR, -HOUR, 0]) {
        assert!((offset - wanted).abs() < 60, "the clocks are as they should be: {offsets:?}");
    }
    Some(fleet)
}

/// By how much its wall clock is ahead, as its log tells.
fn offset_s(gateway: &Gateway) -> i64 {
    let log = gateway.log();
    let line: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    let stamp = line["timestamp"].as_str().unwrap();
    let number = |range: std::ops::Range<usize>| stamp[range].parse::<i64>().unwrap();
    let of_day = number(11..13) * HOUR + number(14..16) * 60 + number(17..19);
    let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap();
    (of_day - now.rem_euclid(24 * HOUR) + 36 * HOUR).rem_euclid(24 * HOUR) - 12 * HOUR
}

fn a_claim_lives_as_long_as_its_owner_whatever_the_clocks_say(engine: Engine) {
    let gate = Gate::default();
    let Some(fleet) = skewed(engine, Upstream::holding(&gate), "") else { return };
    let mut owners = (0..3).map(|gateway| fleet.begin(gateway, &format!("of-{gateway}"))).collect::<Vec<_>>();
    fleet.upstream.wait_for(3);
    let began = Instant::now();
    while began.elapsed() < LEASE * 3 / 2 {
        for gateway in 0..3 {
            for owner in (0..3).filter(|owner| *owner != gateway) {
                fleet.post(gateway, &format!("of-{owner}")).expect_problem(409, "in_progress");
            }
        }
    }
    gate.open();
    for (owner, client) in owners.iter_mut().enumerate() {
        let (key, first) = (format!("of-{owner}"), client.read());
        assert_eq!(first.status, 201, "{first:?}");
        for gateway in 0..3 {
            let replay = fleet.settled(gateway, &key);
            assert_eq!((replay.text(), replay.replayed()), (first.text(), true));
            let age: u64 = replay.header("age").unwrap().parse().unwrap();
            assert!(age < 60, "by the store's clock: {replay:?}");
        }
        fleet.executed_once(&key);
    }
}

fn a_dead_owners_claim_lapses_after_its_lease_whatever_the_clocks_say(engine: Engine) {
    // The one that is ahead, and the one that is behind.
    for victim in [0, 1] {
        let gate = Gate::default();
        let Some(mut fleet) = skewed(engine, Upstream::holding(&gate), "") else { return };
        let _owner = fleet.begin(victim, "k");
        fleet.upstream.wait_for(1);
        fleet.gateways[victim].kill();
        for gateway in [1 - victim, 2] {
            let waited = takes("the claim lapses", || {
                let answer = fleet.post(gateway, "k");
                let code = answer.json()["code"].as_str().unwrap().to_owned();
                assert!(["in_progress", "outcome_unknown"].contains(&code.as_str()), "{answer:?}");
                code == "outcome_unknown"
            });
            // The second is told at once.
            let least = if gateway == 2 { Duration::ZERO } else { LEASE / 2 };
            assert!(waited >= least && waited < LEASE * 2, "{waited:?} after gateway {victim} died");
        }
        gate.open();
        fleet.executed_once("k");
    }
}

fn a_record_expires_by_the_stores_clock(engine: Engine) {
    let Some(fleet) = skewed(engine, Upstream::counting(), "idempotency.retention = \"2s\"\n") else { return };
    for owner in 0..3 {
        let key = format!("of-{owner}");
        let completed = Instant::now();
        let first = fleet.post(owner, &key);
        assert_eq!(first.status, 201, "{first:?}");
        while completed.elapsed() < Duration::from_millis(1500) {
            for gateway in 0..3 {
                let replay = fleet.post(gateway, &key);
                // Between the look at the clock and the answer it may have taken a while.
                assert!(replay.replayed() || completed.elapsed() > Duration::from_secs(2), "{replay:?}");
            }
        }
        let gateway = (owner + 1) % 3;
        eventually("it is new again", || (!fleet.post(gateway, &key).replayed()).then_some(()));
        // What a gateway takes for the store's time is behind it by what the quickest answer took on its way.
        let lived = completed.elapsed() + Duration::from_millis(100);
        assert!(lived >= Duration::from_secs(2) && lived < Duration::from_secs(4), "{lived:?}");
        assert_eq!(fleet.upstream.executions(&key), 2);
    }
}

for_each_store! {
    a_claim_lives_as_long_as_its_owner_whatever_the_clocks_say
    a_dead_owners_claim_lapses_after_its_lease_whatever_the_clocks_say
    a_record_expires_by_the_stores_clock
}
