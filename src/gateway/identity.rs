//! What makes a record's id, as noted in the store: a gateway whose settings would give existing keys other ids must not
//! start unnoticed, since every retry would be a new request to it.

use super::route::{Pattern, Segment};
use super::{MissingKey, Mode, RouteOptions};
use serde::{Deserialize, Serialize};

/// Version of the path normalisation and of the way in which scope parts are hashed.
const NORMALISATION: u32 = 1;

/// What makes the ids of one route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteIdentity {
    pattern: String,
    scope: Vec<String>,
    case_sensitive: bool,
    normalisation: u32,
    /// With derived keys, the settings of the fingerprint belong to it.
    derived: Option<u64>,
}

impl RouteIdentity {
    fn new(route: &RouteOptions) -> Self {
        Self {
            pattern: route.pattern.as_str().to_owned(),
            scope: route.scope.iter().map(ToString::to_string).collect(),
            case_sensitive: route.case_sensitive,
            normalisation: NORMALISATION,
            derived: (route.missing_key == MissingKey::Derive).then(|| route.fingerprint.id()),
        }
    }

    fn same_ids(&self, other: &Self) -> bool {
        let Self { pattern: _, scope, case_sensitive, normalisation, derived } = self;
        *scope == other.scope
            && *case_sensitive == other.case_sensitive
            && *normalisation == other.normalisation
            && *derived == other.derived
    }

    fn describe(&self) -> String {
        let case = if self.case_sensitive { "case sensitive" } else { "case folded" };
        let derived = self.derived.map_or(String::new(), |id| format!(", keys derived under fingerprint {id:016x}"));
        format!("scope [{}], {case}, normalisation {}{derived}", self.scope.join(", "), self.normalisation)
    }
}

/// The identities of all routes, in order.
#[must_use]
pub fn of(routes: &[RouteOptions]) -> Vec<RouteIdentity> {
    // A route that is only observed makes no ids.
    routes.iter().filter(|route| route.mode == Mode::Enforce).map(RouteIdentity::new).collect()
}

/// Compares today's identities with those that the store has noted. Returns what is to be noted from now on: today's, and
/// the earlier ones of routes that are configured no more.
///
/// # Errors
/// One sentence per route whose existing keys would get other ids.
pub fn compare(noted: &[RouteIdentity], today: &[RouteIdentity]) -> Result<Vec<RouteIdentity>, Vec<String>> {
    // Routes may overlap, the first one that matches counts: where nothing changed there is nothing to ask.
    if noted.starts_with(today) {
        return Ok(noted.to_vec());
    }
    let mut changes = Vec::new();
    let mut all = today.to_vec();
    for earlier in noted {
        let mut overlapping = today.iter().filter(|now| overlap(&earlier.pattern, &now.pattern)).peekable();
        if overlapping.peek().is_none() {
            all.push(earlier.clone());
        }
        for now in overlapping.filter(|now| !now.same_ids(earlier)) {
            changes.push(format!(
                "route {}: keys were made with {}; the configuration now says {} (route {})",
                earlier.pattern,
                earlier.describe(),
                now.describe(),
                now.pattern
            ));
        }
    }
    if changes.is_empty() { Ok(all) } else { Err(changes) }
}

/// Whether some path matches both patterns, case aside.
fn overlap(one: &str, other: &str) -> bool {
    let (Ok(one), Ok(other)) = (Pattern::parse(one), Pattern::parse(other)) else { return true };
    segments_overlap(one.segments(), other.segments())
}

fn segments_overlap(one: &[Segment], other: &[Segment]) -> bool {
    match (one.split_first(), other.split_first()) {
        (None, None) => true,
        (Some((Segment::Rest(_), _)), Some(_)) | (Some(_), Some((Segment::Rest(_), _))) => true,
        (Some((Segment::Literal(a), one)), Some((Segment::Literal(b), other))) => {
            a.eq_ignore_ascii_case(b) && segments_overlap(one, other)
        }
        (Some((_, one)), Some((_, other))) => segments_overlap(one, other),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(pattern: &str, scope: &[&str]) -> RouteIdentity {
        RouteIdentity {
            pattern: pattern.to_owned(),
            scope: scope.iter().map(|&part| part.to_owned()).collect(),
            case_sensitive: true,
            normalisation: NORMALISATION,
            derived: None,
        }
    }

    const SCOPE: &[&str] = &["authorization", "path"];

    #[test]
    fn a_changed_scope_is_told() {
        let noted = [route("/posts", SCOPE)];
        assert_eq!(compare(&noted, &noted).unwrap(), noted);
        let changes = compare(&noted, &[route("/posts", &["authorization"])]).unwrap_err();
        assert!(changes[0].contains("/posts") && changes[0].contains("[authorization, path]"), "{changes:?}");
        let folded = RouteIdentity { case_sensitive: false, ..route("/posts", SCOPE) };
        assert!(compare(&noted, &[folded]).is_err());
        let derived = RouteIdentity { derived: Some(1), ..route("/posts", SCOPE) };
        assert!(compare(&noted, &[derived]).is_err());
    }

    #[test]
    fn a_route_that_is_only_observed_has_no_identity() {
        let enforced = super::super::test_support::route_options(&[super::super::scope::Part::Authorization]);
        let observed = RouteOptions { mode: Mode::Observe, ..enforced.clone() };
        assert_eq!(of(&[observed, enforced.clone()]), of(&[enforced]));
    }

    #[test]
    fn new_routes_are_free_and_old_ones_are_remembered() {
        let noted = [route("/posts", SCOPE)];
        let today = [route("/mails", &["host", "authorization"])];
        let all = compare(&noted, &today).unwrap();
        assert_eq!(all, [today[0].clone(), noted[0].clone()]);
        assert!(compare(&all, &[route("/posts", &["authorization"])]).is_err(), "coming back with another scope");
        assert!(compare(&[], &noted).is_ok());
    }

    #[test]
    fn a_route_that_takes_paths_from_another_must_agree_with_it() {
        let noted = [route("/v1/{workspace}/posts", SCOPE)];
        assert!(compare(&noted, &[route("/v1/{*rest}", SCOPE)]).is_ok());
        assert!(compare(&noted, &[route("/v1/{*rest}", &["authorization"])]).is_err());
        assert!(compare(&noted, &[route("/{ws}/posts", &["authorization"])]).is_ok());
        assert!(compare(&noted, &[route("/V1/{ws}/{x}", &["authorization"])]).is_err());
    }
}
