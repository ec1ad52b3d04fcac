// Tiles of keys and values from global to shared memory, by asynchronous copies of the threads that
// share them.
#pragma once

#include "keys.cuh"
#include "list.cuh"
#include "shared_tile.cuh"

template <class P>
struct TileCopies : SharedList<P> {
    using List = SharedList<P>;
    using List::shared_list;
    template <bool Values>
    static constexpr int dim = Values ? P::value_dim : P::head_dim;
    template <bool Values>
    using Stored = typename P::template TileOf<Values ? P::value_dim : P::head_dim>;
    // Eight lanes copy a line of 128 bytes (fewer where a row is no multiple of that).
    template <bool Values>
    static constexpr int lanes = Stored<Values>::lanes;
    template <bool Values>
    static constexpr int row_step = P::team / lanes<Values>;
    static_assert(P::keys % row_step<false> == 0 && P::keys % row_step<true> == 0, "");

    // Ends of what is contiguous, less than a tile of keys: of a list in pages, of one with a
    // prefix or of blocks, and of any list whose rows are shorter than a tile's.
    static constexpr uint32_t paged = 0;
    static constexpr uint32_t scattered = 1;
    static constexpr uint32_t narrow = 2;

    const KeyList<P::stored_bytes>& list;

    // The list is of the whole block.
    DEVICE TileCopies(const KeyList<P::stored_bytes>& list, Shared shared_list) : List(shared_list), list(list) {}

    template <bool Values>
    static DEVICE uint32_t lane() {
        return thread_index() % P::team % lanes<Values>;
    }
    // Rounds of lanes over the chunks of a row, and whether the lane has one in a round.
    template <bool Values>
    static constexpr int rounds = (Stored<Values>::chunks + lanes<Values> - 1) / lanes<Values>;
    template <bool Values>
    static DEVICE bool has_chunk(int round) {
        return Stored<Values>::chunks % lanes<Values> == 0 || lane<Values>() + round * lanes<Values> < Stored<Values>::chunks;
    }
    template <bool Values>
    static DEVICE uint32_t row() {
        return thread_index() % P::team / lanes<Values>;
    }

    // The place of this thread's address of keys or values.
    template <bool Values>
    DEVICE Shared source_at() const {
        return shared_list + List::sources_at + Values * 8 * P::copy_threads + thread_index() * 8;
    }

    // Stores the list's ends and shift, for all to use after a barrier, and where this thread's
    // part of entry `row` is. All threads that copy do so, thread 0 among them.
    DEVICE void store_list() const {
        const StarTile& tile = list.tile;
        if (thread_index() == 0) {
            const bool is_narrow = list.template dim<false>() < P::head_dim || list.template dim<true>() < P::value_dim;
            const uint32_t contiguous_end = is_narrow                                ? narrow
                                            : tile.prefix_len + tile.ranges != 0 ? scattered
                                            : list.p.page_table == 0         ? tile.end
                                                                             : paged;
            const uint4 ends{tile.end, contiguous_end, tile.anchor, tile.start - tile.anchor};
            shared_store(shared_list + List::ends_at, ends);
        }
        shared_store(List::cleared_at(), 0u);
        if (list.p.page_table == 0) {
            shared_store(source_at<false>(), first_source<false>(list.p.key));
            shared_store(source_at<true>(), first_source<true>(list.p.value));
        }
    }
    template <bool Values>
    DEVICE uint64_t first_source(const StarTensor& from) const {
        const uint64_t key = list.tile.key_start + row<Values>();
        return reinterpret_cast<uint64_t>(list.template at_row<Values>(from, list.tile.key_batch, key)) + lane<Values>() * 16;
    }

    // Starts the copies of the tile at `first`; none if nothing is left.
    template <bool Values>
    DEVICE void copy_tile(Shared slot, uint32_t first) const {
        const StarTensor& from = Values ? list.p.value : list.p.key;
        const uint4 ends = shared_load16(shared_list + List::ends_at);
        const uint32_t end = ends.x, contiguous_end = ends.y, anchor = ends.z, shift = ends.w;
        const uint32_t next = first + P::keys;
        if (next <= contiguous_end && (first >= anchor || next <= anchor)) {
            const uint64_t key = first + (first >= anchor ? shift : 0);
            copy_uniform<Values>(slot, shared_load8(source_at<Values>()) + P::stored_bytes * key * from.seq,
                                 P::stored_bytes * row_step<Values> * from.seq);
        } else if (first < end) {
            if (contiguous_end == scattered) {
                copy_scattered<Values>(slot, first, end);
            } else if (contiguous_end == narrow) {
                copy_narrow<Values>(slot, first, end);
            } else {
                copy_each<Values>(slot, first, end, contiguous_end == paged);
            }
        }
    }

    // Rows at equal distances.
    template <bool Values>
    DEVICE void copy_uniform(Shared to, uint64_t source, uint64_t step) const {
        using Tile = Stored<Values>;
        constexpr int lanes = Tile::lanes, row_step = TileCopies::row_step<Values>;
        // After eight rows the chunks have the same order again, and after `lanes` chunks the same
        // places.
        constexpr int orders = row_step < 8 && Tile::orders > 1 ? 8 / row_step : 1;
        Shared places[orders];
#pragma unroll
        for (int i = 0; i < orders; i++) {
            places[i] = Tile::at(to, row<Values>() + i * row_step, lane<Values>());
        }
#pragma unroll
        for (int i = 0; i < P::keys / row_step; i++) {
#pragma unroll
            for (int c = 0; c < rounds<Values>; c++) {
                if (!has_chunk<Values>(c)) {
                    continue;
                }
                const int further = (i - i % orders) * row_step * Tile::row_bytes + c * Tile::round_bytes;
                copy_async(places[i % orders] + further, reinterpret_cast<const uint8_t*>(source) + c * lanes * 16, false);
            }
            source += step;
        }
    }

    // Each entry by itself; those from the end on become zeros. `paged` as in KeyList::row. The
    // list has no prefix.
    template <bool Values>
    DEVICE void copy_each(Shared to, uint32_t first, uint32_t end, bool paged) const {
#pragma unroll 1
        for (uint32_t r = row<Values>(); r < P::keys; r += row_step<Values>) {
            const bool beyond = first + r >= end;
            copy_row<Values>(to, r, list.template main_row<Values>(list.key(beyond ? first : first + r), paged), beyond);
        }
    }

    // The same for a list with a prefix or of blocks. Whole tiles of the prefix, of a range, and of
    // contiguous rows are rows at equal distances. Nothing in here is computed ahead for the steps
    // of other lists.
    template <bool Values>
    DEVICE void copy_scattered(Shared to, uint32_t first, uint32_t end) const {
        to = opaque(to), first = opaque(first);
        const uint32_t begin = opaque(row<Values>()), next = first + P::keys;
        const bool paged = list.p.page_table != 0;
        const uint32_t prefix = list.tile.prefix_len;
        const uint32_t low = list.any_key(first), high = list.any_key(next - 1);
        const bool one_source = high < prefix || (low >= prefix && !paged);
        if (next <= end && high - low == P::keys - 1 && one_source) {
            const StarTensor& from = high < prefix ? (Values ? list.p.prefix_value : list.p.prefix_key)
                                                   : (Values ? list.p.value : list.p.key);
            const uint8_t* source = list.template row<Values>(first + begin, false);
            const uint64_t step = P::stored_bytes * row_step<Values> * from.seq;
#pragma unroll 1
            for (uint32_t r = begin; r < P::keys; r += row_step<Values>, source += step) {
                copy_row<Values>(to, r, source, false);
            }
        } else {
#pragma unroll 1
            for (uint32_t r = begin; r < P::keys; r += row_step<Values>) {
                const bool beyond = first + r >= end;
                copy_row<Values>(to, r, list.template row<Values>(beyond ? first : first + r, paged), beyond);
            }
        }
    }

    // Rows of fewer chunks than the tile has, chunk by chunk: what they lack becomes zeros.
    template <bool Values>
    DEVICE void copy_narrow(Shared to, uint32_t first, uint32_t end) const {
        to = opaque(to), first = opaque(first);
#pragma unroll 1
        for (uint32_t r = opaque(row<Values>()); r < P::keys; r += row_step<Values>) {
#pragma unroll 1
            for (uint32_t chunk = opaque(lane<Values>()); chunk < Stored<Values>::chunks; chunk += lanes<Values>) {
                const bool beyond = first + r >= end || chunk * 16 >= P::stored_bytes * list.template dim<Values>();
                const uint8_t* from = list.template row<Values>(beyond ? first : first + r, list.p.page_table != 0);
                copy_async(Stored<Values>::at(to, r, chunk), from + (beyond ? 0 : chunk * 16), beyond);
            }
        }
    }

    // This thread's part of a tile's row, or zeros.
    template <bool Values>
    DEVICE void copy_row(Shared to, uint32_t r, const uint8_t* from, bool zeros) const {
#pragma unroll
        for (int c = 0; c < rounds<Values>; c++) {
            const uint32_t chunk = lane<Values>() + c * lanes<Values>;
            if (has_chunk<Values>(c)) {
                copy_async(Stored<Values>::at(to, r, chunk), from + chunk * 16, zeros);
            }
        }
    }

    // Each thread widens what it copied itself, which it sees before the others do. Values that are
    // not finite become zeros if told so.
    template <bool Values, class Element>
    DEVICE void widen(Shared slot, Shared to, bool zeros) const {
        using From = Stored<Values>;
        using To = SharedTile<dim<Values>>;
#pragma unroll 1
        for (uint32_t r = row<Values>(); r < P::keys; r += row_step<Values>) {
#pragma unroll
            for (int c = 0; c < rounds<Values>; c++) {
                const uint32_t chunk = lane<Values>() + c * lanes<Values>;
                if (!has_chunk<Values>(c)) {
                    continue;
                }
                const uint4 x = shared_load16(From::at(slot, r, chunk));
                const uint2 low{x.x, x.y}, high{x.z, x.w};
                uint4 first = widen8<Element>(low), second = widen8<Element>(high);
                if ((nan_codes(x.x) | nan_codes(x.y) | nan_codes(x.z) | nan_codes(x.w)) != 0) {
                    first = with_nan(first, nan8(low), zeros);
                    second = with_nan(second, nan8(high), zeros);
                    if (zeros) {
                        shared_store(List::cleared_at(), 1u);
                    }
                }
                shared_store(To::at(to, r, 2 * chunk), first);
                shared_store(To::at(to, r, 2 * chunk + 1), second);
            }
        }
    }
    static DEVICE uint4 with_nan(const uint4& x, const uint4& nan, bool zeros) {
        return zeros ? uint4{x.x & ~nan.x, x.y & ~nan.y, x.z & ~nan.z, x.w & ~nan.w}
                     : uint4{x.x | nan.x, x.y | nan.y, x.z | nan.z, x.w | nan.w};
    }

    // Zeroes what is not finite among the values that this thread copied to a tile of the border:
    // it waited for them, and sees them before the others do.
    template <class Element>
    DEVICE void clear_values(Shared slot) const {
        using Tile = Stored<true>;
#pragma unroll 1
        for (uint32_t r = row<true>(); r < P::keys; r += row_step<true>) {
#pragma unroll 1
            for (int c = 0; c < rounds<true>; c++) {
                if (!has_chunk<true>(c)) {
                    continue;
                }
                const Shared at = Tile::at(slot, r, lane<true>() + c * lanes<true>);
                const uint4 x = shared_load16(at);
                const uint4 special = not_finite8<Element>(x);
                if (any_bit(special)) {
                    shared_store(at, uint4{x.x & ~special.x, x.y & ~special.y, x.z & ~special.z, x.w & ~special.w});
                    shared_store(List::cleared_at(), 1u);
                }
            }
        }
    }
};
