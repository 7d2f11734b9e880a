//! Which answers the contract allows in which situation.

use crate::script::{Reply, Script};
use crate::wire::Message;
use crate::world::{Key, Outages, Purpose, RETENTION, SETTLED, SLACK, UNKNOWN_RETENTION, Visit, World};
use std::time::Instant;

impl World {
    /// Judges the answer to a request that bears a key with its payload, or none. What it was, in two words.
    pub(crate) fn judge(&self, number: u64, attempt: usize, answer: &Message) -> String {
        let mut keys = self.keys.lock().unwrap();
        let outages = self.outages.lock().unwrap();
        let Some(key) = keys.keys.get_mut(&number) else { return "forgotten".to_owned() };
        let ended = Instant::now();
        key.attempts[attempt].ended = Some(ended);
        let case = Case { sent: key.attempts[attempt].sent, ended, outages: &outages, answer };
        let (label, verdict) = match answer.field("x-serial") {
            Some(serial) => case.of_upstream(key, serial),
            None => case.of_gateway(key),
        };
        if let Err(why) = verdict {
            let history = history(key, self.started);
            self.violated(&format!("{number} ({:?}) gets {label}: {why}\n  {history}", key.purpose));
        }
        label
    }

    /// Nobody waits for the answer; a forward may go on for a while.
    pub(crate) fn abandoned(&self, number: u64, attempt: usize) {
        let mut keys = self.keys.lock().unwrap();
        if let Some(key) = keys.keys.get_mut(&number) {
            key.attempts[attempt].ended = Some(Instant::now() + SLACK);
        }
    }
}

fn history(key: &Key, started: Instant) -> String {
    let at = |time: Option<Instant>| time.map_or(-1.0, |time| time.duration_since(started).as_secs_f64());
    let attempts = key.attempts.iter().map(|it| format!("sent {:.3}–{:.3}", at(Some(it.sent)), at(it.ended)));
    let visit = |it: &Visit| {
        format!("{:?} #{} {:.3}–{:.3} seen {}", it.script, it.serial, at(Some(it.arrived)), at(it.responded), it.seen)
    };
    attempts.chain(key.visits.iter().map(visit)).collect::<Vec<_>>().join("; ")
}

type Verdict = Result<(), String>;

fn ensure(holds: bool, what: &str) -> Verdict {
    if holds { Ok(()) } else { Err(what.to_owned()) }
}

struct Case<'a> {
    sent: Instant,
    ended: Instant,
    outages: &'a Outages,
    answer: &'a Message,
}

impl Case<'_> {
    fn of_upstream(&self, key: &mut Key, serial: &str) -> (String, Verdict) {
        let replayed = self.answer.field("idempotency-replayed").is_some();
        let label = format!("{}{}", self.answer.first, if replayed { " replayed" } else { "" });
        let serial = serial.parse().unwrap_or(0);
        let newest = key.executed().map_or(0, |visit| visit.serial);
        let purpose = key.purpose;
        // Until the last of those who may have caused the visit had an answer.
        let of_attempts = |arrived: Instant| {
            let begun = key.attempts.iter().filter(|attempt| attempt.sent <= arrived);
            begun.map(|attempt| attempt.ended.unwrap_or(self.ended)).max().unwrap_or(arrived)
        };
        let Some(visit) = key.visits.iter_mut().find(|visit| visit.serial == serial) else {
            return (label, Err(format!("#{serial} was another's answer")));
        };
        let verdict = self
            .same(visit)
            .and_then(|()| {
                if replayed { self.replay(visit, newest) } else { self.forwarded(visit, of_attempts(visit.arrived)) }
            })
            .and_then(|()| ensure(!replayed || purpose == Purpose::Keyed, "replayed without a key"));
        visit.seen |= visit.script.is_final();
        (label, verdict)
    }

    /// Byte for byte what the upstream said.
    fn same(&self, visit: &Visit) -> Verdict {
        let field = |name| self.answer.field(name).unwrap_or_default().to_owned();
        let got = Reply {
            status: self.answer.status(),
            location: field("location"),
            content_type: field("content-type"),
            body: self.answer.body.clone(),
        };
        let said = Reply::of(visit.script, visit.serial);
        ensure(got == said, "it is not what the upstream said")
    }

    fn replay(&self, visit: &Visit, newest: u64) -> Verdict {
        ensure(visit.script.is_final() && visit.script != Script::Large, "there can be no record of it")?;
        ensure(self.answer.field("age").is_some() && self.answer.field("cache-status").is_some(), "no Age")?;
        ensure(self.answer.field("set-cookie").is_none(), "a cookie from the record")?;
        let responded = visit.responded.ok_or("there was no answer yet")?;
        ensure(self.sent <= responded + RETENTION + SLACK, "its retention is over")?;
        ensure(visit.serial == newest || self.ended < visit.arrived + RETENTION + SLACK, "there is a newer answer")
    }

    /// `until`: when whoever caused the visit had the answer.
    fn forwarded(&self, visit: &Visit, until: Instant) -> Verdict {
        // Who waited for a request that was turned away gets its answer, too.
        let from = if visit.script.refuses() { until } else { visit.arrived };
        ensure(self.sent <= from && visit.arrived <= self.ended, "it is an earlier request's answer, and unmarked")
    }

    fn of_gateway(&self, key: &Key) -> (String, Verdict) {
        let problem = serde_json::from_slice::<serde_json::Value>(&self.answer.body).unwrap_or_default();
        let code = problem["code"].as_str().unwrap_or("?");
        let label = format!("{} {code}", self.answer.first);
        let outage = self.outages.within(self.sent, self.ended);
        let recent = key.visits.iter().filter(|visit| visit.arrived <= self.ended);
        let mut own = recent.clone().filter(|visit| visit.arrived >= self.sent).map(|visit| visit.script);
        let verdict = match (self.answer.status(), code) {
            (502, "upstream_unreachable") => ensure(outage, "the upstream was there"),
            (502, "upstream_broken") => ensure(outage || own.any(Script::breaks), "nothing broke"),
            (504, "upstream_timeout") => ensure(own.any(Script::is_slow), "nothing was slow"),
            (409, _) if key.purpose != Purpose::Keyed => Err("it bears no key".to_owned()),
            (409, "in_progress") => {
                let slow = |visit: &Visit| visit.script.is_slow() && self.sent <= visit.arrived + SETTLED + SLACK;
                ensure(recent.clone().any(slow), "nothing is in progress")
            }
            (409, "outcome_unknown") => self.unknown(key),
            (409, "body_not_recorded") => {
                let located = |visit: &Visit| problem["location"] == format!("/posts/{}", visit.serial);
                let large = |visit: &Visit| visit.script == Script::Large && located(visit) && self.lasts(visit);
                ensure(recent.clone().any(large) && problem["upstream_status"] == 201, "no large answer")
            }
            _ => Err("it is not allowed here".to_owned()),
        };
        (label, verdict.and_then(|()| self.has_fields(code)))
    }

    fn lasts(&self, visit: &Visit) -> bool {
        visit.responded.is_some_and(|responded| self.sent <= responded + RETENTION + SLACK)
    }

    /// There is a reason for it, and no client had a final answer that still holds.
    fn unknown(&self, key: &Key) -> Verdict {
        if let Some(visit) = key.executed()
            && visit.seen
            && visit.responded.is_some_and(|responded| self.ended < responded + RETENTION)
        {
            return Err("it was final".to_owned());
        }
        let until = |from: Instant| from + SETTLED + UNKNOWN_RETENTION + SLACK;
        let unclear = |visit: &Visit| {
            let cut_off = self.outages.within(visit.arrived, visit.arrived + SETTLED);
            !visit.script.is_final() && !visit.script.refuses() || cut_off
        };
        let visited = key.visits.iter().any(|visit| unclear(visit) && self.sent <= until(visit.arrived));
        let lost = key.attempts.iter().any(|attempt| {
            let ended = attempt.ended.unwrap_or(self.ended);
            self.outages.within(attempt.sent, ended) && self.sent <= until(ended)
        });
        ensure(visited || lost, "nothing was unclear")
    }

    fn has_fields(&self, code: &str) -> Verdict {
        let problem = self.answer.field("content-type") == Some("application/problem+json");
        ensure(problem, "it is no problem document")?;
        let retry_after = self.answer.field("retry-after").is_some();
        ensure(retry_after == (code == "in_progress"), "Retry-After")?;
        let proxy_status = self.answer.field("proxy-status").is_some();
        ensure(proxy_status == code.starts_with("upstream_"), "Proxy-Status")
    }
}
