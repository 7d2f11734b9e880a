//! A store in PostgreSQL, shared by several gateways.
//!
//! One table holds all records. Operations of all workers gather in a queue; a few connections take what is there and send it as
//! one statement, a call of a function that does a compare-and-swap for each: one transaction, one flush of the server's log.
//!
//! Versions are made by the server, of its clock and a sequence: a server that has lost the newest part of its sequence (a
//! failover) gives none out twice, as long as its clock has gone on by a millisecond.

mod connect;
mod driver;
mod exchange;
mod listen;
mod queue;
mod schema;
mod sql;
mod tls;

use self::connect::{Connector, millis};
use self::driver::Driver;
use self::queue::{Answer, Param, Work};
use self::sql::COUNT_MAX;
use super::shared::{OpenError, Options, Watches};
use super::{
    Entry, Health, OLDEST_TRACKED, Page, RecordId, Status, Store, StoreError, StoreTime, Swap, Swapped, Tag, Urgency,
    Value, Version, Watch,
};
use bytes::Bytes;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_postgres::Row;

/// What making the tables may take at a start.
const MIGRATION_MAX: Duration = Duration::from_secs(60);
/// Entries that one sweep drops at most.
const SWEEP_MAX: i64 = 500;
/// Entries and bytes of a page.
const LIST_MAX: usize = 2048;
const LIST_BYTES_MAX: i64 = 4 << 20;
/// How old counts may grow, and how often they are taken at most.
const COUNTED_EVERY: Duration = Duration::from_secs(10);
const COUNTED_AFTER: Duration = Duration::from_secs(1);

/// See the module. Dropping it closes it.
pub struct Postgres {
    driver: Arc<Driver>,
    watches: Arc<Watches>,
    gauges: Arc<Gauges>,
    created: bool,
}

/// What the server counts for us now and then.
#[derive(Default)]
struct Gauges {
    counts: Mutex<Counts>,
    /// Somebody has looked.
    wanted: Notify,
}

#[derive(Clone, Copy, Default)]
struct Counts {
    claimed: u64,
    unknown: u64,
    oldest_unknown_ms: Option<u64>,
    /// Of all entries, as the server estimates it.
    total: u64,
    bytes: u64,
}

/// Makes the tables, or brings them up to date; needs a role that may. Several at once do no harm.
///
/// # Errors
/// See [`OpenError`].
pub async fn migrate(options: &Options) -> Result<(), OpenError> {
    let connector = Connector::new(options)?;
    let mut connection = connector.reach(None).await?;
    schema::migrate(&mut connection, &connector).await.map(drop)
}

impl Postgres {
    /// Connects, makes the tables if that is allowed and needed, and checks what the server promises. Its tasks run on the
    /// runtime that calls this.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(options: &Options) -> Result<Self, OpenError> {
        let connector = Connector::new(options)?;
        let mut connection = connector.reach(None).await?;
        let late = || connector.unreachable("no answer in time");
        let checked = timeout(options.timeout, connector.check(&connection)).await;
        let time = StoreTime::new(checked.map_err(|_| late())??);
        if !options.create {
            let found = timeout(options.timeout, schema::find(&connection, &connector)).await.map_err(|_| late())??;
            if found == schema::Schema::Absent {
                options.may_create()?;
            }
        }
        // Tables may take longer than an operation: another gateway may be at it, and this one waits.
        let made = options.migrate
            && timeout(MIGRATION_MAX, schema::migrate(&mut connection, &connector)).await.map_err(|_| late())??;
        let survey = async {
            schema::check(&connection, &connector).await?;
            let empty = connection.client.query_typed_one(&connector.sql.empty, &[]).await;
            let counts = connection.client.query_typed_one(&connector.sql.counts, &[]).await;
            Ok::<_, OpenError>((
                empty.map_err(|error| connector.refusal(&error))?,
                counts.map_err(|error| connector.refusal(&error))?,
            ))
        };
        let (empty, counts) = timeout(options.timeout, survey).await.map_err(|_| late())??;
        let created = made || empty.try_get::<_, bool>(0).unwrap_or(false);
        if created {
            // Tables that nobody has used yet are no store either.
            options.may_create()?;
        }
        timeout(options.timeout, connector.learn_birthmark(&connection)).await.map_err(|_| late())??;
        let gauges = Arc::new(Gauges { counts: Mutex::new(Counts::read(&counts)), wanted: Notify::new() });
        let driver = Driver::start(connector, connection, time);
        let (watches, interests) = Watches::new();
        tokio::spawn(listen::listen(Arc::clone(&driver), Arc::clone(&watches), interests));
        tokio::spawn(count(Arc::clone(&driver), Arc::clone(&gauges)));
        Ok(Self { driver, watches, gauges, created })
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.driver.close();
    }
}

impl Counts {
    fn read(row: &Row) -> Self {
        let number = |column: usize| millis(row, column).unwrap_or(0);
        Self {
            claimed: number(0),
            unknown: number(1),
            oldest_unknown_ms: millis(row, 2),
            total: number(3),
            bytes: number(4),
        }
    }
}

/// Counts every now and then, and soon after somebody has looked.
async fn count(driver: Arc<Driver>, gauges: Arc<Gauges>) {
    let counting = async {
        loop {
            let _ = timeout(COUNTED_EVERY, gauges.wanted.notified()).await;
            if let Ok(rows) = driver.query(&driver.connector.sql.counts, Vec::new()).await
                && let Some(row) = rows.first()
            {
                *gauges.counts.lock().unwrap_or_else(PoisonError::into_inner) = Counts::read(row);
            }
            sleep(COUNTED_AFTER).await;
        }
    };
    tokio::select! {
        () = counting => {}
        () = driver.is_closed() => {}
    }
}

fn id_of(row: &Row) -> Option<RecordId> {
    row.try_get::<_, &[u8]>(0).ok().and_then(|id| id.try_into().ok()).map(RecordId)
}

impl Store for Postgres {
    async fn get(&self, id: RecordId) -> Result<Option<Entry>, StoreError> {
        match self.driver.perform(Work::Get(id)).await? {
            Answer::Entry(entry) => Ok(entry),
            Answer::Swap(_) | Answer::Rows(_) => Ok(None),
        }
    }

    async fn compare_and_swap(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        now_ms: u64,
        urgency: Urgency,
    ) -> Result<Swap, StoreError> {
        Ok(self.swap_minding_copies(id, expected, new, now_ms, urgency).await?.swap)
    }

    /// The time of the write is the server's own, whatever `now_ms` says.
    async fn swap_minding_copies(
        &self,
        id: RecordId,
        expected: Option<Version>,
        new: Option<Value>,
        _now_ms: u64,
        _urgency: Urgency,
    ) -> Result<Swapped, StoreError> {
        if new.as_ref().is_some_and(|new| usize::from(new.tag.0) >= Tag::COUNT) {
            return Err(StoreError::Failed { reason: "a bad tag".to_owned() });
        }
        match self.driver.perform(Work::Swap { id, expected, new }).await? {
            Answer::Swap(swapped) => Ok(swapped),
            Answer::Entry(_) | Answer::Rows(_) => Ok(Swapped { swap: Swap::Conflict(None), may_land_until_ms: None }),
        }
    }

    async fn sweep(&self, now_ms: u64) -> Result<Duration, StoreError> {
        let now = i64::try_from(now_ms).unwrap_or(i64::MAX);
        let params = vec![Param::Int(now), Param::Int(SWEEP_MAX)];
        let rows = self.driver.query(&self.driver.connector.sql.sweep, params).await?;
        let swept = rows.first().and_then(|row| millis(row, 0)).unwrap_or(0);
        self.driver.counters.swept.fetch_add(swept, Ordering::Relaxed);
        let more = swept >= SWEEP_MAX.unsigned_abs();
        Ok(if more { Duration::from_millis(1) } else { Duration::from_secs(1) })
    }

    fn unexpiring(&self) -> Result<Vec<(RecordId, Entry)>, StoreError> {
        Ok(Vec::new())
    }

    /// By version.
    async fn list(&self, tag: Option<Tag>, after: u64, visit: usize) -> Result<Page, StoreError> {
        let visit = i64::try_from(visit.clamp(1, LIST_MAX)).unwrap_or(1);
        let Ok(after) = i64::try_from(after) else { return Ok(Page { entries: Vec::new(), next: None }) };
        let mut params = vec![Param::Int(after), Param::Int(visit), Param::Int(LIST_BYTES_MAX)];
        let sql = &self.driver.connector.sql;
        let rows = match tag {
            None => self.driver.query(&sql.list_all, params).await?,
            Some(tag) => {
                params.push(Param::Small(i16::from(tag.0)));
                self.driver.query(&sql.list_tag, params).await?
            }
        };
        let looked_at = rows.first().and_then(|row| millis(row, 5)).unwrap_or(0);
        // More are there, or there may be.
        let goes_on = looked_at >= visit.unsigned_abs() || looked_at > rows.len() as u64;
        let next = rows.last().and_then(|row| millis(row, 1)).filter(|_| goes_on);
        let mut entries = Vec::with_capacity(rows.len());
        for row in &rows {
            let Some(id) = id_of(row) else {
                tracing::warn!("an entry of the store has an id of another length; it is passed over");
                continue;
            };
            match exchange::entry(id, row, 1) {
                Ok(entry) => entries.extend(entry.map(|entry| (id, entry))),
                Err(error) => tracing::warn!("{error}; it is passed over"),
            }
        }
        Ok(Page { entries, next })
    }

    fn newest_ms(&self) -> u64 {
        0
    }

    async fn setting(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        let params = vec![Param::Text(name.to_owned())];
        let rows = self.driver.query(&self.driver.connector.sql.setting, params).await?;
        Ok(rows.first().and_then(|row| row.try_get::<_, &[u8]>(0).ok()).map(Bytes::copy_from_slice))
    }

    async fn swap_setting(&self, name: &str, expected: Option<&[u8]>, new: &[u8]) -> Result<bool, StoreError> {
        let sql = &self.driver.connector.sql;
        let mut params = vec![Param::Text(name.to_owned()), Param::Bytes(new.to_vec())];
        let rows = match expected {
            None => self.driver.query(&sql.insert_setting, params).await?,
            Some(expected) => {
                params.push(Param::Bytes(expected.to_vec()));
                self.driver.query(&sql.update_setting, params).await?
            }
        };
        // Not set, but as it should be: it was, and the answer was lost.
        Ok(!rows.is_empty() || self.setting(name).await?.as_deref() == Some(new))
    }

    fn time(&self) -> Option<StoreTime> {
        Some(self.driver.time.clone())
    }

    fn watch(&self, id: RecordId) -> Watch {
        self.watches.watch(id)
    }

    /// Entries and sizes are as they were some seconds ago, asked anew after each look. Claimed and unknown ones are counted, up to
    /// a hundred thousand; completed ones are what the server's own estimate leaves.
    fn status(&self) -> Status {
        self.gauges.wanted.notify_one();
        let counts = *self.gauges.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let (health, queue_len) = {
            let state = self.driver.state();
            let health = match (state.closed, state.out_of_reach.is_some()) {
                (true, _) => Health::Failed,
                (false, true) => Health::Unreachable,
                (false, false) => Health::Ok,
            };
            (health, state.len() as u64)
        };
        let counters = &self.driver.counters;
        let completed = counts.total.saturating_sub(counts.claimed).saturating_sub(counts.unknown);
        let mut oldest_ms = [None; Tag::COUNT];
        if let Some(oldest) = oldest_ms.get_mut(usize::from(OLDEST_TRACKED.0)) {
            *oldest = counts.oldest_unknown_ms;
        }
        Status {
            health,
            created: self.created,
            entries: [counts.claimed.min(COUNT_MAX), completed, counts.unknown.min(COUNT_MAX), 0],
            oldest_ms,
            queue_len,
            batches: counters.batches.load(Ordering::Relaxed),
            batched_writes: counters.batched_writes.load(Ordering::Relaxed),
            bytes_written: counters.bytes_written.load(Ordering::Relaxed),
            swept: counters.swept.load(Ordering::Relaxed),
            disk_bytes: counts.bytes,
        }
    }

    /// Takes no more. What was taken is still written by the store's tasks, which end then.
    fn close(&self) {
        self.driver.close();
    }
}
