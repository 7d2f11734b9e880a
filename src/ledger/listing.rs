//! Records in pages, for operators.

use super::{Ledger, Shown};
use crate::idempotency::{Policy, Record};
use crate::store::{Store, StoreError, Tag};

/// A part of what there is.
#[derive(Clone, Debug)]
pub struct Listed {
    pub records: Vec<Shown>,
    /// Where to go on; `None`: that was the end.
    pub next: Option<u64>,
}

/// What one page of a list may cost: entries looked at, in all and at once, and bytes of those that are wanted.
const VISITS_MAX: usize = 2048;
const VISITS_AT_ONCE: usize = 64;
const LIST_BYTES_MAX: usize = 8 << 20;

impl<S: Store, R: Clone + Send + Sync + 'static> Ledger<S, R> {
    /// Up to `limit` records of a tag, or of all, that are `wanted`, roughly oldest first; `after` 0 begins, [`Listed::next`]
    /// goes on. Expired records are left out; `policy` is as with [`Ledger::show`]. It is bounded work: there may be fewer records than there is room for, or
    /// none, before the end.
    ///
    /// # Errors
    /// The store's.
    pub async fn list(
        &self,
        tag: Option<Tag>,
        mut after: u64,
        limit: usize,
        policy: impl Fn(&Record) -> Policy,
        wanted: impl Fn(&Record) -> bool,
    ) -> Result<Listed, StoreError> {
        let (mut records, mut visits, mut bytes) = (Vec::new(), VISITS_MAX, 0);
        while visits > 0 && records.len() < limit && bytes < LIST_BYTES_MAX {
            // No more than there is room for: a cursor stands between two visits.
            let visit = VISITS_AT_ONCE.min(visits).min(limit - records.len());
            let page = self.0.store.list(tag, after, visit).await?;
            visits -= visit;
            let now = self.0.clock.now();
            for (id, entry) in page.entries {
                let len = entry.value.bytes.len();
                // What cannot be decoded was noted in the log.
                let Ok(mut shown) = self.shown(id, entry) else { continue };
                let policy = policy(&shown.record);
                self.0.let_lapse(&mut shown, &policy);
                if !shown.record.expired(now) && wanted(&shown.record) {
                    bytes += len;
                    records.push(shown);
                }
            }
            match page.next {
                None => return Ok(Listed { records, next: None }),
                Some(next) => after = next,
            }
            tokio::task::yield_now().await;
        }
        Ok(Listed { records, next: Some(after) })
    }
}
