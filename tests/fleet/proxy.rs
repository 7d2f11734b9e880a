//! A TCP proxy with the faults of a network: it delays, holds, loses and cuts, but never alters, reorders or repeats.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

/// Once an answer is lost, how much longer the rest of it is waited for before the connection is cut.
const REST: Duration = Duration::from_millis(5);

pub(crate) struct Proxy {
    pub(crate) addr: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    to: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// How long a piece of a request takes.
    delay: Duration,
    /// Nothing goes through, either way.
    stalled: bool,
    /// Connections end at once.
    refusing: bool,
    refused: usize,
    /// What requests contain whose answers are to be lost, once each.
    losses: Vec<Vec<u8>>,
    /// What a request contains that is to be held, with all that comes behind it.
    hold: Option<Vec<u8>>,
    held: usize,
    lost: usize,
    made: u64,
    links: BTreeMap<u64, [TcpStream; 2]>,
}

impl Proxy {
    pub(crate) fn before(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let shared = Arc::new(Shared { to, state: Mutex::default(), changed: Condvar::new() });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                accepting.link(client);
            }
        });
        Self { addr, shared }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.state.lock().unwrap());
        self.shared.changed.notify_all();
    }

    /// Ends all connections; how many there were.
    pub(crate) fn cut(&self) -> usize {
        let links = std::mem::take(&mut self.shared.state.lock().unwrap().links);
        links.values().flatten().for_each(end);
        links.len()
    }

    /// The next request that contains `marker` gets through, but its answer does not, and the connection ends.
    pub(crate) fn lose_answer_to(&self, marker: &str) {
        self.set(|state| state.losses.push(marker.as_bytes().to_vec()));
    }

    /// Those that are yet to be lost are not.
    pub(crate) fn forgive(&self) {
        self.set(|state| state.losses.clear());
    }

    /// How many are yet to be lost.
    pub(crate) fn losses(&self) -> usize {
        self.shared.state.lock().unwrap().losses.len()
    }

    /// How many answers were lost.
    pub(crate) fn lost(&self) -> usize {
        self.shared.state.lock().unwrap().lost
    }

    /// Holds the next request that contains `marker`, and what comes behind it on its connection, until [`Proxy::release`].
    /// It gets through then even if its sender has hung up.
    pub(crate) fn hold(&self, marker: &str) {
        self.set(|state| state.hold = Some(marker.as_bytes().to_vec()));
    }

    /// How many requests are held.
    pub(crate) fn held(&self) -> usize {
        self.shared.state.lock().unwrap().held
    }

    pub(crate) fn release(&self) {
        self.set(|state| (state.hold, state.held) = (None, 0));
    }

    pub(crate) fn stall(&self, stalled: bool) {
        self.set(|state| state.stalled = stalled);
    }

    pub(crate) fn delay(&self, delay: Duration) {
        self.set(|state| state.delay = delay);
    }

    /// Ends all connections and takes no more.
    pub(crate) fn refuse(&self, refusing: bool) {
        self.set(|state| state.refusing = refusing);
        if refusing {
            self.cut();
        }
    }

    /// How many connections it has not taken.
    pub(crate) fn refused(&self) -> usize {
        self.shared.state.lock().unwrap().refused
    }

    /// No faults from now on.
    pub(crate) fn mend(&self) {
        self.set(|state| {
            (state.delay, state.stalled, state.refusing) = (Duration::ZERO, false, false);
            state.losses.clear();
            (state.hold, state.held) = (None, 0);
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.mend();
        self.cut();
    }
}

fn end(stream: &TcpStream) {
    let _ = stream.shutdown(Shutdown::Both);
}

fn contains(bytes: &[u8], marker: &[u8]) -> bool {
    marker.is_empty() || bytes.windows(marker.len()).any(|window| window == marker)
}

impl Shared {
    fn link(self: &Arc<Self>, client: TcpStream) {
        {
            let mut state = self.state.lock().unwrap();
            if state.refusing {
                state.refused += 1;
                return;
            }
        }
        let Ok(server) = TcpStream::connect(self.to) else { return };
        for stream in [&client, &server] {
            stream.set_nodelay(true).unwrap();
        }
        let number = {
            let mut state = self.state.lock().unwrap();
            state.made += 1;
            let number = state.made;
            state.links.insert(number, [client.try_clone().unwrap(), server.try_clone().unwrap()]);
            number
        };
        // Whether the answer that comes next is to be lost. Locked while a request is handed over.
        let losing = Arc::new(Mutex::new(false));
        let (up, down) = (Arc::clone(self), Arc::clone(self));
        let ends = (client.try_clone().unwrap(), server.try_clone().unwrap(), Arc::clone(&losing));
        thread::spawn(move || up.requests(ends.0, ends.1, &ends.2));
        thread::spawn(move || {
            down.answers(server, client, &losing);
            down.state.lock().unwrap().links.remove(&number);
        });
    }

    fn requests(&self, mut client: TcpStream, mut server: TcpStream, losing: &Mutex<bool>) {
        let mut piece = vec![0; 65536];
        while let Some(len) = client.read(&mut piece).ok().filter(|len| *len > 0) {
            let piece = &piece[..len];
            let delay = {
                let mut state = self.state.lock().unwrap();
                if state.hold.as_ref().is_some_and(|marker| contains(piece, marker)) {
                    state.hold = None;
                    state.held += 1;
                    let released = self.changed.wait_while(state, |state| state.held > 0);
                    state = released.unwrap();
                }
                self.changed.wait_while(state, |state| state.stalled).unwrap().delay
            };
            thread::sleep(delay);
            let mut losing = losing.lock().unwrap();
            {
                let mut state = self.state.lock().unwrap();
                if let Some(at) = state.losses.iter().position(|marker| contains(piece, marker)) {
                    state.losses.remove(at);
                    *losing = true;
                }
            }
            if server.write_all(piece).is_err() {
                break;
            }
        }
        let _ = server.shutdown(Shutdown::Write);
    }

    fn answers(&self, mut server: TcpStream, mut client: TcpStream, losing: &Mutex<bool>) {
        let mut piece = vec![0; 65536];
        while let Some(len) = server.read(&mut piece).ok().filter(|len| *len > 0) {
            drop(self.changed.wait_while(self.state.lock().unwrap(), |state| state.stalled).unwrap());
            if *losing.lock().unwrap() {
                self.state.lock().unwrap().lost += 1;
                // The server is let finish what it has begun.
                server.set_read_timeout(Some(REST)).unwrap();
                while server.read(&mut piece).is_ok_and(|len| len > 0) {}
                break;
            }
            if client.write_all(&piece[..len]).is_err() {
                break;
            }
        }
        end(&client);
        end(&server);
    }
}
