//! What must hold for attention on the CPU: the default backend against the oracle, Star
//! Attention's two phases against their definitions, and the edges.
//!
//! Every property runs 256 cases; `PROPTEST_CASES=100000` asks for more.

#[path = "../common/mod.rs"]
mod common;
#[path = "../properties/mod.rs"]
mod properties;

mod backend;
mod batches;
mod edges;
mod errors;
mod heads;
mod masks;
mod memory;
mod nonfinite;
mod oracle;
mod phases;
mod prefix;
mod quantised;
mod row_invariant;
mod separate;
mod sinks;
mod types;
