//! Which records: conditions as an operator writes them, and the pages in which the gateway lists what meets them.

use super::client::{Client, Failure};
use serde_json::Value;
use std::collections::HashMap;
use std::str::FromStr;

/// Records that the gateway lists at once, at most.
const PAGE_MAX: usize = 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum State {
    Claimed,
    Completed,
    Unknown,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Claimed => "claimed",
            Self::Completed => "completed",
            Self::Unknown => "unknown",
        }
    }
}

/// The conditions of `--match`: `status=502,route=/posts,since=2h`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Match {
    state: Option<State>,
    conditions: Vec<(&'static str, String)>,
}

const NAMES: [&str; 5] = ["status", "route", "key", "since", "until"];

impl FromStr for Match {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut all = Self { state: None, conditions: Vec::new() };
        for condition in text.split(',') {
            let (name, value) = condition.split_once('=').filter(|(_, value)| !value.is_empty()).ok_or_else(|| {
                format!("{condition:?} is no condition; write NAME=VALUE, several with commas between them")
            })?;
            if name == "state" {
                let state = clap::ValueEnum::from_str(value, false).map_err(|_: String| {
                    format!("there is no state {value:?}; there are: claimed, completed, unknown")
                })?;
                if all.state.replace(state).is_some() {
                    return Err("state stands twice".to_owned());
                }
                continue;
            }
            let known = NAMES.into_iter().find(|known| *known == name);
            let Some(name) = known else {
                return Err(format!("there is no condition {name:?}; there are: state, {}", NAMES.join(", ")));
            };
            if name == "status" && !(value.len() == 3 && value.bytes().all(|byte| byte.is_ascii_digit())) {
                return Err(format!("{value:?} is no HTTP status"));
            }
            if all.conditions.iter().any(|(earlier, _)| *earlier == name) {
                return Err(format!("{name} stands twice"));
            }
            all.conditions.push((name, value.to_owned()));
        }
        Ok(all)
    }
}

/// One listing.
pub(super) struct Selected {
    conditions: Vec<(&'static str, String)>,
}

impl Selected {
    fn in_state(state: Option<State>, conditions: Vec<(&'static str, String)>) -> Self {
        let state = state.map(|state| ("state", state.name().to_owned()));
        Self { conditions: state.into_iter().chain(conditions).collect() }
    }

    /// # Errors
    /// If the state is said twice.
    pub(super) fn new(state: Option<State>, matching: Option<Match>) -> Result<Self, Failure> {
        let matching = matching.unwrap_or(Match { state: None, conditions: Vec::new() });
        match (state, matching.state) {
            (Some(_), Some(_)) => Err(Failure::Usage("--state and a state in --match exclude each other".to_owned())),
            (one, other) => Ok(Self::in_state(one.or(other), matching.conditions)),
        }
    }

    pub(super) fn with_key(state: Option<State>, key: &str) -> Self {
        Self::in_state(state, vec![("key", key.to_owned())])
    }

    /// Listings of all that an act finds in these states.
    ///
    /// # Errors
    /// If the conditions ask for another state.
    pub(super) fn for_act(states: &[State], matching: &Match) -> Result<Vec<Self>, Failure> {
        let selected = match matching.state {
            None => states.to_vec(),
            Some(state) if states.contains(&state) => vec![state],
            Some(state) => {
                let names = states.iter().map(|state| state.name()).collect::<Vec<_>>().join(" and ");
                let wrong = state.name();
                return Err(Failure::Usage(format!("this is done to {names} records only, never to {wrong} ones")));
            }
        };
        Ok(selected.into_iter().map(|state| Self::in_state(Some(state), matching.conditions.clone())).collect())
    }

    /// Lists page by page, until there are `limit` records or no more.
    pub(super) async fn find(
        &self,
        client: &mut Client,
        mut after: Option<String>,
        limit: Option<usize>,
    ) -> Result<Found, Failure> {
        let mut found = Found::default();
        loop {
            let wanted = limit.map_or(PAGE_MAX, |limit| limit.saturating_sub(found.records.len()).min(PAGE_MAX));
            if wanted == 0 {
                found.next = after;
                return Ok(found);
            }
            let wanted = wanted.to_string();
            let mut query: Vec<_> = self.conditions.iter().map(|(name, value)| (*name, value.as_str())).collect();
            query.push(("limit", &wanted));
            query.extend(after.as_deref().map(|after| ("after", after)));
            let mut page = client.call(http::Method::GET, "/records", &query, None).await?;
            let (records, next) = (page.get_mut("records").map(Value::take), page.get_mut("next").map(Value::take));
            let next = match (records, next) {
                (Some(Value::Array(records)), Some(next)) => {
                    found.merge(records);
                    next
                }
                _ => return Err(client.no_gateway()),
            };
            after = match next {
                Value::Null => return Ok(found),
                Value::String(next) if after.as_ref() != Some(&next) => Some(next),
                _ => return Err(client.no_gateway()),
            };
        }
    }
}

/// Records, each of them once: what has changed while it was listed may be met twice.
#[derive(Default)]
pub(super) struct Found {
    pub(super) records: Vec<Value>,
    pub(super) next: Option<String>,
    places: HashMap<String, usize>,
}

impl Found {
    pub(super) fn merge(&mut self, records: Vec<Value>) {
        for record in records {
            let id = record.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
            let earlier = self.places.get(&id).and_then(|at| self.records.get_mut(*at));
            match earlier {
                Some(earlier) => *earlier = record,
                None => {
                    self.places.insert(id, self.records.len());
                    self.records.push(record);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn conditions_are_read_and_nonsense_is_refused() {
        let read = "status=502,route=/v1/{w}/posts,since=2h,state=unknown,key=a=b".parse::<Match>().unwrap();
        assert_eq!(read.state, Some(State::Unknown));
        let expected = [("status", "502"), ("route", "/v1/{w}/posts"), ("since", "2h"), ("key", "a=b")];
        assert_eq!(read.conditions, expected.map(|(name, value)| (name, value.to_owned())));
        for wrong in [
            "",
            ",",
            "status",
            "status=",
            "status=5xx",
            "status=50",
            "stat=502",
            "status=502,",
            "state=new",
            "State=unknown",
            "status=502,status=503",
            "state=unknown,state=unknown",
            "=x",
            "limit=1",
            "after=3",
        ] {
            assert!(wrong.parse::<Match>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_act_finds_only_what_it_may_be_done_to() {
        let all = |text: &str, states: &[State]| {
            let selected = Selected::for_act(states, &text.parse().unwrap()).ok()?;
            Some(selected.into_iter().map(|one| one.conditions).collect::<Vec<_>>())
        };
        let conditions = |state: &str| vec![("state", state.to_owned()), ("status", "502".to_owned())];
        let (resolve, forget) = ([State::Unknown], [State::Unknown, State::Completed]);
        assert_eq!(all("status=502", &resolve), Some(vec![conditions("unknown")]));
        assert_eq!(all("status=502", &forget), Some(vec![conditions("unknown"), conditions("completed")]));
        assert_eq!(all("status=502,state=completed", &forget), Some(vec![conditions("completed")]));
        assert_eq!(all("status=502,state=completed", &resolve), None);
        assert_eq!(all("state=claimed", &forget), None);
    }

    #[test]
    fn what_is_met_twice_is_shown_once_as_it_was_last() {
        let mut found = Found::default();
        found.merge(vec![json!({ "id": "a", "token": "1" }), json!({ "id": "b", "token": "2" })]);
        found.merge(vec![json!({ "id": "a", "token": "3" }), json!({ "id": "c", "token": "4" })]);
        let tokens = found.records.iter().map(|record| record["token"].as_str().unwrap()).collect::<Vec<_>>();
        assert_eq!(tokens, ["3", "2", "4"]);
    }
}
