//! To connect: the address, TLS, who we are, and whether the server may be trusted with records.

use super::layout::Layout;
use super::resp::{Input, Output, Reply};
use super::trust::Trust;
use super::url::{Address, Mode, Target};
use crate::store::shared::{OpenError, Options};
use bytes::Buf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// Why there is no connection.
#[derive(Clone, Debug)]
pub(super) enum DialError {
    /// That may pass.
    Unreachable(String),
    /// It answers, and does not let us in.
    Refused(String),
    NotStrict(String),
    /// No connection may be used for now; the log has been told why.
    Barred(Arc<str>),
}

impl DialError {
    pub(super) fn reason(&self) -> &str {
        match self {
            Self::Unreachable(reason) | Self::Refused(reason) | Self::NotStrict(reason) => reason,
            Self::Barred(reason) => reason,
        }
    }

    pub(super) fn at(self, place: &str) -> OpenError {
        let place = place.to_owned();
        match self {
            Self::Unreachable(reason) => OpenError::Unreachable { place, reason },
            Self::Refused(reason) => OpenError::Refused { place, reason },
            Self::NotStrict(reason) => OpenError::NotStrict { place, reason },
            Self::Barred(reason) => OpenError::Refused { place, reason: reason.to_string() },
        }
    }
}

fn unreachable(reason: impl std::fmt::Display) -> DialError {
    DialError::Unreachable(reason.to_string())
}

pub(super) struct Connection {
    pub(super) stream: Box<dyn Duplex>,
    pub(super) input: Input,
}

impl Connection {
    /// Sends commands, and waits for as many replies.
    pub(super) async fn ask(&mut self, commands: &[&[&[u8]]]) -> Result<Vec<Reply>, DialError> {
        let mut out = Output::default();
        for command in commands {
            out.command(command.len());
            command.iter().for_each(|argument| out.argument(argument));
        }
        while out.has_remaining() {
            self.stream.write_buf(&mut out).await.map_err(unreachable)?;
        }
        self.stream.flush().await.map_err(unreachable)?;
        let mut replies = Vec::with_capacity(commands.len());
        while replies.len() < commands.len() {
            match self.input.next() {
                Ok(Some(reply)) => replies.push(reply),
                Ok(None) => {
                    let read = self.stream.read_buf(&mut self.input.bytes).await.map_err(unreachable)?;
                    if read == 0 {
                        return Err(unreachable("it closed the connection"));
                    }
                }
                Err(_) => return Err(unreachable("what answers there does not speak Redis's protocol")),
            }
        }
        Ok(replies)
    }
}

/// A connection that may be used, and the server's time.
pub(super) struct Connected {
    pub(super) connection: Connection,
    pub(super) now_ms: u64,
    /// Whether the server has an append-only file.
    pub(super) appends: bool,
}

/// Where to.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// Wherever the master is.
    Master,
    /// A node of a cluster.
    Node(Address),
}

pub(super) struct Dialer {
    pub(super) target: Target,
    tls: Option<TlsConnector>,
    /// For all of an attempt.
    limit: Duration,
    pub(super) strict: bool,
    pub(super) wait_replicas: u32,
    /// For the log.
    pub(super) place: String,
    pub(super) trust: Arc<Trust>,
}

impl Dialer {
    /// `birthmark`: the key under which it stands.
    pub(super) fn new(options: &Options, birthmark: Vec<u8>) -> Result<Self, OpenError> {
        let target = Target::parse(options)?;
        let tls = if target.tls { Some(super::tls::connector(&options.tls)?) } else { None };
        if target.mode == Mode::Cluster && options.wait_replicas > 0 {
            let reason = "a cluster cannot be waited for: the replicas are of many masters".to_owned();
            return Err(OpenError::Options { key: "wait_replicas", reason });
        }
        let (strict, wait_replicas) = (options.strict, options.wait_replicas);
        let limit = options.timeout / 2;
        let place = options.place();
        let trust = Arc::new(Trust::new(place.clone(), birthmark));
        Ok(Self { target, tls, limit, strict, wait_replicas, place, trust })
    }

    /// One attempt, bounded in time.
    pub(super) async fn connect(&self, place: &Place) -> Result<Connected, DialError> {
        let attempt = tokio::time::timeout(self.limit, self.attempt(place));
        attempt.await.unwrap_or_else(|_| Err(DialError::Unreachable(format!("no answer within {:?}", self.limit))))
    }

    async fn attempt(&self, place: &Place) -> Result<Connected, DialError> {
        if let Some(reason) = self.trust.not_strict() {
            return Err(DialError::Barred(reason));
        }
        let mut connected = self.arrive(place).await?;
        self.recognize(&mut connected.connection).await?;
        Ok(connected)
    }

    async fn arrive(&self, place: &Place) -> Result<Connected, DialError> {
        match (place, &self.target.mode) {
            (Place::Node(address), _) => self.enter(address).await,
            (Place::Master, Mode::Sentinel(name)) => {
                let address = self.master(name).await?;
                self.enter(&address).await
            }
            (Place::Master, _) => {
                let mut failed = unreachable("no address");
                for address in &self.target.addresses {
                    match self.enter(address).await {
                        Ok(connected) => return Ok(connected),
                        Err(error) => failed = error,
                    }
                }
                Err(failed)
            }
        }
    }

    /// Asks the sentinels, one after the other, where the master is.
    async fn master(&self, name: &str) -> Result<Address, DialError> {
        let mut failed = unreachable("no sentinel");
        let each = self.limit / u32::try_from(self.target.addresses.len() + 1).unwrap_or(u32::MAX);
        for sentinel in &self.target.addresses {
            match tokio::time::timeout(each, self.ask_sentinel(sentinel, name)).await {
                Ok(Ok(address)) => return Ok(address),
                Ok(Err(error)) => failed = error,
                Err(_) => failed = unreachable(format!("no answer from the sentinel {sentinel}")),
            }
        }
        Err(failed)
    }

    async fn ask_sentinel(&self, sentinel: &Address, name: &str) -> Result<Address, DialError> {
        let mut connection = self.open(sentinel).await?;
        let question: &[&[u8]] = &[b"SENTINEL", b"get-master-addr-by-name", name.as_bytes()];
        let mut reply = connection.ask(&[question]).await?.pop();
        if matches!(&reply, Some(Reply::Error(error)) if error.starts_with("NOAUTH")) {
            self.authenticate(&mut connection).await?;
            reply = connection.ask(&[question]).await?.pop();
        }
        match reply {
            Some(Reply::Error(error)) => Err(DialError::Refused(format!("the sentinel {sentinel}: {error}"))),
            Some(Reply::Nil) => Err(DialError::Refused(format!("the sentinel {sentinel} knows no master {name}"))),
            reply => reply.and_then(address).ok_or_else(|| unreachable("a sentinel answered something else")),
        }
    }

    /// Connects, says who we are, and looks whether this is a master that may be trusted.
    async fn enter(&self, address: &Address) -> Result<Connected, DialError> {
        let mut connection = self.open(address).await?;
        self.authenticate(&mut connection).await?;
        if self.target.database != 0 {
            let database = self.target.database.to_string();
            accepted(connection.ask(&[&[b"SELECT", database.as_bytes()]]).await?.pop(), "SELECT")?;
        }
        let replies = connection.ask(&[&[b"INFO"], &[b"TIME"]]).await?;
        let [info, time] = <[Reply; 2]>::try_from(replies).map_err(|_| unreachable("too few answers"))?;
        let info = accepted(Some(info), "INFO")?.bulk().unwrap_or_default();
        let info = String::from_utf8_lossy(&info);
        self.check(&info)?;
        let appends = field(&info, "aof_enabled") == Some("1");
        if self.strict {
            self.check_strict(&mut connection).await?;
        }
        let time = accepted(Some(time), "TIME")?;
        let now_ms = time.time_ms().ok_or_else(|| unreachable("TIME answered something else"))?;
        Ok(Connected { connection, now_ms, appends })
    }

    /// Whether this is the store that was opened. A node of a cluster that has not the part with the birthmark names the one
    /// that has.
    async fn recognize(&self, connection: &mut Connection) -> Result<(), DialError> {
        if self.trust.birthmark().is_none() {
            return Ok(());
        }
        let get: &[&[u8]] = &[b"GET", self.trust.key()];
        let mut reply = connection.ask(&[get]).await?.pop();
        if let Some(Reply::Error(error)) = &reply
            && let Some(owner) = redirected(error)
        {
            let mut connection = self.open(&owner).await?;
            self.authenticate(&mut connection).await?;
            // Without effect on one that has it already.
            reply = connection.ask(&[&[b"ASKING"], get]).await?.pop();
        }
        let found = accepted(reply, "GET")?;
        self.trust.judge(&found).map_err(DialError::Barred)
    }

    /// A connection to whatever is there.
    pub(super) async fn open(&self, address: &Address) -> Result<Connection, DialError> {
        let stream: Box<dyn Duplex> = match address {
            Address::Unix(path) => Box::new(UnixStream::connect(path).await.map_err(unreachable)?),
            Address::Tcp(host, port) => {
                let tcp = TcpStream::connect((host.as_str(), *port)).await.map_err(unreachable)?;
                tcp.set_nodelay(true).map_err(unreachable)?;
                match &self.tls {
                    Some(tls) => Box::new(tls.connect(super::tls::name(host)?, tcp).await.map_err(unreachable)?),
                    None => Box::new(tcp),
                }
            }
        };
        Ok(Connection { stream, input: Input::default() })
    }

    pub(super) async fn authenticate(&self, connection: &mut Connection) -> Result<(), DialError> {
        let reply = match (&self.target.user, &self.target.password) {
            (_, None) => return Ok(()),
            (None, Some(password)) => connection.ask(&[&[b"AUTH", password.as_bytes()]]).await?,
            (Some(user), Some(password)) => connection.ask(&[&[b"AUTH", user.as_bytes(), password.as_bytes()]]).await?,
        };
        match accepted({ reply }.pop(), "AUTH") {
            // Of the rest nobody knows whether it repeats what was sent.
            Err(DialError::Refused(reason)) => {
                let code: Vec<&str> = reason.split(' ').take(2).collect();
                Err(DialError::Refused(code.join(" ")))
            }
            other => other.map(drop),
        }
    }

    fn check(&self, info: &str) -> Result<(), DialError> {
        let field = |name: &str| field(info, name);
        let version = field("redis_version").unwrap_or_default();
        let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
        let version_at_least = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if version_at_least < (6, 2) {
            return Err(DialError::Refused(format!("its version is {version:?}; 6.2 is the oldest that will do")));
        }
        if field("loading").is_some_and(|loading| loading != "0") {
            return Err(unreachable("it still loads its data"));
        }
        if field("role").is_some_and(|role| role != "master") {
            return Err(unreachable("it is a replica"));
        }
        match field("maxmemory_policy") {
            Some("noeviction") => {}
            Some(policy) => {
                let reason =
                    format!("maxmemory-policy is {policy}: it would drop records to make room; noeviction is needed");
                return Err(if self.strict { DialError::NotStrict(reason) } else { DialError::Refused(reason) });
            }
            None => return Err(DialError::Refused("it does not tell its maxmemory-policy (INFO memory)".to_owned())),
        }
        if self.strict && self.wait_replicas > 0 && version_at_least < (7, 2) {
            let reason = format!("its version is {version}; to wait for replicas' disks (WAITAOF) takes 7.2");
            return Err(DialError::NotStrict(reason));
        }
        Ok(())
    }

    async fn check_strict(&self, connection: &mut Connection) -> Result<(), DialError> {
        for (setting, wanted) in [("appendonly", "yes"), ("appendfsync", "always"), ("no-appendfsync-on-rewrite", "no")]
        {
            let reply = connection.ask(&[&[b"CONFIG", b"GET", setting.as_bytes()]]).await?.pop();
            let found = match reply {
                Some(Reply::Error(error)) => {
                    return Err(DialError::NotStrict(format!("it does not tell its {setting} (CONFIG GET): {error}")));
                }
                reply => reply.and_then(Reply::array).and_then(|mut pair| pair.pop()?.bulk()).unwrap_or_default(),
            };
            if found != wanted.as_bytes() {
                let found = String::from_utf8_lossy(&found);
                return Err(DialError::NotStrict(format!("its {setting} is {found:?} instead of {wanted:?}")));
            }
        }
        if matches!(self.target.mode, Mode::Sentinel(_)) && self.wait_replicas == 0 {
            let reason = "a failover by the sentinels loses what the replica had not got yet; set store.wait_replicas";
            return Err(DialError::NotStrict(reason.to_owned()));
        }
        Ok(())
    }
}

/// Host and port as two strings.
pub(super) fn address(reply: Reply) -> Option<Address> {
    let mut parts = reply.array()?.into_iter();
    let host = String::from_utf8(parts.next()?.bulk()?.to_vec()).ok()?;
    let port = parts.next()?.int()?;
    Some(Address::Tcp(host, u16::try_from(port).ok()?))
}

/// A line of `INFO`.
fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// Where a node of a cluster sends whoever asks it for what it has not.
fn redirected(error: &str) -> Option<Address> {
    let mut words = error.split(' ');
    let redirects = matches!(words.next(), Some("MOVED" | "ASK"));
    words.nth(1).filter(|_| redirects).and_then(super::url::node)
}

/// What servers answer that may serve soon.
const PASSING: [&str; 8] =
    ["LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "MOVED", "ASK ", "ERR max number of clients"];

fn accepted(reply: Option<Reply>, what: &str) -> Result<Reply, DialError> {
    match reply {
        Some(Reply::Error(error)) => {
            let passes = PASSING.iter().any(|word| error.starts_with(word));
            let reason = format!("{what}: {error}");
            Err(if passes { DialError::Unreachable(reason) } else { DialError::Refused(reason) })
        }
        Some(reply) => Ok(reply),
        None => Err(unreachable("no answer")),
    }
}

/// What all connections of a store have in common.
pub(super) struct Common {
    pub(super) dialer: Dialer,
    pub(super) layout: Layout,
    pub(super) timeout: Duration,
}
