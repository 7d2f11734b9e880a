//! One thread and one runtime per core: whatever belongs to a connection happens on the thread that it was given to, so
//! that a request that passes through meets no other core's locks, queues or wake-ups.

use std::io;
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// The threads. Dropped, they stop, and what still runs on them is given up.
pub struct Workers {
    all: Vec<Worker>,
    stop: CancellationToken,
}

/// One thread.
#[derive(Clone)]
pub(crate) struct Worker {
    /// Of the runtime that it runs.
    pub(crate) runtime: Handle,
    /// Client connections that it serves.
    pub(super) connections: Arc<AtomicUsize>,
}

impl Workers {
    /// Starts `count` threads; 0: one per core.
    ///
    /// # Errors
    /// The operating system's.
    pub fn start(count: usize) -> io::Result<Self> {
        let cores = || std::thread::available_parallelism().map_or(1, NonZero::get);
        let count = if count == 0 { cores() } else { count };
        let stop = CancellationToken::new();
        let mut workers = Self { all: Vec::with_capacity(count), stop: stop.clone() };
        for number in 0..count {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let worker = Worker { runtime: runtime.handle().clone(), connections: Arc::default() };
            let stop = stop.clone();
            let run = move || runtime.block_on(stop.cancelled());
            std::thread::Builder::new().name(format!("oncegate-{number}")).spawn(run)?;
            workers.all.push(worker);
        }
        Ok(workers)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.all.iter()
    }

    /// Position of the one with the fewest connections.
    pub(super) fn least_busy(&self) -> usize {
        let connections = self.all.iter().map(|worker| worker.connections.load(Ordering::Relaxed));
        connections.enumerate().min_by_key(|(_, connections)| *connections).map_or(0, |(position, _)| position)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
