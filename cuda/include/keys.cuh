// From the entries of a tile's list to rows of keys and values in global memory.
#pragma once

#include "e4m3.cuh"

// The keys and values of a tile's list, of `Bytes` for each element: the first perhaps in the
// prefix tensors, the others contiguous or in pages.
template <int Bytes>
struct KeyList {
    const StarFlashParams& p;
    const StarTile& tile;
    uint32_t kv_head;
    // The block's first column of values and outputs.
    uint32_t first_column;

    // The sequence's key that an entry is.
    DEVICE uint32_t key(uint32_t entry) const {
        return entry < tile.anchor ? entry : tile.start + (entry - tile.anchor);
    }

    // The range of a block list that an entry is in: the last one that begins at it or before.
    DEVICE uint32_t range_of(uint32_t entry) const {
        uint32_t low = 0, high = tile.ranges;
        while (high - low > 1) {
            const uint32_t middle = (low + high) / 2;
            if (range(middle).entry <= entry) {
                low = middle;
            } else {
                high = middle;
            }
        }
        return low;
    }
    DEVICE const StarRange& range(uint32_t index) const {
        return refer(reinterpret_cast<const StarRange*>(p.ranges) + tile.first_range + index);
    }

    // The same, also of block lists.
    DEVICE uint32_t any_key(uint32_t entry) const {
        if (tile.ranges == 0) {
            return key(entry);
        }
        const StarRange& own = range(range_of(entry));
        return own.key + (entry - own.entry);
    }

    // `paged`: whether there is a page table. The caller says so, because the compiler tests a
    // parameter in every step, also in those that need no page.
    template <bool Values>
    DEVICE const uint8_t* row(uint32_t entry, bool paged) const {
        const uint32_t at = any_key(entry);
        if (at < tile.prefix_len) {
            const StarTensor& from = Values ? p.prefix_value : p.prefix_key;
            return at_row<Values>(from, tile.prefix_batch, tile.prefix_start + at);
        }
        return main_row<Values>(at - tile.prefix_len, paged);
    }

    // Of key `at` of those after the prefix.
    template <bool Values>
    DEVICE const uint8_t* main_row(uint32_t at, bool paged) const {
        uint32_t key = tile.key_start + at;
        uint64_t batch = tile.key_batch;
        if (paged) {
            const uint64_t product = static_cast<uint64_t>(2 * key) * p.page_magic;
            const uint32_t page = static_cast<uint32_t>(product >> 32) >> p.page_shift;
            batch = load(reinterpret_cast<const uint32_t*>(p.page_table) + batch + page);
            key -= page * p.page_len;
        }
        return at_row<Values>(Values ? p.value : p.key, batch, key);
    }

    template <bool Values>
    DEVICE const uint8_t* at_row(const StarTensor& tensor, uint64_t batch, uint64_t row) const {
        const uint64_t offset = batch * tensor.batch + row * tensor.seq + kv_head * tensor.head;
        return reinterpret_cast<const uint8_t*>(tensor.data) + Bytes * (offset + (Values ? first_column : 0));
    }

    // Elements of a row of keys, and of the block's columns of values.
    template <bool Values>
    DEVICE uint32_t dim() const {
        return Values ? p.value_dim - first_column : p.head_dim;
    }

    // Eight values of an entry, from a column of the block's on.
    template <class Element>
    DEVICE uint4 values8(uint32_t entry, bool paged, uint32_t column) const {
        const uint8_t* from = row<true>(entry, paged) + Bytes * column;
        return Bytes == 2 ? load(reinterpret_cast<const uint4*>(from))
                          : widen8_with_nan<Element>(load(reinterpret_cast<const uint2*>(from)));
    }
};
