//! The tenant scope: to whom a key belongs.

use http::HeaderName;

/// One part of a scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Authorization,
    Cookie(String),
    Header(HeaderName),
    Host,
    Path,
    /// A parameter of the route's pattern.
    PathParam(String),
}
