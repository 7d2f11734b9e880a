//! The upstream: it executes, refuses, delays, breaks off, and says so or not.

use crate::audit::random::Random;
use crate::audit::{Did, History, KeyOf, Visit};
use crate::http;
use crate::net::End;
use crate::world::now;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::time::sleep;

pub(crate) const RESPONSE_TIMEOUT: Duration = Duration::from_millis(600);
pub(crate) const LATE_WINDOW: Duration = Duration::from_millis(3000);
/// A `Date` that the upstream sends.
pub(crate) const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";

/// A body's text; a client's bodies are known by their number.
pub(crate) fn body_text(body: usize) -> String {
    format!("{{\"body\":{body}}}")
}

#[derive(Clone)]
pub(crate) struct Upstream {
    seed: u64,
    /// How much goes wrong, in percent.
    trouble: u64,
    history: Arc<Mutex<History>>,
    /// From the end on it is reached, and executes, at once.
    calm: Arc<AtomicBool>,
}

/// How one request is answered.
struct Plan {
    did: Did,
    delay: Duration,
    /// `None`: reset instead.
    answer: Option<String>,
    /// Whether the connection ends behind the answer, or stays open and says more than it was asked for.
    close: bool,
    twice: bool,
    cut: bool,
    early: bool,
}

impl Upstream {
    pub(crate) fn new(seed: u64, trouble: u64, history: Arc<Mutex<History>>) -> Self {
        Self { seed, trouble, history, calm: Arc::default() }
    }

    pub(crate) fn calm(&self) {
        self.calm.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_calm(&self) -> bool {
        self.calm.load(Ordering::SeqCst)
    }

    /// Serves one connection.
    pub(crate) async fn serve(self, mut stream: End) {
        let mut buffer = Vec::new();
        while let Ok(Some(request)) = http::read(&mut stream, &mut buffer).await {
            let plan = self.plan(&request);
            sleep(plan.delay).await;
            match self.answer(&mut stream, &plan).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(_) => return stream.reset(),
            }
        }
    }

    async fn answer(&self, stream: &mut End, plan: &Plan) -> io::Result<bool> {
        let Some(answer) = &plan.answer else { return Err(io::ErrorKind::ConnectionReset.into()) };
        if plan.early {
            stream.write_all(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n").await?;
            sleep(Duration::from_millis(3)).await;
        }
        let (first, second) = answer.as_bytes().split_at(answer.len() / 2);
        stream.write_all(first).await?;
        if plan.cut {
            return Ok(false);
        }
        sleep(Duration::from_millis(1)).await;
        stream.write_all(second).await?;
        if plan.twice {
            // At once: what comes after the next request was sent is its answer, as far as HTTP/1.1 can tell. More than is read
            // with the first.
            stream.write_all(answer.repeat(8).as_bytes()).await?;
        }
        Ok(!plan.close)
    }

    fn plan(&self, request: &http::Message) -> Plan {
        let tenant = request.field("authorization").unwrap_or_default().trim_start_matches("Bearer ").to_owned();
        let key: KeyOf = (tenant, request.field("idempotency-key").unwrap_or_default().to_owned());
        let text = request.text();
        let body = (0..4).find(|body| text == body_text(*body)).unwrap_or(usize::MAX);
        let mut history = self.history.lock().unwrap();
        let count = history.visits.get(&key).map_or(0, Vec::len) as u64;
        let mixed = format!("{key:?}")
            .bytes()
            .fold(self.seed, |hash, byte| hash.wrapping_mul(0x0100_0000_01b3).wrapping_add(u64::from(byte)));
        let mut random = Random(mixed.wrapping_add(count.wrapping_mul(0x9e37)));
        let calm = self.is_calm() || !random.percent(self.trouble);
        let plan = self.choose(&mut random, calm, &key);
        history.visit(&key, Visit { at: now(), body, did: plan.did });
        plan
    }

    fn choose(&self, random: &mut Random, calm: bool, key: &KeyOf) -> Plan {
        let number = random.next();
        let mut plan = Plan {
            did: Did::Executed { number, in_time: true },
            delay: if random.percent(30) { random.ms(1, 120) } else { Duration::ZERO },
            answer: None,
            close: random.percent(10),
            twice: false,
            cut: false,
            early: random.percent(10),
        };
        let executed = |status: &str| {
            let (tenant, key) = key;
            let padding = "x".repeat((number % 2000) as usize);
            let text = format!("{{\"tenant\":\"{tenant}\",\"key\":\"{key}\",\"execution\":{number}}}{padding}");
            format!(
                "HTTP/1.1 {status}\r\nDate: {DATE}\r\nContent-Type: text/plain\r\nLocation: /posts/{number}\r\nX-Two: one\r\n\
                 X-Two: two\r\nSet-Cookie: not=recorded\r\nContent-Length: {}\r\n\r\n{text}",
                text.len()
            )
        };
        let other = |status: &str, mark: &str, further: &str| {
            format!("HTTP/1.1 {status}\r\nX-Scripted: {mark}\r\n{further}Content-Length: 2\r\n\r\nno")
        };
        plan.answer = Some(executed(if number % 16 == 15 { "500 Oops" } else { "201 Created" }));
        if calm {
            return plan;
        }
        match random.below(12) {
            // Too late for the caller, in time for the record, even if connecting took its time.
            0 | 1 => plan.delay = RESPONSE_TIMEOUT + random.ms(10, 800),
            // Too late for both.
            2 => {
                plan.delay = RESPONSE_TIMEOUT + LATE_WINDOW + random.ms(50, 500);
                plan.did = Did::Executed { number, in_time: false };
            }
            3 => (plan.did, plan.answer) = (Did::ExecutedUnknown, Some(other("502 Bad Gateway", "unknown", ""))),
            4 => (plan.did, plan.cut) = (Did::ExecutedUnknown, true),
            5 => (plan.did, plan.answer) = (Did::ExecutedUnknown, None),
            6 => (plan.did, plan.answer) = (Did::LostUnknown, None),
            7 | 8 => {
                let refusal = other("429 Too Many Requests", "refused", "Retry-After: 0\r\n");
                (plan.did, plan.answer) = (Did::Refused, Some(refusal));
            }
            9 => {
                let refusal = other("503 Service Unavailable", "refused", "Retry-After: 0\r\n");
                (plan.did, plan.answer) = (Did::Refused, Some(refusal));
            }
            10 => {
                let refusal = other("500 Oops", "refused", "Idempotency-Outcome: not-executed\r\n");
                (plan.did, plan.answer) = (Did::Refused, Some(refusal));
            }
            // Says it all again.
            _ => (plan.twice, plan.close) = (true, false),
        }
        plan
    }
}
