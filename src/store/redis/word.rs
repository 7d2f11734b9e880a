//! Word of entries that have changed: a connection that is subscribed to the channels of those that are waited for.

use super::dial::{Common, Connection, DialError, Place};
use super::link::jittered;
use super::resp::{Output, Reply};
use crate::store::shared::{Interest, Watches};
use bytes::Buf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, MissedTickBehavior, interval};

const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A connection from which nothing comes for longer than this is dead.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Interests that go out in one write.
const BATCH: usize = 256;

/// Until the task is aborted. Connects when somebody waits for the first time.
pub(super) async fn listen(common: Arc<Common>, watches: Arc<Watches>, mut interests: UnboundedReceiver<Interest>) {
    let mut backoff = BACKOFF_MIN;
    // Word of interests does not matter while there is no connection, but that somebody waits.
    while interests.recv().await.is_some() {
        while !watches.wanted().is_empty() {
            match converse(&common, &watches, &mut interests).await {
                // It was of use: what ended it may be over.
                Ok(()) => backoff = BACKOFF_MIN,
                Err(DialError::Unreachable(_) | DialError::Barred(_)) => {}
                Err(error) => {
                    let (place, reason) = (&common.dialer.place, error.reason());
                    tracing::warn!(
                        place,
                        reason,
                        "the store tells no word of changes: waiting requests look by themselves"
                    );
                    while interests.recv().await.is_some() {}
                    return;
                }
            }
            tokio::time::sleep(jittered(backoff)).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }
}

/// One connection's life.
async fn converse(
    common: &Common,
    watches: &Watches,
    interests: &mut UnboundedReceiver<Interest>,
) -> Result<(), DialError> {
    // What was told before now is in `wanted`. Before each attempt, so that it does not pile up while there is nobody to
    // connect to.
    while interests.try_recv().is_ok() {}
    let mut connection = common.dialer.connect(&Place::Master).await?.connection;
    let mut out = Output::default();
    for id in watches.wanted() {
        subscribe(&mut out, common, Interest { id, wanted: true });
    }
    let mut batch = Vec::with_capacity(BATCH);
    let mut heartbeat = interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut heard, mut asked) = (Instant::now(), Instant::now());
    // What has changed before the subscription was not told.
    watches.wake_all();
    loop {
        if write(&mut connection, &mut out).await.is_err() {
            return Ok(());
        }
        tokio::select! {
            read = connection.stream.read_buf(&mut connection.input.bytes) => {
                if !read.is_ok_and(|n| n > 0) {
                    return Ok(());
                }
                heard = Instant::now();
                while let Some(reply) = connection.input.next().unwrap_or(Some(Reply::Nil)) {
                    match reply {
                        Reply::Array(parts) => told(common, watches, parts),
                        Reply::Error(error) => return Err(DialError::Refused(error)),
                        // No protocol any more.
                        _ => return Ok(()),
                    }
                }
            }
            count = interests.recv_many(&mut batch, BATCH) => {
                if count == 0 {
                    return Ok(());
                }
                batch.drain(..).for_each(|interest| subscribe(&mut out, common, interest));
            }
            _ = heartbeat.tick() => {
                if heard + HEARTBEAT < asked {
                    return Ok(());
                }
                asked = Instant::now();
                out.command(1);
                out.argument(b"PING");
            }
        }
    }
}

fn subscribe(out: &mut Output, common: &Common, interest: Interest) {
    out.command(2);
    out.argument(if interest.wanted { b"SUBSCRIBE" } else { b"UNSUBSCRIBE" });
    out.argument(&common.layout.key(interest.id));
}

fn told(common: &Common, watches: &Watches, parts: Vec<Reply>) {
    let mut parts = parts.into_iter().map(Reply::bulk);
    let (Some(Some(kind)), Some(Some(channel))) = (parts.next(), parts.next()) else { return };
    if kind == b"message".as_slice()
        && let Some(id) = common.layout.id(&channel)
    {
        watches.wake(id);
    }
}

async fn write(connection: &mut Connection, out: &mut Output) -> std::io::Result<()> {
    while out.has_remaining() {
        connection.stream.write_buf(out).await?;
    }
    connection.stream.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::RecordId;
    use crate::store::redis::dial::Dialer;
    use crate::store::redis::layout::Layout;
    use crate::store::shared::{Options, TlsFiles};

    #[tokio::test]
    async fn interests_do_not_pile_up_while_nobody_is_there() {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let options = Options {
            url: format!("redis://{nobody}"),
            password: None,
            prefix: "og".to_owned(),
            timeout: Duration::from_secs(2),
            start_timeout: Duration::ZERO,
            strict: false,
            wait_replicas: 0,
            create: true,
            migrate: true,
            tls: TlsFiles::default(),
        };
        let layout = Layout::new("og", true);
        let dialer = Dialer::new(&options, layout.birthmark()).unwrap();
        let common = Common { dialer, layout, timeout: options.timeout };
        let (watches, mut interests) = Watches::new();
        let waiting: Vec<_> = (0..100).map(|n| watches.watch(RecordId([n; 16]))).collect();
        assert_eq!(interests.len(), 100);
        let attempt = converse(&common, &watches, &mut interests).await;
        assert!(matches!(attempt, Err(DialError::Unreachable(_))));
        assert_eq!((interests.len(), watches.wanted().len()), (0, waiting.len()));
    }
}
