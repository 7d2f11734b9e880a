//! The audit: what clients and the upstream have seen, checked afterwards. It knows nothing of the gateway but its contract.

pub(crate) mod random;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A tenant and his key.
pub(crate) type KeyOf = (String, String);

/// One request that has reached the upstream.
#[derive(Clone, Debug)]
pub(crate) struct Visit {
    pub(crate) at: Duration,
    /// Which of the key's bodies it bore.
    pub(crate) body: usize,
    pub(crate) did: Did,
}

/// What the upstream did with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Did {
    /// Executed, under a number that its answer bears; in time for the record, or not.
    Executed { number: u64, in_time: bool },
    /// Executed, and its answer does not say so.
    ExecutedUnknown,
    /// Not executed, and nobody can know.
    LostUnknown,
    /// Not executed, and its answer says so.
    Refused,
}

impl Did {
    fn executed(self) -> bool {
        matches!(self, Self::Executed { .. } | Self::ExecutedUnknown)
    }

    /// Whether whoever gets its answer knows what became of it.
    fn tells(self) -> bool {
        matches!(self, Self::Executed { in_time: true, .. } | Self::Refused)
    }
}

/// What an answer says of its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// An execution's result. `content`: all of it that must never change.
    Final {
        number: u64,
        content: String,
        replayed: bool,
    },
    /// By the record.
    Unknown,
    /// Of this request; the record may not say so yet.
    JustUnknown,
    TimedOut,
    /// The upstream's refusal.
    Refused,
    Unreachable,
    InProgress,
    Unavailable,
    KeyReused,
    /// None: the client hung up, or the gateway did.
    Silence,
    /// What the contract knows no such thing of.
    Odd(String),
}

/// One request of a client.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) sent: Duration,
    pub(crate) ended: Duration,
    /// For whoever reads a failure.
    #[allow(dead_code, reason = "shown by Debug")]
    pub(crate) gateway: usize,
    pub(crate) body: usize,
    pub(crate) word: Word,
}

/// Something that goes wrong for a while.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trouble {
    pub(crate) from: Duration,
    pub(crate) to: Duration,
    pub(crate) ill: Ill,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ill {
    /// A gateway is killed, or stands still: what it works on may become unknown.
    Gateway,
    /// The store cannot be reached, or fails: so it may, and an answer may have been given that is not recorded.
    Store,
    /// The store's answers are lost now and then: an answer may not be recorded yet, but nothing is unknown for that in the end.
    Loss,
    /// The store's clock is set: leases end early or late.
    Clock,
}

#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) visits: BTreeMap<KeyOf, Vec<Visit>>,
    pub(crate) calls: BTreeMap<KeyOf, Vec<Call>>,
    /// What each gateway says of a key once all is calm and settled.
    pub(crate) ends: BTreeMap<KeyOf, Vec<Call>>,
    pub(crate) troubles: Vec<Trouble>,
}

/// What is promised.
#[derive(Clone, Debug)]
pub(crate) struct Promise {
    pub(crate) retention: Duration,
    /// For how long a trouble goes on to leave outcomes unknown: a lease, and until what waits for the store is recorded.
    pub(crate) aftermath: Duration,
    /// How long an answer takes at most, without trouble.
    pub(crate) patience: Duration,
}

/// What became of the keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) keys: usize,
    pub(crate) calls: usize,
    pub(crate) executions: usize,
    pub(crate) finals: usize,
    pub(crate) unknown: usize,
    /// Of those: a client had got the upstream's answer.
    pub(crate) forgotten: usize,
}

impl History {
    pub(crate) fn visit(&mut self, key: &KeyOf, visit: Visit) {
        self.visits.entry(key.clone()).or_default().push(visit);
    }

    pub(crate) fn call(&mut self, key: &KeyOf, call: Call) {
        self.calls.entry(key.clone()).or_default().push(call);
    }

    pub(crate) fn end(&mut self, key: &KeyOf, call: Call) {
        self.ends.entry(key.clone()).or_default().push(call);
    }

    pub(crate) fn trouble(&mut self, from: Duration, to: Duration, ill: Ill) {
        self.troubles.push(Trouble { from, to, ill });
    }

    /// All that is not as promised, or what became of the keys.
    pub(crate) fn check(&self, promise: &Promise) -> Result<Tally, Vec<String>> {
        let mut wrong = Vec::new();
        let keys = self.visits.keys().chain(self.calls.keys()).collect::<BTreeSet<_>>();
        let mut tally = Tally { keys: keys.len(), ..Tally::default() };
        for key in keys {
            let found = wrong.len();
            let of_key = OfKey {
                history: self,
                promise,
                visits: self.visits.get(key).map_or(&[], Vec::as_slice),
                calls: self.calls.get(key).map_or(&[], Vec::as_slice),
                ends: self.ends.get(key).map_or(&[], Vec::as_slice),
            };
            of_key.executions(&mut wrong);
            of_key.answers(&mut wrong);
            of_key.unknowns(&mut wrong);
            of_key.waits(&mut wrong);
            of_key.end(&mut wrong);
            for line in &mut wrong[found..] {
                *line = format!("{key:?}: {line}");
            }
            tally.calls += of_key.calls.len();
            tally.executions += of_key.visits.iter().filter(|visit| visit.did.executed()).count();
            match of_key.ends.first().map(|call| &call.word) {
                Some(Word::Final { .. }) => tally.finals += 1,
                Some(_) => {
                    tally.unknown += 1;
                    tally.forgotten +=
                        usize::from(of_key.calls.iter().any(|call| matches!(call.word, Word::Final { .. })));
                }
                None => {}
            }
        }
        if wrong.is_empty() { Ok(tally) } else { Err(wrong) }
    }
}

/// How far two clocks may be apart.
const SLACK: Duration = Duration::from_millis(300);

/// One key's part of the history.
struct OfKey<'a> {
    history: &'a History,
    promise: &'a Promise,
    visits: &'a [Visit],
    calls: &'a [Call],
    ends: &'a [Call],
}

impl OfKey<'_> {
    /// At most once within the retention; and after anything but a plain refusal the upstream never sees the key again.
    fn executions(&self, wrong: &mut Vec<String>) {
        for (earlier, later) in self.visits.iter().zip(self.visits.iter().skip(1)) {
            if earlier.did != Did::Refused && later.at < earlier.at + self.promise.retention {
                let times = self.visits.iter().filter(|visit| visit.did.executed()).count();
                wrong.push(format!("sent again after {earlier:?}: {later:?}; {times} executions"));
            }
        }
    }

    fn answers(&self, wrong: &mut Vec<String>) {
        let mut contents: BTreeMap<u64, &str> = BTreeMap::new();
        let all = || self.calls.iter().chain(self.ends);
        for call in all() {
            match &call.word {
                Word::Odd(what) => wrong.push(format!("an answer that should not be: {what}, {call:?}")),
                Word::KeyReused if all().all(|other| other.body == call.body) => {
                    wrong.push(format!("nobody has sent another body: {call:?}"));
                }
                Word::Final { number, content, replayed } => {
                    let first = *contents.entry(*number).or_insert(content);
                    if first != content {
                        wrong.push(format!("two answers of one execution:\n{first}\n{content}"));
                    }
                    let visit = self.visits.iter().find(
                        |visit| matches!(visit.did, Did::Executed { number: executed, .. } if executed == *number),
                    );
                    match visit {
                        None => wrong.push(format!("not this key's execution: {call:?}")),
                        Some(visit) if visit.body != call.body => {
                            wrong.push(format!("of another body: {call:?}, {visit:?}"));
                        }
                        Some(_)
                            if *replayed && call.sent > self.recorded_by(*number) + self.promise.retention + SLACK =>
                        {
                            wrong.push(format!("replayed after its retention: {call:?}, {visit:?}"));
                        }
                        Some(_) => {}
                    }
                    if !replayed
                        && all().any(|other| !std::ptr::eq(call, other) && same_and_fresh(&other.word, *number))
                    {
                        wrong.push(format!("two callers are told that theirs was the first: {call:?}"));
                    }
                    // Its record lasts from some time after the execution on. What was answered is recorded, unless the store
                    // failed at that moment.
                    let lasts = visit.map_or(Duration::ZERO, |visit| visit.at) + self.promise.retention;
                    let recorded =
                        *replayed || !self.troubled(call.sent, call.ended, &[Ill::Store, Ill::Loss, Ill::Clock]);
                    let forgotten = all().find(|other| {
                        recorded && other.word == Word::Unknown && other.sent > call.ended && other.ended < lasts
                    });
                    if let Some(other) = forgotten {
                        wrong.push(format!("answered, then unknown: {call:?}, {other:?}"));
                    }
                }
                _ => {}
            }
        }
    }

    /// When an execution was surely recorded: somebody had got a replay of it.
    fn recorded_by(&self, number: u64) -> Duration {
        let calls = self.calls.iter().chain(self.ends);
        let of = |word: &Word| matches!(word, Word::Final { number: other, replayed: true, .. } if *other == number);
        calls.filter(|call| of(&call.word)).map(|call| call.ended).min().unwrap_or(Duration::MAX)
    }

    fn waits(&self, wrong: &mut Vec<String>) {
        for call in self.calls.iter().chain(self.ends) {
            let took = call.ended - call.sent;
            if took > self.promise.patience && !self.troubled(call.sent, call.ended, &[Ill::Gateway, Ill::Store]) {
                wrong.push(format!("waited for {took:?}: {call:?}"));
            }
        }
    }

    /// All gateways agree, on an outcome.
    fn end(&self, wrong: &mut Vec<String>) {
        let Some(first) = self.ends.first() else { return };
        for call in self.ends {
            // Two results are two executions, which are looked at above.
            let same = std::mem::discriminant(&first.word) == std::mem::discriminant(&call.word);
            if !same || !matches!(call.word, Word::Final { .. } | Word::Unknown) {
                wrong.push(format!("at the end: {:?}", self.ends));
                return;
            }
        }
    }

    /// What is unknown has a reason to be, by then.
    fn unknowns(&self, wrong: &mut Vec<String>) {
        let began = self.calls.first().map_or(Duration::ZERO, |call| call.sent);
        let last = self.calls.iter().map(|call| call.ended).max().unwrap_or(began) + self.promise.aftermath;
        // A claim that cannot be given back in time is unknown for a while; not for ever.
        let of_calls = self.calls.iter().map(|call| (call, &[Ill::Gateway, Ill::Store, Ill::Clock, Ill::Loss][..]));
        let of_ends = self.ends.iter().map(|call| (call, &[Ill::Gateway, Ill::Store, Ill::Clock][..]));
        for (call, ills) in of_calls.chain(of_ends) {
            let visited = self.visits.iter().any(|visit| !visit.did.tells() && visit.at <= call.ended);
            let troubled = self.troubled(began, call.ended.min(last), ills);
            if matches!(call.word, Word::Unknown | Word::JustUnknown) && !visited && !troubled {
                wrong.push(format!("unknown without a reason: {call:?}, {:?}, {:?}", self.visits, self.calls));
            }
        }
    }

    /// Whether there was such trouble from `began` to `ended`, or shortly before.
    fn troubled(&self, began: Duration, ended: Duration, ills: &[Ill]) -> bool {
        let mut troubles = self.history.troubles.iter().filter(|trouble| ills.contains(&trouble.ill));
        troubles.any(|trouble| trouble.from <= ended && trouble.to + self.promise.aftermath >= began)
    }
}

fn same_and_fresh(word: &Word, of: u64) -> bool {
    matches!(word, Word::Final { number, replayed: false, .. } if *number == of)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn promise() -> Promise {
        Promise { retention: MS(10_000), aftermath: MS(100), patience: MS(50) }
    }

    fn key() -> KeyOf {
        ("t".to_owned(), "k".to_owned())
    }

    fn executed(at: u64, number: u64) -> Visit {
        Visit { at: MS(at), body: 0, did: Did::Executed { number, in_time: true } }
    }

    fn said(sent: u64, word: Word) -> Call {
        Call { sent: MS(sent), ended: MS(sent + 5), gateway: 0, body: 0, word }
    }

    fn done(number: u64, content: &str, replayed: bool) -> Word {
        Word::Final { number, content: content.to_owned(), replayed }
    }

    #[track_caller]
    fn finds(history: &History, what: &str) {
        let wrong = history.check(&promise()).unwrap_err();
        assert!(wrong.iter().any(|line| line.contains(what)), "{what}: {wrong:?}");
    }

    fn good() -> History {
        let mut history = History::default();
        history.visit(&key(), Visit { at: MS(0), body: 0, did: Did::Refused });
        history.visit(&key(), executed(10, 1));
        history.call(&key(), said(0, Word::Refused));
        history.call(&key(), said(9, done(1, "a", false)));
        history.call(&key(), said(20, done(1, "a", true)));
        history.end(&key(), said(90, done(1, "a", true)));
        history
    }

    #[test]
    fn it_passes_what_is_as_promised_and_finds_what_is_not() {
        let tally = good().check(&promise()).unwrap();
        assert_eq!(tally, Tally { keys: 1, calls: 3, executions: 1, finals: 1, unknown: 0, forgotten: 0 });

        let mut history = good();
        history.visit(&key(), executed(9_000, 2));
        finds(&history, "sent again after");
        let mut history = good();
        history.visit(&key(), executed(10_010, 2));
        history.check(&promise()).unwrap();

        let mut history = good();
        history.call(&key(), said(30, done(1, "b", true)));
        finds(&history, "two answers");
        let mut history = good();
        history.call(&key(), said(30, done(7, "a", true)));
        finds(&history, "not this key's");
        let mut history = good();
        history.call(&key(), Call { body: 1, ..said(30, done(1, "a", true)) });
        finds(&history, "of another body");
        let mut history = good();
        history.call(&key(), said(20_000, done(1, "a", true)));
        finds(&history, "after its retention");
        let mut history = good();
        history.call(&key(), said(30, Word::Unknown));
        finds(&history, "then unknown");
        let mut history = good();
        history.calls.get_mut(&key()).unwrap().truncate(2);
        history.ends.clear();
        history.end(&key(), said(90, Word::Unknown));
        history.trouble(MS(0), MS(1), Ill::Gateway);
        finds(&history, "then unknown");
        history.trouble(MS(0), MS(1), Ill::Loss);
        history.check(&promise()).unwrap();
        let mut history = good();
        history.call(&key(), said(30, done(1, "a", false)));
        finds(&history, "theirs was the first");
        let mut history = good();
        history.call(&key(), said(30, Word::KeyReused));
        finds(&history, "nobody has sent another body");
        let mut history = good();
        history.call(&key(), said(30, Word::Odd("418".to_owned())));
        finds(&history, "418");
        let mut history = good();
        history.call(&key(), Call { ended: MS(99), ..said(30, Word::InProgress) });
        finds(&history, "waited for");
        history.trouble(MS(0), MS(1), Ill::Gateway);
        history.check(&promise()).unwrap();
        let mut history = good();
        history.end(&key(), said(91, Word::InProgress));
        finds(&history, "at the end");
    }

    #[test]
    fn what_is_unknown_needs_a_reason() {
        let unknown = |did| {
            let mut history = History::default();
            history.visit(&key(), Visit { at: MS(500), body: 0, did });
            history.call(&key(), said(499, Word::JustUnknown));
            history.end(&key(), said(900, Word::Unknown));
            history
        };
        unknown(Did::ExecutedUnknown).check(&promise()).unwrap();
        unknown(Did::Executed { number: 1, in_time: false }).check(&promise()).unwrap();
        finds(&unknown(Did::Refused), "without a reason");
        let mut history = unknown(Did::Executed { number: 1, in_time: true });
        finds(&history, "without a reason");
        history.trouble(MS(0), MS(390), Ill::Gateway);
        finds(&history, "without a reason");
        history.trouble(MS(502), MS(560), Ill::Gateway);
        history.check(&promise()).unwrap();
    }
}
