// A ring of tiles of keys and values, which the threads that use them copy.
#pragma once

#include "copies.cuh"

// Tiles of keys and values, in turn K, V, K, V: always slots - 1 of them are loaded or on their
// way.
//
// fp8 elements are copied to the slots as they are, and widened to one more tile when it is
// their turn, by the threads that copied them.
template <class P>
struct Ring : TileCopies<P> {
    using List = SharedList<P>;
    using Copies = TileCopies<P>;
    static constexpr bool widens = P::stored_bytes == 1;
    static constexpr uint32_t entry_step = P::keys * P::key_warps;
    static_assert(P::slots >= 2, "");

    Shared slots;
    // Whether values that are widened next are of the border.
    bool clears = false;
    // Counted only where there are more slots than one for keys and one for values.
    uint32_t read_slot = 0;
    uint32_t load_slot = 0;

    // `shared_list` is of the whole block, `slots` of a team.
    DEVICE Ring(const KeyList<P::stored_bytes>& list, Shared shared_list, Shared slots)
        : Copies(list, shared_list), slots(slots) {}

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
        Copies::template widen<Values, Element>(slot, wide, Values && clears);
        clears = Values ? false : clears;
        sync_team();
        return wide;
    }
    static DEVICE void sync_team() { P::team == 32 ? sync_warp() : sync_block(); }

    // Before `next` gives values of the border: those that are not finite become zeros. Each thread
    // looks at what it copied itself, which it sees before the others do.
    template <class Element>
    DEVICE void clear_values() {
        if (widens) {
            clears = List::hides();
            return;
        }
        copy_wait<P::slots - 2>();
        if (List::hides()) {
            const uint32_t slot = P::slots == 2 ? 1 : read_slot;
            Copies::template clear_values<Element>(slots + slot * P::key_slot_bytes);
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
        Copies::template copy_tile<Values>(take<Values>(load_slot), first);
        copy_commit();
    }
};
