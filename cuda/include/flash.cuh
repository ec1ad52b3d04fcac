// Attention of one tile of query rows over a list of keys:
//
//     out = softmax(scale · q kᵀ + mask) v        lse = ln Σ_j exp(scale · q k_j)
//
// A block has `rows` query rows in shared memory and walks its keys in tiles of `keys`, K and V in
// turn through a ring that asynchronous copies fill ahead. Its warps divide the rows (row_warps),
// or the keys (key_warps: each has a ring of its own, and their results are merged at the end). S =
// QKᵀ stays in registers and, as probabilities, is the left operand of PV.
//
// Tiles of keys that every row sees whole need no mask. The others are the border: tiles that the
// mask, a window's left edge or the end of the keys crosses. A hidden key has the weight 0, but
// 0 · NaN is NaN. So in the border values that are not finite enter the product as zeros, and are
// added at the end to the rows that see them.
#pragma once

#include "epilogue.cuh"
#include "products.cuh"
#include "ring.cuh"

template <int HeadDim, int ValueDim, int StoredBytes, int RowTiles, int RowWarps, int KeyWarps, int Keys, int Slots,
          bool ValuesFirst, bool StagedF32>
struct Policy {
    // The most elements of a row of queries and keys, and of the values that a block multiplies.
    static constexpr int head_dim = HeadDim;
    static constexpr int value_dim = ValueDim;
    // Rows of values may be longer: each block then has some of their columns.
    static constexpr bool in_parts = ValueDim < HeadDim && HeadDim > 256;
    // Of an element of keys and values in memory: 2, or 1 for E4M3.
    static constexpr int stored_bytes = StoredBytes;
    // Tiles of 16 rows of a warp: each loaded square of K or V serves all of them.
    static constexpr int row_tiles = RowTiles;
    static constexpr int row_warps = RowWarps;
    static constexpr int key_warps = KeyWarps;
    static constexpr int rows = 16 * RowTiles * RowWarps;
    static constexpr int keys = Keys;
    static constexpr int slots = Slots;
    // Whether a step waits for its values before the softmax, so that no barrier parts that from
    // the products of other warps.
    static constexpr bool values_first = ValuesFirst;
    // Whether outputs of f32 go through shared memory, as those of 16 bits do.
    static constexpr bool staged_f32 = StagedF32;
    // The threads that share a ring.
    static constexpr int team = 32 * RowWarps;
    static constexpr int threads = team * KeyWarps;
    // All threads copy, and all compute.
    static constexpr int copy_threads = threads;
    static constexpr int compute_threads = threads;
    static constexpr int first_warp = 0;
    // How tiles of keys and values lie in shared memory.
    template <int Dim>
    using TileOf = StoredTile<Dim, StoredBytes>;
    static constexpr int query_bytes = rows * HeadDim * 2;
    // Two slots are one for keys and one for values; others serve both.
    static_assert(ValueDim <= HeadDim, "a slot for keys holds values");
    static constexpr int key_slot_bytes = Keys * HeadDim * StoredBytes;
    // Where elements are widened: a tile of wide ones, the last of a ring.
    static constexpr int wide_bytes = StoredBytes == 1 ? Keys * HeadDim * 2 : 0;
    static constexpr int ring_bytes =
        (Slots == 2 ? key_slot_bytes + Keys * ValueDim * StoredBytes : Slots * key_slot_bytes) + wide_bytes;
    // What is kept of the list of keys: its ends and border, each row's limit and token, and for
    // each thread two addresses and whether it zeroed a value.
    static constexpr int list_bytes = (48 + (4 + 1) * rows + (16 + 4) * threads + 127) / 128 * 128;
    static constexpr int shared_bytes = list_bytes + query_bytes + KeyWarps * ring_bytes;
    static_assert(KeyWarps == 1 || RowWarps == 1, "warps divide the rows or the keys");
    // Of f32 outputs in shared memory: eight more than a row has, so that the rows of a store begin
    // at other banks.
    static constexpr int merged_row_bytes = (ValueDim + 8) * 4;
    static_assert(KeyWarps * rows * (merged_row_bytes + 8) <= shared_bytes - list_bytes || KeyWarps == 1,
                  "the merge reuses the rings");
    static_assert(!StagedF32 || rows * ValueDim * 4 <= shared_bytes - list_bytes, "staged outputs reuse the rings");
};

template <class Element, class P>
struct Flash {
    static constexpr int columns = P::keys / 8;
    static constexpr int outputs = P::value_dim / 8;
    using Walk = MatrixWalk<P::head_dim>;
    using ValueWalk = MatrixWalk<P::value_dim>;
    using Keys = KeyList<P::stored_bytes>;
    using Scores = ::Scores<P>;
    using Epilogue = ::Epilogue<Element, P>;

    static DEVICE void run(const StarFlashParams& p) {
        const uint32_t heads = p.query_heads / p.pack;
        const uint32_t parts = P::in_parts ? (p.value_dim + P::value_dim - 1) / P::value_dim : 1;
        const uint32_t first_column = P::in_parts ? block_index() % parts * P::value_dim : 0;
        const uint32_t block = block_index() / parts;
        // Left in memory and its cache: registers are scarcer.
        const StarTile& tile = refer(reinterpret_cast<const StarTile*>(p.tiles) + block / heads);
        if (tile.rows == 0) {
            return;
        }
        const uint32_t head = block % heads;
        const QueryRows<P> rows{p, tile, head, first_column};
        const Keys list{p, tile, head * p.pack / p.group, first_column};
        // Kept, because on Hopper its address takes several instructions.
        const Shared memory = opaque(shared_memory());
        const Shared query = memory + P::list_bytes;
        const uint32_t key_warp = thread_index() / P::team;
        const uint32_t first_row = warp_index() % P::row_warps * 16 * P::row_tiles;

        load_query<SharedTile<P::head_dim>, P::rows, P::threads>(rows, 0, query, thread_index());
        if (P::key_warps > 1) {
            // Each warp waits for its own copies only.
            copy_commit();
            copy_wait<0>();
        }
        Ring<P> ring(list, memory, query + P::query_bytes + key_warp * P::ring_bytes);
        ring.store_list();
        store_rows<P>(ring, rows);
        sync_block();
        uint32_t entry = tile.begin + key_warp * P::keys;
        ring.start(entry);

        float out[P::row_tiles][outputs][4] = {};
        // Of keys of 16 bits 1, as the compiler can tell.
        constexpr bool scaled = P::stored_bytes == 1;
        const float key_scale = scaled ? scale_of(p.key_scales, p.key_scale_step, list.kv_head) : 1;
        Softmax<P::row_tiles> softmax(p.scale_log2, p.slack);
        if (scaled && p.cap_scale == 0) {
            softmax.scale_by(key_scale);
        }
        const Walk queries(query, first_row, false);
        for (; entry < ring.limit(first_row + 16 * P::row_tiles - 1); entry += Ring<P>::entry_step) {
            float scores[P::row_tiles][columns][4] = {};
            multiply_keys<Element, P>(scores, queries, Walk(ring.template next<false, Element>(entry), 0, true));
            Shared values = 0;
            if (P::values_first) {
                if (ring.is_border(entry)) {
                    ring.template clear_values<Element>();
                }
                values = ring.template next<true, Element>(entry);
            }
            if (p.cap_scale != 0) {
                Scores::cap(scores, scaled ? p.cap_scale * key_scale : p.cap_scale);
            }
            if (ring.is_border(entry)) {
                Scores::mask_border(scores, entry, ring);
                if (!P::values_first) {
                    ring.template clear_values<Element>();
                }
            }
            softmax.rebase(scores, out);
            softmax.exponentiate(scores);
            uint32_t probabilities[P::row_tiles][columns / 2][4];
            pack<Element>(probabilities, scores);
            if (!P::values_first) {
                values = ring.template next<true, Element>(entry);
            }
            multiply_values<Element, P>(out, probabilities, ValueWalk(values, 0, false, thread_of_values()));
        }
        // None of the warp's rows sees more: it only helps the others to copy.
        for (; P::row_warps > 1 && entry < ring.end(); entry += Ring<P>::entry_step) {
            ring.template next<false, Element>(entry);
            ring.template clear_values<Element>();
            ring.template next<true, Element>(entry);
        }
        softmax.finish();
        copy_wait<0>();
        // All are done with the rings, or, without any key, with the copy of the queries: their
        // memory is used again.
        const bool cleared = sync_block_any(ring.cleared());
        const float value_scale = scaled ? scale_of(p.value_scales, p.value_scale_step, list.kv_head) : 1;
        if (P::key_warps == 1) {
            Epilogue::write(rows, query, out, softmax, value_scale);
        } else {
            write_merged(rows, query, out, softmax, value_scale);
        }
        if (cleared) {
            sync_block();
            Epilogue::add_cleared(rows, list);
        }
    }

    // Where rows of values are not as long as those of keys, a lane's place in them is computed in
    // each step: kept, it would displace accumulators.
    static DEVICE uint32_t thread_of_values() {
        return P::value_dim == P::head_dim ? thread_index() : opaque(thread_index());
    }

    // Merges what the key warps have of the same rows.
    static DEVICE void write_merged(const QueryRows<P>& rows, Shared memory, float (&out)[P::row_tiles][outputs][4],
                                    const Softmax<P::row_tiles>& softmax, float value_scale) {
        const uint32_t warp = thread_index() / 32;
        const auto base_at = [&](uint32_t w, uint32_t row) { return memory + (w * P::rows + row) * 8; };
        const auto out_at = [&](uint32_t w, uint32_t row) {
            return memory + P::key_warps * P::rows * 8 + (w * P::rows + row) * P::merged_row_bytes;
        };
#pragma unroll
        for (int i = 0; i < P::row_tiles; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t row = Scores::lane_row() + 16 * i + 8 * half;
                if (thread_index() % 4 == 0) {
                    shared_store(base_at(warp, row), softmax.base[i][half]);
                    shared_store(base_at(warp, row) + 4, softmax.sum[i][half]);
                }
#pragma unroll
                for (int j = 0; j < outputs; j++) {
                    shared_store(out_at(warp, row) + (8 * j + Scores::lane_column()) * 4,
                                 float2{out[i][j][2 * half], out[i][j][2 * half + 1]});
                }
            }
        }
        sync_block();
        for (uint32_t i = thread_index(); i < P::rows * outputs; i += P::threads) {
            const uint32_t row = i / outputs, column = i % outputs * 8;
            if (row >= rows.tile.rows) {
                return;
            }
            if (column >= rows.columns()) {
                continue;
            }
            float base = -infinity();
#pragma unroll
            for (int w = 0; w < P::key_warps; w++) {
                base = max_ignoring_nan(base, shared_load(base_at(w, row)));
            }
            float sum = 0, total[8] = {};
#pragma unroll
            for (int w = 0; w < P::key_warps; w++) {
                const float weight = power(shared_load(base_at(w, row)), base, softmax.scale_log2);
                sum += weight * shared_load(base_at(w, row) + 4);
#pragma unroll
                for (int c = 0; c < 8; c += 4) {
                    const float4 x = shared_load_float4(out_at(w, row) + (column + c) * 4);
                    total[c] += weight * x.x;
                    total[c + 1] += weight * x.y;
                    total[c + 2] += weight * x.z;
                    total[c + 3] += weight * x.w;
                }
            }
            const WithSink whole(log_sum_exp(base, sum, softmax.scale_log2), rows.sink(row));
            const float scale = normaliser(sum) * value_scale;
#pragma unroll
            for (int c = 0; c < 8; c++) {
                total[c] = whole.output(normalised(total[c], scale));
            }
            rows.template store_out<Element>(row, column, total);
            if (column == 0 && rows.has_lse()) {
                rows.store_lse(row, whole.lse);
            }
        }
    }
};
