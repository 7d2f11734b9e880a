//! What a claim and its settling cost. Prints it; to be run by hand, in release mode:
//! `cargo test --release --test store_postgres -- --ignored --nocapture cost`.

use super::*;
use std::sync::Arc;

const IN_FLIGHT: u64 = 64;
const SECONDS: u64 = 8;

fn own_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn cost_of_a_claim_and_its_settling() {
    let Some(server) = Server::start(&["shared_buffers=256MB", "max_wal_size=4GB"]) else { return };
    let store = Arc::new(open(&options(server.url(), MS(10_000))).await);
    let deadline = Instant::now() + Duration::from_secs(SECONDS);
    let (own, servers, status) = (own_cpu(), server.cpu(), store.status());
    let tasks: Vec<_> = (0..IN_FLIGHT)
        .map(|task| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let (mut n, mut times) = (task, Vec::new());
                while Instant::now() < deadline {
                    let began = Instant::now();
                    let claimed = put(&store, id(n), None, value(CLAIMED, None, &"c".repeat(200))).await;
                    times.push(began.elapsed());
                    put(&store, id(n), Some(claimed), value(COMPLETED, Some(1 << 50), &"x".repeat(600))).await;
                    n += IN_FLIGHT;
                }
                times
            })
        })
        .collect();
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await.unwrap());
    }
    times.sort_unstable();
    let (own, servers) = (own_cpu() - own, server.cpu() - servers);
    let (pairs, after) = (times.len() as u32, store.status());
    let batches = after.batches - status.batches;
    eprintln!(
        "{IN_FLIGHT} in flight: {} pairs/s; CPU per pair: here {:?}, server {:?}; {:.1} writes a batch; a claim takes {:?} \
         (median), {:?} (99 of 100)",
        u64::from(pairs) / SECONDS,
        own / pairs,
        servers / pairs,
        f64::from(pairs * 2) / batches as f64,
        times[times.len() / 2],
        times[times.len() * 99 / 100],
    );
}
