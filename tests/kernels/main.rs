//! What must hold for attention on a GPU: the kernels against the oracle. On the host always; on a GPU, with `--ignored`, where
//! there is one.
//!
//! Every property runs 256 cases; `PROPTEST_CASES=100000` asks for more.

#[path = "../common/mod.rs"]
mod common;

#[path = "../common/backend.rs"]
mod backend;
mod call;
#[allow(dead_code)] // of the CPU's own calls
#[path = "../flash/cases.rs"]
mod cases;
#[allow(dead_code)]
#[path = "../flash/expected.rs"]
mod expected;
mod oracle;
