//! One batch and its answers.

use super::connect::describe;
use super::driver::Driver;
use super::queue::{Answer, Batch, Op, Work};
use crate::store::{Entry, RecordId, StoreError, Swap, Swapped, Tag, Value, Version};
use bytes::Bytes;
use std::sync::atomic::Ordering;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error, Row};

/// Why operations of a batch have no answer.
pub(super) enum Failure {
    /// The connection, or all trust in it; they may have been done.
    Lost(String),
    /// They were not done, and may be the next time.
    Again,
    /// They were not done, and will not be on this connection.
    Elsewhere(String),
    /// They were not done, for a reason of one of them; or of the server's, which may pass.
    Refused { reason: String, may_pass: bool },
}

/// Sends all of it, looks before writes, and takes out what was answered.
pub(super) async fn run(driver: &Driver, client: &Client, batch: &mut Batch, deadline_ms: u64) -> Vec<Failure> {
    let looks = gets(driver, client, &mut batch.gets);
    let writes = swaps(driver, client, &mut batch.swaps, deadline_ms);
    let (looks, writes) = tokio::join!(looks, writes);
    let query = match &batch.query {
        None => Ok(()),
        Some(op) => query(client, op).await.map(|rows| {
            if let Some(op) = batch.query.take() {
                op.answer(Answer::Rows(rows));
            }
        }),
    };
    [looks, writes, query].into_iter().filter_map(Result::err).map(|error| judge(driver, &error)).collect()
}

fn judge(driver: &Driver, error: &Error) -> Failure {
    let Some(db) = error.as_db_error() else { return Failure::Lost(describe(error)) };
    let code = db.code().code();
    match (code, code.get(..2).unwrap_or_default()) {
        // Our own: too late, by the server's clock. It tells it.
        ("OG001", _) => {
            db.message().parse().into_iter().for_each(|ms| driver.time.told(ms));
            Failure::Again
        }
        // Deadlocks, conflicts of serializable transactions, locks, cancelled by hand.
        ("40001" | "40P01" | "55P03" | "57014", _) => Failure::Again,
        // A server that takes no writes any more; tables, functions or rights that are gone.
        ("25006", _) | (_, "42" | "3F") => Failure::Elsewhere(describe(error)),
        // The connection's end, as the server tells it.
        (_, "08" | "57" | "58") => Failure::Lost(describe(error)),
        // Disk or memory is short.
        (_, "53") => Failure::Refused { reason: describe(error), may_pass: true },
        _ => Failure::Refused { reason: describe(error), may_pass: false },
    }
}

async fn query(client: &Client, op: &Op) -> Result<Vec<Row>, Error> {
    let Work::Query { sql, params } = &op.work else { return Ok(Vec::new()) };
    let params: Vec<_> = params.iter().map(super::queue::Param::typed).collect();
    client.query_typed(sql, &params).await
}

async fn gets(driver: &Driver, client: &Client, ops: &mut Vec<Op>) -> Result<(), Error> {
    if ops.is_empty() {
        return Ok(());
    }
    let mut wanted: Vec<RecordId> = ops.iter().filter_map(Op::id).collect();
    wanted.dedup();
    let ids: Vec<&[u8]> = wanted.iter().map(|id| &id.0[..]).collect();
    let rows = client.query_typed(&driver.connector.sql.get, &[(&ids, Type::BYTEA_ARRAY)]).await?;
    tell_time(driver, &rows, 4);
    driver.counters.batches.fetch_add(1, Ordering::Relaxed);
    let mut answers = wanted.iter().zip(&rows).peekable();
    for op in std::mem::take(ops) {
        while answers.next_if(|(id, _)| Some(**id) != op.id()).is_some() {}
        match answers.peek() {
            Some((id, row)) => match entry(**id, row, 0) {
                Ok(entry) => op.answer(Answer::Entry(entry)),
                Err(error) => drop(op.reply.send(Err(error))),
            },
            // The function gives a row for each.
            None => op.refuse("an answer too few"),
        }
    }
    Ok(())
}

async fn swaps(driver: &Driver, client: &Client, ops: &mut Vec<Op>, deadline_ms: u64) -> Result<(), Error> {
    if ops.is_empty() {
        return Ok(());
    }
    let mut ids: Vec<&[u8]> = Vec::with_capacity(ops.len());
    let mut expected: Vec<Option<i64>> = Vec::with_capacity(ops.len());
    let mut tags: Vec<Option<i16>> = Vec::with_capacity(ops.len());
    let mut expiries: Vec<Option<i64>> = Vec::with_capacity(ops.len());
    let mut contents: Vec<Option<&[u8]>> = Vec::with_capacity(ops.len());
    for op in &*ops {
        let Work::Swap { id, expected: version, new } = &op.work else { continue };
        ids.push(&id.0);
        // None is negative: what cannot be a version matches none.
        expected.push(version.map(|version| i64::try_from(version.0).unwrap_or(-1)));
        tags.push(new.as_ref().map(|new| i16::from(new.tag.0)));
        expiries.push(new.as_ref().and_then(|new| new.expires_at_ms).map(signed));
        contents.push(new.as_ref().map(|new| &new.bytes[..]));
    }
    let (deadline, strict) = (signed(deadline_ms), driver.connector.strict);
    // In whose way another transaction stands tells so before he is given up: otherwise his backend would wait on, and each new
    // connection would add one.
    let lock_timeout = format!("{}ms", (driver.connector.timeout.as_millis() * 3 / 8).max(1));
    let params: [(&(dyn ToSql + Sync), Type); 8] = [
        (&ids, Type::BYTEA_ARRAY),
        (&expected, Type::INT8_ARRAY),
        (&tags, Type::INT2_ARRAY),
        (&expiries, Type::INT8_ARRAY),
        (&contents, Type::BYTEA_ARRAY),
        (&deadline, Type::INT8),
        (&strict, Type::BOOL),
        (&lock_timeout, Type::TEXT),
    ];
    let rows = client.query_typed(&driver.connector.sql.swap, &params).await?;
    tell_time(driver, &rows, 5);
    let counters = &driver.counters;
    counters.batches.fetch_add(1, Ordering::Relaxed);
    let mut rows = rows.iter();
    let mut again = Vec::new();
    for op in std::mem::take(ops) {
        let Some(row) = rows.next() else {
            op.refuse("an answer too few");
            continue;
        };
        match swapped(&op, row) {
            Ok(Some(swap)) => {
                if matches!(swap, Swap::Done(_)) {
                    counters.batched_writes.fetch_add(1, Ordering::Relaxed);
                    counters.bytes_written.fetch_add(op.bytes() as u64, Ordering::Relaxed);
                }
                let may_land_until_ms = op.earlier_copies_until();
                op.answer(Answer::Swap(Swapped { swap, may_land_until_ms }));
            }
            Ok(None) => again.push(op),
            Err(error) => drop(op.reply.send(Err(error))),
        }
    }
    again.iter_mut().for_each(Op::take_back);
    *ops = again;
    Ok(())
}

/// What has become of a write; `None`: what was in its way is gone again.
fn swapped(op: &Op, row: &Row) -> Result<Option<Swap>, StoreError> {
    let Work::Swap { id, expected, new } = &op.work else { return Ok(None) };
    let done = column::<bool>(*id, row, 0)?.unwrap_or(false);
    if done {
        let version = column::<i64>(*id, row, 1)?.unwrap_or_default();
        return Ok(Some(Swap::Done(Version(version.unsigned_abs()))));
    }
    Ok(match (entry(*id, row, 1)?, expected, new) {
        // Ours: an answer was lost.
        (Some(held), _, Some(new)) if is_same(&held.value, new) => Some(Swap::Done(held.version)),
        (Some(held), ..) => Some(Swap::Conflict(Some(held))),
        (None, None, _) => None,
        // Gone, as it should be, and an answer was lost.
        (None, Some(_), None) if op.may_have_landed => {
            let clock = column::<i64>(*id, row, 5)?.unwrap_or_default();
            Some(Swap::Done(Version(clock.unsigned_abs() << 20)))
        }
        (None, Some(_), _) => Some(Swap::Conflict(None)),
    })
}

fn is_same(held: &Value, new: &Value) -> bool {
    held.tag == new.tag && held.bytes == new.bytes && held.expires_at_ms.map(signed) == new.expires_at_ms.map(signed)
}

/// Times beyond the year 292,000,000 are all the same.
fn signed(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

fn tell_time(driver: &Driver, rows: &[Row], at: usize) {
    let last = rows.last().and_then(|row| super::connect::millis(row, at));
    last.into_iter().for_each(|ms| driver.time.told(ms));
}

fn column<'a, T: tokio_postgres::types::FromSql<'a>>(
    id: RecordId,
    row: &'a Row,
    at: usize,
) -> Result<Option<T>, StoreError> {
    row.try_get(at).map_err(|error| StoreError::Damaged { id, detail: describe(&error) })
}

/// The entry whose version is in column `at`, followed by tag, expiry and value. NULL for a version: there is none.
///
/// # Errors
/// [`StoreError::Damaged`].
pub(super) fn entry(id: RecordId, row: &Row, at: usize) -> Result<Option<Entry>, StoreError> {
    let Some(version) = column::<i64>(id, row, at)? else { return Ok(None) };
    let damaged = |detail: &str| StoreError::Damaged { id, detail: detail.to_owned() };
    let version = u64::try_from(version).map_err(|_| damaged("a version below zero"))?;
    let tag = column::<i16>(id, row, at + 1)?.and_then(|tag| u8::try_from(tag).ok());
    let tag = tag.filter(|tag| usize::from(*tag) < Tag::COUNT).ok_or_else(|| damaged("no such tag"))?;
    let expires_at_ms = column::<i64>(id, row, at + 2)?.map(u64::try_from).transpose();
    let expires_at_ms = expires_at_ms.map_err(|_| damaged("an expiry below zero"))?;
    let bytes = column::<&[u8]>(id, row, at + 3)?.ok_or_else(|| damaged("no value"))?;
    let value = Value { tag: Tag(tag), expires_at_ms, bytes: Bytes::copy_from_slice(bytes) };
    Ok(Some(Entry { version: Version(version), value }))
}
