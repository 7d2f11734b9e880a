//! What is asked of the proxies.

use crate::contestants::Kind::{self, Direct, Haproxy, IdempotentProxy, Nginx, NginxCache};
use crate::ends::Source;
use crate::http::json;
use crate::servers;
use std::io::Write;

/// How the clients speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Front {
    Http1,
    /// HTTP/2 in clear text, with prior knowledge.
    Http2,
    /// HTTP/1.1 over TLS.
    Tls1,
    /// HTTP/2 over TLS.
    Tls2,
}

impl Front {
    pub fn is_tls(self) -> bool {
        matches!(self, Self::Tls1 | Self::Tls2)
    }

    pub fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Tls2)
    }
}

/// Which idempotency keys the requests bear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    None,
    /// Each its own.
    Fresh,
    /// In turn those of so many records that were made before.
    Recorded(u64),
    /// 90 % fresh, 8 % retries of earlier ones, 2 % the same key again while the first one is under way.
    Mixed,
}

/// When requests are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rate {
    /// As fast as the answers come.
    Full,
    /// So many a second, however fast the answers come.
    Fixed(f64),
    /// As `Fixed`, at this share of what the reference can do.
    Share(f64),
}

#[derive(Clone, Debug)]
pub struct Workload {
    pub name: &'static str,
    pub meaning: &'static str,
    pub front: Front,
    pub post: bool,
    pub target: &'static str,
    pub body_bytes: usize,
    pub keys: Keys,
    /// Without a hot cache, and started anew after the records were made.
    pub from_store: bool,
    pub rate: Rate,
    /// Records are kept in a server of each contestant's own, whose costs are its own, too.
    pub server: Option<servers::Kind>,
    /// Takes one in so many of the usual number of requests.
    pub share: usize,
    /// Who can do it, beside the gateway; the first is what the others are compared with. None: nothing is compared.
    pub peers: &'static [Kind],
}

const PASS: Workload = Workload {
    name: "get",
    meaning: "GET passes through, 128-byte answer",
    front: Front::Http1,
    post: false,
    target: "/items",
    body_bytes: 0,
    keys: Keys::None,
    from_store: false,
    rate: Rate::Full,
    server: None,
    share: 1,
    peers: &[Nginx, Haproxy, Direct],
};
const POST: Workload = Workload { post: true, body_bytes: 1024, ..PASS };
const FRESH: Workload = Workload {
    name: "fresh",
    meaning: "POST of 1 KiB with a new key, executed and recorded",
    target: "/posts",
    keys: Keys::Fresh,
    peers: &[NginxCache, Nginx],
    ..POST
};
const LARGE_SHARE: usize = 10;

pub const WORKLOADS: &[Workload] = &[
    PASS,
    Workload { name: "post", meaning: "POST of 1 KiB without a key passes through", ..POST },
    FRESH,
    Workload {
        name: "replay",
        meaning: "POST of 1 KiB whose key is recorded, hot cache",
        keys: Keys::Recorded(1000),
        peers: &[NginxCache, Direct],
        ..FRESH
    },
    Workload {
        name: "replay-store",
        meaning: "the same without a hot cache, from the store",
        keys: Keys::Recorded(30_000),
        from_store: true,
        peers: &[NginxCache],
        ..FRESH
    },
    Workload {
        name: "mixed",
        meaning: "90 % fresh, 8 % retries, 2 % duplicates of a POST in flight",
        keys: Keys::Mixed,
        share: 2,
        peers: &[NginxCache],
        ..FRESH
    },
    Workload {
        name: "large-get",
        meaning: "GET passes through, 64 KiB answer",
        target: "/items?large",
        share: LARGE_SHARE,
        peers: &[Nginx, Haproxy],
        ..PASS
    },
    Workload {
        name: "large-post",
        meaning: "POST of 64 KiB passes through",
        body_bytes: 64 << 10,
        share: LARGE_SHARE,
        peers: &[Nginx, Haproxy],
        ..POST
    },
    Workload {
        name: "large-fresh",
        meaning: "POST of 64 KiB with a new key, 64 KiB answer recorded",
        target: "/posts?large",
        body_bytes: 64 << 10,
        share: 2 * LARGE_SHARE,
        peers: &[NginxCache],
        ..FRESH
    },
    Workload { name: "h2-get", meaning: "GET over HTTP/2", front: Front::Http2, peers: &[Nginx, Haproxy], ..PASS },
    Workload {
        name: "h2-post",
        meaning: "POST of 1 KiB over HTTP/2",
        front: Front::Http2,
        peers: &[Nginx, Haproxy],
        ..POST
    },
    Workload { name: "tls-get", meaning: "GET over TLS", front: Front::Tls1, peers: &[Nginx, Haproxy], ..PASS },
    Workload {
        name: "tls-h2-get",
        meaning: "GET over HTTP/2 and TLS",
        front: Front::Tls2,
        peers: &[Nginx, Haproxy],
        ..PASS
    },
    Workload {
        name: "get-paced",
        meaning: "GET passes through, at a steady 30 % of what nginx can do",
        rate: Rate::Share(0.3),
        peers: &[Nginx, Haproxy, Direct],
        ..PASS
    },
    Workload {
        name: "fresh-paced",
        meaning: "POST with a new key, 1,000 a second",
        rate: Rate::Fixed(1000.0),
        share: 10,
        peers: &[NginxCache, Nginx],
        ..FRESH
    },
    FRESH_REDIS,
    Workload {
        name: "replay-redis",
        meaning: "POST of 1 KiB whose key is recorded there, no hot cache",
        keys: Keys::Recorded(10_000),
        from_store: true,
        ..FRESH_REDIS
    },
    FRESH_POSTGRES,
    Workload {
        name: "replay-postgres",
        meaning: "POST of 1 KiB whose key is recorded there, no hot cache",
        keys: Keys::Recorded(10_000),
        from_store: true,
        ..FRESH_POSTGRES
    },
];

const FRESH_REDIS: Workload = Workload {
    name: "fresh-redis",
    meaning: "POST of 1 KiB with a new key, recorded in a Redis that flushes every write; with the costs of Redis",
    // The form that the peer wants.
    target: "/URL_POSTS",
    server: Some(servers::Kind::Redis),
    share: 2,
    peers: &[IdempotentProxy],
    ..FRESH
};

const FRESH_POSTGRES: Workload = Workload {
    name: "fresh-postgres",
    meaning: "POST of 1 KiB with a new key, recorded in a PostgreSQL that flushes every commit; with its costs",
    server: Some(servers::Kind::Postgres),
    share: 4,
    peers: &[],
    ..FRESH
};

impl Workload {
    pub fn reference(&self) -> Option<Kind> {
        self.peers.first().copied()
    }

    /// Those who take part, the reference first.
    pub fn contestants(&self, gateways: &[Kind]) -> Vec<Kind> {
        let engine =
            |kind: &Kind| matches!(kind, Kind::Oncegate(gateway) if servers::Kind::of(gateway.engine) == self.server);
        self.peers.iter().chain(gateways.iter().filter(|kind| engine(kind))).copied().collect()
    }

    /// How many of `requests` requests must reach the upstream through a proxy that keeps records.
    pub fn executions(&self, requests: usize) -> usize {
        match self.keys {
            Keys::None | Keys::Fresh => requests,
            Keys::Recorded(_) => 0,
            Keys::Mixed => (0..requests as u64).filter(|&n| mixed(n) == Mixed::Fresh).count(),
        }
    }
}

#[derive(PartialEq, Eq)]
enum Mixed {
    Fresh,
    Retry,
    Duplicate,
}

/// The `n`th request of a mixed load. A duplicate comes right behind the first one with its key.
fn mixed(n: u64) -> Mixed {
    match n % 50 {
        12 | 24 | 36 | 48 => Mixed::Retry,
        40 => Mixed::Duplicate,
        _ => Mixed::Fresh,
    }
}

/// How far back a retry's key lies.
const RETRY_DISTANCE: u64 = 500;

/// Makes a workload's requests for one contestant.
pub struct Requests {
    keys: Keys,
    /// Up to the key's value, and behind it.
    head: (Vec<u8>, Vec<u8>),
    body: Vec<u8>,
    /// Requests of the load under way.
    asked: u64,
    /// Keys used up to now, over all loads.
    used: u64,
}

impl Requests {
    pub fn new(workload: &Workload) -> Self {
        let method = if workload.post { "POST" } else { "GET" };
        let mut head = format!(
            "{method} {} HTTP/1.1\r\nHost: api.example.com\r\nUser-Agent: load\r\nAccept: */*\r\n\
             Authorization: Bearer 3f6c1a9e0d\r\n",
            workload.target
        );
        if workload.post {
            head += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", workload.body_bytes);
        }
        let behind = if workload.keys == Keys::None {
            "\r\n"
        } else {
            head += "Idempotency-Key: ";
            "\r\n\r\n"
        };
        let body = if workload.body_bytes > 0 { json(workload.body_bytes) } else { Vec::new() };
        let head = (head.into_bytes(), behind.as_bytes().to_vec());
        Self { keys: workload.keys, head, body, asked: 0, used: 0 }
    }

    /// Begins another load, with keys that may differ from the workload's: to make the records that it wants.
    pub fn begin(&mut self, keys: Keys) -> &mut Self {
        (self.asked, self.keys) = (0, keys);
        self
    }

    fn number(&mut self) -> Option<u64> {
        let asked = self.asked;
        self.asked += 1;
        match self.keys {
            Keys::None => None,
            Keys::Recorded(records) => Some(scatter(asked, records)),
            Keys::Mixed if mixed(asked) == Mixed::Duplicate => Some(self.used - 1),
            // Before there are enough of them, the first key of all.
            Keys::Mixed if mixed(asked) == Mixed::Retry => Some(self.used.saturating_sub(RETRY_DISTANCE)),
            Keys::Mixed | Keys::Fresh => {
                self.used += 1;
                Some(self.used - 1)
            }
        }
    }
}

/// Walks through all of `records` in an order that is not theirs; 7919 is a prime that does not divide their number.
fn scatter(n: u64, records: u64) -> u64 {
    n.wrapping_mul(7919) % records
}

impl Source for Requests {
    fn next(&mut self, head: &mut Vec<u8>) {
        head.clear();
        head.extend_from_slice(&self.head.0);
        if let Some(number) = self.number() {
            let key = xxhash_rust::xxh3::xxh3_128(&number.to_le_bytes());
            // Into memory: it cannot fail.
            let _ = write!(head, "{key:032x}");
        }
        head.extend_from_slice(&self.head.1);
    }

    fn body(&self) -> &[u8] {
        &self.body
    }
}
