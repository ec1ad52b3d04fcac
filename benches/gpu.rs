//! The kernels on a GPU: context encoding dense and star, query attention, and the merge, by CUDA events.
//!
//! `cargo bench --features cuda --bench gpu -- --json FILE` writes the table's rows also as JSON, with what the shapes are. Inputs rotate over buffers that
//! together are larger than any GPU's L2 cache. Without a GPU, or without the feature, it says so and measures nothing.

use std::process::ExitCode;

#[cfg(feature = "cuda")]
#[path = "gpu/cases.rs"]
mod cases;
#[cfg(feature = "cuda")]
#[path = "gpu/measure.rs"]
mod measure;

fn main() -> ExitCode {
    // `cargo bench` says --bench; `cargo test --benches` does not, and tests never time.
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("gpu: nothing to test");
        return ExitCode::SUCCESS;
    }
    #[cfg(not(feature = "cuda"))]
    println!("gpu: nothing measured: built without the feature `cuda`");
    #[cfg(feature = "cuda")]
    match measure::all() {
        Ok(()) => {}
        Err(measure::Stop::NoGpu(reason)) => println!("gpu: nothing measured: {reason}"),
        Err(measure::Stop::Failed(error)) => {
            eprintln!("gpu: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
