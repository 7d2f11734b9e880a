//! The embedded store after crashes, damage, loss, and on a full disk: one suite, run with each engine as the index.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stderr)]
#![allow(clippy::duplicate_mod)]

use oncegate::store::embedded::Engine;

#[path = "store_recovery"]
mod with_sled {
    const ENGINE: super::Engine = super::Engine::Sled;
    #[path = "suite.rs"]
    mod suite;
}

#[path = "store_recovery"]
mod with_fjall {
    const ENGINE: super::Engine = super::Engine::Fjall;
    #[path = "suite.rs"]
    mod suite;
}
