// What a block's threads must know of its list of keys, in shared memory: in registers it would
// displace accumulators, and the cache is far.
#pragma once

#include "device.cuh"

template <class P>
struct SharedList {
    // The list's ends: its end, where what is contiguous ends, the anchor, and the distance from an
    // entry behind the anchor to its key.
    static constexpr Shared ends_at = 0;
    // Where the border is, up to where a window hides entries from some row, whether anything is
    // hidden, and the tile's `hidden`.
    static constexpr Shared border_at = 16;
    static constexpr Shared left_end_at = 24;
    static constexpr Shared hides_at = 28;
    static constexpr Shared hidden_at = 32;
    // Of each row.
    static constexpr Shared limits_at = 48;
    // Of each thread that copies: two addresses, and whether it has zeroed a value.
    static constexpr Shared sources_at = limits_at + 4 * P::rows;
    static constexpr Shared cleared_from = sources_at + 2 * 8 * P::copy_threads;
    static constexpr Shared tokens_at = cleared_from + 4 * P::copy_threads;
    static_assert(tokens_at + P::rows <= P::list_bytes, "");

    Shared shared_list;

    DEVICE explicit SharedList(Shared at) : shared_list(at) {}

    // Tells all, after a barrier, which tiles are the border: those that begin before `left_end` or
    // reach beyond `open`.
    DEVICE void store_border(const StarTile& tile, uint32_t left_end, uint32_t open) const {
        const uint32_t inside = left_end + P::keys;
        // Where no tile is inside, all are further from this first than 0.
        const bool none = open < inside;
        shared_store(shared_list + border_at, none ? 1u << 31 : left_end);
        shared_store(shared_list + border_at + 4, none ? 0u : open - inside);
        shared_store(shared_list + left_end_at, left_end);
        shared_store(shared_list + hidden_at, static_cast<uint32_t>(tile.hidden));
        shared_store(shared_list + hides_at, left_end != 0 || open != tile.end ? 1u : 0u);
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
    // Whether the mask hides anything. Where it does not, the end of the keys alone makes the
    // border, and every row sees all of them.
    DEVICE bool hides() const { return shared_load4(shared_list + hides_at) != 0; }
};
