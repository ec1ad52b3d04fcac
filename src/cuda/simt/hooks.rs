//! What `cuda/simt/device.h` calls: on a running kernel's thread, on its coroutine's stack.
//!
//! Pointers and sizes are those that the header's wrappers pass; an access that fails a check does
//! not return.

use super::Fault;
use super::block::{Reply, Stop, fail, stop, with_block};
use super::matrix::pack;

pub fn checked<T>(result: Result<T, String>) -> T {
    result.unwrap_or_else(|reason| fail(reason))
}

#[unsafe(no_mangle)]
extern "C" fn simt_thread_index() -> u32 {
    with_block(|block| block.thread as u32)
}

#[unsafe(no_mangle)]
extern "C" fn simt_block_index() -> u32 {
    with_block(|block| block.index)
}

#[unsafe(no_mangle)]
extern "C" fn simt_sync_block() {
    simt_sync_block_any(false);
}

#[unsafe(no_mangle)]
extern "C" fn simt_sync_block_any(x: bool) -> bool {
    let fault = with_block(|block| {
        let thread = block.thread;
        let barrier = block.barriers[thread];
        block.barriers[thread] += 1;
        block.fault.filter(|fault| match *fault {
            Fault::SkipBarrier(n) => n == barrier,
            Fault::Leave { thread: leaving, barrier: n } => leaving as usize == thread && n == barrier,
            _ => false,
        })
    });
    match fault {
        Some(Fault::SkipBarrier(_)) => x,
        Some(_) => stop(Stop::Never).flag,
        None => stop(Stop::BlockBarrier(x)).flag,
    }
}

#[unsafe(no_mangle)]
extern "C" fn simt_sync_warp() {
    let skipped = with_block(|block| block.fault == Some(Fault::SkipWarpBarriers));
    if !skipped {
        stop(Stop::WarpBarrier);
    }
}

#[unsafe(no_mangle)]
extern "C" fn simt_any_lane(x: bool) -> bool {
    stop(Stop::AnyLane(x)).flag
}

#[unsafe(no_mangle)]
extern "C" fn simt_shuffle_xor(value: f32, lanes: u32) -> f32 {
    let Reply { value, .. } = stop(Stop::Shuffle { value, lanes });
    value
}

#[unsafe(no_mangle)]
extern "C" fn simt_check_global(address: *const u8, bytes: u32, write: bool) {
    checked(with_block(|block| block.regions.check(address as usize, bytes as usize, write)));
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_shared_load(to: *mut u8, from: u32, bytes: u32) {
    checked(with_block(|block| {
        let data = block.shared.read(&block.clocks, block.thread, from, bytes as usize)?;
        // SAFETY: `to` is a variable of that many bytes on the kernel's stack.
        unsafe { data.as_ptr().copy_to_nonoverlapping(to, data.len()) };
        Ok(())
    }));
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_shared_store(to: u32, from: *const u8, bytes: u32) {
    checked(with_block(|block| {
        // SAFETY: `from` is a variable of that many bytes on the kernel's stack.
        let data = unsafe { std::slice::from_raw_parts(from, bytes as usize) };
        block.shared.write(&block.clocks, block.thread, to, data)
    }));
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_copy_async(to: u32, from: *const [u8; 16], zeros: bool) {
    checked(with_block(|block| {
        let mut data = [0; 16];
        if !zeros {
            block.regions.check(from as usize, data.len(), false)?;
            // SAFETY: checked just now. Plain bytes, so any alignment would do; the check asks for
            // that of the hardware.
            data = unsafe { from.read() };
        }
        block.start_copy(to, data)
    }));
}

#[unsafe(no_mangle)]
extern "C" fn simt_copy_commit() {
    with_block(|block| block.commit_copies());
}

#[unsafe(no_mangle)]
extern "C" fn simt_copy_wait(groups: u32) {
    checked(with_block(|block| {
        let late = u32::from(block.fault == Some(Fault::WaitForFewer));
        block.wait_copies((groups + late) as usize)
    }));
}

#[unsafe(no_mangle)]
extern "C" fn simt_load_matrices(to: *mut [u32; 4], row: u32, transposed: bool) {
    stop(Stop::LoadMatrices { to, row, transposed });
}

#[unsafe(no_mangle)]
extern "C" fn simt_multiply_add(c: *mut [f32; 4], a: *const [u32; 4], b: *const [u32; 2], bf16: bool) {
    stop(Stop::MultiplyAdd { c, a, b, bf16 });
}

#[unsafe(no_mangle)]
extern "C" fn simt_pack(low: f32, high: f32, bf16: bool) -> u32 {
    pack(low, high, bf16)
}

#[unsafe(no_mangle)]
extern "C" fn simt_unpack(x: u16, bf16: bool) -> f32 {
    if bf16 { half::bf16::from_bits(x).to_f32() } else { half::f16::from_bits(x).to_f32() }
}
