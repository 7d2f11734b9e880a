//! Gateways over one store, each with a network of its own to it.

use crate::http::recorded;
use crate::proxy::Proxy;
use crate::server::{Engine, Server};
use crate::support::gateway::Refusal;
use crate::support::{Client, Gateway, PATIENCE, Response, Upstream, call, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) const LEASE: Duration = Duration::from_secs(2);
pub(crate) const TIMEOUT: Duration = Duration::from_millis(400);

pub(crate) struct Fleet {
    pub(crate) gateways: Vec<Gateway>,
    pub(crate) proxies: Vec<Proxy>,
    pub(crate) upstream: Upstream,
    pub(crate) server: Arc<Server>,
    pub(crate) prefix: String,
}

/// A word for the names in a store that nobody else uses.
pub(crate) fn fresh_prefix() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("fleet{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Settings of a gateway that reaches the store at `url`.
pub(crate) fn settings(engine: Engine, url: &str, prefix: &str, further: &str) -> String {
    let engine = match engine {
        Engine::Redis => "redis",
        Engine::Postgres => "postgres",
    };
    format!(
        "store.engine = {engine:?}\nstore.url = {url:?}\nstore.prefix = {prefix:?}\nstore.lease = \"{}ms\"\n\
         store.timeout = \"{}ms\"\n{further}",
        LEASE.as_millis(),
        TIMEOUT.as_millis()
    )
}

impl Fleet {
    /// Over a store that other tests use, too: it must not be disturbed.
    pub(crate) fn start(engine: Engine, count: usize, upstream: Upstream, further: &str) -> Option<Self> {
        Some(Self::over(Server::shared(engine)?, count, upstream, further))
    }

    /// Over a store of its own.
    pub(crate) fn alone(engine: Engine, count: usize, upstream: Upstream, further: &str) -> Option<Self> {
        Some(Self::over(Server::start(engine)?, count, upstream, further))
    }

    fn over(server: Arc<Server>, count: usize, upstream: Upstream, further: &str) -> Self {
        let each = vec![(further.to_owned(), Vec::new()); count];
        Self::of(server, upstream, &each)
    }

    /// With settings and environment for each gateway.
    pub(crate) fn of(server: Arc<Server>, upstream: Upstream, each: &[(String, Vec<(&str, &str)>)]) -> Self {
        let mut fleet = Self { gateways: Vec::new(), proxies: Vec::new(), upstream, server, prefix: fresh_prefix() };
        for (further, environment) in each {
            fleet.join(further, environment).unwrap_or_else(|refusal| panic!("a gateway did not start: {refusal:?}"));
        }
        fleet
    }

    /// Starts one more gateway.
    pub(crate) fn join(&mut self, further: &str, environment: &[(&str, &str)]) -> Result<(), Refusal> {
        let proxy = Proxy::before(self.server.addr());
        let settings = settings(self.server.engine(), &self.server.url(proxy.addr), &self.prefix, further);
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let gateway = Gateway::try_start(dir, &self.upstream.url(), &settings, &[], environment)?;
        self.gateways.push(gateway);
        self.proxies.push(proxy);
        Ok(())
    }

    /// Sends a keyed request through one of the gateways and leaves the answer to be read.
    pub(crate) fn begin(&self, gateway: usize, key: &str) -> Client {
        let mut client = Client::connect(self.gateways[gateway].addr);
        client.send(crate::support::post("/posts", key, "{}"));
        client
    }

    pub(crate) fn post(&self, gateway: usize, key: &str) -> Response {
        self.gateways[gateway].post(key, "{}")
    }

    /// What a client gets that retries as long as it is told to.
    #[track_caller]
    pub(crate) fn settled(&self, gateway: usize, key: &str) -> Response {
        eventually("an answer that tells no one to come again", || {
            let answer = self.post(gateway, key);
            let again = answer.header("retry-after").is_some() || answer.status >= 500;
            (!again).then_some(answer)
        })
    }

    #[track_caller]
    pub(crate) fn executed_once(&self, key: &str) {
        assert_eq!(self.upstream.executions(key), 1, "{key}");
    }

    /// The records of a key, as a gateway's admin address shows them.
    pub(crate) fn records(&self, gateway: usize, key: &str) -> Vec<Value> {
        let found = self.ask(gateway, "GET", &format!("/records?key={key}"), "");
        assert_eq!(found.status, 200, "{found:?}");
        found.json()["records"].as_array().unwrap().clone()
    }

    pub(crate) fn resolve_not_executed(&self, gateway: usize, id: &str) -> Response {
        self.ask(gateway, "POST", &format!("/records/{id}/resolve"), r#"{"not_executed":true}"#)
    }

    fn ask(&self, gateway: usize, method: &str, target: &str, body: &str) -> Response {
        let head = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        let fields = format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
        call(self.gateways[gateway].admin, format!("{head}{fields}{body}"))
    }

    pub(crate) fn stop(&self, gateway: usize) {
        signal(&self.gateways[gateway], Signal::STOP);
    }

    pub(crate) fn cont(&self, gateway: usize) {
        signal(&self.gateways[gateway], Signal::CONT);
    }

    /// `kill -9` and a new start.
    pub(crate) fn restart(&mut self, gateway: usize) {
        let old = self.gateways.remove(gateway);
        self.gateways.insert(gateway, old.restart());
    }

    /// Waits until a gateway has found out that the store is there, or that it is not.
    #[track_caller]
    pub(crate) fn wait_for_store(&self, gateway: usize, reachable: bool) {
        let wanted = if reachable { 0.0 } else { 1.0 };
        eventually("the gateway knows whether the store is there", || {
            (self.gateways[gateway].metric("oncegate_store_unreachable") == wanted).then_some(())
        });
    }
}

pub(crate) fn signal(gateway: &Gateway, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(gateway.pid()).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// How long it takes until something holds.
#[track_caller]
pub(crate) fn takes(what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
    began.elapsed()
}

/// A `Date` that an upstream may send.
pub(crate) const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";

/// Whether two answers are the same up to the marks of a replay and what is not recorded.
#[track_caller]
pub(crate) fn assert_same(what: &str, first: &Response, second: &Response) {
    assert_eq!(recorded(first, DATE), recorded(second, DATE), "{what}");
}
