//! Word of claims that were settled by any gateway, for those who wait.
//!
//! A notification takes a lock that all commits with one share, so they are sent only where somebody waits: each claim that
//! is waited for bears a mark, and whoever settles it notifies.

use super::connect::{Connection, describe};
use super::driver::Driver;
use super::queue::Param;
use super::sql::NOTIFY;
use crate::store::RecordId;
use crate::store::shared::{Interest, Watches};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_postgres::Notification;

/// A session is tried after this time without a word.
const HEARTBEAT: Duration = Duration::from_secs(30);
/// Before a lost session is made anew.
const PAUSE: Duration = Duration::from_secs(1);
/// Where notifications do not come through, that may change some day.
const DEAF_PAUSE: Duration = Duration::from_secs(600);
/// How long a word may take to come back.
const ECHO: Duration = Duration::from_secs(3);
/// Claims that are marked at once.
const MARKED_MAX: usize = 256;

/// Why a session has ended.
enum End {
    /// The connection did.
    Lost(String),
    /// Connected, but what is sent to the channel does not arrive: a connection pool is in between.
    Deaf,
}

/// Runs until the store is closed. Its connection is made when somebody first waits.
pub(super) async fn listen(driver: Arc<Driver>, watches: Arc<Watches>, mut interests: UnboundedReceiver<Interest>) {
    let mut told = false;
    let sessions = async {
        loop {
            while watches.wanted().is_empty() {
                if interests.recv().await.is_none() {
                    return;
                }
            }
            let pause = match session(&driver, &watches, &mut interests).await {
                End::Lost(reason) => {
                    tracing::debug!(reason, "no word of changes in the store");
                    PAUSE
                }
                End::Deaf => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(
                            place = %driver.connector.place,
                            "notifications do not come through (a connection pool in transaction mode?): who waits for \
                             another gateway looks for himself, up to a second later"
                        );
                    }
                    DEAF_PAUSE
                }
            };
            // The interests must not pile up meanwhile.
            let until = Instant::now() + pause;
            while tokio::time::timeout_at(until, interests.recv()).await.is_ok_and(|interest| interest.is_some()) {}
        }
    };
    tokio::select! {
        () = sessions => {}
        () = driver.is_closed() => {}
    }
}

async fn session(driver: &Driver, watches: &Arc<Watches>, interests: &mut UnboundedReceiver<Interest>) -> End {
    let (connection, mut heard) = match driver.connector.listen().await {
        Ok(listening) => listening,
        Err(error) => return End::Lost(error.to_string()),
    };
    if let Some(end) = echo(driver, &mut heard).await {
        return end;
    }
    mark(driver, watches, watches.wanted()).await;
    // What has changed before was not heard.
    watches.wake_all();
    let mut heartbeat = Instant::now() + HEARTBEAT;
    loop {
        tokio::select! {
            notification = heard.recv() => match notification {
                Some(notification) => parse(notification.payload()).into_iter().for_each(|id| watches.wake(id)),
                None => return End::Lost("the server has closed it".to_owned()),
            },
            Some(interest) = interests.recv() => {
                let mut wanted = vec![interest];
                while wanted.len() < MARKED_MAX && let Ok(interest) = interests.try_recv() {
                    wanted.push(interest);
                }
                wanted.retain(|interest| interest.wanted);
                mark(driver, watches, wanted.into_iter().map(|interest| interest.id).collect()).await;
            }
            () = sleep_until(heartbeat) => {
                if let Err(reason) = alive(driver, &connection).await {
                    return End::Lost(reason);
                }
                heartbeat = Instant::now() + HEARTBEAT;
            }
        }
    }
}

/// Sends something by another connection, to see whether it arrives.
async fn echo(driver: &Driver, heard: &mut Receiver<Notification>) -> Option<End> {
    let word = format!("echo {:016x}", getrandom::u64().unwrap_or(0));
    let channel = driver.connector.sql.channel.clone();
    if let Err(error) = driver.query(NOTIFY, vec![Param::Text(channel), Param::Text(word.clone())]).await {
        return Some(End::Lost(error.to_string()));
    }
    let arrives = async {
        while let Some(notification) = heard.recv().await {
            if notification.payload() == word {
                return None;
            }
        }
        Some(End::Lost("the server has closed it".to_owned()))
    };
    timeout(ECHO, arrives).await.unwrap_or(Some(End::Deaf))
}

/// Marks claims, so that whoever settles them tells. One that is not there (any more) has changed already.
async fn mark(driver: &Driver, watches: &Arc<Watches>, mut ids: Vec<RecordId>) {
    ids.sort_unstable();
    ids.dedup();
    for ids in ids.chunks(MARKED_MAX) {
        let param = Param::ByteArrays(ids.iter().map(|id| id.0.to_vec()).collect());
        // Without it, who waits looks for himself.
        let Ok(rows) = driver.query(&driver.connector.sql.arm, vec![param]).await else { return };
        for (id, row) in ids.iter().zip(rows) {
            if !row.try_get::<_, bool>(0).unwrap_or(false) {
                watches.wake(*id);
            }
        }
    }
}

async fn alive(driver: &Driver, connection: &Connection) -> Result<(), String> {
    let check = timeout(driver.connector.timeout, connection.client.check_connection()).await;
    check.map_err(|_| "no heartbeat".to_owned())?.map_err(|error| describe(&error))
}

fn parse(payload: &str) -> Option<RecordId> {
    let mut id = [0; 16];
    if payload.len() != 32 || !payload.is_ascii() {
        return None;
    }
    for (at, byte) in id.iter_mut().enumerate() {
        *byte = u8::from_str_radix(payload.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(RecordId(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_ids_or_nothing() {
        let id = RecordId(*b"0123456789abcdef");
        assert_eq!(parse(&id.to_string()), Some(id));
        for other in ["", "echo 0123456789abcdef", "00", &"g".repeat(32), &"ü".repeat(16)] {
            assert_eq!(parse(other), None);
        }
    }
}
