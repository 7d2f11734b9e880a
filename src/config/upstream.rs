//! `[upstream]` and `[upstream.tls]`.

use super::reader::{At, Errors, Node, Section, Value, count, duration, string};
use super::sections::{COUNT_MAX, TICK, ZERO, file, is_host, port, seconds};
use crate::gateway::upstream::tls::Connector;
use crate::gateway::upstream::{self, Endpoint, HostPolicy};
use http::HeaderValue;
use http::uri::Authority;
use rustls::pki_types::ServerName;
use std::path::PathBuf;
use std::sync::Arc;

/// `[upstream]`; `None` if there is no URL to go on with.
pub(super) fn resolve(node: Option<Node>, errors: &mut Errors) -> Option<upstream::Options> {
    let mut section = Section::new("upstream", node, errors);
    let resolved = match section.take("url") {
        None => url("http://127.0.0.1:3000"),
        Some(node) => string(&node.value).and_then(|text| url(&text)).inspect_err(|message| {
            section.add(&node.at, "url", message);
        }),
    };
    let connect_timeout = section.read("connect_timeout", duration(TICK)).unwrap_or(seconds(2));
    let response_timeout = section.read("response_timeout", duration(TICK)).unwrap_or(seconds(30));
    let late_window = section.read("late_window", duration(ZERO)).unwrap_or(seconds(300));
    let idle_timeout = section.read("idle_timeout", duration(ZERO)).unwrap_or(seconds(4));
    let max_in_flight = section.read("max_in_flight", count(1, COUNT_MAX)).unwrap_or(1024);
    let host = section.read("host", host_policy).unwrap_or(HostPolicy::Preserve);
    let tls_at = section.at("tls");
    let tls_node = section.take("tls");
    section.finish();
    let tls = tls(tls_node, &tls_at, resolved.as_ref().ok(), errors);
    let Url { endpoint, authority, .. } = resolved.ok()?;
    Some(upstream::Options {
        endpoint,
        tls,
        authority,
        connect_timeout,
        response_timeout,
        late_window,
        idle_timeout,
        max_in_flight,
        host,
    })
}

/// `[upstream.tls]`. Its files are read here, so that a broken one is found with all other errors.
fn tls(node: Option<Node>, at: &At, url: Option<&Url>, errors: &mut Errors) -> Option<Arc<Connector>> {
    let mut section = Section::new("upstream.tls", node, errors);
    let places = ["ca", "cert", "key"].map(|key| (key, section.at(key)));
    let place = |key: &str| places.iter().find(|(name, _)| *name == key).map_or(at, |(_, place)| place);
    let before = section.errors.count();
    let ca = section.read("ca", file);
    let server_name = section.read("server_name", |value| {
        let text = string(value)?;
        ServerName::try_from(text.clone()).map_err(|_| format!("{text:?} is neither a host name nor an IP address"))
    });
    let (cert, key) = (section.read("cert", file), section.read("key", file));
    section.finish();
    if errors.count() != before {
        return None;
    }
    let identity = match (cert, key) {
        (Some(cert), Some(key)) => Some((cert, key)),
        (None, None) => None,
        (cert, _) => {
            let (has, lacks) = if cert.is_some() { ("cert", "key") } else { ("key", "cert") };
            errors.add(place(has), &format!("upstream.tls.{has}"), &format!("needs {lacks} beside it"));
            return None;
        }
    };
    let host = match url? {
        Url { secure: true, endpoint: Endpoint::Tcp { host, .. }, .. } => host,
        _ if *at == At::Nowhere => return None,
        _ => {
            errors.add(at, "upstream.tls", "means nothing unless upstream.url is https");
            return None;
        }
    };
    let Some(server_name) = server_name.or_else(|| ServerName::try_from(host.clone()).ok()) else {
        errors.add(at, "upstream.tls.server_name", &format!("is needed: no certificate can bear the name {host}"));
        return None;
    };
    match Connector::load(upstream::tls::Options { server_name, ca, identity }) {
        Ok(connector) => Some(Arc::new(connector)),
        Err(failures) => {
            for failure in failures {
                errors.add(place(failure.key), &format!("upstream.tls.{}", failure.key), &failure.message);
            }
            None
        }
    }
}

/// What `upstream.url` says.
pub(super) struct Url {
    pub(super) endpoint: Endpoint,
    pub(super) authority: HeaderValue,
    /// https.
    pub(super) secure: bool,
}

pub(super) fn url(text: &str) -> Result<Url, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        if !path.starts_with('/') {
            return Err(format!("{text:?} needs an absolute path"));
        }
        let endpoint = Endpoint::Unix(PathBuf::from(path));
        return Ok(Url { endpoint, authority: HeaderValue::from_static("localhost"), secure: false });
    }
    let wrong = || format!("{text:?} is no upstream; write http://host:port, https://host:port or unix:/path");
    let (rest, secure) = match (text.strip_prefix("http://"), text.strip_prefix("https://")) {
        (Some(rest), _) => (rest, false),
        (_, Some(rest)) => (rest, true),
        _ => return Err(wrong()),
    };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    if rest.contains(['/', '?', '#', '@']) {
        return Err(format!("{text:?} must end after host and port: requests keep their own path"));
    }
    let authority = Authority::try_from(rest).map_err(|_| wrong())?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = match rest.strip_prefix(authority.host()) {
        Some("") => {
            if secure {
                443
            } else {
                80
            }
        }
        Some(after) => after.strip_prefix(':').and_then(port).filter(|port| *port > 0).ok_or_else(wrong)?,
        None => return Err(wrong()),
    };
    if !is_host(authority.host()) {
        return Err(wrong());
    }
    let value = HeaderValue::try_from(authority.as_str()).map_err(|_| wrong())?;
    Ok(Url { endpoint: Endpoint::Tcp { host, port }, authority: value, secure })
}

fn host_policy(value: &Value) -> Result<HostPolicy, String> {
    let text = string(value)?;
    match text.as_str() {
        "preserve" => Ok(HostPolicy::Preserve),
        "upstream" => Ok(HostPolicy::Upstream),
        name => match (Authority::try_from(name), HeaderValue::try_from(name)) {
            (Ok(authority), Ok(value)) if is_authority(name, authority.host()) => Ok(HostPolicy::Name(value)),
            _ => Err(format!("{text:?} is neither \"preserve\", \"upstream\" nor a host name")),
        },
    }
}

/// A host and perhaps a port, and nothing else.
fn is_authority(text: &str, host: &str) -> bool {
    let after = text.strip_prefix(host);
    is_host(host) && after.is_some_and(|after| after.is_empty() || after.strip_prefix(':').and_then(port).is_some())
}
