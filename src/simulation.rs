//! The gateway without sockets, disks and clocks of its own, for `tests/simulation.rs`. Not part of a release.
//!
//! Everything above the store's trait and the streams is what a release runs: the start with its recovery, connections,
//! HTTP on both sides, the pipeline, the ledger, leases, the sweep. To be used within a runtime whose time is paused.

pub use crate::clock::simulate as simulate_clock;
pub use crate::gateway::upstream::simulated::{Connector, Stream};

use crate::config::Config;
use crate::gateway::upstream::Endpoint;
use crate::gateway::{Gateway, GatewayLedger, RouteOptions};
use crate::idempotency::{Event, Resolution};
use crate::ledger::Act;
use crate::run::{self, Prepared, StartError};
use crate::server::{Limits, serve_simulated};
use crate::store::simulated::Simulated;
use crate::store::{AnyStore, RecordId, Version};
use crate::telemetry::Metrics;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// A gateway that serves.
pub struct Served {
    gateway: Arc<Gateway>,
    ledger: GatewayLedger,
    routes: Vec<RouteOptions>,
    limits: Limits,
    metrics: Metrics,
    drain: CancellationToken,
}

impl Served {
    /// Starts as the program does, on this store and before this upstream.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(mut config: Config, store: Simulated, upstream: Connector) -> Result<Self, StartError> {
        config.gateway.upstream.endpoint = Endpoint::Simulated(upstream);
        let prepared = run::prepare(AnyStore::Simulated(store), &config, false).await?;
        let Prepared { ledger, secret, metrics } = prepared;
        let routes = config.gateway.routes.clone();
        let gateway = Gateway::new(config.gateway, ledger.clone(), secret, metrics.clone());
        let pool = Arc::clone(gateway.upstream());
        tokio::spawn(async move { pool.close_idle().await });
        run::keep(&ledger, config.ledger.lease, run::policies(&routes));
        Ok(Self { gateway, ledger, routes, limits: config.server.limits, metrics, drain: CancellationToken::new() })
    }

    /// Serves a client's connection until it ends.
    pub fn serve(&self, stream: Stream) {
        let (gateway, limits) = (Arc::clone(&self.gateway), self.limits.clone());
        tokio::spawn(serve_simulated(stream, gateway, limits, self.drain.clone(), self.metrics.clone()));
    }

    /// An operator says that an unknown record's request was not executed. `false`: nothing came of it.
    pub async fn resolve_not_executed(&self, id: RecordId, version: Version) -> bool {
        let policies = run::policies(&self.routes);
        let act = Act {
            id,
            if_version: Some(version),
            who: "simulation".into(),
            decide: Box::new(move |record| {
                let policy = policies(&record.origin.route).ok_or("no routes")?;
                Ok::<_, &str>((policy, Event::Resolve(Resolution::NotExecuted)))
            }),
        };
        self.ledger.act(act).await.is_ok()
    }

    /// Claims that are open.
    #[must_use]
    pub fn open_claims(&self) -> usize {
        self.gateway.open_claims()
    }

    /// Bytes of bodies that are held.
    #[must_use]
    pub fn buffered_bytes(&self) -> i64 {
        self.metrics.buffered_bytes.get()
    }
}
