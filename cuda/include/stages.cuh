// Stages of keys and of values: what goes from the warps that copy to those that multiply.
//
// A stage is full when all copies of a tile have landed, and empty when every warp group that
// multiplies has released it. Both are mbarriers, whose phases follow one another as the tiles do.
#pragma once

#include "panels.cuh"

template <class P>
struct Stages {
    static constexpr int barrier_bytes = 4 * P::stages * 8;

    Shared barriers;
    Shared tiles;

    // The first thread makes the barriers, for all to use after a barrier of the block.
    DEVICE void init() const {
        for (uint32_t step = 0; step < P::stages; step++) {
            mbarrier_init(full<false>(step), P::copy_threads);
            mbarrier_init(full<true>(step), P::copy_threads);
            mbarrier_init(empty<false>(step), P::groups);
            mbarrier_init(empty<true>(step), P::groups);
        }
        fence_mbarrier_init();
    }

    template <bool Values>
    DEVICE Shared full(uint32_t step) const {
        return barriers + (Values * P::stages + step % P::stages) * 8;
    }
    template <bool Values>
    DEVICE Shared empty(uint32_t step) const {
        return full<Values>(step) + 2 * P::stages * 8;
    }
    static DEVICE uint32_t parity(uint32_t step) { return step / P::stages % 2; }

    // Where the keys or values of a step are.
    template <bool Values>
    DEVICE Shared tile(uint32_t step) const {
        return tiles + (Values ? P::stages * P::Key::bytes + step % P::stages * P::Value::bytes
                               : step % P::stages * P::Key::bytes);
    }

    // Waits until the stage of a step may be written: at once, where nothing was before it.
    template <bool Values>
    DEVICE void wait_empty(uint32_t step) const {
        mbarrier_wait_parity(empty<Values>(step), parity(step) ^ 1);
    }
    // Waits until the tile of a step is there, for products to read: threads have written it.
    template <bool Values>
    DEVICE void wait_full(uint32_t step) const {
        mbarrier_wait_parity(full<Values>(step), parity(step));
        fence_proxy_async();
    }
    // One thread of a warp group says that the group has read the tile.
    template <bool Values>
    DEVICE void release(uint32_t step) const {
        if (thread_index() % 128 == 0) {
            mbarrier_arrive(empty<Values>(step));
        }
    }
};
