//! The proxies that are compared: how each is configured, started on its core, and ended.
//!
//! All keep connections to the upstream, write no access log, and tell the upstream who asked (`X-Forwarded-*`).

use crate::measure::{self, Cores, Tree};
use crate::servers::{self, Server};
use crate::workloads::{Front, Workload};
use anyhow::{Context, Result, bail};
use std::fmt;
use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// nginx that answers by itself: what a bare server costs.
    Direct,
    Nginx,
    /// nginx that keeps answers to `POST` by tenant, path and key in its cache: on disk, but lost with the machine.
    NginxCache,
    Haproxy,
    /// The closest product: records in Redis, for as long as a request may take.
    IdempotentProxy,
    Oncegate(&'static Gateway),
}

/// A build of the gateway, with one of its engines under the store.
#[derive(Debug, PartialEq, Eq)]
pub struct Gateway {
    pub name: String,
    pub engine: &'static str,
    pub binary: PathBuf,
}

impl Kind {
    /// All engines of a build, the default one first. They are known for as long as the program runs.
    pub fn gateways(build: &str, binary: &Path) -> Vec<Self> {
        let kind = |engine| {
            let name = if engine == "sled" { build.to_owned() } else { format!("{build}-{engine}") };
            Self::Oncegate(Box::leak(Box::new(Gateway { name, engine, binary: binary.to_owned() })))
        };
        ["sled", "fjall", "memory", "redis", "postgres"].map(kind).to_vec()
    }
}

pub const PEERS: [Kind; 5] = [Kind::Direct, Kind::Nginx, Kind::NginxCache, Kind::Haproxy, Kind::IdempotentProxy];

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Nginx => "nginx",
            Self::NginxCache => "nginx-cache",
            Self::Haproxy => "haproxy",
            Self::IdempotentProxy => "idempotent-proxy",
            Self::Oncegate(gateway) => &gateway.name,
        })
    }
}

impl Kind {
    pub fn keeps_records(self) -> bool {
        matches!(self, Self::NginxCache | Self::IdempotentProxy | Self::Oncegate(_))
    }

    /// Its version, or why it cannot take part.
    pub fn version(self) -> Result<String> {
        let (program, argument) = match self {
            Self::Direct | Self::Nginx | Self::NginxCache => ("nginx", "-v"),
            Self::Haproxy => ("haproxy", "-v"),
            Self::IdempotentProxy => {
                // It tells no version: asked for one it wants its settings.
                let found = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
                    .any(|dir| dir.join(IDEMPOTENT_PROXY).is_file());
                let installed = found.then(|| IDEMPOTENT_PROXY.to_owned());
                return installed.with_context(|| format!("{IDEMPOTENT_PROXY} is not installed"));
            }
            Self::Oncegate(gateway) => {
                if let Some(server) = servers::Kind::of(gateway.engine) {
                    server.version()?;
                }
                let version = first_line(&gateway.binary.to_string_lossy(), "--version")?;
                return Ok(format!("{}: {version}", gateway.name));
            }
        };
        first_line(program, argument)
    }
}

const IDEMPOTENT_PROXY: &str = "idempotent-proxy-server";

/// The first line that a program says, on either stream.
pub fn first_line(program: &str, argument: &str) -> Result<String> {
    let output = command(program).arg(argument).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("{program} is not installed"))?;
    let text = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned())
}

/// Servers lie where only an administrator's shell looks.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin"));
    command
}

/// A certificate for `localhost` and its key.
pub struct Certificate {
    cert: String,
    key: String,
}

impl Certificate {
    pub fn new() -> Result<Self> {
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let made = rcgen::generate_simple_self_signed(names)?;
        Ok(Self { cert: made.cert.pem(), key: made.signing_key.serialize_pem() })
    }
}

/// What all contestants of a workload start with.
pub struct Setting<'a> {
    pub cores: Cores,
    pub upstream: SocketAddr,
    pub certificate: &'a Certificate,
    /// Further lines of the gateway's configuration.
    pub gateway: &'a str,
    /// Where `strace` is to sum up the system calls.
    pub strace: Option<&'a Path>,
}

/// A running proxy. Dropped, it is asked to end, and killed if it does not.
pub struct Contestant {
    pub kind: Kind,
    pub address: SocketAddr,
    stderr: PathBuf,
    child: Child,
    /// Whose costs are its own, too; ended after it.
    server: Option<Server>,
}

impl Contestant {
    /// Starts it with `dir` as its own directory; what is there already is used again.
    pub fn start(kind: Kind, workload: &Workload, setting: &Setting<'_>, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let (cert, key, both) = (dir.join("cert.pem"), dir.join("key.pem"), dir.join("both.pem"));
        fs::write(&cert, &setting.certificate.cert)?;
        fs::write(&key, &setting.certificate.key)?;
        fs::write(both, format!("{}{}", setting.certificate.cert, setting.certificate.key))?;
        let server = workload.server.map(|kind| Server::start(kind, setting.cores, &dir.join(kind.engine())));
        let server = server.transpose()?;
        let free = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = match kind {
            Kind::Oncegate(gateway) => oncegate(gateway, workload, server.as_ref(), setting, dir)?,
            Kind::IdempotentProxy => idempotent_proxy(free, workload, server.as_ref(), setting, dir)?,
            Kind::Haproxy => haproxy(free, workload.front, setting, dir)?,
            Kind::Direct | Kind::Nginx | Kind::NginxCache => nginx(kind, free, workload.front, setting, dir)?,
        };
        if let Some(summary) = setting.strace {
            command = traced(&command, summary);
        }
        let stderr = dir.join("stderr");
        let says = fs::File::create(&stderr)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(says);
        // A child starts on the core of the thread that starts it.
        measure::pin(setting.cores.proxy)?;
        let child = command.spawn();
        measure::pin(setting.cores.ends)?;
        let child = child.with_context(|| format!("{kind}"))?;
        let mut contestant = Self { kind, address: free, stderr, child, server };
        contestant.await_listening()?;
        Ok(contestant)
    }

    fn await_listening(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = fs::read_to_string(&self.stderr)?;
            match self.kind {
                Kind::Oncegate(_) => {
                    if let Some(address) = listening(&said, "server") {
                        self.address = address;
                        return Ok(());
                    }
                }
                _ if TcpStream::connect(self.address).is_ok() => return Ok(()),
                _ => {}
            }
            if self.child.try_wait()?.is_some() || Instant::now() > deadline {
                bail!("{} does not listen: {said}", self.kind);
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// The gateway's admin address.
    pub fn admin(&self) -> Result<SocketAddr> {
        listening(&fs::read_to_string(&self.stderr)?, "admin").context("the admin address in the log")
    }

    pub fn tree(&self) -> Result<Tree> {
        Ok(Tree::of_all([self.child.id()].into_iter().chain(self.server.as_ref().map(Server::pid)))?)
    }

    /// Of the server beside it alone.
    pub fn server_tree(&self) -> Result<Tree> {
        Ok(Tree::of_all(self.server.as_ref().map(Server::pid))?)
    }

    /// Ends it in good order, then the server beside it, and waits.
    pub fn stop(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            let pid = rustix::process::Pid::from_child(&self.child);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                bail!("{} does not end", self.kind);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.server = None;
        Ok(())
    }
}

impl Drop for Contestant {
    fn drop(&mut self) {
        if self.stop().is_err() {
            // Its workers would outlive it.
            let tree = Tree::of_all([self.child.id()]);
            let pids = tree.iter().flat_map(|tree| tree.pids()).filter_map(|&pid| i32::try_from(pid).ok());
            for pid in pids.filter_map(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            let _ = self.child.wait();
        }
    }
}

/// The same program under a tracer, which is not its parent but beside it.
fn traced(program: &Command, summary: &Path) -> Command {
    let mut traced = command("strace");
    traced.args(["-D", "-f", "-c", "-o"]).arg(summary).arg("--").arg(program.get_program()).args(program.get_args());
    traced.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    traced
}

/// Where the gateway listens in this role, once its log tells it.
fn listening(log: &str, role: &str) -> Option<SocketAddr> {
    log.lines().find_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        let wanted = line["message"] == "listening" && line["role"] == role;
        wanted.then(|| line["address"].as_str()?.parse().ok()).flatten()
    })
}

fn idempotent_proxy(
    listen: SocketAddr,
    workload: &Workload,
    server: Option<&Server>,
    setting: &Setting<'_>,
    dir: &Path,
) -> Result<Command> {
    // It insists on that file, and forwards what is sent to a path of this form alone.
    fs::write(dir.join(".env"), "")?;
    let name = workload.target.trim_start_matches('/');
    let mut command = command(IDEMPOTENT_PROXY);
    command.current_dir(dir).env("SERVER_ADDR", listen.to_string()).env("LOG_LEVEL", "error");
    command.env(name, format!("http://{}/posts", setting.upstream)).env("REQUEST_TIMEOUT", "3600000");
    if let Some(server) = server {
        command.env("REDIS_URL", server.url());
    }
    Ok(command)
}

fn oncegate(
    gateway: &Gateway,
    workload: &Workload,
    server: Option<&Server>,
    setting: &Setting<'_>,
    dir: &Path,
) -> Result<Command> {
    let (file, data) = (dir.join("oncegate.toml"), dir.join("data"));
    let mut text = format!(
        "server.listen = \"127.0.0.1:0\"\nserver.workers = 1\nadmin.listen = \"127.0.0.1:0\"\nupstream.url = \"http://{}\"\n\
         store.path = {:?}\nstore.engine = {:?}\nstore.durability = \"strict\"\n",
        setting.upstream,
        data.display().to_string(),
        gateway.engine
    );
    if workload.from_store {
        text += "cache.max_bytes = 0\n";
    }
    if workload.front.is_tls() {
        let (cert, key) = (dir.join("cert.pem").display().to_string(), dir.join("key.pem").display().to_string());
        text += &format!("server.tls.cert = {cert:?}\nserver.tls.key = {key:?}\n");
    }
    if let Some(server) = server {
        text += &format!("store.url = {:?}\n", server.url());
    }
    text += setting.gateway;
    if workload.server.is_some() {
        text += &format!("\n[[routes]]\npath = {:?}\n", workload.target);
    }
    fs::write(&file, text)?;
    let mut command = Command::new(&gateway.binary);
    // As the others it writes no line per request: only that it listens, and what goes wrong.
    command.env("RUST_LOG", "warn,oncegate::run=info");
    command.args(["serve", "--log-format", "json", "--config"]).arg(file);
    Ok(command)
}

fn nginx(kind: Kind, listen: SocketAddr, front: Front, setting: &Setting<'_>, dir: &Path) -> Result<Command> {
    let location = match kind {
        Kind::Direct => {
            let body = String::from_utf8(crate::http::json(128))?;
            format!("default_type application/json;\n      return 200 '{body}';")
        }
        _ => "proxy_pass http://backend;".to_owned(),
    };
    let cache = if kind == Kind::NginxCache {
        "proxy_cache records; proxy_cache_methods POST; proxy_cache_valid 200 201 24h; proxy_cache_lock on;
    proxy_cache_key \"$http_authorization|$request_uri|$http_idempotency_key\";"
    } else {
        ""
    };
    let mut options = String::new();
    if front.is_tls() {
        options += " ssl";
    }
    if front.is_http2() {
        options += " http2";
    }
    let tls = if front.is_tls() {
        "ssl_certificate cert.pem; ssl_certificate_key key.pem; ssl_protocols TLSv1.2 TLSv1.3;"
    } else {
        ""
    };
    // As root nginx would give its worker to a user who may not enter the directory.
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    let text = format!(
        "daemon off; worker_processes 1; pid nginx.pid; error_log stderr warn; {user}
events {{ worker_connections 4096; }}
http {{
  access_log off; tcp_nodelay on;
  keepalive_requests 1000000000; keepalive_timeout 300s; http2_max_concurrent_streams 256;
  client_max_body_size 10m; client_body_buffer_size 128k; proxy_buffers 8 32k;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  proxy_cache_path cache levels=1:2 keys_zone=records:128m max_size=16g inactive=24h use_temp_path=off;
  upstream backend {{
    server {upstream};
    keepalive 256; keepalive_requests 1000000000; keepalive_timeout 300s;
  }}
  server {{
    listen {listen}{options}; {tls}
    proxy_http_version 1.1;
    proxy_set_header Connection \"\"; proxy_set_header Host $host; proxy_set_header Via \"1.1 nginx\";
    proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    proxy_set_header X-Forwarded-Proto $scheme; proxy_set_header X-Forwarded-Host $host;
    {cache}
    location / {{
      {location}
    }}
  }}
}}
",
        upstream = setting.upstream,
    );
    let file = dir.join("nginx.conf");
    fs::write(&file, text)?;
    let mut command = command("nginx");
    command.arg("-p").arg(dir).arg("-c").arg(file);
    Ok(command)
}

fn haproxy(listen: SocketAddr, front: Front, setting: &Setting<'_>, dir: &Path) -> Result<Command> {
    let bind = match front {
        // In clear text it tells HTTP/2 by its preface.
        Front::Http1 | Front::Http2 => String::new(),
        Front::Tls1 => format!(" ssl crt {} alpn http/1.1", dir.join("both.pem").display()),
        Front::Tls2 => format!(" ssl crt {} alpn h2", dir.join("both.pem").display()),
    };
    let text = format!(
        "global
  nbthread 1
  maxconn 4096
defaults
  mode http
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  http-reuse always
  option forwardfor
frontend front
  bind {listen}{bind}
  http-request set-header X-Forwarded-Proto http
  default_backend back
backend back
  server upstream {}
",
        setting.upstream
    );
    let file = dir.join("haproxy.cfg");
    fs::write(&file, text)?;
    let mut command = command("haproxy");
    command.arg("-db").arg("-f").arg(file);
    Ok(command)
}
