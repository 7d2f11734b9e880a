//! The embedded store: a durable log that is the truth, with an index beside it.

use std::path::PathBuf;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// A write is acknowledged once it is on the disk: it survives a power cut.
    Strict,
    /// A write is acknowledged once the operating system has it: it survives a killed process, not a power cut.
    Relaxed,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub path: PathBuf,
    /// `false`: a missing store is an error, not an empty one.
    pub create: bool,
    /// With less disk space than this free, new claims are refused.
    pub min_free_bytes: u64,
    pub durability: Durability,
}
