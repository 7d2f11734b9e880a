//! Whether figures stay where they are: least squares over the means of blocks.

use std::fmt::Write;
use std::time::Duration;

pub(crate) const FIGURES: [&str; 8] =
    ["RSS, MiB", "descriptors", "threads", "disk, MiB", "index, MiB", "records", "p50, ms", "p99, ms"];
/// Long against what is correlated in a figure: stops of the gateway, sweeps, flushes.
const BLOCK: Duration = Duration::from_secs(120);
/// With fewer there is no saying.
const BLOCKS_MIN: usize = 8;
/// Of the mean, per hour.
const SHARE_MAX: f64 = 0.02;
const ERRORS_MAX: f64 = 3.0;

pub(crate) struct Sample {
    pub(crate) at: Duration,
    pub(crate) figures: [f64; FIGURES.len()],
}

struct Fit {
    mean: f64,
    /// Per hour.
    slope: f64,
    error: f64,
}

/// Through the blocks' means; `None` if there are too few.
fn fit(points: &[(f64, f64)]) -> Option<Fit> {
    if points.len() < 3 {
        return None;
    }
    let n = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / n;
    let (x_mean, y_mean) = (mean(|point| point.0), mean(|point| point.1));
    let spread = points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum::<f64>();
    let slope = points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum::<f64>() / spread;
    let rest = points.iter().map(|(x, y)| (y - y_mean - slope * (x - x_mean)).powi(2)).sum::<f64>();
    Some(Fit { mean: y_mean, slope, error: (rest / (n - 2.0) / spread).sqrt() })
}

/// Means over blocks, at their hours.
fn blocks(samples: &[Sample], figure: usize, block: Duration) -> Vec<(f64, f64)> {
    let Some(first) = samples.first() else { return Vec::new() };
    let number = |sample: &Sample| (sample.at - first.at).as_nanos() / block.as_nanos().max(1);
    let chunks = samples.chunk_by(|a, b| number(a) == number(b)).collect::<Vec<_>>();
    let full = chunks.iter().map(|chunk| chunk.len()).max().unwrap_or(0);
    let mean = |chunk: &[Sample]| {
        // In a moment of disturbance there is no latency.
        let known = chunk.iter().filter(|sample| sample.figures[figure].is_finite());
        let (count, x, y) = known.fold((0.0, 0.0, 0.0), |(count, x, y), sample| {
            (count + 1.0, x + sample.at.as_secs_f64() / 3600.0, y + sample.figures[figure])
        });
        (count > 0.0).then(|| (x / count, y / count))
    };
    // The last one may be a small rest.
    chunks.into_iter().filter(|chunk| 2 * chunk.len() > full).filter_map(mean).collect()
}

/// A table of slopes, and whether all are flat.
pub(crate) fn table(name: &str, samples: &[Sample], length: Duration) -> (String, bool) {
    let from = samples.partition_point(|sample| sample.at < length / 4);
    let block = BLOCK.min(length / 12);
    let (mut text, mut flat) = (String::new(), true);
    for (figure, what) in FIGURES.iter().enumerate() {
        let points = blocks(&samples[from..], figure, block);
        let Some(Fit { mean, slope, error }) = fit(&points) else { continue };
        let verdict = if points.len() < BLOCKS_MIN || block < BLOCK {
            "too short to say"
        } else if slope.abs() < ERRORS_MAX * error {
            "flat: less than 3 standard errors"
        } else if slope.abs() < SHARE_MAX * mean {
            "flat: less than 2 % of the mean"
        } else {
            flat = false;
            "NOT FLAT"
        };
        let _ = writeln!(text, "| {name} | {what} | {mean:.2} | {slope:+.2} | {error:.2} | {verdict} |");
    }
    (text, flat)
}

pub(crate) fn csv(name: &str, samples: &[Sample]) -> String {
    let mut text = String::new();
    for sample in samples {
        let _ = write!(text, "{name},{:.0}", sample.at.as_secs_f64());
        for figure in sample.figures {
            let _ = if figure == figure.trunc() { write!(text, ",{figure}") } else { write!(text, ",{figure:.2}") };
        }
        text.push('\n');
    }
    text
}
