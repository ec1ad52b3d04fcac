// From the entries of a tile's list to rows of keys and values, and from there through a ring of
// slots in shared memory.
#pragma once

#include "e4m3.cuh"
#include "shared_tile.cuh"

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

// Tiles of keys and values, in turn K, V, K, V: always slots - 1 of them are loaded or on their
// way.
//
// What a step must know of the list is in shared memory: in registers it would displace
// accumulators, and the cache is far.
//
// fp8 elements are copied to the slots as they are, and widened to one more tile when it is
// their turn, by the threads that copied them.
template <class P>
struct Ring {
    static constexpr bool widens = P::stored_bytes == 1;
    template <bool Values>
    static constexpr int dim = Values ? P::value_dim : P::head_dim;
    template <bool Values>
    using Stored = StoredTile<dim<Values>, P::stored_bytes>;
    // Eight lanes copy a line of 128 bytes (fewer where a row is no multiple of that).
    template <bool Values>
    static constexpr int lanes = Stored<Values>::lanes;
    template <bool Values>
    static constexpr int row_step = P::team / lanes<Values>;
    static_assert(P::keys % row_step<false> == 0 && P::keys % row_step<true> == 0 && P::slots >= 2, "");

    static constexpr uint32_t entry_step = P::keys * P::key_warps;
    // After the list's ends: where the border is, up to where a window hides entries from some row,
    // whether anything is hidden, and the tile's `hidden`.
    static constexpr Shared border_at = 16;
    static constexpr Shared left_end_at = 24;
    static constexpr Shared hides_at = 28;
    static constexpr Shared hidden_at = 32;
    static constexpr Shared limits_at = 48;
    static constexpr Shared sources_at = limits_at + 4 * P::rows;
    static constexpr Shared cleared_from = sources_at + 2 * 8 * P::threads;
    static constexpr Shared tokens_at = cleared_from + 4 * P::threads;
    static_assert(tokens_at + P::rows <= P::list_bytes, "");

    // Ends of what is contiguous, less than a tile of keys: of a list in pages, of one with a
    // prefix or of blocks, and of any list whose rows are shorter than a tile's.
    static constexpr uint32_t paged = 0;
    static constexpr uint32_t scattered = 1;
    static constexpr uint32_t narrow = 2;

    const KeyList<P::stored_bytes>& list;
    Shared shared_list;
    Shared slots;
    // Whether values that are widened next are of the border.
    bool clears = false;
    // Counted only where there are more slots than one for keys and one for values.
    uint32_t read_slot = 0;
    uint32_t load_slot = 0;

    // `shared_list` is of the whole block, `slots` of a team.
    DEVICE Ring(const KeyList<P::stored_bytes>& list, Shared shared_list, Shared slots)
        : list(list), shared_list(shared_list), slots(slots) {}

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
        return shared_list + sources_at + Values * 8 * P::threads + thread_index() * 8;
    }

    // Stores the list's ends and shift, for all to use after a barrier, and where this thread's
    // part of entry `row` is.
    DEVICE void store_list() const {
        const StarTile& tile = list.tile;
        if (thread_index() == 0) {
            const bool is_narrow = list.template dim<false>() < P::head_dim || list.template dim<true>() < P::value_dim;
            const uint32_t contiguous_end = is_narrow                                ? narrow
                                            : tile.prefix_len + tile.ranges != 0 ? scattered
                                            : list.p.page_table == 0         ? tile.end
                                                                             : paged;
            shared_store(shared_list, uint4{tile.end, contiguous_end, tile.anchor, tile.start - tile.anchor});
        }
        shared_store(cleared_at(), 0u);
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

    // Tells all, after a barrier, which tiles are the border: those that begin before `left_end` or
    // reach beyond `open`.
    DEVICE void store_border(uint32_t left_end, uint32_t open) const {
        const uint32_t inside = left_end + P::keys;
        // Where no tile is inside, all are further from this first than 0.
        const bool none = open < inside;
        shared_store(shared_list + border_at, none ? 1u << 31 : left_end);
        shared_store(shared_list + border_at + 4, none ? 0u : open - inside);
        shared_store(shared_list + left_end_at, left_end);
        shared_store(shared_list + hidden_at, static_cast<uint32_t>(list.tile.hidden));
        shared_store(shared_list + hides_at, left_end != 0 || open != list.tile.end ? 1u : 0u);
    }
    DEVICE bool is_border(uint32_t entry) const {
        return entry - shared_load4(shared_list + border_at) > shared_load4(shared_list + border_at + 4);
    }
    // Tells all the tokens of four rows from `row` on, in bytes, counted from the first row's.
    DEVICE void store_tokens(uint32_t row, uint32_t tokens) const {
        shared_store(shared_list + tokens_at + row, tokens);
    }
    // How many entries behind the anchor are hidden from the block's row.
    DEVICE uint32_t hidden(uint32_t row) const {
        const uint32_t tokens = shared_load4(shared_list + tokens_at + row / 4 * 4);
        const int token = static_cast<int>(tokens >> row % 4 * 8 & 255);
        const int hidden = static_cast<int>(shared_load4(shared_list + hidden_at)) + token;
        const int first = static_cast<int>(anchor());
        return hidden > first ? hidden - first : 0;
    }
    DEVICE uint32_t anchor() const { return shared_load4(shared_list + 8); }
    DEVICE uint32_t left_end() const { return shared_load4(shared_list + left_end_at); }

    DEVICE uint32_t end() const { return shared_load4(shared_list); }
    // The block's row sees the entries before this one.
    DEVICE uint32_t limit(uint32_t row) const { return shared_load4(limit_at(row)); }
    DEVICE Shared limit_at(uint32_t row) const { return shared_list + limits_at + row * 4; }
    // Whether this thread has zeroed a value.
    DEVICE bool cleared() const { return shared_load4(cleared_at()) != 0; }
    DEVICE Shared cleared_at() const { return shared_list + cleared_from + thread_index() * 4; }

    // The first slots - 1 tiles, from those at `entry` on.
    DEVICE void start(uint32_t entry) {
#pragma unroll
        for (int i = 0; i < P::slots - 1; i++) {
            i % 2 == 0 ? load_tile<false>(entry + i / 2 * entry_step) : load_tile<true>(entry + i / 2 * entry_step);
        }
    }

    // The keys or values at `entry`, the next in turn, once all of the team may read them; valid
    // until the next call.
    template <bool Values, class Element>
    DEVICE Shared next(uint32_t entry) {
        constexpr int ahead = Values + P::slots - 1;
        copy_wait<P::slots - 2>();
        sync_team();
        // Everyone is done with the tile before: its slot is free.
        load_tile<ahead % 2 == 1>(entry + ahead / 2 * entry_step);
        const Shared slot = take<Values>(read_slot);
        if (!widens) {
            return slot;
        }
        const Shared wide = slots + P::ring_bytes - P::wide_bytes;
        widen<Values, Element>(slot, wide);
        sync_team();
        return wide;
    }
    static DEVICE void sync_team() { P::team == 32 ? sync_warp() : sync_block(); }

    // Each thread widens what it copied itself, which it sees before the others do. Values that are
    // not finite become zeros where the ring clears them.
    template <bool Values, class Element>
    DEVICE void widen(Shared slot, Shared to) {
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
                    const bool zeros = Values && clears;
                    first = with_nan(first, nan8(low), zeros);
                    second = with_nan(second, nan8(high), zeros);
                    if (zeros) {
                        shared_store(cleared_at(), 1u);
                    }
                }
                shared_store(To::at(to, r, 2 * chunk), first);
                shared_store(To::at(to, r, 2 * chunk + 1), second);
            }
        }
        clears = Values ? false : clears;
    }
    static DEVICE uint4 with_nan(const uint4& x, const uint4& nan, bool zeros) {
        return zeros ? uint4{x.x & ~nan.x, x.y & ~nan.y, x.z & ~nan.z, x.w & ~nan.w}
                     : uint4{x.x | nan.x, x.y | nan.y, x.z | nan.z, x.w | nan.w};
    }

    // Before `next` gives values of the border: those that are not finite become zeros. Each thread
    // looks at what it copied itself, which it sees before the others do.
    template <class Element>
    DEVICE void clear_values() {
        if (widens) {
            clears = shared_load4(shared_list + hides_at) != 0;
            return;
        }
        using Tile = SharedTile<P::value_dim>;
        copy_wait<P::slots - 2>();
        // Where the mask hides nothing, the end of the keys alone makes the border, and every row
        // sees all of them.
        if (shared_load4(shared_list + hides_at) == 0) {
            return;
        }
        const Shared slot = slots + (P::slots == 2 ? P::key_slot_bytes : read_slot * P::key_slot_bytes);
#pragma unroll 1
        for (uint32_t r = row<true>(); r < P::keys; r += row_step<true>) {
#pragma unroll 1
            for (int c = 0; c < Tile::chunks / lanes<true>; c++) {
                const Shared at = Tile::at(slot, r, lane<true>() + c * lanes<true>);
                const uint4 x = shared_load16(at);
                const uint4 special = not_finite8<Element>(x);
                if (any_bit(special)) {
                    shared_store(at, uint4{x.x & ~special.x, x.y & ~special.y, x.z & ~special.z, x.w & ~special.w});
                    shared_store(cleared_at(), 1u);
                }
            }
        }
    }

    // A slot, and on to the one after it.
    template <bool Values>
    DEVICE Shared take(uint32_t& slot) const {
        if (P::slots == 2) {
            return slots + Values * P::key_slot_bytes;
        }
        const Shared taken = slots + slot * P::key_slot_bytes;
        slot = slot + 1 == P::slots ? 0 : slot + 1;
        return taken;
    }

    // A group of copies even where nothing is left, so that groups count tiles.
    template <bool Values>
    DEVICE void load_tile(uint32_t first) {
        const StarTensor& from = Values ? list.p.value : list.p.key;
        const Shared slot = take<Values>(load_slot);
        const uint4 ends = shared_load16(shared_list);
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
        copy_commit();
    }

    // Rows at equal distances.
    template <bool Values>
    DEVICE void copy_uniform(Shared to, uint64_t source, uint64_t step) const {
        using Tile = Stored<Values>;
        constexpr int lanes = Tile::lanes, row_step = Ring::row_step<Values>;
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
                const int further = (i - i % orders) * row_step * Tile::row_bytes + c * lanes * 16;
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
};
