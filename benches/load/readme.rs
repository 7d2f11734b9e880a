//! The parts of the README that benchmarks write.

use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// Puts `text` between the README's marks of this name.
pub fn replace(name: &str, text: &str) -> Result<()> {
    let (begin, end) = (format!("<!-- {name}: begin -->"), format!("<!-- {name}: end -->"));
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let old = fs::read_to_string(&readme)?;
    let (before, rest) = old.split_once(&begin).with_context(|| format!("the README lacks {begin}"))?;
    let (_, after) = rest.split_once(&end).with_context(|| format!("the README lacks {end}"))?;
    fs::write(readme, format!("{before}{begin}\n{text}{end}{after}"))?;
    Ok(())
}
