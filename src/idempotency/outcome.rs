//! The outcome table: which response statuses are final, not executed, or unknown.
//!
//! An entry is a status (`503`), ten of them (`50x`) or a hundred (`5xx`), each optionally with `+retry-after`: then it
//! names only responses that bear `Retry-After`. Of the entries that name a response the one with the most digits
//! decides, and of two with the same digits the one with the suffix: `503+retry-after` beats `503` beats
//! `50x+retry-after` beats `50x` beats `5xx+retry-after` beats `5xx`.

use std::collections::BTreeMap;

/// What a complete response says about the execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    Final,
    NotExecuted,
    Unknown,
}

/// One table's three lists, as written in a configuration; `None`: the list was not written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutcomeLists {
    pub final_: Option<Vec<String>>,
    pub not_executed: Option<Vec<String>>,
    pub unknown: Option<Vec<String>>,
}

impl OutcomeLists {
    /// The lists that hold where a configuration writes none.
    #[must_use]
    pub fn built_in() -> Self {
        let list = |entries: &[&str]| Some(entries.iter().map(ToString::to_string).collect());
        Self {
            final_: list(&["500", "501", "505"]),
            not_executed: list(&["307", "308", "401", "403", "407", "421", "425", "429", "503+retry-after"]),
            unknown: list(&["408", "5xx"]),
        }
    }

    fn lists(&self) -> [(&'static str, Class, &Option<Vec<String>>); 3] {
        [
            ("final", Class::Final, &self.final_),
            ("not_executed", Class::NotExecuted, &self.not_executed),
            ("unknown", Class::Unknown, &self.unknown),
        ]
    }

    /// Its entries; what is wrong is added to `errors`, each message beginning with `place` and the list's name.
    fn parse(&self, place: &str, errors: &mut Vec<String>) -> BTreeMap<Entry, Class> {
        let mut entries = BTreeMap::new();
        for (name, class, list) in self.lists() {
            for text in list.iter().flatten() {
                let Some(entry) = Entry::parse(text) else {
                    errors.push(format!(
                        "{place}{name}: {text:?} is no entry; write a status from 200 to 599 such as \"503\", \"50x\" or \
                         \"5xx\", optionally followed by \"+retry-after\""
                    ));
                    continue;
                };
                if entries.insert(entry, class).is_some_and(|other| other != class) {
                    errors.push(format!("{place}{name}: {text:?} stands in another list of the same table, too"));
                }
            }
        }
        entries
    }
}

/// The statuses from `first` to `first + span - 1`. The derived order is the order of precedence, the most specific
/// first: fewest statuses, then the suffix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    /// 1, 10 or 100 statuses.
    span: u16,
    without_suffix: bool,
    first: u16,
}

impl Entry {
    fn parse(text: &str) -> Option<Self> {
        let (status, without_suffix) = match text.strip_suffix("+retry-after") {
            Some(status) => (status, false),
            None => (text, true),
        };
        let &[hundreds @ b'2'..=b'5', tens, ones] = status.as_bytes() else { return None };
        let digit = |ascii: u8| u16::from(ascii - b'0');
        let hundreds = digit(hundreds) * 100;
        let (span, first) = match (tens, ones) {
            (b'x', b'x') => (100, hundreds),
            (b'0'..=b'9', b'x') => (10, hundreds + digit(tens) * 10),
            (b'0'..=b'9', b'0'..=b'9') => (1, hundreds + digit(tens) * 10 + digit(ones)),
            _ => return None,
        };
        Some(Self { span, without_suffix, first })
    }

    fn names(self, status: u16, retry_after: bool) -> bool {
        (self.first..self.first + self.span).contains(&status) && (self.without_suffix || retry_after)
    }
}

/// A route's resolved outcome table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutcomeTable {
    /// In order of precedence: the first that names a response decides.
    entries: Vec<(Entry, Class)>,
}

impl OutcomeTable {
    /// Merges the built-in lists, `[idempotency.outcomes]` and the route's own `outcomes`.
    ///
    /// A built-in list is dropped where one of the two writes that list. What an entry of `route` names is decided there,
    /// else by `general`, else by the built-in lists; within one table the more specific entry decides.
    ///
    /// # Errors
    /// One message per entry that is malformed or stands in two lists of one table. A message about `general` begins with
    /// `[idempotency.outcomes] `, one about `route` with `outcomes.`, then comes the list's name.
    pub fn new(general: &OutcomeLists, route: &OutcomeLists) -> Result<Self, Vec<String>> {
        let mut errors = Vec::new();
        let mut built_in = OutcomeLists::built_in();
        if general.final_.is_some() || route.final_.is_some() {
            built_in.final_ = None;
        }
        if general.not_executed.is_some() || route.not_executed.is_some() {
            built_in.not_executed = None;
        }
        if general.unknown.is_some() || route.unknown.is_some() {
            built_in.unknown = None;
        }
        let general = general.parse("[idempotency.outcomes] ", &mut errors);
        let route = route.parse("outcomes.", &mut errors);
        let built_in = built_in.parse("", &mut errors);
        let entries = route.into_iter().chain(general).chain(built_in).collect();
        if errors.is_empty() { Ok(Self { entries }) } else { Err(errors) }
    }

    /// Classifies a response by its status and whether it bears `Retry-After`. A status that no entry names is final.
    #[must_use]
    pub fn classify(&self, status: u16, retry_after: bool) -> Class {
        self.entries
            .iter()
            .find(|(entry, _)| entry.names(status, retry_after))
            .map_or(Class::Final, |(_, class)| *class)
    }
}

impl Default for OutcomeTable {
    fn default() -> Self {
        Self { entries: OutcomeLists::built_in().parse("", &mut Vec::new()).into_iter().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[&str]) -> Option<Vec<String>> {
        Some(entries.iter().map(ToString::to_string).collect())
    }

    fn table(general: OutcomeLists, route: OutcomeLists) -> OutcomeTable {
        OutcomeTable::new(&general, &route).unwrap()
    }

    #[test]
    fn every_status_has_the_promised_default() {
        let written_out = table(OutcomeLists::default(), OutcomeLists::default());
        assert_eq!(written_out, OutcomeTable::default());
        for status in 200..=599 {
            for retry_after in [false, true] {
                let expected = match status {
                    307 | 308 | 401 | 403 | 407 | 421 | 425 | 429 => Class::NotExecuted,
                    503 if retry_after => Class::NotExecuted,
                    408 | 502 | 503 | 504 | 506.. => Class::Unknown,
                    _ => Class::Final,
                };
                assert_eq!(OutcomeTable::default().classify(status, retry_after), expected, "{status} {retry_after}");
            }
        }
    }

    #[test]
    fn statuses_outside_the_table_are_final() {
        let all = table(
            OutcomeLists { unknown: list(&["2xx", "3xx", "4xx", "5xx"]), ..Default::default() },
            Default::default(),
        );
        for status in [0, 100, 199, 600, 999, u16::MAX] {
            assert_eq!(all.classify(status, true), Class::Final, "{status}");
        }
    }

    #[test]
    fn the_more_specific_entry_decides() {
        let order = ["503+retry-after", "503", "50x+retry-after", "50x", "5xx+retry-after", "5xx"];
        for (at, winner) in order.iter().enumerate() {
            let lists = OutcomeLists {
                final_: list(&[]),
                not_executed: list(&[winner]),
                unknown: list(order.get(at + 1..).unwrap()),
            };
            let table = table(OutcomeLists::default(), lists);
            assert_eq!(table.classify(503, true), Class::NotExecuted, "{winner}");
            let suffixed = winner.ends_with("+retry-after");
            assert_eq!(table.classify(503, false) == Class::NotExecuted, !suffixed, "{winner}");
        }
    }

    #[test]
    fn ten_and_a_hundred_end_where_they_say() {
        let lists = OutcomeLists { not_executed: list(&["41x", "2xx"]), ..Default::default() };
        let table = table(lists, OutcomeLists::default());
        let named: Vec<u16> = (0..1000).filter(|status| table.classify(*status, false) == Class::NotExecuted).collect();
        let expected: Vec<u16> = (200..300).chain(410..420).collect();
        assert_eq!(named, expected);
    }

    #[test]
    fn a_written_list_replaces_that_default_list_alone() {
        let general = OutcomeLists { final_: list(&[]), ..Default::default() };
        let route = OutcomeLists { not_executed: list(&["409"]), ..Default::default() };
        let table = table(general, route);
        assert_eq!(table.classify(500, false), Class::Unknown, "no longer named by `final`, but still by `5xx`");
        assert_eq!(table.classify(429, false), Class::Final, "the default `not_executed` is gone");
        assert_eq!(table.classify(503, true), Class::Unknown);
        assert_eq!(table.classify(409, false), Class::NotExecuted);
        assert_eq!(table.classify(408, false), Class::Unknown, "the default `unknown` stays");
    }

    #[test]
    fn a_routes_entry_beats_the_general_one_and_that_the_default() {
        let general = OutcomeLists { final_: list(&["5xx", "404"]), ..Default::default() };
        let beats_default = table(general.clone(), OutcomeLists::default());
        assert_eq!(beats_default.classify(502, false), Class::Final);
        assert_eq!(beats_default.classify(408, false), Class::Unknown);

        let route = OutcomeLists { unknown: list(&["404"]), ..Default::default() };
        let table = table(general, route);
        assert_eq!(table.classify(404, false), Class::Unknown);
        assert_eq!(
            table.classify(502, false),
            Class::Final,
            "the general list goes on where the route does not contradict"
        );
        assert_eq!(table.classify(408, false), Class::Final, "the default `unknown` is gone");
    }

    #[test]
    fn a_coarser_entry_of_a_nearer_table_decides() {
        let general = OutcomeLists { final_: list(&["502"]), not_executed: list(&["4xx"]), ..Default::default() };
        let route = OutcomeLists { unknown: list(&["50x"]), ..Default::default() };
        let table = table(general, route);
        assert_eq!(table.classify(502, false), Class::Unknown, "the route's 50x before the general 502");
        assert_eq!(table.classify(408, false), Class::NotExecuted, "the general 4xx before a default");
    }

    #[test]
    fn malformed_entries_are_all_reported() {
        let malformed = [
            "",
            "5",
            "50",
            "5000",
            "5x0",
            "xxx",
            "x00",
            "5XX",
            "100",
            "1xx",
            "199",
            "600",
            "6xx",
            "+50",
            "-50",
            " 503",
            "503 ",
            "503+Retry-After",
            "503+",
            "503+retry-after+retry-after",
            "+retry-after",
            "5:0",
            "50/",
            "٥٠٣",
        ];
        let lists = OutcomeLists { unknown: list(&malformed), ..Default::default() };
        let errors = OutcomeTable::new(&lists, &OutcomeLists::default()).unwrap_err();
        assert_eq!(errors.len(), malformed.len());
        for (error, entry) in errors.iter().zip(malformed) {
            assert!(error.starts_with(&format!("[idempotency.outcomes] unknown: {entry:?} ")), "{error}");
        }
    }

    #[test]
    fn one_entry_in_two_lists_of_a_table_is_an_error() {
        let twice = OutcomeLists {
            final_: list(&["200", "503", "5xx"]),
            not_executed: list(&["503", "503+retry-after"]),
            unknown: list(&["5xx", "50x", "50x"]),
        };
        let errors = OutcomeTable::new(&twice, &twice).unwrap_err();
        let starts = [
            "[idempotency.outcomes] not_executed: \"503\"",
            "[idempotency.outcomes] unknown: \"5xx\"",
            "outcomes.not_executed: \"503\"",
            "outcomes.unknown: \"5xx\"",
        ];
        assert_eq!(errors.len(), starts.len(), "{errors:?}");
        for (error, start) in errors.iter().zip(starts) {
            assert!(error.starts_with(start), "{error}");
        }
    }
}
