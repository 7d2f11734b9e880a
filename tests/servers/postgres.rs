//! PostgreSQL servers for tests: each on a free port, in a directory of its own, gone with the test.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses what it needs")]

use rustix::process::{Pid, Signal, geteuid, kill_process};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{LazyLock, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// What every server is started with; what comes later wins.
const SETTINGS: &[&str] = &[
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "max_connections=300",
    "shared_buffers=32MB",
    "dynamic_shared_memory_type=mmap",
    "log_min_messages=warning",
];

/// `trust` for all but those who are named so.
const HBA: &str = "host all with_password 127.0.0.1/32 scram-sha-256\n\
                   hostssl all with_certificate 127.0.0.1/32 cert\nhostnossl all with_certificate 127.0.0.1/32 reject\n\
                   host all all 127.0.0.1/32 trust\n\
                   host replication all 127.0.0.1/32 trust\n";

/// Where the programs are; `None` where there is no server to test with: that is said, and may be a failure.
fn programs() -> Option<&'static Path> {
    static FOUND: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
        let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
        let mut directories: Vec<_> = versions.map(|version| version.path().join("bin")).collect();
        directories.sort();
        directories.into_iter().rfind(|path| path.join("initdb").exists() && path.join("postgres").exists())
    });
    if FOUND.is_none() {
        eprintln!("SKIPPED: no PostgreSQL server is installed");
        let required = std::env::var("ONCEGATE_REQUIRE_ALL").as_deref() == Ok("1");
        assert!(!required, "skipped, but ONCEGATE_REQUIRE_ALL=1: no PostgreSQL server is installed");
    }
    FOUND.as_deref()
}

/// Servers refuse to run as root.
fn user() -> Option<&'static str> {
    static NAME: LazyLock<&str> = LazyLock::new(|| {
        let users = std::fs::read_to_string("/etc/passwd").unwrap();
        if users.lines().any(|line| line.starts_with("postgres:")) { "postgres" } else { "nobody" }
    });
    geteuid().is_root().then(|| *NAME)
}

/// A command that runs as that user, and is told to stop when the thread that starts it ends.
pub fn unprivileged(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    if let Some(user) = user() {
        command.arg(format!("--reuid={user}")).arg("--clear-groups");
    }
    command.arg("--pdeathsig=QUIT").arg("--").arg(program).current_dir("/").stdin(Stdio::null());
    command
}

/// A directory that the server's user can work in.
pub fn directory() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

pub fn give_away(path: &Path) {
    if let Some(user) = user() {
        run(Command::new("chown").arg(user).arg(path));
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A fresh cluster to copy: making one takes seconds.
fn template() -> &'static Path {
    static TEMPLATE: OnceLock<PathBuf> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        // Kept, for nothing is dropped at the end of the process: in the directory of the build.
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("postgres-template");
        let lock =
            std::fs::File::create(Path::new(env!("CARGO_TARGET_TMPDIR")).join("postgres-template.lock")).unwrap();
        lock.lock().unwrap();
        if place.join("data/PG_VERSION").exists() {
            return place;
        }
        let _ = std::fs::remove_dir_all(&place);
        let dir = directory();
        give_away(dir.path());
        let data = dir.path().join("data");
        let initdb = programs().unwrap().join("initdb");
        run(unprivileged(&initdb)
            .args(["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "-N", "-D"])
            .arg(&data));
        std::fs::create_dir_all(&place).unwrap();
        run(Command::new("cp").arg("-a").arg(&data).arg(place.join("data.new")));
        std::fs::rename(place.join("data.new"), place.join("data")).unwrap();
        place
    })
}

pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Runs `command` until the end, on a thread that lives as long: its end is the signal to stop.
pub fn spawn(mut command: Command) -> Pid {
    let (told, pid) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut child = command.spawn().unwrap();
        told.send(child.id()).unwrap();
        child.wait().unwrap();
    });
    Pid::from_raw(pid.recv().unwrap().try_into().unwrap()).unwrap()
}

#[track_caller]
pub fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn exists(pid: Pid) -> bool {
    // A child that was not waited for yet is dead all the same.
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn children(parent: Pid) -> Vec<Pid> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter_map(Pid::from_raw);
    pids.filter(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
        let rest = stat.rsplit_once(") ").map(|(_, rest)| rest.to_owned()).unwrap_or_default();
        rest.split(' ').nth(1) == Some(&parent.as_raw_nonzero().to_string())
    })
    .collect()
}

pub struct Server {
    dir: TempDir,
    pub port: u16,
    settings: Vec<String>,
    postmaster: Mutex<Option<Pid>>,
}

impl Server {
    /// With settings of its own, `name=value`. `None`: there is nothing to start.
    pub fn start(settings: &[&str]) -> Option<Self> {
        Self::start_with(settings, &[])
    }

    /// And with files in its directory, which only it can read.
    pub fn start_with(settings: &[&str], files: &[(&str, &str)]) -> Option<Self> {
        programs()?;
        let dir = directory();
        run(Command::new("cp").arg("-a").arg(template().join("data")).arg(dir.path().join("data")));
        let mut hba = std::fs::File::create(dir.path().join("data/pg_hba.conf")).unwrap();
        hba.write_all(HBA.as_bytes()).unwrap();
        for (name, content) in files {
            let path = dir.path().join("data").join(name);
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            give_away(&path);
        }
        Some(Self::on(dir, settings))
    }

    /// A standby of it, which follows without being waited for.
    pub fn standby(&self) -> Self {
        let dir = directory();
        give_away(dir.path());
        let program = programs().unwrap().join("pg_basebackup");
        let to = dir.path().join("data");
        let port = self.port.to_string();
        run(unprivileged(&program)
            .args(["-h", "127.0.0.1", "-p", &port, "-U", "postgres", "-R", "-c", "fast", "-D"])
            .arg(&to));
        Self::on(dir, &[])
    }

    fn on(dir: TempDir, settings: &[&str]) -> Self {
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        let server = Self { dir, port: free_port(), settings, postmaster: Mutex::default() };
        server.run();
        server
    }

    /// Starts it again, on the same port and directory.
    pub fn run(&self) {
        let mut command = unprivileged(&programs().unwrap().join("postgres"));
        command.arg("-D").arg(self.dir.path().join("data")).args(["-p", &self.port.to_string()]);
        for setting in SETTINGS.iter().map(|setting| (*setting).to_owned()).chain(self.settings.clone()) {
            command.args(["-c", &setting]);
        }
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        *self.postmaster.lock().unwrap() = Some(spawn(command));
        let is_ready = programs().unwrap().join("pg_isready");
        eventually("the server takes connections", || {
            assert!(exists(self.postmaster()), "it has ended: {}", self.log());
            let mut command = Command::new(&is_ready);
            command.args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()]).status().unwrap().success()
        });
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres?sslmode=disable", self.port)
    }

    fn postmaster(&self) -> Pid {
        self.postmaster.lock().unwrap().expect("it was started")
    }

    /// The server and all its processes.
    fn processes(&self) -> Vec<Pid> {
        let postmaster = self.postmaster();
        std::iter::once(postmaster).chain(children(postmaster)).collect()
    }

    /// What all its processes that still run have used.
    pub fn cpu(&self) -> Duration {
        let ticks = self.processes().into_iter().map(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
            let rest = stat.rsplit_once(") ").map(|(_, rest)| rest.to_owned()).unwrap_or_default();
            let fields: Vec<u64> = rest.split(' ').map(|field| field.parse().unwrap_or(0)).collect();
            // User and system time, in hundredths of a second.
            fields.get(11..13).map_or(0, |times| times.iter().sum())
        });
        Duration::from_millis(ticks.sum::<u64>() * 10)
    }

    pub fn signal_all(&self, signal: Signal) {
        for pid in self.processes() {
            let _ = kill_process(pid, signal);
        }
    }

    /// As a crash of the machine, but for what the kernel still writes.
    pub fn kill_9(&self) {
        let all = self.processes();
        // The children first would make the server restart them.
        for pid in &all {
            let _ = kill_process(*pid, Signal::KILL);
        }
        eventually("all are dead", || !all.iter().any(|pid| exists(*pid)));
    }

    pub fn promote(&self) {
        let program = programs().unwrap().join("pg_ctl");
        run(unprivileged(&program).args(["promote", "-w", "-D"]).arg(self.data()));
    }

    /// Stops it in order.
    pub fn stop(&self) {
        let postmaster = self.postmaster();
        let _ = kill_process(postmaster, Signal::INT);
        eventually("the server has ended", || !exists(postmaster));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let all = self.processes();
        for pid in all.iter().rev() {
            let _ = kill_process(*pid, Signal::CONT);
        }
        let _ = kill_process(all[0], Signal::QUIT);
        eventually("the server has ended", || !exists(all[0]));
    }
}

/// PgBouncer in transaction mode before a server.
pub struct Pooler {
    _dir: TempDir,
    pub port: u16,
    process: Pid,
}

impl Pooler {
    /// `None`: there is none to start.
    pub fn start(server: &Server) -> Option<Self> {
        let program = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"].iter().map(Path::new).find(|path| path.exists());
        let Some(program) = program else {
            eprintln!("SKIPPED: PgBouncer is not installed");
            let required = std::env::var("ONCEGATE_REQUIRE_ALL").as_deref() == Ok("1");
            assert!(!required, "skipped, but ONCEGATE_REQUIRE_ALL=1: PgBouncer is not installed");
            return None;
        };
        let (dir, port) = (directory(), free_port());
        let file = dir.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = any\nadmin_users = postgres\npool_mode = transaction\n\
             default_pool_size = 4\n",
            server.port
        );
        // `any` takes the user from the entry.
        std::fs::write(&file, text.replace("* = host", "* = user=postgres host")).unwrap();
        let mut command = unprivileged(program);
        command.arg("-q").arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
        let process = spawn(command);
        eventually("the pooler takes connections", || {
            assert!(exists(process), "it has ended");
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        Some(Self { _dir: dir, port, process })
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres?sslmode=disable", self.port)
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        // It has nothing to lose, and other signals let it wait for its clients.
        let _ = kill_process(self.process, Signal::KILL);
        eventually("the pooler has ended", || !exists(self.process));
    }
}
