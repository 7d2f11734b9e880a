//! What `store.url` and the other settings say of how Redis is reached.

use crate::store::shared::{OpenError, Options};
use std::fmt;
use std::path::PathBuf;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Address {
    Tcp(String, u16),
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// One server.
    Single,
    /// The addresses are those of sentinels; the name is that of the master they watch.
    Sentinel(String),
    /// The addresses are those of some of the nodes.
    Cluster,
}

#[derive(Clone)]
pub(super) struct Target {
    pub(super) mode: Mode,
    pub(super) addresses: Vec<Address>,
    pub(super) tls: bool,
    pub(super) user: Option<String>,
    pub(super) password: Option<String>,
    pub(super) database: u32,
}

fn wrong(reason: impl Into<String>) -> OpenError {
    OpenError::Options { key: "url", reason: reason.into() }
}

impl Target {
    /// # Errors
    /// [`OpenError::Options`]; it does not quote what may be a password.
    pub(super) fn parse(options: &Options) -> Result<Self, OpenError> {
        let (scheme, rest) = options.url.split_once("://").ok_or_else(|| wrong("has no scheme"))?;
        let (kind, tls) = match scheme {
            "redis" => ("", false),
            "rediss" => ("", true),
            "redis+unix" => ("unix", false),
            "redis+sentinel" => ("sentinel", false),
            "rediss+sentinel" => ("sentinel", true),
            "redis+cluster" => ("cluster", false),
            "rediss+cluster" => ("cluster", true),
            _ => {
                return Err(wrong(
                    "its scheme is none of redis, rediss, redis+unix, redis(s)+sentinel, redis(s)+cluster",
                ));
            }
        };
        // Where the hosts begin nobody knows then, and what is taken for them would be shown in errors.
        let tail = rest.split_once(['/', '?']).map_or("", |(_, tail)| tail);
        if kind != "unix" && tail.contains('@') {
            return Err(wrong("has an @ behind its hosts; write @ / ? in a password as %40 %2F %3F"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let (credentials, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
        let decode =
            |text: &str| percent_decoded(text).ok_or_else(|| wrong("has a broken escape (%) in its credentials"));
        let given = |text: String| Some(text).filter(|text| !text.is_empty());
        let user = given(decode(user)?);
        let password = options.password.clone().or(given(decode(password)?));
        if user.is_some() && password.is_none() {
            return Err(wrong("names a user, but there is no password"));
        }
        let mut parts = path.split('/').filter(|part| !part.is_empty());
        let (mode, addresses, database) = match kind {
            "unix" => {
                let database = query.strip_prefix("db=").unwrap_or(if query.is_empty() { "0" } else { query });
                (Mode::Single, vec![Address::Unix(path.into())], Some(database))
            }
            "sentinel" => {
                let name = parts.next().ok_or_else(|| wrong("names no master: redis+sentinel://HOST:PORT,…/NAME"))?;
                (Mode::Sentinel(name.to_owned()), addresses(hosts, 26379)?, parts.next())
            }
            "cluster" => (Mode::Cluster, addresses(hosts, 6379)?, parts.next()),
            _ => (Mode::Single, addresses(hosts, 6379)?, parts.next()),
        };
        let database = database.unwrap_or("0").parse().map_err(|_| wrong("its database is no number"))?;
        if kind != "unix" && (parts.next().is_some() || !query.is_empty()) {
            return Err(wrong("has more parts than are understood"));
        }
        if mode == Mode::Cluster && database != 0 {
            return Err(wrong("a cluster has database 0 only"));
        }
        // Whichever of them called itself a master would be taken for the store.
        if mode == Mode::Single && addresses.len() > 1 {
            return Err(wrong(
                "names several hosts; write redis+sentinel://HOST,HOST/NAME or redis+cluster://HOST,HOST",
            ));
        }
        Ok(Self { mode, addresses, tls, user, password, database })
    }
}

fn addresses(hosts: &str, port: u16) -> Result<Vec<Address>, OpenError> {
    // Not quoted: it may be a user and his password without an @.
    let wrong = || wrong("one of its hosts is no HOST:PORT");
    hosts.split(',').map(|host| address(host, port).ok_or_else(wrong)).collect()
}

/// As the nodes of a cluster name each other: the port is after the last colon, and IPv6 addresses have no brackets.
pub(super) fn node(text: &str) -> Option<Address> {
    let (host, port) = text.trim().rsplit_once(':')?;
    Some(Address::Tcp(Some(host).filter(|host| !host.is_empty())?.to_owned(), port.parse().ok()?))
}

fn address(text: &str, default_port: u16) -> Option<Address> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (host, if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
        }
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    let port = port.map_or(Some(default_port), |port| port.parse().ok())?;
    (!host.is_empty() && port != 0).then(|| Address::Tcp(host.to_owned(), port))
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::shared::TlsFiles;
    use std::time::Duration;

    fn parse(url: &str, password: Option<&str>) -> Result<Target, OpenError> {
        Target::parse(&Options {
            url: url.to_owned(),
            password: password.map(str::to_owned),
            prefix: "oncegate".to_owned(),
            timeout: Duration::from_secs(1),
            start_timeout: Duration::ZERO,
            strict: false,
            wait_replicas: 0,
            create: true,
            migrate: false,
            tls: TlsFiles::default(),
        })
    }

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp(host.to_owned(), port)
    }

    #[test]
    fn urls_are_understood() {
        let plain = parse("redis://h", None).unwrap();
        assert_eq!(
            (plain.mode, plain.addresses, plain.tls, plain.database),
            (Mode::Single, vec![tcp("h", 6379)], false, 0)
        );
        let full = parse("rediss://us%65r:p%40ss@[::1]:1/3", None).unwrap();
        assert_eq!(full.addresses, [tcp("::1", 1)]);
        assert_eq!((full.tls, full.database), (true, 3));
        assert_eq!((full.user.as_deref(), full.password.as_deref()), (Some("user"), Some("p@ss")));
        assert_eq!(full.addresses[0].to_string(), "[::1]:1");
        let file = parse("redis://:inline@h", Some("file")).unwrap();
        assert_eq!((file.user, file.password.as_deref()), (None, Some("file")), "the file beats the URL");
        let sentinel = parse("redis+sentinel://a:1,b/main/2", None).unwrap();
        assert_eq!(sentinel.mode, Mode::Sentinel("main".to_owned()));
        assert_eq!((sentinel.addresses, sentinel.database), (vec![tcp("a", 1), tcp("b", 26379)], 2));
        let cluster = parse("rediss+cluster://a:1,b:2", None).unwrap();
        assert_eq!((cluster.mode, cluster.tls, cluster.addresses.len()), (Mode::Cluster, true, 2));
        let unix = parse("redis+unix:///run/redis.sock?db=4", None).unwrap();
        assert_eq!((unix.addresses, unix.database), (vec![Address::Unix("/run/redis.sock".into())], 4));
    }

    #[test]
    fn what_is_wrong_is_said_without_the_password() {
        for url in [
            "h:1",
            "http://h",
            "redis://h:x",
            "redis://h:0",
            "redis://",
            "redis://h/one",
            "redis://h/1/2",
            "redis://h/1?x=1",
            "redis+sentinel://h",
            "redis+cluster://h/1",
            "redis://user@h",
            "redis://u:s3cret%zz@h",
            "redis://u:s3cret@h:x",
            "redis+unix:///s?database=1",
            "redis://a,b",
            "rediss://a:1,b:2/3",
            // A password that should have been escaped.
            "redis://u:s3cret/x@h:1",
            "redis://u:s3cret?x@h:1",
            "redis://u:1/s3cret@h:1",
            "redis+sentinel://u:1/s3cret@h/main",
            "redis+cluster://u:s3cret/x@h:1",
            // A URL that was cut off.
            "redis://u:s3cret",
        ] {
            let Err(error) = parse(url, None) else { panic!("{url}") };
            assert!(!error.to_string().contains("s3cret"), "{error}");
        }
    }
}
