//! The stores that several gateways can share, each started for one contestant: its costs are the contestant's own, too.

use crate::contestants::{command, first_line};
use crate::measure::{self, Cores};
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Redis,
    Postgres,
}

impl Kind {
    /// As `store.engine` names it.
    pub fn of(engine: &str) -> Option<Self> {
        [Self::Redis, Self::Postgres].into_iter().find(|kind| kind.engine() == engine)
    }

    pub fn engine(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Postgres => "postgres",
        }
    }

    /// Its version, or why it cannot take part.
    pub fn version(self) -> Result<String> {
        match self {
            Self::Redis => first_line("redis-server", "--version"),
            Self::Postgres => first_line(&postgres("postgres")?.to_string_lossy(), "--version"),
        }
    }
}

/// Where the newest installed PostgreSQL has a program.
fn postgres(program: &str) -> Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found = versions.map(|version| version.path().join("bin").join(program)).collect::<Vec<_>>();
    found.sort();
    found.into_iter().rfind(|path| path.exists()).with_context(|| format!("PostgreSQL's {program} is not installed"))
}

/// A running server that flushes every write before it answers. Dropped, it ends.
pub struct Server {
    kind: Kind,
    child: Child,
    address: SocketAddr,
}

impl Server {
    pub fn start(kind: Kind, cores: Cores, dir: &Path) -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = match kind {
            Kind::Redis => redis(address, dir)?,
            Kind::Postgres => cluster(address, dir)?,
        };
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        measure::pin(cores.proxy)?;
        let child = command.spawn();
        measure::pin(cores.ends)?;
        let child = child.with_context(|| format!("starting {kind:?}"))?;
        let mut server = Self { kind, child, address };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(address).is_err() {
            if server.child.try_wait()?.is_some() || Instant::now() > deadline {
                bail!("{kind:?} does not listen");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(server)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn url(&self) -> String {
        match self.kind {
            Kind::Redis => format!("redis://{}/0", self.address),
            Kind::Postgres => format!("postgres://postgres@{}/postgres?sslmode=disable", self.address),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // PostgreSQL's fast shutdown; Redis takes it for its end, too.
        let _ = kill_process(Pid::from_child(&self.child), Signal::INT);
        let _ = self.child.wait();
    }
}

fn redis(address: SocketAddr, dir: &Path) -> Result<Command> {
    fs::create_dir_all(dir)?;
    let mut command = command("redis-server");
    command.args(["--port", &address.port().to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"]).arg(dir);
    command.args(["--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction"]);
    Ok(command)
}

/// A cluster in the directory, made if there is none.
fn cluster(address: SocketAddr, dir: &Path) -> Result<Command> {
    let data = dir.join("data");
    if !data.exists() {
        fs::create_dir_all(dir)?;
        open_the_way(dir)?;
        let mut initdb = unprivileged(postgres("initdb")?.as_os_str(), dir)?;
        initdb.args(["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "-N", "-D"]).arg(&data);
        let output = initdb.output().context("initdb")?;
        ensure!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
    }
    let mut command = unprivileged(postgres("postgres")?.as_os_str(), dir)?;
    command.arg("-D").arg(data).args(["-p", &address.port().to_string()]);
    command.args(["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "autovacuum=on"]);
    Ok(command)
}

/// It refuses to run as root; `setpriv` runs it in its own place, as another user who owns the directory.
fn unprivileged(program: &OsStr, dir: &Path) -> Result<Command> {
    if !rustix::process::geteuid().is_root() {
        return Ok(Command::new(program));
    }
    let users = fs::read_to_string("/etc/passwd")?;
    let user = if users.lines().any(|line| line.starts_with("postgres:")) { "postgres" } else { "nobody" };
    let owned = Command::new("chown").arg(user).arg(dir).status().context("chown")?;
    ensure!(owned.success(), "chown {user} {}", dir.display());
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={user}")).args(["--clear-groups", "--"]).arg(program).current_dir("/");
    Ok(command)
}

/// Lets that other user through to the directory.
fn open_the_way(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for dir in dir.ancestors().take_while(|dir| *dir != std::env::temp_dir() && dir.parent().is_some()) {
        let mode = fs::metadata(dir)?.permissions().mode();
        if mode & 0o001 == 0 {
            fs::set_permissions(dir, fs::Permissions::from_mode(mode | 0o011))?;
        }
    }
    Ok(())
}
