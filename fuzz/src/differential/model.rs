//! What is promised, and nothing of how it is kept: what each request of a plan is answered with, and whether the upstream
//! sees it.

use super::plan::{
    Act, BODY_MAX, Compared, Flaw, Key, LATE_WINDOW, MissingKey, Plan, RESPONSE_TIMEOUT, RETENTION, Request, Script,
    Size, Tenant, UNKNOWN_RETENTION, WAIT_TIMEOUT,
};
use crate::world::Fault;
use std::collections::{BTreeMap, HashMap};

/// What a request is answered with.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Expect {
    Problem {
        status: u16,
        code: &'static str,
        retry_after: Option<u32>,
    },
    /// The upstream's answer to it; `passed`: without a look at the key.
    Answered {
        passed: bool,
    },
    /// The record of what this one was answered with, at this time.
    Replayed {
        of: usize,
        at: u64,
    },
    /// The same answer as this one got, which is no record.
    Shared {
        of: usize,
    },
    /// Nothing: the gateway was killed.
    Lost,
    /// The outcome waits to be recorded: a record of this one, or a refusal that says that it is not known (yet).
    Undecided {
        of: usize,
    },
    Anything,
}

/// What is expected of a request.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub(crate) answer: Expect,
    /// How often the upstream sees it.
    pub(crate) visits: std::ops::RangeInclusive<usize>,
    /// Whose key header it bears there.
    pub(crate) header_of: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Name {
    Sent(&'static str),
    Derived(Payload),
}

type Id = (Tenant, &'static str, Name);
type Payload = (&'static str, &'static str, Option<&'static str>, Option<&'static str>, &'static str);

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Claimed {
        by: usize,
        late: bool,
    },
    Completed {
        of: usize,
        recorded: bool,
    },
    Unknown,
    /// What became of it could not be written.
    Unwritten {
        of: usize,
    },
    /// Nothing can be said of it any more.
    Wild,
}

struct Record {
    payload: Payload,
    first: usize,
    sends: u32,
    state: State,
    since: u64,
    waiting: Vec<usize>,
}

#[derive(Clone, Copy, PartialEq)]
enum Class {
    Final,
    NotExecuted,
    Unknown,
}

enum Event {
    Act(Act),
    /// The forward of this one ends.
    End(Id, usize),
    Late(Id, usize),
    Answer(usize, Expect),
    /// It waits no longer.
    GiveUp(Id, usize),
}

pub(crate) struct Model<'a> {
    plan: &'a Plan,
    /// Which request came when, as the upstream saw it: of several that wait for a free key, whose turn is first is open.
    seen: &'a [usize],
    now: u64,
    events: BTreeMap<(u64, usize), Event>,
    count: usize,
    records: HashMap<Id, Record>,
    fault: Fault,
    reachable: bool,
    expected: Vec<Option<Expect>>,
    visits: Vec<(std::ops::RangeInclusive<usize>, usize)>,
}

fn problem(status: u16, code: &'static str) -> Expect {
    Expect::Problem { status, code, retry_after: (status == 503).then_some(1) }
}

fn in_progress(late: bool) -> Expect {
    Expect::Problem { status: 409, code: "in_progress", retry_after: Some(if late { 5 } else { 1 }) }
}

/// §3, "Settling".
fn class(script: &Script) -> Class {
    match (script.flaw, script.word, script.status) {
        (Flaw::CutBody, _, _) if script.size == Size::Large => Class::Final,
        (Flaw::Cut | Flaw::CutBody | Flaw::Malformed | Flaw::Silent, _, _) | (_, _, 101) => Class::Unknown,
        _ if script.delay > RESPONSE_TIMEOUT + LATE_WINDOW => Class::Unknown,
        (_, Some("final"), _) => Class::Final,
        (_, Some("not-executed"), _) => Class::NotExecuted,
        (_, Some("unknown"), _) => Class::Unknown,
        (_, _, 307 | 308 | 401 | 403 | 407 | 421 | 425 | 429) => Class::NotExecuted,
        (_, _, 503) if script.retry_after => Class::NotExecuted,
        (_, _, 500 | 501 | 505) => Class::Final,
        (_, _, 408 | 500..600) => Class::Unknown,
        _ => Class::Final,
    }
}

impl<'a> Model<'a> {
    pub(crate) fn predict(plan: &'a Plan, seen: &'a [usize]) -> Vec<Expected> {
        let all = plan.requests.len();
        let mut model = Self {
            plan,
            seen,
            now: 0,
            events: BTreeMap::new(),
            count: 0,
            records: HashMap::new(),
            fault: Fault::None,
            reachable: true,
            expected: vec![None; all],
            visits: (0..all).map(|request| (0..=0, request)).collect(),
        };
        for (at, act) in &plan.acts {
            model.at(*at, Event::Act(*act));
        }
        while let Some(((now, _), event)) = model.events.pop_first() {
            model.now = now;
            model.happen(event);
        }
        let answers = model.expected.into_iter().zip(model.visits);
        let expected = |(answer, (visits, header_of)): (Option<Expect>, _)| Expected {
            answer: answer.expect("an answer"),
            visits,
            header_of,
        };
        answers.map(expected).collect()
    }

    fn at(&mut self, at: u64, event: Event) {
        self.count += 1;
        self.events.insert((at, self.count), event);
    }

    fn request(&self, number: usize) -> &'a Request {
        &self.plan.requests[number]
    }

    fn answer(&mut self, request: usize, answer: Expect) {
        self.expected[request].get_or_insert(answer);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Act(Act::Request(request)) => self.arrive(request),
            Event::Act(Act::Kill) => self.kill(),
            Event::Act(Act::Store(fault)) => self.fault = if self.fault == Fault::Failed { self.fault } else { fault },
            Event::Act(Act::Upstream(reachable)) => self.reachable = reachable,
            Event::Answer(request, answer) => self.answer(request, answer),
            Event::End(id, by) => self.end(&id, by),
            Event::Late(id, by) => {
                self.answer(by, problem(504, "upstream_timeout"));
                if let Some(Record { state: State::Claimed { by: holder, late }, .. }) = self.records.get_mut(&id) {
                    *late |= *holder == by;
                }
            }
            Event::GiveUp(id, request) => {
                let Some(record) = self.records.get_mut(&id) else { return };
                let before = record.waiting.len();
                record.waiting.retain(|waiting| *waiting != request);
                let (waited, late) =
                    (record.waiting.len() < before, matches!(record.state, State::Claimed { late: true, .. }));
                if waited {
                    self.answer(request, in_progress(late));
                }
            }
        }
    }

    /// Every claim found at start is unknown.
    fn kill(&mut self) {
        self.fault = Fault::None;
        self.events.retain(|_, event| matches!(event, Event::Act(_)));
        for record in self.records.values_mut() {
            record.waiting.clear();
            match record.state {
                State::Claimed { .. } => (record.state, record.since) = (State::Unknown, self.now),
                // It may be unknown now, and be sent again.
                State::Unwritten { .. } if self.plan.settings.resend => record.state = State::Wild,
                _ => {}
            }
        }
        for (request, answer) in self.plan.requests.iter().zip(&mut self.expected) {
            if request.at < self.now {
                let answer = answer.get_or_insert(Expect::Lost);
                // It may have waited still.
                if matches!(answer, Expect::Undecided { .. }) && self.now < request.at + WAIT_TIMEOUT {
                    *answer = Expect::Anything;
                }
            }
        }
    }

    fn arrive(&mut self, number: usize) {
        let request = self.request(number);
        let keyed = request.key.key != Key::None;
        if request.method == "POST" && request.target.ambiguous && keyed {
            return self.answer(number, problem(400, "path_ambiguous"));
        }
        let Some(path) = request.target.path.filter(|_| request.method == "POST") else { return self.pass(number) };
        match (request.key.key, self.plan.settings.missing_key) {
            (Key::Invalid, _) => return self.answer(number, problem(400, "key_invalid")),
            (Key::None, MissingKey::Pass) => return self.pass(number),
            (Key::None, MissingKey::Reject) => return self.answer(number, problem(400, "key_missing")),
            _ => {}
        }
        if request.who.tenant == Tenant::Refused {
            return self.answer(number, problem(400, "scope_missing"));
        }
        let body = request.body;
        if body.text.len() > BODY_MAX {
            return self.answer(number, problem(413, "body_too_large"));
        }
        let payload = match self.plan.settings.compared {
            Compared::Json if body.media == Some("text/plain") => {
                ("POST", path, request.target.query, body.media, body.text)
            }
            Compared::Json => ("POST", path, request.target.query, body.media, body.json),
            Compared::Raw => ("POST", path, request.target.query, body.media, body.text),
            Compared::None => ("POST", "", None, None, ""),
        };
        let name = match request.key.key {
            Key::Good(name) => Name::Sent(name),
            _ => Name::Derived(payload),
        };
        self.come(number, (request.who.tenant, path, name), payload);
    }

    /// A newcomer, or one that has waited for a key that is free now.
    fn come(&mut self, number: usize, id: Id, payload: Payload) {
        let settings = self.plan.settings;
        let over = |record: &mut Record| match record.state {
            State::Claimed { .. } | State::Wild => false,
            State::Completed { .. } => record.since + RETENTION <= self.now,
            State::Unknown => record.since + UNKNOWN_RETENTION <= self.now,
            // When its retention begins is open.
            State::Unwritten { .. } => {
                if record.since + RETENTION <= self.now {
                    record.state = State::Wild;
                }
                false
            }
        };
        if self.records.get_mut(&id).is_some_and(over) {
            self.records.remove(&id);
        }
        let blind = matches!(self.fault, Fault::Failed | Fault::Away);
        let Some(record) = self.records.get_mut(&id) else { return self.claim(number, id, payload) };
        let in_flight = matches!(record.state, State::Claimed { .. });
        if record.state == State::Wild || blind && settings.pass && !in_flight {
            // What happens without a record may happen twice.
            self.visits[number].0 = 0..=1;
            return self.answer(number, Expect::Anything);
        }
        if blind && !in_flight {
            // It may be in memory.
            let of = match record.state {
                State::Completed { of, .. } | State::Unwritten { of } => of,
                _ => usize::MAX,
            };
            let other = record.payload != payload;
            return self.answer(number, if other { Expect::Anything } else { Expect::Undecided { of } });
        }
        if record.payload != payload {
            return self.answer(number, problem(422, "key_reused"));
        }
        match record.state {
            State::Claimed { late, .. } if settings.conflict => self.answer(number, in_progress(late)),
            State::Claimed { .. } => {
                record.waiting.push(number);
                self.at(self.request(number).at + WAIT_TIMEOUT, Event::GiveUp(id, number));
            }
            State::Completed { of, recorded: true } => {
                let at = record.since;
                self.answer(number, Expect::Replayed { of, at });
            }
            State::Completed { .. } => self.answer(number, problem(409, "body_not_recorded")),
            State::Unknown if settings.resend => self.claim(number, id, payload),
            State::Unknown => self.answer(number, problem(409, "outcome_unknown")),
            State::Unwritten { of } => self.answer(number, Expect::Undecided { of }),
            State::Wild => unreachable!("answered above"),
        }
    }

    fn claim(&mut self, number: usize, id: Id, payload: Payload) {
        if self.fault != Fault::None {
            if self.plan.settings.pass {
                return self.pass(number);
            }
            return self.answer(number, problem(503, "store_unavailable"));
        }
        let fresh = Record { payload, first: number, sends: 0, state: State::Unknown, since: 0, waiting: Vec::new() };
        let record = self.records.entry(id.clone()).or_insert(fresh);
        record.sends += 1;
        (record.state, record.since) = (State::Claimed { by: number, late: false }, self.now);
        let script = self.plan.requests[number].script;
        let patience = RESPONSE_TIMEOUT + LATE_WINDOW;
        let silent = script.flaw == Flaw::Silent || script.delay > patience;
        let mut end = if silent { patience } else { script.delay };
        if self.reachable {
            self.visits[number] = (1..=1, record.first);
        } else {
            end = 0;
        }
        if end > RESPONSE_TIMEOUT {
            self.at(self.now + RESPONSE_TIMEOUT, Event::Late(id.clone(), number));
        }
        // Be it at once: whoever waits for a free key, too, waits for this one by then.
        self.at(self.now + end, Event::End(id, number));
    }

    fn end(&mut self, id: &Id, by: usize) {
        let script = self.plan.requests[by].script;
        let sent = *self.visits[by].0.end() > 0;
        let class = if sent { class(script) } else { Class::NotExecuted };
        let Some(record) = self.records.get_mut(id) else { return };
        let resent = record.sends > 1;
        let class = match class {
            Class::Final if resent && script.status == 409 && script.word != Some("final") => Class::Unknown,
            // An earlier send may have been executed, unless the upstream says that of the key.
            Class::NotExecuted if resent && !(sent && script.word == Some("not-executed")) => Class::Unknown,
            class => class,
        };
        let waiting = std::mem::take(&mut record.waiting);
        let (payload, blind) = (record.payload, matches!(self.fault, Fault::Failed | Fault::Away));
        record.since = self.now;
        record.state = match class {
            Class::NotExecuted if blind => State::Wild,
            Class::Unknown if blind && self.plan.settings.resend => State::Wild,
            _ if blind => State::Unwritten { of: by },
            Class::Final => State::Completed { of: by, recorded: matches!(script.size, Size::Small | Size::Empty) },
            Class::Unknown | Class::NotExecuted => State::Unknown,
        };
        let broken = matches!(script.flaw, Flaw::Cut | Flaw::Malformed) || script.status == 101;
        let cut = script.flaw == Flaw::CutBody && script.size != Size::Large;
        let answer = match (sent, broken || cut) {
            (false, _) => problem(502, "upstream_unreachable"),
            (_, true) => problem(502, "upstream_broken"),
            _ => Expect::Answered { passed: false },
        };
        self.answer(by, answer);
        if blind {
            for waiting in waiting {
                self.visits[waiting].0 = 0..=1;
                self.answer(waiting, Expect::Anything);
            }
            return;
        }
        if class == Class::NotExecuted {
            self.records.remove(id);
        }
        self.go_on(id, payload, by, class, waiting);
    }

    /// Those that have waited look again; who bears the same credentials gets the answer to what was not executed.
    fn go_on(&mut self, id: &Id, payload: Payload, by: usize, class: Class, mut waiting: Vec<usize>) {
        waiting.sort_by_key(|waiting| self.seen.iter().position(|seen| seen == waiting).unwrap_or(usize::MAX));
        for waiting in waiting {
            let alike = self.request(waiting).who.lines == self.request(by).who.lines;
            if class == Class::NotExecuted && alike {
                let unreachable = *self.visits[by].0.end() == 0;
                let answer = if unreachable { problem(502, "upstream_unreachable") } else { Expect::Shared { of: by } };
                self.answer(waiting, answer);
            } else {
                self.come(waiting, id.clone(), payload);
            }
        }
    }

    /// Passed through.
    fn pass(&mut self, number: usize) {
        let request = self.request(number);
        let script = request.script;
        if !self.reachable {
            return self.answer(number, problem(502, "upstream_unreachable"));
        }
        // What is safe, and has no body, may be sent again.
        let again = request.method == "GET" && script.flaw == Flaw::Cut;
        self.visits[number].0 = 1..=if again { 2 } else { 1 };
        let (after, answer) = match script.flaw {
            _ if script.flaw == Flaw::Silent || script.delay > RESPONSE_TIMEOUT => {
                (RESPONSE_TIMEOUT, problem(504, "upstream_timeout"))
            }
            Flaw::Cut | Flaw::Malformed => (script.delay, problem(502, "upstream_broken")),
            _ if script.status == 101 => (script.delay, problem(502, "upstream_broken")),
            _ => (script.delay, Expect::Answered { passed: true }),
        };
        if after == 0 { self.answer(number, answer) } else { self.at(self.now + after, Event::Answer(number, answer)) }
    }
}
