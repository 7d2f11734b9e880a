//! The ways to the nodes of a cluster: which node has which bucket, and what to do when that changes.

use super::dial::{Common, Connected, DialError, Place};
use super::layout::hex_digits;
use super::link::{Bounced, Driver, Link, Op, Parts, Stats, jittered};
use super::resp::Reply;
use super::trust::Ground;
use super::url::Address;
use crate::store::StoreTime;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

const SLOTS: u16 = 16384;
/// Between two tries of an operation that no node takes.
const PAUSE: Duration = Duration::from_millis(50);
/// While a node is out of reach, the others are asked so often whether another has taken its place.
const LOOK: Duration = Duration::from_millis(500);
/// So often whether the nodes have got replicas: before one of these can take over, if that may be.
const STRICT_LOOK: Duration = Duration::from_secs(5);

/// The owner of each bucket.
type Table = Vec<Address>;

pub(super) struct Cluster {
    common: Arc<Common>,
    time: StoreTime,
    stats: Arc<Stats>,
    /// By bucket: who has it.
    table: RwLock<Vec<(Address, Link)>>,
    links: Mutex<HashMap<Address, (Link, AbortHandle)>>,
    bounce: mpsc::UnboundedSender<Bounced>,
}

impl Cluster {
    /// Connects to all masters. The clock is that of the first bucket's owner.
    pub(super) async fn open(
        common: Arc<Common>,
        stats: Arc<Stats>,
    ) -> Result<(Arc<Self>, mpsc::UnboundedReceiver<Bounced>, StoreTime), DialError> {
        let table = topology(&common, &common.dialer.target.addresses).await?;
        let mut connections: HashMap<Address, Connected> = HashMap::new();
        for address in &table {
            if !connections.contains_key(address) {
                connections.insert(address.clone(), common.dialer.connect(&Place::Node(address.clone())).await?);
            }
        }
        if connections.values().any(|connected| !connected.appends) {
            super::warn_of_memory(&common);
        }
        let first = table.first().and_then(|first| connections.get(first));
        let time = StoreTime::new(first.map_or(0, |connected| connected.now_ms));
        let (bounce, bounced) = mpsc::unbounded_channel();
        let cluster = Arc::new(Self {
            common,
            time: time.clone(),
            stats,
            table: RwLock::default(),
            links: Mutex::default(),
            bounce,
        });
        cluster.adopt(&table, connections);
        Ok((cluster, bounced, time))
    }

    pub(super) fn submit(&self, op: Op) {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        match table.get(usize::from(op.request.bucket())) {
            Some((_, link)) => link.submit(op),
            None => op.fail(&Arc::from("no node has that part of the store")),
        }
    }

    pub(super) fn is_down(&self) -> bool {
        self.table.read().unwrap_or_else(PoisonError::into_inner).iter().any(|(_, link)| link.is_down())
    }

    pub(super) fn queued(&self) -> usize {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.values().map(|(link, _)| link.queued()).sum()
    }

    /// The first bucket of the next node after that of `bucket`, for going through all nodes.
    pub(super) fn next_node(&self, bucket: u8) -> Option<u8> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let mut seen: Vec<&Address> = table.iter().take(usize::from(bucket) + 1).map(|(address, _)| address).collect();
        seen.dedup();
        let later = table.iter().enumerate().skip(usize::from(bucket) + 1);
        let next = later.into_iter().find(|(_, (address, _))| !seen.contains(&address));
        next.and_then(|(bucket, _)| u8::try_from(bucket).ok())
    }

    pub(super) fn close(&self) {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.drain().for_each(|(_, (_, task))| task.abort());
    }

    /// Takes a new order of things; nodes that have no part any more and are out of reach are forgotten.
    fn adopt(&self, table: &Table, mut connections: HashMap<Address, Connected>) {
        let new: Vec<_> =
            table.iter().map(|address| (address.clone(), self.link(address, connections.remove(address)))).collect();
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = new;
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        // The one clock for all is that of the first bucket's owner, whoever that is now.
        links.iter().for_each(|(address, (link, _))| link.lead(Some(address) == table.first()));
        links.retain(|address, (link, task)| {
            let stays = table.contains(address) || !link.is_down();
            if !stays {
                task.abort();
            }
            stays
        });
    }

    /// The way to a node, which may have to be made.
    fn link(&self, address: &Address, connected: Option<Connected>) -> Link {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((link, _)) = links.get(address) {
            return link.clone();
        }
        let (link, driver) = Driver::new(Parts {
            common: Arc::clone(&self.common),
            place: Place::Node(address.clone()),
            time: self.time.clone(),
            leads: false,
            stats: Arc::clone(&self.stats),
            bounce: Some(self.bounce.clone()),
        });
        let task = tokio::spawn(driver.run(connected)).abort_handle();
        links.insert(address.clone(), (link.clone(), task));
        link
    }

    /// Finds another way for what a link gives back; until the task is aborted.
    pub(super) async fn route(self: Arc<Self>, mut bounced: mpsc::UnboundedReceiver<Bounced>) {
        // What no node takes for now.
        let mut waiting: Vec<Bounced> = Vec::new();
        let mut looked = Instant::now();
        // Whether the order of things is to be asked for anew, as soon as that may be.
        let mut look = false;
        loop {
            let pause = if look || !waiting.is_empty() { PAUSE } else { LOOK };
            look |= tokio::select! {
                Some(op) = bounced.recv() => self.redirect(op, &mut waiting),
                () = sleep(jittered(pause)) => self.is_down(),
            };
            while let Ok(op) = bounced.try_recv() {
                look |= self.redirect(op, &mut waiting);
            }
            look |= self.common.dialer.strict && looked.elapsed() >= STRICT_LOOK;
            if look && looked.elapsed() >= PAUSE * 2 {
                self.look().await;
                (looked, look) = (Instant::now(), false);
            }
            let now = Instant::now();
            for (op, reason) in std::mem::take(&mut waiting) {
                if op.until <= now {
                    op.fail(&reason);
                } else if look || self.is_down_for(&op) {
                    waiting.push((op, reason));
                } else {
                    self.submit(op);
                }
            }
        }
    }

    /// Asks who has what now, and whether the cluster may still be trusted.
    async fn look(&self) {
        let mut known: Vec<Address> = self.common.dialer.target.addresses.clone();
        known.extend(self.links.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned());
        let trust = &self.common.dialer.trust;
        match topology(&self.common, &known).await {
            Ok(table) => {
                trust.lift(Ground::NotStrict);
                self.adopt(&table, HashMap::new());
            }
            Err(DialError::NotStrict(reason)) => trust.bar(Ground::NotStrict, Arc::from(reason)),
            // The next time, perhaps.
            Err(_) => {}
        }
    }

    fn is_down_for(&self, op: &Op) -> bool {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.get(usize::from(op.request.bucket())).is_none_or(|(_, link)| link.is_down())
    }

    fn knows(&self, node: &Address) -> bool {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).contains_key(node)
    }

    /// Whether the order of things has to be asked for anew.
    fn redirect(&self, (mut op, reason): Bounced, waiting: &mut Vec<Bounced>) -> bool {
        op.asking = false;
        let mut words = reason.split(' ');
        let (kind, _, to) = (words.next().unwrap_or_default(), words.next(), words.next().and_then(super::url::node));
        match (kind, to) {
            // A node that nobody has looked at: a replica that has taken over, perhaps.
            ("MOVED", Some(to)) if self.common.dialer.strict && !self.knows(&to) => {
                waiting.push((op, reason));
                true
            }
            ("MOVED", Some(to)) => {
                self.link(&to, None).submit(op);
                true
            }
            ("ASK", Some(to)) => {
                op.asking = true;
                self.link(&to, None).submit(op);
                false
            }
            ("TRYAGAIN" | "CLUSTERDOWN", _) => {
                waiting.push((op, reason));
                false
            }
            // Out of reach. What was never sent fails now; the rest is worth another try.
            _ if op.maybe => {
                waiting.push((op, reason));
                true
            }
            _ => {
                op.fail(&reason);
                true
            }
        }
    }
}

/// Asks the nodes, one after the other, who has what.
async fn topology(common: &Common, addresses: &[Address]) -> Result<Table, DialError> {
    let mut failed = DialError::Unreachable("no address".to_owned());
    let each = common.timeout / 4;
    for address in addresses {
        match tokio::time::timeout(each, ask(common, address)).await {
            Ok(Ok(table)) => return Ok(table),
            Ok(Err(error @ DialError::NotStrict(_))) => return Err(error),
            Ok(Err(error)) => failed = error,
            Err(_) => failed = DialError::Unreachable(format!("no answer from {address}")),
        }
    }
    Err(failed)
}

async fn ask(common: &Common, node: &Address) -> Result<Table, DialError> {
    let mut connection = common.dialer.open(node).await?;
    common.dialer.authenticate(&mut connection).await?;
    let reply = connection.ask(&[&[b"CLUSTER", b"SLOTS"]]).await?.pop();
    let ranges = match reply {
        Some(Reply::Error(error)) => return Err(DialError::Refused(format!("CLUSTER SLOTS: {error}"))),
        reply => reply.and_then(Reply::array).unwrap_or_default(),
    };
    let mut owners = Vec::new();
    for range in ranges {
        let mut parts = range.array().unwrap_or_default().into_iter();
        let (Some(Reply::Int(from)), Some(Reply::Int(to)), Some(owner)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(DialError::Unreachable("CLUSTER SLOTS answered something else".to_owned()));
        };
        if common.dialer.strict && parts.next().is_some() {
            let reason =
                "its nodes have replicas, and a failover to one of them loses what it had not got yet".to_owned();
            return Err(DialError::NotStrict(reason));
        }
        let owner = match (super::dial::address(owner), node) {
            // As it was reached.
            (Some(Address::Tcp(host, port)), Address::Tcp(reached, _)) if host.is_empty() => {
                Address::Tcp(reached.clone(), port)
            }
            (Some(owner), _) => owner,
            (None, _) => return Err(DialError::Unreachable("CLUSTER SLOTS names a node without address".to_owned())),
        };
        owners.push((from..=to, owner));
    }
    let owner = |bucket: u8| {
        let slot = i64::from(crc16(&hex_digits(bucket)) % SLOTS);
        owners.iter().find(|(slots, _)| slots.contains(&slot)).map(|(_, owner)| owner.clone())
    };
    let table: Option<Table> = (0..=u8::MAX).map(owner).collect();
    table.ok_or_else(|| DialError::Unreachable("not all slots of the cluster have a node".to_owned()))
}

/// CRC16-CCITT (XMODEM), as the cluster specification says.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc: u16, byte| {
        (0..8).fold(crc ^ (u16::from(*byte) << 8), |crc, _| (crc << 1) ^ if crc & 0x8000 != 0 { 0x1021 } else { 0 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::RecordId;
    use crate::store::redis::dial::Dialer;
    use crate::store::redis::layout::{Layout, Request};
    use crate::store::redis::resp::Input;
    use crate::store::shared::{Options, TlsFiles};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::oneshot;

    /// What `CLUSTER SLOTS` answers: from which slot to which, and the port of the owner.
    type Slots = Arc<Mutex<Vec<(u16, u16, u16)>>>;

    /// A node with a clock of its own, that knows nothing but who has what.
    async fn node(clock_s: u64, slots: Slots) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(answer(client, clock_s, Arc::clone(&slots)));
            }
        });
        port
    }

    async fn answer(mut client: TcpStream, clock_s: u64, slots: Slots) -> Option<()> {
        let mut input = Input::default();
        loop {
            client.read_buf(&mut input.bytes).await.ok().filter(|n| *n > 0)?;
            while let Ok(Some(command)) = input.next() {
                let name = command.array()?.into_iter().next()?.bulk()?;
                let text = match &name[..] {
                    b"INFO" => {
                        let info = "redis_version:7.0.0\r\nrole:master\r\nmaxmemory_policy:noeviction\r\n";
                        format!("${}\r\n{info}\r\n", info.len())
                    }
                    b"TIME" => format!("*2\r\n${}\r\n{clock_s}\r\n$1\r\n0\r\n", clock_s.to_string().len()),
                    b"CLUSTER" => {
                        let slots = slots.lock().unwrap();
                        let each = slots.iter().map(|(from, to, port)| {
                            format!("*3\r\n:{from}\r\n:{to}\r\n*2\r\n$9\r\n127.0.0.1\r\n:{port}\r\n")
                        });
                        format!("*{}\r\n{}", slots.len(), each.collect::<String>())
                    }
                    _ => "$-1\r\n".to_owned(),
                };
                client.write_all(text.as_bytes()).await.ok()?;
            }
        }
    }

    fn common(port: u16) -> Arc<Common> {
        let options = Options {
            url: format!("redis+cluster://127.0.0.1:{port}"),
            password: None,
            prefix: "og".to_owned(),
            timeout: Duration::from_secs(5),
            start_timeout: Duration::ZERO,
            strict: false,
            create: true,
            wait_replicas: 0,
            migrate: true,
            tls: TlsFiles::default(),
        };
        let layout = Layout::new("og", false);
        let dialer = Dialer::new(&options, layout.birthmark()).unwrap();
        Arc::new(Common { dialer, layout, timeout: options.timeout })
    }

    #[tokio::test]
    async fn the_clock_is_that_of_the_first_buckets_owner_whoever_it_is() {
        const HOUR_S: u64 = 3600;
        let slots = Slots::default();
        let one = node(1_000_000, Arc::clone(&slots)).await;
        let other = node(1_000_000 + HOUR_S, Arc::clone(&slots)).await;
        let first = crc16(b"00") % SLOTS;
        *slots.lock().unwrap() = vec![(0, first - 1, other), (first, first, one), (first + 1, SLOTS - 1, other)];
        let (cluster, _bounced, time) = Cluster::open(common(one), Arc::default()).await.unwrap();
        let ask = async |bucket: u8| {
            let (answer, answered) = oneshot::channel();
            let (request, until) = (Request::Get(RecordId([bucket; 16])), Instant::now() + Duration::from_secs(5));
            cluster.submit(Op { request, until, maybe: false, by_text: false, asking: false, answer });
            answered.await.unwrap().unwrap();
        };
        // Both are asked for their time with what they are asked: twice, for it is not asked for each time.
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(500) {
            ask(0).await;
            ask(1).await;
            assert!(time.now_ms() < (1_000_000 + HOUR_S / 2) * 1000, "the other's clock does not count");
        }
        *slots.lock().unwrap() = vec![(0, SLOTS - 1, other)];
        cluster.look().await;
        while time.now_ms() < (1_000_000 + HOUR_S) * 1000 {
            assert!(began.elapsed() < Duration::from_secs(20), "its new owner tells the time");
            ask(1).await;
        }
        cluster.close();
    }

    #[test]
    fn the_checksum_is_that_of_the_specification() {
        assert_eq!(crc16(b"123456789"), 0x31c3);
    }
}
