//! `[auth]`: whose tokens `jwt:` parts of a scope believe.

use super::reader::{At, Errors, Node, Section, Value, string};
use super::sections::{ZERO, file, seconds};
use super::upstream::url;
use crate::gateway::RouteOptions;
use crate::gateway::jwt::{self, Keys, Source};
use crate::gateway::scope::Part;
use crate::gateway::upstream::{Endpoint, HostPolicy, Options, tls};
use http::uri::PathAndQuery;
use rustls::pki_types::ServerName;
use std::sync::Arc;

/// What the section says.
pub(super) struct Auth {
    at: At,
    keys: Option<Keys>,
    /// Neither written nor miswritten.
    pub(super) has_no_keys: bool,
    sound: bool,
    issuer: Option<String>,
    audience: Option<Vec<String>>,
}

impl Auth {
    /// Reads the section, and the file that it names: what is wrong with that is wrong with the configuration.
    pub(super) fn read(node: Option<Node>, errors: &mut Errors) -> Self {
        let at = node.as_ref().map_or(At::Nowhere, |node| node.at.clone());
        let before = errors.count();
        let mut section = Section::new("auth", node, errors);
        let (file_at, url_at, audience_at) = (section.at("jwks_file"), section.at("jwks_url"), section.at("audience"));
        let path = section.read("jwks_file", file);
        let source = section.read("jwks_url", source);
        let issuer = section.read("issuer", not_empty);
        let audience = section.read_one_or_more("audience", not_empty);
        if audience.as_ref().is_some_and(Vec::is_empty) {
            section.add(&audience_at, "audience", "needs at least one name; without the key, aud is not looked at");
        }
        let has_no_keys = file_at == At::Nowhere && url_at == At::Nowhere;
        if file_at != At::Nowhere && url_at != At::Nowhere {
            section.add(&url_at, "jwks_url", "stands beside jwks_file; keys come from one of them");
        }
        let (source, key, key_at) = match path {
            Some(path) => (Some(Source::File(path)), "jwks_file", file_at),
            None => (source, "jwks_url", url_at),
        };
        let keys =
            source.and_then(|source| Keys::new(source).map_err(|message| section.add(&key_at, key, &message)).ok());
        section.finish();
        Self { at, keys, has_no_keys, sound: errors.count() == before, issuer, audience }
    }

    /// What verifies tokens, if a scope asks for that; `routes_are_sound`: nothing is concluded from their defaults.
    pub(super) fn resolve(
        self,
        routes: &[RouteOptions],
        routes_are_sound: bool,
        errors: &mut Errors,
    ) -> Option<Arc<jwt::Auth>> {
        let mut claims = Vec::new();
        for part in routes.iter().flat_map(|route| &route.scope) {
            if let Part::Jwt(claim) = part
                && !claims.contains(claim)
            {
                claims.push(claim.clone());
            }
        }
        if claims.is_empty() {
            if routes_are_sound && self.sound && self.at != At::Nowhere {
                let message = "means nothing unless a scope has a part jwt:CLAIM, such as \"jwt:sub\"";
                errors.add(&self.at, "auth", message);
            }
            return None;
        }
        let options = jwt::Options { issuer: self.issuer, audience: self.audience, claims };
        Some(Arc::new(jwt::Auth::new(options, self.keys?)))
    }
}

fn not_empty(value: &Value) -> Result<String, String> {
    string(value).and_then(|text| if text.is_empty() { Err("must not be empty".to_owned()) } else { Ok(text) })
}

/// `http` or `https`, a host, perhaps a port, and where the keys are there.
fn source(value: &Value) -> Result<Source, String> {
    let text = string(value)?;
    let wrong = || format!("{text:?} is no URL of a key set; write one such as \"https://id.example/jwks.json\"");
    let after_scheme = text.find("://").ok_or_else(wrong)? + 3;
    let rest = text.get(after_scheme..).unwrap_or_default();
    let (server, target) = text.split_at(after_scheme + rest.find(['/', '?']).unwrap_or(rest.len()));
    if text.contains('#') || server.starts_with("unix:") {
        return Err(wrong());
    }
    let url = url(server).map_err(|_| wrong())?;
    let target = if target.starts_with('/') { target.to_owned() } else { format!("/{target}") };
    let target = PathAndQuery::try_from(target).map_err(|_| wrong())?;
    let tls = match (&url.endpoint, url.secure) {
        (Endpoint::Tcp { host, .. }, true) => {
            let server_name = ServerName::try_from(host.clone());
            let server_name = server_name.map_err(|_| format!("no certificate can bear the name {host}"))?;
            let connector = tls::Connector::load(tls::Options { server_name, ca: None, identity: None });
            let reasons = |failures: Vec<crate::pem::FileError>| {
                failures.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
            };
            Some(Arc::new(connector.map_err(reasons)?))
        }
        _ => None,
    };
    let upstream = Options {
        endpoint: url.endpoint,
        tls,
        authority: url.authority,
        // Longer than the whole fetch may take: that is what ends it.
        connect_timeout: seconds(60),
        response_timeout: seconds(60),
        late_window: ZERO,
        idle_timeout: ZERO,
        max_in_flight: 1,
        host: HostPolicy::Upstream,
    };
    Ok(Source::Url { text, upstream: Box::new(upstream), target })
}
