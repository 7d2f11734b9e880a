//! Completed records in memory. They never change, so no coherence is needed; evicted never means unseen.

use super::remembered::Remembered;
use crate::idempotency::{Millis, Record, Recorded, State};
use crate::store::{HashOfIds, RecordId};
use moka::sync::Cache;
use std::sync::Arc;
use std::time::Duration;

pub(super) struct HotCache {
    records: Cache<RecordId, Hot, HashOfIds>,
    max_age_ms: Option<u64>,
}

#[derive(Clone)]
struct Hot {
    record: Arc<Remembered>,
    use_until: Millis,
}

/// What an entry weighs besides its payload: the record, the map's node, moka's bookkeeping.
const OVERHEAD_BYTES: usize = 400;
/// What a header field weighs besides its bytes: its line, and its entry in the map that replays are made from.
const FIELD_OVERHEAD_BYTES: usize = 64 + 120;

impl HotCache {
    pub(super) fn new(max_bytes: u64, max_age: Option<Duration>) -> Self {
        let records = Cache::builder().max_capacity(max_bytes).weigher(|_, hot: &Hot| weigh(&hot.record));
        let records = records.build_with_hasher(HashOfIds::default());
        let max_age_ms = max_age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        Self { records, max_age_ms }
    }

    /// A completed record that has not expired at `now`.
    pub(super) fn get(&self, id: RecordId, now: Millis) -> Option<Arc<Remembered>> {
        let hot = self.records.get(&id)?;
        if hot.use_until <= now {
            self.records.invalidate(&id);
            return None;
        }
        Some(hot.record)
    }

    /// Takes a record in, if it is completed.
    pub(super) fn put(&self, id: RecordId, record: Arc<Remembered>, now: Millis) {
        if let State::Completed { expires_at, .. } = record.state {
            let use_until = self.max_age_ms.map_or(expires_at, |age| expires_at.min(now.plus(age)));
            self.records.insert(id, Hot { record, use_until });
        }
    }

    pub(super) fn remove(&self, id: RecordId) {
        self.records.invalidate(&id);
    }

    pub(super) fn entries(&self) -> u64 {
        self.records.entry_count()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.records.weighted_size()
    }

    /// Housekeeping that moka otherwise does only when the cache is used.
    pub(super) fn tend(&self) {
        self.records.run_pending_tasks();
    }
}

fn weigh(record: &Record) -> u32 {
    let origin = &record.origin;
    let response = match &record.state {
        State::Completed { response: Recorded::Full(response), .. } => {
            let headers = response.headers.iter().map(|(name, value)| name.len() + value.len() + FIELD_OVERHEAD_BYTES);
            response.body.len() + headers.sum::<usize>()
        }
        _ => 0,
    };
    let bytes = OVERHEAD_BYTES + origin.key.len() + origin.key_header.len() + origin.path.len() + response;
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::idempotency::{ClaimToken, Fingerprint, Origin, Response, Why};
    use bytes::Bytes;

    fn record(state: State) -> Arc<Remembered> {
        let origin = Origin {
            key: Bytes::from_static(b"k"),
            key_header: Bytes::from_static(b"k"),
            path: Bytes::from_static(b"/posts"),
            route: Bytes::from_static(b"/posts"),
            claimed_at: Millis(0),
            attempts: 1,
        };
        let fingerprint = Fingerprint { settings: 0, digest: [0; 32] };
        Remembered::new(Record { origin, fingerprint, token: ClaimToken([0; 16]), state })
    }

    fn completed(body_len: usize, expires_at: u64) -> Arc<Remembered> {
        let response = Response { status: 201, headers: Vec::new(), body: Bytes::from(vec![b'x'; body_len]) };
        record(State::Completed {
            response: Recorded::Full(response),
            completed_at: Millis(0),
            expires_at: Millis(expires_at),
        })
    }

    const ID: RecordId = RecordId([1; 16]);

    #[test]
    fn an_entry_is_gone_at_its_expiry_by_the_given_clock() {
        let cache = HotCache::new(1 << 20, None);
        cache.put(ID, completed(1, 100), Millis(0));
        assert!(cache.get(ID, Millis(99)).is_some());
        assert!(cache.get(ID, Millis(100)).is_none());
    }

    #[test]
    fn max_age_ends_an_entry_before_its_record() {
        let cache = HotCache::new(1 << 20, Some(Duration::from_millis(10)));
        cache.put(ID, completed(1, 100), Millis(5));
        assert!(cache.get(ID, Millis(14)).is_some());
        assert!(cache.get(ID, Millis(15)).is_none());
    }

    #[test]
    fn only_completed_records_are_taken_in() {
        let cache = HotCache::new(1 << 20, None);
        cache.put(ID, record(State::Claimed { lease_until: None }), Millis(0));
        assert!(cache.get(ID, Millis(0)).is_none());
        let unknown = State::Unknown { why: Why::Crash, since: Millis(0), expires_at: Millis(9) };
        cache.put(ID, record(unknown), Millis(0));
        assert!(cache.get(ID, Millis(0)).is_none());
    }

    #[test]
    fn the_cache_is_bounded_in_bytes() {
        let cache = HotCache::new(100_000, None);
        for n in 0..100_u8 {
            cache.put(RecordId([n; 16]), completed(10_000, 100), Millis(0));
        }
        cache.tend();
        assert!(cache.bytes() <= 100_000, "{} bytes", cache.bytes());
        assert!(cache.entries() > 0);
    }
}
