//! Which requests are intercepted.

/// A path pattern: `/posts`, `/v1/{name}/posts` (one segment), `/v1/{*rest}` (all that remains, one segment or more).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    segments: Vec<Segment>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Segment {
    Literal(Vec<u8>),
    One(String),
    Rest(String),
}

impl Pattern {
    /// Parses a pattern.
    ///
    /// # Errors
    /// Says what is wrong with it and what would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |what: &str| format!("{text:?} is no path pattern: {what}");
        let Some(rest) = text.strip_prefix('/') else { return Err(wrong("it must begin with a slash")) };
        if text.contains(['?', '#', '\\', ';']) || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(wrong("write a plain path, other characters percent-encoded"));
        }
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let mut segments = Vec::new();
        for part in rest.split('/') {
            if matches!(segments.last(), Some(Segment::Rest(_))) {
                return Err(wrong("{*name} takes all that remains, so it must come last"));
            }
            segments.push(segment(part).map_err(|what| wrong(&what))?);
        }
        let pattern = Self { text: text.to_owned(), segments };
        let mut names = pattern.params().collect::<Vec<_>>();
        names.sort_unstable();
        if names.windows(2).any(|pair| pair.first() == pair.last()) {
            return Err(wrong("it names a parameter twice"));
        }
        Ok(pattern)
    }

    /// The pattern as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// What it matches, whatever its parameters are called: two patterns of one shape match the same paths.
    pub(crate) fn shape(&self, fold_case: bool) -> Vec<Option<Vec<u8>>> {
        let rest = Some(b"*/".to_vec());
        let shape = |segment: &Segment| match segment {
            Segment::Literal(literal) if fold_case => Some(literal.to_ascii_lowercase()),
            Segment::Literal(literal) => Some(literal.clone()),
            Segment::One(_) => None,
            Segment::Rest(_) => rest.clone(),
        };
        self.segments.iter().map(shape).collect()
    }

    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The names of its parameters.
    pub fn params(&self) -> impl Iterator<Item = &str> {
        self.segments.iter().filter_map(|segment| match segment {
            Segment::Literal(_) => None,
            Segment::One(name) | Segment::Rest(name) => Some(name.as_str()),
        })
    }
}

fn segment(part: &str) -> Result<Segment, String> {
    if let Some(name) = part.strip_prefix('{').and_then(|part| part.strip_suffix('}')) {
        let (name, rest) = name.strip_prefix('*').map_or((name, false), |name| (name, true));
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-') {
            return Err(format!("{{{name}}} is no parameter; write {{name}} or {{*name}}"));
        }
        return Ok(if rest { Segment::Rest(name.to_owned()) } else { Segment::One(name.to_owned()) });
    }
    if part.contains(['{', '}']) {
        return Err("a parameter takes a whole segment; braces elsewhere are written %7B and %7D".to_owned());
    }
    match super::path::decode(part.as_bytes()) {
        literal if literal.is_empty() => Err("it has an empty segment".to_owned()),
        literal if literal == b"." || literal == b".." => Err("it has a dot segment".to_owned()),
        literal => Ok(Segment::Literal(literal)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        let pattern = Pattern::parse("/v1/{ws}/caf%C3%A9/{*rest}").unwrap();
        assert_eq!(pattern.params().collect::<Vec<_>>(), ["ws", "rest"]);
        assert_eq!(pattern.segments()[2], Segment::Literal("café".as_bytes().to_vec()));
        assert_eq!(Pattern::parse("/posts/").unwrap().segments(), Pattern::parse("/posts").unwrap().segments());
        for (wrong, what) in [
            ("posts", "slash"),
            ("/", "empty"),
            ("//posts", "empty"),
            ("/a/../b", "dot"),
            ("/%2e%2e/b", "dot"),
            ("/{*rest}/b", "last"),
            ("/{a}/{a}", "twice"),
            ("/x{a}", "whole"),
            ("/{}", "parameter"),
            ("/a?b", "plain"),
            ("/a b", "plain"),
            ("", "slash"),
        ] {
            let message = Pattern::parse(wrong).unwrap_err();
            assert!(message.contains(what), "{wrong}: {message}");
        }
    }

    #[test]
    fn shapes_ignore_names_and_case_where_told() {
        let shape = |text: &str, fold| Pattern::parse(text).unwrap().shape(fold);
        assert_eq!(shape("/a/{x}", false), shape("/a/{y}", false));
        assert_ne!(shape("/a/{x}", false), shape("/A/{x}", false));
        assert_eq!(shape("/a/{x}", true), shape("/A/{x}", true));
        assert_ne!(shape("/a/{x}", true), shape("/a/{*x}", true));
    }
}
