//! A client's bytes as RFC 9112 has them read, with what else the gateway is known to take (`tests/it/{smuggling,request_syntax}.rs`):
//! lines that end with LF alone, a length said more than once, a length beside a transfer coding, which counts then.

use crate::wire::{Fields, is_token, text};

/// A request in a client's bytes.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) client: usize,
    pub(crate) method: String,
    /// As the upstream is to see it; `None`: never.
    pub(crate) target: Option<String>,
    pub(crate) http10: bool,
    /// As the upstream is to see it.
    pub(crate) host: Option<String>,
    pub(crate) fields: Fields,
    pub(crate) body: Vec<u8>,
    /// Whether the body comes to its end.
    pub(crate) whole: bool,
    /// Where it ends.
    pub(crate) end: usize,
}

impl Asked {
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.fields.iter().filter(move |(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    /// Members of a list, in lower case.
    pub(crate) fn list(&self, name: &str) -> Vec<String> {
        self.all(name).flat_map(|value| value.split(',')).map(|item| item.trim().to_ascii_lowercase()).collect()
    }
}

/// All requests, up to the first thing that is none.
pub(crate) fn read(client: usize, bytes: &[u8]) -> Vec<Asked> {
    let mut all = Vec::new();
    let mut at = 0;
    while let Some((asked, goes_on)) = request(client, bytes, at) {
        at = asked.end;
        all.push(asked);
        if !goes_on {
            break;
        }
    }
    all
}

/// A request that begins at `at`, and whether another may follow.
fn request(client: usize, bytes: &[u8], mut at: usize) -> Option<(Asked, bool)> {
    loop {
        match bytes.get(at..)? {
            [b'\r', b'\n', ..] => at += 2,
            [b'\n', ..] => at += 1,
            _ => break,
        }
    }
    let (lines, mut end) = head(bytes, at)?;
    let (first, lines) = lines.split_first()?;
    let [method, target, version]: [&str; 3] = first.split(' ').collect::<Vec<_>>().try_into().ok()?;
    let http10 = version == "HTTP/1.0";
    if !is_token(method) || method == "CONNECT" || !(http10 || version == "HTTP/1.1") {
        return None;
    }
    let fields = lines.iter().map(|line| field(line)).collect::<Option<Fields>>()?;
    let (target, authority) = forwarded(method, target).map_or((None, None), |(target, host)| (Some(target), host));
    let mut asked = Asked {
        client,
        method: method.to_owned(),
        target,
        http10,
        host: None,
        fields,
        body: Vec::new(),
        whole: true,
        end,
    };
    let hosts = asked.all("host").map(str::to_owned).collect::<Vec<_>>();
    let differs = |authority: &String| hosts.first().is_some_and(|host| !host.eq_ignore_ascii_case(authority));
    if hosts.len() > 1 || hosts.is_empty() && !http10 || authority.as_ref().is_some_and(differs) {
        asked.target = None;
    }
    asked.host = authority.or_else(|| hosts.first().cloned());
    let mut goes_on = frame(&mut asked, bytes, &mut end)?;
    asked.end = end;
    let connection = asked.list("connection");
    let said = |word: &str| connection.iter().any(|option| option == word);
    goes_on &= asked.whole && !said("close") && (!http10 || said("keep-alive"));
    Some((asked, goes_on))
}

/// The lines of a head, and where it ends.
fn head(bytes: &[u8], mut at: usize) -> Option<(Vec<String>, usize)> {
    let mut lines = Vec::new();
    loop {
        let len = bytes.get(at..)?.iter().position(|byte| *byte == b'\n')?;
        let line = &bytes[at..at + len];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        at += len + 1;
        if line.is_empty() {
            return Some((lines, at));
        }
        lines.push(text(line));
    }
}

fn field(line: &str) -> Option<(String, String)> {
    let (name, value) = line.split_once(':')?;
    let sound = is_token(name) && value.chars().all(|c| c >= ' ' && c != '\x7f' || c == '\t');
    sound.then(|| (name.to_ascii_lowercase(), value.trim_matches([' ', '\t']).to_owned()))
}

/// What becomes of a target: its origin-form, and its authority.
fn forwarded(method: &str, target: &str) -> Option<(String, Option<String>)> {
    let target = target.split('#').next()?;
    if target.starts_with('/') || target == "*" && method == "OPTIONS" {
        return Some((target.to_owned(), None));
    }
    let (scheme, rest) = target.split_once("://")?;
    if !["http", "https"].contains(&scheme.to_ascii_lowercase().as_str()) {
        return None;
    }
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let slash = if path.starts_with('/') { "" } else { "/" };
    Some((format!("{slash}{path}"), Some(authority.to_owned())))
}

/// Reads the body. Whether another request may follow.
fn frame(asked: &mut Asked, bytes: &[u8], at: &mut usize) -> Option<bool> {
    let codings = asked.all("transfer-encoding").collect::<Vec<_>>();
    let number = |length: &str| {
        let digits = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
        length.parse::<u64>().ok().filter(|_| digits)
    };
    let lengths = asked.all("content-length").map(number).collect::<Option<Vec<_>>>();
    match codings.as_slice() {
        [] => {
            let lengths = lengths?;
            let length = lengths.first().copied().unwrap_or(0);
            if lengths.iter().any(|other| *other != length) {
                return None;
            }
            let rest = &bytes[*at..];
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            asked.whole = length <= rest.len();
            asked.body = rest[..length.min(rest.len())].to_vec();
            *at += asked.body.len();
            Some(true)
        }
        [coding] if coding.eq_ignore_ascii_case("chunked") && !asked.http10 => {
            let both = asked.all("content-length").next().is_some();
            asked.whole = chunks(asked, bytes, at).is_some();
            Some(!both)
        }
        _ => None,
    }
}

/// `None`: it is cut off, or malformed.
fn chunks(asked: &mut Asked, bytes: &[u8], at: &mut usize) -> Option<()> {
    loop {
        let rest = bytes.get(*at..)?;
        let end = rest.iter().position(|byte| matches!(byte, b'\r' | b'\n'))?;
        let digits = rest.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
        let (size, extension) = rest[..end].split_at(digits.min(end));
        let spaced = text(extension).trim_start_matches([' ', '\t']).to_owned();
        if size.is_empty() || !(spaced.is_empty() || spaced.starts_with(';')) || rest.get(end..end + 2)? != b"\r\n" {
            return None;
        }
        let size = u64::from_str_radix(&text(size), 16).ok()?;
        *at += end + 2;
        if size == 0 {
            return trailers(bytes, at);
        }
        let rest = &bytes[*at..];
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        asked.body.extend_from_slice(&rest[..size.min(rest.len())]);
        *at = at.saturating_add(size);
        if bytes.get(*at..)?.get(..2)? != b"\r\n" {
            return None;
        }
        *at += 2;
    }
}

/// The body is whole. Up to the next empty line whatever comes is taken for trailers; it may be refused, and is nobody's
/// request.
fn trailers(bytes: &[u8], at: &mut usize) -> Option<()> {
    let rest = &bytes[*at..];
    *at += match rest {
        [b'\r', b'\n', ..] => 2,
        _ => rest.windows(4).position(|window| window == b"\r\n\r\n").map_or(rest.len(), |end| end + 4),
    };
    Some(())
}
