//! What the stores that several gateways share have in common: how they are reached, their clock, and word of entries that
//! have changed.
//!
//! Whoever shares a store trusts its clock alone. Gateways never compare theirs: each knows the store's time from the
//! answers it gets ([`StoreTime`]).

mod time;
mod watch;

pub use time::StoreTime;
pub use watch::{Interest, Watch, Watches};

use std::fmt;
use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;

/// `[store]`, as far as it tells of a shared store.
#[derive(Clone)]
pub struct Options {
    /// With the credentials, if they are written there: never to be shown. [`Options::place`] is.
    pub url: String,
    /// From `store.password_file`; beats that of the URL.
    pub password: Option<String>,
    /// What all names in the store begin with: keys and channels in Redis, tables in PostgreSQL.
    pub prefix: String,
    /// For one operation, its second tries included, and for connecting.
    pub timeout: Duration,
    /// For how long opening tries again while the store cannot be reached: it may be about to start, or to load its data.
    pub start_timeout: Duration,
    /// Refuse a store that may lose what it has acknowledged.
    pub strict: bool,
    /// Make a store that is not there. Otherwise that is an error: what is missing may have been lost.
    pub create: bool,
    /// Redis: how many replicas have to have each claim and each outcome, by `WAIT`, or by `WAITAOF` if it is strict.
    pub wait_replicas: u32,
    /// PostgreSQL: create and migrate the tables at the start.
    pub migrate: bool,
    pub tls: TlsFiles,
}

/// `[store.tls]`: the contents of the files, in PEM.
#[derive(Clone, Default)]
pub struct TlsFiles {
    /// Authorities to trust; `None`: those of the system.
    pub ca: Option<Vec<u8>>,
    /// The gateway's own certificate and key.
    pub client: Option<(Vec<u8>, Vec<u8>)>,
}

impl Options {
    /// Where the store is, without credentials.
    #[must_use]
    pub fn place(&self) -> String {
        let (scheme, rest) = self.url.split_once("://").unwrap_or(("", &self.url));
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        if path.contains('@') {
            // A password that should have been escaped, perhaps: where it ends nobody knows.
            return format!("{scheme}://…");
        }
        let hosts = authority.rsplit_once('@').map_or(authority, |(_, hosts)| hosts);
        let path = path.split(['?', '#']).next().unwrap_or_default();
        format!("{scheme}://{hosts}{path}")
    }

    /// # Errors
    /// [`OpenError::Missing`], if a store must not be made.
    pub(crate) fn may_create(&self) -> Result<(), OpenError> {
        if self.create {
            return Ok(());
        }
        Err(OpenError::Missing { place: self.place(), prefix: self.prefix.clone() })
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options").field("place", &self.place()).field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

/// What is said of a store without the birthmark that it had when it was opened.
pub(super) const ANOTHER: &str = "this is not the store that the gateway started with: it was emptied or set up anew, or it \
                                  is another one. Bring the right one back; or restart all gateways, and all keys are new";

/// Why a shared store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// What is configured makes no sense to the driver, or the TLS files do not.
    #[error("store.{key}: {reason}")]
    Options { key: &'static str, reason: String },
    #[error("the store at {place} cannot be reached: {reason}")]
    Unreachable { place: String, reason: String },
    /// [`Options::create`] is false.
    #[error(
        "there is no store at {place} whose names begin with {prefix:?}, and `store.create` is false: is it the right server \
         and database?"
    )]
    Missing { place: String, prefix: String },
    /// It answers, but refuses: a password, a right, a table.
    #[error("the store at {place} refuses: {reason}")]
    Refused { place: String, reason: String },
    /// It does not bear the birthmark of the store that was opened. Only of one that is connected to anew.
    #[error("the store at {place} cannot be used any more: {ANOTHER}")]
    Another { place: String },
    /// `durability = "strict"` would be a lie.
    #[error(
        "the store at {place} may lose what it has acknowledged: {reason}. Mend it, or write store.durability = \
         \"relaxed\" and accept that keys may be executed again after a failure of the store"
    )]
    NotStrict { place: String, reason: String },
}

/// The pause before opening is tried again, doubled each time up to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(400);

/// Opens a store, again and again while it cannot be reached and the `start_timeout` is not over.
///
/// # Errors
/// Those of `open`; [`OpenError::Unreachable`] only at the end of the time.
pub async fn open_within<S, F>(options: &Options, open: impl Fn() -> F) -> Result<S, OpenError>
where
    F: Future<Output = Result<S, OpenError>>,
{
    let (began, mut pause) = (Instant::now(), PAUSE);
    loop {
        match open().await {
            Err(error @ OpenError::Unreachable { .. }) if began.elapsed() + pause < options.start_timeout => {
                if pause == PAUSE {
                    tracing::warn!(%error, start_timeout = ?options.start_timeout, "the start waits for the store");
                }
            }
            opened => return opened,
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::Options;
    use std::time::Duration;

    #[test]
    fn the_place_shows_no_credentials() {
        for (url, place) in [
            ("redis://127.0.0.1:6379/3", "redis://127.0.0.1:6379/3"),
            ("rediss://user:s3cret@h:1/0?insecure=s3cret", "rediss://h:1/0"),
            ("postgres://u:p@s3cret@h/db?password=s3cret", "postgres://h/db"),
            ("redis+cluster://u:s3cret@a:1,b:2", "redis+cluster://a:1,b:2"),
            ("redis://u:s3cret@s3cret@h:1/0", "redis://h:1/0"),
            ("redis://u:s3cret/s3cret@h:1/0", "redis://…"),
            ("postgres://u@h/db?password=p@s3cret", "postgres://…"),
        ] {
            let options = Options {
                url: url.to_owned(),
                password: Some("s3cret".to_owned()),
                prefix: "oncegate".to_owned(),
                timeout: Duration::from_secs(2),
                start_timeout: Duration::ZERO,
                strict: true,
                wait_replicas: 0,
                create: true,
                migrate: true,
                tls: super::TlsFiles::default(),
            };
            assert_eq!(options.place(), place);
            assert!(!format!("{options:?}").contains("s3cret"), "{options:?}");
        }
    }
}
