// What the kernels ask of a GPU, each with the PTX that it wraps. The emulator's stand-ins in
// simt/device.h have the same names.
//
// Kernels touch memory through these functions alone: on the emulator each access is checked.
#pragma once

#include "../params.h"

// encode_f16_d128 or encode_f16_d192_v128, say.
#define NAME_OF(name, dtype, dims) name##_##dtype##_##dims
#define NAME_WITH(name, dtype, dims) NAME_OF(name, dtype, dims)

#ifndef __CUDACC__
#include "../simt/device.h"
#else

#define DEVICE __device__ __forceinline__
// A kernel of blocks of at most `threads`...
#define KERNEL(name, Params, threads) \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Params p)
// ...of which a multiprocessor shall have registers for so many. (1 is not what the compiler takes
// unasked: it then spends registers more freely.)
#define KERNEL_WITH_ROOM(name, Params, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)

// An address in shared memory, in bytes.
using Shared = uint32_t;

DEVICE uint32_t thread_index() { return threadIdx.x; }
// The same in all lanes, as the compiler can tell.
DEVICE uint32_t warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }
DEVICE uint32_t block_index() { return blockIdx.x; }

// Where the launch's dynamic shared memory starts.
DEVICE Shared shared_memory() {
    extern __shared__ uint4 memory[];
    return static_cast<Shared>(__cvta_generic_to_shared(memory));
}

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
// A barrier of the block; whether it holds for any thread.
DEVICE bool sync_block_any(bool x) { return __syncthreads_or(x); }

// Whether it holds for any lane of the warp.
DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float exp_accurate(float x) { return expf(x); }
DEVICE float log_accurate(float x) { return logf(x); }
DEVICE float infinity() { return __int_as_float(0x7f800000); }
DEVICE float absolute(float x) { return fabsf(x); }
DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
DEVICE float max_ignoring_nan(float a, float b) { return fmaxf(a, b); }

template <class T>
DEVICE T load(const T* from) {
    return *from;
}
// Of what is not read again: it is the first to leave the caches.
template <class T>
DEVICE T load_once(const T* from) {
    return __ldcs(from);
}
template <class T>
DEVICE void store(T* to, T x) {
    *to = x;
}

// The number that stands there, which becomes the next one or, after `last`, 0.
DEVICE uint32_t atomic_increment(uint32_t* at, uint32_t last) { return atomicInc(at, last); }

// For what is better read again than kept in registers.
template <class T>
DEVICE const T& refer(const T* from) {
    return *from;
}

// The same value, of which the compiler knows nothing: what follows from it is computed where it is
// used instead of once and kept.
DEVICE uint32_t opaque(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Bytes of x (0 to 3) and y (4 to 7), one for each nibble of the selector, the lowest first.
DEVICE uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) { return __byte_perm(x, y, selector); }

DEVICE uint32_t shared_load4(Shared from) {
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}
DEVICE float shared_load(Shared from) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
    return x;
}
DEVICE uint4 shared_load16(Shared from) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(from)
                 : "memory");
    return x;
}
DEVICE float4 shared_load_float4(Shared from) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(from)
                 : "memory");
    return x;
}
DEVICE uint64_t shared_load8(Shared from) {
    uint64_t x;
    asm volatile("ld.shared.b64 %0, [%1];" : "=l"(x) : "r"(from) : "memory");
    return x;
}
DEVICE void shared_store(Shared to, uint64_t x) {
    asm volatile("st.shared.b64 [%0], %1;" ::"r"(to), "l"(x) : "memory");
}
DEVICE void shared_store(Shared to, uint4 x) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
DEVICE void shared_store(Shared to, uint32_t x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}
DEVICE void shared_store(Shared to, float2 x) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x.x), "f"(x.y) : "memory");
}
DEVICE void shared_store(Shared to, float x) { shared_store(to, __float_as_uint(x)); }

// Starts a copy of 16 bytes, or of 16 zeros. It is there after the wait for its group.
DEVICE void copy_async(Shared to, const void* from, bool zeros) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(zeros ? 0 : 16)
                 : "memory");
}
// Ends a group of copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last `Groups` groups of this thread are under way.
template <int Groups>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

// Four 8×8 matrices of 16-bit elements. Lanes 8i..8i+8 give the rows of matrix i; lane l gets of
// each the elements 2(l % 4) and 2(l % 4) + 1 of row l / 4.
DEVICE void load_matrices(uint32_t (&to)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}
// The same, each matrix transposed.
DEVICE void load_matrices_transposed(uint32_t (&to)[4], Shared row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

// 16-bit elements: two to a word, the lower half first; c (16×8) += a (16×16) b (16×8).
struct F16 {
    static constexpr uint32_t exponents = 0x7c007c00u;
    // From the high byte of a half: how far the fields of an 8-bit float E4M3 move down.
    static constexpr uint32_t e4m3_shift = 1;
    // Then times 2^8, the difference of the biases; exact. -0 as the addend keeps the sign of 0.
    static DEVICE uint32_t times_e4m3_bias(uint32_t x) {
        uint32_t y;
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(0x5c005c00u), "r"(0x80008000u));
        return y;
    }
    static DEVICE uint32_t pack(float low, float high) {
        uint32_t x;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
        return x;
    }
    static DEVICE float2 unpack(uint32_t x) {
        float2 y;
        asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
            : "=f"(y.x), "=f"(y.y)
            : "r"(x));
        return y;
    }
    static DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

struct BF16 {
    static constexpr uint32_t exponents = 0x7f807f80u;
    static constexpr uint32_t e4m3_shift = 4;
    // Times 2^120.
    static DEVICE uint32_t times_e4m3_bias(uint32_t x) {
        uint32_t y;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(0x7b807b80u), "r"(0x80008000u));
        return y;
    }
    static DEVICE uint32_t pack(float low, float high) {
        uint32_t x;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
        return x;
    }
    static DEVICE float2 unpack(uint32_t x) {
        return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
    }
    static DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

#endif
