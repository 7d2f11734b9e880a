//! The index's engine can be changed at any start.

use crate::support::{Gateway, Upstream};

#[test]
fn another_engine_is_said_and_loses_no_record() {
    let upstream = Upstream::counting();
    // Replays come from the store itself.
    let mut gateway = Gateway::start(&upstream, "cache.max_bytes = 0");
    for n in 0..20 {
        assert_eq!(gateway.post(&format!("k{n}"), "{}").status, 201);
    }
    for (round, engine) in ["fjall", "sled", "fjall"].into_iter().enumerate() {
        for said in [true, false] {
            gateway.terminate();
            assert_eq!(gateway.wait(), Some(0));
            gateway = gateway.again(&[("ONCEGATE_STORE__ENGINE", engine)]).unwrap();
            if said {
                let line = gateway.wait_for_log("rebuilding the index from the log");
                assert!(line.contains("WARN") && line.contains(engine), "{line}");
            } else {
                assert!(!gateway.log().contains("rebuilding the index"), "{}", gateway.log());
            }
            for n in 0..20 + round {
                assert!(gateway.post(&format!("k{n}"), "{}").replayed(), "k{n}, {engine}");
            }
        }
        assert_eq!(gateway.post(&format!("k{}", 20 + round), "{}").status, 201);
    }
    assert_eq!(upstream.count(), 23);
}
