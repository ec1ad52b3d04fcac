//! Compiles the kernels of `cuda/`: with nvcc for the feature `cuda`, as C++ for the feature
//! `simt`. Without either it does nothing.

#[cfg(any(feature = "cuda", feature = "simt"))]
#[path = "build/kernels.rs"]
mod kernels;
#[cfg(feature = "cuda")]
#[path = "build/nvcc.rs"]
mod nvcc;
#[cfg(any(feature = "cuda", feature = "simt"))]
#[allow(dead_code)]
#[path = "src/cuda/policy.rs"]
mod policy;
#[cfg(feature = "simt")]
#[path = "build/simt.rs"]
mod simt;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-changed=src/cuda/policy.rs");
    #[cfg(feature = "cuda")]
    if let Err(reason) = nvcc::build() {
        println!("cargo::error={reason}");
    }
    #[cfg(feature = "simt")]
    simt::build();
}
