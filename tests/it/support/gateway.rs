//! The real program, as a process.

use super::client::{Response, call, post, request};
use super::upstream::Upstream;
use super::{PATIENCE, eventually};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;
use tempfile::TempDir;

#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<String>, bool)>,
    changed: Condvar,
}

impl Log {
    /// Waits for a line about which `find` has something to say; `None` if the process ends without it.
    fn wait<T>(&self, find: impl Fn(&str) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.lines.lock().unwrap();
        loop {
            if let Some(found) = lines.0.iter().find_map(|line| find(line)) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if lines.1 || left.is_zero() {
                return None;
            }
            lines = self.changed.wait_timeout(lines, left).unwrap().0;
        }
    }
}

/// A running gateway. Dropped, it is killed.
pub struct Gateway {
    pub addr: SocketAddr,
    pub admin: SocketAddr,
    child: Child,
    log: Arc<Log>,
    dir: Arc<TempDir>,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

/// How a process ended that did not come up.
#[derive(Debug)]
pub struct Refusal {
    pub code: Option<i32>,
    pub stderr: String,
}

impl Gateway {
    /// Starts one before `upstream`. `settings` is TOML in dotted keys (`upstream.response_timeout = "1s"`), and may end
    /// in tables; addresses, the upstream and the store's directory are set already.
    #[track_caller]
    pub fn start(upstream: &Upstream, settings: &str) -> Self {
        Self::start_before(&upstream.url(), settings)
    }

    #[track_caller]
    pub fn start_before(url: &str, settings: &str) -> Self {
        Self::try_start(Arc::new(tempfile::tempdir().unwrap()), url, settings, &[], &[])
            .unwrap_or_else(|refusal| panic!("the gateway did not start: {refusal:?}"))
    }

    /// Starts one over an existing directory, with further arguments and environment variables.
    pub fn try_start(
        dir: Arc<TempDir>,
        url: &str,
        settings: &str,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self, Refusal> {
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let (arguments, environment) = Self::prepare(&dir, url, settings, arguments, environment);
        Self::spawn(dir, arguments, environment, None)
    }

    fn prepare(
        dir: &TempDir,
        url: &str,
        settings: &str,
        arguments: &[&str],
        environment: Vec<(String, String)>,
    ) -> (Vec<String>, Vec<(String, String)>) {
        let store = if settings.contains("store.path") {
            String::new()
        } else {
            format!("store.path = {:?}\n", dir.path().join("data").display().to_string())
        };
        let file = dir.path().join("config.toml");
        let text = format!(
            "server.listen = \"127.0.0.1:0\"\nadmin.listen = \"127.0.0.1:0\"\nupstream.url = {url:?}\n{store}{settings}\n"
        );
        std::fs::write(&file, text).unwrap();
        let mut all = vec!["serve".to_owned(), "--log-format".to_owned(), "json".to_owned()];
        all.extend(["--config".to_owned(), file.display().to_string()]);
        all.extend(arguments.iter().map(|&argument| argument.to_owned()));
        (all, environment)
    }

    /// Starts one that gets its listening socket from a service manager, which is the caller.
    pub fn try_start_on(
        listener: OwnedFd,
        dir: Arc<TempDir>,
        url: &str,
        settings: &str,
        listen: &str,
    ) -> Result<Self, Refusal> {
        let environment = vec![("ONCEGATE_SERVER__LISTEN".to_owned(), listen.to_owned())];
        let (arguments, environment) = Self::prepare(&dir, url, settings, &[], environment);
        Self::spawn(dir, arguments, environment, Some(listener))
    }

    fn spawn(
        dir: Arc<TempDir>,
        arguments: Vec<String>,
        environment: Vec<(String, String)>,
        listener: Option<OwnedFd>,
    ) -> Result<Self, Refusal> {
        let program = env!("CARGO_BIN_EXE_oncegate");
        let (mut command, stdin) = match listener {
            None => (Command::new(program), Stdio::null()),
            // As the protocol wants it: descriptor 3, and the process named by its id.
            Some(listener) => {
                let mut shell = Command::new("sh");
                let script = r#"exec 3<&0 0</dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@""#;
                shell.args(["-c", script, program]);
                (shell, Stdio::from(listener))
            }
        };
        let mut child = command
            .args(&arguments)
            .envs(environment.clone())
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Log::default());
        let (shared, stderr) = (Arc::clone(&log), child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                shared.lines.lock().unwrap().0.push(line);
                shared.changed.notify_all();
            }
            shared.lines.lock().unwrap().1 = true;
            shared.changed.notify_all();
        });
        match (log.wait(|line| address(line, "server")), log.wait(|line| address(line, "admin"))) {
            (Some(addr), Some(admin)) => Ok(Self { addr, admin, child, log, dir, arguments, environment }),
            _ => {
                let _ = child.kill();
                let code = child.wait().unwrap().code();
                let stderr = log.lines.lock().unwrap().0.join("\n");
                Err(Refusal { code, stderr })
            }
        }
    }

    /// Starts it again over the same store, as it was started before.
    pub fn restart(mut self) -> Self {
        self.kill();
        self.again(&[]).unwrap_or_else(|refusal| panic!("the gateway did not start again: {refusal:?}"))
    }

    /// Starts another process with the same configuration, with further environment variables.
    pub fn again(&self, environment: &[(&str, &str)]) -> Result<Self, Refusal> {
        let further = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let environment = self.environment.iter().cloned().chain(further).collect();
        Self::spawn(Arc::clone(&self.dir), self.arguments.clone(), environment, None)
    }

    pub fn dir(&self) -> Arc<TempDir> {
        Arc::clone(&self.dir)
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`, and waits for the end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        self.signal(rustix::process::Signal::TERM);
    }

    /// SIGHUP.
    pub fn hang_up(&self) {
        self.signal(rustix::process::Signal::HUP);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for the process to end by itself; its exit code, `None` if a signal ended it.
    #[track_caller]
    pub fn wait(&mut self) -> Option<i32> {
        eventually("the gateway ends", || self.child.try_wait().unwrap()).code()
    }

    /// Whether the process has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Everything it has logged so far.
    pub fn log(&self) -> String {
        self.log.lines.lock().unwrap().0.join("\n")
    }

    /// Waits for a log line that contains a text.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) -> String {
        self.log
            .wait(|line| line.contains(text).then(|| line.to_owned()))
            .unwrap_or_else(|| panic!("no log line with {text:?} in:\n{}", self.log()))
    }

    #[track_caller]
    pub fn post(&self, key: &str, body: &str) -> Response {
        call(self.addr, post("/posts", key, body))
    }

    #[track_caller]
    pub fn call(&self, request: impl AsRef<[u8]>) -> Response {
        call(self.addr, request)
    }

    #[track_caller]
    pub fn admin(&self, path: &str) -> Response {
        call(self.admin, request("GET", path, &[("Connection", "close")], ""))
    }

    /// The value of a metric's line, such as `oncegate_records{state="claimed"}`.
    #[track_caller]
    pub fn metric(&self, line: &str) -> f64 {
        let text = self.admin("/metrics").text();
        let value = text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("no metric {line} in:\n{text}"))
    }

    /// Resident memory in KiB.
    pub fn rss_kib(&self) -> u64 {
        let status = std::fs::read_to_string(Path::new("/proc").join(self.pid().to_string()).join("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse().unwrap()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let lines = log.lines().collect::<Vec<_>>();
            eprintln!("--- the gateway's last words:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
        }
    }
}

fn address(line: &str, role: &str) -> Option<SocketAddr> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    let listening = line["message"] == "listening" && line["role"] == role;
    listening.then(|| line["address"].as_str()?.parse().ok())?
}
