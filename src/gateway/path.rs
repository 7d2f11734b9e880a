//! Paths: the normalised reading of a target, and the other readings that some upstreams use.

use super::route::{Pattern, Segment};
use std::collections::BTreeSet;

/// A normalised path: its segments, fully decoded, without dot segments and empty ones. A slash that was escaped stays
/// inside its segment, so two paths that an upstream tells apart never look the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NormalPath {
    pub segments: Vec<Vec<u8>>,
}

impl NormalPath {
    /// Normalises a raw path: escapes of unreserved characters decoded (RFC 3986 §6.2.2), dot segments removed, empty
    /// segments and one trailing slash ignored.
    #[must_use]
    pub fn new(raw: &[u8]) -> Self {
        let raw = raw.strip_prefix(b"/").unwrap_or(raw);
        let mut segments: Vec<Vec<u8>> = Vec::new();
        for segment in raw.split(|&byte| byte == b'/') {
            // `.` is unreserved, so `%2e` is a dot; no other escape can yield one. `..` removes an empty segment like any
            // other (RFC 3986 §5.2.4).
            match decode(segment) {
                dot if dot == b"." => {}
                dotdot if dotdot == b".." => {
                    segments.pop();
                }
                decoded => segments.push(decoded),
            }
        }
        segments.retain(|segment| !segment.is_empty());
        Self { segments }
    }

    /// The path with ASCII case folded, for upstreams that do.
    #[must_use]
    pub fn folded(mut self) -> Self {
        self.segments.iter_mut().for_each(|segment| segment.make_ascii_lowercase());
        self
    }

    /// The path for people and logs: segments joined by `/`, anything but visible ASCII escaped, and `%` and `/` too.
    #[must_use]
    pub fn display(&self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        for segment in &self.segments {
            text.push('/');
            for &byte in segment {
                if byte.is_ascii_graphic() && byte != b'%' && byte != b'/' {
                    text.push(char::from(byte));
                } else {
                    let _ = write!(text, "%{byte:02X}");
                }
            }
        }
        if text.is_empty() { "/".to_owned() } else { text }
    }
}

/// The parameters that a pattern took from a path: name and fully decoded value.
pub type Params = Vec<(String, Vec<u8>)>;

/// Matches a path against a pattern; `None`: no match.
#[must_use]
pub fn matches(pattern: &Pattern, case_sensitive: bool, path: &NormalPath) -> Option<Params> {
    let mut params = Params::new();
    let mut left = path.segments.as_slice();
    for part in pattern.segments() {
        if let Segment::Rest(name) = part {
            if left.is_empty() {
                return None;
            }
            params.push((name.clone(), left.join(&b'/')));
            return Some(params);
        }
        let (first, rest) = left.split_first()?;
        match part {
            Segment::Literal(literal) if case_sensitive && literal != first => return None,
            Segment::Literal(literal) if !literal.eq_ignore_ascii_case(first) => return None,
            Segment::Literal(_) | Segment::Rest(_) => {}
            Segment::One(name) => params.push((name.clone(), first.clone())),
        }
        left = rest;
    }
    left.is_empty().then_some(params)
}

/// What a path is under every reading that some upstreams use: case ignored; `%2F`, `%5C` or `\` taken for `/`;
/// `;parameters` cut off; any escape decoded, once or more; cut at an escaped `?`, `#` or NUL; slashes merged, or dot
/// segments removed, before or after any of these.
pub struct Readings(Option<Vec<NormalPath>>);

impl Readings {
    /// Follows the transformations wherever they lead. The bounds are for a text that is escaped over and over.
    #[must_use]
    pub fn new(raw: &[u8]) -> Self {
        const READINGS_MAX: usize = 512;
        /// Of all readings together: a few of the longest path there is.
        const BYTES_MAX: usize = 512 << 10;
        let mut seen = BTreeSet::from([raw.to_vec()]);
        let mut todo = vec![raw.to_vec()];
        let mut bytes = raw.len();
        while let Some(text) = todo.pop() {
            for transform in [decode, replace_slashes, cut_parameters, cut_tail, merge_slashes, remove_dots] {
                let next = transform(&text);
                if seen.contains(&next) {
                    continue;
                }
                bytes += next.len();
                if seen.len() == READINGS_MAX || bytes > BYTES_MAX {
                    return Self(None);
                }
                seen.insert(next.clone());
                todo.push(next);
            }
        }
        Self(Some(seen.iter().map(|text| NormalPath::new(text)).collect()))
    }

    /// Whether the path would match the pattern under one of them. A path with more readings than anyone writes in good
    /// faith might match anything.
    #[must_use]
    pub fn may_match(&self, pattern: &Pattern) -> bool {
        self.0.as_ref().is_none_or(|readings| readings.iter().any(|path| matches(pattern, false, path).is_some()))
    }
}

fn replace_slashes(text: &[u8]) -> Vec<u8> {
    let mut replaced = Vec::with_capacity(text.len());
    let mut left = text;
    while let Some((&byte, rest)) = left.split_first() {
        match left {
            [b'%', b'2', b'F' | b'f', rest @ ..] | [b'%', b'5', b'C' | b'c', rest @ ..] => {
                replaced.push(b'/');
                left = rest;
            }
            _ => {
                replaced.push(if byte == b'\\' { b'/' } else { byte });
                left = rest;
            }
        }
    }
    replaced
}

fn cut_parameters(text: &[u8]) -> Vec<u8> {
    let before = |segment: &[u8]| segment.split(|&byte| byte == b';').next().unwrap_or_default().to_vec();
    text.split(|&byte| byte == b'/').map(before).collect::<Vec<_>>().join(&b'/')
}

fn cut_tail(text: &[u8]) -> Vec<u8> {
    text.split(|byte| matches!(byte, b'?' | b'#' | 0)).next().unwrap_or_default().to_vec()
}

fn merge_slashes(text: &[u8]) -> Vec<u8> {
    let mut merged = text.to_vec();
    merged.dedup_by(|byte, before| *byte == b'/' && *before == b'/');
    merged
}

fn remove_dots(text: &[u8]) -> Vec<u8> {
    let mut kept: Vec<&[u8]> = Vec::new();
    for segment in text.strip_prefix(b"/").unwrap_or(text).split(|&byte| byte == b'/') {
        match decode(segment).as_slice() {
            b"." => {}
            b".." => {
                kept.pop();
            }
            _ => kept.push(segment),
        }
    }
    [b"/", kept.join(&b'/').as_slice()].concat()
}

/// Decodes every well-formed escape; what is not one stays as it is.
pub(super) fn decode(text: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut left = text;
    while let Some((&byte, rest)) = left.split_first() {
        match left {
            [b'%', high, low, rest @ ..] if let (Some(high), Some(low)) = (hex(*high), hex(*low)) => {
                decoded.push(high << 4 | low);
                left = rest;
            }
            _ => {
                decoded.push(byte);
                left = rest;
            }
        }
    }
    decoded
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        Pattern::parse(text).unwrap()
    }

    fn display(raw: &str) -> String {
        NormalPath::new(raw.as_bytes()).display()
    }

    #[test]
    fn a_path_is_normalised() {
        for (raw, normal) in [
            ("/posts", "/posts"),
            ("/%70osts", "/posts"),
            ("//posts", "/posts"),
            ("/x/../posts", "/posts"),
            ("/x/%2e%2E/posts", "/posts"),
            ("/./posts/", "/posts"),
            ("/../../posts", "/posts"),
            ("/x//../posts", "/x/posts"),
            ("/a%2fb", "/a%2Fb"),
            ("/a%2Fb/c", "/a%2Fb/c"),
            ("/%zz%", "/%25zz%25"),
            ("/caf%C3%A9", "/caf%C3%A9"),
            ("/", "/"),
            ("", "/"),
            ("*", "/*"),
        ] {
            assert_eq!(display(raw), normal, "{raw}");
        }
    }

    #[test]
    fn an_escaped_slash_does_not_end_a_segment() {
        let path = NormalPath::new(b"/v1/workspaces/a%2Fb/posts");
        let params = matches(&pattern("/v1/workspaces/{workspace}/posts"), true, &path).unwrap();
        assert_eq!(params, [("workspace".to_owned(), b"a/b".to_vec())]);
        assert!(matches(&pattern("/v1/{*rest}"), true, &path).is_some());
        assert!(matches(&pattern("/v1/workspaces/{a}/{b}/posts"), true, &path).is_none());
    }

    #[test]
    fn a_pattern_matches_whole_paths_only() {
        let posts = pattern("/posts");
        for (raw, sensitive, insensitive) in [
            ("/posts", true, true),
            ("/Posts", false, true),
            ("/posts/1", false, false),
            ("/", false, false),
            ("/postsx", false, false),
        ] {
            let path = NormalPath::new(raw.as_bytes());
            assert_eq!(matches(&posts, true, &path).is_some(), sensitive, "{raw}");
            assert_eq!(matches(&posts, false, &path).is_some(), insensitive, "{raw}");
        }
        assert!(matches(&pattern("/a/{*rest}"), true, &NormalPath::new(b"/a")).is_none());
        assert!(matches(&pattern("/a/{*rest}"), true, &NormalPath::new(b"/a/b/c")).is_some());
    }

    #[test]
    fn other_readings_are_found() {
        let posts = pattern("/v1/posts");
        for raw in [
            "/V1/Posts",
            "/v1%2Fposts",
            "/v1%2fposts",
            "/v1%5Cposts",
            "/v1\\posts",
            "/v1/posts;a=b",
            "/v1;x/posts",
            "/v1/posts;a%2Fb",
            "/v1/posts%3Ba",
            "/v1%252Fposts",
            "/v1/%2570osts",
            "/v1/posts%3Fx",
            "/v1/posts%23x",
            "/v1/posts%00.jpg",
            "/v1/x%2F..%2Fposts",
            "/v1/x//../posts",
            "/v1/x/..%5cposts",
            // Dot segments removed by one server, the escapes left decoded by the next.
            "/x%2Fy/../v1%2Fposts",
            "/x;y%2Fz/..;/v1/posts",
        ] {
            assert!(Readings::new(raw.as_bytes()).may_match(&posts), "{raw}");
        }
        for raw in ["/v1/post", "/v1/posts/1", "/v2/posts", "/v1/posts-x", "/v1/%25", "/v1/posts/a;b"] {
            assert!(!Readings::new(raw.as_bytes()).may_match(&posts), "{raw}");
        }
    }

    #[test]
    fn a_text_escaped_over_and_over_is_refused() {
        let posts = pattern("/posts");
        assert!(!Readings::new(format!("/{}", "%25".repeat(2000)).as_bytes()).may_match(&posts));
        let levels = |levels: usize| format!("/%{}70osts", "25".repeat(levels));
        assert!(Readings::new(levels(100).as_bytes()).may_match(&posts));
        for many in [1000, 30_000] {
            assert!(Readings::new(levels(many).as_bytes()).0.is_none());
            assert!(Readings::new(levels(many).as_bytes()).may_match(&posts));
        }
    }

    #[test]
    fn a_long_plain_path_has_few_readings() {
        let long = format!("/a//{}", "b%2Fc;d/".repeat(8000));
        assert!(Readings::new(long.as_bytes()).0.is_some_and(|readings| readings.len() > 1));
        assert!(!Readings::new(long.as_bytes()).may_match(&pattern("/posts")));
    }
}
