//! Hosts whose time is one, and stands still while they work. Each is a runtime of its own, so that it can be killed with
//! all that runs on it, or stand still.

use std::cell::Cell;
use std::future::Future;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

thread_local! {
    static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Since the simulation began.
pub(crate) fn now() -> Duration {
    NOW.get()
}

pub(crate) fn set_now(now: Duration) {
    NOW.set(now);
}

/// The clock that nobody sets, of all hosts.
pub(crate) fn since_boot() -> Duration {
    now() + Duration::from_secs(3600)
}

/// Dead by default.
#[derive(Default)]
pub(crate) struct Host {
    /// `None`: it is dead.
    runtime: Option<Runtime>,
    /// Stands still until then.
    frozen: Option<Duration>,
    /// How far its time is behind.
    behind: Duration,
}

impl Host {
    /// `seed`: of the choices that the runtime leaves to chance, such as who is woken first.
    pub(crate) fn new(seed: u64) -> Self {
        let mut builder = Builder::new_current_thread();
        #[cfg(tokio_unstable)]
        builder.rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()));
        #[cfg(not(tokio_unstable))]
        let _ = seed;
        let runtime = builder.enable_time().start_paused(true).build().unwrap();
        Self { runtime: Some(runtime), ..Self::default() }
    }

    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        if let Some(runtime) = &self.runtime {
            runtime.spawn(future);
        }
    }

    pub(crate) fn lives(&self) -> bool {
        self.runtime.is_some()
    }

    /// All that runs on it ends, in the midst of it.
    pub(crate) fn kill(&mut self) {
        self.runtime = None;
    }

    pub(crate) fn freeze(&mut self, until: Duration) {
        self.frozen = Some(until);
    }

    /// Lets a tick go by.
    pub(crate) fn tick(&mut self, tick: Duration) {
        let Some(runtime) = &self.runtime else { return };
        if self.frozen.is_some_and(|until| now() < until) {
            self.behind += tick;
            return;
        }
        if self.frozen.take().is_some() {
            // All timers ring late, at once.
            let behind = std::mem::take(&mut self.behind);
            runtime.block_on(async { tokio::time::advance(behind).await });
        }
        runtime.block_on(async { tokio::time::sleep(tick).await });
    }
}
