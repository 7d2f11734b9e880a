//! Room for the log: the spare segment, created ahead in a thread of its own, and the look at the free space.

use crate::store::log::segment::{Segment, StoreId, is_full};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often the free space is asked for.
const CHECK_EVERY: Duration = Duration::from_millis(100);

/// A segment that is ready to be written to, and the size of its file.
pub(super) type Spare = (Segment, u64);

#[derive(Debug, Default)]
struct Inner {
    ready: Option<Spare>,
    /// Number and size of the segment that is being made, or could not be made.
    wanted: Option<(u32, u64)>,
    /// The last attempt found no space.
    no_room: bool,
    /// The last attempt failed otherwise.
    failed: Option<String>,
    stopping: bool,
    checked: Option<(Instant, bool)>,
}

#[derive(Debug)]
pub(super) struct Space {
    dir: PathBuf,
    store: StoreId,
    pub(super) min_free_bytes: u64,
    smallest: u64,
    inner: Mutex<Inner>,
    changed: Condvar,
    /// The index waits for space.
    index_waits: AtomicBool,
}

impl Space {
    pub(super) fn new(dir: &Path, store: StoreId, min_free_bytes: u64, smallest: u64, ready: Option<Spare>) -> Self {
        let inner = Mutex::new(Inner { ready, ..Inner::default() });
        Self {
            dir: dir.to_owned(),
            store,
            min_free_bytes,
            smallest,
            inner,
            changed: Condvar::new(),
            index_waits: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a spare segment, unless there is one.
    pub(super) fn request(&self, number: u32, capacity: u64) {
        let mut inner = self.lock();
        if inner.ready.is_none() {
            inner.wanted = Some((number, capacity));
            inner.no_room = false;
            self.changed.notify_all();
        }
    }

    /// Takes the spare segment, waiting for it while it is being made. `Ok(None)`: no space for it.
    pub(super) fn take(&self) -> Result<Option<Spare>, String> {
        let mut inner = self.lock();
        loop {
            if let Some(spare) = inner.ready.take() {
                return Ok(Some(spare));
            }
            if let Some(reason) = &inner.failed {
                return Err(reason.clone());
            }
            if inner.no_room || inner.wanted.is_none() || inner.stopping {
                return Ok(None);
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives a spare segment back that could not be used.
    pub(super) fn put_back(&self, spare: Spare) {
        self.lock().ready = Some(spare);
    }

    pub(super) fn spare_bytes(&self) -> u64 {
        self.lock().ready.as_ref().map_or(0, |(_, capacity)| *capacity)
    }

    /// Whether there is room for the index to grow.
    pub(super) fn index_may_grow(&self, needed: u64) -> bool {
        let enough = free_bytes(&self.dir).is_none_or(|free| free >= needed);
        self.index_waits.store(!enough, Ordering::Release);
        enough
    }

    pub(super) fn index_waits(&self) -> bool {
        self.index_waits.load(Ordering::Acquire)
    }

    /// Whether new claims are to be refused: the disk runs low, or there is no room for another segment or the index.
    /// Looks at the disk itself at most every 100 ms, and has a missing segment tried again when there is space.
    pub(super) fn is_low(&self) -> bool {
        if self.index_waits() {
            return true;
        }
        let mut inner = self.lock();
        #[allow(clippy::disallowed_methods, reason = "paces a system call; no record depends on it")]
        let now = Instant::now();
        if let Some((_, low)) = inner.checked.filter(|(at, _)| now.duration_since(*at) < CHECK_EVERY) {
            return low || inner.no_room;
        }
        // If the question itself fails, writing will tell.
        let low = free_bytes(&self.dir).is_some_and(|free| free < self.min_free_bytes);
        inner.checked = Some((now, low));
        if inner.no_room && !low {
            inner.no_room = false;
            self.changed.notify_all();
            // Until the attempt has come to something, claims are still refused.
            return true;
        }
        low || inner.no_room
    }

    pub(super) fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    /// Makes segments as they are asked for, until stopped.
    pub(super) fn run(&self) {
        let mut inner = self.lock();
        while !inner.stopping {
            let Some((number, capacity)) = inner.wanted.filter(|_| !inner.no_room && inner.failed.is_none()) else {
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(inner);
            let made = self.make(number, capacity);
            inner = self.lock();
            match made {
                Ok(spare) => (inner.ready, inner.wanted) = (Some(spare), None),
                Err(error) if is_full(&error) => inner.no_room = true,
                Err(error) => inner.failed = Some(format!("cannot create segment {number}: {error}")),
            }
            self.changed.notify_all();
        }
    }

    fn make(&self, number: u32, capacity: u64) -> std::io::Result<Spare> {
        let room = free_bytes(&self.dir).map_or(capacity, |free| free.saturating_sub(self.min_free_bytes) / 2);
        let capacity = capacity.min(room).max(self.smallest);
        Ok((Segment::create(&self.dir, number, self.store, capacity)?, capacity))
    }
}

/// Bytes that are free for us where `path` lies.
fn free_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}
