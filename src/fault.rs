//! Points at which the crash tests end the process. Compiled to nothing without the `failpoints` feature.

/// Aborts the process if `ONCEGATE_FAILPOINT` is `name`, or `name:N` and this is the N-th time it is passed.
#[cfg(feature = "failpoints")]
pub(crate) fn point(name: &str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    static WANTED: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
        let text = std::env::var("ONCEGATE_FAILPOINT").ok()?;
        let (name, count) = text.split_once(':').unwrap_or((&text, "1"));
        Some((name.to_owned(), count.parse().unwrap_or(1)))
    });
    static PASSED: AtomicU64 = AtomicU64::new(0);
    if let Some((wanted, count)) = &*WANTED
        && wanted == name
        && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == *count
    {
        std::process::abort();
    }
}

#[cfg(not(feature = "failpoints"))]
pub(crate) fn point(_name: &str) {}
