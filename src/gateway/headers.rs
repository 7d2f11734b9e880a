//! Header fields on their way through: hop-by-hop fields (RFC 9110 §7.6.1), `Via`, `X-Forwarded-*`.

use super::Peer;
use super::problem::{Code, Problem};
use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, HeaderName, HeaderValue, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION,
    TE, TRANSFER_ENCODING, UPGRADE, VIA,
};
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, Method, Request, Uri, Version};

pub static IDEMPOTENCY_OUTCOME: HeaderName = HeaderName::from_static("idempotency-outcome");
pub static IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
pub static CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
static KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
static HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
static PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
static X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
static X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
static MAX_FORWARDS: HeaderName = HeaderName::from_static("max-forwards");

/// Elements of a comma-separated list that may run over several lines.
pub(super) fn list<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    let lines = headers.get_all(name).into_iter();
    lines.flat_map(|line| line.as_bytes().split(|&byte| byte == b',')).map(<[u8]>::trim_ascii)
}

/// Whether `Connection` names this field as hop-by-hop.
#[must_use]
pub fn connection_names(headers: &HeaderMap, name: &HeaderName) -> bool {
    list(headers, &CONNECTION).any(|option| option.eq_ignore_ascii_case(name.as_str().as_bytes()))
}

/// Whether the request has come through a gateway of this kind.
#[must_use]
pub fn via_names_us(headers: &HeaderMap) -> bool {
    list(headers, &VIA).any(|hop| {
        let received_by = hop.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).nth(1);
        received_by.is_some_and(|name| name.eq_ignore_ascii_case(b"oncegate"))
    })
}

/// Seconds for which the upstream keeps an idle connection, as its `Keep-Alive: timeout=N` says.
#[must_use]
pub fn keep_alive_seconds(headers: &HeaderMap) -> Option<u64> {
    list(headers, &KEEP_ALIVE).find_map(|parameter| {
        let text = std::str::from_utf8(parameter).ok()?;
        let (name, value) = text.split_once('=')?;
        name.trim().eq_ignore_ascii_case("timeout").then(|| value.trim().parse().ok())?
    })
}

/// Removes what is meant for one connection alone. Fields that frame the message or that this proxy sets itself stay,
/// even if `Connection` names them: naming them is no way to get rid of them.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named = list(headers, &CONNECTION).filter_map(|option| HeaderName::from_bytes(option).ok());
        let kept = [&HOST, &CONTENT_LENGTH, &VIA, &X_FORWARDED_FOR, &X_FORWARDED_PROTO, &X_FORWARDED_HOST];
        for name in named.filter(|name| !kept.contains(&name)).collect::<Vec<_>>() {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    // Both lengths: the transfer coding counts (RFC 9112 §6.3), and a response with both would break the encoder.
    if headers.remove(TRANSFER_ENCODING).is_some() {
        headers.remove(CONTENT_LENGTH);
    }
    for name in
        [&KEEP_ALIVE, &PROXY_CONNECTION, &PROXY_AUTHENTICATE, &PROXY_AUTHORIZATION, &TE, &UPGRADE, &HTTP2_SETTINGS]
    {
        headers.remove(name);
    }
    if let Some(len) = headers.get(CONTENT_LENGTH)
        && (headers.get_all(CONTENT_LENGTH).iter().nth(1).is_some() || !is_plain_number(len.as_bytes()))
        && let Some(len) = the_length(headers)
    {
        headers.insert(CONTENT_LENGTH, len.into());
    }
}

/// Whether it is a number that nobody reads otherwise: some take leading zeros for octal.
fn is_plain_number(text: &[u8]) -> bool {
    text.iter().all(u8::is_ascii_digit) && (text.len() == 1 || !text.starts_with(b"0"))
}

/// The length that a message declares, once or over and over (RFC 9110 §8.6).
fn the_length(headers: &HeaderMap) -> Option<u64> {
    let mut lens = list(headers, &CONTENT_LENGTH).map(|len| {
        let digits = std::str::from_utf8(len).ok().filter(|len| len.bytes().all(|byte| byte.is_ascii_digit()))?;
        digits.parse::<u64>().ok()
    });
    let first = lens.next()??;
    lens.all(|len| len == Some(first)).then_some(first)
}

/// The length of a message's body, where it is known beforehand: with a transfer coding a length says nothing.
#[must_use]
pub fn declared_length(headers: &HeaderMap) -> Option<u64> {
    if headers.contains_key(TRANSFER_ENCODING) { None } else { the_length(headers) }
}

/// Whether nobody reads a response's end in another place (RFC 9112 §6.3): no transfer coding but one "chunked", which is
/// all that was asked for, and no length but one number.
#[must_use]
pub fn is_soundly_framed(headers: &HeaderMap) -> bool {
    match headers.contains_key(TRANSFER_ENCODING) {
        true => is_only_chunked(headers),
        false => !headers.contains_key(CONTENT_LENGTH) || the_length(headers).is_some(),
    }
}

/// Whether the transfer coding is one "chunked" on one line, the only one that all understand alike.
fn is_only_chunked(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let chunked = codings.next().is_some_and(|coding| coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"));
    chunked && codings.next().is_none()
}

/// Whether an authority is a host with an optional port, and nothing else (RFC 9110 §7.2, RFC 3986 §3.2.3).
fn is_host_and_port(authority: &Authority) -> bool {
    let port = authority.as_str().strip_prefix(authority.host());
    port.is_some_and(|port| match port.strip_prefix(':') {
        None => port.is_empty(),
        Some(digits) => {
            digits.bytes().all(|byte| byte.is_ascii_digit()) && digits.parse::<u16>().is_ok() || digits.is_empty()
        }
    })
}

/// Whether it is a name or an IPv4 address without a port, or with one of up to four digits: what nearly all clients send,
/// told without parsing it.
fn is_plain_host(host: &[u8]) -> bool {
    let is_name = |name: &[u8]| name.iter().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(byte));
    match memchr::memchr(b':', host).and_then(|colon| host.split_at_checked(colon)) {
        None => is_name(host),
        Some((name, port)) => {
            let digits = port.get(1..).unwrap_or_default();
            !name.is_empty() && is_name(name) && digits.len() <= 4 && digits.iter().all(u8::is_ascii_digit)
        }
    }
}

/// Refuses what the HTTP library lets through but a proxy must not pass on, and settles what the request's host is:
/// an absolute-form target becomes origin-form, its authority the `Host`.
///
/// # Errors
/// [`Code::BadRequest`].
pub fn check<B>(request: &mut Request<B>, default_host: &HeaderValue) -> Result<(), Problem> {
    let bad = |detail: &'static str| Problem::new(Code::BadRequest, detail);
    if request.method() == Method::CONNECT {
        return Err(bad("CONNECT is not supported: this is a reverse proxy."));
    }
    let coded = request.headers().contains_key(TRANSFER_ENCODING);
    if coded && (!is_only_chunked(request.headers()) || request.version() < Version::HTTP_11) {
        return Err(bad("The only transfer coding understood is one \"chunked\", in HTTP/1.1."));
    }
    let mut hosts = request.headers().get_all(HOST).iter();
    let host = hosts.next().cloned();
    if hosts.next().is_some() {
        return Err(bad("Send exactly one Host line."));
    }
    if connection_names(request.headers(), &HOST) || connection_names(request.headers(), &CONTENT_LENGTH) {
        return Err(bad("Host and Content-Length must not be named in Connection."));
    }
    if let Some(host) = host.as_ref().filter(|host| !host.is_empty() && !is_plain_host(host.as_bytes()))
        && !Authority::try_from(host.as_bytes()).is_ok_and(|authority| is_host_and_port(&authority))
    {
        return Err(bad("The Host line is not a host with an optional port."));
    }
    // RFC 9112 §3.2: whatever the form of the target.
    if host.is_none() && request.version() == Version::HTTP_11 {
        return Err(bad("An HTTP/1.1 request needs a Host line."));
    }
    if request.version() == Version::HTTP_2 {
        check_http2(request, host.is_some())?;
    }
    if let Some(authority) = request.uri().authority().cloned() {
        if !matches!(request.uri().scheme_str(), Some("http" | "https")) || !is_host_and_port(&authority) {
            return Err(bad("An absolute target must be http or https, with a host and an optional port."));
        }
        let same = |host: &HeaderValue| host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes());
        if !host.is_none_or(|host| same(&host)) {
            return Err(bad("The Host line differs from the target's authority."));
        }
        let value = HeaderValue::try_from(authority.as_str());
        request.headers_mut().insert(HOST, value.map_err(|_| bad("The target's authority is malformed."))?);
        let target = request.uri().path_and_query().cloned();
        *request.uri_mut() = Uri::from(target.unwrap_or_else(|| PathAndQuery::from_static("/")));
    } else if host.is_none() {
        request.headers_mut().insert(HOST, default_host.clone());
    }
    // RFC 9112 §3.2, RFC 9113 §8.3.1. Where a slash is missing, the library would write it after the route was looked for.
    let path = request.uri().path();
    if !(path.starts_with('/') || path == "*" && request.method() == Method::OPTIONS) {
        return Err(bad("The target must begin with a slash; only that of OPTIONS may be \"*\"."));
    }
    Ok(())
}

/// What HTTP/2 leaves to whoever hands the request on in HTTP/1.1.
fn check_http2<B>(request: &mut Request<B>, has_host: bool) -> Result<(), Problem> {
    let bad = |detail: &'static str| Problem::new(Code::BadRequest, detail);
    if !has_host && request.uri().authority().is_none() {
        return Err(bad("The request needs an :authority or a Host."));
    }
    // RFC 9113 §8.2.3.
    let lines = request.headers().get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect::<Vec<_>>();
    if lines.len() > 1 {
        let joined = HeaderValue::try_from(lines.join(b"; ".as_slice()));
        request.headers_mut().insert(COOKIE, joined.map_err(|_| bad("The cookies are malformed."))?);
    }
    Ok(())
}

/// Makes a request's header fields ready for the upstream.
pub fn prepare_request(headers: &mut HeaderMap, version: Version, peer: &Peer) {
    strip_hop_by_hop(headers);
    // Answered here: the body is asked for once the request has been accepted.
    headers.remove(EXPECT);
    // The protocol that it was received in (RFC 9110 §7.6.3).
    let via = match version {
        Version::HTTP_2 => "2 oncegate",
        version if version < Version::HTTP_11 => "1.0 oncegate",
        _ => "1.1 oncegate",
    };
    headers.append(VIA, HeaderValue::from_static(via));
    if let Some(ip) = peer.ip {
        let ip = ip.to_canonical().to_string();
        let earlier = headers.get_all(&X_FORWARDED_FOR).iter().map(HeaderValue::as_bytes);
        let mut hops = earlier.collect::<Vec<_>>().join(b", ".as_slice());
        if !hops.is_empty() {
            hops.extend_from_slice(b", ");
        }
        hops.extend_from_slice(ip.as_bytes());
        if let Ok(value) = HeaderValue::try_from(hops) {
            headers.insert(&X_FORWARDED_FOR, value);
        }
    }
    if !(peer.trusted && headers.contains_key(&X_FORWARDED_PROTO)) {
        headers.insert(&X_FORWARDED_PROTO, HeaderValue::from_static(if peer.https { "https" } else { "http" }));
    }
    if !(peer.trusted && headers.contains_key(&X_FORWARDED_HOST))
        && let Some(host) = headers.get(HOST).cloned()
    {
        headers.insert(&X_FORWARDED_HOST, host);
    }
}

/// `Max-Forwards` of OPTIONS and TRACE (RFC 9110 §7.6.2): counts down; `true`: this is the last hop.
#[must_use]
pub fn last_hop(method: &Method, headers: &mut HeaderMap) -> bool {
    if method != Method::OPTIONS && method != Method::TRACE {
        return false;
    }
    let Some(left) = headers.get(&MAX_FORWARDS).and_then(|value| value.to_str().ok()?.trim().parse::<u32>().ok())
    else {
        return false;
    };
    match left.checked_sub(1) {
        None => true,
        Some(left) => {
            headers.insert(&MAX_FORWARDS, left.into());
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(fields: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap());
        }
        headers
    }

    #[test]
    fn hop_by_hop_fields_go_and_framing_stays() {
        let mut headers = map(&[
            ("connection", "close, X-Hop , host"),
            ("connection", "content-length"),
            ("x-hop", "1"),
            ("host", "a"),
            ("content-length", "3"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("upgrade", "websocket"),
            ("proxy-connection", "close"),
            ("x-end", "1"),
        ]);
        strip_hop_by_hop(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-length", "host", "x-end"]);
    }

    #[test]
    fn with_a_transfer_coding_the_length_does_not_count() {
        let mut headers = map(&[("transfer-encoding", "chunked"), ("content-length", "3")]);
        strip_hop_by_hop(&mut headers);
        assert!(headers.is_empty());
    }

    #[test]
    fn via_is_read_as_a_list() {
        assert!(via_names_us(&map(&[("via", "1.0 fred, 1.1 oncegate (edge)")])));
        assert!(via_names_us(&map(&[("via", "1.0 fred"), ("via", "2 OnceGate")])));
        assert!(!via_names_us(&map(&[("via", "1.1 oncegate2, 1.1 proxy (oncegate)")])));
        assert!(!via_names_us(&map(&[("via", "oncegate")])));
    }

    #[test]
    fn keep_alive_is_read() {
        assert_eq!(keep_alive_seconds(&map(&[("keep-alive", "max=9, Timeout = 5")])), Some(5));
        assert_eq!(keep_alive_seconds(&map(&[("keep-alive", "timeout=x")])), None);
        assert_eq!(keep_alive_seconds(&map(&[])), None);
    }

    #[test]
    fn forwarded_fields_are_kept_from_trusted_peers_only() {
        let fields = [("host", "api"), ("x-forwarded-for", "1.1.1.1"), ("x-forwarded-proto", "https")];
        for (trusted, proto) in [(true, "https"), (false, "http")] {
            let mut headers = map(&fields);
            let peer = Peer { ip: Some("::ffff:10.0.0.1".parse().unwrap()), trusted, https: false, client_cert: None };
            prepare_request(&mut headers, Version::HTTP_11, &peer);
            assert_eq!(headers["x-forwarded-for"], "1.1.1.1, 10.0.0.1");
            assert_eq!(headers["x-forwarded-proto"], proto);
            assert_eq!(headers["x-forwarded-host"], "api");
            assert_eq!(headers["via"], "1.1 oncegate");
        }
    }

    #[test]
    fn what_http2_leaves_open_is_settled() {
        let request = |target: &str, fields: &[(&str, &str)]| {
            let mut request = Request::builder().version(Version::HTTP_2).uri(target).body(()).unwrap();
            *request.headers_mut() = map(fields);
            check(&mut request, &HeaderValue::from_static("upstream")).map(|()| request)
        };
        let cookies = [("cookie", "a=1; b=2"), ("cookie", "c=3")];
        let checked = request("https://api.example/posts?x", &cookies).unwrap();
        assert_eq!(checked.uri(), "/posts?x");
        assert_eq!(checked.headers()["host"], "api.example");
        assert_eq!(checked.headers().get_all("cookie").iter().collect::<Vec<_>>(), ["a=1; b=2; c=3"]);
        assert!(request("http://api.example/", &[("host", "API.example")]).is_ok());
        assert!(request("http://api.example/", &[("host", "other.example")]).is_err());
        assert!(request("/posts", &[("host", "api.example")]).is_ok());
        assert!(request("/posts", &[]).is_err(), "the upstream's name is not for it to guess");
        assert!(request("*", &[("host", "api.example")]).is_err());
    }

    #[test]
    fn a_host_that_is_told_without_parsing_would_be_accepted_anyway() {
        for host in ["a", "a.example", "a_b-c.example:8080", "127.0.0.1:1", "a:", "-", "...", "a:0000"] {
            assert!(is_plain_host(host.as_bytes()), "{host}");
            assert!(is_host_and_port(&Authority::try_from(host.as_bytes()).unwrap()), "{host}");
        }
        for host in [":80", "a:65535", "a:x", "[::1]", "a:1:2", "a b", "u@a", "a/x", "a\\b", "ä"] {
            assert!(!is_plain_host(host.as_bytes()), "{host}");
        }
    }

    #[test]
    fn max_forwards_counts_down() {
        let mut headers = map(&[("max-forwards", "1")]);
        assert!(!last_hop(&Method::GET, &mut headers));
        assert!(!last_hop(&Method::TRACE, &mut headers));
        assert_eq!(headers["max-forwards"], "0");
        assert!(last_hop(&Method::TRACE, &mut headers));
    }
}
