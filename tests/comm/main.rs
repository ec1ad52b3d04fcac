//! Many hosts: what holds over any engine (`programs`), and what each engine does when a rank fails.

#[path = "../common/mod.rs"]
mod common;
mod agree;
mod cost;
mod merge;
#[cfg(feature = "mpi")]
mod mpi;
mod programs;
mod threads;
