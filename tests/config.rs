//! What a configuration may say, and what is said about one that is wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]

use oncegate::config::{Config, Flags, parse};
use std::time::Duration;

fn lines(text: &str) -> Vec<String> {
    match parse("f.toml", text, [], &Flags::default()) {
        Ok(_) => Vec::new(),
        Err(errors) => errors.lines,
    }
}

fn with_environment(text: &str, variables: &[(&str, &str)]) -> Result<Config, Vec<String>> {
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    parse("f.toml", text, variables, &Flags::default()).map_err(|errors| errors.lines)
}

fn good(text: &str) -> String {
    let config = parse("f.toml", text, [], &Flags::default());
    format!("{:?}", config.unwrap_or_else(|errors| panic!("{text}\n{errors}")))
}

/// Text, the only error's start and a fragment of it.
const ERRORS: &[(&str, &str, &str)] = &[
    // Names.
    ("[server]\nlissen = \"a:1\"", "f.toml:2: server.lissen: ", "did you mean listen?"),
    ("[sever]", "f.toml:1: sever: ", "did you mean server?"),
    ("[server.limits]\n\nzzzzzz = 1", "f.toml:3: server.limits.zzzzzz: ", "there are: header_timeout, "),
    ("[[routes]]\npath = \"/a\"\nretension = \"1h\"", "f.toml:3: routes[0].retension: ", "did you mean retention?"),
    ("[idempotency.outcomes]\nfinl = []", "f.toml:2: idempotency.outcomes.finl: ", "did you mean final?"),
    // Types.
    ("server = 1", "f.toml:1: server: ", "must be a table"),
    ("server.workers = \"2\"", "f.toml:1: server.workers: ", "must be an integer, not a string"),
    ("server.workers = 1.5", "f.toml:1: server.workers: ", "must be an integer, not a float"),
    ("server.workers = -1", "f.toml:1: server.workers: ", "must be 0 or more, not -1"),
    ("store.create = \"true\"", "f.toml:1: store.create: ", "must be true or false, not a string"),
    ("store.path = 7", "f.toml:1: store.path: ", "must be a string, not an integer"),
    ("store.path = \"\"", "f.toml:1: store.path: ", "must not be empty"),
    ("idempotency.scope = \"path\"", "f.toml:1: idempotency.scope: ", "must be a list, not a string"),
    ("routes = 1", "f.toml:1: routes: ", "must be a list of tables"),
    ("server.listen = []", "f.toml:1: server.listen: ", "at least one address"),
    ("server.listen = \"8080\"", "f.toml:1: server.listen: ", "is no address"),
    ("server.listen = \"a:65536\"", "f.toml:1: server.listen: ", "is no address"),
    ("server.listen = \"::1:80\"", "f.toml:1: server.listen: ", "is no address"),
    ("server.listen = \"unix:x\"", "f.toml:1: server.listen: ", "absolute path"),
    ("server.trusted_proxies = [\"10.0.0.0/33\"]", "f.toml:1: server.trusted_proxies: ", "neither an address nor"),
    ("idempotency.header = \"a b\"", "f.toml:1: idempotency.header: ", "is no header name"),
    ("store.durability = \"lax\"", "f.toml:1: store.durability: ", "none of \"strict\", \"relaxed\""),
    // Durations and sizes.
    ("server.drain_timeout = 5", "f.toml:1: server.drain_timeout: ", "must be a duration with its unit"),
    ("server.drain_timeout = \"5\"", "f.toml:1: server.drain_timeout: ", "is no duration"),
    ("server.drain_timeout = \"s\"", "f.toml:1: server.drain_timeout: ", "is no duration"),
    ("server.drain_timeout = \"1.5s\"", "f.toml:1: server.drain_timeout: ", "is no duration"),
    ("server.drain_timeout = \"-1s\"", "f.toml:1: server.drain_timeout: ", "is no duration"),
    ("server.drain_timeout = \"36601d\"", "f.toml:1: server.drain_timeout: ", "100 years"),
    ("server.drain_timeout = \"99999999999999999999h\"", "f.toml:1: server.drain_timeout: ", "100 years"),
    ("idempotency.retention = \"0s\"", "f.toml:1: idempotency.retention: ", "at least 1ms"),
    ("cache.max_bytes = \"1MB\"", "f.toml:1: cache.max_bytes: ", "is no size"),
    ("cache.max_bytes = -1", "f.toml:1: cache.max_bytes: ", "is no size"),
    ("cache.max_bytes = \"8388608TiB\"", "f.toml:1: cache.max_bytes: ", "is no size"),
    ("cache.max_bytes = true", "f.toml:1: cache.max_bytes: ", "must be a size"),
    ("server.limits.max_header_bytes = 8191", "f.toml:1: server.limits.max_header_bytes: ", "at least 8192"),
    // The upstream.
    ("upstream.url = \"ftp://a\"", "f.toml:1: upstream.url: ", "is no upstream"),
    ("upstream.url = \"http://a/b\"", "f.toml:1: upstream.url: ", "must end after host and port"),
    ("upstream.url = \"http://u@a\"", "f.toml:1: upstream.url: ", "must end after host and port"),
    ("upstream.url = \"http://:80\"", "f.toml:1: upstream.url: ", "is no upstream"),
    ("upstream.url = \"http://a:0\"", "f.toml:1: upstream.url: ", "is no upstream"),
    ("upstream.host = \"a b\"", "f.toml:1: upstream.host: ", "nor a host name"),
    // Contradictions.
    (
        "[[routes]]\npath = \"/a\"\nscope = [\"path\"]",
        "f.toml:3: routes[0].scope: ",
        "no part that only the key's owner",
    ),
    (
        "[[routes]]\npath = \"/a\"\nscope = [\"authorization\", \"path:id\"]",
        "f.toml:3: routes[0].scope: ",
        "path parameter id",
    ),
    (
        "[[routes]]\npath = \"/a\"\ntrusted_headers = [\"x-user\"]",
        "f.toml:3: routes[0].trusted_headers: ",
        "needs server.trusted_proxies",
    ),
    (
        "server.trusted_proxies = [\"::1\"]\n[[routes]]\npath = \"/a\"\ntrusted_headers = [\"cookie\"]",
        "f.toml:4: routes[0].trusted_headers: ",
        "credential_headers too",
    ),
    (
        "idempotency.fingerprint = \"none\"\n[[routes]]\npath = \"/a\"\nmissing_key = \"derive\"",
        "f.toml:4: routes[0].missing_key: ",
        "needs a fingerprint",
    ),
    ("[[routes]]\npath = \"/a\"\nfingerprint_ignore = [\"x\"]", "f.toml:3: routes[0].fingerprint_ignore: ", "x"),
    ("[[routes]]\ncase_sensitive = false", "f.toml:1: routes[0].path: ", "is missing"),
    (
        "[[routes]]\npath = \"/a/{x}\"\n[[routes]]\npath = \"/a/{y}\"",
        "f.toml:3: routes[1].path: ",
        "matches the same paths as",
    ),
    (
        "[[routes]]\npath = \"/a\"\n[[routes]]\npath = \"/A\"\ncase_sensitive = false",
        "f.toml:3: routes[1].path: ",
        "matches the same paths as",
    ),
    ("idempotency.scope = []", "f.toml:1: idempotency.scope: ", "at least one part"),
    ("idempotency.scope = [\"authorization\", \"header:Authorization\"]", "f.toml:1: idempotency.scope: ", "twice"),
    ("idempotency.scope = [\"user\"]", "f.toml:1: idempotency.scope: ", "is no part of a scope"),
    ("idempotency.scope = [\"header:\"]", "f.toml:1: idempotency.scope: ", "is no part of a scope"),
    (
        "[[routes]]\npath = \"/a\"\n[routes.outcomes]\nfinal = [\"502\"]\nunknown = [\"502\"]",
        "f.toml:3: routes[0].outcomes: ",
        "502",
    ),
    (
        "server.limits.max_body = \"2MiB\"\nserver.limits.max_buffered = \"1MiB\"",
        "f.toml:1: server.limits.max_body: ",
        "larger than max_buffered",
    ),
    (
        "[server.tls]\ncert = \"/nowhere/c\"\nkey = \"/nowhere/k\"",
        "f.toml:2: server.tls.cert: ",
        "/nowhere/c: cannot be read",
    ),
    ("[server.tls]\ncert = \"/nowhere/c\"\nkey = 1", "f.toml:3: server.tls.key: ", "must be a string"),
    ("[server.tls]\nkey = \"k\"", "f.toml:1: server.tls.cert: ", "is missing"),
    ("[server.tls]\ncert = \"c\"\nkey = \"\"", "f.toml:3: server.tls.key: ", "must not be empty"),
    ("idempotency.scope = [\"client-cert\"]", "f.toml:1: idempotency.scope: ", "needs server.tls.client_ca"),
    ("admin.token_file = \"/nowhere/t\"", "f.toml:1: admin.token_file: ", "/nowhere/t: cannot be read"),
    ("admin.token_file = \"\"", "f.toml:1: admin.token_file: ", "must not be empty"),
    ("admin.listen = \"0.0.0.0:1\"", "f.toml:1: admin.listen: ", "write admin.token_file"),
    ("admin.listen = \"[::]:1\"", "f.toml:1: admin.listen: ", "write admin.token_file"),
    ("admin.listen = \"10.0.0.1:1\"", "f.toml:1: admin.listen: ", "write admin.token_file"),
    ("admin.listen = \"localhost.example:1\"", "f.toml:1: admin.listen: ", "write admin.token_file"),
    ("admin.listen = \"0.0.0.0:1\"\nadmin.token_file = \"/nowhere/t\"", "f.toml:2: admin.token_file: ", "/nowhere/t"),
    // Tokens.
    ("idempotency.scope = [\"jwt:sub\"]", "f.toml:1: idempotency.scope: ", "needs auth.jwks_file or auth.jwks_url"),
    ("idempotency.scope = [\"jwt:\"]", "f.toml:1: idempotency.scope: ", "is no part of a scope"),
    ("[auth]", "f.toml:1: auth: ", "means nothing unless a scope has a part jwt:CLAIM"),
    (
        "auth.issuer = \"x\"\nidempotency.scope = [\"jwt:sub\"]",
        "f.toml:2: idempotency.scope: ",
        "needs auth.jwks_file or auth.jwks_url",
    ),
    (
        "auth.jwks_file = \"/nowhere\"\nidempotency.scope = [\"jwt:sub\"]",
        "f.toml:1: auth.jwks_file: ",
        "/nowhere: cannot be read",
    ),
    ("auth.jwks_file = \"/\"\nidempotency.scope = [\"jwt:sub\"]", "f.toml:1: auth.jwks_file: ", "/: cannot be read"),
    (
        "auth.jwks_file = \"tests/config.rs\"\nidempotency.scope = [\"jwt:sub\"]",
        "f.toml:1: auth.jwks_file: ",
        "tests/config.rs: is no JSON",
    ),
    ("auth.jwks_file = 1\nidempotency.scope = [\"jwt:sub\"]", "f.toml:1: auth.jwks_file: ", "must be a string"),
    ("auth.jwks_url = \"ftp://a/b\"\nidempotency.scope = [\"jwt:sub\"]", "f.toml:1: auth.jwks_url: ", "is no URL"),
    ("auth.jwks_url = \"http://\"\nidempotency.scope = [\"jwt:sub\"]", "f.toml:1: auth.jwks_url: ", "is no URL"),
    ("auth.jwks_url = \"a.b/c\"\nidempotency.scope = [\"jwt:sub\"]", "f.toml:1: auth.jwks_url: ", "is no URL"),
    ("auth.jwks_url = \"unix:/a\"\nidempotency.scope = [\"jwt:sub\"]", "f.toml:1: auth.jwks_url: ", "is no URL"),
    ("auth.jwks_url = \"unix://a\"\nidempotency.scope = [\"jwt:sub\"]", "f.toml:1: auth.jwks_url: ", "is no URL"),
    ("auth.jwks_url = \"http://u:p@a/\"\nidempotency.scope = [\"jwt:sub\"]", "f.toml:1: auth.jwks_url: ", "is no URL"),
    ("auth.jwks_url = \"http://a/ b\"\nidempotency.scope = [\"jwt:sub\"]", "f.toml:1: auth.jwks_url: ", "is no URL"),
    ("auth.jwks_url = \"http://a/#b\"\nidempotency.scope = [\"jwt:sub\"]", "f.toml:1: auth.jwks_url: ", "is no URL"),
    ("[auth]\njwks = \"x\"", "f.toml:2: auth.jwks: ", "there is no such key"),
    (
        "auth.issuer = \"\"\nauth.jwks_url = \"http://a\"\nidempotency.scope = [\"jwt:sub\"]",
        "f.toml:1: auth.issuer: ",
        "must not be empty",
    ),
    (
        "auth.audience = []\nauth.jwks_url = \"http://a\"\nidempotency.scope = [\"jwt:sub\"]",
        "f.toml:1: auth.audience: ",
        "at least one name",
    ),
    // Browsers.
    ("server.cors = [\"*\"]", "f.toml:1: server.cors: ", "must be a table"),
    ("[server.cors]\nallow_origin = []", "f.toml:2: server.cors.allow_origin: ", "did you mean allow_origins?"),
    ("server.cors.allow_origins = [1]", "f.toml:1: server.cors.allow_origins: ", "must be a string"),
    ("server.cors.allow_origins = true", "f.toml:1: server.cors.allow_origins: ", "must be a string"),
    ("server.cors.allow_origins = [\"*\", \"https://a\"]", "f.toml:1: server.cors.allow_origins: ", "write it alone"),
    ("[upstream.tls]", "f.toml:1: upstream.tls: ", "unless upstream.url is https"),
    ("upstream.url = \"unix:/a\"\nupstream.tls.ca = \"x\"", "f.toml:2: upstream.tls: ", "unless upstream.url is https"),
    ("[upstream.tls]\ncerts = \"x\"", "f.toml:2: upstream.tls.certs: ", "did you mean cert?"),
    ("[upstream.tls]\nserver_name = \"a b\"", "f.toml:2: upstream.tls.server_name: ", "neither a host name nor"),
    ("[upstream.tls]\nca = \"\"", "f.toml:2: upstream.tls.ca: ", "must not be empty"),
    ("[upstream.tls]\ncert = \"x\"", "f.toml:2: upstream.tls.cert: ", "needs key beside it"),
    ("[upstream.tls]\nkey = \"x\"", "f.toml:2: upstream.tls.key: ", "needs cert beside it"),
    (
        "upstream.url = \"https://a\"\nupstream.tls.ca = \"/none\"",
        "f.toml:2: upstream.tls.ca: ",
        "/none: cannot be read",
    ),
    ("upstream.url = \"https://a/b\"", "f.toml:1: upstream.url: ", "must end after host and port"),
    ("idempotency.unknown_outcome = \"lookup\"", "f.toml:1: idempotency.unknown_outcome: ", "needs lookup.path"),
    (
        "idempotency.unknown_outcome = \"lookup\"\nidempotency.lookup.path = \"/a\"",
        "f.toml:2: idempotency.lookup.path: ",
        "no place for the key",
    ),
    (
        "idempotency.unknown_outcome = \"lookup\"\nidempotency.lookup.path = \"/{workspace}/{key}\"",
        "f.toml:2: idempotency.lookup.path: ",
        "{workspace}, which /posts has not",
    ),
    (
        "idempotency.unknown_outcome = \"lookup\"\nidempotency.lookup.path = \"/{key}\"\nidempotency.lookup.not_executed = [\"4x4\"]",
        "f.toml:3: idempotency.lookup.not_executed: ",
        "is no entry",
    ),
    ("idempotency.lookup.paht = \"/{key}\"", "f.toml:1: idempotency.lookup.paht: ", "no such key"),
    ("idempotency.lookup.min_age = 3", "f.toml:1: idempotency.lookup.min_age: ", "duration"),
    ("idempotency.replay_auth = \"probe\"", "f.toml:1: idempotency.replay_auth: ", "needs probe.path"),
    (
        "idempotency.replay_auth = \"probe\"\nidempotency.probe.path = \"a\"",
        "f.toml:2: idempotency.probe.path: ",
        "is no target",
    ),
    ("idempotency.probe.cache = \"x\"", "f.toml:1: idempotency.probe.cache: ", "duration"),
    ("idempotency.mode = \"watch\"", "f.toml:1: idempotency.mode: ", "\"observe\""),
    // Shared stores.
    ("store.engine = \"redis\"", "f.toml:1: store.url: ", "is missing; write where the store is"),
    ("store.engine = \"postgres\"", "f.toml:1: store.url: ", "postgres://"),
    ("store.url = \"redis://a\"", "f.toml:1: store.url: ", "write engine = \"redis\""),
    ("store.engine = \"redis\"\nstore.url = \"postgres://a\"", "f.toml:2: store.url: ", "one of redis, rediss, "),
    ("store.engine = \"postgres\"\nstore.url = \"redis://u:secret@a\"", "f.toml:2: store.url: ", "postgresql"),
    ("store.engine = \"redis\"\nstore.url = \"redis://\"", "f.toml:2: store.url: ", "is no URL of this engine"),
    ("store.lease = \"99ms\"", "f.toml:1: store.lease: ", "at least 100ms"),
    (
        "store.engine = \"redis\"\nstore.url = \"redis://a\"\nstore.lease = \"4s\"\nstore.timeout = \"1001ms\"",
        "f.toml:4: store.timeout: ",
        "a quarter of store.lease",
    ),
    ("store.prefix = \"a b\"", "f.toml:1: store.prefix: ", "cannot begin names"),
    ("store.prefix = \"\"", "f.toml:1: store.prefix: ", "cannot begin names"),
    ("store.prefix = \"1a\"", "f.toml:1: store.prefix: ", "a letter first"),
    (
        "store.password_file = \"/none\"\nstore.engine = \"redis\"\nstore.url = \"redis://a\"",
        "f.toml:1: store.password_file: ",
        "cannot be read",
    ),
    ("store.wait_replicas = 1", "f.toml:1: store.wait_replicas: ", "is of Redis"),
    (
        "[store.tls]\nca = \"/none\"\n[store]\nengine = \"redis\"\nurl = \"rediss://a\"",
        "f.toml:2: store.tls.ca: ",
        "cannot be read",
    ),
    ("[store.tls]", "f.toml:1: store.tls: ", "is of shared stores"),
    ("store.engine = \"redis\"\nstore.url = \"redis://a\"\n[store.tls]", "f.toml:3: store.tls: ", "write rediss://"),
    (
        "store.engine = \"redis\"\nstore.url = \"redis+sentinel://a/m\"\n[store.tls]",
        "f.toml:3: store.tls: ",
        "rediss+sentinel://",
    ),
    (
        "store.engine = \"redis\"\nstore.url = \"redis+unix:///s\"\n[store.tls]",
        "f.toml:3: store.tls: ",
        "asks for no TLS",
    ),
    (
        "store.engine = \"postgres\"\nstore.url = \"postgres://a/d?sslmode=disable\"\n[store.tls]",
        "f.toml:3: store.tls: ",
        "sslmode=disable",
    ),
    ("store.migrate = 1", "f.toml:1: store.migrate: ", "true or false"),
];

#[test]
fn a_shared_store_is_described_without_its_secrets() {
    let text = "store.engine = \"redis\"\nstore.url = \"redis://user:hunter2@a:1/3\"";
    let config = good(text);
    assert!(config.contains("redis://a:1/3") && !config.contains("hunter2"), "{config}");
    let variable = [("ONCEGATE_STORE__URL", "redis://user:hunter2@a:1/3")];
    let from_environment = with_environment("store.engine = \"redis\"", &variable).unwrap();
    assert_eq!(format!("{from_environment:?}"), config);
    let wrong =
        with_environment("store.engine = \"redis\"", &[("ONCEGATE_STORE__URL", "http://u:hunter2@a")]).unwrap_err();
    assert!(!wrong.concat().contains("hunter2"), "{wrong:?}");
}

/// A claim in a shared store lives by a lease, on every route; a hot record is not used for long, since operators act elsewhere.
#[test]
fn leases_are_of_shared_stores_alone() {
    let parsed = |text: &str| parse("f.toml", text, [], &Flags::default()).unwrap_or_else(|errors| panic!("{errors}"));
    let lease_of =
        |config: &Config| config.gateway.routes.iter().map(|route| route.policy.lease_ms).collect::<Vec<_>>();
    let embedded = parsed("store.lease = \"7s\"");
    assert_eq!((lease_of(&embedded), embedded.ledger.lease), (vec![None, None], None));
    assert_eq!(embedded.ledger.cache_max_age, None);
    let shared = parsed("store.engine = \"postgres\"\nstore.url = \"postgres://a\"\nstore.lease = \"7s\"");
    assert_eq!(lease_of(&shared), [Some(7000), Some(7000)]);
    assert_eq!(shared.ledger.lease, Some(Duration::from_secs(7)));
    assert_eq!(shared.ledger.cache_max_age, Some(Duration::from_secs(60)));
    let hot = "store.engine = \"redis\"\nstore.url = \"redis://a\"\ncache.max_age = \"5m\"";
    assert_eq!(parsed(hot).ledger.cache_max_age, Some(Duration::from_secs(300)));
    // The timeout follows a short lease.
    let timeout = |lease: &str| {
        let text = format!("store.engine = \"redis\"\nstore.url = \"redis://a\"\nstore.lease = \"{lease}\"");
        match parsed(&text).store {
            oncegate::store::Options::Redis(options) => options.timeout,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((timeout("30s"), timeout("2s")), (Duration::from_secs(2), Duration::from_millis(500)));
}

#[test]
fn every_error_names_its_line_its_key_and_the_remedy() {
    let mut wrong = Vec::new();
    for (text, start, fragment) in ERRORS {
        let found = lines(text);
        if !matches!(&found[..], [line] if line.starts_with(start) && line.contains(fragment)) {
            wrong.push(format!("{text:?}\n  expected {start}…{fragment}\n  found {found:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn all_errors_come_at_once_in_the_order_of_the_file() {
    let text = "[store]\npath = 1\nengine = \"x\"\n[server]\nworkers = -1\nlisten = \"x\"\n[[routes]]\npath = \"/a\"\nscope = [\"path\"]\n[admin]\nlisten = 1\n[nothing]\n[cache]\nmax_bytes = \"x\"";
    let found = lines(text);
    let starts = [2, 3, 5, 6, 9, 11, 12, 14].map(|line| format!("f.toml:{line}: "));
    assert_eq!(found.len(), starts.len(), "{found:#?}");
    assert!(found.iter().zip(&starts).all(|(line, start)| line.starts_with(start)), "{found:#?}");
}

#[test]
fn the_admin_address_may_be_off_loopback_with_tokens_alone() {
    for listen in
        ["127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "[::ffff:127.0.0.1]:1", "localhost:1", "LocalHost:1", "unix:/a"]
    {
        good(&format!("admin.listen = {listen:?}"));
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens");
    std::fs::write(&file, "# operators\nalice:0123456789abcdef\n").unwrap();
    let config = good(&format!("admin.listen = \"0.0.0.0:1\"\nadmin.token_file = {file:?}"));
    assert!(!config.contains("0123456789abcdef"), "{config}");
    for (text, error) in [("", "holds no token"), ("a:short", "line 1: a token has at least 16 characters")] {
        std::fs::write(&file, text).unwrap();
        let found = lines(&format!("admin.token_file = {file:?}"));
        assert!(found.len() == 1 && found[0].contains(error) && !found[0].contains("short"), "{found:?}");
    }
}

#[test]
fn a_syntax_error_has_its_line() {
    for (text, line) in [("[server]\nworkers = = 1", 2), ("\n\n[server", 3), ("a.b = 1\na.b = 2", 2)] {
        let found = lines(text);
        assert!(found.first().is_some_and(|found| found.starts_with(&format!("f.toml:{line}: TOML: "))), "{found:?}");
    }
}

#[test]
fn durations_and_sizes_at_their_borders() {
    for (one, other) in [
        ("server.drain_timeout = \"0ms\"", "server.drain_timeout = \"0s\""),
        ("server.drain_timeout = \"60000ms\"", "server.drain_timeout = \"1m\""),
        ("server.drain_timeout = \"24h\"", "server.drain_timeout = \"1d\""),
        ("cache.max_bytes = 65536", "cache.max_bytes = \"64KiB\""),
        ("cache.max_bytes = \"1024MiB\"", "cache.max_bytes = \"1GiB\""),
        ("cache.max_bytes = \"7B\"", "cache.max_bytes = \"7\""),
        ("cache.max_bytes = 0", "cache.max_bytes = \"0KiB\""),
    ] {
        assert_eq!(good(one), good(other));
        assert_ne!(good(one), good(""));
    }
    good("server.drain_timeout = \"36600d\"");
    good("cache.max_bytes = 9223372036854775807");
}

#[test]
fn the_environment_beats_the_file_and_flags_beat_both() {
    let set = |variables: &[(&str, &str)]| format!("{:?}", with_environment("", variables).unwrap());
    for (variable, value, text) in [
        ("ONCEGATE_SERVER__WORKERS", "3", "server.workers = 3"),
        ("ONCEGATE_SERVER__LIMITS__MAX_BODY", "2KiB", "server.limits.max_body = \"2KiB\""),
        ("ONCEGATE_SERVER__LIMITS__MAX_BODY", "\"2KiB\"", "server.limits.max_body = \"2KiB\""),
        ("ONCEGATE_STORE__PATH", "/x y", "store.path = \"/x y\""),
        ("ONCEGATE_STORE__CREATE", "false", "store.create = false"),
        ("ONCEGATE_IDEMPOTENCY__DROP_HEADERS", "[\"a\", \"b\"]", "idempotency.drop_headers = [\"a\", \"b\"]"),
        ("ONCEGATE_IDEMPOTENCY__OUTCOMES__FINAL", "[\"502\"]", "idempotency.outcomes.final = [\"502\"]"),
    ] {
        assert_eq!(set(&[(variable, value)]), good(text), "{variable}");
    }
    let three = format!("{:?}", with_environment("server.workers = 2", &[("ONCEGATE_SERVER__WORKERS", "3")]).unwrap());
    assert_eq!(three, good("server.workers = 3"));
    assert_eq!(set(&[("ONCEGATE_PORT", "tcp://1"), ("ONCEGATE_SEED", "1"), ("PATH__X", "1")]), good(""));

    for (variable, value, start) in [
        ("ONCEGATE_SERVER__NOTHING", "1", "ONCEGATE_SERVER__NOTHING: server.nothing: "),
        ("ONCEGATE_NO__KEY", "1", "ONCEGATE_NO__KEY: no: "),
        ("ONCEGATE_ROUTES__0__PATH", "/a", "ONCEGATE_ROUTES__0__PATH: routes: "),
        ("ONCEGATE_SERVER__WORKERS", "many", "ONCEGATE_SERVER__WORKERS: server.workers: "),
        ("ONCEGATE_SERVER__WORKERS__X", "1", "ONCEGATE_SERVER__WORKERS__X: "),
    ] {
        let found = with_environment("server.workers = 1", &[(variable, value)]).unwrap_err();
        assert!(found.len() == 1 && found[0].starts_with(start), "{found:?}");
    }

    let flags = Flags {
        listen: Some("127.0.0.1:1".to_owned()),
        upstream: Some("http://c:3".to_owned()),
        data: Some("dir".to_owned()),
    };
    let variables = [("ONCEGATE_UPSTREAM__URL".to_owned(), "http://b:2".to_owned())];
    let text = "server.listen = \"127.0.0.1:9\"\nupstream.url = \"http://a:1\"\nstore.path = \"p\"";
    let config = parse("f.toml", text, variables, &flags).unwrap();
    let expected = "server.listen = \"127.0.0.1:1\"\nupstream.url = \"http://c:3\"\nstore.path = \"dir\"";
    assert_eq!(format!("{config:?}"), good(expected));
    let wrong = Flags { listen: Some("x".to_owned()), ..Flags::default() };
    let errors = parse("f.toml", "", [], &wrong).unwrap_err();
    assert!(errors.lines.len() == 1 && errors.lines[0].starts_with("--listen: server.listen: "), "{errors}");
}

#[test]
fn a_route_beats_the_general_settings_which_beat_the_defaults() {
    let general = good(
        "idempotency.retention = \"1h\"\n[[routes]]\npath = \"/a\"\n[[routes]]\npath = \"/b\"\nretention = \"2h\"",
    );
    assert_eq!(
        general,
        good("[[routes]]\npath = \"/a\"\nretention = \"1h\"\n[[routes]]\npath = \"/b\"\nretention = \"2h\"")
    );
    // A list that is written replaces that default list, and no other.
    let config = parse(
        "f.toml",
        "[idempotency.outcomes]\nfinal = [\"502\"]\n[[routes]]\npath = \"/a\"\noutcomes.unknown = [\"502\", \"404\"]",
        [],
        &Flags::default(),
    )
    .unwrap();
    let outcomes = &config.gateway.routes[0].outcomes;
    let class = |status, retry_after| format!("{:?}", outcomes.classify(status, retry_after));
    for (status, retry_after, expected) in [
        (502, false, "Unknown"),
        (404, false, "Unknown"),
        (429, false, "NotExecuted"),
        (503, true, "NotExecuted"),
        (201, false, "Final"),
        (408, false, "Final"),
    ] {
        assert_eq!(class(status, retry_after), expected, "{status}");
    }
}

#[test]
fn origins_are_written_as_browsers_send_them() {
    let origins = |value: &str| format!("server.cors.allow_origins = {value}");
    for text in ["https://a.example", "http://a.example:8443", "https://[2001:db8::1]:1", "http://127.0.0.1:1"] {
        good(&origins(&format!("{text:?}")));
    }
    assert_eq!(good(&origins("\"*\"")), good(&origins("[\"*\"]")));
    assert_eq!(good(&origins("[]")), good(""));
    assert_ne!(good(&origins("\"*\"")), good(&origins("\"https://a\"")));
    let from_environment = with_environment("", &[("ONCEGATE_SERVER__CORS__ALLOW_ORIGINS", "https://a")]).unwrap();
    assert_eq!(format!("{from_environment:?}"), good(&origins("[\"https://a\"]")));
    for (text, fragment) in [
        ("null", "cannot be allowed"),
        ("", "is no origin"),
        ("a.example", "is no origin"),
        ("//a.example", "is no origin"),
        ("https://", "is no origin"),
        ("https://:1", "is no origin"),
        ("https://a:", "is no origin"),
        ("https://a:0", "is no origin"),
        ("https://a:x", "is no origin"),
        ("https://a:65536", "is no origin"),
        ("https://*.example", "is no origin"),
        ("https://a b", "is no origin"),
        ("https://[::1", "is no origin"),
        ("https://[::1%1]", "is no origin"),
        ("https://::1", "is no origin"),
        ("https://b\u{fc}cher.example", "is no origin"),
        ("ftp://a", "no origin of http or https"),
        ("chrome-extension://a", "no origin of http or https"),
        ("https://a/", "has no path"),
        ("https://a/b", "has no path"),
        ("https://a?b", "has no path"),
        ("https://u@a", "has no path"),
        ("https://A.example", "as \"https://a.example\"; write it so"),
        ("HTTPS://a", "as \"https://a\"; write it so"),
        ("https://a:443", "as \"https://a\"; write it so"),
        ("http://a:80", "as \"http://a\"; write it so"),
        ("http://a:0443", "as \"http://a:443\"; write it so"),
    ] {
        let found = lines(&format!("[server.cors]\nallow_origins = [\"https://ok\",\n{text:?}]"));
        let [line] = &found[..] else { panic!("{text}: {found:?}") };
        assert!(line.starts_with("f.toml:3: server.cors.allow_origins: ") && line.contains(fragment), "{text}: {line}");
    }
}

#[test]
fn tokens_may_be_verified_with_keys_from_a_url() {
    let scope = "idempotency.scope = [\"jwt:sub\"]\n";
    for url in ["http://a", "http://a:81/", "http://[::1]/x/jwks.json?v=2", "http://a?x"] {
        good(&format!("{scope}auth.jwks_url = \"{url}\""));
    }
    let one = good(&format!("{scope}auth.jwks_url = \"http://a\"\nauth.audience = \"x\""));
    assert_eq!(one, good(&format!("{scope}auth.jwks_url = \"http://a\"\nauth.audience = [\"x\"]")));
    // A route's scope is enough.
    good("auth.jwks_url = \"http://a\"\n[[routes]]\npath = \"/a\"\nscope = [\"jwt:https://a.b/org\", \"path\"]");
}

const SHIPPED: &str = include_str!("../config.toml");

#[test]
fn the_shipped_file_is_the_defaults() {
    assert_eq!(good(SHIPPED), good(""));
}

#[test]
fn the_shipped_file_names_every_key() {
    for section in [
        "",
        "server",
        "server.cors",
        "server.limits",
        "upstream",
        "idempotency",
        "idempotency.outcomes",
        "auth",
        "cache",
        "store",
        "store.tls",
        "admin",
    ] {
        let dot = if section.is_empty() { "" } else { "." };
        let found = lines(&format!("{section}{dot}zzzzzzzzzzzzzzzz = 1"));
        let known = found[0].split_once("there are: ").unwrap_or_else(|| panic!("{found:?}")).1;
        for key in known.split(", ") {
            // One that has no defaults stands there as a comment.
            let headers = [format!("\n[{section}]"), format!("\n# [{section}]")];
            let start = headers.iter().find_map(|header| SHIPPED.find(header).map(|start| start + header.len()));
            let body =
                if section.is_empty() { SHIPPED } else { &SHIPPED[start.unwrap_or_else(|| panic!("{section}"))..] };
            let end = if section.is_empty() { body.len() } else { body.find("\n[").unwrap_or(body.len()) };
            let named = body[..end].lines().any(|line| {
                let line = line.trim_start_matches("# ");
                line.starts_with(&format!("{key} ="))
                    || line.starts_with(&format!("{key}."))
                    || line.starts_with(&format!("[{section}{dot}{key}"))
                    || line.starts_with(&format!("[[{key}"))
            }) || SHIPPED.contains(&format!("\n[{section}{dot}{key}]"));
            assert!(named, "{section}{dot}{key} is not in config.toml");
        }
    }
    for table in ["lookup", "probe"] {
        let found = lines(&format!("idempotency.{table}.zzzzzzzzzzzzzzzz = 1"));
        for key in found[0].split_once("there are: ").unwrap_or_else(|| panic!("{found:?}")).1.split(", ") {
            assert!(SHIPPED.contains(&format!("\n# {table}.{key} = ")), "{table}.{key} is not in config.toml");
        }
    }
}
