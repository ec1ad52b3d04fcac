//! Stores keep the keys and values of each sequence, and nothing else: on the CPU, and on the
//! kernels' emulator.

#[path = "../common/mod.rs"]
mod common;
#[path = "../properties/mod.rs"]
mod properties;

mod errors;
mod histories;
mod steps;
