// Attention of one tile of query rows over a list of keys, as flash.cuh, by the warp groups of a
// Hopper GPU:
//
//     the first            copies tiles of keys and values to stages in shared memory
//     each of the others   has 64 query rows: S = QKᵀ, softmax, O += PV
//
// Both products are `wgmma`: four warps together multiply what lies in shared memory, and go on
// meanwhile. S = QKᵀ of a step runs beside O += PV of the step before, and PV beside the softmax
// of S.
#pragma once

#include "copies.cuh"
#include "epilogue.cuh"
#include "stages.cuh"

template <int HeadDim, int ValueDim, int Groups, int Keys, int StageCount>
struct GroupPolicy {
    static constexpr int head_dim = HeadDim;
    static constexpr int value_dim = ValueDim;
    static constexpr int stored_bytes = 2;
    // Warp groups that multiply, and the rows of their warps.
    static constexpr int groups = Groups;
    static constexpr int row_tiles = 1;
    static constexpr int row_warps = 4 * Groups;
    static constexpr int rows = 64 * Groups;
    static constexpr int keys = Keys;
    static constexpr int stages = StageCount;
    static constexpr bool staged_f32 = false;
    // The first four warps copy.
    static constexpr int first_warp = 4;
    static constexpr int team = 128;
    static constexpr int copy_threads = 128;
    static constexpr int compute_threads = 128 * Groups;
    static constexpr int threads = copy_threads + compute_threads;
    // Registers of a thread: 64 K are shared by all.
    static constexpr int copy_registers = 40;
    static constexpr int compute_registers = 232;
    static_assert(copy_threads * copy_registers + compute_threads * compute_registers <= 65536, "");
    // Queries lie by groups.
    using Query = PanelTile<HeadDim, 64>;
    using Key = PanelTile<HeadDim, Keys>;
    using Value = PanelTile<ValueDim, Keys>;
    template <int Dim>
    using TileOf = PanelTile<Dim, Keys>;
    // The list of keys as Policy has it, and the barriers of the stages.
    static constexpr int barriers_at = (48 + (4 + 1) * rows + (16 + 4) * copy_threads + 7) / 8 * 8;
    static constexpr int list_bytes = (barriers_at + 4 * StageCount * 8 + 1023) / 1024 * 1024;
    static constexpr int query_bytes = Groups * Query::bytes;
    // Tiles begin at a multiple of 1,024.
    static constexpr int shared_bytes = 1024 + list_bytes + query_bytes + StageCount * (Key::bytes + Value::bytes);
};

template <class Element, class P>
struct WarpGroups {
    static constexpr int columns = P::keys / 8;
    static constexpr int outputs = P::value_dim / 8;
    using Scores = ::Scores<P>;
    using Epilogue = ::Epilogue<Element, P>;

    static DEVICE void run(const StarFlashParams& p) {
        const uint32_t heads = p.query_heads / p.pack;
        const StarTile& tile = refer(reinterpret_cast<const StarTile*>(p.tiles) + block_index() / heads);
        if (tile.rows == 0) {
            return;
        }
        const uint32_t head = block_index() % heads;
        const QueryRows<P> rows{p, tile, head, 0};
        const KeyList<P::stored_bytes> list{p, tile, head * p.pack / p.group, 0};
        const Shared memory = (shared_memory() + 1023) / 1024 * 1024;
        const Shared query = memory + P::list_bytes;
        const TileCopies<P> copies(list, memory);
        const Stages<P> stages{memory + P::barriers_at, query + P::query_bytes};
        store_rows<P>(copies, rows);
        if (warp_index() < P::first_warp) {
            copies.store_list();
        }
        if (thread_index() == 0) {
            stages.init();
        }
        sync_block();
        if (warp_index() < P::first_warp) {
            produce(copies, stages);
        } else {
            consume(rows, list, copies, stages, query);
        }
    }

    static DEVICE void produce(const TileCopies<P>& copies, const Stages<P>& stages) {
        setmaxnreg_dec<P::copy_registers>();
        uint32_t step = 0;
        for (uint32_t entry = copies.list.tile.begin; entry < copies.end(); entry += P::keys, step++) {
            copy<false>(copies, stages, entry, step);
            copy<true>(copies, stages, entry, step);
        }
    }

    template <bool Values>
    static DEVICE void copy(const TileCopies<P>& copies, const Stages<P>& stages, uint32_t entry, uint32_t step) {
        stages.template wait_empty<Values>(step);
        const Shared tile = stages.template tile<Values>(step), full = stages.template full<Values>(step);
        copies.template copy_tile<Values>(tile, entry);
        if (Values && copies.is_border(entry) && copies.hides()) {
            copy_commit();
            copy_wait<0>();
            copies.template clear_values<Element>(tile);
            mbarrier_arrive(full);
        } else {
            copy_mbarrier_arrive_noinc(full);
        }
    }

    static DEVICE void consume(const QueryRows<P>& rows, const KeyList<P::stored_bytes>& keys,
                               const SharedList<P>& list, const Stages<P>& stages, Shared queries) {
        setmaxnreg_inc<P::compute_registers>();
        const uint32_t group = warp_index() / 4 - 1, first = 64 * group;
        const Shared query = queries + group * P::Query::bytes;
        load_query<typename P::Query, 64, 128>(rows, first, query, thread_index() % 128);
        copy_commit();
        copy_wait<0>();
        fence_proxy_async();
        bar_sync(1 + group, 128);

        float out[1][outputs][4] = {};
        Softmax<1> softmax(rows.p.scale_log2, rows.p.slack);
        uint32_t entry = rows.tile.begin, step = 0;
        // What the group's last row sees.
        const uint32_t last = (first + 63 < rows.tile.rows ? first + 64 : rows.tile.rows) - 1;
        const uint32_t limit = first < rows.tile.rows ? list.limit(last) : 0;
        if (entry < limit) {
            uint32_t probabilities[1][columns / 2][4];
            {
                float scores[1][columns][4];
                multiply_keys(scores[0], query, stages, step);
                wgmma_wait_group<0>();
                wgmma_registers(scores[0]);
                stages.template release<false>(step);
                float factors[1][2];
                weigh(scores, factors, softmax, rows.p.cap_scale, entry, list);
                pack<Element>(probabilities, scores);
            }
            for (entry += P::keys, step++; entry < limit; entry += P::keys, step++) {
                float scores[1][columns][4];
                multiply_keys(scores[0], query, stages, step);
                multiply_values(out[0], probabilities[0], stages, step - 1);
                wgmma_wait_group<1>();
                wgmma_registers(scores[0]);
                stages.template release<false>(step);
                float factors[1][2];
                const bool moved = weigh(scores, factors, softmax, rows.p.cap_scale, entry, list);
                wgmma_wait_group<0>();
                wgmma_registers(out[0]);
                stages.template release<true>(step - 1);
                if (moved) {
                    softmax.rescale(out, factors);
                }
                pack<Element>(probabilities, scores);
            }
            multiply_values(out[0], probabilities[0], stages, step - 1);
            wgmma_wait_group<0>();
            wgmma_registers(out[0]);
            stages.template release<true>(step - 1);
        }
        // None of the group's rows sees more: it waits for the others' copies alone.
        for (; entry < list.end(); entry += P::keys, step++) {
            stages.template wait_full<false>(step);
            stages.template release<false>(step);
            stages.template wait_full<true>(step);
            stages.template release<true>(step);
        }
        softmax.finish();
        // All of the group are done with its queries: their memory is used again.
        bar_sync(1 + group, 128);
        Epilogue::write(rows, query - first * P::value_dim * 2, out, softmax, 1);
        if (any_cleared(list)) {
            bar_sync(1 + P::groups, P::compute_threads);
            Epilogue::add_cleared(rows, keys);
        }
    }

    // Starts S = Q Kᵀ over the group's rows and the keys of a step.
    static DEVICE void multiply_keys(float (&scores)[columns][4], Shared query, const Stages<P>& stages,
                                     uint32_t step) {
        stages.template wait_full<false>(step);
        const uint64_t a = P::Query::by_columns(query), b = P::Key::by_columns(stages.template tile<false>(step));
        wgmma_registers(scores);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < P::head_dim / 16; k++) {
            wgmma<Element, false>(scores, a + P::Query::columns_further(k), b + P::Key::columns_further(k), k > 0);
        }
        wgmma_commit_group();
    }

    // Starts O += P V over the values of a step.
    static DEVICE void multiply_values(float (&out)[outputs][4], const uint32_t (&probabilities)[columns / 2][4],
                                       const Stages<P>& stages, uint32_t step) {
        stages.template wait_full<true>(step);
        const uint64_t b = P::Value::by_rows(stages.template tile<true>(step));
        wgmma_registers(out);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < P::keys / 16; k++) {
            wgmma<Element, true>(out, probabilities[k], b + P::Value::rows_further(k), true);
        }
        wgmma_commit_group();
    }

    // From scores to probabilities; whether outputs are to be multiplied by the factors.
    static DEVICE bool weigh(float (&scores)[1][columns][4], float (&factors)[1][2], Softmax<1>& softmax,
                             float cap_scale, uint32_t entry, const SharedList<P>& list) {
        if (cap_scale != 0) {
            Scores::cap(scores, cap_scale);
        }
        if (list.is_border(entry)) {
            Scores::mask_border(scores, entry, list);
        }
        const bool moved = softmax.move_base(scores, factors);
        softmax.exponentiate(scores);
        return moved;
    }

    // Whether any thread that copies has zeroed a value: all have arrived at the last full stage.
    static DEVICE bool any_cleared(const SharedList<P>& list) {
        const uint4 flags = shared_load16(list.shared_list + list.cleared_from + thread_index() % 32 * 16);
        return any_lane(any_bit(flags));
    }
};
