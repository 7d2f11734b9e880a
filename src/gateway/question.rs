//! Questions to the upstream, with a caller's own credentials: what became of a key (`lookup`), whether the caller may see
//! a replay (`probe`).

use super::body::ForwardBody;
use super::path::{NormalPath, Params, decode};
use super::route::{Pattern, Segment};
use http::header::{EXPECT, TRAILER, TRANSFER_ENCODING, VIA};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, Method, Request, Uri};

/// A target with places for the route's parameters and the key, such as `/posts/by-key/{key}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Piece>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Key,
    Param(String),
}

/// The name of the key's place.
const KEY: &str = "key";

impl Template {
    /// Parses a template. `with_key`: the key must have a place, and whatever is called so is no parameter.
    ///
    /// # Errors
    /// Says what is wrong with it and what would be right.
    pub fn parse(text: &str, pattern: &Pattern, with_key: bool) -> Result<Self, String> {
        if !text.starts_with('/') || text.contains(['#', '\\']) || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!("{text:?} is no target; write a path such as \"/posts/by-key/{{key}}\""));
        }
        let (mut pieces, mut left) = (Vec::new(), text);
        while let Some((before, after)) = left.split_once('{') {
            let (name, after) = after.split_once('}').ok_or_else(|| format!("{text:?} has a brace without its end"))?;
            pieces.push(Piece::Text(before.to_owned()));
            pieces.push(match name {
                KEY if with_key => Piece::Key,
                _ if pattern.params().any(|param| param == name) => Piece::Param(name.to_owned()),
                _ => return Err(format!("{text:?} names {{{name}}}, which {} has not", pattern.as_str())),
            });
            left = after;
        }
        pieces.push(Piece::Text(left.to_owned()));
        if with_key && !pieces.contains(&Piece::Key) {
            return Err(format!("{text:?} has no place for the key; write {{key}} where it belongs"));
        }
        Ok(Self(pieces))
    }

    /// Fills in the places, each value percent-encoded as one segment. `None`: what comes out would be read as another path
    /// (a dot segment), or as none.
    pub(super) fn target(&self, key: &[u8], asked: &Asked<'_>) -> Option<PathAndQuery> {
        if [b".".as_slice(), b".."].contains(&key) {
            return None;
        }
        let mut target = String::new();
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => target.push_str(text),
                Piece::Key => encode(key, &mut target),
                Piece::Param(name) => asked.encode(name, &mut target)?,
            }
        }
        let path = target.split('?').next()?;
        let dots = |segment: &str| [b".".as_slice(), b".."].contains(&decode(segment.as_bytes()).as_slice());
        if path.split('/').any(dots) { None } else { PathAndQuery::try_from(target).ok() }
    }
}

/// What a request was sent to.
pub(super) struct Asked<'a> {
    pub(super) pattern: &'a Pattern,
    pub(super) path: &'a NormalPath,
    pub(super) params: &'a Params,
}

impl Asked<'_> {
    fn encode(&self, param: &str, to: &mut String) -> Option<()> {
        if matches!(self.pattern.segments().last(), Some(Segment::Rest(name)) if name == param) {
            // All that remains: a slash that was escaped in a segment stays so.
            let rest = self.path.segments.get(self.pattern.segments().len() - 1..)?;
            for (at, segment) in rest.iter().enumerate() {
                if at > 0 {
                    to.push('/');
                }
                encode(segment, to);
            }
            return Some(());
        }
        let (_, value) = self.params.iter().find(|(name, _)| name == param)?;
        encode(value, to);
        Some(())
    }
}

/// Percent-encodes all but unreserved characters (RFC 3986 §2.3).
fn encode(value: &[u8], to: &mut String) {
    for &byte in value {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            to.push(char::from(byte));
        } else {
            const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
            to.push('%');
            for digit in [byte >> 4, byte & 15] {
                to.extend(DIGITS.get(usize::from(digit)).map(|&digit| char::from(digit)));
            }
        }
    }
}

/// The question, with the fields of the caller's request as it would be forwarded: those of its body and key, and its
/// conditions, are not for this. Neither is `Via`: it is the gateway that asks, and a gateway behind it which answers by
/// itself would say "not executed" to another gateway, of the question.
pub(super) fn question(target: PathAndQuery, mut headers: HeaderMap, key: &HeaderName) -> Request<ForwardBody> {
    let of_the_body = |name: &&HeaderName| {
        let name = name.as_str();
        name.starts_with("content-") || name.starts_with("if-") || ["digest", "repr-digest", "range"].contains(&name)
    };
    let unfit = headers.keys().filter(of_the_body).cloned().collect::<Vec<_>>();
    for name in unfit.iter().chain([key, &TRANSFER_ENCODING, &TRAILER, &EXPECT, &VIA]) {
        headers.remove(name);
    }
    let mut request = Request::new(ForwardBody::Full(None));
    *request.method_mut() = Method::GET;
    *request.uri_mut() = Uri::from(target);
    *request.headers_mut() = headers;
    request
}

#[cfg(test)]
mod tests {
    use super::super::path::matches;
    use super::*;

    fn target(template: &str, pattern: &str, path: &str, key: &str) -> Option<String> {
        let pattern = Pattern::parse(pattern).unwrap();
        let template = Template::parse(template, &pattern, true).unwrap();
        let path = NormalPath::new(path.as_bytes());
        let params = matches(&pattern, true, &path).unwrap();
        let asked = Asked { pattern: &pattern, path: &path, params: &params };
        template.target(key.as_bytes(), &asked).map(|target| target.to_string())
    }

    #[test]
    fn places_are_filled_in_as_one_segment_each() {
        let posts = |key| target("/posts/by-key/{key}", "/posts", "/posts", key);
        assert_eq!(posts("abc").unwrap(), "/posts/by-key/abc");
        assert_eq!(posts("a/b?c#d%41 \u{e4}").unwrap(), "/posts/by-key/a%2Fb%3Fc%23d%2541%20%C3%A4");
        let workspaces = |path, key| target("/v1/{workspace}/k?key={key}", "/v1/w/{workspace}/posts", path, key);
        assert_eq!(workspaces("/v1/w/a%2Fb/posts", "x&y").unwrap(), "/v1/a%2Fb/k?key=x%26y");
        let rest = |path| target("/k/{key}/{rest}", "/v1/{*rest}", path, "k");
        assert_eq!(rest("/v1/a%2Fb/c").unwrap(), "/k/k/a%2Fb/c");
    }

    #[test]
    fn what_would_be_read_as_another_path_is_not_asked() {
        for key in [".", ".."] {
            assert_eq!(target("/by-key/{key}", "/posts", "/posts", key), None, "{key}");
            assert_eq!(target("/by-key?key={key}", "/posts", "/posts", key), None, "{key}");
        }
        assert_eq!(target("/a/.{key}", "/posts", "/posts", "."), None);
        assert_eq!(target("/a/%2e{key}/b", "/posts", "/posts", "."), None);
        assert!(target("/a/{key}", "/posts", "/posts", "...").is_some());
    }

    #[test]
    fn templates_that_cannot_be_filled_in_are_refused() {
        let pattern = Pattern::parse("/v1/{workspace}/posts").unwrap();
        for text in
            ["", "posts/{key}", "/posts", "/{key", "/{ws}/{key}", "/a b/{key}", "/{key}#x", "/{*workspace}/{key}"]
        {
            assert!(Template::parse(text, &pattern, true).is_err(), "{text}");
        }
        assert!(Template::parse("/me", &pattern, false).is_ok());
        assert!(Template::parse("/me/{key}", &pattern, false).is_err());
    }

    #[test]
    fn a_question_bears_the_callers_credentials_and_nothing_of_the_body() {
        let mut headers = HeaderMap::new();
        for name in ["authorization", "cookie", "accept", "x-forwarded-for", "host"] {
            headers.insert(HeaderName::from_static(name), "kept".parse().unwrap());
        }
        for name in
            ["content-length", "content-type", "content-encoding", "if-match", "range", "via", "idempotency-key"]
        {
            headers.insert(HeaderName::from_static(name), "dropped".parse().unwrap());
        }
        let key = HeaderName::from_static("idempotency-key");
        let request = question(PathAndQuery::from_static("/me"), headers, &key);
        assert_eq!(request.headers().len(), 5, "{:?}", request.headers());
        assert!(request.headers().values().all(|value| value == "kept"));
    }
}
