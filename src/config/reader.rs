//! A TOML tree in which every value knows where it came from, and typed readers that collect errors.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum At {
    Line(usize),
    Variable(String),
    Flag(&'static str),
    /// Nowhere: the default.
    Nowhere,
}

/// Errors as they are found.
pub(super) struct Errors {
    file: String,
    found: Vec<(usize, String)>,
}

impl Errors {
    pub(super) fn new(file: &str) -> Self {
        Self { file: file.to_owned(), found: Vec::new() }
    }

    pub(super) fn add(&mut self, at: &At, key: &str, message: &str) {
        let (line, place) = match at {
            At::Line(line) => (*line, format!("{}:{line}: ", self.file)),
            At::Variable(name) => (usize::MAX, format!("{name}: ")),
            At::Flag(name) => (usize::MAX, format!("{name}: ")),
            At::Nowhere if self.file.is_empty() => (usize::MAX, String::new()),
            At::Nowhere => (usize::MAX, format!("{}: ", self.file)),
        };
        self.found.push((line, format!("{place}{key}: {message}")));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// How many have been found: whoever sees it grow knows that what was read is wrong.
    pub(super) fn count(&self) -> usize {
        self.found.len()
    }

    /// In the order of the file, each once: what stands in `[idempotency]` is judged for every route.
    pub(super) fn into_lines(mut self) -> Vec<String> {
        self.found.sort_by_key(|(line, _)| *line);
        let mut seen = BTreeSet::new();
        self.found.into_iter().map(|(_, text)| text).filter(|text| seen.insert(text.clone())).collect()
    }
}

#[derive(Clone, Debug)]
pub(super) enum Value {
    String(String),
    Integer(i64),
    Boolean(bool),
    Array(Vec<Node>),
    Table(BTreeMap<String, Node>),
    /// A float or a date: no key of ours.
    Other(&'static str),
}

/// A value and where it was written.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) at: At,
    /// The text of a variable that looks like a TOML number, boolean or date, but may be meant as a bare string.
    bare: Option<String>,
}

impl Node {
    fn new(value: Value, at: At) -> Self {
        Self { value, at, bare: None }
    }

    pub(super) fn string(text: &str, at: At) -> Self {
        Self::new(Value::String(text.to_owned()), at)
    }

    pub(super) fn empty_table() -> Self {
        Self::new(Value::Table(BTreeMap::new()), At::Nowhere)
    }

    /// Puts a value in at a path, making tables on the way.
    pub(super) fn set(&mut self, path: &[&str], node: Self, errors: &mut Errors) {
        // Far beyond any key of ours. A tree as deep as a variable's name is long would overflow the stack.
        const STEPS_MAX: usize = 16;
        if path.len() > STEPS_MAX {
            errors.add(&node.at, &path.join("."), "there is no such key");
            return;
        }
        let mut place = self;
        for step in path {
            let Value::Table(table) = &mut place.value else {
                errors.add(&node.at, &path.join("."), "there is no such key: what it would be part of is no table");
                return;
            };
            let table_here = || Self::new(Value::Table(BTreeMap::new()), node.at.clone());
            place = table.entry((*step).to_owned()).or_insert_with(table_here);
        }
        *place = node;
    }
}

/// Parses a file.
pub(super) fn parse_document(text: &str, errors: &mut Errors) -> Node {
    let (table, failures) = DeTable::parse_recoverable(text);
    for failure in failures {
        let at = failure.span().map_or(At::Nowhere, |span| At::Line(line_of(text, span.start)));
        errors.add(&at, "TOML", failure.message());
    }
    let place = |start| At::Line(line_of(text, start));
    Node::new(Value::Table(convert_table(table.get_ref(), &place)), At::Nowhere)
}

/// Parses the value of a variable: TOML, or else a bare string.
pub(super) fn parse_value(text: &str, at: &At) -> Node {
    let document = format!("value = {text}");
    let parsed = DeTable::parse(&document).ok().filter(|table| table.get_ref().len() == 1);
    let value = parsed.and_then(|table| Some(convert(table.get_ref().get("value")?, &|_| at.clone())));
    let mut node = value.unwrap_or_else(|| Node::string(text, at.clone()));
    if matches!(node.value, Value::Integer(_) | Value::Boolean(_) | Value::Other(_)) {
        node.bare = Some(text.to_owned());
    }
    node
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

fn convert(value: &Spanned<DeValue<'_>>, place: &impl Fn(usize) -> At) -> Node {
    let converted = match value.get_ref() {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::Integer(number),
            Err(_) => Value::Other("an integer out of range"),
        },
        DeValue::Boolean(value) => Value::Boolean(*value),
        DeValue::Array(items) => Value::Array(items.iter().map(|item| convert(item, place)).collect()),
        DeValue::Table(table) => Value::Table(convert_table(table, place)),
        DeValue::Float(_) => Value::Other("a float"),
        DeValue::Datetime(_) => Value::Other("a date"),
    };
    Node::new(converted, place(value.span().start))
}

fn convert_table(table: &DeTable<'_>, place: &impl Fn(usize) -> At) -> BTreeMap<String, Node> {
    let entries = table.iter().map(|(key, value)| {
        let mut node = convert(value, place);
        // A table's own span may be its header; the key's line is where a reader looks.
        node.at = place(key.span().start);
        (key.get_ref().to_string(), node)
    });
    entries.collect()
}

/// A table that is read key by key; what is left at the end is unknown.
pub(super) struct Section<'e> {
    name: String,
    table: BTreeMap<String, Node>,
    known: Vec<&'static str>,
    pub(super) errors: &'e mut Errors,
}

impl<'e> Section<'e> {
    pub(super) fn new(name: &str, node: Option<Node>, errors: &'e mut Errors) -> Self {
        let table = match node {
            None => BTreeMap::new(),
            Some(Node { value: Value::Table(table), .. }) => table,
            Some(Node { at, .. }) => {
                errors.add(&at, name, "must be a table");
                BTreeMap::new()
            }
        };
        Self { name: name.to_owned(), table, known: Vec::new(), errors }
    }

    pub(super) fn key(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }

    pub(super) fn take(&mut self, key: &'static str) -> Option<Node> {
        self.known.push(key);
        self.table.remove(key)
    }

    /// Where a key stands, while it has not been read.
    pub(super) fn at(&self, key: &str) -> At {
        self.table.get(key).map_or(At::Nowhere, |node| node.at.clone())
    }

    pub(super) fn add(&mut self, at: &At, key: &str, message: &str) {
        let key = self.key(key);
        self.errors.add(at, &key, message);
    }

    /// Reads a key with `parse`, which says what would be right.
    pub(super) fn read<T>(&mut self, key: &'static str, parse: impl Fn(&Value) -> Result<T, String>) -> Option<T> {
        let node = self.take(key)?;
        let parsed = parse(&node.value);
        match parsed.or_else(|message| node.bare.and_then(|text| parse(&Value::String(text)).ok()).ok_or(message)) {
            Ok(value) => Some(value),
            Err(message) => {
                self.add(&node.at, key, &message);
                None
            }
        }
    }

    /// Reads a list, item by item: each bad one is an error at its own line.
    pub(super) fn read_list<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&Value) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        let node = self.take(key)?;
        let Value::Array(items) = node.value else {
            self.add(&node.at, key, &format!("must be a list, not {}", kind(&node.value)));
            return None;
        };
        let before = self.errors.count();
        let mut parsed = Vec::new();
        for item in items {
            match parse(&item.value) {
                Ok(value) => parsed.push(value),
                Err(message) => self.add(&item.at, key, &message),
            }
        }
        (self.errors.count() == before).then_some(parsed)
    }

    /// As [`Section::read_list`], where a single item may stand without its list.
    pub(super) fn read_one_or_more<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&Value) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        if let Some(node) = self.table.get_mut(key)
            && !matches!(node.value, Value::Array(_))
        {
            let at = node.at.clone();
            let item = std::mem::replace(node, Node::new(Value::Array(Vec::new()), at));
            if let Value::Array(items) = &mut node.value {
                items.push(item);
            }
        }
        self.read_list(key, parse)
    }

    /// Everything that was not asked for is an error.
    pub(super) fn finish(self) {
        for (key, node) in &self.table {
            let near = self.known.iter().map(|known| (distance(key, known), *known)).min();
            let message = match near {
                Some((far, near)) if far <= 1 + near.len() / 4 => format!("there is no such key; did you mean {near}?"),
                _ => format!("there is no such key; there are: {}", self.known.join(", ")),
            };
            let name = if self.name.is_empty() { key.clone() } else { format!("{}.{key}", self.name) };
            self.errors.add(&node.at, &name, &message);
        }
    }
}

/// Edits between two words (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let other = other.as_bytes();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.bytes().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        if let Some(first) = row.first_mut() {
            *first = left;
        }
        for (b, cell) in other.iter().zip(row.iter_mut().skip(1)) {
            let next = (diagonal + usize::from(a != *b)).min(left + 1).min(*cell + 1);
            diagonal = *cell;
            *cell = next;
            left = next;
        }
    }
    row.last().copied().unwrap_or(0)
}

pub(super) fn string(value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        other => Err(format!("must be a string, not {}", kind(other))),
    }
}

pub(super) fn boolean(value: &Value) -> Result<bool, String> {
    match value {
        Value::Boolean(value) => Ok(*value),
        other => Err(format!("must be true or false, not {}", kind(other))),
    }
}

/// A count from `min` to `max`.
pub(super) fn count(min: usize, max: usize) -> impl Fn(&Value) -> Result<usize, String> {
    move |value| match value {
        Value::Integer(number) => match usize::try_from(*number) {
            Ok(number) if (min..=max).contains(&number) => Ok(number),
            Ok(number) if number > max => Err(format!("must be {max} or less, not {number}")),
            _ => Err(format!("must be {min} or more, not {number}")),
        },
        other => Err(format!("must be an integer, not {}", kind(other))),
    }
}

/// A duration from `min` on; it has a unit, or is not one.
pub(super) fn duration(min: Duration) -> impl Fn(&Value) -> Result<Duration, String> {
    move |value| {
        let Value::String(text) = value else {
            return Err(format!(
                "must be a duration with its unit, such as \"250ms\", \"30s\" or \"24h\", not {}",
                kind(value)
            ));
        };
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(unit_at);
        let factor = match unit {
            "ms" => 1_u64,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(format!("{text:?} is no duration; write a number and ms, s, m, h or d, such as \"30s\"")),
        };
        let ms = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
        match ms.filter(|ms| *ms <= DURATION_MS_MAX).map(Duration::from_millis) {
            Some(duration) if duration >= min => Ok(duration),
            Some(_) => Err(format!("must be at least {}ms, not {text:?}", min.as_millis())),
            None => Err(format!("{text:?} is no duration of up to 100 years; write one such as \"30s\"")),
        }
    }
}

const DURATION_MS_MAX: u64 = 100 * 366 * 86_400_000;

/// A size in bytes from `min` on.
pub(super) fn size(min: u64) -> impl Fn(&Value) -> Result<u64, String> {
    move |value| {
        let bytes = match value {
            Value::Integer(number) => u64::try_from(*number).ok(),
            Value::String(text) => {
                let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
                let (number, unit) = text.split_at(unit_at);
                let shift = match unit {
                    "" | "B" => 0,
                    "KiB" => 10,
                    "MiB" => 20,
                    "GiB" => 30,
                    "TiB" => 40,
                    _ => {
                        return Err(format!(
                            "{text:?} is no size; write a number and B, KiB, MiB or GiB, such as \"64KiB\""
                        ));
                    }
                };
                number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift))
            }
            other => return Err(format!("must be a size such as \"64KiB\", not {}", kind(other))),
        };
        match bytes.filter(|bytes| *bytes <= i64::MAX.unsigned_abs()) {
            Some(bytes) if bytes >= min => Ok(bytes),
            Some(bytes) => Err(format!("must be at least {min} bytes, not {bytes}")),
            None => Err("is no size; write one such as \"64KiB\"".to_owned()),
        }
    }
}

/// One of a few words.
pub(super) fn choice<T: Copy>(words: &[(&str, T)]) -> impl Fn(&Value) -> Result<T, String> {
    move |value| {
        let text = string(value)?;
        let found = words.iter().find(|(word, _)| *word == text);
        let all = || words.iter().map(|(word, _)| format!("{word:?}")).collect::<Vec<_>>().join(", ");
        found.map(|(_, meaning)| *meaning).ok_or_else(|| format!("{text:?} is none of {}", all()))
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "an integer",
        Value::Boolean(_) => "a boolean",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
        Value::Other(kind) => kind,
    }
}
