//! The upstream: a thread per connection, which does what each request's script says. It can be shut for a while.

use crate::script::{Reply, Script};
use crate::wire::{Kind, Message, Reader};
use crate::world::World;
use socket2::SockRef;
use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Duration;

pub(crate) struct Upstream {
    pub(crate) addr: SocketAddr,
    closed: AtomicBool,
    connections: Mutex<Vec<Weak<TcpStream>>>,
}

impl Upstream {
    /// Its port is below those that the system gives to clients, who could otherwise take it while it is shut.
    pub(crate) fn start(world: &Arc<World>) -> Arc<Self> {
        let first = 20_000 + u16::try_from(std::process::id() % 10_000).unwrap();
        let listener = (first..first + 500).find_map(|port| TcpListener::bind(("127.0.0.1", port)).ok());
        let listener = listener.expect("a free port");
        let addr = listener.local_addr().unwrap();
        let upstream = Arc::new(Self { addr, closed: AtomicBool::new(false), connections: Mutex::default() });
        let (shared, world) = (Arc::clone(&upstream), Arc::clone(world));
        thread::spawn(move || {
            let mut listener = Some(listener);
            loop {
                let listening = listener.take().unwrap_or_else(|| shared.listen_again());
                shared.accept(&listening, &world);
                drop(listening);
                for stream in shared.connections.lock().unwrap().drain(..).filter_map(|stream| stream.upgrade()) {
                    let _ = stream.shutdown(Shutdown::Both);
                }
                while shared.closed.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(5));
                }
            }
        });
        upstream
    }

    fn listen_again(&self) -> TcpListener {
        for _ in 0..1000 {
            if let Ok(listener) = TcpListener::bind(self.addr) {
                return listener;
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("{} is taken", self.addr)
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener, world: &Arc<World>) {
        for stream in listener.incoming() {
            if self.closed.load(Ordering::SeqCst) {
                return;
            }
            let Ok(stream) = stream.map(Arc::new) else { continue };
            let mut connections = self.connections.lock().unwrap();
            connections.retain(|stream| stream.strong_count() > 0);
            connections.push(Arc::downgrade(&stream));
            drop(connections);
            let world = Arc::clone(world);
            thread::spawn(move || serve(&stream, &world));
        }
    }

    /// Nobody listens, and whoever was connected is not any more.
    pub(crate) fn shut(&self, time: Duration, world: &World) {
        world.outage_begins();
        self.closed.store(true, Ordering::SeqCst);
        // Wakes it.
        let _ = TcpStream::connect(self.addr);
        thread::sleep(time);
        self.closed.store(false, Ordering::SeqCst);
        while TcpStream::connect(self.addr).is_err() {
            thread::sleep(Duration::from_millis(5));
        }
        world.outage_ends();
    }
}

fn serve(stream: &Arc<TcpStream>, world: &World) {
    let _ = stream.set_nodelay(true);
    let Ok(mut own) = stream.try_clone() else { return };
    let mut reader = Reader::new(Kind::Request);
    while let Ok(request) = reader.read(&mut own) {
        if !answer(&mut own, &request, world) {
            return;
        }
    }
}

/// Whether the connection goes on.
fn answer(stream: &mut TcpStream, request: &Message, world: &World) -> bool {
    let number = request.field("x-number").and_then(|number| number.parse().ok());
    let script = request.field("x-script").and_then(Script::parse);
    let (Some(number), Some(script)) = (number, script) else {
        world.violated(&format!("{} came to the upstream with {:?}", request.first, request.fields));
        return false;
    };
    let serial = match request.first.as_str() {
        "GET" => number,
        _ => world.arrived(number, script, request),
    };
    thread::sleep(script.delay());
    let reply = Reply::of(script, serial);
    if request.first != "GET" {
        world.responds(number, serial);
    }
    let mut bytes = reply.head(script, serial).into_bytes();
    bytes.extend(&reply.body);
    match script {
        Script::Reset => {
            let _ = SockRef::from(&*stream).set_linger(Some(Duration::ZERO));
            return false;
        }
        Script::Cut => bytes.truncate(bytes.len() - 50),
        _ => {}
    }
    // It may have been shut meanwhile, or the gateway has stopped listening.
    stream.write_all(&bytes).is_ok() && script != Script::Cut
}
