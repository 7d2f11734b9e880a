use super::{Flags, load, parse};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

fn lines(text: &str) -> Vec<String> {
    parse("f.toml", text, [], &Flags::default()).map_or_else(|errors| errors.lines, |_| Vec::new())
}

/// That these and no other errors are found: the start of each and a fragment of it.
#[track_caller]
fn expect(text: &str, expected: &[(&str, &str)]) {
    let found = lines(text);
    let as_expected = |(line, (start, part)): (&String, &(&str, &str))| line.starts_with(start) && line.contains(part);
    assert!(
        found.len() == expected.len() && found.iter().zip(expected).all(as_expected),
        "{text}\nexpected {expected:#?}\nfound {found:#?}"
    );
}

#[test]
fn every_bad_item_of_a_list_is_reported_at_its_line() {
    expect(
        "[server]\ntrusted_proxies = [\n  \"x\",\n  \"10.0.0.0/8\",\n  7,\n]",
        &[("f.toml:3: server.trusted_proxies: ", "\"x\""), ("f.toml:5: server.trusted_proxies: ", "not an integer")],
    );
    expect(
        "server.listen = [\"a b:1\", \"127.0.0.1:0\",\n\"[zz]:1\"]",
        &[("f.toml:1: server.listen: ", "a b:1"), ("f.toml:2: server.listen: ", "[zz]:1")],
    );
    expect(
        "[idempotency]\nscope = [\n\"user\",\n\"jwt:\"]\ndrop_headers = [\"a b\"]",
        &[
            ("f.toml:3: idempotency.scope: ", "is no part"),
            ("f.toml:4: idempotency.scope: ", "is no part"),
            ("f.toml:5: idempotency.drop_headers: ", "a b"),
        ],
    );
}

#[test]
fn what_idempotency_says_wrongly_is_reported_once_and_there() {
    // Two default routes inherit it.
    expect("idempotency.scope = [\"path\"]", &[("f.toml:1: idempotency.scope: ", "only the key's owner")]);
    expect(
        "[idempotency]\nmissing_key = \"derive\"\nfingerprint = \"none\"",
        &[("f.toml:2: idempotency.missing_key: ", "needs a fingerprint")],
    );
    expect("idempotency.fingerprint_ignore = [\"x\"]", &[("f.toml:1: idempotency.fingerprint_ignore: ", "\"x\"")]);
    // A route that names its own is judged by it.
    expect("idempotency.scope = [\"path\"]\n[[routes]]\npath = \"/a\"\nscope = [\"authorization\"]", &[]);
}

#[test]
fn a_bad_outcome_is_reported_at_its_list_whatever_the_routes_say() {
    let general = "[idempotency.outcomes]\nunknown = [\"5xx\"]\nfinal = [\"abc\"]\n";
    let error = ("f.toml:3: idempotency.outcomes.final: ", "\"abc\" is no entry");
    expect(general, &[error]);
    expect(&format!("routes = []\n{general}"), &[("f.toml:4: idempotency.outcomes.final: ", "\"abc\" is no entry")]);
    expect(&format!("{general}[[routes]]\npath = \"/a\"\n[routes.outcomes]\nfinal = [\"502\"]"), &[error]);
    expect(
        "[[routes]]\npath = \"/a\"\n[routes.outcomes]\nfinal = []\nunknown = [\"600\", \"404\"]",
        &[("f.toml:5: routes[0].outcomes.unknown: ", "\"600\" is no entry")],
    );
    expect(
        "[idempotency.outcomes]\nfinal = [\"404\"]\nunknown = [\"404\"]",
        &[("f.toml:1: idempotency.outcomes: ", "another list")],
    );
}

#[test]
fn nothing_is_concluded_from_the_default_of_a_miswritten_key() {
    expect(
        "server.trusted_proxies = [\"x\"]\nidempotency.trusted_headers = [\"x-user\"]",
        &[("f.toml:1: server.trusted_proxies: ", "\"x\"")],
    );
    expect(
        "[idempotency]\ncredential_headers = [\"x y\"]\nscope = [\"header:x-key\"]",
        &[("f.toml:2: idempotency.credential_headers: ", "x y")],
    );
    expect(
        "[idempotency]\nreplay_auth = \"nobody\"\nscope = [\"path\"]",
        &[("f.toml:2: idempotency.replay_auth: ", "nobody")],
    );
}

#[test]
fn two_listeners_cannot_share_an_address() {
    expect("server.listen = \"127.0.0.1:9090\"", &[("f.toml:1: server.listen: ", "is admin.listen already")]);
    expect(
        "server.listen = \"0.0.0.0:80\"\nadmin.listen = \"127.0.0.1:80\"",
        &[("f.toml:2: admin.listen: ", "is server.listen already")],
    );
    expect("server.listen = [\"a:1\", \"b:1\", \"A:1\"]", &[("f.toml:1: server.listen: ", "earlier address")]);
    expect("server.listen = [\"unix:/a\", \"unix:/a\"]", &[("f.toml:1: server.listen: ", "earlier address")]);
    expect("server.listen = [\"127.0.0.1:0\", \"127.0.0.1:0\"]\nadmin.listen = \"127.0.0.1:0\"", &[]);
    expect("server.listen = [\"0.0.0.0:80\", \"[::]:80\"]", &[]);
}

#[test]
fn hosts_and_ports_are_checked_before_anything_is_bound() {
    for address in ["127.0.0.1:+80", "a$:1", "[::1:1", "[127.0.0.1]:1", ":1", "*:1", "a:", "ä:1"] {
        expect(&format!("server.listen = \"{address}\""), &[("f.toml:1: server.listen: ", "is no address")]);
    }
    for url in ["http://a,b$:80", "http://a:+80", "http://a:", "http://[zz]", "http://", "http://a:65536"] {
        expect(&format!("upstream.url = \"{url}\""), &[("f.toml:1: upstream.url: ", "is no upstream")]);
    }
    for host in ["a:x", "u@a", "", "a,b", ":80"] {
        expect(&format!("upstream.host = \"{host}\""), &[("f.toml:1: upstream.host: ", "nor a host name")]);
    }
    expect("server.listen = [\"[::1]:0\", \"my_host.local:1\"]\nupstream.url = \"http://[::1]:81/\"", &[]);
    expect("upstream.host = \"api.example:8443\"", &[]);
}

/// The runtime's counters panic beyond 2^61, and a thread that the system refuses does too.
#[test]
fn counts_are_bounded() {
    for key in ["server.limits.max_connections", "upstream.max_in_flight", "idempotency.max_waiters_per_key"] {
        expect(&format!("{key} = 9223372036854775807"), &[(&format!("f.toml:1: {key}: "), "16777216 or less")]);
        expect(&format!("{key} = 16777216"), &[]);
    }
    expect("server.workers = 1025", &[("f.toml:1: server.workers: ", "1024 or less")]);
}

#[test]
fn names_that_no_request_could_bear_are_errors() {
    expect("idempotency.scope = [\"cookie:a b\"]", &[("f.toml:1: idempotency.scope: ", "is no part")]);
    expect("idempotency.scope = [\"cookie:\"]", &[("f.toml:1: idempotency.scope: ", "is no part")]);
    for name in ["content-length", "Host", "authorization", "transfer-encoding"] {
        expect(&format!("idempotency.header = \"{name}\""), &[("f.toml:1: idempotency.header: ", "another meaning")]);
    }
}

#[test]
fn a_limit_below_a_default_is_reported_where_it_was_written() {
    expect(
        "server.limits.max_buffered = \"1KiB\"",
        &[("f.toml:1: server.limits.max_buffered: ", "smaller than max_body")],
    );
}

#[test]
fn a_bare_variable_may_look_like_toml() {
    let path = |value: &str| {
        let variable = ("ONCEGATE_STORE__PATH".to_owned(), value.to_owned());
        parse("f.toml", "", [variable], &Flags::default()).map(|config| format!("{:?}", config.store))
    };
    for (value, expected) in [("2024", "\"2024\""), ("true", "\"true\""), ("1e3", "\"1e3\""), ("\"a b\"", "\"a b\"")] {
        assert!(path(value).unwrap().contains(expected), "{value}");
    }
    assert!(path("[1]").is_err());
    let variable = ("ONCEGATE_SERVER__DRAIN_TIMEOUT".to_owned(), "5".to_owned());
    let errors = parse("f.toml", "", [variable], &Flags::default()).unwrap_err();
    assert!(errors.lines[0].contains("must be a duration with its unit"), "{errors}");
}

#[test]
fn a_setting_that_is_not_utf8_is_an_error_beside_all_others() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f.toml");
    std::fs::write(&file, "server.workers = -1").unwrap();
    let bad = || OsString::from_vec(vec![0xff]);
    let variables = vec![
        (OsString::from("ONCEGATE_STORE__PATH"), bad()),
        (OsString::from_vec(b"ONCEGATE_STORE__\xff".to_vec()), OsString::from("1")),
        (OsString::from("ONCEGATE_PORT"), bad()),
        (OsString::from("LANG__X"), bad()),
    ];
    let found = load(Some(&file), variables.clone(), &Flags::default()).unwrap_err().lines;
    assert_eq!(found.len(), 3, "{found:?}");
    assert!(found[0].contains("f.toml:1: server.workers: "), "{found:?}");
    assert!(found[1].starts_with("ONCEGATE_STORE__PATH: ") && found[1].contains("not UTF-8"), "{found:?}");
    assert!(found[2].contains("there is no such key"), "{found:?}");
    std::fs::write(&file, "").unwrap();
    assert_eq!(load(Some(&file), variables, &Flags::default()).unwrap_err().lines.len(), 2);
}

#[test]
fn a_flag_whose_section_is_no_table_names_its_key() {
    let flags = Flags { listen: Some("127.0.0.1:0".to_owned()), ..Flags::default() };
    let found = parse("f.toml", "server = 1", [], &flags).unwrap_err().lines;
    assert!(found.iter().any(|line| line.starts_with("--listen: server.listen: ")), "{found:?}");
    assert!(found.iter().any(|line| line.starts_with("f.toml:1: server: must be a table")), "{found:?}");
}

/// A tree is dropped level by level, each on the stack.
#[test]
fn nesting_beyond_reason_is_an_error() {
    let deep = 40_000;
    let dotted = format!("{}a = 1", "a.".repeat(deep));
    let header = format!("[{}a]", "a.".repeat(deep));
    let arrays = format!("server.listen = {}", "[".repeat(deep));
    let tables = format!("server = {}", "{a=".repeat(deep));
    for text in [dotted, header, arrays, tables] {
        assert!(!lines(&text).is_empty(), "{}", &text[..20]);
    }
    let name = (format!("ONCEGATE_SERVER{}", "__A".repeat(deep)), "1".to_owned());
    let value = ("ONCEGATE_SERVER__LISTEN".to_owned(), "[".repeat(deep));
    for variable in [name, value] {
        assert_eq!(parse("f.toml", "", [variable], &Flags::default()).unwrap_err().lines.len(), 1);
    }
}
