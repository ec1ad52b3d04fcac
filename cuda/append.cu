// New keys and values to their places in a shard, contiguous or in pages. Keys are rotated on the
// way where asked (RoPE):
//
//     (x, y) → (x cos - y sin, x sin + y cos)
//
// for the pairs (2 i, 2 i + 1), or (i, i + rotated / 2), at the angle of the row's position and i.
// In f32, rounded once; to an fp8 shard after a division by the head's scale.
#include "include/e4m3.cuh"

// Eight elements as they lie in memory.
template <class Element>
struct Eight {
    using Words = uint4;
    static DEVICE void unpack(const uint4& x, float (&to)[8]) { unpack8<Element>(x, to); }
    static DEVICE uint4 pack(const float (&x)[8]) { return pack8<Element>(x); }
};
struct E4M3 {};
template <>
struct Eight<E4M3> {
    using Words = uint2;
    static DEVICE uint2 pack(const float (&x)[8]) { return narrow8(x); }
};

template <class Element>
DEVICE typename Eight<Element>::Words* row_of(const StarTensor& tensor, uint64_t batch, uint64_t seq, uint64_t head) {
    using Words = typename Eight<Element>::Words;
    const uint64_t offset = batch * tensor.batch + seq * tensor.seq + head * tensor.head;
    return reinterpret_cast<Words*>(tensor.data + offset * (sizeof(Words) / 8));
}

// Stores eight dims, to an fp8 shard divided by the head's scale.
template <class To>
DEVICE void store8(typename Eight<To>::Words* to, float (&x)[8], uint64_t scales, uint32_t step, uint32_t head) {
    if constexpr (sizeof(*to) == sizeof(uint2)) {
        const float scale = scale_of(scales, step, head);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x[i] /= scale;
        }
    }
    store(to, Eight<To>::pack(x));
}

// The dims from 8 `chunk` on of a key, rotated.
template <class From>
DEVICE void rotate(const StarAppendParams& p, const typename Eight<From>::Words* key, uint32_t chunk, uint32_t position,
                   float (&rotated)[8]) {
    const uint32_t half = p.rotated / 2;
    const float* cos = reinterpret_cast<const float*>(p.cos) + static_cast<uint64_t>(position) * half;
    const float* sin = reinterpret_cast<const float*>(p.sin) + static_cast<uint64_t>(position) * half;
    float x[8];
    Eight<From>::unpack(load(key + chunk), x);
    if (p.interleaved) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float c = load(cos + chunk * 4 + i), s = load(sin + chunk * 4 + i);
            rotated[2 * i] = x[2 * i] * c - x[2 * i + 1] * s;
            rotated[2 * i + 1] = x[2 * i] * s + x[2 * i + 1] * c;
        }
        return;
    }
    const bool first = chunk * 8 < half;
    float other[8];
    Eight<From>::unpack(load(key + (first ? chunk + half / 8 : chunk - half / 8)), other);
    const uint32_t angle = first ? chunk * 8 : chunk * 8 - half;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float c = load(cos + angle + i), s = load(sin + angle + i);
        rotated[i] = first ? x[i] * c - other[i] * s : other[i] * s + x[i] * c;
    }
}

// One thread moves eight dims of a key and of a value.
template <class From, class To>
DEVICE void append(const StarAppendParams& p) {
    const uint64_t thread = static_cast<uint64_t>(block_index()) * THREADS + thread_index();
    const uint32_t chunks = (p.dim > p.value_dim ? p.dim : p.value_dim) / 8;
    const uint32_t chunk = thread % chunks;
    const uint32_t head = thread / chunks % p.kv_heads;
    const uint64_t token = thread / chunks / p.kv_heads;
    if (token >= static_cast<uint64_t>(p.batch) * p.seq) {
        return;
    }
    const uint32_t place = load(reinterpret_cast<const uint32_t*>(p.places) + token);
    const uint32_t position = p.rotated == 0 ? 0 : load(reinterpret_cast<const uint32_t*>(p.positions) + token);
    if (place >= static_cast<uint64_t>(p.pages) * p.page_len || (p.rotated != 0 && position >= p.position_end)) {
        return;
    }
    const uint32_t batch = token / p.seq, seq = token % p.seq;
    const uint32_t page = place / p.page_len, row = place % p.page_len;
    const auto* key = row_of<From>(p.key, batch, seq, head);
    const auto* value = row_of<From>(p.value, batch, seq, head);
    auto* to_key = row_of<To>(p.shard_key, page, row, head) + chunk;
    auto* to_value = row_of<To>(p.shard_value, page, row, head) + chunk;
    const bool has_key = chunk * 8 < p.dim, has_value = chunk * 8 < p.value_dim;
    // Only rows that become narrower change their type.
    if constexpr (sizeof(*key) == sizeof(*to_key)) {
        if (has_value) {
            store(to_value, load(value + chunk));
        }
        if (has_key && chunk * 8 >= p.rotated) {
            store(to_key, load(key + chunk));
        }
    } else {
        float x[8];
        if (has_value) {
            Eight<From>::unpack(load(value + chunk), x);
            store8<To>(to_value, x, p.value_scales, p.value_scale_step, head);
        }
        if (has_key && chunk * 8 >= p.rotated) {
            Eight<From>::unpack(load(key + chunk), x);
            store8<To>(to_key, x, p.key_scales, p.key_scale_step, head);
        }
    }
    if constexpr (sizeof(typename Eight<From>::Words) == sizeof(uint4)) {
        if (has_key && chunk * 8 < p.rotated) {
            float rotated[8];
            rotate<From>(p, key, chunk, position, rotated);
            store8<To>(to_key, rotated, p.key_scales, p.key_scale_step, head);
        }
    }
}

KERNEL(append_f16, StarAppendParams, THREADS) { append<F16, F16>(p); }
KERNEL(append_bf16, StarAppendParams, THREADS) { append<BF16, BF16>(p); }
KERNEL(append_e4m3, StarAppendParams, THREADS) { append<E4M3, E4M3>(p); }
KERNEL(append_f16_e4m3, StarAppendParams, THREADS) { append<F16, E4M3>(p); }
KERNEL(append_bf16_e4m3, StarAppendParams, THREADS) { append<BF16, E4M3>(p); }
