//! One simulation: the hosts, the adversary, and the end of it all.

use crate::audit::random::Random;
use crate::audit::{Did, History, Ill, KeyOf, Promise, Tally};
use crate::client::{Clients, Connect};
use crate::net::{End, Net};
use crate::plan::Plan;
use crate::store::World;
use crate::upstream::Upstream;
use crate::world::{self, Host, now};
use oncegate::config::{self, Flags};
use oncegate::idempotency::codec;
use oncegate::ledger::tags;
use oncegate::simulation::{Connector, Served, Stream, simulate_clock};
use oncegate::store::{RecordId, Version};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// How long a trouble goes on to leave outcomes unknown, or waiting to be recorded.
const AFTERMATH: Duration = Duration::from_secs(8);
/// How long an answer takes at most, while the store may lose answers but nothing worse happens.
const PATIENCE: Duration = Duration::from_secs(5);
/// All has to be settled so long after the storm.
const SETTLED: Duration = Duration::from_secs(10);

thread_local! {
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Panics on this thread are noted: a task that panics ends in silence otherwise.
fn note_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.with_borrow_mut(|panics| panics.push(info.to_string()));
            before(info);
        }));
    });
}

/// Where a gateway is reached, while it lives.
#[derive(Default)]
struct Door(Mutex<Option<UnboundedSender<End>>>);

struct Place {
    host: Host,
    door: Arc<Door>,
    served: Arc<Mutex<Option<Arc<Served>>>>,
    /// Dead until then.
    back_at: Option<Duration>,
}

struct Simulation<'a> {
    plan: &'a Plan,
    net: Net,
    store: World,
    upstream: Upstream,
    upstream_host: Host,
    upstream_door: UnboundedSender<End>,
    places: Vec<Place>,
    clients: Host,
    history: Arc<Mutex<History>>,
    random: Random,
    wrong: Arc<Mutex<Vec<String>>>,
}

/// Runs it: what became of the keys, or what is wrong; and all that was seen.
pub(crate) fn run(plan: &Plan) -> (Result<Tally, Vec<String>>, History) {
    note_panics();
    PANICS.with_borrow_mut(Vec::clear);
    world::set_now(Duration::ZERO);
    simulate_clock(world::since_boot);
    let mut simulation = Simulation::new(plan);
    simulation.storm();
    simulation.settle();
    simulation.ask_all();
    let mut wrong = simulation.leftovers();
    wrong.extend(std::mem::take(&mut *simulation.wrong.lock().unwrap()));
    wrong.extend(PANICS.take().into_iter().map(|panic| format!("a panic: {panic}")));
    let history = std::mem::take(&mut *simulation.history.lock().unwrap());
    let promise = Promise { retention: plan.retention, aftermath: AFTERMATH, patience: PATIENCE };
    let result = match history.check(&promise) {
        Ok(tally) if wrong.is_empty() => Ok(tally),
        Ok(_) => Err(wrong),
        Err(found) => Err(found.into_iter().chain(wrong).collect()),
    };
    (result, history)
}

impl<'a> Simulation<'a> {
    fn new(plan: &'a Plan) -> Self {
        let history = Arc::new(Mutex::new(History::default()));
        let upstream = Upstream::new(plan.random(1).next(), plan.upstream_trouble, Arc::clone(&history));
        let upstream_host = Host::new(plan.random(4).next());
        let (upstream_door, mut accepted) = unbounded_channel();
        let serving = upstream.clone();
        upstream_host.spawn(async move {
            while let Some(stream) = accepted.recv().await {
                tokio::spawn(serving.clone().serve(stream));
            }
        });
        let place = |_| Place { host: Host::default(), door: Arc::default(), served: Arc::default(), back_at: None };
        let mut simulation = Self {
            plan,
            net: Net::default(),
            store: World::new(plan.random(2), plan.faults, plan.gateways),
            upstream,
            upstream_host,
            upstream_door,
            places: (0..plan.gateways).map(place).collect(),
            clients: Host::new(plan.random(5).next()),
            history,
            random: plan.random(3),
            wrong: Arc::default(),
        };
        (0..plan.gateways).for_each(|gateway| simulation.start(gateway));
        simulation
    }

    fn start(&mut self, gateway: usize) {
        let settings = self.plan.settings(gateway);
        let config = config::parse("simulated", &settings, [], &Flags::default()).unwrap();
        let place = &mut self.places[gateway];
        place.host = Host::new(self.random.next());
        let (door, mut accepted) = unbounded_channel::<End>();
        *place.door.0.lock().unwrap() = Some(door);
        let (store, connector) = (self.store.open(gateway), self.connector(gateway));
        let place = &self.places[gateway];
        let (served, wrong) = (Arc::clone(&place.served), Arc::clone(&self.wrong));
        place.host.spawn(async move {
            match Served::start(config, store, connector).await {
                Ok(started) => {
                    let started = Arc::new(started);
                    *served.lock().unwrap() = Some(Arc::clone(&started));
                    while let Some(stream) = accepted.recv().await {
                        started.serve(Box::new(stream));
                    }
                }
                Err(error) => wrong.lock().unwrap().push(format!("a gateway did not start: {error}")),
            }
        });
    }

    fn connector(&mut self, gateway: usize) -> Connector {
        let random = Mutex::new(self.random.fork(gateway as u64));
        let (net, door, upstream) = (self.net.clone(), self.upstream_door.clone(), self.upstream.clone());
        let unreachable = self.plan.unreachable;
        Connector::new(move || {
            let mut random = random.lock().unwrap();
            let (pause, latency) = (random.ms(0, 5), random.ms(0, 8));
            let fails = random.percent(unreachable) && !upstream.is_calm();
            let (silent, slow) = (random.percent(30), random.ms(0, 1_500));
            let (net, door) = (net.clone(), door.clone());
            async move {
                tokio::time::sleep(pause).await;
                if fails && silent {
                    tokio::time::sleep(slow).await;
                } else if fails {
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                let (client, server) = net.connection(latency);
                door.send(server).map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
                Ok(Box::new(client) as Stream)
            }
        })
    }

    fn clients(&mut self) -> Clients {
        let doors = self.places.iter().map(|place| Arc::clone(&place.door)).collect::<Vec<_>>();
        let (net, random) = (self.net.clone(), Mutex::new(self.random.fork(99)));
        let connect: Connect = Arc::new(move |gateway: usize| {
            let latency = random.lock().unwrap().ms(0, 8);
            let door = doors[gateway].0.lock().unwrap();
            let (client, server) = net.connection(latency);
            door.as_ref()?.send(server).ok()?;
            Some(client)
        });
        let until = self.plan.storm + Duration::from_secs(4);
        Clients { connect, gateways: self.plan.gateways, history: Arc::clone(&self.history), until }
    }

    fn keys(&self) -> Vec<KeyOf> {
        // The first keys are two tenants', each.
        let key = |number: u64| if number < 6 { number / 2 } else { number };
        (0..self.plan.keys).map(|number| (format!("t{}", number % 2), format!("k{}", key(number)))).collect()
    }

    fn storm(&mut self) {
        if self.plan.faults.lossy > 0 && !self.plan.faults.single {
            self.trouble(self.plan.storm, Ill::Loss);
        }
        let clients = self.clients();
        for key in self.keys() {
            let (random, begins) = (self.random.fork(7), self.random.ms(0, self.plan.storm.as_millis() as u64 * 3 / 4));
            self.clients.spawn(clients.clone().settle(key, random, begins));
        }
        let mut next = self.stroke_in();
        let (mut looks, mut seen) = (self.plan.operator, BTreeMap::new());
        while self.plan.storms() {
            if looks.is_some_and(|at| at <= now()) {
                seen = self.operate(&seen);
                looks = self.plan.operator.map(|pause| now() + pause);
            }
            if next.is_some_and(|at| at <= now()) {
                self.stroke();
                next = self.stroke_in();
            }
            self.tick();
        }
    }

    /// An operator frees what was unknown at his last look already, if the upstream has never seen it. What is unknown now.
    fn operate(&mut self, seen: &BTreeMap<RecordId, Version>) -> BTreeMap<RecordId, Version> {
        let gateway = self.random.below(self.places.len() as u64) as usize;
        let served = self.places[gateway].served.lock().unwrap().clone();
        let unknown = self.store.unknown();
        for (id, entry) in &unknown {
            let Some(served) = served.clone().filter(|_| seen.get(id) == Some(&entry.version)) else { continue };
            let record = codec::decode(&entry.value.bytes).unwrap();
            let key = String::from_utf8_lossy(&record.origin.key).into_owned();
            let history = self.history.lock().unwrap();
            let visited = |tenant: &str| {
                let visits = history.visits.get(&(tenant.to_owned(), key.clone()));
                visits.is_some_and(|visits| visits.iter().any(|visit| visit.did != Did::Refused))
            };
            // Whose of the two tenants' it is he does not ask.
            if !visited("t0") && !visited("t1") {
                let (id, version) = (*id, entry.version);
                self.places[gateway].host.spawn(async move {
                    served.resolve_not_executed(id, version).await;
                });
            }
        }
        unknown.into_iter().map(|(id, entry)| (id, entry.version)).collect()
    }

    /// When the adversary strikes next.
    fn stroke_in(&mut self) -> Option<Duration> {
        let mean = self.plan.strokes?.as_millis() as u64;
        Some(now() + self.random.ms(1, 2 * mean))
    }

    fn stroke(&mut self) {
        let gateway = self.random.below(self.places.len() as u64) as usize;
        let single = self.plan.faults.single;
        match self.random.below(100) {
            0..35 => self.kill_for_a_while(gateway),
            35..50 => self.freeze_for_a_moment(gateway),
            50..60 => self.freeze_beyond_its_leases(gateway),
            60..75 if single => {
                let full = self.random.percent(50);
                self.trouble(Duration::from_millis(1), Ill::Store);
                self.store.set_full(full);
            }
            60..85 if single && self.places[gateway].host.lives() => {
                let downtime = self.random.ms(1, 400);
                self.trouble(downtime, Ill::Store);
                self.store.fail();
                // Whoever runs it starts it again.
                self.kill(gateway, downtime);
            }
            60..75 => {
                let time = self.random.ms(20, 1_500);
                self.trouble(time, Ill::Store);
                self.store.cut(gateway, now() + time);
            }
            75..85 => {
                let time = self.random.ms(20, 1_500);
                self.trouble(time, Ill::Store);
                self.store.outage(now() + time);
            }
            _ if self.plan.jumps && !single => {
                let ms = self.random.below(20_000) as i64 - 10_000;
                // A clock that was set back is believed after a while.
                self.trouble(Duration::from_secs(50), Ill::Clock);
                self.store.set_clock(ms);
            }
            _ => {}
        }
    }

    fn trouble(&mut self, time: Duration, ill: Ill) {
        self.history.lock().unwrap().trouble(now(), now() + time, ill);
    }

    fn kill(&mut self, gateway: usize, downtime: Duration) {
        if !self.places[gateway].host.lives() {
            return;
        }
        self.trouble(downtime, Ill::Gateway);
        let place = &mut self.places[gateway];
        *place.door.0.lock().unwrap() = None;
        *place.served.lock().unwrap() = None;
        if self.plan.faults.single {
            self.store.crash();
        }
        place.host.kill();
        place.back_at = Some(now() + downtime);
    }

    fn kill_for_a_while(&mut self, gateway: usize) {
        let downtime = self.random.ms(1, 600);
        self.kill(gateway, downtime);
    }

    fn freeze_for_a_moment(&mut self, gateway: usize) {
        let time = self.random.ms(20, 400);
        self.freeze(gateway, time);
    }

    fn freeze_beyond_its_leases(&mut self, gateway: usize) {
        let time = self.random.ms(self.plan.lease.as_millis() as u64, 4_000);
        self.freeze(gateway, time);
    }

    fn freeze(&mut self, gateway: usize, time: Duration) {
        self.trouble(time, Ill::Gateway);
        self.places[gateway].host.freeze(now() + time);
    }

    fn tick(&mut self) {
        let tick = self.plan.tick;
        world::set_now(now() + tick);
        for gateway in 0..self.places.len() {
            if self.places[gateway].back_at.is_some_and(|at| at <= now()) {
                self.places[gateway].back_at = None;
                self.start(gateway);
            }
        }
        self.net.step();
        self.store.step();
        for gateway in self.store.struck() {
            match self.random.below(3) {
                0 => self.kill_for_a_while(gateway),
                1 => self.freeze_for_a_moment(gateway),
                _ => self.freeze_beyond_its_leases(gateway),
            }
        }
        self.clients.tick(tick);
        self.upstream_host.tick(tick);
        self.places.iter_mut().for_each(|place| place.host.tick(tick));
    }

    fn let_pass(&mut self, time: Duration) {
        let until = now() + time;
        while now() < until {
            self.tick();
        }
    }

    /// Nothing goes wrong any more, and what is under way comes to its end.
    fn settle(&mut self) {
        if self.store.has_failed() {
            self.kill(0, Duration::ZERO);
        }
        self.store.calm();
        self.upstream.calm();
        self.let_pass(if self.plan.jumps { SETTLED * 3 } else { SETTLED });
    }

    fn ask_all(&mut self) {
        let clients = self.clients();
        let keys = self.keys();
        for gateway in 0..self.plan.gateways {
            for key in &keys {
                self.clients.spawn(clients.clone().ask(key.clone(), gateway));
            }
            let done = |history: &History| {
                keys.iter().all(|key| history.ends.get(key).is_some_and(|ends| ends.len() == gateway + 1))
            };
            let until = now() + Duration::from_secs(60);
            while !done(&self.history.lock().unwrap()) && now() < until {
                self.tick();
            }
        }
        // What answered is recorded, too.
        self.let_pass(Duration::from_secs(1));
    }

    /// What nobody works on any more, but is still there.
    fn leftovers(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let claimed = self.store.count(tags::CLAIMED);
        if claimed > 0 {
            wrong.push(format!("{claimed} claims are never settled"));
        }
        for (number, place) in self.places.iter().enumerate() {
            match &*place.served.lock().unwrap() {
                None => wrong.push(format!("gateway {number} does not serve")),
                Some(served) => {
                    let left = (served.open_claims(), served.buffered_bytes());
                    if left != (0, 0) {
                        wrong.push(format!("gateway {number} still holds (claims, bytes): {left:?}"));
                    }
                }
            }
        }
        let silent = self.keys().into_iter().filter(|key| {
            self.history.lock().unwrap().ends.get(key).is_none_or(|ends| ends.len() < self.plan.gateways)
        });
        wrong.extend(silent.map(|key| format!("{key:?}: no end of it")));
        wrong
    }
}
