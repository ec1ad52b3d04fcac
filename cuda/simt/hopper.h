// The emulator's stand-ins for include/hopper.cuh.
#pragma once

extern "C" {
void simt_mbarrier_init(Shared at, uint32_t count);
void simt_mbarrier_arrive(Shared at);
void simt_mbarrier_expect(Shared at, uint32_t bytes);
void simt_mbarrier_wait(Shared at, uint32_t parity);
void simt_copy_arrive(Shared at);
void simt_fence_async();
void simt_fence_mbarrier_init();
void simt_copy_box(Shared to, const TensorMap* map, const int32_t* at, Shared mbarrier);
void simt_prefetch_tensor_map(const TensorMap* map);
void simt_named_barrier(uint32_t id, uint32_t threads, bool waits);
void simt_registers(uint32_t registers, bool more);
void simt_wgmma_fence();
void simt_wgmma_commit();
void simt_wgmma_wait(uint32_t groups);
void simt_wgmma(float* d, uint32_t columns, const uint32_t* a, uint64_t a_descriptor, uint64_t b, bool transposed,
                bool accumulate, bool bf16);
}

DEVICE bool elect_one() { return thread_index() % 32 == 0; }
DEVICE void mbarrier_init(Shared at, uint32_t count) { simt_mbarrier_init(at, count); }
DEVICE void mbarrier_arrive(Shared at) { simt_mbarrier_arrive(at); }
DEVICE void mbarrier_arrive_expect_tx(Shared at, uint32_t bytes) {
    simt_mbarrier_expect(at, bytes);
    simt_mbarrier_arrive(at);
}
DEVICE void mbarrier_wait_parity(Shared at, uint32_t parity) { simt_mbarrier_wait(at, parity); }
DEVICE void copy_mbarrier_arrive_noinc(Shared at) { simt_copy_arrive(at); }
DEVICE void fence_proxy_async() { simt_fence_async(); }
DEVICE void fence_mbarrier_init() { simt_fence_mbarrier_init(); }
DEVICE void copy_box(Shared to, const TensorMap& map, int x, int y, int z, int w, Shared mbarrier) {
    const int32_t at[4] = {x, y, z, w};
    simt_copy_box(to, &map, at, mbarrier);
}
DEVICE void prefetch_tensor_map(const TensorMap& map) { simt_prefetch_tensor_map(&map); }
DEVICE void bar_sync(uint32_t id, uint32_t threads) { simt_named_barrier(id, threads, true); }
DEVICE void bar_arrive(uint32_t id, uint32_t threads) { simt_named_barrier(id, threads, false); }
template <int Registers>
DEVICE void setmaxnreg_inc() {
    simt_registers(Registers, true);
}
template <int Registers>
DEVICE void setmaxnreg_dec() {
    simt_registers(Registers, false);
}
DEVICE void wgmma_fence() { simt_wgmma_fence(); }
DEVICE void wgmma_commit_group() { simt_wgmma_commit(); }
template <int Groups>
DEVICE void wgmma_wait_group() {
    simt_wgmma_wait(Groups);
}
template <int Fragments>
DEVICE void wgmma_registers(float (&)[Fragments][4]) {}

template <class Element, bool Transposed, int Fragments>
DEVICE void wgmma(float (&d)[Fragments][4], const uint64_t& a, uint64_t b, bool accumulate) {
    simt_wgmma(d[0], 8 * Fragments, nullptr, a, b, Transposed, accumulate, Element::exponents == 0x7f807f80);
}
template <class Element, bool Transposed, int Fragments>
DEVICE void wgmma(float (&d)[Fragments][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    simt_wgmma(d[0], 8 * Fragments, a, 0, b, Transposed, accumulate, Element::exponents == 0x7f807f80);
}
