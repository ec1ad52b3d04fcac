//! What the emulator knows of Hopper: boxes of tensors, products of warp groups, mbarriers. The
//! kernels of `cuda/probe.cu` run on it, as they are and with bugs planted into them, and small kernels
//! that are wrong themselves.

mod boxes;
mod faults;
mod mistakes;
mod products;
mod ring;

use star_attention::Result;
use star_attention::cuda::simt::Simt;
use star_attention::cuda::{Device, Launch};

/// Launches a kernel with its parameters.
fn launch<P: Copy>(
    simt: &Simt,
    kernel: &str,
    [blocks, threads, shared_bytes]: [u32; 3],
    params: &P,
) -> Result<()> {
    // SAFETY: the structs of parameters are plain numbers, without padding between them.
    let params = unsafe { std::slice::from_raw_parts((&raw const *params).cast(), size_of::<P>()) };
    // SAFETY: the tests' buffers outlive the launch; the structs are those of the kernels.
    unsafe { simt.launch(&(), &Launch { kernel, blocks, threads, shared_bytes, params }) }
}
