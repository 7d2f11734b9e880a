//! Clients: they retry, at any gateway, hang up, and lie about bodies.

use crate::audit::random::Random;
use crate::audit::{Call, History, KeyOf, Word};
use crate::http::{self, Message};
use crate::net::End;
use crate::upstream::{DATE, body_text};
use crate::world::now;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::time::{sleep, timeout};

/// A client waits no longer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Ways to the gateways; `None`: nobody is there.
pub(crate) type Connect = Arc<dyn Fn(usize) -> Option<End> + Send + Sync>;

#[derive(Clone)]
pub(crate) struct Clients {
    pub(crate) connect: Connect,
    pub(crate) gateways: usize,
    pub(crate) history: Arc<Mutex<History>>,
    /// How long a client goes on to retry.
    pub(crate) until: Duration,
}

impl Clients {
    /// Sends a key until its matter is settled, or it is given up.
    pub(crate) async fn settle(self, key: KeyOf, mut random: Random, begins: Duration) {
        sleep(begins).await;
        let two_bodies = random.percent(15);
        let parallel = random.percent(40);
        let mut calls = Vec::new();
        for _ in 0..=random.below(5) {
            let gateway = random.below(self.gateways as u64) as usize;
            let body = usize::from(two_bodies && random.percent(50));
            let hangs_up = random.percent(15).then(|| random.ms(0, 60));
            let (clients, key, pause) = (self.clone(), key.clone(), random.ms(0, 30));
            let call = async move {
                sleep(pause).await;
                clients.call(&key, gateway, body, hangs_up).await
            };
            if parallel {
                calls.push(tokio::spawn(call));
            } else {
                call.await;
            }
        }
        for call in calls {
            let _ = call.await;
        }
        if random.percent(15) {
            return;
        }
        while now() < self.until {
            let gateway = random.below(self.gateways as u64) as usize;
            let body = usize::from(two_bodies && random.percent(25));
            let word = self.call(&key, gateway, body, None).await;
            if matches!(word, Word::Final { .. } | Word::Unknown) {
                // Once more, after a while: the record may be gone by then, or must not.
                if random.percent(50) {
                    return;
                }
                sleep(random.ms(100, 3000)).await;
                continue;
            }
            sleep(random.ms(5, 150)).await;
        }
    }

    async fn call(&self, key: &KeyOf, gateway: usize, body: usize, hangs_up: Option<Duration>) -> Word {
        let sent = now();
        let word = self.exchange(key, gateway, body, hangs_up).await;
        let call = Call { sent, ended: now(), gateway, body, word: word.clone() };
        self.history.lock().unwrap().call(key, call);
        word
    }

    /// What a gateway says of a key in the end: of the body that was its first, whichever that is.
    pub(crate) async fn ask(self, key: KeyOf, gateway: usize) {
        let mut body = 0;
        let until = now() + PATIENCE * 2;
        loop {
            let sent = now();
            let word = self.exchange(&key, gateway, body, None).await;
            match word {
                Word::KeyReused if body == 0 => body = 1,
                Word::InProgress | Word::Unavailable | Word::Silence if now() < until => {}
                word => {
                    let end = Call { sent, ended: now(), gateway, body, word };
                    return self.history.lock().unwrap().end(&key, end);
                }
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn exchange(&self, key: &KeyOf, gateway: usize, body: usize, hangs_up: Option<Duration>) -> Word {
        let Some(mut stream) = (self.connect)(gateway) else { return Word::Silence };
        let (tenant, text) = (&key.0, body_text(body));
        let request = format!(
            "POST /posts HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {tenant}\r\nIdempotency-Key: {}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{text}",
            key.1,
            text.len()
        );
        if stream.write_all(request.as_bytes()).await.is_err() {
            return Word::Silence;
        }
        let mut buffer = Vec::new();
        let answer = http::read(&mut stream, &mut buffer);
        let read = match timeout(hangs_up.unwrap_or(PATIENCE), answer).await {
            Err(_) if hangs_up.is_some() => {
                stream.reset();
                return Word::Silence;
            }
            Err(_) => return Word::Odd(format!("no answer within {PATIENCE:?}")),
            Ok(read) => read,
        };
        match read {
            Ok(Some(answer)) => word(key, &answer),
            Ok(None) | Err(_) => Word::Silence,
        }
    }
}

fn word(key: &KeyOf, answer: &Message) -> Word {
    let problem = (answer.field("content-type") == Some("application/problem+json")).then(|| {
        serde_json::from_slice::<serde_json::Value>(&answer.body).unwrap()["code"].as_str().unwrap().to_owned()
    });
    if answer.field("proxy-status").is_some_and(|status| status.contains("proxy_internal_error")) {
        return Word::Odd(format!("{answer:?}"));
    }
    match (answer.status, problem.as_deref(), answer.field("x-scripted")) {
        (201 | 500, None, None) => finished(key, answer),
        (409, Some("outcome_unknown"), None) => Word::Unknown,
        (502, None, Some("unknown")) | (502, Some("upstream_broken"), None) => Word::JustUnknown,
        (502, Some("upstream_unreachable"), None) => Word::Unreachable,
        (504, Some("upstream_timeout"), None) => Word::TimedOut,
        (429 | 503 | 500, None, Some("refused")) => Word::Refused,
        (409, Some("in_progress"), None) => Word::InProgress,
        (503, Some("store_unavailable"), None) => Word::Unavailable,
        (422, Some("key_reused"), None) => Word::KeyReused,
        _ => Word::Odd(format!("{answer:?}")),
    }
}

fn finished(key: &KeyOf, answer: &Message) -> Word {
    let text = answer.text();
    let (tenant, name) = key;
    let number = text
        .strip_prefix(&format!("{{\"tenant\":\"{tenant}\",\"key\":\"{name}\",\"execution\":"))
        .and_then(|rest| rest.split('}').next()?.parse().ok());
    let Some(number) = number else { return Word::Odd(format!("not for {key:?}: {answer:?}")) };
    // Marks of a replay, and what is not recorded.
    let marks = ["idempotency-replayed", "age", "cache-status", "set-cookie", "connection"];
    let mut fields = answer.fields.clone();
    fields.retain(|(field, _)| !marks.contains(&field.as_str()));
    fields.sort();
    if answer.field("date") != Some(DATE) {
        return Word::Odd(format!("another date: {answer:?}"));
    }
    let replayed = answer.field("idempotency-replayed").is_some();
    let content = format!("{} {fields:?} {:x}", answer.status, fnv(&answer.body));
    Word::Final { number, content, replayed }
}

/// FNV-1a, of a body.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
