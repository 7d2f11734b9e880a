//! The admin address: liveness, readiness, metrics.

use crate::server::Address;

/// `[admin]`.
#[derive(Clone, Debug)]
pub struct Options {
    pub listen: Address,
}
