//! Claims live as long as their owners: renewed while these work, unknown once they are gone, and never free by themselves.

use crate::fleet::{Fleet, LEASE, assert_same, takes};
use crate::proxy::Proxy;
use crate::server::{Engine, Server};
use crate::support::tls::Authority;
use crate::support::tls_front::{TlsFront, server};
use crate::support::{Client, Gate, Upstream, eventually};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const IMPATIENT: &str = "idempotency.wait_timeout = \"100ms\"";

/// Waits until a gateway says that nobody knows what became of the key; how long that took.
#[track_caller]
fn until_unknown(fleet: &Fleet, gateway: usize, key: &str) -> Duration {
    takes("the claim lapses", || {
        let answer = fleet.post(gateway, key);
        match answer.json()["code"].as_str() {
            Some("in_progress") => false,
            _ => {
                answer.expect_problem(409, "outcome_unknown");
                true
            }
        }
    })
}

fn a_request_that_takes_longer_than_the_lease_stays_in_progress_and_is_answered(engine: Engine) {
    let gate = Gate::default();
    let Some(fleet) = Fleet::start(engine, 2, Upstream::holding(&gate), IMPATIENT) else { return };
    let mut owner = fleet.begin(0, "k");
    fleet.upstream.wait_for(1);
    let began = Instant::now();
    while began.elapsed() < LEASE * 5 / 2 {
        // Where its owner is, too.
        fleet.post(0, "k").expect_problem(409, "in_progress");
        fleet.post(1, "k").expect_problem(409, "in_progress");
    }
    gate.open();
    let first = owner.read();
    assert_eq!(first.text(), "run 1");
    let replay = fleet.settled(1, "k");
    assert!(replay.replayed());
    assert_same("k", &first, &replay);
    fleet.executed_once("k");
}

fn an_owner_that_is_killed_leaves_an_unknown_outcome_once_its_lease_is_over(engine: Engine) {
    let gate = Gate::default();
    let Some(mut fleet) = Fleet::start(engine, 2, Upstream::holding(&gate), IMPATIENT) else { return };
    let (_seen, _unseen) = (fleet.begin(0, "k"), fleet.begin(0, "unseen"));
    fleet.upstream.wait_for(2);
    fleet.gateways[0].kill();
    let waited = until_unknown(&fleet, 1, "k");
    // Since the last renewal, which is at most about a third of the lease ago.
    assert!(waited > LEASE / 2 && waited < LEASE * 2, "{waited:?}");
    fleet.gateways[1].post("k", "[]").expect_problem(422, "key_reused");
    gate.open();
    let records = fleet.records(1, "k");
    assert_eq!(records.len(), 1, "{records:?}");
    assert_eq!((&records[0]["state"], &records[0]["why"]), (&"unknown".into(), &"lease".into()), "{records:?}");
    eventually("an unknown outcome is counted", || {
        (fleet.gateways[1].metric("oncegate_records{state=\"unknown\"}") >= 1.0).then_some(())
    });
    // Its owner's successor knows no better.
    fleet.restart(0);
    fleet.post(0, "k").expect_problem(409, "outcome_unknown");
    fleet.executed_once("k");

    // A claim that has lapsed unseen is resolved as any other.
    let records = eventually("it shows as unknown", || {
        Some(fleet.records(1, "unseen")).filter(|records| records[0]["state"] == "unknown")
    });
    let resolved = fleet.resolve_not_executed(1, records[0]["id"].as_str().unwrap());
    assert_eq!(resolved.status, 200, "{resolved:?}");
    let answer = fleet.post(1, "unseen");
    assert_eq!((answer.status, answer.text().as_str(), answer.replayed()), (201, "run 3", false));
    assert_eq!(fleet.post(0, "unseen").text(), "run 3");
    assert_eq!(fleet.upstream.count(), 3);
}

fn the_claims_of_a_gateway_that_is_gone_show_in_the_metrics_though_nobody_asks_for_them(engine: Engine) {
    let gate = Gate::default();
    // Longer than counts may lag behind.
    let patient = "upstream.response_timeout = \"60s\"";
    let Some(mut fleet) = Fleet::start(engine, 2, Upstream::holding(&gate), patient) else { return };
    let _owners = (0..5).map(|n| fleet.begin(0, &format!("k{n}"))).collect::<Vec<_>>();
    let mut living = fleet.begin(1, "living");
    fleet.upstream.wait_for(6);
    eventually("claims are counted", || {
        (fleet.gateways[1].metric("oncegate_records{state=\"claimed\"}") == 6.0).then_some(())
    });
    assert_eq!(fleet.gateways[1].metric("oncegate_records{state=\"unknown\"}"), 0.0);
    fleet.gateways[0].kill();
    let unknown = || fleet.gateways[1].metric("oncegate_records{state=\"unknown\"}");
    eventually("unknown outcomes are counted", || (unknown() == 5.0).then_some(()));
    eventually("and how old they are", || {
        (fleet.gateways[1].metric("oncegate_oldest_unknown_seconds") > 0.0).then_some(())
    });
    gate.open();
    assert_eq!(living.read().status, 201, "whose owner lives is left alone");
    assert!(fleet.settled(1, "living").replayed());
    for n in 0..5 {
        fleet.settled(1, &format!("k{n}")).expect_problem(409, "outcome_unknown");
    }
}

fn an_operator_cannot_touch_a_claim_that_another_gateway_keeps_alive(engine: Engine) {
    let gate = Gate::default();
    let Some(fleet) = Fleet::start(engine, 2, Upstream::holding(&gate), IMPATIENT) else { return };
    let mut owner = fleet.begin(0, "k");
    fleet.upstream.wait_for(1);
    let records = fleet.records(1, "k");
    assert_eq!(records[0]["state"], "claimed", "{records:?}");
    let refused = fleet.resolve_not_executed(1, records[0]["id"].as_str().unwrap());
    assert_eq!(refused.status, 409, "{refused:?}");
    gate.open();
    assert_eq!(owner.read().text(), "run 1");
    fleet.executed_once("k");
}

fn the_real_result_of_an_owner_that_was_stopped_settles_what_had_become_unknown(engine: Engine) {
    let gate = Gate::default();
    let Some(fleet) = Fleet::start(engine, 3, Upstream::holding(&gate), IMPATIENT) else { return };
    let mut owner = fleet.begin(0, "k");
    fleet.upstream.wait_for(1);
    fleet.stop(0);
    let waited = until_unknown(&fleet, 1, "k");
    assert!(waited > LEASE / 2, "{waited:?}");
    gate.open();
    fleet.post(2, "k").expect_problem(409, "outcome_unknown");
    fleet.cont(0);
    let first = owner.read();
    assert_eq!((first.status, first.text().as_str(), first.replayed()), (201, "run 1", false));
    for gateway in [1, 2, 0] {
        let replay = fleet.post(gateway, "k");
        assert!(replay.replayed(), "{replay:?}");
        assert_same("k", &first, &replay);
    }
    fleet.executed_once("k");
}

/// A fleet of two, of which the first reaches the upstream by TLS, and `proxy` holds the handshake: its request is claimed,
/// and not a byte of it is sent.
struct Hanging {
    fleet: Fleet,
    owner: Client,
    proxy: Proxy,
    front: TlsFront,
    _files: TempDir,
}

fn hanging(store: Arc<Server>) -> Hanging {
    let authority = Authority::new("ours");
    let certificate = authority.certify(&["localhost"]);
    let upstream = Upstream::counting();
    let front = TlsFront::new(server(&certificate, rustls::ALL_VERSIONS, None), upstream.addr);
    let proxy = Proxy::before(front.addr);
    let files = tempfile::tempdir().unwrap();
    let ca = files.path().join("ca.pem");
    std::fs::write(&ca, authority.pem()).unwrap();
    let url = format!("https://localhost:{}", proxy.addr.port());
    let ca = ca.display().to_string();
    let by_tls = format!("upstream.connect_timeout = \"30s\"\nupstream.tls.ca = {ca:?}\n{IMPATIENT}");
    let each = [(by_tls, vec![("ONCEGATE_UPSTREAM__URL", url.as_str())]), (IMPATIENT.to_owned(), Vec::new())];
    let fleet = Fleet::of(store, upstream, &each);
    proxy.hold("");
    let owner = fleet.begin(0, "k");
    eventually("the handshake hangs", || (proxy.held() == 1).then_some(()));
    fleet.post(1, "k").expect_problem(409, "in_progress");
    Hanging { fleet, owner, proxy, front, _files: files }
}

impl Hanging {
    /// Nothing was sent under the claim that lapsed, and the key is free.
    fn not_sent_and_free(mut self) {
        let fleet = &self.fleet;
        self.owner.read().expect_problem(503, "store_unavailable");
        assert_eq!(fleet.upstream.count(), 0, "its claim had lapsed");
        let answer = eventually("the key is free", || Some(fleet.post(1, "k")).filter(|answer| answer.status == 201));
        assert!(!answer.replayed(), "{answer:?}");
        assert!(fleet.settled(0, "k").replayed());
        fleet.executed_once("k");
    }
}

fn an_owner_that_was_stopped_before_it_sent_does_not_send_and_frees_the_key(engine: Engine) {
    for somebody_looks in [true, false] {
        let Some(store) = Server::shared(engine) else { return };
        let hanging = hanging(store);
        hanging.fleet.stop(0);
        if somebody_looks {
            until_unknown(&hanging.fleet, 1, "k");
        } else {
            thread::sleep(LEASE + Duration::from_millis(200));
        }
        hanging.proxy.release();
        hanging.fleet.cont(0);
        hanging.not_sent_and_free();
    }
}

/// It lives, but its network does not.
fn an_owner_that_cannot_renew_its_lease_does_not_send(engine: Engine) {
    let Some(store) = Server::shared(engine) else { return };
    let hanging = hanging(store);
    hanging.fleet.proxies[0].refuse(true);
    until_unknown(&hanging.fleet, 1, "k");
    hanging.proxy.release();
    eventually("the handshake is over", || (hanging.front.handshakes().len() == 1).then_some(()));
    hanging.fleet.proxies[0].refuse(false);
    hanging.not_sent_and_free();
}

/// With less than a third of its lease left: a clock that goes a little faster must not make two owners of one.
fn nothing_is_sent_under_a_lease_that_is_almost_over(engine: Engine) {
    let Some(store) = Server::shared(engine) else { return };
    let hanging = hanging(store);
    // Renewed at most a third of a lease ago.
    hanging.fleet.stop(0);
    thread::sleep(LEASE * 7 / 10);
    hanging.proxy.release();
    hanging.fleet.proxies[0].stall(true);
    hanging.fleet.cont(0);
    eventually("the handshake is over", || (hanging.front.handshakes().len() == 1).then_some(()));
    hanging.fleet.proxies[0].stall(false);
    hanging.not_sent_and_free();
}

for_each_store! {
    a_request_that_takes_longer_than_the_lease_stays_in_progress_and_is_answered
    an_owner_that_is_killed_leaves_an_unknown_outcome_once_its_lease_is_over
    the_claims_of_a_gateway_that_is_gone_show_in_the_metrics_though_nobody_asks_for_them
    an_operator_cannot_touch_a_claim_that_another_gateway_keeps_alive
    the_real_result_of_an_owner_that_was_stopped_settles_what_had_become_unknown
    an_owner_that_was_stopped_before_it_sent_does_not_send_and_frees_the_key
    an_owner_that_cannot_renew_its_lease_does_not_send
    nothing_is_sent_under_a_lease_that_is_almost_over
}
