//! What a request costs. Prints it; to be run by hand:
//! `cargo test --release --test store_redis -- --ignored --nocapture cost`.

use super::*;
use std::sync::Arc;

/// Of this process, with all its threads.
fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Of the server: user and system.
fn server_cpu(server: &Server) -> Duration {
    let info = server.client().ask(&["INFO", "cpu"]).text();
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        Duration::from_secs_f64(line.trim_start_matches(':').parse().unwrap())
    };
    field("used_cpu_user:") + field("used_cpu_sys:")
}

#[test]
#[ignore = "measures"]
fn cost_of_claims_settles_and_reads() {
    if !installed() {
        return;
    }
    let pairs: u32 = std::env::var("PAIRS").map_or(20_000, |n| n.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // As in the gateway: requests are on another thread than the store's task.
    let worker = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for arguments in [&[][..], &["--appendonly", "yes", "--appendfsync", "always"]] {
        for concurrency in [1, 8, 64] {
            let server = Server::start(arguments);
            let store = Arc::new(runtime.block_on(open(&server.url())));
            let payload = Bytes::from(vec![b'x'; 600]);
            let (ours, theirs, began) = (cpu(), server_cpu(&server), Instant::now());
            let tasks: Vec<_> = (0..concurrency)
                .map(|task| {
                    let (store, payload) = (store.clone(), payload.clone());
                    worker.spawn(async move {
                        for n in 0..pairs / concurrency {
                            let mut name = [0; 16];
                            let mixed = u64::from(n * concurrency + task).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                            name[..8].copy_from_slice(&mixed.to_be_bytes());
                            let claim = Some(Value { tag: CLAIMED, expires_at_ms: None, bytes: payload.slice(..120) });
                            let swapped = store.compare_and_swap(RecordId(name), None, claim, 0, Urgency::Claim).await;
                            let Ok(Swap::Done(version)) = swapped else { panic!("{swapped:?}") };
                            let done = Value { tag: COMPLETED, expires_at_ms: Some(1 << 42), bytes: payload.clone() };
                            let swap =
                                store.compare_and_swap(RecordId(name), Some(version), Some(done), 0, Urgency::Settle);
                            assert!(matches!(swap.await, Ok(Swap::Done(_))));
                        }
                    })
                })
                .collect();
            runtime.block_on(async {
                for task in tasks {
                    task.await.unwrap();
                }
            });
            let (ours, theirs, elapsed) = (cpu() - ours, server_cpu(&server) - theirs, began.elapsed());
            let status = store.status();
            let each = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(pairs);
            eprintln!(
                "{arguments:?}, {concurrency} at a time: {:.1} µs here, {:.1} µs in the server, {:.0} pairs/s, {:.1} writes a batch",
                each(ours),
                each(theirs),
                f64::from(pairs) / elapsed.as_secs_f64(),
                status.batched_writes as f64 / status.batches as f64
            );
        }
    }
}
