//! A restart under load, the listening socket held by a service manager: one process is drained, the next one takes over.

use crate::support::gateway::Gateway;
use crate::support::{Client, Response, Upstream, eventually, post, request};
use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const CLIENTS: usize = 8;
const RESTARTS: u64 = 3;
/// Requests answered between two restarts.
const BETWEEN: u64 = 1500;

/// What a client has done, and what went wrong.
#[derive(Default)]
struct Tally {
    keys: Vec<String>,
    draining: u64,
    failed: Vec<String>,
}

struct Caller<'a> {
    addr: SocketAddr,
    connection: Option<Client>,
    answered: &'a AtomicU64,
    tally: Tally,
}

impl Caller<'_> {
    /// Sends a request until it is answered by anything but `draining`, as a client that retries does.
    fn call(&mut self, request: &[u8]) -> Option<Response> {
        loop {
            let mut connection = self.connection.take().unwrap_or_else(|| Client::connect(self.addr));
            connection.try_send(request);
            let Some(response) = connection.try_read() else {
                self.tally.failed.push("the connection ended without an answer".to_owned());
                return None;
            };
            self.answered.fetch_add(1, Ordering::Relaxed);
            if response.header("connection") != Some("close") {
                self.connection = Some(connection);
            }
            if response.status == 503 && response.json()["code"] == "draining" {
                self.tally.draining += 1;
                continue;
            }
            return Some(response);
        }
    }

    fn expect(&mut self, what: &str, request: &[u8], fits: impl Fn(&Response) -> bool) {
        if let Some(response) = self.call(request).filter(|response| !fits(response)) {
            self.tally.failed.push(format!("{what}: {response:?}"));
        }
    }
}

fn traffic(client: usize, addr: SocketAddr, stop: &AtomicBool, answered: &AtomicU64) -> Tally {
    let mut caller = Caller { addr, connection: None, answered, tally: Tally::default() };
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let key = format!("{client}-{n}");
        let keyed = post("/posts", &key, "{}");
        let mut first = None;
        if let Some(response) = caller.call(keyed.as_ref()) {
            first = Some(response.body.clone());
            if response.status != 201 {
                caller.tally.failed.push(format!("fresh: {response:?}"));
            }
        }
        caller.expect("read", request("GET", "/posts", &[], "").as_ref(), |response| response.status == 201);
        caller
            .expect("retry", keyed.as_ref(), |response| response.replayed() && Some(&response.body) == first.as_ref());
        let unkeyed = request("POST", "/posts", &[], "{}");
        caller.expect("without a key", unkeyed.as_ref(), |response| response.status == 201);
        caller.tally.keys.push(key);
    }
    caller.tally
}

#[test]
fn a_rolling_restart_under_load_fails_no_request_and_executes_none_twice() {
    let upstream = Upstream::counting();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let start = || {
        let passed = OwnedFd::from(listener.try_clone().unwrap());
        let gateway = Gateway::try_start_on(passed, Arc::clone(&dir), &upstream.url(), "", &addr.to_string());
        gateway.unwrap_or_else(|refusal| panic!("the gateway did not start: {refusal:?}"))
    };
    let mut gateway = start();
    let (stop, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let tallies = std::thread::scope(|scope| {
        let (stop, answered) = (&stop, &answered);
        let clients: Vec<_> =
            (0..CLIENTS).map(|client| scope.spawn(move || traffic(client, addr, stop, answered))).collect();
        let progress = |to: u64| {
            eventually("requests are answered", || (answered.load(Ordering::Relaxed) >= to).then_some(()));
        };
        for _ in 0..RESTARTS {
            progress(answered.load(Ordering::Relaxed) + BETWEEN);
            gateway.terminate();
            assert_eq!(gateway.wait(), Some(0), "{}", gateway.log());
            gateway = start();
        }
        progress(answered.load(Ordering::Relaxed) + BETWEEN);
        stop.store(true, Ordering::Relaxed);
        clients.into_iter().map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    let failed: Vec<_> = tallies.iter().flat_map(|tally| &tally.failed).collect();
    assert!(failed.is_empty(), "{} failed, such as {:?}", failed.len(), &failed[..failed.len().min(5)]);
    let mut executions: HashMap<String, u64> = HashMap::new();
    for request in upstream.requests() {
        if let Some(key) = request.key() {
            *executions.entry(key.to_owned()).or_default() += 1;
        }
    }
    let keys: Vec<_> = tallies.iter().flat_map(|tally| &tally.keys).collect();
    assert!(keys.iter().all(|key| executions.get(*key) == Some(&1)), "each key is executed once");
    let draining: u64 = tallies.iter().map(|tally| tally.draining).sum();
    eprintln!("{} requests, {} keys, {draining} told to come back", answered.load(Ordering::Relaxed), keys.len());
}

#[test]
fn a_passed_socket_that_no_address_asks_for_is_an_error() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let refused = Gateway::try_start_on(OwnedFd::from(listener), dir, "http://127.0.0.1:9", "", "127.0.0.1:0");
    let Err(refusal) = refused else { panic!("it started") };
    assert_eq!(refusal.code, Some(1));
    assert!(refusal.stderr.contains(&addr), "{}", refusal.stderr);
}

#[test]
fn a_passed_unix_socket_is_served_and_its_file_stays() {
    let upstream = Upstream::counting();
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let path = dir.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let tcp = "127.0.0.1:0";
    let listen = format!("[\"{tcp}\", \"unix:{}\"]", path.display());
    let passed = OwnedFd::from(listener.try_clone().unwrap());
    let started = Gateway::try_start_on(passed, Arc::clone(&dir), &upstream.url(), "", &listen);
    let mut gateway = started.unwrap_or_else(|refusal| panic!("the gateway did not start: {refusal:?}"));
    let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
    use std::io::{Read, Write};
    client.write_all(request("GET", "/", &[("Connection", "close")], "").as_ref()).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
    gateway.terminate();
    assert_eq!(gateway.wait(), Some(0));
    assert!(path.exists(), "the file is the service manager's");
}
