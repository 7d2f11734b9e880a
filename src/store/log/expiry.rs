//! How many entries and bytes of a segment expire when, roughly and in bounded memory.

use crate::store::files::Fields;
use std::collections::BTreeMap;
use std::ops::Bound;

const BUCKETS_MAX: usize = 256;

/// Counts entries by expiry time in buckets that grow wider when there are too many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExpiryHistogram {
    width_ms: u64,
    /// Bucket `n` holds what expires in `((n - 1) × width, n × width]`: entries, bytes. It has expired as a whole at
    /// `n × width`, so that what is said here may be late, never early.
    buckets: BTreeMap<u64, (u64, u64)>,
    entries: u64,
}

impl Default for ExpiryHistogram {
    fn default() -> Self {
        Self { width_ms: 1, buckets: BTreeMap::new(), entries: 0 }
    }
}

impl ExpiryHistogram {
    pub(crate) fn add(&mut self, expires_at_ms: u64, bytes: u64) {
        let bucket = self.buckets.entry(expires_at_ms.div_ceil(self.width_ms)).or_default();
        *bucket = (bucket.0 + 1, bucket.1 + bytes);
        self.entries += 1;
        while self.buckets.len() > BUCKETS_MAX {
            self.width_ms *= 2;
            let mut wider: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
            for (number, (entries, bytes)) in std::mem::take(&mut self.buckets) {
                let bucket = wider.entry(number.div_ceil(2)).or_default();
                *bucket = (bucket.0 + entries, bucket.1 + bytes);
            }
            self.buckets = wider;
        }
    }

    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// Appends it: width, number of buckets, and for each its number, entries and bytes.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let header = [self.width_ms, self.buckets.len() as u64];
        let buckets = self.buckets.iter().flat_map(|(&number, &(entries, bytes))| [number, entries, bytes]);
        for field in header.into_iter().chain(buckets) {
            out.extend_from_slice(&field.to_le_bytes());
        }
    }

    /// Reads what [`Self::encode`] has written; `None` if it is malformed, or tells of more bytes than there can be.
    pub(crate) fn decode(fields: &mut Fields<'_>, bytes_max: u64) -> Option<Self> {
        let (width_ms, len) = (fields.u64().filter(|&width| width > 0)?, fields.u64()?);
        let mut histogram = Self { width_ms, ..Self::default() };
        let mut sum = 0_u64;
        for _ in 0..len.min(BUCKETS_MAX as u64 + 1) {
            let (number, entries, bytes) = (fields.u64()?, fields.u64()?, fields.u64()?);
            histogram.buckets.insert(number, (entries, bytes));
            histogram.entries = histogram.entries.checked_add(entries)?;
            sum = sum.checked_add(bytes)?;
        }
        let whole = histogram.buckets.len() as u64 == len && histogram.buckets.len() <= BUCKETS_MAX;
        (whole && sum <= bytes_max && histogram.entries <= sum).then_some(histogram)
    }

    /// Bytes of entries that have not expired, or not long ago.
    pub(crate) fn live_bytes(&self, now_ms: u64) -> u64 {
        let alive = (Bound::Excluded(now_ms / self.width_ms), Bound::Unbounded);
        self.buckets.range(alive).map(|(_, &(_, bytes))| bytes).sum()
    }

    /// Whether every entry has certainly expired.
    pub(crate) fn all_expired(&self, now_ms: u64) -> bool {
        self.buckets.last_key_value().is_none_or(|(&last, _)| last <= now_ms / self.width_ms)
    }

    /// Entries that have certainly expired at `to_ms` and were not counted so at `from_ms`.
    pub(crate) fn expired_between(&self, from_ms: u64, to_ms: u64) -> u64 {
        let (from, to) = (from_ms / self.width_ms, to_ms / self.width_ms);
        if from >= to {
            return 0;
        }
        let range = (Bound::Excluded(from), Bound::Included(to));
        self.buckets.range(range).map(|(_, &(entries, _))| entries).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_bounded_and_late_rather_than_early() {
        let mut histogram = ExpiryHistogram::default();
        for i in 0..10_000_u64 {
            histogram.add(i * 777, 10);
        }
        assert!(histogram.buckets.len() <= BUCKETS_MAX);
        assert_eq!(histogram.entries(), 10_000);
        let mut counted = 0;
        let mut before = 0;
        for now in (0..9_000_000).step_by(10_007) {
            let live = (0..10_000).filter(|i| i * 777 > now).count() as u64;
            assert!(histogram.live_bytes(now) >= live * 10);
            assert!(!histogram.all_expired(now) || live == 0);
            counted += histogram.expired_between(before, now);
            assert!(counted <= 10_000 - live);
            before = now;
        }
        assert!(histogram.all_expired(before));
        assert_eq!(histogram.live_bytes(before), 0);
        let mut bytes = Vec::new();
        histogram.encode(&mut bytes);
        assert_eq!(ExpiryHistogram::decode(&mut Fields(&bytes), 100_000), Some(histogram));
        assert_eq!(ExpiryHistogram::decode(&mut Fields(&bytes), 99_999), None);
        assert_eq!(ExpiryHistogram::decode(&mut Fields(&bytes[..bytes.len() - 1]), 100_000), None);
        // All but those that expired at time 0, before the first look.
        assert_eq!(counted, 9_999);
    }

    #[test]
    fn few_times_are_told_exactly() {
        let mut histogram = ExpiryHistogram::default();
        histogram.add(1000, 1);
        assert!(!histogram.all_expired(999));
        assert!(histogram.all_expired(1000));
        assert_eq!(histogram.expired_between(0, 999), 0);
        assert_eq!(histogram.expired_between(999, 1000), 1);
    }
}
