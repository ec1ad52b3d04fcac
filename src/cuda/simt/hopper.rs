//! What `cuda/simt/hopper.h` calls, as `hooks` is for `cuda/simt/device.h`.

use super::Fault;
use super::block::{Stop, WARP, stop, with_block};
use super::hooks::checked;
use super::tensor::{BoxCopy, TensorMap};
use super::wgmma::{Form, Product, WARPS};
use std::sync::atomic::{AtomicU32, Ordering};

/// Whether the fault is planted.
fn planted(fault: Fault) -> bool {
    with_block(|block| block.fault == Some(fault))
}

#[unsafe(no_mangle)]
extern "C" fn simt_mbarrier_init(address: u32, count: u32) {
    checked(with_block(|block| {
        block.mbarriers.init(&block.clocks, &mut block.shared, block.thread, address, count)
    }));
}

#[unsafe(no_mangle)]
extern "C" fn simt_mbarrier_arrive(address: u32) {
    checked(with_block(|block| {
        let thread = block.thread;
        let n = block.arrivals[thread];
        block.arrivals[thread] += 1;
        let arrivals = match block.fault {
            Some(Fault::SkipArrival(skipped)) if skipped == n => 0,
            Some(Fault::ArriveTwice(twice)) if twice == n => 2,
            _ => 1,
        };
        (0..arrivals).try_for_each(|_| block.mbarriers.arrive(&mut block.clocks, thread, address))
    }));
}

#[unsafe(no_mangle)]
extern "C" fn simt_mbarrier_expect(address: u32, bytes: u32) {
    checked(with_block(|block| {
        let fewer = if let Some(Fault::ExpectFewer(fewer)) = block.fault { fewer } else { 0 };
        block.mbarriers.expect(&block.clocks, block.thread, address, bytes - fewer)
    }));
}

#[unsafe(no_mangle)]
extern "C" fn simt_mbarrier_wait(address: u32, parity: u32) {
    let other = with_block(|block| {
        let n = block.waits[block.thread];
        block.waits[block.thread] += 1;
        block.fault == Some(Fault::OtherParity(n))
    });
    stop(Stop::Mbarrier { address, parity: parity ^ u32::from(other) });
}

#[unsafe(no_mangle)]
extern "C" fn simt_copy_arrive(address: u32) {
    checked(with_block(|block| block.hand_copies_over(address)));
}

#[unsafe(no_mangle)]
extern "C" fn simt_fence_mbarrier_init() {
    with_block(|block| block.mbarriers.fence(&block.clocks, block.thread));
}

#[unsafe(no_mangle)]
extern "C" fn simt_fence_async() {
    if !planted(Fault::SkipProxyFences) {
        with_block(|block| {
            block.clocks.fence(block.thread);
            block.mbarriers.fence(&block.clocks, block.thread);
        });
    }
}

/// The tensor map that a kernel names.
fn tensor_map(map: *const TensorMap) -> Result<TensorMap, String> {
    if !map.is_aligned() {
        return Err("cp.async.bulk.tensor: a tensor map not aligned to 64".into());
    }
    // SAFETY: kernels name maps among their parameters; what else is there is refused.
    let map = unsafe { *map };
    map.check().map(|()| map)
}

#[unsafe(no_mangle)]
extern "C" fn simt_prefetch_tensor_map(map: *const TensorMap) {
    checked(tensor_map(map).map(|_| ()));
}

#[unsafe(no_mangle)]
extern "C" fn simt_copy_box(to: u32, map: *const TensorMap, at: *const [i32; 4], mbarrier: u32) {
    checked(with_block(|block| {
        // SAFETY: the wrapper's variable.
        let mut copy = BoxCopy::new(tensor_map(map)?, unsafe { *at }, to);
        copy.check()?;
        copy.short = block.fault == Some(Fault::ShortBoxes);
        copy.swizzled &= block.fault != Some(Fault::UnswizzledBoxes);
        block.start_box(copy, mbarrier)
    }));
}

#[unsafe(no_mangle)]
extern "C" fn simt_named_barrier(id: u32, threads: u32, waits: bool) {
    let more = with_block(|block| match block.fault {
        Some(Fault::MoreAtBarriers(more)) => more,
        _ => 0,
    });
    stop(Stop::NamedBarrier { id, threads: threads + more, waits });
}

#[unsafe(no_mangle)]
extern "C" fn simt_registers(registers: u32, more: bool) {
    let registers = with_block(|block| match block.fault {
        Some(Fault::MoreRegisters(more)) => Some(registers + more),
        Some(Fault::KeepRegisters) if block.thread / WARP % WARPS == WARPS - 1 => None,
        _ => Some(registers),
    });
    if let Some(registers) = registers {
        stop(Stop::Registers { registers, more });
    }
}

#[unsafe(no_mangle)]
extern "C" fn simt_wgmma_fence() {
    if !planted(Fault::SkipWgmmaFences) {
        stop(Stop::WgmmaFence);
    }
}

/// `a` is null where A is in shared memory.
#[unsafe(no_mangle)]
extern "C" fn simt_wgmma(
    d: *mut f32,
    columns: u32,
    a: *const [u32; 4],
    a_descriptor: u64,
    b: u64,
    b_transposed: bool,
    accumulate: bool,
    bf16: bool,
) {
    let form = Form { columns, a: a.is_null().then_some(a_descriptor), b, b_transposed, accumulate, bf16 };
    stop(Stop::Wgmma(&Product { d, a, form }));
}

#[unsafe(no_mangle)]
extern "C" fn simt_wgmma_commit() {
    stop(Stop::WgmmaCommit);
}

#[unsafe(no_mangle)]
extern "C" fn simt_wgmma_wait(groups: u32) {
    stop(Stop::WgmmaWait(groups + u32::from(planted(Fault::WaitForFewerProducts))));
}

/// `atomicInc`: the next number, and 0 after `last`.
#[unsafe(no_mangle)]
extern "C" fn simt_atomic_increment(at: *mut u32, last: u32) -> u32 {
    checked(with_block(|block| block.regions.check(at as usize, size_of::<u32>(), true)));
    // SAFETY: checked just now; other blocks touch it by this function alone.
    let number = unsafe { AtomicU32::from_ptr(at) };
    let next = |n: u32| Some(if n >= last { 0 } else { n + 1 });
    number.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).unwrap_or_else(|n| n)
}
