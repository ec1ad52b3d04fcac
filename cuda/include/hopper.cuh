// What the kernels ask of a Hopper GPU (sm_90a) beyond device.cuh, named as in PTX. The emulator's
// stand-ins in simt/hopper.h have the same names.
#pragma once

#include "device.cuh"

// What a kernel is told of a tensor, as a parameter: made by cuTensorMapEncodeTiled, or by the
// emulator's `Tiling`.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

// An operand of `wgmma` in shared memory: 16-bit elements, swizzled over 128 bytes as copies of
// boxes leave them. Rows of 128 bytes, eight of which begin at a multiple of 1,024:
//
//     K-major: a row is 64 of the depth. Eight rows further is `stride` bytes further; `leading`
//              counts for nothing. The next 16 of the depth start 32 bytes further.
//     MN-major: a row is 64 columns of one depth. Eight of the depth further is `stride` bytes
//              further, 64 columns further `leading`.
DEVICE uint64_t wgmma_descriptor(Shared start, uint32_t leading, uint32_t stride) {
    return static_cast<uint64_t>(1) << 62 | static_cast<uint64_t>(stride >> 4) << 32 |
           static_cast<uint64_t>(leading >> 4) << 16 | (start & 0x3ffff) >> 4;
}

#ifndef __CUDACC__
#include "../simt/hopper.h"
#else
#include "wgmma.cuh"

// One lane of a warp that has all its lanes.
DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
    return elected != 0;
}

// An mbarrier is 8 bytes of shared memory. A phase of it is complete after `count` arrivals and all
// the bytes that they expect.
DEVICE void mbarrier_init(Shared at, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
DEVICE void mbarrier_arrive(Shared at) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
DEVICE void mbarrier_arrive_expect_tx(Shared at, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
// Waits for the phase of a parity: 0 for the first, 1 for the second and, at once, for the one
// before the first. What would hang traps.
DEVICE void mbarrier_wait_parity(Shared at, uint32_t parity) {
#pragma unroll 1
    for (uint32_t tries = 0; tries < 1u << 22; tries++) {
        uint32_t passed;
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(passed)
            : "r"(at), "r"(parity)
            : "memory");
        if (passed) {
            return;
        }
    }
    __trap();
}
// One of the expected arrivals, when all the thread's copies up to now have landed.
DEVICE void copy_mbarrier_arrive_noinc(Shared at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}

// Between what threads write to shared memory and its use by `wgmma` or copies of boxes.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Starts a copy of the box of a tensor whose first element is at (x, y, z, w), x along the
// contiguous axis; what is outside of the tensor becomes zeros. Its bytes arrive at the mbarrier.
DEVICE void copy_box(Shared to, const TensorMap& map, int x, int y, int z, int w, Shared mbarrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(mbarrier)
        : "memory");
}
DEVICE void prefetch_tensor_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Barriers 1 to 15, for so many threads: whole warps, that wait or only come.
DEVICE void bar_sync(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void bar_arrive(uint32_t id, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers of each thread of a warp group from now on. The kernel must be one with room for a number
// of blocks, or the compiler ignores them.
template <int Registers>
DEVICE void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
DEVICE void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Before the first product of a group: registers of its operands are as they were written.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most the last `Groups` groups are under way.
template <int Groups>
DEVICE void wgmma_wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
}
// The compiler moves no use of these registers across this point: before a fence, and after a wait.
template <int Fragments>
DEVICE void wgmma_registers(float (&d)[Fragments][4]) {
#pragma unroll
    for (int j = 0; j < Fragments; j++) {
        asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
    }
}

// Starts d (64 × 8 Fragments) = a (64 × 16) b (16 × 8 Fragments), plus d if it accumulates, by four
// warps with 16 rows each: d lies as the accumulators of 16×8 products do, side by side. `a` is a
// descriptor, K-major, or the warp's registers as for a 16×16 product. `b` is K-major or, if
// transposed, MN-major. Until the wait neither d nor the operands may be touched.
template <class Element, bool Transposed, int Fragments, class A>
DEVICE void wgmma(float (&d)[Fragments][4], const A& a, uint64_t b, bool accumulate) {
    constexpr bool bf16 = Element::exponents == 0x7f807f80u;
    WgmmaOf<8 * Fragments>::template run<bf16, Transposed>(d, a, b, accumulate);
}

#endif
