//! `lookup` and `probe`: what the upstream is asked, of `[idempotency]` and of a route.

use super::reader::{At, Errors, Section, duration, string};
use crate::gateway::question::Template;
use crate::gateway::route::Pattern;
use crate::gateway::{lookup, probe};
use crate::idempotency::OutcomeTable;
use crate::idempotency::outcome::OutcomeLists;
use std::time::Duration;

const TICK: Duration = Duration::from_millis(1);

/// Values that were written, each with its place.
#[derive(Clone, Default)]
pub(super) struct Questions {
    lookup_path: Option<(String, At)>,
    not_executed: Option<(Vec<String>, At)>,
    min_age: Option<(Duration, At)>,
    lookup_timeout: Option<(Duration, At)>,
    probe_path: Option<(String, At)>,
    probe_cache: Option<(Duration, At)>,
    probe_timeout: Option<(Duration, At)>,
    /// Something was written wrongly: nothing is concluded from what is missing.
    wrong: bool,
}

/// Reads both tables from wherever they stand.
pub(super) fn written(section: &mut Section<'_>) -> Questions {
    let mut questions = Questions::default();
    let before = section.errors.count();
    macro_rules! key {
        ($table:ident, $field:ident, $key:literal, $read:ident, $parse:expr) => {
            let at = $table.at($key);
            questions.$field = $table.$read($key, $parse).map(|value| (value, at));
        };
    }
    let name = section.key("lookup");
    if let Some(node) = section.take("lookup") {
        let mut lookup = Section::new(&name, Some(node), section.errors);
        key!(lookup, lookup_path, "path", read, string);
        key!(lookup, not_executed, "not_executed", read_list, string);
        key!(lookup, min_age, "min_age", read, duration(Duration::ZERO));
        key!(lookup, lookup_timeout, "timeout", read, duration(TICK));
        lookup.finish();
    }
    let name = section.key("probe");
    if let Some(node) = section.take("probe") {
        let mut probe = Section::new(&name, Some(node), section.errors);
        key!(probe, probe_path, "path", read, string);
        key!(probe, probe_cache, "cache", read, duration(Duration::ZERO));
        key!(probe, probe_timeout, "timeout", read, duration(TICK));
        probe.finish();
    }
    questions.wrong = section.errors.count() > before;
    questions
}

/// A route's own questions before the general ones.
pub(super) struct Merged<'a> {
    pub(super) own: &'a Questions,
    pub(super) general: &'a Questions,
    /// The route's table.
    pub(super) name: &'a str,
    pub(super) pattern: &'a Pattern,
}

impl Merged<'_> {
    fn get<T>(&self, field: impl Fn(&Questions) -> &Option<(T, At)>) -> Option<(T, &At, &str)>
    where
        T: Clone + 'static,
    {
        let own = field(self.own).as_ref().map(|(value, at)| (value.clone(), at, self.name));
        own.or_else(|| field(self.general).as_ref().map(|(value, at)| (value.clone(), at, "idempotency")))
    }

    fn template(
        &self,
        key: &str,
        (wanted_at, wanted_by): (&At, &str),
        path: Option<(String, &At, &str)>,
        with_key: bool,
        errors: &mut Errors,
    ) -> Option<Template> {
        let Some((text, at, table)) = path else {
            if !self.own.wrong && !self.general.wrong {
                errors.add(wanted_at, wanted_by, &format!("\"{key}\" needs {key}.path: what to ask the upstream"));
            }
            return None;
        };
        let parsed = Template::parse(&text, self.pattern, with_key);
        parsed.map_err(|message| errors.add(at, &format!("{table}.{key}.path"), &message)).ok()
    }

    /// For a route with `unknown_outcome = "lookup"`, written at a place under a name: what is asked, and how long after the
    /// claim a "not executed" counts.
    pub(super) fn lookup(
        &self,
        wanted: (&At, &str),
        default_min_age: Duration,
        errors: &mut Errors,
    ) -> Option<(lookup::Options, Duration)> {
        let path = self.template("lookup", wanted, self.get(|q| &q.lookup_path), true, errors)?;
        let lists = |not_executed| OutcomeLists { final_: Some(Vec::new()), not_executed, unknown: Some(Vec::new()) };
        let written = self.get(|q| &q.not_executed);
        let statuses = written.as_ref().map(|(list, ..)| list.clone()).unwrap_or_default();
        let table = OutcomeTable::new(&lists(Some(Vec::new())), &lists(Some(statuses)));
        let not_executed = match (table, written) {
            (Ok(table), _) => table,
            (Err(messages), Some((_, at, table))) => {
                let entry = |message: &String| message.trim_start_matches("outcomes.not_executed: ").to_owned();
                let key = format!("{table}.lookup.not_executed");
                messages.iter().for_each(|message| errors.add(at, &key, &entry(message)));
                return None;
            }
            (Err(_), None) => return None,
        };
        let timeout = self.get(|q| &q.lookup_timeout).map_or(Duration::from_secs(5), |(timeout, ..)| timeout);
        let min_age = self.get(|q| &q.min_age).map_or(default_min_age, |(age, ..)| age);
        Some((lookup::Options { path, not_executed, timeout }, min_age))
    }

    /// For a route with `replay_auth = "probe"`, written at a place under a name.
    pub(super) fn probe(&self, wanted: (&At, &str), errors: &mut Errors) -> Option<probe::Options> {
        let path = self.template("probe", wanted, self.get(|q| &q.probe_path), false, errors)?;
        let cache = self.get(|q| &q.probe_cache).map_or(Duration::from_secs(30), |(cache, ..)| cache);
        let timeout = self.get(|q| &q.probe_timeout).map_or(Duration::from_secs(5), |(timeout, ..)| timeout);
        Some(probe::Options { path, cache, timeout })
    }
}
