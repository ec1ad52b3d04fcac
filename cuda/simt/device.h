// The emulator's stand-ins for include/device.cuh: plain C++ over hooks that src/cuda/simt
// provides.
//
// A lane that calls a hook in which lanes meet (barriers, shuffles, matrices) is set aside until
// the others have arrived.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define DEVICE inline
#define KERNEL(name, Params, threads) extern "C" void name(const Params& p)
#define KERNEL_WITH_ROOM(name, Params, threads, blocks) KERNEL(name, Params, threads)

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};

using Shared = uint32_t;

extern "C" {
uint32_t simt_thread_index();
uint32_t simt_block_index();
void simt_sync_block();
bool simt_sync_block_any(bool x);
void simt_sync_warp();
bool simt_any_lane(bool x);
float simt_shuffle_xor(float x, uint32_t lanes);
void simt_check_global(const void* address, uint32_t bytes, bool write);
void simt_shared_load(void* to, Shared from, uint32_t bytes);
void simt_shared_store(Shared to, const void* from, uint32_t bytes);
void simt_copy_async(Shared to, const void* from, bool zeros);
void simt_copy_commit();
void simt_copy_wait(uint32_t groups);
void simt_load_matrices(uint32_t* to, Shared row, bool transposed);
void simt_multiply_add(float* c, const uint32_t* a, const uint32_t* b, bool bf16);
uint32_t simt_pack(float low, float high, bool bf16);
float simt_unpack(uint16_t x, bool bf16);
uint32_t simt_atomic_increment(uint32_t* at, uint32_t last);
}

DEVICE uint32_t thread_index() { return simt_thread_index(); }
DEVICE uint32_t warp_index() { return simt_thread_index() / 32; }
DEVICE uint32_t block_index() { return simt_block_index(); }
DEVICE Shared shared_memory() { return 0; }
DEVICE void sync_block() { simt_sync_block(); }
DEVICE void sync_warp() { simt_sync_warp(); }
DEVICE bool sync_block_any(bool x) { return simt_sync_block_any(x); }
DEVICE bool any_lane(bool x) { return simt_any_lane(x); }
DEVICE float shuffle_xor(float x, int lanes) { return simt_shuffle_xor(x, static_cast<uint32_t>(lanes)); }

DEVICE float exp2_approx(float x) { return exp2f(x); }
DEVICE float reciprocal_approx(float x) { return 1 / x; }
DEVICE float exp_accurate(float x) { return expf(x); }
DEVICE float log_accurate(float x) { return logf(x); }
DEVICE float infinity() { return INFINITY; }
DEVICE float absolute(float x) { return fabsf(x); }
DEVICE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
DEVICE float max_ignoring_nan(float a, float b) { return fmaxf(a, b); }

template <class T>
DEVICE T load(const T* from) {
    simt_check_global(from, sizeof(T), false);
    return *from;
}
template <class T>
DEVICE T load_once(const T* from) {
    return load(from);
}
template <class T>
DEVICE void store(T* to, T x) {
    simt_check_global(to, sizeof(T), true);
    *to = x;
}

DEVICE uint32_t atomic_increment(uint32_t* at, uint32_t last) { return simt_atomic_increment(at, last); }

template <class T>
DEVICE const T& refer(const T* from) {
    simt_check_global(from, sizeof(T), false);
    return *from;
}

DEVICE uint32_t opaque(uint32_t x) { return x; }

DEVICE uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    uint32_t result = 0;
    for (uint32_t i = 0; i < 4; i++) {
        result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    }
    return result;
}

DEVICE uint32_t shared_load4(Shared from) {
    uint32_t x;
    simt_shared_load(&x, from, sizeof x);
    return x;
}
DEVICE float shared_load(Shared from) {
    float x;
    simt_shared_load(&x, from, sizeof x);
    return x;
}
DEVICE uint4 shared_load16(Shared from) {
    uint4 x;
    simt_shared_load(&x, from, sizeof x);
    return x;
}
DEVICE float4 shared_load_float4(Shared from) {
    float4 x;
    simt_shared_load(&x, from, sizeof x);
    return x;
}
DEVICE uint64_t shared_load8(Shared from) {
    uint64_t x;
    simt_shared_load(&x, from, sizeof x);
    return x;
}
DEVICE void shared_store(Shared to, uint64_t x) { simt_shared_store(to, &x, sizeof x); }
DEVICE void shared_store(Shared to, uint4 x) { simt_shared_store(to, &x, sizeof x); }
DEVICE void shared_store(Shared to, uint32_t x) { simt_shared_store(to, &x, sizeof x); }
DEVICE void shared_store(Shared to, float2 x) { simt_shared_store(to, &x, sizeof x); }
DEVICE void shared_store(Shared to, float x) { simt_shared_store(to, &x, sizeof x); }

DEVICE void copy_async(Shared to, const void* from, bool zeros) { simt_copy_async(to, from, zeros); }
DEVICE void copy_commit() { simt_copy_commit(); }
template <int Groups>
DEVICE void copy_wait() {
    simt_copy_wait(Groups);
}

DEVICE void load_matrices(uint32_t (&to)[4], Shared row) { simt_load_matrices(to, row, false); }
DEVICE void load_matrices_transposed(uint32_t (&to)[4], Shared row) { simt_load_matrices(to, row, true); }

template <bool Bf16>
struct Element16 {
    static constexpr uint32_t exponents = Bf16 ? 0x7f807f80 : 0x7c007c00;
    static constexpr uint32_t e4m3_shift = Bf16 ? 4 : 1;
    static uint32_t times_e4m3_bias(uint32_t x) {
        const float2 pair = unpack(x);
        const float bias = Bf16 ? 0x1p120f : 0x1p8f;
        return pack(pair.x * bias, pair.y * bias);
    }
    static uint32_t pack(float low, float high) { return simt_pack(low, high, Bf16); }
    static float2 unpack(uint32_t x) {
        return {simt_unpack(static_cast<uint16_t>(x), Bf16), simt_unpack(static_cast<uint16_t>(x >> 16), Bf16)};
    }
    static void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        const uint32_t b[2] = {b0, b1};
        simt_multiply_add(c, a, b, Bf16);
    }
};
using F16 = Element16<false>;
using BF16 = Element16<true>;
