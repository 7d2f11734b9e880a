//! The tenant scope: to whom a key belongs.

use super::headers::connection_names;
use super::jwt::Claims;
use super::path::{NormalPath, Params};
use super::problem::{Code, Problem};
use super::{Peer, RouteOptions};
use crate::ledger::Credentials;
use crate::store::RecordId;
use http::header::{AUTHORIZATION, COOKIE, HOST};
use http::{HeaderMap, HeaderName};

/// One part of a scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Authorization,
    /// Whom the client's certificate names.
    ClientCert,
    Cookie(String),
    Header(HeaderName),
    Host,
    Path,
    /// A parameter of the route's pattern.
    PathParam(String),
    /// A claim of a verified bearer token.
    Jwt(String),
}

impl Part {
    /// How it is written in the configuration: what it is, and its name.
    fn kind(&self) -> [&str; 2] {
        match self {
            Self::Authorization => ["authorization", ""],
            Self::ClientCert => ["client-cert", ""],
            Self::Cookie(name) => ["cookie:", name],
            Self::Header(name) => ["header:", name.as_str()],
            Self::Host => ["host", ""],
            Self::Path => ["path", ""],
            Self::PathParam(name) => ["path:", name],
            Self::Jwt(claim) => ["jwt:", claim],
        }
    }
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [what, name] = self.kind();
        write!(f, "{what}{name}")
    }
}

/// The secret with which ids are made. The store keeps it; without it nobody can tell which id belongs to which key.
#[derive(Clone)]
pub struct Secret(pub [u8; 32]);

/// Somebody's own space of keys: all scope parts, joined unambiguously, and the secret to hash them with.
#[derive(Clone)]
pub struct Tenant {
    secret: [u8; 32],
    parts: Vec<u8>,
}

impl Tenant {
    /// The id of the record that belongs to a key of this tenant.
    #[must_use]
    pub fn record_id(self, key: &[u8]) -> RecordId {
        let mut id = [0; 16];
        let hash = self.hash("key", key);
        id.iter_mut().zip(hash.as_bytes()).for_each(|(to, from)| *to = *from);
        RecordId(id)
    }

    /// A key made of scope and payload: 64 hex digits.
    #[must_use]
    pub fn derive_key(&self, payload_digest: &[u8; 32]) -> String {
        self.clone().hash("derived", payload_digest).to_hex().to_string()
    }

    fn hash(mut self, kind: &str, value: &[u8]) -> blake3::Hash {
        feed(&mut self.parts, &[kind], Some(value));
        blake3::keyed_hash(&self.secret, &self.parts)
    }
}

/// Adds one part so that no two lists of parts look the same: kind and value with their lengths, absence apart from
/// emptiness. The kind may come in pieces.
fn feed(to: &mut Vec<u8>, kind: &[&str], value: Option<&[u8]>) {
    let kind_len = kind.iter().map(|piece| piece.len() as u64).sum::<u64>();
    to.extend_from_slice(&kind_len.to_le_bytes());
    kind.iter().for_each(|piece| to.extend_from_slice(piece.as_bytes()));
    match value {
        None => to.push(0),
        Some(value) => {
            to.push(1);
            to.extend_from_slice(&(value.len() as u64).to_le_bytes());
            to.extend_from_slice(value);
        }
    }
}

/// A request, as far as its tenant is concerned.
pub struct Request<'a> {
    pub headers: &'a HeaderMap,
    pub path: &'a NormalPath,
    pub params: &'a Params,
    pub peer: &'a Peer,
    /// Of its bearer token, where a part asks for that and there is one.
    pub claims: Option<&'a Claims>,
}

/// The token that `jwt:` parts are about: a bearer token (RFC 6750 §2.1), where there is one.
///
/// # Errors
/// [`Code::ScopeMissing`] if `Authorization` stands on two lines, or is named in `Connection`.
pub(super) fn bearer<'a>(route: &RouteOptions, headers: &'a HeaderMap) -> Result<Option<&'a [u8]>, Problem> {
    if !route.scope.iter().any(|part| matches!(part, Part::Jwt(_))) {
        return Ok(None);
    }
    let Some(value) = only_line(&AUTHORIZATION, headers)? else { return Ok(None) };
    let (scheme, token) = value.split_at(value.iter().position(u8::is_ascii_whitespace).unwrap_or(value.len()));
    Ok(scheme.eq_ignore_ascii_case(b"Bearer").then(|| token.trim_ascii()))
}

/// Tells whose key it is.
///
/// # Errors
/// [`Code::ScopeMissing`] if that cannot be told safely, [`Code::TokenInvalid`] if a token lacks the claim that tells it.
pub fn tenant(secret: &Secret, route: &RouteOptions, request: &Request<'_>) -> Result<Tenant, Problem> {
    check_trusted(route, request)?;
    // With room for the key.
    let mut parts = Vec::with_capacity(512);
    let (mut bound, mut present) = (false, false);
    for part in &route.scope {
        let kind = part.kind();
        match part {
            Part::Authorization | Part::Cookie(_) | Part::Header(_) => {
                let value = credential(part, request.headers)?;
                if is_credential(part, route) {
                    bound = true;
                    present |= value.is_some();
                }
                feed(&mut parts, &kind, value);
            }
            Part::ClientCert => {
                let holder = request.peer.client_cert.as_ref();
                bound = true;
                present |= holder.is_some();
                feed(&mut parts, &kind, holder.map(|holder| holder.as_bytes().as_slice()));
            }
            Part::Host => {
                let host = request.headers.get(HOST).map(|host| host.as_bytes().to_ascii_lowercase());
                feed(&mut parts, &kind, host.as_deref());
            }
            Part::Path => {
                let segments = &request.path.segments;
                feed(&mut parts, &kind, Some(&(segments.len() as u64).to_le_bytes()));
                segments.iter().for_each(|segment| feed(&mut parts, &["segment"], Some(segment)));
            }
            Part::PathParam(name) => {
                let value = request.params.iter().find(|(param, _)| param == name);
                feed(&mut parts, &kind, value.map(|(_, value)| value.as_slice()));
            }
            Part::Jwt(name) => {
                bound = true;
                let claim = request.claims.map(|claims| claims.get(name)).transpose()?;
                present |= claim.is_some();
                feed(&mut parts, &kind, claim.map(|claim| claim.kind.as_bytes()));
                if let Some(claim) = claim {
                    feed(&mut parts, &["issuer"], claim.issuer.map(str::as_bytes));
                    feed(&mut parts, &["claim"], Some(claim.value.as_bytes()));
                }
            }
        }
    }
    if bound && !present {
        check_anonymous(route, request.headers)?;
    }
    Ok(Tenant { secret: secret.0, parts })
}

/// Whether a part is bound to something that only its owner can send.
#[must_use]
pub fn is_credential(part: &Part, route: &RouteOptions) -> bool {
    match part {
        Part::Authorization | Part::ClientCert | Part::Cookie(_) | Part::Jwt(_) => true,
        Part::Header(name) => route.credential_headers.contains(name) || route.trusted_headers.contains(name),
        Part::Host | Part::Path | Part::PathParam(_) => false,
    }
}

/// The value of a part that stands in a header; an empty one counts as absent.
fn credential<'a>(part: &Part, headers: &'a HeaderMap) -> Result<Option<&'a [u8]>, Problem> {
    let name = match part {
        Part::Cookie(_) => &COOKIE,
        Part::Header(name) => name,
        _ => &AUTHORIZATION,
    };
    let value = only_line(name, headers)?;
    match part {
        Part::Cookie(wanted) => cookie(value.unwrap_or_default(), wanted.as_bytes()),
        Part::Authorization => value.map_or(Ok(None), |value| check_scheme(value).map(|()| Some(value))),
        _ => Ok(value),
    }
}

/// The value of a header on one line; an empty one counts as absent.
fn only_line<'a>(name: &HeaderName, headers: &'a HeaderMap) -> Result<Option<&'a [u8]>, Problem> {
    let mut lines = headers.get_all(name).iter();
    let value = lines.next().map(|value| value.as_bytes().trim_ascii());
    if lines.next().is_some() {
        return Err(missing(format!("{name} stands on two lines; send one, it tells whose key this is.")));
    }
    if connection_names(headers, name) {
        return Err(missing(format!("{name} must not be named in Connection, it tells whose key this is.")));
    }
    Ok(value.filter(|value| !value.is_empty()))
}

/// RFC 6265 §4.2.1. A cookie that is sent twice belongs to two paths or domains: which one counts is not ours to guess.
fn cookie<'a>(line: &'a [u8], wanted: &[u8]) -> Result<Option<&'a [u8]>, Problem> {
    let mut found = None;
    for pair in line.split(|&byte| byte == b';').map(<[u8]>::trim_ascii) {
        let mut halves = pair.splitn(2, |&byte| byte == b'=');
        if halves.next().map(<[u8]>::trim_ascii) == Some(wanted) {
            let value = halves.next().unwrap_or_default().trim_ascii();
            if found.replace(value).is_some() {
                let name = String::from_utf8_lossy(wanted);
                return Err(missing(format!("The cookie {name} is sent twice; send one, it tells whose key this is.")));
            }
        }
    }
    Ok(found.filter(|value| !value.is_empty()))
}

/// Schemes whose value differs with every request: a retry would never find its record.
fn check_scheme(authorization: &[u8]) -> Result<(), Problem> {
    const VARYING: [&[u8]; 5] = [b"AWS4-HMAC-SHA256", b"Digest", b"DPoP", b"OAuth", b"Hawk"];
    let scheme = authorization.split(|byte| byte.is_ascii_whitespace() || *byte == b',').next().unwrap_or_default();
    if !VARYING.iter().any(|varying| scheme.eq_ignore_ascii_case(varying)) {
        return Ok(());
    }
    let scheme = String::from_utf8_lossy(scheme);
    Err(missing(format!(
        "The Authorization scheme {scheme} differs with every request, so no retry would find its record; \
         the gateway's scope needs another part for it, such as a header that names the caller."
    )))
}

/// Headers that a proxy in front sets count from that proxy alone.
fn check_trusted(route: &RouteOptions, request: &Request<'_>) -> Result<(), Problem> {
    if request.peer.trusted {
        return Ok(());
    }
    match route.trusted_headers.iter().find(|name| request.headers.contains_key(*name)) {
        None => Ok(()),
        Some(name) => Err(missing(format!("{name} is accepted from trusted proxies only; do not send it."))),
    }
}

/// Without any credential of the scope all requests share one anonymous tenant; one that bears another credential must
/// not fall in with strangers.
fn check_anonymous(route: &RouteOptions, headers: &HeaderMap) -> Result<(), Problem> {
    let others = std::iter::once(&AUTHORIZATION).chain(&route.credential_headers);
    let bears =
        |name: &&HeaderName| headers.get_all(*name).iter().any(|value| !value.as_bytes().trim_ascii().is_empty());
    let Some(other) = others.into_iter().find(bears) else { return Ok(()) };
    let parts = route.scope.iter().filter(|part| is_credential(part, route));
    let parts = parts.map(ToString::to_string).collect::<Vec<_>>().join(" or ");
    Err(missing(format!(
        "The request bears {other}, but keys here belong to whoever is named by {parts}; send that, \
         or have the operator add {other} to the scope."
    )))
}

fn missing(detail: String) -> Problem {
    Problem::new(Code::ScopeMissing, detail)
}

/// A digest of everything that may tell the caller apart.
pub(super) fn credentials(secret: &Secret, route: &RouteOptions, headers: &HeaderMap, peer: &Peer) -> Credentials {
    let mut parts = Vec::with_capacity(256);
    let names = [&AUTHORIZATION, &COOKIE].into_iter().chain(&route.credential_headers).chain(&route.trusted_headers);
    for name in names {
        for value in headers.get_all(name) {
            feed(&mut parts, &[name.as_str()], Some(value.as_bytes()));
        }
    }
    if let Some(holder) = &peer.client_cert {
        feed(&mut parts, &["client-cert"], Some(holder.as_bytes()));
    }
    Credentials(*blake3::keyed_hash(&secret.0, &parts).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::super::test_support::route_options;
    use super::*;
    use http::HeaderValue;

    const SECRET: Secret = Secret([9; 32]);

    struct Asked {
        headers: HeaderMap,
        path: &'static str,
        trusted: bool,
    }

    fn asked(fields: &[(&str, &str)]) -> Asked {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(HeaderName::try_from(*name).unwrap(), HeaderValue::try_from(*value).unwrap());
        }
        Asked { headers, path: "/posts", trusted: false }
    }

    fn tell(route: &RouteOptions, asked: &Asked) -> Result<(RecordId, Credentials), Problem> {
        let path = NormalPath::new(asked.path.as_bytes());
        let params = super::super::path::matches(&route.pattern, true, &path).unwrap_or_default();
        let peer = Peer { ip: None, trusted: asked.trusted, https: false, client_cert: None };
        let request = Request { headers: &asked.headers, path: &path, params: &params, peer: &peer, claims: None };
        let id = tenant(&SECRET, route, &request)?.record_id(b"key");
        Ok((id, credentials(&SECRET, route, request.headers, request.peer)))
    }

    fn id(route: &RouteOptions, asked: &Asked) -> RecordId {
        tell(route, asked).unwrap().0
    }

    fn refused(route: &RouteOptions, asked: &Asked) -> bool {
        matches!(tell(route, asked), Err(problem) if problem.code == Code::ScopeMissing)
    }

    #[test]
    fn tenants_are_told_apart_by_every_part() {
        let route = route_options(&[Part::Authorization, Part::Path]);
        let alice = asked(&[("authorization", "Bearer alice")]);
        let bob = asked(&[("authorization", "Bearer bob")]);
        assert_eq!(id(&route, &alice), id(&route, &alice));
        assert_ne!(id(&route, &alice), id(&route, &bob));
        let elsewhere = Asked { path: "/other", ..asked(&[("authorization", "Bearer alice")]) };
        assert_ne!(id(&route, &alice), id(&route, &elsewhere));
        assert_ne!(id(&route, &alice), id(&route, &asked(&[])));
        assert_eq!(id(&route, &asked(&[])), id(&route, &asked(&[("authorization", " ")])), "empty is absent");
    }

    #[test]
    fn ids_and_derived_keys_are_the_same_in_every_version() {
        let mut route = route_options(&[
            Part::Authorization,
            Part::Cookie("sid".to_owned()),
            Part::Header(HeaderName::from_static("x-api-key")),
            Part::Host,
            Part::Path,
            Part::ClientCert,
            Part::PathParam("workspace".to_owned()),
        ]);
        route.pattern = crate::gateway::route::Pattern::parse("/v1/{workspace}/posts").unwrap();
        let fields = [("authorization", "Bearer a"), ("cookie", "x=1; sid=7"), ("host", "API.example")];
        let asked = Asked { path: "/v1/w%2F1/posts", ..asked(&fields) };
        let (id, credentials) = tell(&route, &asked).unwrap();
        assert_eq!(id.to_string(), "4300e6629064dd02c6b3fd50a49d5041");
        let path = NormalPath::new(asked.path.as_bytes());
        let peer = Peer { ip: None, trusted: false, https: false, client_cert: None };
        let request =
            Request { headers: &asked.headers, path: &path, params: &Params::default(), peer: &peer, claims: None };
        let tenant = tenant(&SECRET, &route, &request).unwrap();
        assert_eq!(tenant.derive_key(&[5; 32]), "c6ac4a5f42ebdbb88e2955388993d48bcc18b1ef409dbc1479f6eeffd8414dd5");
        assert_eq!(credentials.0[..4], [107, 199, 224, 187]);
    }

    #[test]
    fn a_token_is_looked_at_where_a_part_is_about_it() {
        let fields = [("authorization", "Bearer a.b.c")];
        let route = route_options(&[Part::Jwt("sub".to_owned())]);
        assert_eq!(bearer(&route, &asked(&fields).headers).unwrap(), Some(b"a.b.c".as_slice()));
        assert_eq!(bearer(&route_options(&[Part::Authorization]), &asked(&fields).headers).unwrap(), None);
        for value in ["Basic a", "Bearera", "", "DPoP a.b.c"] {
            assert_eq!(bearer(&route, &asked(&[("authorization", value)]).headers).unwrap(), None, "{value}");
        }
        for value in ["Bearer", "Bearer  ", "bearer\t"] {
            let found = asked(&[("authorization", value)]);
            assert_eq!(bearer(&route, &found.headers).unwrap(), Some(b"".as_slice()), "{value}");
        }
        assert!(bearer(&route, &asked(&[fields[0], fields[0]]).headers).is_err());
        assert!(bearer(&route, &asked(&[fields[0], ("connection", "authorization")]).headers).is_err());
        // One that nobody has verified counts for nothing.
        assert!(refused(&route, &asked(&fields)));
    }

    #[test]
    fn parts_are_joined_unambiguously() {
        let mut route = route_options(&[]);
        route.credential_headers = ["a", "b"].map(HeaderName::from_static).to_vec();
        route.scope = ["a", "b"].map(|name| Part::Header(HeaderName::from_static(name))).to_vec();
        let one = id(&route, &asked(&[("a", "xy"), ("b", "z")]));
        assert_ne!(one, id(&route, &asked(&[("a", "x"), ("b", "yz")])));
        assert_ne!(one, id(&route, &asked(&[("a", "xyz")])));
        assert_ne!(id(&route, &asked(&[("a", "x")])), id(&route, &asked(&[("b", "x")])));
        let by_path = route_options(&[Part::Authorization, Part::Path]);
        let slash = Asked { path: "/a%2Fb", ..asked(&[]) };
        assert_ne!(id(&by_path, &slash), id(&by_path, &Asked { path: "/a/b", ..asked(&[]) }));
        let escaped = Asked { path: "/%61%2fb/", ..asked(&[]) };
        assert_eq!(id(&by_path, &slash), id(&by_path, &escaped), "compared fully decoded");
    }

    #[test]
    fn an_anonymous_request_with_another_credential_is_refused() {
        let route = route_options(&[Part::Cookie("sid".to_owned()), Part::Path]);
        assert!(tell(&route, &asked(&[])).is_ok());
        assert!(tell(&route, &asked(&[("cookie", "a=1; sid=x"), ("x-api-key", "k")])).is_ok());
        for field in [("x-api-key", "k"), ("cookie", "other=1"), ("authorization", "Bearer x")] {
            assert!(refused(&route, &asked(&[field])), "{field:?}");
        }
    }

    #[test]
    fn a_scope_header_on_two_lines_or_named_in_connection_is_refused() {
        let route = route_options(&[Part::Authorization]);
        assert!(refused(&route, &asked(&[("authorization", "Bearer a"), ("authorization", "Bearer a")])));
        assert!(refused(&route, &asked(&[("authorization", "Bearer a"), ("connection", "Authorization")])));
        let cookie = route_options(&[Part::Cookie("sid".to_owned())]);
        assert!(refused(&cookie, &asked(&[("cookie", "sid=a; sid=b")])));
    }

    #[test]
    fn schemes_that_differ_with_every_request_are_refused() {
        let route = route_options(&[Part::Authorization]);
        for value in ["AWS4-HMAC-SHA256 Credential=x", "digest username=\"a\"", "DPoP x", "OAuth a=b", "Hawk id=1"] {
            assert!(refused(&route, &asked(&[("authorization", value)])), "{value}");
        }
        for value in ["Bearer DPoP", "Basic YTpi", "Digestive x"] {
            assert!(tell(&route, &asked(&[("authorization", value)])).is_ok(), "{value}");
        }
    }

    #[test]
    fn trusted_headers_count_from_trusted_peers_only() {
        let user = HeaderName::from_static("x-user");
        let mut route = route_options(&[Part::Header(user.clone())]);
        route.trusted_headers = vec![user];
        let fields = [("x-user", "alice")];
        assert!(refused(&route, &asked(&fields)));
        assert!(tell(&route, &Asked { trusted: true, ..asked(&fields) }).is_ok());
        assert!(refused(&route, &Asked { trusted: true, ..asked(&[("x-api-key", "k")]) }));
    }

    #[test]
    fn credentials_differ_with_any_of_them() {
        let route = route_options(&[Part::Authorization]);
        let base = [("authorization", "Bearer a"), ("x-api-key", "k")];
        let credentials = |fields: &[(&str, &str)]| tell(&route, &asked(fields)).unwrap().1;
        assert_eq!(credentials(&base), credentials(&base));
        assert_ne!(credentials(&base), credentials(&[("authorization", "Bearer a"), ("x-api-key", "l")]));
        assert_ne!(credentials(&base), credentials(&base[..1]));
    }
}
