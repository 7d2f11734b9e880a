//! Whether what answers is the store that was opened, and all of it may be trusted.
//!
//! A store bears a birthmark, made at random when it is. A server that is emptied, or another one in its place, bears none, or
//! another: to go on there would split the gateways that share the store into two that make different ids of one key.

use super::resp::Reply;
use crate::store::shared::ANOTHER;
use bytes::Bytes;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ground {
    /// The birthmark is not there, or another.
    Another,
    /// The cluster as a whole may lose what it has acknowledged.
    NotStrict,
}

#[derive(Debug)]
pub(super) struct Trust {
    /// For the log.
    place: String,
    /// Where the birthmark stands.
    key: Vec<u8>,
    /// Known once the store is open.
    birthmark: OnceLock<Bytes>,
    /// Why no connection is used, by [`Ground`]. While there is a reason, all connections end.
    bars: Mutex<[Option<Arc<str>>; 2]>,
    is_barred: AtomicBool,
}

impl Trust {
    pub(super) fn new(place: String, key: Vec<u8>) -> Self {
        let (birthmark, bars, is_barred) = (OnceLock::new(), Mutex::default(), AtomicBool::new(false));
        Self { place, key, birthmark, bars, is_barred }
    }

    pub(super) fn key(&self) -> &[u8] {
        &self.key
    }

    pub(super) fn birthmark(&self) -> Option<&Bytes> {
        self.birthmark.get()
    }

    /// From now on no other store will do.
    pub(super) fn learn(&self, birthmark: Bytes) {
        let _ = self.birthmark.set(birthmark);
    }

    /// What stands where the birthmark should; anything but a value or nothing says nothing.
    ///
    /// # Errors
    /// It is another store; all connections end.
    pub(super) fn judge(&self, found: &Reply) -> Result<(), Arc<str>> {
        let Some(birthmark) = self.birthmark() else { return Ok(()) };
        match found {
            Reply::Bulk(found) if found == birthmark => {
                self.lift(Ground::Another);
                Ok(())
            }
            Reply::Bulk(_) | Reply::Nil => Err(self.disown()),
            _ => Ok(()),
        }
    }

    /// It is another store.
    pub(super) fn disown(&self) -> Arc<str> {
        let reason: Arc<str> = Arc::from(ANOTHER);
        self.bar(Ground::Another, Arc::clone(&reason));
        reason
    }

    /// Ends the use of the store, with a word in the log the first time.
    pub(super) fn bar(&self, ground: Ground, reason: Arc<str>) {
        let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        let [another, not_strict] = &mut *bars;
        let bar = if ground == Ground::Another { another } else { not_strict };
        if bar.is_none() {
            tracing::error!(place = self.place, %reason, "the store cannot be used any more");
        }
        *bar = Some(reason);
        self.is_barred.store(true, Ordering::Release);
    }

    pub(super) fn lift(&self, ground: Ground) {
        if !self.is_barred.load(Ordering::Acquire) {
            return;
        }
        let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        let [another, not_strict] = &mut *bars;
        *(if ground == Ground::Another { another } else { not_strict }) = None;
        self.is_barred.store(bars.iter().any(Option::is_some), Ordering::Release);
    }

    pub(super) fn is_barred(&self) -> bool {
        self.is_barred.load(Ordering::Acquire)
    }

    /// Why no connection may be used, if so.
    pub(super) fn barred(&self) -> Option<Arc<str>> {
        if !self.is_barred() {
            return None;
        }
        self.bars.lock().unwrap_or_else(PoisonError::into_inner).iter().flatten().next().cloned()
    }

    /// Why none is to be tried: whether the cluster may be trusted is asked elsewhere.
    pub(super) fn not_strict(&self) -> Option<Arc<str>> {
        if !self.is_barred() {
            return None;
        }
        let [_, not_strict] = &*self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        not_strict.clone()
    }
}
