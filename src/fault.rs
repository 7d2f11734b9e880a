//! Points at which tests have something go wrong. Compiled to nothing without the `failpoints` feature.
//!
//! `ONCEGATE_FAILPOINT` is `NAME[:N][=ACTION]`, or several of them with commas between: when the point is passed for the
//! N-th time (the first), the process aborts (`abort`, the default), the thread panics (`panic`), stands still for
//! 400 ms (`delay`), or the step fails where it can (`error`).

/// A step that may fail.
///
/// # Errors
/// If it is to.
#[cfg(feature = "failpoints")]
pub(crate) fn step(name: &str) -> std::io::Result<()> {
    wanted::pass(name)
}

#[cfg(not(feature = "failpoints"))]
#[allow(clippy::unnecessary_wraps, reason = "it fails where tests want it to")]
pub(crate) const fn step(_name: &str) -> std::io::Result<()> {
    Ok(())
}

/// A step that cannot fail.
pub(crate) fn point(name: &str) {
    let _ = step(name);
}

#[cfg(feature = "failpoints")]
mod wanted {
    use std::io;
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    struct Wanted {
        name: String,
        action: String,
        /// How often it still has to be passed.
        left: AtomicU64,
    }

    static WANTED: LazyLock<Vec<Wanted>> = LazyLock::new(|| {
        let text = std::env::var("ONCEGATE_FAILPOINT").unwrap_or_default();
        let wanted = |item: &str| {
            let (point, action) = item.split_once('=').unwrap_or((item, "abort"));
            let (name, count) = point.split_once(':').unwrap_or((point, "1"));
            let left = AtomicU64::new(count.parse().unwrap_or(1));
            Wanted { name: name.to_owned(), action: action.to_owned(), left }
        };
        text.split(',').filter(|item| !item.is_empty()).map(wanted).collect()
    });

    #[allow(clippy::panic, reason = "it is what a test asks for")]
    pub(super) fn pass(name: &str) -> io::Result<()> {
        for wanted in WANTED.iter().filter(|wanted| wanted.name == name) {
            let before = wanted.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            if before != Ok(1) {
                continue;
            }
            match wanted.action.as_str() {
                "panic" => panic!("failpoint {name}"),
                "delay" => std::thread::sleep(Duration::from_millis(400)),
                "error" => return Err(io::Error::other(format!("failpoint {name}"))),
                _ => std::process::abort(),
            }
        }
        Ok(())
    }
}
