//! Connections, and what is asked of a server before it is trusted.

use super::schema;
use super::sql::{CHECK, Sql};
use super::tls::MakeTls;
use crate::store::shared::{OpenError, Options};
use std::error::Error as _;
use std::future::poll_fn;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::config::{Host, SslMode, SslNegotiation, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{AsyncMessage, Client, Config, Error, Notification, Row};

/// A silent peer is probed after this time without a word.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// For taking leave.
const LEAVE: Duration = Duration::from_secs(1);
/// The longest prefix: PostgreSQL cuts names off after 63 bytes.
const PREFIX_MAX: usize = 40;
/// Among the settings.
const BIRTHMARK: &str = "birthmark";

/// Knows the way to the server.
pub(super) struct Connector {
    pub(super) place: String,
    pub(super) sql: Sql,
    /// One for each host of the URL, to be tried by turns.
    hosts: Vec<Config>,
    /// That which was good the last time.
    first: AtomicUsize,
    tls: MakeTls,
    pub(super) timeout: Duration,
    pub(super) strict: bool,
    /// Made at random with the store, and known once it is open: from then on no other store will do. One that was set up anew in
    /// its place has another secret, too, and would split the gateways that share it into two that make different ids of a key.
    birthmark: OnceLock<Vec<u8>>,
}

impl Connector {
    /// # Errors
    /// [`OpenError::Options`].
    pub(super) fn new(options: &Options) -> Result<Self, OpenError> {
        let wrong = |key, reason: &str| OpenError::Options { key, reason: reason.to_owned() };
        let first_is_letter = options.prefix.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if !first_is_letter || !options.prefix.chars().all(plain) || options.prefix.len() > PREFIX_MAX {
            return Err(wrong("prefix", "names tables: at most 40 of a-z, 0-9 and _, no digit first"));
        }
        let whole = parse(&options.url).map_err(|reason| OpenError::Options { key: "url", reason })?;
        let direct = whole.get_ssl_negotiation() == SslNegotiation::Direct;
        let tls = MakeTls::new(&options.tls, direct).map_err(|(key, reason)| OpenError::Options { key, reason })?;
        let mut hosts = single_hosts(&whole);
        for config in &mut hosts {
            if let Some(password) = &options.password {
                config.password(password);
            }
            if (options.tls.ca.is_some() || options.tls.client.is_some()) && config.get_ssl_mode() == SslMode::Prefer {
                config.ssl_mode(SslMode::Require);
            }
            if config.get_application_name().is_none() {
                config.application_name("oncegate");
            }
            config.target_session_attrs(TargetSessionAttrs::ReadWrite).keepalives_idle(KEEPALIVE);
        }
        Ok(Self {
            place: options.place(),
            sql: Sql::new(&options.prefix),
            hosts,
            first: AtomicUsize::new(0),
            tls,
            timeout: options.timeout,
            strict: options.strict,
            birthmark: OnceLock::new(),
        })
    }

    /// A connection that has passed all checks; the store's time.
    ///
    /// # Errors
    /// All but [`OpenError::Options`].
    pub(super) async fn connect(&self) -> Result<(Connection, u64), OpenError> {
        let connection = self.reach(None).await?;
        // All are asked at once: a connection that takes many turns to begin is long in coming.
        let checks = async {
            tokio::join!(self.check(&connection), schema::check(&connection, self), self.recognize(&connection))
        };
        let checked = timeout(self.timeout, checks).await;
        let (time, schema, same) = checked.map_err(|_| self.unreachable("no answer in time"))?;
        let time = time?;
        schema.and(same)?;
        Ok((connection, time))
    }

    /// One that hears what is notified, beside; its channel ends with the connection.
    ///
    /// # Errors
    /// [`OpenError::Unreachable`], [`OpenError::Refused`].
    pub(super) async fn listen(&self) -> Result<(Connection, mpsc::Receiver<Notification>), OpenError> {
        // What does not fit is lost: who waits looks now and then as well.
        let (heard, receiver) = mpsc::channel(1024);
        let connection = self.reach(Some(heard)).await?;
        let listen = timeout(self.timeout, connection.client.batch_execute(&self.sql.listen)).await;
        listen.map_err(|_| self.unreachable("no answer in time"))?.map_err(|error| self.refusal(&error))?;
        Ok((connection, receiver))
    }

    /// To any of the hosts that takes writes, nothing checked.
    ///
    /// # Errors
    /// [`OpenError::Unreachable`], [`OpenError::Refused`].
    pub(super) async fn reach(&self, heard: Option<mpsc::Sender<Notification>>) -> Result<Connection, OpenError> {
        let first = self.first.load(Ordering::Relaxed);
        let each = self.timeout / u32::try_from(self.hosts.len()).unwrap_or(1).max(1);
        let mut failure = self.unreachable("no host is named");
        for at in 0..self.hosts.len() {
            let at = (first + at) % self.hosts.len();
            let Some(config) = self.hosts.get(at) else { continue };
            match timeout(each, config.connect(self.tls.clone())).await {
                Err(_) => failure = self.unreachable("no connection in time"),
                Ok(Err(error)) => failure = self.refusal(&error),
                Ok(Ok((client, connection))) => {
                    self.first.store(at, Ordering::Relaxed);
                    return Ok(Connection::drive(client, connection, heard));
                }
            }
        }
        Err(failure)
    }

    /// Whether the server may be trusted with records; its time.
    ///
    /// # Errors
    /// [`OpenError::Unreachable`] for a standby, [`OpenError::NotStrict`].
    pub(super) async fn check(&self, connection: &Connection) -> Result<u64, OpenError> {
        let row = connection.client.query_typed_one(CHECK, &[]).await.map_err(|error| self.refusal(&error))?;
        let is = |column: usize| row.try_get::<_, bool>(column).unwrap_or(false);
        if is(0) {
            return Err(self.unreachable("it is a standby"));
        }
        if is(1) {
            return Err(self.unreachable("it takes no writes: transactions are read-only"));
        }
        let settings = ["synchronous_commit", "fsync", "full_page_writes"];
        let lax = settings.iter().zip(2..).find(|(_, column)| !is(*column));
        if let Some((setting, _)) = lax.filter(|_| self.strict) {
            let reason = format!("{setting} is off");
            return Err(OpenError::NotStrict { place: self.place.clone(), reason });
        }
        millis(&row, 5).ok_or_else(|| self.unreachable("it does not tell its time"))
    }

    /// By what this store is known again; made now, if it has nothing yet.
    ///
    /// # Errors
    /// [`OpenError::Unreachable`], [`OpenError::Refused`].
    pub(super) async fn learn_birthmark(&self, connection: &Connection) -> Result<(), OpenError> {
        let mut fresh = [0; 16];
        getrandom::fill(&mut fresh).map_err(|error| {
            let reason = format!("the operating system gave no randomness for its birthmark: {error}");
            OpenError::Refused { place: self.place.clone(), reason }
        })?;
        let params: [(&(dyn ToSql + Sync), Type); 2] = [(&BIRTHMARK, Type::TEXT), (&&fresh[..], Type::BYTEA)];
        let made = connection.client.query_typed(&self.sql.insert_setting, &params).await;
        made.map_err(|error| self.refusal(&error))?;
        // Another gateway may have been faster.
        let found = self.birthmark_of(connection).await?;
        let _ = self.birthmark.set(found.ok_or_else(|| self.unreachable("its birthmark is gone again"))?);
        Ok(())
    }

    /// Whether this is the store that was opened.
    ///
    /// # Errors
    /// [`OpenError::Another`]; those of any question.
    pub(super) async fn recognize(&self, connection: &Connection) -> Result<(), OpenError> {
        let Some(birthmark) = self.birthmark.get() else { return Ok(()) };
        if self.birthmark_of(connection).await?.as_ref() == Some(birthmark) {
            return Ok(());
        }
        Err(OpenError::Another { place: self.place.clone() })
    }

    async fn birthmark_of(&self, connection: &Connection) -> Result<Option<Vec<u8>>, OpenError> {
        let row = connection.client.query_typed_opt(&self.sql.setting, &[(&BIRTHMARK, Type::TEXT)]).await;
        let row = row.map_err(|error| self.refusal(&error))?;
        Ok(row.and_then(|row| row.try_get::<_, Vec<u8>>(0).ok()))
    }

    pub(super) fn unreachable(&self, reason: &str) -> OpenError {
        OpenError::Unreachable { place: self.place.clone(), reason: reason.to_owned() }
    }

    /// What a failure means, as long as nothing but questions were asked.
    pub(super) fn refusal(&self, error: &Error) -> OpenError {
        let reason = describe(error);
        // 28: who are you? 3D: no such database. 42: no right, or no such table.
        let class = error.code().map_or("", SqlState::code).get(..2).unwrap_or_default();
        if matches!(class, "28" | "3D" | "42") {
            OpenError::Refused { place: self.place.clone(), reason }
        } else {
            OpenError::Unreachable { place: self.place.clone(), reason }
        }
    }
}

/// What went wrong, in one line; without what was sent.
pub(super) fn describe(error: &Error) -> String {
    if let Some(db) = error.as_db_error() {
        return format!("{} (SQLSTATE {})", db.message(), db.code().code());
    }
    let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
    format!("{error}{cause}")
}

pub(super) fn millis(row: &Row, column: usize) -> Option<u64> {
    row.try_get::<_, i64>(column).ok().and_then(|ms| u64::try_from(ms).ok())
}

/// The errors tell nothing of the URL's own words: a password may be among them.
fn parse(url: &str) -> Result<Config, String> {
    // As far as this is concerned: whoever verifies a certificate verifies all of it.
    let url = url.replacen("sslmode=verify-full", "sslmode=require", 1);
    let wellformed = ["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme));
    if !wellformed || url.matches('@').count() > 1 {
        return Err(
            "is no postgres://user:password@host:port/database; write @ / ? in a password as %40 %2F %3F".into()
        );
    }
    let config = Config::from_str(&url).map_err(|error| {
        // Names one of the parser's expectations. What it takes for an option may be the end of a password.
        let reason = error.source().map(ToString::to_string).filter(|reason| !reason.starts_with("unknown option"));
        reason.unwrap_or_else(|| "has an option (?name=value) that is unheard of".to_owned())
    })?;
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        return Err("names no host".to_owned());
    }
    let (hosts, ports) = (config.get_hosts().len().max(config.get_hostaddrs().len()), config.get_ports().len());
    if ports > 1 && ports != hosts {
        return Err("has more or fewer ports than hosts".to_owned());
    }
    Ok(config)
}

/// The driver tries the hosts of one configuration in order, but gives one that is silent all the time there is.
fn single_hosts(whole: &Config) -> Vec<Config> {
    let (hosts, ports) = (whole.get_hosts(), whole.get_ports());
    if hosts.len() < 2 || !whole.get_hostaddrs().is_empty() {
        return vec![whole.clone()];
    }
    let single = |(at, host): (usize, &Host)| {
        let mut config = Config::new();
        match host {
            Host::Tcp(name) => config.host(name),
            Host::Unix(path) => config.host_path(path),
        };
        config.port(ports.get(at).or(ports.first()).copied().unwrap_or(5432));
        config.ssl_mode(whole.get_ssl_mode()).ssl_negotiation(whole.get_ssl_negotiation());
        config.channel_binding(whole.get_channel_binding());
        whole.get_user().map(|user| config.user(user));
        whole.get_password().map(|password| config.password(password));
        whole.get_dbname().map(|name| config.dbname(name));
        whole.get_options().map(|options| config.options(options));
        whole.get_application_name().map(|name| config.application_name(name));
        config
    };
    hosts.iter().enumerate().map(single).collect()
}

/// An open connection, driven by a task that ends with it.
pub(super) struct Connection {
    pub(super) client: Client,
    ended: watch::Receiver<bool>,
    _task: Task,
}

/// Ends at once when it is dropped, answers or not: nobody waits for them any more.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Connection {
    fn drive<S, T>(
        client: Client,
        mut connection: tokio_postgres::Connection<S, T>,
        heard: Option<mpsc::Sender<Notification>>,
    ) -> Self
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
        T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let (end, ended) = watch::channel(false);
        let task = tokio::spawn(async move {
            while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
                if let (AsyncMessage::Notification(notification), Some(heard)) = (message, &heard) {
                    let _ = heard.try_send(notification);
                }
            }
            end.send_replace(true);
        });
        Self { client, ended, _task: Task(task) }
    }

    /// Ready when the connection is gone.
    pub(super) async fn gone(&self) {
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }

    /// Takes leave of the server.
    pub(super) async fn end(self) {
        let Self { client, mut ended, _task } = self;
        drop(client);
        let _ = timeout(LEAVE, ended.wait_for(|ended| *ended)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_url_is_said_without_its_secrets() {
        for url in [
            "postgres://u:s3cret@h:port/db",
            "postgres://u:s3cret@h/db?s3cret=1@",
            "postgres://u:s3cret@h/db?sslmode=s3cret",
            "postgres://u:s3cret@h/db?sslmode=verify-ca",
            "postgres://u:s3cret@a,b,c/db?port=1,2",
            "postgres:///db?user=u&password=s3cret",
            "postgres://u@h/db?password=a&s3cret=b",
            "postgres://u:s3cret/x@h:port/db",
            "postgres://u:s3cret?x@h:port/db",
            "postgres://u:s3cret",
            "host=h password=s3cret",
            "s3cret",
        ] {
            let reason = parse(url).expect_err(url);
            assert!(!reason.contains("s3cret"), "{url}: {reason}");
        }
        for url in ["postgres://h/db", "postgresql://u:p%40@h:1/db?sslmode=verify-full", "postgres://%2Frun/db"] {
            assert!(parse(url).is_ok(), "{url}");
        }
    }

    #[test]
    fn each_host_is_tried_by_itself() {
        let whole = parse("postgres://u:p@a:1,b:2/db?application_name=x&sslmode=require").unwrap();
        let hosts = single_hosts(&whole);
        let places: Vec<_> =
            hosts.iter().map(|config| (config.get_hosts().to_vec(), config.get_ports().to_vec())).collect();
        let tcp = |name: &str| vec![Host::Tcp(name.to_owned())];
        assert_eq!(places, [(tcp("a"), vec![1]), (tcp("b"), vec![2])]);
        for config in hosts {
            assert_eq!((config.get_user(), config.get_password()), (Some("u"), Some(&b"p"[..])));
            assert_eq!((config.get_dbname(), config.get_ssl_mode()), (Some("db"), SslMode::Require));
        }
    }
}
