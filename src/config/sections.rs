//! Sections, key by key, with their defaults.

use super::Config;
use super::auth::Auth;
use super::reader::{At, Errors, Node, Section, Value, boolean, count, duration, size, string};
use super::routes::{self, Absent};
use super::{cors, shared, upstream};
use crate::admin::TokenFile;
use crate::gateway::cors::AllowOrigins;
use crate::gateway::{self, RouteOptions, tunnel};
use crate::pem::FileError;
use crate::server::tls::{self, Tls};
use crate::server::{Address, Limits};
use crate::{admin, ledger, server};
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddrV6};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub(super) const ZERO: Duration = Duration::ZERO;
/// Where zero would mean "never in time".
pub(super) const TICK: Duration = Duration::from_millis(1);
const MIB: u64 = 1 << 20;
/// Far beyond what a process can hold, and within what the runtime's counters take.
pub(super) const COUNT_MAX: usize = 1 << 24;
/// Each is an operating system thread.
const WORKERS_MAX: usize = 1024;

pub(super) const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Resolves all sections; `None` if what is missing has no default to go on with.
pub(super) fn resolve(root: Node, errors: &mut Errors) -> Option<Config> {
    let mut top = Section::new("", Some(root), errors);
    let server_node = top.take("server");
    let upstream_node = top.take("upstream");
    let routes_node = top.take("routes");
    let idempotency_node = top.take("idempotency");
    let cache_node = top.take("cache");
    let store_node = top.take("store");
    let admin_node = top.take("admin");
    let auth_node = top.take("auth");
    top.finish();

    let (server, client) = server_section(server_node, errors);
    let upstream = upstream::resolve(upstream_node, errors);
    let auth = Auth::read(auth_node, errors);
    let before = errors.count();
    let absent = Absent { token_keys: auth.has_no_keys, ..client.absent };
    let wait = upstream.as_ref().map_or(Duration::ZERO, |up| up.response_timeout + up.late_window);
    let routes = routes::resolve(routes_node, idempotency_node, absent, wait, errors);
    let auth = auth.resolve(&routes, errors.count() == before, errors);
    let store = shared::resolve(store_node, errors);
    let ledger = cache_section(cache_node, store.lease, errors);
    let routes = with_lease(routes, store.lease);
    let (admin, admin_at) = admin_section(admin_node, errors);
    contradictions((&server.listen, &client.listen_at), (&admin.listen, &admin_at), errors);
    let Client { trusted_proxies, cors, max_body, max_buffered, body_timeout, .. } = client;
    let limits = &server.limits;
    let tunnels = tunnel::Limits { write_timeout: limits.write_timeout, half_closed_timeout: limits.idle_timeout };
    let upstream = upstream?;
    let gateway = gateway::Options {
        routes,
        trusted_proxies,
        cors,
        max_body,
        max_buffered,
        body_timeout,
        tunnels,
        upstream,
        auth,
    };
    Some(Config { server, gateway, ledger, store: store.options, admin })
}

/// Addresses that cannot stand together. A default is never to blame: the key that was written is.
fn contradictions((listen, listen_at): (&[Address], &At), (admin, admin_at): (&Address, &At), errors: &mut Errors) {
    for (n, address) in listen.iter().enumerate() {
        if listen.iter().take(n).any(|earlier| overlap(earlier, address)) {
            errors.add(listen_at, "server.listen", &format!("{address} is taken by an earlier address of the list"));
        }
        if overlap(address, admin) {
            let (at, key, other) = match admin_at {
                At::Nowhere => (listen_at, "server.listen", "admin.listen"),
                _ => (admin_at, "admin.listen", "server.listen"),
            };
            errors.add(at, key, &format!("{address} is {other} already; choose another port"));
        }
    }
}

fn host_and_port(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    Some((host, port.parse().ok()?))
}

/// Whether two addresses surely cannot be listened to at once. Port 0 is a new port each time.
fn overlap(one: &Address, other: &Address) -> bool {
    let (Address::Tcp(one_text), Address::Tcp(other_text)) = (one, other) else { return one == other };
    match (host_and_port(one_text), host_and_port(other_text)) {
        (Some((_, 0)), _) | (_, Some((_, 0))) => false,
        (Some((host, port)), Some((other_host, other_port))) => {
            let ipv4 = |host: &str| host.parse::<std::net::Ipv4Addr>().is_ok();
            let all = |host: &str| host == "0.0.0.0";
            let same = host.eq_ignore_ascii_case(other_host);
            port == other_port && (same || all(host) && ipv4(other_host) || all(other_host) && ipv4(host))
        }
        _ => false,
    }
}

/// What `[server]` says to the gateway and to other sections.
struct Client {
    listen_at: At,
    trusted_proxies: Vec<IpNet>,
    cors: AllowOrigins,
    absent: Absent,
    max_body: usize,
    max_buffered: usize,
    body_timeout: Duration,
}

fn server_section(node: Option<Node>, errors: &mut Errors) -> (server::Options, Client) {
    let mut section = Section::new("server", node, errors);
    let listen_at = section.at("listen");
    let listen = section.read_one_or_more("listen", address);
    if listen.as_ref().is_some_and(Vec::is_empty) {
        section.add(&listen_at, "listen", "needs at least one address");
    }
    let listen = listen.unwrap_or_else(|| vec![Address::Tcp("127.0.0.1:8080".to_owned())]);
    let workers = section.read("workers", count(0, WORKERS_MAX)).unwrap_or(0);
    let drain_delay = section.read("drain_delay", duration(ZERO)).unwrap_or(ZERO);
    let drain_timeout = section.read("drain_timeout", duration(ZERO)).unwrap_or(seconds(25));
    let before = section.errors.count();
    let trusted_proxies = section.read_list("trusted_proxies", network).unwrap_or_default();
    let no_trusted_proxies = trusted_proxies.is_empty() && section.errors.count() == before;
    let before = section.errors.count();
    let tls_node = section.take("tls");
    let tls = tls_node.and_then(|node| tls_section(node, section.errors));
    let has_certs = tls.as_ref().is_some_and(|tls| tls.asks_for_certificates())
        && listen.iter().any(|address| matches!(address, Address::Tcp(_)));
    let no_client_certs = !has_certs && section.errors.count() == before;
    let cors_node = section.take("cors");
    let cors = cors::resolve(cors_node, section.errors);
    let limits_node = section.take("limits");
    section.finish();

    let mut section = Section::new("server.limits", limits_node, errors);
    let limits = Limits {
        header_timeout: section.read("header_timeout", duration(TICK)).unwrap_or(seconds(10)),
        idle_timeout: section.read("idle_timeout", duration(TICK)).unwrap_or(seconds(75)),
        write_timeout: section.read("write_timeout", duration(TICK)).unwrap_or(seconds(30)),
        // The HTTP library's smallest buffer.
        max_header_bytes: to_usize(section.read("max_header_bytes", size(8192)).unwrap_or(64 << 10)),
        max_connections: section.read("max_connections", count(1, COUNT_MAX)).unwrap_or(10_000),
    };
    let (body_at, buffered_at) = (section.at("max_body"), section.at("max_buffered"));
    let max_body = section.read("max_body", size(0)).unwrap_or(MIB);
    let max_buffered = section.read("max_buffered", size(1)).unwrap_or(256 * MIB);
    if max_body > max_buffered {
        if body_at == At::Nowhere {
            let message = "is smaller than max_body, which is 1MiB by default, so the largest bodies would never fit";
            section.add(&buffered_at, "max_buffered", message);
        } else {
            section.add(&body_at, "max_body", "is larger than max_buffered, so the largest bodies would never fit");
        }
    }
    let body_timeout = section.read("body_timeout", duration(TICK)).unwrap_or(seconds(30));
    section.finish();
    let client = Client {
        listen_at,
        trusted_proxies,
        cors,
        absent: Absent { trusted_proxies: no_trusted_proxies, client_certs: no_client_certs, token_keys: true },
        max_body: to_usize(max_body),
        max_buffered: to_usize(max_buffered),
        body_timeout,
    };
    (server::Options { listen, workers, drain_delay, drain_timeout, limits, tls }, client)
}

/// Reads the files, too: what is wrong with them is wrong with the configuration.
fn tls_section(node: Node, errors: &mut Errors) -> Option<Arc<Tls>> {
    let at = node.at.clone();
    let mut section = Section::new("server.tls", Some(node), errors);
    let before = section.errors.count();
    let key_at = ["cert", "key", "client_ca"].map(|key| (key, section.at(key)));
    let (cert, key) = (section.read("cert", file), section.read("key", file));
    let client_ca = section.read("client_ca", file);
    for (name, written) in key_at.iter().take(2) {
        if *written == At::Nowhere {
            section.add(&at, name, "is missing; write the path of a PEM file");
        }
    }
    let sound = section.errors.count() == before;
    let options = cert.zip(key).filter(|_| sound).map(|(cert, key)| tls::Options { cert, key, client_ca });
    let tls = options.and_then(|options| {
        let failed = |error: &FileError| {
            let place = key_at.iter().find(|(key, _)| *key == error.key).map_or(&at, |(_, at)| at);
            section.add(place, error.key, &error.to_string());
        };
        Tls::load(options).inspect_err(failed).ok()
    });
    section.finish();
    tls.map(Arc::new)
}

pub(super) fn file(value: &Value) -> Result<PathBuf, String> {
    match string(value)?.as_str() {
        "" => Err("must not be empty".to_owned()),
        path => Ok(PathBuf::from(path)),
    }
}

/// `host:port` or `unix:/path`.
fn address(value: &Value) -> Result<Address, String> {
    let text = string(value)?;
    if let Some(path) = text.strip_prefix("unix:") {
        let absolute = path.starts_with('/');
        return if absolute {
            Ok(Address::Unix(PathBuf::from(path)))
        } else {
            Err(format!("{text:?} needs an absolute path"))
        };
    }
    let wrong = || {
        format!(
            "{text:?} is no address; write one such as \"127.0.0.1:8080\", \"[::1]:8080\" or \"unix:/run/oncegate.sock\""
        )
    };
    let (host, digits) = text.rsplit_once(':').ok_or_else(wrong)?;
    if !is_host(host) || port(digits).is_none() {
        return Err(wrong());
    }
    Ok(Address::Tcp(text))
}

/// A name or an address, IPv6 in brackets. Underscores occur in names of containers.
pub(super) fn is_host(host: &str) -> bool {
    if host.starts_with('[') {
        return format!("{host}:0").parse::<SocketAddrV6>().is_ok();
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    (1..=253).contains(&host.len()) && host.bytes().all(plain)
}

/// Digits alone: [`str::parse`] takes a sign, too.
pub(super) fn port(digits: &str) -> Option<u16> {
    digits.parse().ok().filter(|_| digits.bytes().all(|byte| byte.is_ascii_digit()))
}

/// An address or a network.
fn network(value: &Value) -> Result<IpNet, String> {
    let text = string(value)?;
    let network = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    network.ok_or_else(|| format!("{text:?} is neither an address nor a network such as \"10.0.0.0/8\""))
}

/// Claims in a shared store live by leases, whatever their route.
fn with_lease(mut routes: Vec<RouteOptions>, lease: Option<Duration>) -> Vec<RouteOptions> {
    let lease_ms = lease.map(|lease| u64::try_from(lease.as_millis()).unwrap_or(u64::MAX));
    routes.iter_mut().for_each(|route| route.policy.lease_ms = lease_ms);
    routes
}

fn cache_section(node: Option<Node>, lease: Option<Duration>, errors: &mut Errors) -> ledger::Options {
    let mut section = Section::new("cache", node, errors);
    let cache_max_bytes = section.read("max_bytes", size(0)).unwrap_or(64 * MIB);
    // An operator's act at another gateway is not heard of here.
    let cache_max_age = section.read("max_age", duration(TICK)).or(lease.map(|_| seconds(60)));
    section.finish();
    ledger::Options { cache_max_bytes, cache_max_age, lease }
}

/// Also says where its address was written. Reads the file of tokens.
fn admin_section(node: Option<Node>, errors: &mut Errors) -> (admin::Options, At) {
    let mut section = Section::new("admin", node, errors);
    let at = section.at("listen");
    let listen = section.read("listen", address).unwrap_or_else(|| Address::Tcp("127.0.0.1:9090".to_owned()));
    let ready_needs_store = section.read("ready_needs_store", boolean).unwrap_or(false);
    let token_file_at = section.at("token_file");
    let token_file = section.read("token_file", file);
    let tokens = token_file.and_then(|path| {
        let failed = |error: &String| section.add(&token_file_at, "token_file", error);
        TokenFile::load(path).inspect_err(failed).ok().map(Arc::new)
    });
    let options = admin::Options { listen, ready_needs_store, tokens };
    if token_file_at == At::Nowhere && options.is_exposed_at(&options.listen) {
        let message =
            "is open to other machines, and so would be the records: write admin.token_file, or listen on loopback";
        section.add(&at, "listen", message);
    }
    section.finish();
    (options, at)
}
