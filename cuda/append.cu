// New keys and values to their places in a shard, contiguous or in pages. Keys are rotated on the way where asked (RoPE):
//
//     (x, y) → (x cos - y sin, x sin + y cos)
//
// for the pairs (2 i, 2 i + 1), or (i, i + rotated / 2), at the angle of the row's position and i. In f32, rounded once.
#include "include/eight.cuh"

DEVICE const uint4* row_of(const StarTensor& tensor, uint64_t batch, uint64_t seq, uint64_t head) {
    const uint64_t offset = batch * tensor.batch + seq * tensor.seq + head * tensor.head;
    return reinterpret_cast<const uint4*>(reinterpret_cast<const uint16_t*>(tensor.data) + offset);
}

// One thread moves eight dims of a key and of a value.
template <class Element>
DEVICE void append(const StarAppendParams& p) {
    const uint64_t thread = static_cast<uint64_t>(block_index()) * THREADS + thread_index();
    const uint32_t chunks = p.dim / 8;
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
    uint4* to_key = const_cast<uint4*>(row_of(p.shard_key, page, row, head)) + chunk;
    uint4* to_value = const_cast<uint4*>(row_of(p.shard_value, page, row, head)) + chunk;
    store(to_value, load(row_of(p.value, batch, seq, head) + chunk));

    const uint4* key = row_of(p.key, batch, seq, head);
    const uint4 own = load(key + chunk);
    if (chunk * 8 >= p.rotated) {
        store(to_key, own);
        return;
    }
    const uint32_t half = p.rotated / 2;
    const float* cos = reinterpret_cast<const float*>(p.cos) + static_cast<uint64_t>(position) * half;
    const float* sin = reinterpret_cast<const float*>(p.sin) + static_cast<uint64_t>(position) * half;
    float x[8], rotated[8];
    unpack8<Element>(own, x);
    if (p.interleaved) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float c = load(cos + chunk * 4 + i), s = load(sin + chunk * 4 + i);
            rotated[2 * i] = x[2 * i] * c - x[2 * i + 1] * s;
            rotated[2 * i + 1] = x[2 * i] * s + x[2 * i + 1] * c;
        }
    } else {
        const bool first = chunk * 8 < half;
        float other[8];
        unpack8<Element>(load(key + (first ? chunk + half / 8 : chunk - half / 8)), other);
        const uint32_t angle = first ? chunk * 8 : chunk * 8 - half;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float c = load(cos + angle + i), s = load(sin + angle + i);
            rotated[i] = first ? x[i] * c - other[i] * s : other[i] * s + x[i] * c;
        }
    }
    store(to_key, pack8<Element>(rotated));
}

KERNEL(append_f16, StarAppendParams, THREADS) { append<F16>(p); }
KERNEL(append_bf16, StarAppendParams, THREADS) { append<BF16>(p); }
