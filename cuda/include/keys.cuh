// From the entries of a tile's list to rows of keys and values, and from there through a ring of slots in shared memory.
#pragma once

#include "shared_tile.cuh"

// The keys and values of a tile's list, contiguous or in pages.
struct KeyList {
    const StarFlashParams& p;
    const StarTile& tile;
    uint32_t kv_head;

    DEVICE const uint16_t* row(const StarTensor& tensor, uint32_t entry) const {
        uint32_t key = tile.key_start + (entry < tile.prefix ? entry : tile.start + (entry - tile.prefix));
        uint64_t batch = tile.batch;
        if (p.page_table != 0) {
            const uint32_t* pages = reinterpret_cast<const uint32_t*>(p.page_table);
            batch = load(pages + static_cast<uint64_t>(tile.sequence) * p.pages + (key >> p.page_len_log2));
            key &= (1u << p.page_len_log2) - 1;
        }
        const uint64_t offset = batch * tensor.batch + key * tensor.seq + kv_head * tensor.head;
        return reinterpret_cast<const uint16_t*>(tensor.data) + offset;
    }

    // Whether the entries from `first` to `end`, the last excluded, lie at equal distances.
    DEVICE bool uniform(uint32_t first, uint32_t end) const {
        return p.page_table == 0 && (first >= tile.prefix || end <= tile.prefix);
    }
};

// Tiles of keys and values, in turn K, V, K, V: always slots - 1 of them are loaded or on their way.
template <class P>
struct Ring {
    using Tile = SharedTile<P::head_dim>;
    // Eight lanes copy a line of 128 bytes (four where a row is no multiple of that).
    static constexpr int lanes = Tile::orders;
    static constexpr int row_step = P::team / lanes;
    static_assert(P::keys % row_step == 0 && P::slots >= 2, "");

    static constexpr uint32_t entry_step = P::keys * P::key_warps;

    const KeyList& list;
    Shared slots;
    // Counted only where there are more slots than one for keys and one for values.
    uint32_t read_slot = 0;
    uint32_t load_slot = 0;

    DEVICE Ring(const KeyList& list, Shared slots) : list(list), slots(slots) {}

    // The first slots - 1 tiles, from those at `entry` on.
    DEVICE void start(uint32_t entry) {
#pragma unroll
        for (int i = 0; i < P::slots - 1; i++) {
            i % 2 == 0 ? load_tile<false>(entry + i / 2 * entry_step) : load_tile<true>(entry + i / 2 * entry_step);
        }
    }

    // The keys or values at `entry`, the next in turn, once all of the team may read them; valid until the next call.
    template <bool Values>
    DEVICE Shared next(uint32_t entry) {
        constexpr int ahead = Values + P::slots - 1;
        copy_wait<P::slots - 2>();
        P::team == 32 ? sync_warp() : sync_block();
        // Everyone is done with the tile before: its slot is free.
        load_tile<ahead % 2 == 1>(entry + ahead / 2 * entry_step);
        return take<Values>(read_slot);
    }

    // A slot, and on to the one after it.
    template <bool Values>
    DEVICE Shared take(uint32_t& slot) const {
        if (P::slots == 2) {
            return slots + Values * P::slot_bytes;
        }
        const Shared taken = slots + slot * P::slot_bytes;
        slot = slot + 1 == P::slots ? 0 : slot + 1;
        return taken;
    }

    // A group of copies even where nothing is left, so that groups count tiles.
    template <bool Values>
    DEVICE void load_tile(uint32_t entry) {
        const uint32_t end = list.tile.end;
        const Shared slot = take<Values>(load_slot);
        if (entry < end) {
            copy(Values ? list.p.value : list.p.key, slot, entry, end);
        }
        copy_commit();
    }

    // Entries from `end` on become zeros.
    DEVICE void copy(const StarTensor& from, Shared to, uint32_t first, uint32_t end) const {
        const uint32_t thread = thread_index() % P::team;
        const uint32_t lane = thread % lanes;
        const uint32_t row = thread / lanes;
        if (first + P::keys <= end && list.uniform(first, first + P::keys)) {
            const uint16_t* source = list.row(from, first + row) + lane * 8;
            const uint64_t step = row_step * from.seq;
#pragma unroll
            for (int i = 0; i < P::keys / row_step; i++) {
#pragma unroll
                for (int c = 0; c < Tile::chunks / lanes; c++) {
                    copy_async(Tile::at(to, row + i * row_step, lane + c * lanes), source + c * lanes * 8, false);
                }
                source += step;
            }
            return;
        }
#pragma unroll 1
        for (uint32_t r = row; r < P::keys; r += row_step) {
            const bool beyond = first + r >= end;
            const uint16_t* source = list.row(from, beyond ? first : first + r) + lane * 8;
#pragma unroll
            for (int c = 0; c < Tile::chunks / lanes; c++) {
                copy_async(Tile::at(to, r, lane + c * lanes), source + c * lanes * 8, beyond);
            }
        }
    }
};
