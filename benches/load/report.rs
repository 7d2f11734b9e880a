//! The table, and what a run leaves in the repository.

use crate::contestants::first_line;
use crate::measure::Commit;
use crate::plot;
use crate::readme;
use crate::rounds::{LeftOut, Phase, Spread, Summary};
use crate::scale::Figure;
use crate::settings::Settings;
use crate::workloads::Workload;
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

/// One run, as it is kept.
#[derive(Serialize)]
pub struct Run<'a> {
    pub date: String,
    pub commit: String,
    pub cpu: String,
    pub kernel: String,
    pub versions: BTreeMap<String, String>,
    /// An append and its `fdatasync`, before and after.
    pub commits: [Commit; 2],
    pub settings: &'a Settings,
    pub left_out: &'a [LeftOut],
    pub phases: &'a [Phase],
    pub scale: &'a [Figure],
}

pub fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("model name"));
    line.unwrap_or_default().trim_start_matches(['\t', ' ', ':']).to_owned()
}

pub fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// The commit that runs; with a `+` if something was changed since.
pub fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=10", "HEAD"]) else { return "unknown".to_owned() };
    let sources = ["status", "--porcelain", "--", "src", "benches/load", "Cargo.toml", "Cargo.lock"];
    let clean = git(&sources).is_some_and(|changes| changes.is_empty());
    commit + if clean { "" } else { "+" }
}

/// Today in UTC, as `2026-11-24`.
pub fn today() -> Result<String> {
    let date = httpdate::fmt_http_date(SystemTime::now());
    // "Tue, 24 Nov 2026 13:55:34 GMT"
    let mut fields = date.split(' ').skip(1);
    let (day, month, year) = (fields.next(), fields.next(), fields.next());
    let (Some(day), Some(month), Some(year)) = (day, month, year) else { bail!("{date}") };
    let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let month = months.iter().position(|name| *name == month).context("a month")? + 1;
    Ok(format!("{year}-{month:02}-{day}"))
}

pub fn h2load_version() -> Result<String> {
    first_line("h2load", "--version")
}

/// What the run was, then a row for each workload and contestant.
pub fn table(run: &Run<'_>, workloads: &[Workload], summaries: &[Summary], took: Duration) -> String {
    let mut text = format!(
        "{}, commit {}, {}, Linux {}; {} in flight, at least {} rounds, {} requests a phase (fewer where they are large or slow); {} s in all.\n",
        run.date,
        run.commit,
        run.cpu,
        run.kernel,
        run.settings.in_flight,
        run.settings.rounds,
        run.settings.requests,
        took.as_secs()
    );
    let versions = run.versions.values().map(String::as_str).collect::<Vec<_>>();
    let _ = writeln!(text, "{}.", versions.join(", "));
    let [before, after] = run.commits;
    let _ = writeln!(
        text,
        "An append and its fdatasync on this disk, in a row: {:.0} µs before the run, {:.0} after it; two in a millisecond: {:.0} and {:.0}.",
        before.in_a_row_us, after.in_a_row_us, before.paced_us, after.paced_us
    );
    for LeftOut { who, why, .. } in run.left_out {
        let _ = writeln!(text, "Left out: {who}: {why}.");
    }
    if !summaries.is_empty() {
        text += "\n| workload | proxy | CPU µs per request (spread) | ratio | requests/s | p50 µs | p99 µs | p99 of 1,000 µs (ratio) | p99.9 µs | written bytes per request | RSS MiB | quiet rounds |\n\
             |---|---|---|---|---|---|---|---|---|---|---|---|\n";
    }
    for row in summaries {
        let show = |ratio: Option<f64>| ratio.map_or_else(|| "—".to_owned(), |ratio| format!("{ratio:.2}"));
        let (ratio, p99_ratio) = (show(row.ratio), show(row.p99_ratio));
        let _ = writeln!(
            text,
            "| {} | {} | {:.1} ({:.1}–{:.1}) | {ratio} | {:.0} | {:.0} | {:.0} | {:.0} ({p99_ratio}) | {:.0} | {:.0} | {:.0} | {} of {} |",
            row.workload,
            row.contestant,
            row.cpu_us.median,
            row.cpu_us.least,
            row.cpu_us.most,
            row.requests_per_second,
            row.p50_us.median,
            row.p99_us.median,
            row.stretch_p99_us,
            row.p999_us,
            row.written_bytes,
            row.rss_bytes / f64::from(1 << 20),
            row.quiet_rounds,
            row.rounds,
        );
    }
    if !run.scale.is_empty() {
        text += "\n| what | gateway | figure |\n|---|---|---|\n";
    }
    for Figure { gateway, what, value, unit } in run.scale {
        let _ = writeln!(text, "| {what} | {gateway} | {value:.1} {unit} |");
    }
    text += "\n";
    for workload in workloads {
        let compared = workload.reference().map(|kind| format!("; compared with {kind}")).unwrap_or_default();
        let _ = writeln!(text, "- *{}*: {}{compared}", workload.name, workload.meaning);
    }
    text
}

/// Keeps the run under its date, draws the plots, and puts the table into the README.
pub fn write(run: &Run<'_>, table: &str, summaries: &[Summary]) -> Result<()> {
    if let Some(row) = summaries.iter().find(|row| row.quiet_rounds == 0) {
        bail!("{} in {}: no round was quiet; nothing is written", row.contestant, row.workload);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let runs = root.join("benches/runs");
    fs::create_dir_all(&runs)?;
    let name = format!("{}-{}", run.date, run.commit.trim_end_matches('+'));
    let file = fs::File::create(runs.join(format!("{name}.json")))?;
    serde_json::to_writer(file, run)?;

    let at_full_speed = |row: &&Summary| !row.workload.ends_with("-paced");
    let cpu = groups(summaries.iter().filter(at_full_speed).map(|row| (row.workload.to_owned(), row, &row.cpu_us)));
    plot::draw(&runs.join("cpu.svg"), "CPU µs per request of the proxy: median, least and most", &cpu)?;
    let paced = || summaries.iter().filter(|row| !at_full_speed(row));
    let p50 = paced().map(|row| (format!("{}, p50", row.workload), row, &row.p50_us));
    let p99 = paced().map(|row| (format!("{}, p99", row.workload), row, &row.p99_us));
    let mut latency = groups(p50.chain(p99));
    latency.sort_by(|a, b| a.name.cmp(&b.name));
    plot::draw(
        &runs.join("latency.svg"),
        "Latency in µs at a steady rate: median, least and most of the rounds",
        &latency,
    )?;

    let text = format!(
        "![CPU per request](benches/runs/cpu.svg)\n![Latency](benches/runs/latency.svg)\n\n\
         {table}\nThe raw run: [{name}.json](benches/runs/{name}.json)\n"
    );
    readme::replace("load", &text)
}

fn groups<'a>(rows: impl Iterator<Item = (String, &'a Summary, &'a Spread)>) -> Vec<plot::Group> {
    let mut groups: Vec<plot::Group> = Vec::new();
    for (name, row, &Spread { median, least, most }) in rows {
        if groups.last().is_none_or(|group| group.name != name) {
            groups.push(plot::Group { name, marks: Vec::new() });
        }
        if let Some(group) = groups.last_mut() {
            group.marks.push(plot::Mark { contestant: row.contestant.clone(), median, least, most });
        }
    }
    groups
}
