//! The configuration: file, environment and flags, resolved into each module's own options. Nothing is bound here, nothing
//! opened but the files of `[server.tls]`, `[upstream.tls]`, `[auth]` and `admin.token_file` that are read, and all errors are
//! reported at once.

mod auth;
mod cors;
mod questions;
mod reader;
mod routes;
mod sections;
mod shared;
#[cfg(test)]
mod tests;
mod upstream;

use crate::{admin, gateway, ledger, server, store};
use reader::{At, Errors, Node};
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

/// A valid configuration.
#[derive(Clone, Debug)]
pub struct Config {
    pub server: server::Options,
    pub gateway: gateway::Options,
    pub ledger: ledger::Options,
    pub store: store::Options,
    pub admin: admin::Options,
}

/// Settings from the command line, which beat all others.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// `--listen`: `server.listen`.
    pub listen: Option<String>,
    /// `--upstream`: `upstream.url`.
    pub upstream: Option<String>,
    /// `--data`: `store.path`.
    pub data: Option<String>,
}

/// Everything that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    /// One line each: where, which key, what is wrong and what would be right.
    pub lines: Vec<String>,
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines.join("\n"))
    }
}

impl std::error::Error for ConfigErrors {}

/// The file that is read when none is named, if it exists.
pub const DEFAULT_FILE: &str = "config.toml";

/// Loads the configuration: `file`, or else [`DEFAULT_FILE`] if there is one; `environment` beats the file, flags beat
/// both. Returns it with the file that was read.
///
/// # Errors
/// All that is wrong, at once.
pub fn load(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    flags: &Flags,
) -> Result<(Config, Option<PathBuf>), ConfigErrors> {
    let path = match file {
        Some(path) => Some(path.to_owned()),
        // A link that leads nowhere or a forbidden directory must not pass for "no file": the defaults are another store.
        None => Some(PathBuf::from(DEFAULT_FILE)).filter(|path| {
            std::fs::symlink_metadata(path).err().is_none_or(|error| error.kind() != std::io::ErrorKind::NotFound)
        }),
    };
    let text = match &path {
        None => String::new(),
        Some(path) => std::fs::read_to_string(path).map_err(|error| ConfigErrors {
            lines: vec![format!("{}: cannot read the configuration: {error}", path.display())],
        })?,
    };
    let name = path.as_ref().map_or_else(String::new, |path| path.display().to_string());
    let (variables, mut unreadable) = readable(environment);
    match parse(&name, &text, variables, flags) {
        Ok(config) if unreadable.is_empty() => Ok((config, path)),
        Ok(_) => Err(ConfigErrors { lines: unreadable }),
        Err(mut errors) => {
            errors.lines.append(&mut unreadable);
            Err(errors)
        }
    }
}

/// The variables that are UTF-8, and an error for each of ours that is not: a setting is never ignored in silence.
fn readable(environment: impl IntoIterator<Item = (OsString, OsString)>) -> (Vec<(String, String)>, Vec<String>) {
    let (mut variables, mut errors) = (Vec::new(), Vec::new());
    for (name, value) in environment {
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => variables.push((name, value)),
            (Ok(name), Err(_)) if is_ours(&name) => errors.push(format!("{name}: its value is not UTF-8")),
            (Err(name), _) if is_ours(&name.to_string_lossy()) => {
                errors.push(format!("{}: there is no such key: the name is not UTF-8", name.to_string_lossy()));
            }
            _ => {}
        }
    }
    errors.sort();
    (variables, errors)
}

/// `ONCEGATE_<SECTION>__<KEY>`. A name without `__` is not ours: Kubernetes injects `ONCEGATE_PORT`.
fn is_ours(variable: &str) -> bool {
    variable.strip_prefix("ONCEGATE_").is_some_and(|name| name.contains("__"))
}

/// As [`load`], from a text; `name` stands for the file in messages.
///
/// # Errors
/// All that is wrong, at once.
pub fn parse(
    name: &str,
    text: &str,
    environment: impl IntoIterator<Item = (String, String)>,
    flags: &Flags,
) -> Result<Config, ConfigErrors> {
    let mut errors = Errors::new(name);
    let mut root = reader::parse_document(text, &mut errors);
    if !errors.is_empty() {
        return Err(ConfigErrors { lines: errors.into_lines() });
    }
    let mut variables = environment.into_iter().collect::<Vec<_>>();
    variables.sort();
    for (variable, value) in variables {
        apply_variable(&mut root, &variable, &value, &mut errors);
    }
    for (flag, path, value) in [
        ("--listen", ["server", "listen"], &flags.listen),
        ("--upstream", ["upstream", "url"], &flags.upstream),
        ("--data", ["store", "path"], &flags.data),
    ] {
        if let Some(value) = value {
            let node = Node::string(value, At::Flag(flag));
            root.set(&path, node, &mut errors);
        }
    }
    let config = sections::resolve(root, &mut errors);
    match config {
        Some(config) if errors.is_empty() => Ok(config),
        _ => Err(ConfigErrors { lines: errors.into_lines() }),
    }
}

/// Puts a variable's value where its name says, if it is one of ours.
fn apply_variable(root: &mut Node, variable: &str, value: &str, errors: &mut Errors) {
    let Some(name) = variable.strip_prefix("ONCEGATE_").filter(|_| is_ours(variable)) else { return };
    let name = name.to_ascii_lowercase();
    let path = name.split("__").collect::<Vec<_>>();
    let at = At::Variable(variable.to_owned());
    if path.first() == Some(&"routes") {
        errors.add(&at, "routes", "routes cannot be set by the environment; write them into the file");
        return;
    }
    let node = reader::parse_value(value, &at);
    root.set(&path, node, errors);
}
