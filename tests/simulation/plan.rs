//! What is to happen, from a seed.

use crate::audit::random::Random;
use crate::store::Faults;
use crate::world;
use std::time::Duration;

#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) tick: Duration,
    /// One, if each has a store of its own.
    pub(crate) gateways: usize,
    pub(crate) keys: u64,
    /// For how long clients begin, and the adversary is at work.
    pub(crate) storm: Duration,
    pub(crate) retention: Duration,
    pub(crate) lease: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) wait_timeout: Duration,
    pub(crate) faults: Faults,
    /// Of requests, in percent, that the upstream makes trouble with; and of connections to it that fail.
    pub(crate) upstream_trouble: u64,
    pub(crate) unreachable: u64,
    /// The mean time between two strokes of the adversary; `None`: it is absent.
    pub(crate) strokes: Option<Duration>,
    /// How often an operator looks for what is unknown, and frees what the upstream has not seen.
    pub(crate) operator: Option<Duration>,
    /// Whether the store's clock is set, now and then.
    pub(crate) jumps: bool,
}

impl Plan {
    pub(crate) fn from_seed(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x5851_f42d_4c95_7f2d));
        let single = random.percent(35);
        let quiet = random.percent(25);
        let short = random.percent(25);
        let lossy = [0, 2, 10, 25][random.below(4) as usize];
        let strikes = if quiet { 0 } else { [0, 0, 3, 10][random.below(4) as usize] };
        Self {
            seed,
            tick: random.ms(1, 5),
            gateways: if single { 1 } else { 2 + random.below(2) as usize },
            keys: 8 + random.below(25),
            storm: random.ms(3_000, 9_000),
            retention: if short { random.ms(3_000, 6_000) } else { Duration::from_secs(86_400) },
            lease: random.ms(800, 2_500),
            connect_timeout: random.ms(100, 1_500),
            wait_timeout: random.ms(50, 1_500),
            faults: Faults { lossy, strikes, expires: random.percent(50), single },
            upstream_trouble: [0, 20, 50, 90][random.below(4) as usize],
            unreachable: [0, 5, 30][random.below(3) as usize],
            strokes: (!quiet).then(|| random.ms(100, 1_500)),
            operator: random.percent(50).then(|| random.ms(200, 800)),
            jumps: !short && random.percent(20),
        }
    }

    pub(crate) fn random(&self, purpose: u64) -> Random {
        Random(self.seed).fork(purpose)
    }

    /// The configuration of a gateway.
    pub(crate) fn settings(&self, gateway: usize) -> String {
        let engine = if self.faults.single {
            "store.engine = \"memory\"\n".to_owned()
        } else {
            format!(
                "store.engine = \"redis\"\nstore.url = \"redis://127.0.0.1:1/0\"\nstore.durability = \"relaxed\"\n\
                 store.lease = \"{}ms\"\n",
                self.lease.as_millis()
            )
        };
        // One of them always asks the store.
        let cache = if gateway == 0 && self.seed.is_multiple_of(2) { "cache.max_bytes = 0\n" } else { "" };
        format!(
            "{engine}{cache}upstream.response_timeout = \"{}ms\"\nupstream.late_window = \"{}ms\"\n\
             upstream.connect_timeout = \"{}ms\"\nidempotency.wait_timeout = \"{}ms\"\nidempotency.retention = \"{}ms\"\n\
             idempotency.unknown_retention = \"7d\"\n",
            crate::upstream::RESPONSE_TIMEOUT.as_millis(),
            crate::upstream::LATE_WINDOW.as_millis(),
            self.connect_timeout.as_millis(),
            self.wait_timeout.as_millis(),
            self.retention.as_millis(),
        )
    }

    pub(crate) fn storms(&self) -> bool {
        world::now() < self.storm
    }
}
