//! Paths: the normalised reading of a target, and the other readings that some upstreams use.

use super::route::{Pattern, Segment};
use std::collections::BTreeSet;

/// A normalised path: its segments, fully decoded, without dot segments and empty ones. A slash that was escaped stays
/// inside its segment, so two paths that an upstream tells apart never look the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NormalPath {
    pub segments: Vec<Vec<u8>>,
}

/// Which of two rules comes first where they disagree: `/x//../posts`.
#[derive(Clone, Copy)]
enum Dots {
    /// RFC 3986 §5.2.4: an empty segment is one that `..` removes.
    BeforeMerging,
    /// What servers do that merge slashes first.
    AfterMerging,
}

impl NormalPath {
    /// Normalises a raw path: escapes of unreserved characters decoded (RFC 3986 §6.2.2), dot segments removed, empty
    /// segments and one trailing slash ignored.
    #[must_use]
    pub fn new(raw: &[u8]) -> Self {
        Self::read(raw, Dots::BeforeMerging)
    }

    fn read(raw: &[u8], dots: Dots) -> Self {
        let raw = raw.strip_prefix(b"/").unwrap_or(raw);
        let mut segments: Vec<Vec<u8>> = Vec::new();
        for segment in raw.split(|&byte| byte == b'/') {
            // `.` is unreserved, so `%2e` is a dot; no other escape can yield one.
            match decode(segment) {
                dot if dot == b"." => {}
                dotdot if dotdot == b".." => {
                    segments.pop();
                }
                empty if empty.is_empty() && matches!(dots, Dots::AfterMerging) => {}
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

/// Whether the path would match the pattern under a reading that some upstreams use: case ignored; `%2F`, `%5C` or `\`
/// taken for `/`; `;parameters` cut off; any escape decoded, once or more; cut at an escaped `?`, `#` or NUL; slashes
/// merged before dot segments are removed; and all of these in any order.
#[must_use]
pub fn may_match(pattern: &Pattern, raw: &[u8]) -> bool {
    readings(raw).iter().any(|reading| {
        [Dots::BeforeMerging, Dots::AfterMerging].into_iter().any(|dots| {
            let path = NormalPath::read(reading, dots);
            matches(pattern, false, &path).is_some()
        })
    })
}

/// Every text that the transformations lead to. Decoding ends by itself, since it shortens; the bound is for a text that
/// is escaped over and over.
fn readings(raw: &[u8]) -> BTreeSet<Vec<u8>> {
    const READINGS_MAX: usize = 512;
    let mut seen = BTreeSet::from([raw.to_vec()]);
    let mut todo = vec![raw.to_vec()];
    while let Some(text) = todo.pop() {
        for next in [decode(&text), replace_slashes(&text), cut_parameters(&text), cut_tail(&text)] {
            if seen.len() < READINGS_MAX && seen.insert(next.clone()) {
                todo.push(next);
            }
        }
    }
    seen
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
        ] {
            assert!(may_match(&posts, raw.as_bytes()), "{raw}");
        }
        for raw in ["/v1/post", "/v1/posts/1", "/v2/posts", "/v1/posts-x", "/v1/%25", "/v1/posts/a;b"] {
            assert!(!may_match(&posts, raw.as_bytes()), "{raw}");
        }
    }

    #[test]
    fn a_text_escaped_over_and_over_is_bounded() {
        let raw = format!("/{}", "%25".repeat(2000));
        assert!(!may_match(&pattern("/posts"), raw.as_bytes()));
        let raw = format!("/p%{}6Fsts", "25".repeat(300));
        assert!(readings(raw.as_bytes()).len() <= 512);
    }
}
