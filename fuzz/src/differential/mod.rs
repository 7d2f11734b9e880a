//! The gateway against a model of what it promises: a random sequence of requests, outages and restarts, and what each
//! request has to be answered with.

mod drive;
mod model;
mod plan;

use crate::wire::{Fields, Framing, Message};
use drive::{Answer, Seen, Visit};
use model::{Expect, Expected, Model};
use plan::{Flaw, Key, Plan, RETENTION, Request};

/// Runs what the bytes stand for.
///
/// # Panics
/// If anything is not as the model says.
pub(crate) fn check(bytes: &[u8]) {
    let plan = Plan::new(bytes);
    let seen = drive::run(&plan);
    let order = seen.visits.iter().map(|visit| visit.request).collect::<Vec<_>>();
    let expected = Model::predict(&plan, &order);
    let mut wrong = seen.wrong.clone();
    for (number, expected) in expected.iter().enumerate() {
        let judge = Judge { plan: &plan, seen: &seen, number, expected };
        let found = judge.answer().and_then(|()| judge.visits());
        wrong.extend(found.err().map(|found| format!("request {number}: {found}")));
    }
    assert!(wrong.is_empty(), "{}\n{}", wrong.join("\n"), story(&plan, &seen, &expected));
}

/// All that was to happen, and has.
fn story(plan: &Plan, seen: &Seen, expected: &[Expected]) -> String {
    let mut text = format!("{:?}\n", plan.settings);
    for (at, act) in &plan.acts {
        let plan::Act::Request(number) = act else {
            text += &format!("{at}: {act:?}\n");
            continue;
        };
        let Request { method, target, key, who, body, script, .. } = &plan.requests[*number];
        let target = target.raw;
        text +=
            &format!("{at}: {number}: {method} {target} {:?}{:?} {:?}{:?}", key.lines, key.named, who.lines, who.named);
        text += &format!(" {:.40?} {:?}\n  {script:?}\n", body.text, body.content_type);
        text += &format!("  expected: {:?}\n  ", expected[*number]);
        text += &match &seen.answers[*number] {
            None => "no answer\n".to_owned(),
            Some(Answer { at, message, whole }) => {
                let body = crate::wire::text(&message.body[..message.body.len().min(200)]);
                format!("at {at}, whole: {whole}: {:?} {:?} {body:?}\n", message.start, message.fields)
            }
        };
    }
    let visits = seen.visits.iter().map(|visit| visit.request).collect::<Vec<_>>();
    format!("{text}upstream: {visits:?}\n")
}

/// Compares what is expected of one request with what was seen.
struct Judge<'a> {
    plan: &'a Plan,
    seen: &'a Seen,
    number: usize,
    expected: &'a Expected,
}

type Verdict = Result<(), String>;

fn same<T: PartialEq + std::fmt::Debug>(what: &str, seen: T, expected: T) -> Verdict {
    if seen == expected { Ok(()) } else { Err(format!("{what}: {seen:?} instead of {expected:?}")) }
}

impl Judge<'_> {
    fn request(&self) -> &Request {
        &self.plan.requests[self.number]
    }

    fn routed(&self) -> bool {
        self.request().method == "POST" && self.request().target.path.is_some()
    }

    fn answer(&self) -> Verdict {
        let answer = self.seen.answers[self.number].as_ref();
        let answer = match (&self.expected.answer, answer) {
            (Expect::Lost, None) | (Expect::Anything, _) => return Ok(()),
            // What is cut off may be cut off before its head has been written.
            (Expect::Answered { .. }, None) if self.request().script.flaw == Flaw::CutBody => return Ok(()),
            (Expect::Lost, Some(_)) => return Err("answered though the gateway was killed".to_owned()),
            (_, None) => return Err("not answered".to_owned()),
            (_, Some(answer)) => answer,
        };
        match &self.expected.answer {
            Expect::Problem { status, code, retry_after } => self.problem(answer, *status, code, *retry_after),
            Expect::Answered { passed } => self.answered(answer, *passed),
            Expect::Replayed { of, at } => self.replayed(answer, *of, Some(*at)),
            Expect::Shared { of } => self.copied(answer, *of, &[]),
            Expect::Undecided { of } => self.undecided(answer, *of),
            Expect::Lost | Expect::Anything => Ok(()),
        }
    }

    fn problem(&self, answer: &Answer, status: u16, code: &str, retry_after: Option<u32>) -> Verdict {
        let message = &answer.message;
        same("status", message.status(), status)?;
        let problem = message.problem().ok_or("no problem")?;
        same("code", problem["code"].as_str(), Some(code))?;
        same("type", problem["type"].as_str(), Some(format!("urn:oncegate:problem:{code}").as_str()))?;
        same("status in the body", problem["status"].as_u64(), Some(status.into()))?;
        let told = |member: &str| problem[member].as_str().is_some_and(|text| !text.is_empty());
        same("title and detail", told("title") && told("detail"), true)?;
        same("Retry-After", message.field("retry-after"), retry_after.map(|after| after.to_string()).as_deref())?;
        let fault = message.field("proxy-status").is_some_and(|status| status.starts_with("oncegate; error="));
        same("Proxy-Status", fault, matches!(status, 502 | 504))?;
        same("Idempotency-Replayed", message.field("idempotency-replayed"), None)?;
        if code == "body_not_recorded" {
            same("upstream_status", problem["upstream_status"].as_u64(), Some(201))?;
            same("location", problem["location"].as_str().is_some_and(|to| to.starts_with("/posts/")), true)?;
        }
        // One gateway behind another frees the record of the one in front.
        let freed = message.field("idempotency-outcome");
        match self.request().chained {
            false => same("Idempotency-Outcome", freed, None),
            true if self.routed() && !self.plan.settings.pass && self.request().key.key != Key::None => {
                same("Idempotency-Outcome", freed, Some("not-executed"))
            }
            true => Ok(()),
        }
    }

    fn answered(&self, answer: &Answer, passed: bool) -> Verdict {
        let script = self.request().script;
        let mut further = vec![("set-cookie".to_owned(), "a=b".to_owned())];
        let cut = script.flaw == Flaw::CutBody;
        if cut && passed && self.routed() && answer.message.problem().is_some() {
            // Without a record it is read whole, as with one.
            return self.problem(answer, 502, "upstream_broken", None);
        }
        // Whose it is where there is no record is open.
        if passed && !(self.routed() && self.plan.settings.pass) {
            further.extend(script.word.map(|word| ("idempotency-outcome".to_owned(), word.to_owned())));
        }
        same("whole", answer.whole, !cut)?;
        self.copied(answer, self.number, &further)
    }

    /// As this one was answered, with further fields.
    fn copied(&self, answer: &Answer, of: usize, further: &[(String, String)]) -> Verdict {
        let script = self.plan.requests[of].script;
        let message = &answer.message;
        same("status", message.status(), script.status)?;
        let framing = ["content-length", "transfer-encoding", "connection"];
        let open = self.routed() && self.plan.settings.pass;
        let mut fields: Fields = message.fields.clone();
        fields.retain(|(name, _)| !(framing.contains(&name.as_str()) || open && name == "idempotency-outcome"));
        let mut expected = drive::fields(of, script);
        expected.extend_from_slice(further);
        fields.sort();
        expected.sort();
        same("fields", fields, expected)?;
        let visit = self.visits_of(of).last().ok_or("an answer to what the upstream has not seen")?;
        let body = crate::wire::text(&visit.body);
        let seen = crate::wire::text(&message.body);
        if answer.whole { same("body", seen, body) } else { same("body", body.starts_with(&seen), true) }
    }

    fn replayed(&self, answer: &Answer, of: usize, at: Option<u64>) -> Verdict {
        let mut answer = Answer { at: answer.at, message: answer.message.clone(), whole: answer.whole };
        let message: &mut Message = &mut answer.message;
        same("Idempotency-Replayed", message.field("idempotency-replayed"), Some("true"))?;
        let number = |text: Option<&str>| text.and_then(|text| text.parse::<u64>().ok());
        let age = number(message.field("age")).ok_or("no Age")?;
        let status = message.field("cache-status").and_then(|status| status.strip_prefix("oncegate; hit; ttl="));
        let ttl = number(status).ok_or("no Cache-Status")?;
        if let Some(at) = at {
            let elapsed = answer.at - at;
            same("Age", (age * 1000).abs_diff(elapsed) < 1000, true)?;
            same("ttl", (ttl * 1000).abs_diff(RETENTION - elapsed) < 1000, true)?;
        }
        message.fields.retain(|(name, _)| !["idempotency-replayed", "age", "cache-status"].contains(&name.as_str()));
        self.copied(&answer, of, &[])
    }

    /// Of what could not be recorded (yet), or read.
    fn undecided(&self, answer: &Answer, of: usize) -> Verdict {
        let Some(problem) = answer.message.problem() else { return self.replayed(answer, of, None) };
        let refusals = ["store_unavailable", "in_progress", "outcome_unknown", "body_not_recorded"];
        let code = problem["code"].as_str().unwrap_or_default();
        if refusals.contains(&code) { Ok(()) } else { Err(format!("{code}, though the outcome is open")) }
    }

    fn visits_of(&self, number: usize) -> impl Iterator<Item = &Visit> {
        self.seen.visits.iter().filter(move |visit| visit.request == number)
    }

    /// What the upstream has seen of it.
    fn visits(&self) -> Verdict {
        let count = self.visits_of(self.number).count();
        if !self.expected.visits.contains(&count) {
            return Err(format!("the upstream has seen it {count} times instead of {:?}", self.expected.visits));
        }
        let request = self.request();
        let first = &self.plan.requests[self.expected.header_of];
        for Visit { message, .. } in self.visits_of(self.number) {
            let start = [request.method, request.target.seen, "HTTP/1.1"].map(str::to_owned);
            same("request line", &message.start, &start)?;
            same("body", crate::wire::text(&message.body), request.body.text.to_owned())?;
            let keys = message.all("idempotency-key").collect::<Vec<_>>();
            if self.expected.answer == Expect::Anything {
                // It may be the second send of an earlier one.
            } else if self.routed()
                && first.key.key == Key::None
                && self.plan.settings.missing_key == plan::MissingKey::Derive
            {
                same("a derived key", keys.len() == 1 && keys[0].len() == 64, true)?;
            } else {
                let named = !first.key.named.is_empty();
                let lines = first.key.lines.iter().filter(|_| !named).map(|line| line.trim()).collect();
                same("key", keys, lines)?;
            }
            same("Via", message.all("via").last().is_some_and(|via| via.ends_with("1.1 oncegate")), true)?;
            let hop = ["connection", "x-gone", "keep-alive", "te", "upgrade"];
            same("hop-by-hop fields", message.fields.iter().find(|(name, _)| hop.contains(&name.as_str())), None)?;
            if self.routed() && first.key.key != Key::None {
                let known = matches!(message.framing, Framing::Length(len) if len == request.body.text.len());
                same("a length", known, true)?;
            }
        }
        Ok(())
    }
}
