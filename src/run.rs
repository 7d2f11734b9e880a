//! Wires the parts together: store → recovery → listeners → serving → drain.

use crate::admin::{self, Admin, Records, RouteRules};
use crate::clock::Clock;
use crate::config::Config;
use crate::gateway::identity::{self, RouteIdentity};
use crate::gateway::jwt::Auth;
use crate::gateway::scope::Secret;
use crate::gateway::upstream::Upstream;
use crate::gateway::{Gateway, GatewayLedger, RouteOptions};
use crate::idempotency::{Millis, Policy};
use crate::ledger::{Ledger, tags};
use crate::server::inherit::{InheritError, Inherited};
use crate::server::tls::Tls;
use crate::server::workers::Workers;
use crate::server::{Address, BindError, Listener, Server};
use crate::store::shared::OpenError as SharedError;
use crate::store::{self, AnyStore, Health, OpenError, Store, StoreError};
use crate::telemetry::{Metrics, Reading};
use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Why the gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("the store refused a write at the start: {0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error(transparent)]
    Inherit(#[from] InheritError),
    #[error(
        "the configuration would give existing keys other ids, and every retry would be executed again:\n  {}\n\
         Undo the change, or start once with --accept-new-identity if no client retries across it.",
        .0.join("\n  ")
    )]
    Identity(Vec<String>),
    #[error("the note of what makes ids in the store cannot be read ({0}); a newer oncegate may have written it")]
    IdentityNote(serde_json::Error),
    #[error(
        "admin.listen: {0} is open to other machines, and so would be the records: write admin.token_file, or listen on loopback"
    )]
    Exposed(Address),
    #[error("the store's secret has {0} bytes instead of 32: something else has written there, or it is damaged")]
    Secret(usize),
    #[error("cannot start the worker threads: {0}")]
    Workers(#[source] std::io::Error),
    #[error("the operating system gave no randomness for the store's secret: {0}")]
    Randomness(getrandom::Error),
}

impl StartError {
    /// 2 for what the configuration says, 1 for everything else.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        let configured = match self {
            Self::Identity(_) | Self::Exposed(_) => true,
            Self::Open(OpenError::Shared(error)) => {
                matches!(error, SharedError::NotStrict { .. } | SharedError::Options { .. })
            }
            _ => false,
        };
        if configured { 2 } else { 1 }
    }
}

/// A gateway that serves.
pub struct Running {
    ledger: GatewayLedger,
    server: Arc<Server>,
    admin: Arc<Admin>,
    tls: Option<Arc<Tls>>,
    upstream: Arc<Upstream>,
    tokens: Option<Arc<admin::TokenFile>>,
    auth: Option<Arc<Auth>>,
    drain_delay: Duration,
    drain_timeout: Duration,
    addresses: Vec<Address>,
    admin_address: Address,
}

/// What a gateway is made of, once its store is open and what an earlier run has left is settled.
pub(crate) struct Prepared {
    pub(crate) ledger: GatewayLedger,
    pub(crate) secret: Secret,
    pub(crate) metrics: Metrics,
}

pub(crate) async fn prepare(
    store: AnyStore,
    config: &Config,
    accept_new_identity: bool,
) -> Result<Prepared, StartError> {
    warn_of_new_store(&store, &config.store);
    let secret = secret(&store, &config.store).await?;
    note_identity(&store, &identity::of(&config.gateway.routes), accept_new_identity).await?;
    let metrics = Metrics::default();
    let clock = match store.time() {
        Some(time) => Clock::shared(move || time.now_ms()),
        None => Clock::system(Millis(store.newest_ms())),
    };
    let ledger: GatewayLedger = Ledger::new(store, clock, &config.ledger, metrics.clone());
    recover(&ledger, config).await?;
    Ok(Prepared { ledger, secret, metrics })
}

/// What goes on beside the requests, for as long as the process lives.
pub(crate) fn keep(
    ledger: &GatewayLedger,
    lease: Option<Duration>,
    policies: impl Fn(&[u8]) -> Option<Policy> + Send + Sync + 'static,
) {
    let sweeper = ledger.clone();
    tokio::spawn(async move { sweeper.sweep().await });
    let Some(lease) = lease else { return };
    let (keeper, finder) = (ledger.clone(), ledger.clone());
    tokio::spawn(async move { keeper.keep_leases(lease).await });
    tokio::spawn(async move { finder.let_claims_lapse(lease, policies).await });
}

/// Opens the store, settles what an earlier run has left open, binds, and starts to serve. To be called within a runtime.
///
/// # Errors
/// See [`StartError`]; nothing is left running then.
pub async fn start(config: Config, accept_new_identity: bool) -> Result<Running, StartError> {
    let store = AnyStore::open(&config.store).await?;
    let Prepared { ledger, secret, metrics } = prepare(store, &config, accept_new_identity).await?;

    let mut listeners = Vec::new();
    let mut inherited = Inherited::take_all()?;
    for address in &config.server.listen {
        listeners.push(listen(&mut inherited, address).await?);
    }
    let admin_listener = listen(&mut inherited, &config.admin.listen).await?;
    inherited.finish()?;
    let admin_address = admin_listener.address();
    let addresses = listeners.iter().map(Listener::address).collect::<Vec<_>>();
    // A name may have led elsewhere.
    if config.admin.is_exposed_at(&admin_address) {
        return Err(StartError::Exposed(admin_address));
    }

    let rules = config.gateway.routes.iter().map(rules).collect();
    let tokens = config.admin.tokens;
    let records = Records::new(ledger.clone(), tokens.clone(), rules);
    let auth = config.gateway.auth.clone();
    let policies = policies(&config.gateway.routes);
    let gateway = Gateway::new(config.gateway, ledger.clone(), secret, metrics.clone());
    let upstream = Arc::clone(gateway.upstream());
    let workers = Workers::start(config.server.workers).map_err(StartError::Workers)?;
    let gateways = workers.iter().map(|_| gateway.for_another_worker()).collect::<Vec<_>>();
    for (worker, gateway) in workers.iter().zip(&gateways) {
        let pool = Arc::clone(gateway.upstream());
        worker.runtime.spawn(async move { pool.close_idle().await });
    }
    let read = reader(&ledger, gateways.iter().map(|gateway| Arc::clone(gateway.upstream())).collect());
    let admin = Admin::new(metrics.registry(read.clone()), read, config.admin.ready_needs_store, records);
    let tls = config.server.tls;
    let server = Server::new(workers, gateways, config.server.limits, tls.clone(), metrics);
    keep(&ledger, config.ledger.lease, policies);
    if let Some(auth) = auth.clone() {
        tokio::spawn(async move { auth.keep_fresh().await });
    }
    tokio::spawn(Arc::clone(&admin).serve(admin_listener));
    tracing::info!(address = %admin_address, role = "admin", "listening");
    for listener in listeners {
        tracing::info!(address = %listener.address(), role = "server", "listening");
        tokio::spawn(Arc::clone(&server).accept(listener));
    }
    let (drain_delay, drain_timeout) = (config.server.drain_delay, config.server.drain_timeout);
    Ok(Running {
        ledger,
        server,
        admin,
        tls,
        upstream,
        tokens,
        auth,
        drain_delay,
        drain_timeout,
        addresses,
        admin_address,
    })
}

impl Running {
    /// Where clients are served.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    #[must_use]
    pub fn admin_address(&self) -> &Address {
        &self.admin_address
    }

    /// From now on reads the files of `[server.tls]`, `[upstream.tls]`, `[auth]` and `admin.token_file` again whenever
    /// `reload` says so, and fetches what `auth.jwks_url` publishes. Open connections keep what they have.
    pub fn reload_on(&self, mut reload: Signal) {
        let (tls, upstream) = (self.tls.clone(), Arc::clone(&self.upstream));
        let (tokens, auth) = (self.tokens.clone(), self.auth.clone());
        tokio::spawn(async move {
            while reload.recv().await.is_some() {
                let (tls, upstream) = (tls.clone(), Arc::clone(&upstream));
                let (tokens, auth) = (tokens.clone(), auth.clone());
                let read = move || {
                    if let Some(tls) = &tls {
                        tls.reload();
                    }
                    if let Some(tokens) = &tokens {
                        tokens.reload();
                    }
                    match upstream.reload_tls() {
                        Ok(true) => tracing::info!("the files of upstream.tls were read again"),
                        Ok(false) if tls.is_some() || tokens.is_some() || auth.is_some() => {}
                        Ok(false) => tracing::info!(
                            "SIGHUP: there is no [server.tls], [upstream.tls], [auth] or admin.token_file to read again"
                        ),
                        Err(errors) => errors.iter().for_each(|error| {
                            let key = format!("upstream.tls.{}", error.key);
                            tracing::error!(key, %error, "the files of upstream.tls stay as they were");
                        }),
                    }
                    if let Some(auth) = &auth {
                        auth.reload();
                    }
                };
                let _ = tokio::task::spawn_blocking(read).await;
            }
        });
    }

    /// Serves until `shutdown` is ready, then drains and closes the store.
    pub async fn until(self, shutdown: impl Future<Output = ()>) {
        shutdown.await;
        tracing::info!("draining");
        self.admin.set_draining();
        self.server.drain(self.drain_delay, self.drain_timeout).await;
        let ledger = self.ledger;
        let _ = tokio::task::spawn_blocking(move || ledger.store().close()).await;
        tracing::info!("stopped");
    }
}

async fn listen(inherited: &mut Inherited, address: &Address) -> Result<Listener, BindError> {
    match inherited.take(address).await {
        Some(listener) => Ok(listener),
        None => Listener::bind(address).await,
    }
}

/// A store that is created where one was expected means that every key is new: a volume that is not mounted, say.
fn warn_of_new_store(store: &AnyStore, options: &store::Options) {
    if !store.status().created {
        return;
    }
    match options {
        store::Options::Memory => {}
        store::Options::Embedded(embedded) => {
            let path = std::path::absolute(&embedded.path).unwrap_or_else(|_| embedded.path.clone());
            tracing::warn!(path = %path.display(), "a new store was created: all keys are new to it");
        }
        store::Options::Redis(shared) | store::Options::Postgres(shared) => {
            let (place, prefix) = (shared.place(), &shared.prefix);
            tracing::warn!(place, prefix, "a new store was created: all keys are new to it");
        }
    }
}

/// Creates the tables that a shared store needs, or brings them up to date. Says what there was to do.
///
/// # Errors
/// The store's.
pub async fn migrate(config: &Config) -> Result<String, StartError> {
    let store::Options::Postgres(options) = &config.store else {
        return Ok("this engine has no tables: there is nothing to do".to_owned());
    };
    store::postgres::migrate(options).await.map_err(|error| StartError::Open(error.into()))?;
    Ok(format!("the tables at {} are up to date", options.place()))
}

/// Ready once the process is told to stop, by SIGTERM or SIGINT. The signals are caught from now on.
///
/// # Errors
/// The operating system's.
pub fn shutdown_signal() -> std::io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// SIGHUP, which ends the process no more from now on.
///
/// # Errors
/// The operating system's.
pub fn reload_signal() -> std::io::Result<Signal> {
    signal(SignalKind::hangup())
}

/// A key made of parts: BLAKE3 of each part's length (64 bits, little-endian) and bytes in turn, so that no two lists of
/// parts give the same key. Stable across versions.
#[must_use]
pub fn key_of_parts(parts: &[String]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// The store's secret, made when the store is.
async fn secret(store: &AnyStore, options: &store::Options) -> Result<Secret, StartError> {
    const NAME: &str = "secret";
    loop {
        if let Some(noted) = store.setting(NAME).await? {
            return <[u8; 32]>::try_from(noted.as_ref()).map(Secret).map_err(|_| StartError::Secret(noted.len()));
        }
        if let store::Options::Redis(shared) | store::Options::Postgres(shared) = options {
            shared.may_create().map_err(|error| StartError::Open(error.into()))?;
        }
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(StartError::Randomness)?;
        // Another gateway may have been faster: its secret is everybody's.
        store.swap_setting(NAME, None, &secret).await?;
    }
}

async fn note_identity(store: &AnyStore, today: &[RouteIdentity], accept_new: bool) -> Result<(), StartError> {
    const NAME: &str = "identity";
    loop {
        let note = store.setting(NAME).await?;
        let noted: Vec<RouteIdentity> = match &note {
            Some(bytes) => serde_json::from_slice(bytes).map_err(StartError::IdentityNote)?,
            None => Vec::new(),
        };
        let all = match identity::compare(&noted, today) {
            Ok(all) => all,
            Err(changes) if accept_new => {
                tracing::warn!(
                    ?changes,
                    "new identity accepted: requests retried across this change are executed again"
                );
                today.to_vec()
            }
            Err(changes) => return Err(StartError::Identity(changes)),
        };
        if all == noted {
            return Ok(());
        }
        let new = serde_json::to_vec(&all).map_err(StartError::IdentityNote)?;
        if store.swap_setting(NAME, note.as_deref(), &new).await? {
            return Ok(());
        }
        // Another gateway has noted something meanwhile.
    }
}

/// What an operator's act on a record of this route goes by.
fn rules(route: &RouteOptions) -> RouteRules {
    RouteRules {
        pattern: route.pattern.as_str().to_owned(),
        policy: route.policy,
        max_recorded_body: route.max_recorded_body,
        drop_headers: route.drop_headers.clone(),
    }
}

/// The policy of a record's route; of one that is configured no more, the one that remembers longest.
pub(crate) fn policies(routes: &[RouteOptions]) -> impl Fn(&[u8]) -> Option<Policy> + Send + Sync + 'static {
    let longest = routes.iter().map(|route| route.policy).max_by_key(|policy| policy.unknown_retention_ms);
    let policies: HashMap<_, _> =
        routes.iter().rev().map(|route| (route.pattern.as_str().as_bytes().to_vec(), route.policy)).collect();
    move |pattern| policies.get(pattern).copied().or(longest)
}

/// Claims found at start belong to a process that died: their outcome is unknown.
async fn recover(ledger: &GatewayLedger, config: &Config) -> Result<(), StartError> {
    let recovered = ledger.recover(policies(&config.gateway.routes)).await?;
    if recovered > 0 {
        tracing::warn!(recovered, "requests were under way when the gateway died; their outcome is unknown");
    }
    Ok(())
}

fn reader(
    ledger: &GatewayLedger,
    upstreams: Vec<Arc<Upstream>>,
) -> impl Fn() -> Reading + Clone + Send + Sync + 'static {
    let ledger = ledger.clone();
    move || {
        let status = ledger.store_status();
        let count = |tag: crate::store::Tag| status.entries.get(usize::from(tag.0)).copied().unwrap_or(0);
        let oldest = status.oldest_ms.get(usize::from(tags::UNKNOWN.0)).copied().flatten();
        let (cache_entries, cache_bytes) = ledger.cache_size();
        Reading {
            records_claimed: count(tags::CLAIMED),
            records_completed: count(tags::COMPLETED),
            records_unknown: count(tags::UNKNOWN),
            oldest_unknown: oldest.map(|since| Duration::from_millis(ledger.now().since(Millis(since)))),
            store_failed: status.health == Health::Failed,
            store_full: status.health == Health::Full,
            store_unreachable: status.health == Health::Unreachable,
            store_created: status.created,
            store_queue: status.queue_len,
            store_batches: status.batches,
            store_batched_writes: status.batched_writes,
            store_written_bytes: status.bytes_written,
            store_swept: status.swept,
            store_disk_bytes: status.disk_bytes,
            cache_entries,
            cache_bytes,
            pool_idle: upstreams.iter().map(|upstream| upstream.idle_connections() as u64).sum(),
        }
    }
}
