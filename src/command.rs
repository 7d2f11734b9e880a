//! `oncegate records`: an operator looks at records and settles them by hand, over a running gateway's admin address.

mod client;
mod render;
mod selection;

use bytes::Bytes;
use clap::{Args, Subcommand};
use client::{Access, Client, Failure};
use selection::{Found, Match, Selected};
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Args)]
pub(crate) struct Records {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    access: Access,
    /// Print JSON instead of a table
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum What {
    /// List records, roughly oldest first
    List(List),
    /// Show one record, or all that have a key
    Show(Show),
    /// Settle a record whose outcome is unknown: it was not executed, or this was the response
    Resolve(Resolve),
    /// Forget a record whose outcome is known or unknown: its key is new again, and a retry is executed
    Forget(Forget),
}

#[derive(Args)]
struct List {
    #[arg(long)]
    state: Option<selection::State>,
    /// Only these, such as status=502,route=/posts,key=K,since=2h,until=2026-01-31T12:00:00Z
    #[arg(long = "match", value_name = "CONDITIONS")]
    matching: Option<Match>,
    /// List so many records at most
    #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// Go on where an earlier list has ended
    #[arg(long, value_name = "CURSOR")]
    after: Option<String>,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Named {
    /// The record's id: 32 hex digits
    #[arg(value_parser = id)]
    id: Option<String>,
    /// All records with this key, of whatever tenant
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    key: Option<String>,
}

#[derive(Args)]
struct Show {
    #[command(flatten)]
    named: Named,
}

#[derive(Args)]
#[group(id = "targets", required = true, multiple = false)]
struct Targets {
    /// The record's id: 32 hex digits
    #[arg(value_parser = id)]
    id: Option<String>,
    /// Instead of an id: all that meet the conditions, such as status=502,route=/posts,since=2h
    #[arg(long = "match", value_name = "CONDITIONS")]
    matching: Option<Match>,
}

#[derive(Args)]
struct Target {
    #[command(flatten)]
    targets: Targets,
    /// Only if the record's token is still this one, as `show` prints it
    #[arg(long, value_name = "TOKEN", conflicts_with = "matching")]
    if_token: Option<String>,
    /// With --match: do it, instead of listing what would be done
    #[arg(long, conflicts_with = "id")]
    yes: bool,
}

#[derive(Args)]
#[group(id = "verdict", required = true, multiple = false)]
struct Verdict {
    /// It was not executed: the key is free again
    #[arg(long)]
    not_executed: bool,
    /// It was executed, with this HTTP/1.1 response message (- for standard input), which is replayed from now on
    #[arg(long, value_name = "FILE", conflicts_with = "matching")]
    response: Option<PathBuf>,
}

#[derive(Args)]
struct Resolve {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    verdict: Verdict,
}

#[derive(Args)]
struct Forget {
    #[command(flatten)]
    target: Target,
}

fn id(text: &str) -> Result<String, String> {
    if text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(text.to_ascii_lowercase());
    }
    Err("an id has 32 hex digits".to_owned())
}

/// What an operator does to a record.
enum Act {
    NotExecuted,
    Response(Bytes),
    Forget,
}

impl Act {
    /// In which states it finds its records.
    fn states(&self) -> &'static [selection::State] {
        match self {
            Self::NotExecuted | Self::Response(_) => &[selection::State::Unknown],
            Self::Forget => &[selection::State::Unknown, selection::State::Completed],
        }
    }

    async fn do_to(&self, client: &mut Client, id: &str, if_token: Option<&str>) -> Result<Value, Failure> {
        let condition = if_token.map(|token| ("if_token", token)).into_iter().collect::<Vec<_>>();
        let (method, target, query, body) = match self {
            Self::NotExecuted => {
                let mut document = json!({ "not_executed": true });
                if let (Some(token), Some(fields)) = (if_token, document.as_object_mut()) {
                    fields.insert("if_token".to_owned(), token.into());
                }
                let body = Bytes::from(document.to_string());
                (http::Method::POST, format!("/records/{id}/resolve"), Vec::new(), Some(("application/json", body)))
            }
            Self::Response(message) => {
                let body = Some(("message/http", message.clone()));
                (http::Method::POST, format!("/records/{id}/resolve"), condition, body)
            }
            Self::Forget => (http::Method::DELETE, format!("/records/{id}"), condition, None),
        };
        let done = client.call(method, &target, &query, body).await?;
        if done.get("before").is_some_and(Value::is_object) { Ok(done) } else { Err(client.no_gateway()) }
    }
}

/// What goes to standard output.
#[derive(Default)]
struct Output {
    failed: Option<std::io::Error>,
}

impl Output {
    fn print(&mut self, text: &str) {
        if self.failed.is_none() {
            let mut stdout = std::io::stdout();
            self.failed = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).err();
        }
    }

    /// Whether all that was printed has been taken. Whoever closed the pipe knows that.
    fn exit_code(self, good: u8) -> u8 {
        match self.failed {
            Some(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                crate::complain(&format!("cannot write to standard output: {error}"));
                1
            }
            _ => good,
        }
    }
}

pub(crate) fn run(records: Records) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            crate::complain(&format!("cannot start the runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let mut output = Output::default();
    let code = match runtime.block_on(dispatch(records, &mut output)) {
        Ok(code) => code,
        Err(failure) => {
            crate::complain(&render::escape(&failure.to_string()));
            failure.exit_code()
        }
    };
    ExitCode::from(output.exit_code(code))
}

/// Returns the exit code.
async fn dispatch(Records { what, access, json }: Records, output: &mut Output) -> Result<u8, Failure> {
    // What the arguments name is read before anybody is asked.
    let verdict = match &what {
        What::Resolve(Resolve { verdict, .. }) => match &verdict.response {
            Some(path) => Act::Response(message(path)?),
            None => Act::NotExecuted,
        },
        _ => Act::Forget,
    };
    let mut client = Client::new(access)?;
    match what {
        What::List(list) => self::list(&mut client, list, json, output).await,
        What::Show(Show { named: Named { id: Some(id), .. } }) => {
            let record = client.call(http::Method::GET, &format!("/records/{id}"), &[], None).await?;
            if !record.get("id").is_some_and(Value::is_string) {
                return Err(client.no_gateway());
            }
            output.print(&if json { render::json(&record) } else { render::record(&record) });
            Ok(0)
        }
        What::Show(Show { named: Named { key, .. } }) => {
            with_key(&mut client, &key.unwrap_or_default(), json, output).await
        }
        What::Resolve(Resolve { target, .. }) | What::Forget(Forget { target }) => match target.targets {
            Targets { matching: Some(matching), .. } => {
                all_matching(&mut client, &verdict, &matching, target.yes, json, output).await
            }
            Targets { id, .. } => {
                let id = id.unwrap_or_default();
                let done = verdict.do_to(&mut client, &id, target.if_token.as_deref()).await?;
                output.print(&if json { render::json(&done) } else { render::done(&done) });
                Ok(0)
            }
        },
    }
}

fn message(path: &Path) -> Result<Bytes, Failure> {
    let message = crate::read_or_stdin(path).map_err(|error| Failure::Usage(format!("{error:#}")))?;
    Ok(Bytes::from(message))
}

async fn list(client: &mut Client, list: List, json: bool, output: &mut Output) -> Result<u8, Failure> {
    let List { state, matching, limit, after } = list;
    let selected = Selected::new(state, matching)?;
    let Found { records, next, .. } =
        selected.find(client, after, Some(usize::try_from(limit).unwrap_or(usize::MAX))).await?;
    if json {
        output.print(&render::json(&json!({ "records": records, "next": next })));
    } else if !records.is_empty() {
        output.print(&render::table(&records));
    }
    if let Some(next) = next {
        notice(&format!("more: --after {next}"));
    }
    Ok(0)
}

async fn with_key(client: &mut Client, key: &str, json: bool, output: &mut Output) -> Result<u8, Failure> {
    let mut found = Found::default();
    // What an operator most probably asks for is found at once; completed records take a walk through the whole store.
    for state in [Some(selection::State::Unknown), Some(selection::State::Claimed), None] {
        found.merge(Selected::with_key(state, key).find(client, None, None).await?.records);
    }
    match found.records.as_slice() {
        [] => return Err(Failure::Failed(format!("there is no record with the key {key:?}"))),
        [record] => output.print(&if json { render::json(record) } else { render::record(record) }),
        records if json => output.print(&render::json(&json!({ "records": records, "next": null }))),
        records => output.print(&render::table(records)),
    }
    Ok(0)
}

async fn all_matching(
    client: &mut Client,
    act: &Act,
    matching: &Match,
    yes: bool,
    json: bool,
    output: &mut Output,
) -> Result<u8, Failure> {
    let mut found = Found::default();
    for selected in Selected::for_act(act.states(), matching)? {
        found.merge(selected.find(client, None, None).await?.records);
    }
    let what = if matches!(act, Act::Forget) { "forgotten" } else { "resolved as not executed" };
    let count = found.records.len();
    if !yes {
        if json {
            output.print(&render::json(&json!({ "records": found.records, "next": null })));
        } else if count > 0 {
            output.print(&render::table(&found.records));
        }
        notice(&format!("{count} would be {what}; nothing was changed. With --yes it is done."));
        return Ok(0);
    }
    let (mut results, mut refused) = (Vec::new(), 0);
    let mut ended = None;
    for record in &found.records {
        let field = |name: &str| record.get(name).and_then(Value::as_str);
        let (Some(id), Some(token)) = (field("id"), field("token")) else {
            ended = Some(Failure::Failed("the gateway has listed a record without id or token".to_owned()));
            break;
        };
        let (line, result) = match act.do_to(client, id, Some(token)).await {
            Ok(done) => (render::done(&done), done),
            Err(failure) => match failure.of_one_record() {
                Ok(problem) => {
                    refused += 1;
                    (render::refused(id, &problem), json!({ "id": id, "problem": problem }))
                }
                Err(failure) => {
                    ended = Some(failure);
                    break;
                }
            },
        };
        if json {
            results.push(result);
        } else {
            output.print(&line);
        }
    }
    if json {
        output.print(&render::json(&json!({ "results": results })));
    }
    match ended {
        Some(failure) => Err(failure),
        None => {
            notice(&format!("{} {what}, {refused} refused", count - refused));
            Ok(u8::from(refused > 0))
        }
    }
}

/// Tells people what is no part of the output.
fn notice(text: &str) {
    let _ = writeln!(std::io::stderr(), "{}", render::escape(text));
}
