//! A timer that is set over and over, once a request: that costs a look at the clock, not an allocation and two turns of
//! the runtime's wheel.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep_until};

#[derive(Default)]
pub(crate) struct Timer {
    deadline: Option<Instant>,
    /// Rings at the deadline or earlier: what it was set for last may be over.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Timer {
    /// Ready once `limit` has passed since the first call after [`Self::stop`].
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, limit: Duration) -> Poll<()> {
        let deadline = *self.deadline.get_or_insert_with(|| after(limit));
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if sleep.deadline() > deadline {
            sleep.as_mut().reset(deadline);
        }
        loop {
            ready!(sleep.as_mut().poll(cx));
            if sleep.deadline() >= deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(deadline);
        }
    }

    pub(crate) fn stop(&mut self) {
        self.deadline = None;
    }
}

fn after(limit: Duration) -> Instant {
    let now = Instant::now();
    // A century is as good as never.
    now.checked_add(limit).unwrap_or_else(|| now + Duration::from_secs(100 * 365 * 86_400))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    async fn pending(timer: &mut Timer, limit: Duration) -> bool {
        poll_fn(|cx| Poll::Ready(timer.poll(cx, limit).is_pending())).await
    }

    #[tokio::test]
    async fn it_rings_after_the_limit_that_was_set_last() {
        let mut timer = Timer::default();
        for millis in [40, 20, 80, 10, 10] {
            let limit = Duration::from_millis(millis);
            let began = Instant::now();
            assert!(pending(&mut timer, limit).await);
            // It is running already: another limit counts no more.
            poll_fn(|cx| timer.poll(cx, Duration::from_secs(3600))).await;
            assert!(began.elapsed() >= limit);
            timer.stop();
            // Set, and not waited for.
            assert!(pending(&mut timer, limit).await);
            timer.stop();
        }
        assert!(pending(&mut timer, Duration::MAX).await);
    }
}
