//! A posting backend that knows nothing of keys, and curl that retries: one post.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

#[path = "it/support/mod.rs"]
mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use support::{Gateway, eventually, request};

const PACKAGE: &str = "json-server@0.17.4";

/// Where json-server's script is, installed if it is not there yet.
fn script() -> Option<PathBuf> {
    let there = |program: &str| {
        let run = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        run.is_ok_and(|status| status.success())
    };
    if let Some(missing) = ["node", "npm", "curl"].into_iter().find(|program| !there(program)) {
        support::skip(&format!("there is no {missing}"));
        return None;
    }
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("json-server");
    let script = dir.join("node_modules/json-server/lib/cli/bin.js");
    if !script.exists() {
        std::fs::create_dir_all(&dir).unwrap();
        let install = Command::new("npm")
            .args(["install", "--no-audit", "--no-fund", "--prefix", ".", PACKAGE])
            .current_dir(&dir)
            .stdout(Stdio::null())
            .status();
        if !install.is_ok_and(|status| status.success()) || !script.exists() {
            support::skip(&format!("npm cannot install {PACKAGE}"));
            return None;
        }
    }
    Some(script)
}

/// A running json-server. Dropped, it is ended.
struct Backend {
    child: Child,
    addr: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Backend {
    fn start() -> Option<Self> {
        let script = script()?;
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("db.json"), r#"{"posts":[]}"#).unwrap();
        let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let child = Command::new("node")
            .arg(script)
            .args(["--quiet", "--host", "127.0.0.1", "--port", &addr.port().to_string(), "db.json"])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let backend = Self { child, addr, _dir: dir };
        eventually("json-server listens", || TcpStream::connect(addr).ok());
        Some(backend)
    }

    /// The titles of all posts, asked of the backend itself.
    fn titles(&self) -> Vec<String> {
        let answer = support::call(self.addr, request("GET", "/posts", &[("Connection", "close")], ""));
        let posts = answer.json();
        posts.as_array().unwrap().iter().map(|post| post["title"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Relays connections to the gateway, and resets the first `cuts` of them when the answer's first bytes have come.
fn relay(gateway: SocketAddr, cuts: usize) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let done = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&done);
    thread::spawn(move || {
        for (n, client) in listener.incoming().map_while(Result::ok).enumerate() {
            let counter = Arc::clone(&counter);
            let server = TcpStream::connect(gateway).unwrap();
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
            thread::spawn(move || carry_answer(server, client, n < cuts, &counter));
        }
    });
    (addr, done)
}

fn carry_answer(mut server: TcpStream, mut client: TcpStream, cut: bool, counter: &AtomicUsize) {
    let mut chunk = [0; 4096];
    while let Ok(len @ 1..) = server.read(&mut chunk) {
        if cut {
            counter.fetch_add(1, Ordering::SeqCst);
            break;
        }
        if client.write_all(&chunk[..len]).is_err() {
            break;
        }
    }
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
}

/// `curl --retry` with one key: the last attempt's status and body.
fn curl(addr: SocketAddr, key: &str, title: &str) -> (String, String) {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--retry", "5", "--retry-all-errors", "--retry-delay", "1"])
        .args(["--max-time", "60", "--noproxy", "*", "--write-out", "\n%{http_code}"])
        .args(["-H", "Authorization: Bearer alice", "-H", "Content-Type: application/json"])
        .args(["-H", &format!("Idempotency-Key: {key}"), "--data", &format!("{{\"title\":\"{title}\"}}")])
        .arg(format!("http://{addr}/posts"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap();
    (status.to_owned(), body.to_owned())
}

#[test]
fn retries_over_cut_connections_and_parallel_ones_leave_one_post_a_key() {
    let Some(backend) = Backend::start() else { return };
    let gateway = Gateway::start_before(&format!("http://{}", backend.addr), "");
    let (addr, cut) = relay(gateway.addr, 2);

    let (status, body) = curl(addr, "key-1", "one");
    assert_eq!((status.as_str(), cut.load(Ordering::SeqCst)), ("201", 2), "{body}");
    assert_eq!(backend.titles(), ["one"]);

    let answers = thread::scope(|scope| {
        let calls = (0..10).map(|_| scope.spawn(|| curl(addr, "key-1", "one"))).collect::<Vec<_>>();
        calls.into_iter().map(|call| call.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(answers.iter().all(|answer| *answer == (status.clone(), body.clone())), "{answers:?}");
    assert_eq!(backend.titles(), ["one"]);

    let answers = thread::scope(|scope| {
        let calls = (0..10).map(|_| scope.spawn(|| curl(addr, "key-2", "two"))).collect::<Vec<_>>();
        calls.into_iter().map(|call| call.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(answers.iter().all(|answer| answer.0 == "201" && answer.1 == answers[0].1), "{answers:?}");
    assert_eq!(backend.titles(), ["one", "two"]);

    let through = gateway.call(request("GET", "/posts", &[("Idempotency-Key", "key-1")], ""));
    assert_eq!((through.status, through.replayed()), (200, false));
    assert_eq!(through.json().as_array().map(Vec::len), Some(2));
}
