//! Many ranks: what holds over any engine (`programs`), and what each engine does when a rank
//! fails.

mod agree;
#[path = "../common/mod.rs"]
mod common;
mod cost;
#[path = "../properties/expected.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod expected;
mod flight;
mod merge;
#[cfg(feature = "mpi")]
mod mpi;
mod programs;
mod threads;
