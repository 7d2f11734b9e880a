//! Whatever a configuration says, it is valid and keeps its promises, or every error names a line or a key.
//!
//! Lines of the form `#ONCEGATE_A__B=value` are taken for the environment.
#![no_main]

use libfuzzer_sys::fuzz_target;
use oncegate::config::{Config, Flags, parse};
use oncegate::gateway::route::Pattern;
use oncegate::gateway::scope::{Part, is_credential};
use oncegate::gateway::{MissingKey, ReplayAuth};
use oncegate::idempotency::FingerprintMode;
use std::collections::HashSet;
use std::time::Duration;

const FILE: &str = "f.toml";

fn variables(text: &str) -> Vec<(String, String)> {
    let variable = |line: &str| {
        let (name, value) = line.strip_prefix('#')?.split_once('=')?;
        name.starts_with("ONCEGATE_").then(|| (name.to_owned(), value.to_owned()))
    };
    text.lines().filter_map(variable).collect()
}

/// Settings that depend on one another, each with a few values, of which some are right.
const SETTINGS: [(&str, &[&str]); 22] = [
    (
        "server.listen",
        &["\"127.0.0.1:9090\"", "[\"localhost:1\", \"LOCALHOST:1\"]", "[]", "\"unix:/a\"", "\"0.0.0.0:0\""],
    ),
    ("server.workers", &["0", "1024", "1025", "-1"]),
    ("server.trusted_proxies", &["[]", "[\"::1\"]", "[\"x\"]"]),
    ("server.limits.max_body", &["0", "\"2MiB\"", "\"1GiB\""]),
    ("server.limits.max_buffered", &["1", "\"2MiB\"", "\"512MiB\""]),
    ("admin.listen", &["\"localhost:1\"", "\"127.0.0.1:8080\"", "\"unix:/a\"", "\"0.0.0.0:0\""]),
    ("upstream.response_timeout", &["\"0s\"", "\"1ms\"", "\"36600d\"", "\"36601d\""]),
    ("upstream.late_window", &["\"0s\"", "\"36600d\""]),
    ("store.engine", &["\"memory\"", "\"sled\"", "\"redis\""]),
    (
        "*.scope",
        &["[\"path\"]", "[\"header:x-a\"]", "[\"path:a\", \"host\"]", "[\"cookie:a\"]", "[\"host\", \"host\"]", "[]"],
    ),
    ("*.missing_key", &["\"derive\"", "\"pass\""]),
    ("*.fingerprint", &["\"none\"", "\"json\"", "\"raw\""]),
    ("*.fingerprint_ignore", &["[\"/a\"]", "[\"a\"]", "[\"\"]"]),
    ("*.trusted_headers", &["[\"x-a\"]", "[]", "[\"X-B\"]"]),
    ("*.credential_headers", &["[\"x-a\"]", "[]", "[\"x-b\"]"]),
    ("*.replay_auth", &["\"none\"", "\"scope\""]),
    ("*.retention", &["\"0s\"", "\"1ms\""]),
    ("*.header", &["\"Host\"", "\"x-a\"", "\"\""]),
    ("*.outcomes.final", &["[\"5xx\"]", "[\"503\"]", "[\"5\"]"]),
    ("*.outcomes.unknown", &["[\"5xx\"]", "[]"]),
    ("routes.path", &["\"/a/{a}\"", "\"/A/{b}\"", "\"/{*a}\"", "\"/a/{a}/{a}\"", "\"/b\""]),
    ("routes.case_sensitive", &["false", "true"]),
];

/// Writes a file of such settings, each at most once in its table: `[idempotency]`, and one or two routes.
fn assemble(choices: &[u8]) -> String {
    let mut chosen = std::collections::BTreeMap::new();
    for choice in choices.chunks_exact(2) {
        let (key, values) = SETTINGS[usize::from(choice[0]) % SETTINGS.len()];
        let (table, key) = key.split_once('.').unwrap();
        let value = usize::from(choice[1]);
        let table = match (table, value / 64) {
            ("*", 0 | 1) => "1 idempotency",
            ("*" | "routes", 2) => "3 [routes]",
            ("*" | "routes", _) => "2 [routes]",
            _ => table,
        };
        chosen.insert((table, key), values[value % values.len()]);
    }
    let mut text = String::new();
    let mut last = "";
    for ((table, key), value) in chosen {
        if table != last {
            text.push_str(&format!("[{}]\n", table.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ')));
            last = table;
        }
        text.push_str(&format!("{key} = {value}\n"));
    }
    text
}

/// Each error is one line: `f.toml:LINE: KEY: …`, `VARIABLE: KEY: …`, or `f.toml: KEY: …` where a default is at fault.
fn check_errors(lines: &[String], text: &str, variables: &[(String, String)]) {
    assert!(!lines.is_empty(), "refused, but nothing is wrong");
    let newlines = text.bytes().filter(|byte| *byte == b'\n').count();
    let mut last = 0;
    for line in lines {
        assert!(!line.contains(['\n', '\r']), "one error, one line: {line:?}");
        let rest = if let Some(rest) = line.strip_prefix(FILE).and_then(|rest| rest.strip_prefix(':')) {
            match rest.split_once(": ") {
                Some((number, rest)) if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) => {
                    let number: usize = number.parse().unwrap();
                    assert!((1..=newlines + 1).contains(&number), "there is no such line: {line}");
                    assert!(last <= number, "in the order of the file: {lines:#?}");
                    last = number;
                    rest
                }
                _ => rest.trim_start(),
            }
        } else {
            let named = variables.iter().find_map(|(name, _)| line.strip_prefix(name.as_str())?.strip_prefix(": "));
            named.unwrap_or_else(|| panic!("neither line nor variable: {line}"))
        };
        let (key, message) = rest.split_once(": ").unwrap_or_else(|| panic!("no key: {line}"));
        assert!(!message.is_empty() && (!key.is_empty() || line.contains("no such key")), "{line}");
    }
    assert_eq!(lines.iter().collect::<HashSet<_>>().len(), lines.len(), "each once");
}

/// What every module may take for granted.
fn check_config(config: &Config) {
    let Config { server, gateway, ledger, admin, .. } = config;
    assert!(!server.listen.is_empty() && server.workers <= 1024);
    let addresses: Vec<String> = server.listen.iter().chain([&admin.listen]).map(ToString::to_string).collect();
    for (n, address) in addresses.iter().enumerate() {
        assert!(!addresses[..n].contains(address) || address.ends_with(":0"), "{address} is taken twice");
    }
    let limits = &server.limits;
    for least_a_tick in [limits.header_timeout, limits.idle_timeout, limits.write_timeout, gateway.body_timeout] {
        assert!(least_a_tick >= Duration::from_millis(1));
    }
    assert!(limits.max_connections > 0 && limits.max_header_bytes >= 8192);
    assert!(gateway.max_body <= gateway.max_buffered && gateway.max_buffered > 0);
    assert!(ledger.cache_max_age.is_none_or(|age| age >= Duration::from_millis(1)));
    let upstream = &gateway.upstream;
    assert!(upstream.max_in_flight > 0 && upstream.max_in_flight <= 1 << 24);
    assert!(
        upstream.connect_timeout >= Duration::from_millis(1) && upstream.response_timeout >= Duration::from_millis(1)
    );
    // Sums of what is allowed do not overflow a clock.
    assert!(upstream.response_timeout + upstream.late_window < Duration::from_secs(300 * 366 * 86_400));

    for route in &gateway.routes {
        assert_eq!(Pattern::parse(route.pattern.as_str()).as_ref(), Ok(&route.pattern));
        assert!(!route.scope.is_empty());
        assert!(
            route.replay_auth == ReplayAuth::None || route.scope.iter().any(|part| is_credential(part, route)),
            "anyone could read anyone's answers"
        );
        for (n, part) in route.scope.iter().enumerate() {
            assert!(!route.scope[..n].contains(part));
            if let Part::PathParam(name) = part {
                assert!(route.pattern.params().any(|param| param == name), "a part that nothing can fill");
            }
        }
        assert!(route.trusted_headers.is_empty() || !gateway.trusted_proxies.is_empty());
        assert!(!route.trusted_headers.iter().any(|name| route.credential_headers.contains(name)));
        assert!(route.missing_key != MissingKey::Derive || route.fingerprint.mode != FingerprintMode::None);
        assert_eq!(route.fingerprint.validate(), Ok(()));
        assert!(route.policy.retention_ms > 0 && route.policy.unknown_retention_ms > 0);
        assert!(
            !["authorization", "connection", "content-length", "host", "transfer-encoding"]
                .contains(&route.header.as_str())
        );
        for status in 0..=999 {
            let _ = route.outcomes.classify(status, status % 2 == 0);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    // Few settings each: one that is wrong hides what is wrong with the whole.
    for choices in data.chunks(8).take(8) {
        check(&assemble(choices));
    }
    if let Ok(text) = std::str::from_utf8(data) {
        check(text);
    }
});

fn check(text: &str) {
    let variables = variables(text);
    let parsed = parse(FILE, text, variables.clone(), &Flags::default());
    let again = parse(FILE, text, variables.iter().rev().cloned(), &Flags::default());
    let names = variables.iter().map(|(name, _)| name.to_ascii_lowercase()).collect::<HashSet<_>>();
    match &parsed {
        Ok(config) => {
            check_config(config);
            // Comments, and the defaults written out as flags, change nothing.
            let commented = parse(FILE, &format!("# é\n{text}\n# end"), variables.clone(), &Flags::default());
            assert_eq!(format!("{:?}", commented.unwrap()), format!("{config:?}"));
        }
        Err(errors) => check_errors(&errors.lines, text, &variables),
    }
    // The order of the environment does not count, where no variable stands twice.
    if names.len() == variables.len() {
        assert_eq!(format!("{parsed:?}"), format!("{again:?}"));
    }
}
