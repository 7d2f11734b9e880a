//! The command line: `serve` (the default), `check`, `key`, `records`, `store`.

mod command;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use oncegate::config::{self, Config, Flags};
use oncegate::idempotency::FingerprintSettings;
use oncegate::run::{self, StartError};
use oncegate::telemetry::{self, LogFormat};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// A reverse proxy that makes POST safe to retry.
#[derive(Parser)]
#[command(version, about, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Subcommand)]
enum Command {
    /// Run the gateway (the default command)
    Serve(Serve),
    /// Validate the configuration and print every error
    Check(Check),
    /// Print a deterministic key made of its parts, or of a JSON payload
    Key(Key),
    /// Look at the records of a running gateway, and settle them by hand
    Records(command::Records),
    /// Look after a shared store
    #[command(subcommand)]
    Store(StoreCommand),
}

#[derive(Subcommand)]
enum StoreCommand {
    /// Create the tables in PostgreSQL, or bring them up to date: for those whose gateways may not (store.migrate = false)
    Migrate(Check),
}

#[derive(Args)]
struct Serve {
    /// The configuration file; without it ./config.toml, if there is one, or else the defaults
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Overrides server.listen
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Overrides upstream.url
    #[arg(long, value_name = "URL")]
    upstream: Option<String>,
    /// Overrides store.path
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// Start even if the settings would give existing keys other ids: retries across this start are executed again
    #[arg(long)]
    accept_new_identity: bool,
    /// How log lines are written to standard error; RUST_LOG selects them
    #[arg(long, value_enum, default_value = "text")]
    log_format: Format,
}

#[derive(Args)]
struct Check {
    /// The configuration file; without it ./config.toml, if there is one, or else the defaults
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct KeySource {
    /// What the key is made of, such as a user, a draft and a time
    parts: Vec<String>,
    /// A JSON payload (- for standard input), compared as the fingerprint does
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Args)]
struct Key {
    #[command(flatten)]
    source: KeySource,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Bad configuration or usage.
const BAD_USAGE: u8 = 2;

fn main() -> ExitCode {
    let Cli { command, serve } = Cli::parse();
    match command.unwrap_or(Command::Serve(serve)) {
        Command::Serve(options) => run_gateway(options),
        Command::Check(options) => check(&options),
        Command::Key(Key { source }) => key(&source),
        Command::Records(records) => command::run(records),
        Command::Store(StoreCommand::Migrate(options)) => migrate(&options),
    }
}

/// Standard error may be closed; there is nobody to tell then.
fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "oncegate: {text}");
}

fn load(file: Option<&Path>, flags: &Flags) -> Result<(Config, Option<PathBuf>), ExitCode> {
    config::load(file, std::env::vars_os(), flags).map_err(|errors| {
        for line in &errors.lines {
            complain(line);
        }
        ExitCode::from(BAD_USAGE)
    })
}

fn check(options: &Check) -> ExitCode {
    match load(options.config.as_deref(), &Flags::default()) {
        Err(code) => code,
        Ok((_, file)) => {
            let what = file.map_or_else(|| "the defaults".to_owned(), |file| file.display().to_string());
            // Whoever closed the pipe wanted the exit code alone.
            let _ = writeln!(std::io::stdout(), "{what}: ok");
            ExitCode::SUCCESS
        }
    }
}

fn migrate(options: &Check) -> ExitCode {
    let config = match load(options.config.as_deref(), &Flags::default()) {
        Ok((config, _)) => config,
        Err(code) => return code,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = runtime
        .context("cannot start the runtime")
        .and_then(|runtime| runtime.block_on(run::migrate(&config)).map_err(anyhow::Error::from));
    match done {
        Ok(what) => {
            let _ = writeln!(std::io::stdout(), "{what}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::from(error.downcast_ref::<StartError>().map_or(1, StartError::exit_code))
        }
    }
}

fn run_gateway(options: Serve) -> ExitCode {
    let flags = Flags { listen: options.listen, upstream: options.upstream, data: options.data };
    let config = match load(options.config.as_deref(), &flags) {
        Ok((config, _)) => config,
        Err(code) => return code,
    };
    telemetry::init_logging(match options.log_format {
        Format::Text => LogFormat::Text,
        Format::Json => LogFormat::Json,
    });
    match serve(config, options.accept_new_identity) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::from(error.downcast_ref::<StartError>().map_or(1, StartError::exit_code))
        }
    }
}

fn serve(config: Config, accept_new_identity: bool) -> anyhow::Result<()> {
    // For what belongs to no connection: listening, signals, the admin address, the sweep.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async {
        // Before anything is bound: a signal must never meet the default action once claims exist.
        let signal = run::shutdown_signal().context("cannot listen for signals")?;
        let reload = run::reload_signal().context("cannot listen for signals")?;
        let running = run::start(config, accept_new_identity).await?;
        running.reload_on(reload);
        running.until(signal).await;
        anyhow::Ok(())
    })?;
    // Connections that outlived the drain are not waited for.
    runtime.shutdown_background();
    Ok(())
}

fn key(source: &KeySource) -> ExitCode {
    let digest = match &source.json {
        None => run::key_of_parts(&source.parts),
        Some(path) => match read_or_stdin(path) {
            Ok(payload) => FingerprintSettings::default().json_digest(&payload),
            Err(error) => {
                complain(&format!("{error:#}"));
                return ExitCode::from(BAD_USAGE);
            }
        },
    };
    let hex = digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    match writeln!(std::io::stdout(), "{hex}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Whoever closed the pipe knows.
            if error.kind() != std::io::ErrorKind::BrokenPipe {
                complain(&format!("cannot write to standard output: {error}"));
            }
            ExitCode::FAILURE
        }
    }
}

/// `-` is standard input.
fn read_or_stdin(path: &Path) -> anyhow::Result<Vec<u8>> {
    if path.as_os_str() != "-" {
        return std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    }
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).context("cannot read standard input")?;
    Ok(bytes)
}
