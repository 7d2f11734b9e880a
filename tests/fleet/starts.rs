//! Gateways that start over a shared store: which stores they refuse, and what they agree on.

use crate::fleet::{Fleet, fresh_prefix, settings};
use crate::postgres_server;
use crate::proxy::Proxy;
use crate::redis_server;
use crate::server::{Engine, Server};
use crate::support::gateway::Refusal;
use crate::support::{Gateway, Upstream, eventually};
use std::net::TcpListener;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

const SECRET: &str = "n0b0dy-may-see-me";

fn try_start(engine: Engine, url: &str, upstream: &Upstream, further: &str) -> Result<Gateway, Refusal> {
    let settings = settings(engine, url, &fresh_prefix(), further);
    Gateway::try_start(Arc::new(tempfile::tempdir().unwrap()), &upstream.url(), &settings, &[], &[])
}

#[track_caller]
fn refused(result: Result<Gateway, Refusal>, code: i32) -> String {
    let Err(refusal) = result else { panic!("it started") };
    assert_eq!(refusal.code, Some(code), "{refusal:?}");
    assert!(!refusal.stderr.contains(SECRET), "{refusal:?}");
    refusal.stderr
}

fn a_wrong_password_is_refused_without_showing_it(engine: Engine) {
    let upstream = Upstream::counting();
    let (server, right, wrong) = match engine {
        Engine::Redis => {
            if !redis_server::installed() {
                return;
            }
            let strict = ["--appendonly", "yes", "--appendfsync", "always"];
            let server = redis_server::Server::start(&[&strict[..], &["--requirepass", "right"]].concat());
            let at = format!("127.0.0.1:{}", server.port);
            let urls = (format!("redis://:right@{at}"), format!("redis://:{SECRET}@{at}"));
            (Server::Redis(Mutex::new(server)), urls.0, urls.1)
        }
        Engine::Postgres => {
            let Some(server) = postgres_server::Server::start(&[]) else { return };
            let server = Server::Postgres(server);
            server.sql("CREATE ROLE with_password LOGIN PASSWORD 'right'");
            server.sql("GRANT ALL ON SCHEMA public TO with_password");
            let url = |password: &str| {
                format!("postgres://with_password:{password}@{}/postgres?sslmode=disable", server.addr())
            };
            let urls = (url("right"), url(SECRET));
            (server, urls.0, urls.1)
        }
    };
    let said = refused(try_start(engine, &wrong, &upstream, ""), 1);
    assert!(said.contains(&server.addr().to_string()), "it says where: {said}");
    assert!(said.contains("refuses"), "it says what: {said}");
    let gateway = try_start(engine, &right, &upstream, "").unwrap();
    assert_eq!(gateway.post("k", "{}").status, 201);
    // In a file of its own it beats that of the URL, and is shown as little.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("password");
    let further = format!("store.password_file = {:?}", file.display().to_string());
    std::fs::write(&file, format!("{SECRET}\n")).unwrap();
    refused(try_start(engine, &right, &upstream, &further), 1);
    std::fs::write(&file, "right\n").unwrap();
    let gateway = try_start(engine, &wrong, &upstream, &further).unwrap();
    assert_eq!(gateway.post("k", "{}").status, 201);
    assert!(!gateway.log().contains(SECRET));
}

fn a_store_that_is_not_there_is_an_error_that_says_where_it_was_looked_for(engine: Engine) {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = match engine {
        Engine::Redis => format!("redis://user:{SECRET}@{nobody}"),
        Engine::Postgres => format!("postgres://user:{SECRET}@{nobody}/db?sslmode=disable"),
    };
    let said = refused(try_start(engine, &url, &Upstream::counting(), "store.start_timeout = \"300ms\""), 1);
    assert!(said.contains(&nobody.to_string()) && said.contains("cannot be reached"), "{said}");
}

fn a_start_waits_for_a_store_that_is_about_to_start(engine: Engine) {
    let Some(server) = Server::shared(engine) else { return };
    let (proxy, upstream) = (Proxy::before(server.addr()), Upstream::counting());
    proxy.refuse(true);
    let gateway = thread::scope(|scope| {
        let starting = scope.spawn(|| try_start(engine, &server.url(proxy.addr), &upstream, ""));
        eventually("it has tried more than once", || (proxy.refused() > 1).then_some(()));
        proxy.refuse(false);
        starting.join().unwrap().unwrap()
    });
    assert!(gateway.log().contains("the start waits for the store"));
    assert_eq!(gateway.post("k", "{}").status, 201);
}

fn a_store_that_may_lose_what_it_acknowledged_is_refused_unless_the_operator_accepts_that(engine: Engine) {
    let upstream = Upstream::counting();
    let servers = match engine {
        Engine::Redis => {
            if !redis_server::installed() {
                return;
            }
            let always = ["--appendonly", "yes", "--appendfsync", "always"];
            let evicting = [&always[..], &["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]].concat();
            let everysec = ["--appendonly", "yes", "--appendfsync", "everysec"];
            let start = |arguments: &[&str]| Server::Redis(Mutex::new(redis_server::Server::start(arguments)));
            vec![
                (start(&[]), "appendonly", true),
                (start(&everysec), "appendfsync", true),
                // It may forget what it has promised to keep at any time: that is no store at all.
                (start(&evicting), "noeviction", false),
            ]
        }
        Engine::Postgres => {
            let start = |setting: &str| postgres_server::Server::start(&[setting]).map(Server::Postgres);
            let (Some(asynchronous), Some(unsynced)) = (start("synchronous_commit=off"), start("fsync=off")) else {
                return;
            };
            vec![(asynchronous, "synchronous_commit", true), (unsynced, "fsync", true)]
        }
    };
    for (server, word, bearable) in servers {
        let url = server.url(server.addr());
        let said = refused(try_start(engine, &url, &upstream, ""), 2);
        assert!(said.contains(word) && said.contains("relaxed"), "{said}");
        let relaxed = try_start(engine, &url, &upstream, "store.durability = \"relaxed\"");
        if bearable {
            assert_eq!(relaxed.unwrap().post("k", "{}").status, 201);
        } else {
            refused(relaxed, 1);
        }
    }
}

fn gateways_that_start_at_once_over_an_empty_store_agree(engine: Engine) {
    let Some(server) = Server::shared(engine) else { return };
    let (upstream, prefix) = (Upstream::counting(), fresh_prefix());
    let settings = settings(engine, &server.url(server.addr()), &prefix, "cache.max_bytes = 0");
    let barrier = Barrier::new(4);
    let gateways = thread::scope(|scope| {
        let start = || {
            barrier.wait();
            let dir = Arc::new(tempfile::tempdir().unwrap());
            Gateway::try_start(dir, &upstream.url(), &settings, &[], &[]).unwrap()
        };
        let starting = (0..4).map(|_| scope.spawn(start)).collect::<Vec<_>>();
        starting.into_iter().map(|gateway| gateway.join().unwrap()).collect::<Vec<_>>()
    });
    for (n, first) in gateways.iter().enumerate() {
        let key = format!("k{n}");
        assert!(!first.post(&key, "{}").replayed());
        // The same secret makes the same id.
        assert!(gateways.iter().all(|gateway| gateway.post(&key, "{}").replayed()));
        assert_eq!(upstream.executions(&key), 1);
    }
    let created = |gateway: &&Gateway| gateway.log().contains("a new store was created");
    assert!(gateways.iter().filter(created).count() >= 1, "all keys are new to it, and somebody says so");
    let later = Gateway::try_start(Arc::new(tempfile::tempdir().unwrap()), &upstream.url(), &settings, &[], &[]);
    let later = later.unwrap();
    assert!(later.post("k0", "{}").replayed());
    assert!(!created(&&later) && later.metric("oncegate_store_created") == 0.0, "it was there");
}

fn a_store_that_is_missing_is_an_error_where_it_must_not_be_made(engine: Engine) {
    let Some(server) = Server::start(engine) else { return };
    let (upstream, prefix) = (Upstream::counting(), fresh_prefix());
    let start = |create: bool| {
        let further = format!("store.create = {create}\ncache.max_bytes = 0");
        let settings = settings(engine, &server.url(server.addr()), &prefix, &further);
        Gateway::try_start(Arc::new(tempfile::tempdir().unwrap()), &upstream.url(), &settings, &[], &[])
    };
    // As an embedded store that is missing.
    let missing = || {
        let said = refused(start(false), 1);
        assert!(said.contains("there is no store at") && said.contains("`store.create` is false"), "{said}");
    };
    missing();
    assert!(server.is_empty(), "nothing was made");
    let gateway = start(true).unwrap();
    assert!(!gateway.post("k", "{}").replayed());
    assert!(start(false).unwrap().post("k", "{}").replayed(), "it is there");
    // A part of it is lost: with another secret all keys would be new.
    server.lose_secret(&prefix);
    missing();
    server.empty(&prefix);
    missing();
}

fn fleets_with_prefixes_of_their_own_share_a_server_but_no_keys(engine: Engine) {
    let Some(one) = Fleet::start(engine, 1, Upstream::counting(), "") else { return };
    let Some(other) = Fleet::start(engine, 1, Upstream::counting(), "") else { return };
    for fleet in [&one, &other] {
        assert!(!fleet.post(0, "k").replayed());
        assert!(fleet.post(0, "k").replayed());
        fleet.executed_once("k");
    }
}

fn a_gateway_that_would_make_other_ids_is_refused_unless_they_are_accepted(engine: Engine) {
    let Some(mut fleet) = Fleet::start(engine, 1, Upstream::counting(), "") else { return };
    assert_eq!(fleet.post(0, "k").status, 201);
    let said = refused_join(&mut fleet, "idempotency.scope = [\"authorization\"]");
    assert!(said.contains("/posts") && said.contains("--accept-new-identity"), "{said}");
    // With the same settings it may.
    fleet.join("", &[]).unwrap();
    assert!(fleet.post(1, "k").replayed());
    // So may another route.
    fleet.join("[[routes]]\npath = \"/posts\"\n[[routes]]\npath = \"/payments\"\n", &[]).unwrap();
    assert!(fleet.post(2, "k").replayed());
}

#[track_caller]
fn refused_join(fleet: &mut Fleet, further: &str) -> String {
    let Err(refusal) = fleet.join(further, &[]) else { panic!("it started") };
    assert_eq!(refusal.code, Some(2), "{refusal:?}");
    refusal.stderr
}

for_each_store! {
    a_wrong_password_is_refused_without_showing_it
    a_store_that_is_not_there_is_an_error_that_says_where_it_was_looked_for
    a_start_waits_for_a_store_that_is_about_to_start
    a_store_that_may_lose_what_it_acknowledged_is_refused_unless_the_operator_accepts_that
    gateways_that_start_at_once_over_an_empty_store_agree
    a_store_that_is_missing_is_an_error_where_it_must_not_be_made
    fleets_with_prefixes_of_their_own_share_a_server_but_no_keys
    a_gateway_that_would_make_other_ids_is_refused_unless_they_are_accepted
}
