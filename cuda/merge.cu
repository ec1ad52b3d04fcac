// The exact softmax over n sets of keys, from the partial attention over each:
//
//     m = max_i lse_i     w_i = exp(lse_i - m)     out = Σ w_i out_i / Σ w_i     lse = m + ln Σ w_i
//
// in f32. A partial with lse = -inf counts for nothing, whatever its output holds; a NaN stays in
// its row, and lse = +inf makes its row NaN. Each element is read once, by the thread that writes it, so that `out` may be one of the
// partials.
//
// A row's sink is one more lse_i, of a partial whose output is 0.
#include "include/eight.cuh"

struct F32 {};

// `Unit` elements: eight, 16 or 32 bytes, or one. Those of partials are read once.
template <class Element, int Unit>
struct Piece {
    uint4 words;
    DEVICE void read(const void* tensor, uint64_t at) {
        words = load_once(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(tensor) + at));
    }
    DEVICE void unpack(float (&to)[8]) const { unpack8<Element>(words, to); }
    static DEVICE void write(void* tensor, uint64_t at, const float (&x)[8]) {
        store(reinterpret_cast<uint4*>(static_cast<uint16_t*>(tensor) + at), pack8<Element>(x));
    }
};
template <class Element>
struct Piece<Element, 1> {
    uint16_t bits;
    DEVICE void read(const void* tensor, uint64_t at) { bits = load_once(static_cast<const uint16_t*>(tensor) + at); }
    DEVICE void unpack(float (&to)[1]) const { to[0] = Element::unpack(bits).x; }
    static DEVICE void write(void* tensor, uint64_t at, const float (&x)[1]) {
        store(static_cast<uint16_t*>(tensor) + at, static_cast<uint16_t>(Element::pack(x[0], x[0])));
    }
};
template <>
struct Piece<F32, 8> {
    float4 low, high;
    DEVICE void read(const void* tensor, uint64_t at) {
        const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(tensor) + at);
        low = load_once(from);
        high = load_once(from + 1);
    }
    DEVICE void unpack(float (&to)[8]) const { unpack8(low, high, to); }
    static DEVICE void write(void* tensor, uint64_t at, const float (&x)[8]) {
        write8(static_cast<float*>(tensor) + at, x);
    }
};
template <>
struct Piece<F32, 1> {
    float x;
    DEVICE void read(const void* tensor, uint64_t at) { x = load_once(static_cast<const float*>(tensor) + at); }
    DEVICE void unpack(float (&to)[1]) const { to[0] = x; }
    static DEVICE void write(void* tensor, uint64_t at, const float (&x)[1]) {
        store(static_cast<float*>(tensor) + at, x[0]);
    }
};

DEVICE float maximum(float a, float b) { return a > b || a != a ? a : b; }

// Partials that are on their way at the same time: 128 bytes of f32 a thread.
constexpr uint32_t together = 4;

// The lanes of a row divide its elements, `Unit` at a time.
template <class In, class Out, int Unit>
DEVICE void merge(const StarMergeParams& p) {
    const uint32_t lane = thread_index() % p.lanes;
    const uint32_t row = block_index() * (THREADS / p.lanes) + thread_index() / p.lanes;
    bool within = row < p.rows;
    if (within && p.merged != 0) {
        within = refer(reinterpret_cast<const StarMergedRow*>(p.merged) + row).count != 0;
    }

    float sink = -infinity(), max = sink, sum = 0;
    uint64_t lse_at = 0;
    if (within) {
        uint32_t batch, seq, head, partial = 0, n = p.n;
        if (p.merged != 0) {
            const StarMergedRow& merged = refer(reinterpret_cast<const StarMergedRow*>(p.merged) + row);
            batch = merged.batch, seq = merged.row, head = merged.head;
            partial = merged.first, n = merged.count;
        } else {
            const uint32_t token = row / p.heads;
            batch = token / p.seq, seq = token % p.seq, head = row % p.heads;
        }
        lse_at = (static_cast<uint64_t>(batch) * p.heads + head) * p.seq + seq;
        const uint64_t first = p.merged != 0
                                   ? partial * p.partial_stride
                                   : batch * p.partials.batch + seq * p.partials.seq + head * p.partials.head;
        const float* lse =
            reinterpret_cast<const float*>(p.partials_lse) + (p.merged != 0 ? partial * p.lse_stride : lse_at);
        if (p.sinks != 0) {
            const uint64_t its_head = (p.sink_first + lse_at) / p.sink_seq % p.sink_heads;
            max = sink = load(reinterpret_cast<const float*>(p.sinks) + its_head);
        }
#pragma unroll 4
        for (uint32_t i = 0; i < n; i++) {
            const float* its_lse = p.separate ? reinterpret_cast<const float*>(p.each[i].lse) + lse_at : lse + i * p.lse_stride;
            max = maximum(max, load(its_lse));
        }
        const uint64_t out = batch * p.out.batch + seq * p.out.seq + head * p.out.head;
        void* to = reinterpret_cast<void*>(p.out.data);
        for (uint32_t column = lane * Unit; column < p.dim; column += p.lanes * Unit) {
            // -0 is the sum of nothing: a single partial keeps the signs of its zeros.
            float total[Unit];
#pragma unroll
            for (int c = 0; c < Unit; c++) {
                total[c] = sink == -infinity() ? -0.0f : 0.0f;
            }
            sum = sink == -infinity() ? 0.0f : exp_accurate(sink - max);
            const void* from = reinterpret_cast<const void*>(p.partials.data);
            uint64_t at = first + column;
            const float* its_lse = lse;
            for (uint32_t left = n; left > 0; left -= left < together ? left : together) {
                float lses[together];
                Piece<In, Unit> pieces[together];
#pragma unroll
                for (uint32_t i = 0; i < together; i++) {
                    lses[i] = -infinity();
                    if (i < left) {
                        if (p.separate) {
                            const StarPartial& its = p.each[n - left + i];
                            from = reinterpret_cast<const void*>(its.out.data);
                            at = batch * its.out.batch + seq * its.out.seq + head * its.out.head + column;
                            its_lse = reinterpret_cast<const float*>(its.lse) + lse_at;
                        }
                        lses[i] = load(its_lse);
                        pieces[i].read(from, at);
                    }
                    its_lse += p.lse_stride;
                    at += p.partial_stride;
                }
#pragma unroll
                for (uint32_t i = 0; i < together; i++) {
                    if (lses[i] != -infinity()) {
                        const float weight = exp_accurate(lses[i] - max);
                        sum += weight;
                        float x[Unit];
                        pieces[i].unpack(x);
#pragma unroll
                        for (int c = 0; c < Unit; c++) {
                            total[c] += weight * x[c];
                        }
                    }
                }
            }
            const float scale = 1 / sum;
#pragma unroll
            for (int c = 0; c < Unit; c++) {
                total[c] = max == -infinity() ? 0.0f : total[c] * scale;
            }
            Piece<Out, Unit>::write(to, out + column, total);
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
