//! The outcome table: which response statuses are final, not executed, or unknown.

/// What a complete response says about the execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    Final,
    NotExecuted,
    Unknown,
}

/// One table's three lists, as written in a configuration; `None`: the list was not written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutcomeLists {
    pub final_: Option<Vec<String>>,
    pub not_executed: Option<Vec<String>>,
    pub unknown: Option<Vec<String>>,
}

/// A route's resolved outcome table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutcomeTable {
    // private fields: to be written
}

impl OutcomeTable {
    /// Merges the built-in lists, `[idempotency.outcomes]` and the route's own `outcomes`.
    ///
    /// # Errors
    /// One message per entry that is malformed or stands in two lists of one table.
    pub fn new(general: &OutcomeLists, route: &OutcomeLists) -> Result<Self, Vec<String>> {
        let _ = (general, route);
        todo!()
    }

    /// Classifies a response by its status and whether it bears `Retry-After`. A status that no entry names is final.
    #[must_use]
    pub fn classify(&self, status: u16, retry_after: bool) -> Class {
        let _ = (status, retry_after);
        todo!()
    }
}

impl Default for OutcomeTable {
    fn default() -> Self {
        todo!()
    }
}
