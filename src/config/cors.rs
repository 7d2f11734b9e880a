//! `[server.cors]`.

use super::reader::{Errors, Node, Section, Value, string};
use super::sections::{is_host, port};
use crate::gateway::cors::AllowOrigins;
use http::HeaderValue;
use std::net::Ipv6Addr;

pub(super) fn resolve(node: Option<Node>, errors: &mut Errors) -> AllowOrigins {
    let mut section = Section::new("server.cors", node, errors);
    let at = section.at("allow_origins");
    let origins = section.read_one_or_more("allow_origins", origin).unwrap_or_default();
    if origins.len() > 1 && origins.iter().any(|origin| origin == "*") {
        section.add(&at, "allow_origins", "\"*\" means every origin; write it alone, or name those that you mean");
    }
    section.finish();
    AllowOrigins(origins)
}

/// "*", or an origin as browsers serialize it (HTML standard, "ASCII serialisation of an origin"): any other text would never
/// be met.
fn origin(value: &Value) -> Result<HeaderValue, String> {
    let text = string(value)?;
    if text == "null" {
        return Err(
            "\"null\" is sent by pages of many makers, sandboxed ones and local files; it cannot be allowed".to_owned()
        );
    }
    if text != "*" {
        let canonical = canonical(&text)?;
        if canonical != text {
            return Err(format!("browsers send {text:?} as {canonical:?}; write it so"));
        }
    }
    HeaderValue::try_from(text).map_err(|error| error.to_string())
}

fn canonical(text: &str) -> Result<String, String> {
    let wrong = || format!("{text:?} is no origin; write one such as \"https://app.example\", or \"*\"");
    let (scheme, authority) = text.split_once("://").ok_or_else(wrong)?;
    let scheme = scheme.to_ascii_lowercase();
    let default_port = match scheme.as_str() {
        "http" => 80,
        "https" => 443,
        _ => return Err(format!("{text:?} is no origin of http or https")),
    };
    if authority.contains(['/', '?', '#', '@']) {
        return Err(format!(
            "{text:?} is more than an origin, which is a scheme, a host and perhaps a port, and has no path"
        ));
    }
    // The colons in brackets are the address's.
    let (host, digits) = match authority.rsplit_once(':') {
        Some((host, digits)) if !digits.ends_with(']') => (host, Some(digits)),
        _ => (authority, None),
    };
    let port = digits.map(|digits| port(digits).filter(|port| *port > 0).ok_or_else(wrong)).transpose()?;
    let is_host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => is_host(host),
    };
    if !is_host {
        return Err(wrong());
    }
    let port = port.filter(|port| *port != default_port).map(|port| format!(":{port}")).unwrap_or_default();
    Ok(format!("{scheme}://{}{port}", host.to_ascii_lowercase()))
}
