//! Who waits for an entry to change, and word of it.

use crate::store::RecordId;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// The first look, should no word come; each further pause is twice as long, up to [`POLL_MAX`].
const POLL_MIN: Duration = Duration::from_millis(100);
const POLL_MAX: Duration = Duration::from_secs(1);

/// Somebody begins to wait for an entry, or nobody does any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    pub id: RecordId,
    pub wanted: bool,
}

/// All that are waited for in one gateway: at most as many as requests are under way.
#[derive(Debug)]
pub struct Watches {
    by_id: Mutex<HashMap<RecordId, Watched>>,
    interests: mpsc::UnboundedSender<Interest>,
}

#[derive(Debug)]
struct Watched {
    word: watch::Sender<()>,
    watchers: usize,
}

impl Watches {
    /// The receiver is told of each entry that begins to be waited for, and of each that is so no more: one of each kind by
    /// turns. It may be dropped.
    #[must_use]
    pub fn new() -> (Arc<Self>, mpsc::UnboundedReceiver<Interest>) {
        let (interests, receiver) = mpsc::unbounded_channel();
        (Arc::new(Self { by_id: Mutex::default(), interests }), receiver)
    }

    #[must_use]
    pub fn watch(self: &Arc<Self>, id: RecordId) -> Watch {
        let mut by_id = self.lock();
        let watched = match by_id.entry(id) {
            Entry::Occupied(watched) => watched.into_mut(),
            Entry::Vacant(vacant) => {
                let _ = self.interests.send(Interest { id, wanted: true });
                vacant.insert(Watched { word: watch::Sender::new(()), watchers: 0 })
            }
        };
        watched.watchers += 1;
        let word = watched.word.subscribe();
        drop(by_id);
        Watch { source: Some((word, Arc::clone(self), id)), pause: POLL_MIN }
    }

    /// The entry has changed, or may have.
    pub fn wake(&self, id: RecordId) {
        if let Some(watched) = self.lock().get(&id) {
            watched.word.send_replace(());
        }
    }

    /// Word may have been missed.
    pub fn wake_all(&self) {
        self.lock().values().for_each(|watched| watched.word.send_replace(()));
    }

    /// What is waited for right now, for a connection that was made anew.
    #[must_use]
    pub fn wanted(&self) -> Vec<RecordId> {
        self.lock().keys().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RecordId, Watched>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for one entry. To miss nothing, it is made before the entry is read.
#[derive(Debug)]
pub struct Watch {
    source: Option<(watch::Receiver<()>, Arc<Watches>, RecordId)>,
    pause: Duration,
}

impl Watch {
    /// One that no word will ever reach.
    #[must_use]
    pub fn polling() -> Self {
        Self { source: None, pause: POLL_MIN }
    }

    /// Ready when the entry may have changed, and every now and then without: look.
    pub async fn changed(&mut self) {
        let pause = self.pause;
        self.pause = (pause * 2).min(POLL_MAX);
        match &mut self.source {
            Some((word, ..)) => drop(tokio::time::timeout(pause, word.changed()).await),
            None => tokio::time::sleep(pause).await,
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let Some((_, watches, id)) = self.source.take() else { return };
        let mut by_id = watches.lock();
        if let Entry::Occupied(mut watched) = by_id.entry(id) {
            watched.get_mut().watchers -= 1;
            if watched.get().watchers == 0 {
                watched.remove();
                let _ = watches.interests.send(Interest { id, wanted: false });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    const ID: RecordId = RecordId([7; 16]);

    #[tokio::test(start_paused = true)]
    async fn word_comes_at_once_and_the_poll_catches_what_was_missed() {
        let (watches, mut interests) = Watches::new();
        let (mut one, mut other) = (watches.watch(ID), watches.watch(ID));
        let began = Instant::now();
        watches.wake(RecordId([8; 16]));
        watches.wake(ID);
        one.changed().await;
        other.changed().await;
        assert_eq!(began.elapsed(), Duration::ZERO);
        let mut pauses = Vec::new();
        for _ in 0..5 {
            let before = Instant::now();
            tokio::time::timeout(Duration::from_secs(60), one.changed()).await.expect("it looks by itself");
            pauses.push(before.elapsed().as_millis());
        }
        assert_eq!(pauses, [200, 400, 800, 1000, 1000]);
        let before = Instant::now();
        watches.wake_all();
        one.changed().await;
        assert_eq!(before.elapsed(), Duration::ZERO, "word may have been missed");
        assert_eq!(watches.wanted(), [ID]);
        drop(one);
        assert_eq!(interests.recv().await, Some(Interest { id: ID, wanted: true }));
        assert!(interests.try_recv().is_err(), "one still waits");
        drop(other);
        assert_eq!(interests.recv().await, Some(Interest { id: ID, wanted: false }));
        assert!(watches.wanted().is_empty());
    }
}
