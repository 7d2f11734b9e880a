//! Who may see and change records: whoever holds a token of `admin.token_file`; without one, whoever is on this machine and
//! is no browser that another site has sent.

use super::problem::{Code, Problem};
use http::header::{AUTHORIZATION, HOST, ORIGIN};
use http::request::Parts;
use std::fmt;
use std::io::Read;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use zeroize::Zeroizing;

/// Characters that a token must have.
const TOKEN_MIN: usize = 16;
/// Bytes that the file may have.
const FILE_MAX: u64 = 1 << 20;
/// The name of a token that has none, and of whoever needs none.
const NAMELESS: &str = "admin";
const LOCAL: &str = "local";

/// The tokens of `admin.token_file`: one a line, as `NAME:TOKEN`, or `TOKEN` alone. Empty lines and lines that begin with
/// `#` do not count.
pub struct TokenFile {
    path: PathBuf,
    tokens: RwLock<Arc<[Token]>>,
}

/// Says where the tokens are, not what.
impl fmt::Debug for TokenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TokenFile").field(&self.path).finish()
    }
}

struct Token {
    name: Arc<str>,
    hash: blake3::Hash,
    line: usize,
}

impl TokenFile {
    /// Reads the file.
    ///
    /// # Errors
    /// What is wrong with it, and in which line; never a token.
    pub fn load(path: PathBuf) -> Result<Self, String> {
        let tokens = RwLock::new(read(&path)?);
        Ok(Self { path, tokens })
    }

    /// Where it lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the file again: from now on its tokens count, and no others. What is wrong with it is logged, and changes
    /// nothing.
    pub fn reload(&self) {
        match read(&self.path) {
            Ok(tokens) => {
                *self.tokens.write().unwrap_or_else(PoisonError::into_inner) = tokens;
                tracing::info!(file = %self.path.display(), "admin.token_file was read again");
            }
            Err(error) => tracing::error!(key = "admin.token_file", error, "the tokens stay as they were"),
        }
    }

    /// Whose token it is. Takes the same time whichever it is: hashes are compared, all of them, each in constant time.
    fn holder(&self, token: &[u8]) -> Option<Arc<str>> {
        let hash = blake3::hash(token);
        let tokens = Arc::clone(&self.tokens.read().unwrap_or_else(PoisonError::into_inner));
        tokens.iter().fold(None, |found, token| if token.hash == hash { Some(Arc::clone(&token.name)) } else { found })
    }
}

fn read(path: &Path) -> Result<Arc<[Token]>, String> {
    let place = path.display();
    // Wiped when it is dropped; with so much room it is never moved.
    let mut text = Zeroizing::new(Vec::with_capacity(FILE_MAX as usize + 1));
    let read = std::fs::File::open(path).and_then(|file| file.take(FILE_MAX + 1).read_to_end(&mut text));
    read.map_err(|error| format!("{place}: cannot be read: {error}"))?;
    if text.len() as u64 > FILE_MAX {
        return Err(format!("{place}: is larger than 1 MiB"));
    }
    parse(&text).map_err(|error| format!("{place}: {error}"))
}

fn parse(text: &[u8]) -> Result<Arc<[Token]>, String> {
    let mut tokens: Vec<Token> = Vec::new();
    for (line, text) in (1..).zip(text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii)) {
        if text.is_empty() || text.starts_with(b"#") {
            continue;
        }
        let (name, token) = match text.iter().position(|byte| *byte == b':').and_then(|at| text.split_at_checked(at)) {
            None => (NAMELESS.as_bytes(), text),
            Some((name, token)) => (name.trim_ascii(), token.get(1..).unwrap_or_default().trim_ascii()),
        };
        let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"._@-".contains(byte);
        let name = std::str::from_utf8(name).ok().filter(|name| (1..=64).contains(&name.len()));
        let Some(name) = name.filter(|name| name.as_bytes().iter().all(is_name)) else {
            return Err(format!(
                "line {line}: before the colon stands a name of up to 64 letters, digits and \"._@-\": NAME:TOKEN"
            ));
        };
        if !token.iter().all(u8::is_ascii_graphic) {
            return Err(format!("line {line}: a token consists of visible ASCII characters without spaces"));
        }
        if token.len() < TOKEN_MIN {
            return Err(format!("line {line}: a token has at least {TOKEN_MIN} characters"));
        }
        let hash = blake3::hash(token);
        if let Some(earlier) = tokens.iter().find(|earlier| earlier.hash == hash) {
            return Err(format!("line {line}: it is the token of line {}", earlier.line));
        }
        tokens.push(Token { name: name.into(), hash, line });
    }
    if tokens.is_empty() { Err("holds no token".to_owned()) } else { Ok(tokens.into()) }
}

/// Who asks, if he may; `unix`: on a Unix socket, whose file's permissions say who may.
pub(super) fn check(tokens: Option<&TokenFile>, head: &Parts, unix: bool) -> Result<Arc<str>, Problem> {
    let Some(tokens) = tokens else {
        return check_local(head, unix).map(|()| LOCAL.into());
    };
    let mut lines = head.headers.get_all(AUTHORIZATION).iter();
    let (Some(line), None) = (lines.next(), lines.next()) else {
        return Err(unauthorized("needs one line \"Authorization: Bearer TOKEN\", with a token of admin.token_file"));
    };
    let token = line.as_bytes().split_at_checked(7).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
    let holder = token.and_then(|(_, token)| tokens.holder(token.trim_ascii()));
    holder.ok_or_else(|| unauthorized("bears no token of admin.token_file"))
}

fn unauthorized(what: &str) -> Problem {
    Problem::new(Code::Unauthorized, format!("The request {what}."))
}

/// A page of another site can make a browser on this machine send requests here, under a name of its own that it lets
/// point here, too: `Origin` and `Host` tell.
fn check_local(head: &Parts, unix: bool) -> Result<(), Problem> {
    if head.headers.contains_key(ORIGIN) {
        return Err(forbidden("A browser's request (it bears Origin) needs a token: see admin.token_file."));
    }
    if unix {
        return Ok(());
    }
    let mut hosts = head.headers.get_all(HOST).iter();
    let one = matches!((hosts.next(), hosts.next()), (Some(host), None) if is_local_name(host.as_bytes()));
    let target = head.uri.authority().is_none_or(|authority| is_local_name(authority.as_str().as_bytes()));
    if one && target {
        Ok(())
    } else {
        Err(forbidden(
            "Host must be localhost or an IP address; under another name a token is needed: see admin.token_file.",
        ))
    }
}

fn forbidden(detail: &str) -> Problem {
    Problem::new(Code::Forbidden, detail)
}

/// Whether a host, with or without a port, is `localhost` or an address: nobody can let these point elsewhere.
fn is_local_name(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let (name, port) = match host.strip_prefix('[').and_then(|host| host.split_once(']')) {
        Some((address, port)) if address.parse::<Ipv6Addr>().is_ok() => ("localhost", port),
        Some(_) => return false,
        None => host.split_at(host.find(':').unwrap_or(host.len())),
    };
    let port = port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.bytes().all(|b| b.is_ascii_digit()));
    port && (name.eq_ignore_ascii_case("localhost") || name.parse::<Ipv4Addr>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    const FIRST: &str = "0123456789abcdef";
    const SECOND: &str = "fedcba9876543210:x";

    fn file(text: &str) -> TokenFile {
        TokenFile { path: PathBuf::new(), tokens: RwLock::new(parse(text.as_bytes()).unwrap()) }
    }

    fn head(fields: &[(&str, &str)]) -> Parts {
        let request =
            fields.iter().fold(Request::get("/records"), |request, (name, value)| request.header(*name, *value));
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn tokens_have_names_and_no_others_count() {
        let tokens = file(&format!("# operators\n\n  {FIRST}\r\nalice:{SECOND}\n"));
        for (token, name) in [(FIRST, Some("admin")), (SECOND, Some("alice")), ("", None), ("0123456789abcde", None)] {
            assert_eq!(tokens.holder(token.as_bytes()).as_deref(), name, "{token}");
        }
        assert_eq!(file(&format!("a : {FIRST}")).holder(FIRST.as_bytes()).as_deref(), Some("a"));
        assert!(!format!("{tokens:?}").contains(FIRST));
    }

    #[test]
    fn errors_name_the_line_and_never_a_token() {
        for (text, error) in [
            (String::new(), "holds no token"),
            ("# 0123456789abcdef".to_owned(), "holds no token"),
            (format!("{FIRST}\nshort-secret"), "line 2: a token has at least 16"),
            (format!(":{FIRST}"), "line 1: before the colon"),
            (format!("a b:{FIRST}"), "line 1: before the colon"),
            (format!("{}:{FIRST}", "n".repeat(65)), "line 1: before the colon"),
            (format!("\na:{FIRST} x"), "line 2: a token consists of visible"),
            (format!("a:{FIRST}ä"), "line 1: a token consists of visible"),
            (format!("a:{FIRST}\nb:{FIRST}"), "line 2: it is the token of line 1"),
        ] {
            let found = parse(text.as_bytes()).err().unwrap();
            assert!(found.starts_with(error), "{text}: {found}");
            assert!(!found.contains(FIRST) && !found.contains("secret"), "{found}");
        }
    }

    #[test]
    fn with_tokens_only_the_token_counts() {
        let tokens = file(&format!("alice:{FIRST}"));
        let ask = |fields: &[(&str, &str)]| check(Some(&tokens), &head(fields), false).map_err(|problem| problem.code);
        let bearer = format!("Bearer {FIRST}");
        for fields in [
            &[("authorization", bearer.as_str())][..],
            &[("authorization", &format!("bEARER   {FIRST}"))],
            &[("authorization", &bearer), ("origin", "https://a"), ("host", "a")],
        ] {
            assert_eq!(ask(fields).as_deref(), Ok("alice"), "{fields:?}");
        }
        for fields in [
            &[][..],
            &[("host", "localhost")],
            &[("authorization", FIRST)],
            &[("authorization", "Bearer")],
            &[("authorization", "Bearer ")],
            &[("authorization", &format!("Basic {FIRST}"))],
            &[("authorization", &format!("{bearer}x"))],
            &[("authorization", &bearer), ("authorization", &bearer)],
        ] {
            assert_eq!(ask(fields).err(), Some(Code::Unauthorized), "{fields:?}");
        }
    }

    #[test]
    fn without_tokens_no_browser_of_another_site_gets_in() {
        let ask = |fields: &[(&str, &str)], unix| check(None, &head(fields), unix).map_err(|problem| problem.code);
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:9090", "[::1]", "[::1]:9", "10.0.0.1:1"] {
            assert_eq!(ask(&[("host", host)], false).as_deref(), Ok("local"), "{host}");
            assert_eq!(ask(&[("host", host), ("origin", "null")], false).err(), Some(Code::Forbidden), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "", "[::1", "[a]", "u@localhost", "localhost:x", "127.1"]
        {
            assert_eq!(ask(&[("host", host)], false).err(), Some(Code::Forbidden), "{host}");
        }
        assert_eq!(ask(&[], false).err(), Some(Code::Forbidden));
        assert_eq!(ask(&[("host", "localhost"), ("host", "localhost")], false).err(), Some(Code::Forbidden));
        assert!(ask(&[], true).is_ok() && ask(&[("host", "anything")], true).is_ok());
        assert_eq!(ask(&[("origin", "https://a")], true).err(), Some(Code::Forbidden));
        let absolute = Request::get("http://evil.example/records").header("host", "localhost").body(()).unwrap();
        assert!(check(None, &absolute.into_parts().0, false).is_err());
    }
}
