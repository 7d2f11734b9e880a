//! A plan in action: clients, the gateway, its store, and the upstream, which does what the requests tell it to.

use super::plan::{
    Act, BODY_MAX, Compared, Flaw, LATE_WINDOW, MissingKey, Plan, RESPONSE_TIMEOUT, RETENTION, Script, Settings, Size,
    UNKNOWN_RETENTION, WAIT_TIMEOUT,
};
use crate::wire::{self, Message, Parsed};
use crate::world::{self, Fault, MadeUpStore, now, now_ms};
use oncegate::simulation::{Connector, Served, Stream};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::watch;
use tokio::time::sleep;

/// `max_recorded_body`, and a body that is larger.
const RECORDED_MAX: usize = 1024;
const LARGE: usize = 3000;
const PIPE: usize = 1 << 16;
pub(crate) const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";

/// The upstream has seen a request.
#[derive(Debug)]
pub(crate) struct Visit {
    pub(crate) request: usize,
    pub(crate) message: Message,
    /// Of its answer.
    pub(crate) body: Vec<u8>,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) at: u64,
    pub(crate) message: Message,
    /// It has not been cut off.
    pub(crate) whole: bool,
}

/// What was seen on both sides.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) visits: Vec<Visit>,
    pub(crate) answers: Vec<Option<Answer>>,
    /// What is wrong in itself.
    pub(crate) wrong: Vec<String>,
}

#[derive(Clone)]
struct Scene {
    /// Of all requests, what is written.
    requests: Arc<Vec<String>>,
    scripts: Arc<Vec<&'static Script>>,
    seen: Arc<Mutex<Seen>>,
    store: MadeUpStore,
    reachable: Arc<watch::Sender<bool>>,
}

pub(crate) fn run(plan: &Plan) -> Seen {
    world::begin();
    let answers = plan.requests.iter().map(|_| None).collect();
    let scene = Scene {
        requests: Arc::new((0..plan.requests.len()).map(|number| written(plan, number)).collect()),
        scripts: Arc::new(plan.requests.iter().map(|request| request.script).collect()),
        seen: Arc::new(Mutex::new(Seen { answers, ..Seen::default() })),
        store: MadeUpStore::new(),
        reachable: Arc::new(watch::Sender::new(true)),
    };
    let mut rest = plan.acts.as_slice();
    loop {
        let kill = rest.iter().position(|(_, act)| *act == Act::Kill);
        let (life, end) = kill.map_or((rest, plan.end), |at| (&rest[..at], rest[at].0));
        world::live(scene.live(plan.settings, life, end, kill.is_none()));
        match kill {
            Some(at) => rest = &rest[at + 1..],
            None => return std::mem::take(&mut *scene.seen.lock().unwrap()),
        }
    }
}

fn settings(settings: Settings) -> String {
    let missing_key = match settings.missing_key {
        MissingKey::Pass => "pass",
        MissingKey::Reject => "reject",
        MissingKey::Derive => "derive",
    };
    let fingerprint = match settings.compared {
        Compared::Json => "json",
        Compared::Raw => "raw",
        Compared::None => "none",
    };
    let of = |set: bool, yes: &'static str, no: &'static str| if set { yes } else { no };
    format!(
        "store.engine = \"memory\"\nserver.limits.max_body = {BODY_MAX}\nupstream.response_timeout = \"{RESPONSE_TIMEOUT}ms\"\n\
         upstream.late_window = \"{LATE_WINDOW}ms\"\n{}[idempotency]\nmissing_key = \"{missing_key}\"\n\
         fingerprint = \"{fingerprint}\"\nconcurrent = \"{}\"\nunknown_outcome = \"{}\"\non_store_error = \"{}\"\n\
         wait_timeout = \"{WAIT_TIMEOUT}ms\"\nretention = \"{RETENTION}ms\"\nunknown_retention = \"{UNKNOWN_RETENTION}ms\"\n\
         max_recorded_body = {RECORDED_MAX}\n",
        of(settings.cache, "", "cache.max_bytes = 0\n"),
        of(settings.conflict, "conflict", "wait"),
        of(settings.resend, "forward", "hold"),
        of(settings.pass, "pass", "reject"),
    )
}

/// A request as its client writes it.
fn written(plan: &Plan, number: usize) -> String {
    let request = &plan.requests[number];
    let mut text =
        format!("{} {} HTTP/1.1\r\nHost: a.example\r\nX-Id: {number}\r\n", request.method, request.target.raw);
    text += "X-Gone: 1\r\nConnection: close, x-gone";
    for named in [request.key.named, request.who.named].iter().filter(|named| !named.is_empty()) {
        text += &format!(", {named}");
    }
    text += "\r\n";
    for (name, value) in request.who.lines {
        text += &format!("{name}: {value}\r\n");
    }
    for line in request.key.lines {
        text += &format!("Idempotency-Key: {line}\r\n");
    }
    if let Some(content_type) = request.body.content_type {
        text += &format!("Content-Type: {content_type}\r\n");
    }
    if request.chained {
        text += "Via: 1.1 oncegate\r\n";
    }
    let body = request.body.text;
    match (request.chunked, body.is_empty()) {
        (false, _) => text + &format!("Content-Length: {}\r\n\r\n{body}", body.len()),
        (true, true) => text + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        (true, false) => text + &format!("Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n", body.len()),
    }
}

impl Scene {
    /// Of a gateway, until it is killed, or all is over.
    async fn live(&self, of: Settings, acts: &[(u64, Act)], end: u64, last: bool) {
        let scene = self.clone();
        let connector = Connector::new(move || {
            let scene = scene.clone();
            async move {
                if !*scene.reachable.borrow() {
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                let (client, server) = duplex(PIPE);
                tokio::spawn(scene.serve(server));
                Ok(Box::new(client) as Stream)
            }
        });
        self.store.set(Fault::None);
        let served = Served::start(world::config(&settings(of)), self.store.open(), connector).await.unwrap();
        let mut failed = false;
        for (at, act) in acts {
            sleep(Duration::from_millis(*at).saturating_sub(now())).await;
            match *act {
                Act::Request(number) => {
                    let (client, server) = duplex(PIPE);
                    served.serve(Box::new(server));
                    tokio::spawn(self.clone().ask(number, client));
                }
                Act::Store(_) if failed => {}
                Act::Store(fault) => {
                    failed = fault == Fault::Failed;
                    self.store.set(fault);
                }
                Act::Upstream(reachable) => {
                    self.reachable.send_replace(reachable);
                }
                Act::Kill => unreachable!("a life ends with it"),
            }
        }
        sleep(Duration::from_millis(end).saturating_sub(now())).await;
        if last && !failed {
            self.leave(&served).await;
        }
    }

    /// All is over: nothing may be left.
    async fn leave(&self, served: &Served) {
        self.store.set(Fault::None);
        sleep(Duration::from_secs(5)).await;
        let left = (served.open_claims(), served.buffered_bytes(), self.store.claims());
        if left != (0, 0, 0) {
            let left = format!("left in the end (forwards, bytes, claims in the store): {left:?}");
            self.seen.lock().unwrap().wrong.push(left);
        }
    }

    async fn ask(self, number: usize, mut stream: DuplexStream) {
        let mut read = Vec::new();
        let _ = stream.write_all(self.requests[number].as_bytes()).await;
        stream.read_to_end(&mut read).await.unwrap();
        let mut rest = read.as_slice();
        let answer = loop {
            match wire::response(rest, false, true) {
                Ok(Parsed::Whole(interim, len)) if interim.status() < 200 && len < rest.len() => rest = &rest[len..],
                Ok(Parsed::Whole(message, len)) if len == rest.len() => break Ok((message, true)),
                Ok(Parsed::Whole(..)) => break Err("more than one answer".to_owned()),
                Ok(Parsed::Partial(Some(message))) => break Ok((message, false)),
                Ok(Parsed::Partial(None)) => break Err("no answer".to_owned()),
                Err(wrong) => break Err(wrong),
            }
        };
        if read.is_empty() {
            return;
        }
        let mut seen = self.seen.lock().unwrap();
        match answer {
            Ok((message, whole)) => seen.answers[number] = Some(Answer { at: now_ms(), message, whole }),
            Err(wrong) => seen.wrong.push(format!("to request {number}: {wrong}: {:?}", wire::text(&read))),
        }
    }

    /// The upstream, at one connection.
    async fn serve(self, mut stream: DuplexStream) {
        let mut read = Vec::new();
        let mut reachable = self.reachable.subscribe();
        loop {
            let more = tokio::select! {
                biased;
                more = stream.read_buf(&mut read) => more.unwrap_or(0),
                _ = reachable.wait_for(|reachable| !reachable) => return,
            };
            match wire::request(&read) {
                Ok(Parsed::Whole(message, len)) => {
                    read.drain(..len);
                    if !self.answer(message, &mut stream).await {
                        return;
                    }
                }
                Ok(Parsed::Partial(_)) if more > 0 => {}
                Ok(Parsed::Partial(_)) => return,
                Err(wrong) => {
                    let wrong = format!("the upstream gets what is no request: {wrong}: {:?}", wire::text(&read));
                    return self.seen.lock().unwrap().wrong.push(wrong);
                }
            }
        }
    }

    /// `false`: the connection ends.
    async fn answer(&self, message: Message, stream: &mut DuplexStream) -> bool {
        let number: usize = message.field("x-id").and_then(|id| id.parse().ok()).unwrap_or(usize::MAX);
        let script = self.scripts[number];
        let body = {
            let mut seen = self.seen.lock().unwrap();
            let mut body = format!("request {number}, visit {}", seen.visits.len());
            match script.size {
                Size::Empty => body.clear(),
                Size::Small => {}
                Size::Large | Size::LargeInChunks => body = format!("{body:.<LARGE$}"),
            }
            seen.visits.push(Visit { request: number, message, body: body.clone().into_bytes() });
            body
        };
        sleep(Duration::from_millis(script.delay)).await;
        let text = match script.flaw {
            Flaw::Cut => return false,
            Flaw::Malformed => "HTTP/1.1 2x1 Created\r\n\r\n".to_owned(),
            Flaw::Silent => {
                let _ = stream.read(&mut [0]).await;
                return false;
            }
            Flaw::None | Flaw::CutBody => response(number, script, &body),
        };
        let cut = script.flaw == Flaw::CutBody;
        let len = if cut { text.len() - body.len() / 2 } else { text.len() };
        stream.write_all(&text.as_bytes()[..len]).await.is_ok() && !cut
    }
}

fn response(number: usize, script: &Script, body: &str) -> String {
    let mut text = String::new();
    if script.interim {
        text += "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n";
    }
    text += &format!("HTTP/1.1 {} Status\r\n", script.status);
    for (name, value) in fields(number, script) {
        text += &format!("{name}: {value}\r\n");
    }
    text += "Set-Cookie: a=b\r\nConnection: X-Hop\r\nX-Hop: 1\r\n";
    if let Some(word) = script.word {
        text += &format!("Idempotency-Outcome: {word}\r\n");
    }
    match script.size {
        Size::Empty if script.status == 101 => text + "Upgrade: x\r\n\r\n",
        Size::Empty => text + "\r\n",
        Size::Small | Size::Large => text + &format!("Content-Length: {}\r\n\r\n{body}", body.len()),
        Size::LargeInChunks => {
            let (first, second) = body.split_at(body.len() / 3);
            let (one, two) = (first.len(), second.len());
            text + &format!(
                "Transfer-Encoding: chunked\r\n\r\n{one:x}\r\n{first}\r\n{two:x};x\r\n{second}\r\n0\r\n\r\n"
            )
        }
    }
}

/// What is recorded of a response's head.
pub(crate) fn fields(number: usize, script: &Script) -> Vec<(String, String)> {
    let mut fields = vec![
        ("content-type".to_owned(), "text/plain".to_owned()),
        ("date".to_owned(), DATE.to_owned()),
        ("location".to_owned(), format!("/posts/{number}")),
        ("x-two".to_owned(), "one".to_owned()),
        ("x-two".to_owned(), "two".to_owned()),
    ];
    if script.retry_after {
        fields.push(("retry-after".to_owned(), "7".to_owned()));
    }
    fields
}
