//! Claims that were left behind: their gateways are gone, and nobody may ever ask for them.

use super::{Ledger, decode, tags};
use crate::idempotency::{Decision, Event, Policy};
use crate::store::{Store, StoreError};
use std::time::Duration;

/// Claims that are read at once, and how often in one round: there are about as many as requests under way.
const PAGE: usize = 256;
const PAGES: usize = 64;

impl<S: Store, R: Clone + Send + Sync + 'static> Ledger<S, R> {
    /// Looks once a lease for claims in a shared store that nobody has renewed, whoever has made them, and makes them
    /// unknown, for as long as the process lives: until then no metric shows them. All gateways may do so at once. `policy` as
    /// with [`Ledger::recover`].
    pub async fn let_claims_lapse(&self, lease: Duration, policy: impl Fn(&[u8]) -> Option<Policy>) {
        loop {
            tokio::time::sleep(lease).await;
            match self.find_lapsed(&policy).await {
                Ok(0) => {}
                Ok(lapsed) => {
                    tracing::warn!(lapsed, "claims were not renewed by their gateways; their outcome is unknown");
                }
                Err(StoreError::Failed { .. }) => return,
                Err(error) => tracing::debug!(%error, "cannot look for claims that were not renewed"),
            }
        }
    }

    /// One round; how many there were.
    pub(super) async fn find_lapsed(&self, policy: impl Fn(&[u8]) -> Option<Policy>) -> Result<usize, StoreError> {
        let (mut after, mut lapsed) = (0, 0);
        for _ in 0..PAGES {
            let page = self.0.store.list(Some(tags::CLAIMED), after, PAGE).await?;
            for (id, entry) in page.entries {
                let Some((version, record)) = decode(id, entry) else { continue };
                let Some(policy) = policy(&record.origin.route) else { continue };
                // One that lives costs nothing more; one that is renewed meanwhile is found to live.
                match self.0.apply(id, &policy, Some((version, record)), &Event::Lapse).await {
                    Ok((decision, _)) => lapsed += usize::from(decision == Decision::Settled),
                    Err(error @ (StoreError::Failed { .. } | StoreError::Unavailable { .. })) => return Err(error),
                    Err(error) => tracing::warn!(record = %id, %error, "a claim that was not renewed stays as it is"),
                }
            }
            match page.next {
                Some(next) => after = next,
                None => break,
            }
        }
        Ok(lapsed)
    }
}
