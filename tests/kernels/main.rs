//! What must hold for attention by kernels: on the emulator always; on a GPU, with `--ignored`,
//! where there is one.
//!
//! Every property runs 256 cases, those of engines a quarter; `PROPTEST_CASES=100000` asks for
//! more. At the end stands how many kernels were launched on the emulator.

#[path = "../common/mod.rs"]
mod common;
#[path = "../properties/mod.rs"]
mod properties;

#[path = "../common/backend.rs"]
mod backend;
mod call;
mod count;

mod append;
mod batches;
mod edges;
mod either;
mod engine;
mod errors;
mod faults;
mod graph;
mod hopper;
mod hopper_faults;
mod invariance;
mod masks;
mod merge;
mod nonfinite;
mod offsets;
mod oracle;
mod paged;
mod phases;
mod prefix;
mod quantised;
mod ranks;
mod recorder;
mod recording;
mod separate;
mod sinks;
mod staging;
