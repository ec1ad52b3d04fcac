// The exact softmax over n sets of keys, from the partial attention over each:
//
//     m = max_i lse_i     w_i = exp(lse_i - m)     out = Σ w_i out_i / Σ w_i     lse = m + ln Σ w_i
//
// in f32. A partial with lse = -inf counts for nothing, whatever its output holds; a NaN stays in its row. Each element is read once, by the thread
// that writes it, so that `out` may be one of the partials.
#include "include/eight.cuh"

struct F32 {};

// Eight elements, or one.
template <class Element>
DEVICE void read8(const void* tensor, uint64_t at, float (&to)[8]) {
    unpack8<Element>(load(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(tensor) + at)), to);
}
template <>
DEVICE void read8<F32>(const void* tensor, uint64_t at, float (&to)[8]) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(tensor) + at);
    const float4 low = load(from), high = load(from + 1);
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}
template <class Element>
DEVICE float read1(const void* tensor, uint64_t at) {
    return Element::unpack(load(static_cast<const uint16_t*>(tensor) + at)).x;
}
template <>
DEVICE float read1<F32>(const void* tensor, uint64_t at) {
    return load(static_cast<const float*>(tensor) + at);
}
template <class Element>
DEVICE void write8(void* tensor, uint64_t at, const float (&x)[8]) {
    store(reinterpret_cast<uint4*>(static_cast<uint16_t*>(tensor) + at), pack8<Element>(x));
}
template <>
DEVICE void write8<F32>(void* tensor, uint64_t at, const float (&x)[8]) {
    float4* to = reinterpret_cast<float4*>(static_cast<float*>(tensor) + at);
    store(to, float4{x[0], x[1], x[2], x[3]});
    store(to + 1, float4{x[4], x[5], x[6], x[7]});
}
template <class Element>
DEVICE void write1(void* tensor, uint64_t at, float x) {
    store(static_cast<uint16_t*>(tensor) + at, static_cast<uint16_t>(Element::pack(x, x)));
}
template <>
DEVICE void write1<F32>(void* tensor, uint64_t at, float x) {
    store(static_cast<float*>(tensor) + at, x);
}

DEVICE float maximum(float a, float b) { return a > b || a != a ? a : b; }

// The lanes of a row divide its elements, `Unit` at a time.
template <class In, class Out, int Unit>
DEVICE void merge(const StarMergeParams& p) {
    const uint64_t thread = static_cast<uint64_t>(block_index()) * THREADS + thread_index();
    const uint32_t lane = thread % p.lanes;
    const uint64_t rows = static_cast<uint64_t>(p.batch) * p.seq * p.heads;
    const uint64_t row = thread / p.lanes;
    const bool within = row < rows;
    const uint32_t head = row % p.heads;
    const uint32_t seq = row / p.heads % p.seq;
    const uint32_t batch = row / p.heads / p.seq;
    const uint64_t lse_at = (static_cast<uint64_t>(batch) * p.heads + head) * p.seq + seq;
    const float* lse = reinterpret_cast<const float*>(p.partials_lse) + lse_at;

    float max = -infinity(), sum = 0;
    if (within) {
        for (uint32_t i = 0; i < p.n; i++) {
            max = maximum(max, load(lse + i * p.lse_stride));
        }
        const uint64_t first = batch * p.partials.batch + seq * p.partials.seq + head * p.partials.head;
        const uint64_t step = p.batch * p.partials.batch;
        const uint64_t out = batch * p.out.batch + seq * p.out.seq + head * p.out.head;
        const void* from = reinterpret_cast<const void*>(p.partials.data);
        void* to = reinterpret_cast<void*>(p.out.data);
        for (uint32_t column = lane * Unit; column < p.dim; column += p.lanes * Unit) {
            float total[Unit] = {};
            sum = 0;
#pragma unroll 4
            for (uint32_t i = 0; i < p.n; i++) {
                const float partial_lse = load(lse + i * p.lse_stride);
                if (partial_lse != -infinity()) {
                    const float weight = exp_accurate(partial_lse - max);
                    sum += weight;
                    if constexpr (Unit == 8) {
                        float x[8];
                        read8<In>(from, first + i * step + column, x);
#pragma unroll
                        for (int c = 0; c < 8; c++) {
                            total[c] += weight * x[c];
                        }
                    } else {
                        total[0] += weight * read1<In>(from, first + i * step + column);
                    }
                }
            }
            const float scale = max == -infinity() ? 0 : 1 / sum;
#pragma unroll
            for (int c = 0; c < Unit; c++) {
                total[c] *= scale;
            }
            if constexpr (Unit == 8) {
                write8<Out>(to, out + column, total);
            } else {
                write1<Out>(to, out + column, total[0]);
            }
        }
    }
    // The row's log-sum-exp may take the place of one that its other lanes still read.
    sync_warp();
    if (within && lane == 0 && p.lse != 0) {
        store(reinterpret_cast<float*>(p.lse) + lse_at, max == -infinity() ? max : max + log_accurate(sum));
    }
}

// Rows at multiples of 16 bytes, or any.
#define MERGE(in, In, out, Out)                                                                      \
    KERNEL(merge_##in##_##out, StarMergeParams, THREADS) { merge<In, Out, 8>(p); }                   \
    KERNEL(merge_##in##_##out##_unaligned, StarMergeParams, THREADS) { merge<In, Out, 1>(p); }

MERGE(f32, F32, f32, F32)
MERGE(f32, F32, f16, F16)
MERGE(f32, F32, bf16, BF16)
MERGE(f16, F16, f32, F32)
MERGE(f16, F16, f16, F16)
MERGE(bf16, BF16, f32, F32)
MERGE(bf16, BF16, bf16, BF16)
