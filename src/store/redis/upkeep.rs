//! What is done beside requests: counting claimed and unknown entries, and clearing their index of what has expired.

use super::layout::{Listed, MEMBER, Request, read_member};
use super::resp::Reply;
use super::{Core, reply_of};
use crate::store::StoreError;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// So often entries are counted.
const SURVEY: Duration = Duration::from_secs(10);
/// Buckets that are asked about at a time.
const BUCKETS: usize = 64;
/// Buckets that one call of `sweep` looks at, and members in each.
const SWEEP_BUCKETS: u8 = 16;
const SWEEP_MAX: usize = 512;

/// What was counted last.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Survey {
    /// In the order of [`Listed::ALL`].
    pub(super) counts: [u64; Listed::ALL.len()],
    /// Of the unknown ones.
    pub(super) oldest_ms: Option<u64>,
    /// Where the sweep goes on.
    next_bucket: u8,
}

pub(super) async fn run(core: Arc<Core>) {
    loop {
        tokio::time::sleep(super::link::jittered(SURVEY)).await;
        // The link logs what is wrong with the store.
        let _ = core.survey().await;
    }
}

impl Core {
    /// Counts the claimed and the unknown entries.
    pub(super) async fn survey(&self) -> Result<(), StoreError> {
        let mut counts = [0; Listed::ALL.len()];
        let mut oldest_ms = None;
        for (listed, count) in Listed::ALL.into_iter().zip(&mut counts) {
            let (counted, oldest) = self.count(listed).await?;
            *count = counted;
            oldest_ms = if listed == Listed::Unknown { oldest } else { oldest_ms };
        }
        let mut survey = self.survey.lock().unwrap_or_else(PoisonError::into_inner);
        (survey.counts, survey.oldest_ms) = (counts, oldest_ms);
        Ok(())
    }

    /// How many there are, and since when the oldest.
    async fn count(&self, listed: Listed) -> Result<(u64, Option<u64>), StoreError> {
        let (mut all, mut oldest_ms) = (0_u64, None);
        let buckets: Vec<u8> = (0..=u8::MAX).collect();
        for buckets in buckets.chunks(BUCKETS) {
            let ask = |bucket: &u8| {
                let set = self.common.layout.set(listed, *bucket);
                (*bucket, self.submit(Self::plain(*bucket, &[b"ZCARD", &set])))
            };
            let mut oldest = Vec::new();
            for (bucket, count) in buckets.iter().map(ask).collect::<Vec<_>>() {
                let count = reply_of(count).await?.int().and_then(|count| u64::try_from(count).ok()).unwrap_or(0);
                all += count;
                if count > 0 && listed == Listed::Unknown {
                    let set = self.common.layout.set(listed, bucket);
                    oldest.push(self.submit(Self::plain(bucket, &[b"ZRANGE", &set, b"0", b"0", b"WITHSCORES"])));
                }
            }
            for oldest in oldest {
                let score = scored(reply_of(oldest).await?).into_iter().next().map(|(_, score)| score);
                oldest_ms = [oldest_ms, score].into_iter().flatten().min();
            }
        }
        Ok((all, oldest_ms))
    }

    pub(super) async fn sweep(&self, now_ms: u64) -> Result<Duration, StoreError> {
        let first = {
            let mut survey = self.survey.lock().unwrap_or_else(PoisonError::into_inner);
            let first = survey.next_bucket;
            survey.next_bucket = first.wrapping_add(SWEEP_BUCKETS);
            first
        };
        let last = (SWEEP_MAX - 1).to_string();
        let buckets = first..=first.saturating_add(SWEEP_BUCKETS - 1);
        let asked: Vec<_> = buckets
            .flat_map(|bucket| Listed::ALL.map(|listed| (listed, bucket)))
            .map(|(listed, bucket)| {
                let set = self.common.layout.set(listed, bucket);
                let command = Self::plain(bucket, &[b"ZRANGE", &set, b"0", last.as_bytes()]);
                (listed, bucket, self.submit(command))
            })
            .collect();
        let mut more = false;
        for (listed, bucket, reply) in asked {
            let found = reply_of(reply).await?.array().unwrap_or_default();
            let full = found.len() >= SWEEP_MAX;
            let members: Vec<_> = found.into_iter().filter_map(|member| expired(member, now_ms)).collect();
            if members.is_empty() {
                continue;
            }
            more |= full;
            let swept = self.ask(Request::Sweep { listed, bucket, members }).await?.int().unwrap_or(0);
            self.stats.swept.fetch_add(u64::try_from(swept).unwrap_or(0), Ordering::Relaxed);
        }
        Ok(if more { Duration::from_millis(10) } else { Duration::from_secs(1) })
    }
}

fn expired(member: Reply, now_ms: u64) -> Option<[u8; MEMBER]> {
    let member = member.bulk()?;
    let (expires_at_ms, _) = read_member(&member)?;
    if expires_at_ms? > now_ms { None } else { member.as_ref().try_into().ok() }
}

/// Members with their scores.
pub(super) fn scored(reply: Reply) -> Vec<(bytes::Bytes, u64)> {
    let flat = reply.array().unwrap_or_default();
    let pairs = flat.chunks_exact(2).filter_map(|pair| match pair {
        [member, score] => {
            let score = score.clone().bulk()?;
            // Below 2^53, so that it is written in full.
            Some((member.clone().bulk()?, std::str::from_utf8(&score).ok()?.parse().ok()?))
        }
        _ => None,
    });
    pairs.collect()
}
