//! What holds for the sources as text: who may import whom, how long a file may be, who reads the clock, and what must
//! not be left lying around.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The modules of this crate, and which others each may name. What is not written here may name none.
const IMPORTS: &[(&str, &[&str])] = &[
    // Declares the modules, and links to them in its documentation.
    (
        "lib",
        &[
            "admin",
            "clock",
            "config",
            "gateway",
            "idempotency",
            "ledger",
            "pem",
            "run",
            "server",
            "simulation",
            "store",
            "telemetry",
            "timer",
        ],
    ),
    ("main", &["config", "idempotency", "run", "telemetry"]),
    // The command `records`, a part of `main`.
    ("command", &["config", "server"]),
    // Wires all of them together.
    ("run", &["admin", "clock", "config", "gateway", "idempotency", "ledger", "server", "store", "telemetry"]),
    // As `run`, without sockets.
    ("simulation", &["clock", "config", "gateway", "idempotency", "ledger", "run", "server", "store", "telemetry"]),
    ("fault", &[]),
    // Resolves the raw configuration into everybody's options.
    ("config", &["admin", "gateway", "idempotency", "ledger", "pem", "server", "store", "telemetry"]),
    ("server", &["fault", "gateway", "pem", "telemetry", "clock", "timer"]),
    ("gateway", &["fault", "ledger", "idempotency", "pem", "telemetry", "timer"]),
    ("ledger", &["idempotency", "store", "telemetry", "clock"]),
    ("admin", &["ledger", "telemetry", "server", "idempotency", "store"]),
    ("telemetry", &[]),
    ("clock", &["idempotency"]),
    ("idempotency", &[]),
    ("store", &["fault"]),
    ("pem", &[]),
    ("timer", &[]),
];

/// Single names of another module that a module may use beside [`IMPORTS`], each with the reason.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("server", "ledger::Ledger", "hands the ledger on to the gateway"),
    ("gateway", "store::AnyStore", "names the ledger's type"),
    ("gateway", "store::StoreError", "tells a full store from a failed one in its answers"),
    ("gateway", "store::RecordId", "names the record"),
    ("store", "clock::since_boot", "a shared store's time is counted as leases are"),
    ("admin", "gateway::GatewayLedger", "names the ledger's type"),
    ("admin", "gateway::reply", "records an operator's answer as any response"),
    ("admin", "gateway::headers::IDEMPOTENCY_OUTCOME", "the same"),
];

/// The crates that the pure core may use.
const CORE_CRATES: &[&str] =
    &["std", "core", "alloc", "bytes", "blake3", "serde", "serde_json", "thiserror", "proptest"];

const LINES_MAX: usize = 500;
/// Files that may be longer, each with the reason.
const LONG_FILES: &[(&str, &str)] = &[];

/// Files that may read the system's clocks, each with the reason. The runtime's own `Instant`, which tests can pause, is
/// for timeouts and latencies, and no record depends on it.
const CLOCK_READERS: &[(&str, &str)] = &[
    ("src/clock.rs", "the one place that does"),
    ("src/store/embedded/space.rs", "paces a system call; no record depends on it"),
    ("src/store/embedded/scrub.rs", "paces its own work; no record depends on it"),
];

/// Who may read the process's environment, and why.
const ENVIRONMENT_READERS: &[(&str, &str)] = &[
    ("src/main.rs", "hands the environment to `config`"),
    ("src/command/client.rs", "the same, for `oncegate records`"),
    ("src/telemetry.rs", "RUST_LOG says what is logged"),
    ("src/fault.rs", "fail points of crash tests, in builds of their own"),
];

struct Source {
    /// Relative to the crate, with `/`.
    path: String,
    text: String,
    /// Without comments, strings and test modules.
    code: String,
}

impl Source {
    /// The top-level module that the file belongs to.
    fn module(&self) -> &str {
        let path = self.path.strip_prefix("src/").unwrap();
        path.split('/').next().unwrap().trim_end_matches(".rs")
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut directories = vec![root.join("src")];
    let mut files: Vec<PathBuf> = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    assert!(files.len() > 10, "the sources are not where they were");
    files
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap();
            let code = strip(&text);
            let path = path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
            Source { path, text, code }
        })
        .collect()
}

/// Blanks out comments, the contents of strings and characters, and what comes after `#[cfg(test)]`; keeps the lines.
fn strip(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    let keep_lines = |code: &mut String, dropped: &str| code.extend(dropped.chars().filter(|c| *c == '\n'));
    while let Some(c) = rest.chars().next() {
        let dropped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |at| at + 2)
        } else if let Some(hashes) =
            raw_string(rest).filter(|_| !code.ends_with(|c: char| c.is_alphanumeric() || c == '_'))
        {
            let close = format!("\"{}", "#".repeat(hashes));
            let open = rest.find('"').unwrap() + 1;
            rest[open..].find(&close).map_or(rest.len(), |at| open + at + close.len())
        } else if c == '"' {
            let mut escaped = false;
            let close = rest.char_indices().skip(1).find(|(_, c)| {
                let closes = *c == '"' && !escaped;
                escaped = *c == '\\' && !escaped;
                closes
            });
            close.map_or(rest.len(), |(at, _)| at + 1)
        } else if c == '\'' {
            character(rest)
        } else {
            0
        };
        if dropped > 0 {
            keep_lines(&mut code, &rest[..dropped]);
            code.push(' ');
            rest = &rest[dropped..];
        } else {
            code.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    match code.find("#[cfg(test)]\nmod ") {
        Some(at) => code[..at].to_owned(),
        None => code,
    }
}

/// The number of `#` of the raw string that begins here.
fn raw_string(text: &str) -> Option<usize> {
    let after = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    after[hashes..].starts_with('"').then_some(hashes)
}

/// The length of the character literal that begins here; 0 for a lifetime.
fn character(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => {
            chars.next();
            chars.find(|(_, c)| *c == '\'').map_or(0, |(at, _)| at + 1)
        }
        Some(_) => chars.next().filter(|(_, c)| *c == '\'').map_or(0, |(at, _)| at + 1),
        None => 0,
    }
}

/// The paths that begin with `crate::` or `oncegate::`, groups in braces taken apart: `crate::{a::B, c}` is `a::B`, `c`.
fn paths(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for prefix in ["crate::", "oncegate::"] {
        for (at, _) in code.match_indices(prefix) {
            let bounded = !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
            if bounded {
                expand(&code[at + prefix.len()..], "", &mut found);
            }
        }
    }
    found
}

/// Takes one path apart that begins here; says how long it is.
fn expand(text: &str, prefix: &str, found: &mut Vec<String>) -> usize {
    let name_len = text.find(|c: char| !(c.is_alphanumeric() || "_:".contains(c))).unwrap_or(text.len());
    let path = format!("{prefix}{}", &text[..name_len]);
    if !text[name_len..].starts_with('{') {
        found.push(path.trim_end_matches("::").to_owned());
        return name_len;
    }
    let mut at = name_len + 1;
    loop {
        at += text[at..].find(|c: char| !c.is_whitespace() && c != ',').unwrap_or(text.len() - at);
        match text[at..].chars().next() {
            None => return at,
            Some('}') => return at + 1,
            Some(_) => {
                at += expand(&text[at..], &path, found).max(1);
                // `as name` ends with the entry.
                at += text[at..].find([',', '}']).filter(|_| text[at..].starts_with(" as ")).unwrap_or(0);
            }
        }
    }
}

#[test]
fn modules_import_only_what_they_may() {
    let allowed: BTreeMap<_, _> = IMPORTS.iter().copied().collect();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for source in sources() {
        let module = source.module();
        for path in paths(&source.code) {
            let target = path.split("::").next().unwrap();
            if !allowed.contains_key(target) || target == module {
                continue;
            }
            seen += 1;
            let may = allowed.get(module).is_some_and(|targets| targets.contains(&target))
                || EXCEPTIONS.iter().any(|(from, name, _)| *from == module && path.starts_with(name));
            if !may {
                wrong.push(format!("{}: `{module}` may not use `{path}`", source.path));
            }
        }
        if !allowed.contains_key(module) {
            wrong.push(format!("{}: say in IMPORTS what the module `{module}` may use", source.path));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen > 2, "the scan finds nothing any more");
}

#[test]
fn the_core_is_pure() {
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.module() == "idempotency") {
        for line in source.code.lines() {
            let line = line.trim_start();
            let Some(used) = line.strip_prefix("use ").or_else(|| line.strip_prefix("pub use ")) else { continue };
            let root = used.split("::").next().unwrap().trim_end_matches(';');
            // Its own modules are written in lower case, too, and each is a file beside it.
            let own = ["crate", "super", "self"].contains(&root) || source.code.contains(&format!("mod {root};"));
            if !own && !CORE_CRATES.contains(&root) {
                wrong.push(format!("{}: {line}", source.path));
            }
        }
        let impure = [
            "tokio",
            "http::",
            "hyper",
            "tracing",
            "std::net",
            "std::fs",
            "std::io",
            "std::thread",
            "std::time",
            "std::env",
            "std::process",
            "std::sync",
            "getrandom",
            "rand::",
            "async ",
            "static mut",
            "thread_local",
            "RandomState",
            "HashMap::new",
        ];
        for (at, line) in source.code.lines().enumerate() {
            for name in impure.iter().filter(|name| line.contains(**name)) {
                wrong.push(format!("{}:{}: {name}", source.path, at + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "no IO, no clock, no randomness, no shared state: {wrong:#?}");
}

#[test]
fn no_file_is_too_long() {
    let mut wrong = Vec::new();
    for source in sources() {
        let lines = source.text.lines().count();
        let listed = LONG_FILES.iter().any(|(path, _)| *path == source.path);
        match (lines > LINES_MAX, listed) {
            (true, false) => {
                wrong.push(format!("{}: {lines} lines; split it, or give a reason in LONG_FILES", source.path))
            }
            (false, true) => wrong.push(format!("{}: {lines} lines; it needs no reason any more", source.path)),
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_system_clocks_are_read_in_one_place() {
    let mut wrong = Vec::new();
    for source in sources() {
        if CLOCK_READERS.iter().any(|(path, _)| *path == source.path) {
            continue;
        }
        for (at, line) in source.code.lines().enumerate() {
            let runtimes =
                source.code.contains("use tokio::time::{Instant") || source.code.contains("use tokio::time::Instant");
            if line.contains("SystemTime::now")
                || line.contains("std::time::Instant")
                || line.contains("Instant::now") && !runtimes && !source.path.ends_with("/tests.rs")
            {
                wrong.push(format!("{}:{}: {}", source.path, at + 1, line.trim()));
            }
        }
        // `use std::time::{Duration, Instant}`, over several lines, too.
        if source
            .code
            .split("use std::time::{")
            .skip(1)
            .any(|group| group.split('}').next().unwrap().contains("Instant"))
        {
            wrong.push(format!("{}: imports std::time::Instant", source.path));
        }
    }
    assert!(wrong.is_empty(), "time is an argument, or comes from `clock`: {wrong:#?}");
}

#[test]
fn the_environment_is_read_in_few_places() {
    let mut wrong = Vec::new();
    for source in sources() {
        if ENVIRONMENT_READERS.iter().any(|(path, _)| *path == source.path) {
            continue;
        }
        for (at, line) in source.code.lines().enumerate() {
            if line.contains("env::var") {
                wrong.push(format!("{}:{}: {}", source.path, at + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "settings come from `config`, where they are documented: {wrong:#?}");
}

#[test]
fn nothing_is_left_to_do() {
    let mut wrong = Vec::new();
    for source in sources() {
        for (at, line) in source.text.lines().enumerate() {
            for word in ["todo!", "unimplemented!", "FIXME", "XXX", "TODO"] {
                if line.contains(word) {
                    wrong.push(format!("{}:{}: {}", source.path, at + 1, line.trim()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_exception_has_a_reason_and_its_file() {
    let sources = sources();
    for (path, reason) in LONG_FILES.iter().chain(CLOCK_READERS).chain(ENVIRONMENT_READERS) {
        assert!(!reason.is_empty(), "{path}");
        assert!(sources.iter().any(|source| source.path == *path), "{path} is gone");
    }
    assert!(EXCEPTIONS.iter().all(|(.., reason)| !reason.is_empty()));
}

/// The scanner itself.
#[test]
fn the_scanner_sees_code_and_nothing_else() {
    let text = r##"
use crate::{a::{B, c::D}, e, self as _};
// crate::comment
/* crate::block
   crate::comment */ let s = "crate::string \" crate::still"; let r = r#"crate::"raw"#;
let c = '"'; let l: &'static str = crate::f(); let q = '\''; crate::g::H::i();
let x = notcrate::y; let z = $crate::w;
#[cfg(test)]
mod tests { use crate::tests; }
"##;
    let code = strip(text);
    assert_eq!(code.lines().count(), 7);
    assert_eq!(paths(&code), ["a::B", "a::c::D", "e", "self", "f", "g::H::i", "w"]);
    assert_eq!(raw_string("r\"x\""), Some(0));
    assert_eq!(raw_string("br##\"x\""), Some(2));
    assert_eq!(raw_string("rest"), None);
    assert_eq!(character("'a'"), 3);
    assert_eq!(character("'a, 'b>"), 0);
    assert_eq!(character(r"'\u{ff}'"), 8);
}

/// Else nobody would know any more whether simulations find them.
#[test]
fn the_planted_bugs_can_be_planted() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let patches = std::fs::read_dir(root.join("tests/simulation/bugs")).unwrap().map(|entry| entry.unwrap().path());
    let patches =
        patches.filter(|path| path.extension().is_some_and(|extension| extension == "patch")).collect::<Vec<_>>();
    assert!(patches.len() >= 25, "{patches:?}");
    for patch in patches {
        let mut git = std::process::Command::new("git");
        let applied = git.current_dir(root).args(["apply", "--check"]).arg(&patch).output().unwrap();
        assert!(applied.status.success(), "{}: {}", patch.display(), String::from_utf8_lossy(&applied.stderr));
    }
}
