//! Listing: with `SCAN`, whose cursor outlives both ends, or by the index of claimed and unknown entries.

use super::layout::{Layout, Listed, Request, bucket_of, read_member};
use super::resp::Reply;
use super::upkeep::scored;
use super::{Core, reply_of};
use crate::store::{Entry, Page, RecordId, StoreError, Tag};
use bytes::Bytes;

/// Keys that one `SCAN` looks at, at most.
const SCAN_MAX: usize = 512;
/// A page is at its end when it has so many bytes.
const BYTES_MAX: usize = 1 << 20;
/// What one step may read at once, if it is more than one entry.
const STEP_MAX: usize = 2 << 20;
/// Buckets that are asked about at a time.
const BUCKETS: u8 = 64;
/// Entries that one call of `list` looks at, at most.
const VISIT_MAX: usize = 4096;
/// A cursor of the index: the bucket in the highest byte, the time of the last one seen below.
const TIME_BITS: u32 = 56;
/// A cursor of `SCAN`: the first bucket of the node in the highest byte (a single server: 0), its own cursor below, of which
/// it uses as many bits as its table has, and fourteen more in a cluster.
const NODE_BITS: u32 = 56;
const CURSOR: u64 = (1 << NODE_BITS) - 1;

impl Core {
    pub(super) async fn list(&self, tag: Option<Tag>, after: u64, visit: usize) -> Result<Page, StoreError> {
        let visit = visit.clamp(1, VISIT_MAX);
        match tag.and_then(Listed::of) {
            Some(listed) => self.list_by_index(listed, after, visit).await,
            None => self.scan(tag, after, visit).await,
        }
    }

    async fn scan(&self, tag: Option<Tag>, after: u64, visit: usize) -> Result<Page, StoreError> {
        let pattern = self.common.layout.pattern();
        let (mut node, mut cursor) = ((after >> NODE_BITS) as u8, after & CURSOR);
        let (mut entries, mut seen, mut bytes) = (Vec::new(), 0, 0);
        let mut count = SCAN_MAX;
        loop {
            count = count.min(visit - seen);
            let (at, n) = (cursor.to_string(), count.to_string());
            let command: [&[u8]; 6] = [b"SCAN", at.as_bytes(), b"MATCH", &pattern, b"COUNT", n.as_bytes()];
            let mut reply = self.ask(Self::plain(node, &command)).await?.array().unwrap_or_default();
            let keys = reply.pop().and_then(Reply::array).unwrap_or_default();
            let next = reply.pop().and_then(|next| std::str::from_utf8(&next.bulk()?).ok()?.parse().ok()).unwrap_or(0);
            let ids = keys.into_iter().filter_map(|key| self.common.layout.id(&key.bulk()?)).collect::<Vec<_>>();
            let looked_at = ids.len().max(count);
            let (wanted, len) = self.choose(ids, tag).await;
            // How long the entries are shows when they are found.
            if len > STEP_MAX && count > 1 {
                if !entries.is_empty() {
                    return Ok(Page { entries, next: Some((u64::from(node) << NODE_BITS) | cursor) });
                }
                count = count.div_ceil(8);
                continue;
            }
            self.fetch(wanted, tag, &mut entries).await?;
            (cursor, seen, bytes) = (next & CURSOR, seen + looked_at, bytes + len);
            if cursor == 0 {
                match self.way.next_node(node) {
                    Some(next) => node = next,
                    None => return Ok(Page { entries, next: None }),
                }
            }
            if seen >= visit || bytes >= BYTES_MAX {
                return Ok(Page { entries, next: Some((u64::from(node) << NODE_BITS) | cursor) });
            }
            count = (count * 8).min(SCAN_MAX);
        }
    }

    /// Those that bear the tag, and how long they are together.
    async fn choose(&self, ids: Vec<RecordId>, tag: Option<Tag>) -> (Vec<RecordId>, usize) {
        let asked = ids.into_iter().map(|id| {
            let (bucket, key) = (bucket_of(id), self.common.layout.key(id));
            let tag = self.submit(Self::plain(bucket, &[b"GETRANGE", &key, b"8", b"8"]));
            (id, tag, self.submit(Self::plain(bucket, &[b"STRLEN", &key])))
        });
        let (mut wanted, mut bytes) = (Vec::new(), 0);
        for (id, found, len) in asked.collect::<Vec<_>>() {
            let found = reply_of(found).await.ok().and_then(Reply::bulk);
            let len = reply_of(len).await.ok().and_then(|len| usize::try_from(len.int()?).ok());
            if tag.is_none_or(|tag| found.is_some_and(|found| found.first() == Some(&tag.0))) {
                bytes += len.unwrap_or(0);
                wanted.push(id);
            }
        }
        (wanted, bytes)
    }

    async fn fetch(
        &self,
        ids: Vec<RecordId>,
        tag: Option<Tag>,
        entries: &mut Vec<(RecordId, Entry)>,
    ) -> Result<(), StoreError> {
        let asked: Vec<_> = ids.into_iter().map(|id| (id, self.submit(Request::Get(id)))).collect();
        for (id, reply) in asked {
            let reply = match Self::wait(reply, None).await?.reply {
                Reply::Bulk(bytes) => Layout::entry(id, bytes).map_err(|error| error.to_string()),
                // Gone meanwhile.
                Reply::Nil => continue,
                Reply::Error(error) => Err(error),
                _ => Err("it answered something unheard of".to_owned()),
            };
            match reply {
                // It may have been changed meanwhile.
                Ok(found) if tag.is_some_and(|tag| found.value.tag != tag) => {}
                Ok(found) => entries.push((id, found)),
                Err(error) => tracing::warn!(%id, error, "a record was passed over in a listing"),
            }
        }
        Ok(())
    }

    async fn list_by_index(&self, listed: Listed, after: u64, visit: usize) -> Result<Page, StoreError> {
        let (mut bucket, mut time) = ((after >> TIME_BITS) as u8, after & ((1 << TIME_BITS) - 1));
        let mut found: Vec<(u8, u64, RecordId)> = Vec::new();
        let (mut ended, mut more) = (false, false);
        while found.len() < visit && !ended {
            let last = bucket.saturating_add(BUCKETS - 1);
            for (bucket, members) in self.members(listed, bucket..=last, time, visit).await? {
                more |= members.len() >= visit;
                found.extend(members.into_iter().map(|(time, id)| (bucket, time, id)));
            }
            ended = last == u8::MAX;
            (bucket, time) = (last.wrapping_add(1), 0);
        }
        let next = Some(u64::from(bucket) << TIME_BITS).filter(|_| !ended);
        // Those of the same time in the same bucket stay together, for the cursor cannot tell them apart.
        let same = |one: &(u8, u64, RecordId), other: &(u8, u64, RecordId)| (one.0, one.1) == (other.0, other.1);
        let mut page = Page { entries: Vec::new(), next };
        let (mut used, mut bytes) = (0, 0);
        let lens = self.lens(found.iter().take(2 * visit).map(|(.., id)| *id)).await;
        let mut lens = lens.into_iter();
        let mut wanted = Vec::new();
        for group in found.chunk_by(same) {
            if used > 0 && (used + group.len() > visit || bytes >= BYTES_MAX) {
                break;
            }
            used += group.len();
            bytes += lens.by_ref().take(group.len()).sum::<usize>();
            wanted.extend(group.iter().map(|(.., id)| *id));
            page.next = group.first().map(|(bucket, time, _)| (u64::from(*bucket) << TIME_BITS) | time);
        }
        self.fetch(wanted, Some(listed.tag()), &mut page.entries).await?;
        if used == found.len() && !more {
            page.next = next;
        }
        Ok(page)
    }

    async fn lens(&self, ids: impl Iterator<Item = RecordId>) -> Vec<usize> {
        let ask = |id| self.submit(Self::plain(bucket_of(id), &[b"STRLEN", &self.common.layout.key(id)]));
        let asked: Vec<_> = ids.map(ask).collect();
        let mut lens = Vec::with_capacity(asked.len());
        for len in asked {
            lens.push(reply_of(len).await.ok().and_then(|len| usize::try_from(len.int()?).ok()).unwrap_or(0));
        }
        lens
    }

    /// The members of buckets that are later than `time` (of the first bucket; of the others all), at most `max` of each
    /// and those of the same time as the last.
    async fn members(
        &self,
        listed: Listed,
        buckets: std::ops::RangeInclusive<u8>,
        time: u64,
        max: usize,
    ) -> Result<Vec<(u8, Vec<(u64, RecordId)>)>, StoreError> {
        let (first, limit) = (*buckets.start(), max.to_string());
        let after = format!("({time}");
        let ask = |bucket: u8, from: &str, to: &str, limit: Option<&str>| {
            let set = self.common.layout.set(listed, bucket);
            let mut command: Vec<&[u8]> = vec![b"ZRANGE", &set, from.as_bytes(), to.as_bytes(), b"BYSCORE"];
            if let Some(limit) = limit {
                command.extend([&b"LIMIT"[..], b"0", limit.as_bytes()]);
            }
            command.push(b"WITHSCORES");
            self.submit(Self::plain(bucket, &command))
        };
        let asked: Vec<_> = buckets
            .map(|bucket| (bucket, ask(bucket, if bucket == first { &after } else { "-inf" }, "+inf", Some(&limit))))
            .collect();
        let parse = |(member, time): (Bytes, u64)| Some((time, read_member(&member)?.1));
        let mut found = Vec::new();
        for (bucket, reply) in asked {
            let mut members: Vec<_> = scored(reply_of(reply).await?).into_iter().filter_map(parse).collect();
            if members.len() >= max
                && let Some((last, _)) = members.last().copied()
            {
                members.retain(|(time, _)| *time != last);
                let score = last.to_string();
                let same = reply_of(ask(bucket, &score, &score, None)).await?;
                members.extend(scored(same).into_iter().filter_map(parse));
            }
            found.push((bucket, members));
        }
        Ok(found)
    }
}
