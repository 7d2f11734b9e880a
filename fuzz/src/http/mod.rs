//! Clients and an upstream that keep to HTTP/1.1 now and then, and the whole server between them: what each side may see of
//! the other.

mod answers;
mod judge;
mod reference;
mod requests;

use crate::choices::Choices;
use crate::wire::{self, Message, Parsed};
use crate::world::{self, MadeUpStore, now_ms};
use answers::Script;
use oncegate::simulation::{Connector, Served, Stream};
use requests::{Client, End};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};

const SETTINGS: &str = "store.engine = \"memory\"\nserver.limits.header_timeout = \"2s\"\nserver.limits.idle_timeout = \"5s\"\n\
    server.limits.write_timeout = \"3s\"\nserver.limits.max_header_bytes = 8192\nserver.limits.max_body = 1024\n\
    server.limits.body_timeout = \"3s\"\nupstream.response_timeout = \"1s\"\nupstream.late_window = \"2s\"\n\
    idempotency.max_recorded_body = 1024\nidempotency.wait_timeout = \"1s\"\n";
const PIPE: usize = 1 << 16;
/// No client's connection lasts longer, whatever anybody does.
const PATIENCE: Duration = Duration::from_secs(200);

/// A request that the upstream has seen, or the beginning of one.
#[derive(Clone, Debug)]
struct Visit {
    message: Message,
    whole: bool,
    /// Whether what it was answered with may have freed its key.
    freed: bool,
}

/// All that was seen.
#[derive(Debug, Default)]
struct Seen {
    visits: Vec<Visit>,
    /// What came through a tunnel.
    tunnels: Vec<Vec<u8>>,
    /// By client.
    answers: Vec<Vec<u8>>,
    wrong: Vec<String>,
}

#[derive(Clone)]
struct Upstream {
    seen: Arc<Mutex<Seen>>,
    scripts: Arc<Mutex<VecDeque<Script>>>,
}

/// Runs what the bytes stand for.
///
/// # Panics
/// If anything is seen that must not be.
pub(crate) fn check(bytes: &[u8]) {
    let mut choices = Choices::new(bytes);
    let flags = choices.byte();
    let missing_key = ["", "idempotency.missing_key = \"derive\"\n", "idempotency.missing_key = \"reject\"\n"];
    let settings = format!("{SETTINGS}{}", missing_key[usize::from(flags >> 2) % 3]);
    let scripts = (0..usize::from(flags & 3) * 2).map(|_| answers::script(&mut choices)).collect::<VecDeque<_>>();
    let clients =
        (0..1 + usize::from(flags >> 7)).map(|number| requests::client(&mut choices, number)).collect::<Vec<_>>();
    // What follows is HTTP/2.
    if clients.iter().any(|client| client.bytes.starts_with(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")) {
        return;
    }
    let seen = Arc::new(Mutex::new(Seen { answers: vec![Vec::new(); clients.len()], ..Seen::default() }));
    let upstream = Upstream { seen: Arc::clone(&seen), scripts: Arc::new(Mutex::new(scripts.clone())) };
    world::begin();
    let clients = Arc::new(clients);
    world::live(run(settings, upstream, Arc::clone(&clients)));
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    let wrong = judge::judge(&clients, &seen);
    if !wrong.is_empty() {
        panic!("{}\n{}", wrong.join("\n"), story(&clients, &scripts, &seen));
    }
}

fn story(clients: &[Client], scripts: &VecDeque<Script>, seen: &Seen) -> String {
    let mut text = String::new();
    for (number, client) in clients.iter().enumerate() {
        text += &format!(
            "client {number}: {:?}\n  {:?}, pauses {:?}\n",
            wire::text(&client.bytes),
            client.end,
            client.pauses
        );
        text += &format!("  got: {:?}\n", wire::text(&seen.answers[number]));
    }
    for (number, visit) in seen.visits.iter().enumerate() {
        text += &format!("visit {number}: whole: {}, {:?}\n", visit.whole, visit.message);
    }
    for (number, script) in scripts.iter().enumerate() {
        let Script { early, delay, pieces, close, .. } = script;
        let said = wire::text(&script.text(number));
        text += &format!("answer {number}: early: {early}, delay: {delay}, {pieces:?}, close: {close}: {said:?}\n");
    }
    text
}

async fn run(settings: String, upstream: Upstream, clients: Arc<Vec<Client>>) {
    let (seen, store) = (Arc::clone(&upstream.seen), MadeUpStore::new());
    let connector = Connector::new(move || {
        let (client, server) = duplex(PIPE);
        tokio::spawn(upstream.clone().serve(server));
        async move { Ok(Box::new(client) as Stream) }
    });
    let served = Served::start(world::config(&settings), store.open(), connector).await.unwrap();
    let mut tasks = Vec::new();
    for number in 0..clients.len() {
        let (client, server) = duplex(PIPE);
        served.serve(Box::new(server));
        tasks.push(tokio::spawn(talk(Arc::clone(&clients), number, client, Arc::clone(&seen))));
    }
    for task in tasks {
        let _ = task.await;
    }
    // Late answers and their window.
    sleep(Duration::from_secs(20)).await;
    let left = (served.open_claims(), served.buffered_bytes(), store.claims());
    if left != (0, 0, 0) {
        let left = format!("left in the end (forwards, bytes, claims in the store): {left:?}");
        seen.lock().unwrap().wrong.push(left);
    }
}

/// Writes what a client has to say, and reads all that it is told.
async fn talk(clients: Arc<Vec<Client>>, number: usize, stream: DuplexStream, seen: Arc<Mutex<Seen>>) {
    let client = &clients[number];
    let (mut read, mut write) = tokio::io::split(stream);
    let listen = async {
        let mut said = Vec::new();
        let ended = timeout(PATIENCE, read.read_to_end(&mut said)).await.is_ok();
        (said, ended)
    };
    let speak = async {
        let mut from = 0;
        for (at, pause) in client.pauses.iter().chain([&(client.bytes.len(), 0)]) {
            if write.write_all(&client.bytes[from..*at]).await.is_err() {
                return;
            }
            from = *at;
            match *pause {
                0 => yield_now().await,
                pause => sleep(Duration::from_millis(pause)).await,
            }
        }
        match client.end {
            End::Wait => {}
            End::HalfClose => drop(write.shutdown().await),
            End::Leave => sleep(Duration::from_millis(1)).await,
        }
    };
    let (said, ended) = if client.end == End::Leave {
        speak.await;
        (Vec::new(), true)
    } else {
        tokio::join!(listen, speak).0
    };
    let mut seen = seen.lock().unwrap();
    seen.answers[number] = said;
    if !ended {
        seen.wrong.push(format!("client {number}: its connection hangs, at {} ms", now_ms()));
    }
}

impl Upstream {
    /// Reads requests by the letter, and answers them.
    async fn serve(self, mut stream: DuplexStream) {
        let mut read = Vec::new();
        // The request that is being read, once its head is there, and whether it has been answered.
        let mut visit: Option<(usize, bool)> = None;
        loop {
            let parsed = match wire::request(&read) {
                Ok(parsed) => parsed,
                Err(wrong) => {
                    let wrong = format!("the upstream gets what is no request: {wrong}: {:?}", wire::text(&read));
                    return self.seen.lock().unwrap().wrong.push(wrong);
                }
            };
            let (message, len) = match parsed {
                Parsed::Whole(message, len) => (Some(message), Some(len)),
                Parsed::Partial(message) => (message, None),
            };
            if let Some(message) = message {
                let (number, answered) = *visit.get_or_insert_with(|| (self.visit(), false));
                {
                    let mut seen = self.seen.lock().unwrap();
                    (seen.visits[number].message, seen.visits[number].whole) = (message, len.is_some());
                }
                let early = !answered && self.scripts.lock().unwrap().front().is_some_and(|script| script.early);
                read.drain(..len.unwrap_or(0));
                if !answered && (early || len.is_some()) {
                    if !self.answer(number, &mut stream, &mut read).await {
                        return;
                    }
                    visit = Some((number, true));
                }
                if len.is_some() {
                    visit = None;
                    continue;
                }
            }
            if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
                return;
            }
        }
    }

    /// A new one begins.
    fn visit(&self) -> usize {
        let mut seen = self.seen.lock().unwrap();
        seen.visits.push(Visit { message: Message::default(), whole: false, freed: false });
        seen.visits.len() - 1
    }

    /// `false`: the connection ends.
    async fn answer(&self, number: usize, stream: &mut DuplexStream, read: &mut Vec<u8>) -> bool {
        let script = self.scripts.lock().unwrap().pop_front().unwrap_or_else(answers::plain);
        let offered = {
            let mut seen = self.seen.lock().unwrap();
            seen.visits[number].freed = script.may_free();
            seen.visits[number].message.field("upgrade").is_some()
        };
        sleep(Duration::from_millis(script.delay)).await;
        let text = script.text(number);
        let mut from = 0;
        for at in script.pieces.iter().copied().chain([text.len()]) {
            if stream.write_all(&text[from..at]).await.is_err() {
                return false;
            }
            from = at;
            sleep(Duration::from_millis(1)).await;
        }
        if script.switches && offered {
            let mut tunnel = std::mem::take(read);
            let _ = stream.write_all(answers::token(number).as_bytes()).await;
            if !script.close {
                let _ = timeout(Duration::from_secs(1), stream.read_to_end(&mut tunnel)).await;
            }
            self.seen.lock().unwrap().tunnels.push(tunnel);
            return false;
        }
        !script.close
    }
}
