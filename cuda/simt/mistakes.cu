// Mistakes that the emulator must refuse, each with the right way beside it. tests/hopper has the
// parameters once more, in Rust.
#include "../include/hopper.cuh"
#include "../include/shared_tile.cuh"

struct MistakeParams {
    // bf16 [64, 64], in one box, swizzled.
    TensorMap map;
    // u32 [1].
    uint64_t number;
    uint32_t mistake;
    uint32_t wrong;
    uint32_t padding[12];
};

constexpr Shared barrier = 0;
constexpr Shared a = 1024;
constexpr uint32_t box_bytes = 64 * 128;
constexpr Shared b = a + box_bytes;

DEVICE uint32_t lane() { return thread_index() % 32; }
DEVICE bool first() { return thread_index() == 0; }

DEVICE void init(uint32_t count) {
    if (first()) {
        mbarrier_init(barrier, count);
        fence_mbarrier_init();
    }
    sync_block();
}

DEVICE void start_box(const MistakeParams& p, Shared to) {
    mbarrier_arrive_expect_tx(barrier, box_bytes);
    copy_box(to, p.map, 0, 0, 0, 0, barrier);
}

// What threads write, for a warp group to multiply.
DEVICE void fill(Shared tile) {
    for (uint32_t i = thread_index(); i < box_bytes / 4; i += 256) {
        shared_store(tile + 4 * i, i);
    }
    fence_proxy_async();
    sync_block();
}

// A product of the first warp group, with something in between.
template <class Between>
DEVICE void multiply(const MistakeParams& p, Between between) {
    float d[8][4] = {};
    uint32_t registers[4] = {};
    const bool other = p.mistake == 11 && p.wrong && warp_index() == 3;
    wgmma_fence();
    wgmma<BF16, false>(d, registers, wgmma_descriptor(b + (other ? 32 : 0), 16, 1024), false);
    wgmma_commit_group();
    if (p.wrong) {
        between(d, registers);
    }
    wgmma_wait_group<0>();
    if (!p.wrong) {
        between(d, registers);
    }
}

DEVICE void count(uint32_t* number) {
    if (lane() == 0) {
        atomic_increment(number, 6);
    }
}

KERNEL(mistake, MistakeParams, 256) {
    const bool wrong = p.wrong, in_group = thread_index() < 128;
    switch (p.mistake) {
    // A lane arrives for others that it did not meet.
    case 0:
        init(1);
        if (warp_index() == 1) {
            shared_store(a + 4 * lane(), lane());
            if (!wrong) {
                sync_warp();
            }
            if (elect_one()) {
                mbarrier_arrive(barrier);
            }
        } else if (warp_index() == 0) {
            mbarrier_wait_parity(barrier, 0);
            shared_load4(a + 4 * lane());
        }
        break;
    // An mbarrier is used before others know of it.
    case 1:
        if (first()) {
            mbarrier_init(barrier, 1);
        }
        if (!wrong) {
            sync_block();
        }
        if (thread_index() == 32) {
            mbarrier_arrive(barrier);
        }
        break;
    // A copy is to arrive at an mbarrier that its unit cannot see.
    case 2:
        if (first()) {
            mbarrier_init(barrier, 1);
            if (!wrong) {
                fence_mbarrier_init();
            }
            start_box(p, a);
            mbarrier_wait_parity(barrier, 0);
        }
        break;
    // A box begins where the pattern of the swizzle does not.
    case 3:
        init(1);
        if (first()) {
            start_box(p, a + (wrong ? 512 : 0));
            mbarrier_wait_parity(barrier, 0);
        }
        break;
    // A box replaces what threads wrote, without a fence.
    case 4:
        init(1);
        if (warp_index() == 0) {
            shared_store(a + 4 * lane(), lane());
            if (!wrong) {
                fence_proxy_async();
            }
            sync_warp();
            if (elect_one()) {
                start_box(p, a);
            }
            mbarrier_wait_parity(barrier, 0);
        }
        break;
    // A thread waits at no mbarrier, and reads what another waited for.
    case 5:
        init(1);
        if (first()) {
            start_box(p, a);
            mbarrier_wait_parity(barrier, 0);
        } else if (thread_index() == 32) {
            if (!wrong) {
                mbarrier_wait_parity(barrier, 0);
            }
            shared_load4(a);
        }
        break;
    // Nobody waits for a copy.
    case 6:
        init(1);
        if (first()) {
            start_box(p, a);
            if (!wrong) {
                mbarrier_wait_parity(barrier, 0);
            }
        }
        break;
    // Registers of an operand, accumulators and shared memory are written before the wait.
    case 7:
        fill(b);
        if (in_group) {
            multiply(p, [](auto&, auto& registers) { registers[0] = 1; });
        }
        break;
    case 8:
        fill(b);
        if (in_group) {
            multiply(p, [](auto& d, auto&) { d[0][0] = 1; });
        }
        break;
    case 9:
        fill(b);
        if (in_group) {
            multiply(p, [](auto&, auto&) {
                if (first()) {
                    shared_store(b, 1u);
                }
            });
        }
        break;
    // A warp of a group does not know that an operand has come: one lane alone waited.
    case 10:
        init(1);
        if (first()) {
            start_box(p, b);
        }
        if (in_group) {
            if (!wrong || lane() == 0) {
                mbarrier_wait_parity(barrier, 0);
            }
            multiply(p, [](auto&, auto&) {});
        }
        break;
    // One warp of a group multiplies something else.
    case 11:
        fill(b);
        if (in_group) {
            multiply(p, [](auto&, auto&) {});
        }
        break;
    // A warp comes to a barrier once too often.
    case 12:
        if (warp_index() == 0) {
            bar_arrive(1, 64);
            if (wrong) {
                bar_arrive(1, 64);
            }
        } else if (warp_index() == 1) {
            bar_sync(1, 64);
        }
        break;
    // Warps do not agree on how many come.
    case 13:
        bar_sync(1, wrong && warp_index() == 2 ? 128 : 256);
        break;
    // The block's own barrier.
    case 14:
        bar_sync(wrong ? 0 : 1, 256);
        break;
    // An mbarrier is no number, and a number no mbarrier.
    case 15:
        init(1);
        if (wrong && first()) {
            shared_load4(barrier);
        }
        break;
    case 16:
        init(1);
        if (first()) {
            mbarrier_arrive(barrier + (wrong ? 8 : 0));
        }
        break;
    case 17:
        init(wrong ? 0 : 1);
        break;
    // Copies of a warp that nobody waited for.
    case 18:
        init(32);
        if (warp_index() == 0) {
            copy_async(a + 16 * lane(), reinterpret_cast<const void*>(p.number), true);
            copy_mbarrier_arrive_noinc(barrier);
            if (!wrong) {
                mbarrier_wait_parity(barrier, 0);
            }
            shared_load16(a + 16 * lane());
        }
        break;
    // More registers, but fewer than there are.
    case 19:
        if (wrong) {
            setmaxnreg_inc<40>();
        } else {
            setmaxnreg_dec<40>();
        }
        break;
    // A tensor map that no host made.
    case 20:
        init(1);
        if (first()) {
            const TensorMap none = {};
            mbarrier_arrive_expect_tx(barrier, box_bytes);
            copy_box(a, wrong ? none : p.map, 0, 0, 0, 0, barrier);
            mbarrier_wait_parity(barrier, 0);
        }
        break;
    // An address that no memory is at.
    case 21:
        count(reinterpret_cast<uint32_t*>(p.number) + (wrong ? 1 : 0));
        break;
    }
}
