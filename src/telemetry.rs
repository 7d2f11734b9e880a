//! Every metric name, in one file; and the set-up of logging.

use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::{Registry, Unit};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How a request ended, as dashboards see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "label values as users see them")]
pub enum Outcome {
    /// Passed through untouched.
    passed,
    /// Claimed and sent upstream.
    forwarded,
    /// Answered from the record.
    replayed,
    /// Answered with the result of a request that was in flight.
    waited,
    in_progress,
    key_reused,
    outcome_unknown,
    body_not_recorded,
    /// Refused: the request or its key is not acceptable.
    rejected,
    /// Refused or broken off for want of the store, the upstream or room.
    failed,
}

const OUTCOMES: [Outcome; 10] = [
    Outcome::passed,
    Outcome::forwarded,
    Outcome::replayed,
    Outcome::waited,
    Outcome::in_progress,
    Outcome::key_reused,
    Outcome::outcome_unknown,
    Outcome::body_not_recorded,
    Outcome::rejected,
    Outcome::failed,
];

impl Outcome {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::passed => "passed",
            Self::forwarded => "forwarded",
            Self::replayed => "replayed",
            Self::waited => "waited",
            Self::in_progress => "in_progress",
            Self::key_reused => "key_reused",
            Self::outcome_unknown => "outcome_unknown",
            Self::body_not_recorded => "body_not_recorded",
            Self::rejected => "rejected",
            Self::failed => "failed",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    result: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerdictLabel {
    verdict: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SettledLabel {
    outcome: &'static str,
}

/// A route's counters, looked up once at start so that a request costs one atomic increment.
#[derive(Clone, Debug, Default)]
pub struct RouteMetrics([Counter; OUTCOMES.len()]);

impl RouteMetrics {
    pub fn count(&self, outcome: Outcome) {
        if let Some(counter) = self.0.get(outcome as usize) {
            counter.inc();
        }
    }
}

/// A histogram of durations that is observed without a lock.
#[derive(Clone, Debug, Default)]
pub struct Durations(Arc<Observed>);

/// Buckets of a histogram of durations, each up to twice as long as the one before, from 50 µs to 52 s; then the rest.
const BUCKETS: usize = 22;
const SHORTEST_NS: u64 = 50_000;

#[derive(Debug, Default)]
struct Observed {
    counts: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

impl Durations {
    pub fn observe(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let doublings = (ns.saturating_sub(1) / SHORTEST_NS).checked_ilog2().map_or(0, |log| log + 1);
        if let Some(count) = self.0.counts.get(doublings as usize).or(self.0.counts.last()) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.0.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }
}

impl TypedMetric for Durations {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Durations {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let mut next = Duration::from_nanos(SHORTEST_NS).as_secs_f64();
        let buckets = self.0.counts.each_ref().map(|count| {
            let upper = next;
            next *= 2.0;
            (upper, count.load(Ordering::Relaxed))
        });
        let count = buckets.iter().map(|(_, count)| count).sum();
        let [bounded @ .., (_, rest)] = buckets;
        let buckets = [bounded.as_slice(), &[(f64::INFINITY, rest)]].concat();
        let sum = Duration::from_nanos(self.0.sum_ns.load(Ordering::Relaxed)).as_secs_f64();
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// Everything that is counted or measured while serving.
#[derive(Clone, Debug)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    settled: Family<SettledLabel, Counter>,
    observed: Family<RequestLabels, Counter>,
    lookups: Family<VerdictLabel, Counter>,
    probes: Family<VerdictLabel, Counter>,
    pub settled_final: Counter,
    pub settled_not_executed: Counter,
    pub settled_unknown: Counter,
    pub settle_failures: Counter,
    /// Time to the complete response of a claimed forward, or to the head of a passed one.
    pub upstream_seconds: Durations,
    pub claim_seconds: Durations,
    pub settle_seconds: Durations,
    pub cache_hits: Counter,
    pub cache_misses: Counter,
    pub waiters: Gauge,
    pub upstream_in_flight: Gauge,
    pub upstream_connections: Counter,
    pub upstream_reused: Counter,
    pub upstream_retries: Counter,
    pub tunnels: Gauge,
    pub connections: Gauge,
    pub connections_refused: Counter,
    pub buffered_bytes: Gauge,
    pub unrecorded_passes: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        let settled = Family::<SettledLabel, Counter>::default();
        let by_outcome = |outcome| settled.get_or_create_owned(&SettledLabel { outcome });
        Self {
            requests: Family::default(),
            settled_final: by_outcome("final"),
            settled_not_executed: by_outcome("not_executed"),
            settled_unknown: by_outcome("unknown"),
            settled,
            observed: Family::default(),
            lookups: Family::default(),
            probes: Family::default(),
            settle_failures: Counter::default(),
            upstream_seconds: Durations::default(),
            claim_seconds: Durations::default(),
            settle_seconds: Durations::default(),
            cache_hits: Counter::default(),
            cache_misses: Counter::default(),
            waiters: Gauge::default(),
            upstream_in_flight: Gauge::default(),
            upstream_connections: Counter::default(),
            upstream_reused: Counter::default(),
            upstream_retries: Counter::default(),
            tunnels: Gauge::default(),
            connections: Gauge::default(),
            connections_refused: Counter::default(),
            buffered_bytes: Gauge::default(),
            unrecorded_passes: Counter::default(),
        }
    }
}

/// One that waits, until this is dropped.
pub(crate) struct Waiter<'a>(&'a Gauge);

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    /// Counts one that waits; a client that hangs up ends its wait, too.
    pub(crate) fn waiter(&self) -> Waiter<'_> {
        self.waiters.inc();
        Waiter(&self.waiters)
    }

    /// The counters of one route; `-` is what matches no route.
    #[must_use]
    pub fn route(&self, route: &str) -> RouteMetrics {
        by_outcome(&self.requests, route)
    }

    /// The counters of what would have been done on a route; shown for routes that are observed.
    #[must_use]
    pub fn observed(&self, route: &str, shown: bool) -> RouteMetrics {
        if shown { by_outcome(&self.observed, route) } else { RouteMetrics::default() }
    }

    /// The upstream was asked what became of a request.
    pub fn lookup(&self, verdict: &'static str) {
        self.lookups.get_or_create(&VerdictLabel { verdict }).inc();
    }

    /// The upstream was asked whether a caller may see an answer.
    pub fn probe(&self, verdict: &'static str) {
        self.probes.get_or_create(&VerdictLabel { verdict }).inc();
    }

    /// Registers everything under its public name.
    #[must_use]
    pub fn registry(&self, gauges: impl Fn() -> Reading + Send + Sync + 'static) -> Registry {
        let mut registry = Registry::with_prefix("oncegate");
        registry.register("requests", "Requests by route and result", self.requests.clone());
        registry.register(
            "observed",
            "Requests by what would have been done, on routes in observe mode",
            self.observed.clone(),
        );
        registry.register("settled", "Claims settled, by outcome", self.settled.clone());
        registry.register(
            "lookups",
            "Questions what became of a request, by the upstream's word",
            self.lookups.clone(),
        );
        registry.register("probes", "Questions whether a caller may see an answer, by verdict", self.probes.clone());
        registry.register("settle_failures", "Outcomes that could not be recorded", self.settle_failures.clone());
        for (name, help, histogram) in [
            ("upstream", "Upstream response time", &self.upstream_seconds),
            ("claim", "Time to claim a key durably", &self.claim_seconds),
            ("settle", "Time to settle a claim durably", &self.settle_seconds),
        ] {
            registry.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        }
        registry.register("cache_hits", "Requests decided from the hot cache", self.cache_hits.clone());
        registry.register("cache_misses", "Requests not found in the hot cache", self.cache_misses.clone());
        registry.register("waiters", "Duplicates waiting for a request in flight", self.waiters.clone());
        registry.register(
            "upstream_in_flight",
            "Claimed forwards under way, late ones included",
            self.upstream_in_flight.clone(),
        );
        registry.register(
            "upstream_connections",
            "Connections made to the upstream",
            self.upstream_connections.clone(),
        );
        registry.register("upstream_reused", "Requests sent over a pooled connection", self.upstream_reused.clone());
        registry.register(
            "upstream_retries",
            "Safe requests sent again: the upstream closed their pooled connection unanswered",
            self.upstream_retries.clone(),
        );
        registry.register("tunnels", "Open tunnels (Upgrade)", self.tunnels.clone());
        registry.register("connections", "Open client connections", self.connections.clone());
        registry.register("connections_refused", "Connections over the limit", self.connections_refused.clone());
        registry.register("buffered_bytes", "Bodies held in memory, in bytes", self.buffered_bytes.clone());
        registry.register(
            "unrecorded_passes",
            "Keyed requests forwarded without a record, by on_store_error",
            self.unrecorded_passes.clone(),
        );
        registry.register_collector(Box::new(Scrape(Arc::new(gauges))));
        registry
    }
}

/// What is read at the moment of a scrape.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    pub records_claimed: u64,
    pub records_completed: u64,
    pub records_unknown: u64,
    pub oldest_unknown: Option<Duration>,
    pub store_failed: bool,
    pub store_full: bool,
    pub store_unreachable: bool,
    pub store_created: bool,
    pub store_queue: u64,
    pub store_batches: u64,
    pub store_batched_writes: u64,
    pub store_written_bytes: u64,
    pub store_swept: u64,
    pub store_disk_bytes: u64,
    pub cache_entries: u64,
    pub cache_bytes: u64,
    pub pool_idle: u64,
}

struct Scrape(Arc<dyn Fn() -> Reading + Send + Sync>);

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

impl prometheus_client::collector::Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let r = (self.0)();
        let metric = ConstGauge::new(0_i64);
        let mut records = encoder.encode_descriptor("records", "Records by state", None, metric.metric_type())?;
        for (state, count) in
            [("claimed", r.records_claimed), ("completed", r.records_completed), ("unknown", r.records_unknown)]
        {
            let labels = StateLabel { state };
            ConstGauge::new(as_i64(count)).encode(records.encode_family(&labels)?)?;
        }
        for (name, help, value) in [
            (
                "oldest_unknown_seconds",
                "Age of the oldest record whose outcome is unknown; 0 if there is none",
                r.oldest_unknown.map_or(0, |age| age.as_secs()),
            ),
            ("store_failed", "1 once the store has failed for good: restart the gateway", u64::from(r.store_failed)),
            ("store_full", "1 while the disk is too full for new claims", u64::from(r.store_full)),
            ("store_unreachable", "1 while a shared store cannot be reached", u64::from(r.store_unreachable)),
            ("store_created", "1 if this start created the store", u64::from(r.store_created)),
            ("store_queue", "Operations waiting for the committer", r.store_queue),
            ("store_disk_bytes", "Disk space of the store", r.store_disk_bytes),
            ("cache_entries", "Records in the hot cache", r.cache_entries),
            ("cache_bytes", "Bytes in the hot cache", r.cache_bytes),
            ("upstream_idle_connections", "Pooled connections waiting for a request", r.pool_idle),
        ] {
            let gauge = ConstGauge::new(as_i64(value));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        for (name, help, value) in [
            ("store_batches", "Groups of writes committed together", r.store_batches),
            ("store_batched_writes", "Writes committed", r.store_batched_writes),
            ("store_written_bytes", "Bytes written to the log", r.store_written_bytes),
            ("store_swept", "Expired records removed", r.store_swept),
        ] {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        let build = ConstGauge::new(1_i64);
        let mut info = encoder.encode_descriptor("build_info", "The running version", None, build.metric_type())?;
        build.encode(info.encode_family(&[("version", env!("CARGO_PKG_VERSION"))])?)
    }
}

fn by_outcome(family: &Family<RequestLabels, Counter>, route: &str) -> RouteMetrics {
    RouteMetrics(OUTCOMES.map(|result| {
        let labels = RequestLabels { route: route.to_owned(), result };
        family.get_or_create_owned(&labels)
    }))
}

fn as_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// Sends log lines to standard error; `RUST_LOG` selects them (default `info`). Does nothing if a subscriber is set.
pub fn init_logging(format: LogFormat) {
    use tracing::level_filters::LevelFilter;
    use tracing_subscriber::filter::Targets;
    use tracing_subscriber::prelude::*;
    use tracing_subscriber::{fmt, registry};
    // fjall tells each step of its opening.
    let quiet = ["fjall", "lsm_tree"].map(|target| (target, LevelFilter::WARN));
    let default = || Targets::new().with_default(LevelFilter::INFO).with_targets(quiet);
    let wanted = std::env::var("RUST_LOG").ok().and_then(|wanted| wanted.parse::<Targets>().ok());
    let log = registry().with(wanted.unwrap_or_else(default));
    let lines = fmt::layer().with_writer(std::io::stderr).with_target(false);
    let _ = match format {
        LogFormat::Text => log.with(lines.with_ansi(false)).try_init(),
        LogFormat::Json => log.with(lines.json().flatten_event(true)).try_init(),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_fall_into_the_bucket_that_ends_at_or_above_them() {
        let mut registry = Registry::default();
        let durations = Durations::default();
        registry.register("t", "t", durations.clone());
        for ns in [0, 49_999, 50_000, 50_001, 100_000, 100_001, 52_428_800_000, 52_428_800_001, u64::MAX / 2] {
            durations.observe(Duration::from_nanos(ns));
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "t_bucket{le=\"0.00005\"} 3\n",
            "t_bucket{le=\"0.0001\"} 5\n",
            "t_bucket{le=\"0.0002\"} 6\n",
            "t_bucket{le=\"26.2144\"} 6\n",
            "t_bucket{le=\"52.4288\"} 7\n",
            "t_bucket{le=\"+Inf\"} 9\n",
            "t_count 9\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
    }
}
