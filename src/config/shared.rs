//! `[store]`: an embedded one, or one that is shared.

use super::reader::{At, Errors, Node, Section, Value, boolean, choice, count, duration, size, string};
use super::sections::{TICK, file, seconds};
use crate::store;
use crate::store::embedded::{self, Durability};
use crate::store::shared::{self, TlsFiles};
use std::path::PathBuf;
use std::time::Duration;
use zeroize::Zeroizing;

/// The store, and the lease of claims in it, if it is shared.
pub(super) struct Resolved {
    pub(super) options: store::Options,
    pub(super) lease: Option<Duration>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Engine {
    Embedded(embedded::Engine),
    Memory,
    Redis,
    Postgres,
}

const ENGINES: [(&str, Engine); 5] = [
    ("sled", Engine::Embedded(embedded::Engine::Sled)),
    ("fjall", Engine::Embedded(embedded::Engine::Fjall)),
    ("memory", Engine::Memory),
    ("redis", Engine::Redis),
    ("postgres", Engine::Postgres),
];

impl Engine {
    fn schemes(self) -> &'static [&'static str] {
        match self {
            Self::Redis => &[
                "redis",
                "rediss",
                "redis+sentinel",
                "rediss+sentinel",
                "redis+cluster",
                "rediss+cluster",
                "redis+unix",
            ],
            Self::Postgres => &["postgres", "postgresql"],
            Self::Embedded(_) | Self::Memory => &[],
        }
    }
}

/// So many operations fit into a lease, at least: a renewal that fails once or twice costs nothing yet, and a write whose answer
/// was lost cannot land after the lease is over.
const OPERATIONS_IN_A_LEASE: u32 = 4;
const LEASE: Duration = seconds(30);
const TIMEOUT: Duration = seconds(2);
const START_TIMEOUT: Duration = seconds(30);

/// Reads the files of `password_file` and `[store.tls]`, too.
pub(super) fn resolve(node: Option<Node>, errors: &mut Errors) -> Resolved {
    let mut section = Section::new("store", node, errors);
    let engine_at = section.at("engine");
    let engine = section.read("engine", choice(&ENGINES)).unwrap_or(Engine::Embedded(embedded::Engine::Sled));
    let path = section.read("path", file).unwrap_or_else(|| PathBuf::from("data"));
    let create = section.read("create", boolean).unwrap_or(true);
    let min_free_bytes = section.read("min_free", size(0)).unwrap_or(64 << 20);
    let durabilities = [("strict", Durability::Strict), ("relaxed", Durability::Relaxed)];
    let durability = section.read("durability", choice(&durabilities)).unwrap_or(Durability::Strict);
    let (lease, mut shared) = shared_keys(&mut section, engine, &engine_at);
    (shared.strict, shared.create) = (durability == Durability::Strict, create);
    section.finish();
    let options = match engine {
        Engine::Memory => store::Options::Memory,
        Engine::Embedded(engine) => {
            store::Options::Embedded(embedded::Options { engine, path, create, min_free_bytes, durability })
        }
        Engine::Redis => store::Options::Redis(shared),
        Engine::Postgres => store::Options::Postgres(shared),
    };
    let is_shared = matches!(engine, Engine::Redis | Engine::Postgres);
    Resolved { options, lease: is_shared.then_some(lease) }
}

/// What is said of a shared store; with another engine it is read all the same, so that mistakes are found.
fn shared_keys(section: &mut Section<'_>, engine: Engine, engine_at: &At) -> (Duration, shared::Options) {
    let is_shared = !engine.schemes().is_empty();
    let lease = section.read("lease", duration(Duration::from_millis(100))).unwrap_or(LEASE);
    let most = lease / OPERATIONS_IN_A_LEASE;
    let timeout_at = section.at("timeout");
    let timeout = section.read("timeout", duration(TICK)).unwrap_or(TIMEOUT.min(most));
    if timeout > most && is_shared {
        section.add(&timeout_at, "timeout", &format!("must be at most a quarter of store.lease, which is {lease:?}"));
    }
    let start_timeout = section.read("start_timeout", duration(Duration::ZERO)).unwrap_or(START_TIMEOUT);
    let url_at = section.at("url");
    let url = section.read("url", |value| url(value, engine));
    let password_at = section.at("password_file");
    let password_file = section.read("password_file", file);
    let password = password_file.and_then(|path| match std::fs::read_to_string(&path).map(Zeroizing::new) {
        Ok(text) => Some(text.trim_end_matches(['\r', '\n']).to_owned()),
        Err(error) => {
            section.add(&password_at, "password_file", &format!("{}: cannot be read: {error}", path.display()));
            None
        }
    });
    if is_shared && url_at == At::Nowhere {
        let example = if engine == Engine::Redis { "redis://host:6379/0" } else { "postgres://user@host/database" };
        section.add(engine_at, "url", &format!("is missing; write where the store is, such as \"{example}\""));
    }
    if !is_shared && password_at != At::Nowhere {
        section.add(&password_at, "password_file", "is of shared stores; the engine is another");
    }
    let prefix = section.read("prefix", prefix).unwrap_or_else(|| "oncegate".to_owned());
    let replicas_at = section.at("wait_replicas");
    let wait_replicas = section.read("wait_replicas", count(0, 100)).unwrap_or(0);
    if wait_replicas > 0 && engine != Engine::Redis {
        section.add(&replicas_at, "wait_replicas", "is of Redis; the engine is another");
    }
    let migrate = section.read("migrate", boolean).unwrap_or(true);
    let tls_node = section.take("tls");
    let tls_at = tls_node.as_ref().map(|node| node.at.clone());
    let tls = tls(tls_node, section.errors);
    if let Some(at) = tls_at {
        match &url {
            _ if !is_shared => section.add(&at, "tls", "is of shared stores; the engine is another"),
            Some(url) if is_plain(url, engine) => {
                let reason = "has no effect with this store.url, which asks for no TLS; write rediss://, \
                              rediss+sentinel:// or rediss+cluster:// (postgres: no sslmode=disable)";
                section.add(&at, "tls", reason);
            }
            _ => {}
        }
    }
    let wait_replicas = u32::try_from(wait_replicas).unwrap_or(0);
    let url = url.unwrap_or_default();
    // Both are every store's.
    let (strict, create) = (true, true);
    let options =
        shared::Options { url, password, prefix, timeout, start_timeout, strict, create, wait_replicas, migrate, tls };
    (lease, options)
}

/// The rest of it is for the driver to understand. It may hold a password: it is not quoted.
fn url(value: &Value, engine: Engine) -> Result<String, String> {
    let text = string(value)?;
    let schemes = engine.schemes();
    if schemes.is_empty() {
        return Err("is of shared stores; write engine = \"redis\" or \"postgres\" if you mean one".to_owned());
    }
    match text.split_once("://") {
        Some((scheme, rest)) if schemes.contains(&scheme) && !rest.is_empty() => Ok(text),
        _ => Err(format!("is no URL of this engine; its scheme is one of {}", schemes.join(", "))),
    }
}

/// Whether all would go in the clear, whatever `[store.tls]` says. PostgreSQL's driver wants TLS if there are files for it.
fn is_plain(url: &str, engine: Engine) -> bool {
    if engine == Engine::Redis { !url.starts_with("rediss") } else { url.contains("sslmode=disable") }
}

/// Part of the names of keys, channels and tables.
fn prefix(value: &Value) -> Result<String, String> {
    let text = string(value)?;
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    let begins = text.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase());
    if begins && text.len() <= 40 && text.bytes().all(plain) {
        Ok(text)
    } else {
        Err(format!("{text:?} cannot begin names; write 1 to 40 of a-z, 0-9 and _, a letter first"))
    }
}

fn tls(node: Option<Node>, errors: &mut Errors) -> TlsFiles {
    let Some(node) = node else { return TlsFiles::default() };
    let mut section = Section::new("store.tls", Some(node), errors);
    let (cert_at, key_at) = (section.at("cert"), section.at("key"));
    let mut read = |key| {
        let at = section.at(key);
        let path = section.read(key, file)?;
        match std::fs::read(&path) {
            Ok(pem) => Some(pem),
            Err(error) => {
                section.add(&at, key, &format!("{}: cannot be read: {error}", path.display()));
                None
            }
        }
    };
    let (ca, cert, key) = (read("ca"), read("cert"), read("key"));
    match (&cert_at, &key_at) {
        (At::Nowhere, At::Nowhere) => {}
        (At::Nowhere, there) => section.add(there, "cert", "is missing; a key needs its certificate"),
        (there, At::Nowhere) => section.add(there, "key", "is missing; a certificate needs its key"),
        _ => {}
    }
    section.finish();
    TlsFiles { ca, client: cert.zip(key) }
}
