//! Real Redis servers for tests, each on a free port of the loopback, in a directory of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const START_MAX: Duration = Duration::from_secs(20);

/// Whether there is a `redis-server` here; says loudly if not, and fails if it must not be missing.
pub fn installed() -> bool {
    let found = Command::new("redis-server").arg("--version").stdout(Stdio::null()).status();
    if found.is_ok_and(|status| status.success()) {
        return true;
    }
    let why = "there is no redis-server";
    assert!(std::env::var("ONCEGATE_REQUIRE_ALL").as_deref() != Ok("1"), "skipped, but ONCEGATE_REQUIRE_ALL=1: {why}");
    eprintln!("SKIPPED: {why}");
    false
}

pub fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// A server; killed when dropped.
pub struct Server {
    child: Child,
    pub dir: TempDir,
    pub port: u16,
    arguments: Vec<String>,
}

impl Server {
    /// With further arguments, as `--name value`. By default nothing goes to disk.
    pub fn start(arguments: &[&str]) -> Self {
        let mut dir = tempfile::tempdir().unwrap();
        let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        // Somebody else may take the port meanwhile.
        for _ in 0..5 {
            let port = free_port();
            let child = spawn(&dir, port, &arguments);
            let mut server = Self { child, dir, port, arguments: arguments.clone() };
            if server.is_ready() {
                return server;
            }
            let _ = server.child.kill();
            let _ = server.child.wait();
            dir = std::mem::replace(&mut server.dir, tempfile::tempdir().unwrap());
        }
        panic!("redis-server does not start");
    }

    /// Whose every write is on disk before it is acknowledged.
    pub fn strict() -> Self {
        Self::start(&["--appendonly", "yes", "--appendfsync", "always"])
    }

    /// Three masters that share the slots.
    pub fn cluster(arguments: &[&str]) -> [Self; 3] {
        let nodes = [0; 3].map(|_| Self::node(arguments));
        for (node, slots) in nodes.iter().zip([("0", "5460"), ("5461", "10922"), ("10923", "16383")]) {
            node.client().ask(&["CLUSTER", "ADDSLOTSRANGE", slots.0, slots.1]);
            node.client().ask(&["CLUSTER", "MEET", "127.0.0.1", &nodes[0].port.to_string()]);
        }
        let end = Instant::now() + START_MAX;
        while !nodes.iter().all(|node| node.client().ask(&["CLUSTER", "INFO"]).text().contains("cluster_state:ok")) {
            assert!(Instant::now() < end, "the cluster does not come together");
            std::thread::sleep(Duration::from_millis(20));
        }
        nodes
    }

    /// A node of a cluster, still alone.
    pub fn node(arguments: &[&str]) -> Self {
        Self::start(&[&["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"], arguments].concat())
    }

    /// A replica of this one, in step with it.
    pub fn replica(&self) -> Self {
        let replica =
            Self::start(&["--replicaof", &format!("127.0.0.1 {}", self.port), "--repl-diskless-sync-delay", "0"]);
        let end = Instant::now() + START_MAX;
        while !replica.client().ask(&["INFO", "replication"]).text().contains("master_link_status:up") {
            assert!(Instant::now() < end, "the replica does not catch up");
            std::thread::sleep(Duration::from_millis(5));
        }
        replica
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// `SIGKILL`, and its end awaited.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Anew, on the same port and directory.
    pub fn restart(&mut self) {
        self.child = spawn(&self.dir, self.port, &self.arguments);
        assert!(self.is_ready(), "redis-server does not start again");
    }

    /// Stops it as it is: the kernel still takes connections and bytes for it.
    pub fn pause(&self) {
        self.signal(rustix::process::Signal::STOP);
    }

    pub fn resume(&self) {
        self.signal(rustix::process::Signal::CONT);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let id = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(id, signal).unwrap();
    }

    pub fn client(&self) -> Client {
        Client::connect(self.port).unwrap()
    }

    fn is_ready(&mut self) -> bool {
        let end = Instant::now() + START_MAX;
        while Instant::now() < end {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            if let Ok(mut client) = Client::connect(self.port) {
                let answer = client.try_ask(&["PING"]);
                if answer.is_ok_and(|answer| !matches!(&answer, Value::Error(error) if error.starts_with("LOADING"))) {
                    return true;
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("redis-server is not ready after {START_MAX:?}");
    }
}

/// A sentinel that watches one master, called `main`; alone it decides.
pub struct Sentinel {
    child: Child,
    pub port: u16,
    _dir: TempDir,
}

impl Sentinel {
    pub fn start(master: &Server) -> Self {
        let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
        let file = dir.path().join("sentinel.conf");
        let text = format!(
            "port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {} 1\nsentinel down-after-milliseconds main 500\n\
             sentinel failover-timeout main 2000\ndir {}\n",
            master.port,
            dir.path().display()
        );
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new("redis-server");
        let child = command.arg(&file).arg("--sentinel").stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let sentinel = Self { child, port, _dir: dir };
        let end = Instant::now() + START_MAX;
        // It has to know the replica, or there is nobody to turn to.
        while !Client::connect(port).is_ok_and(|mut client| {
            let replicas = client.try_ask(&["SENTINEL", "replicas", "main"]);
            matches!(replicas, Ok(Value::Array(replicas)) if !replicas.is_empty())
        }) {
            assert!(Instant::now() < end, "the sentinel finds no replica");
            std::thread::sleep(Duration::from_millis(20));
        }
        sentinel
    }

    pub fn client(&self) -> Client {
        Client::connect(self.port).unwrap()
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(dir: &TempDir, port: u16, arguments: &[String]) -> Child {
    let port = port.to_string();
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.path().join("log")).unwrap();
    Command::new("redis-server")
        .args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--enable-debug-command", "yes", "--dir"])
        .arg(dir.path())
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Nil,
    Int(i64),
    Bytes(Vec<u8>),
    Error(String),
    Array(Vec<Self>),
}

impl Value {
    pub fn text(&self) -> String {
        match self {
            Self::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Self::Int(int) => int.to_string(),
            other => panic!("{other:?} is no text"),
        }
    }
}

/// A connection of the test's own, to look into the server and to meddle with it.
pub struct Client(BufReader<TcpStream>);

impl Client {
    pub fn connect(port: u16) -> std::io::Result<Self> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// # Panics
    /// If the server refuses.
    pub fn ask<A: AsRef<[u8]>>(&mut self, command: &[A]) -> Value {
        match self.try_ask(command).unwrap() {
            Value::Error(error) => panic!("{error}"),
            value => value,
        }
    }

    pub fn try_ask<A: AsRef<[u8]>>(&mut self, command: &[A]) -> std::io::Result<Value> {
        let mut bytes = format!("*{}\r\n", command.len()).into_bytes();
        for argument in command {
            bytes.extend(format!("${}\r\n", argument.as_ref().len()).bytes());
            bytes.extend(argument.as_ref());
            bytes.extend(b"\r\n");
        }
        self.0.get_mut().write_all(&bytes)?;
        self.read()
    }

    /// The next reply, or word of a channel.
    pub fn read(&mut self) -> std::io::Result<Value> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let (kind, rest) = line.trim_end().split_at(1);
        Ok(match kind {
            "+" => Value::Bytes(rest.into()),
            "-" => Value::Error(rest.to_owned()),
            ":" => Value::Int(rest.parse().unwrap()),
            "$" | "*" if rest == "-1" => Value::Nil,
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>().unwrap() + 2];
                self.0.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                Value::Bytes(bytes)
            }
            "*" => Value::Array((0..rest.parse().unwrap()).map(|_| self.read()).collect::<Result<_, _>>()?),
            _ => panic!("{line:?} is no reply"),
        })
    }
}
