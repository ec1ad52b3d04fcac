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

#include "eight.cuh"
#include "keys.cuh"
#include "rows.cuh"
#include "softmax.cuh"

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

// Rows after the tile's last, and what rows lack of the head dim, become zeros.
template <class P>
DEVICE void load_query(const QueryRows<P>& rows, Shared to) {
    using Tile = SharedTile<P::head_dim>;
    const uint32_t lane = thread_index() % Tile::orders;
    for (uint32_t row = thread_index() / Tile::orders; row < P::rows; row += P::threads / Tile::orders) {
        const bool beyond = row >= rows.tile.rows;
        const uint16_t* from = reinterpret_cast<const uint16_t*>(rows.p.query.data) +
                               rows.offset(rows.p.query, beyond ? 0 : row) + lane * 8;
        for (int c = 0; c < Tile::chunks; c += Tile::orders) {
            const bool zeros = beyond || (lane + c) * 8 >= rows.p.head_dim;
            copy_async(Tile::at(to, row, lane + c), zeros ? from : from + c * 8, zeros);
        }
    }
}

// S += Q Kᵀ over a warp's rows and a tile's keys.
template <class Element, class P, int Columns>
DEVICE void multiply_keys(float (&scores)[P::row_tiles][Columns][4], MatrixWalk<P::head_dim> query,
                          MatrixWalk<P::head_dim> keys) {
    query.swizzled = opaque(query.swizzled);
    keys.swizzled = opaque(keys.swizzled);
#pragma unroll
    for (int k = 0; k < P::head_dim / 16; k++) {
        uint32_t q[P::row_tiles][4];
#pragma unroll
        for (int i = 0; i < P::row_tiles; i++) {
            load_matrices(q[i], query.square(i, k));
        }
#pragma unroll
        for (int j = 0; j < Columns / 2; j++) {
            uint32_t key[4];
            load_matrices(key, keys.square(j, k));
#pragma unroll
            for (int i = 0; i < P::row_tiles; i++) {
                Element::multiply_add(scores[i][2 * j], q[i], key[0], key[1]);
                Element::multiply_add(scores[i][2 * j + 1], q[i], key[2], key[3]);
            }
        }
    }
}

// Probabilities in 16 bits: the accumulators of two 16×8 products lie as the left operand of one
// 16×16 does.
template <class Element, int RowTiles, int Columns>
DEVICE void pack(uint32_t (&to)[RowTiles][Columns / 2][4], const float (&scores)[RowTiles][Columns][4]) {
#pragma unroll
    for (int i = 0; i < RowTiles; i++) {
#pragma unroll
        for (int j = 0; j < Columns; j++) {
            to[i][j / 2][j % 2 * 2] = Element::pack(scores[i][j][0], scores[i][j][1]);
            to[i][j / 2][j % 2 * 2 + 1] = Element::pack(scores[i][j][2], scores[i][j][3]);
        }
    }
}

// O += P V.
template <class Element, class P, int Squares, int Outputs>
DEVICE void multiply_values(float (&out)[P::row_tiles][Outputs][4],
                            const uint32_t (&probabilities)[P::row_tiles][Squares][4], MatrixWalk<P::value_dim> values) {
    values.swizzled = opaque(values.swizzled);
#pragma unroll
    for (int k = 0; k < Squares; k++) {
#pragma unroll
        for (int j = 0; j < Outputs / 2; j++) {
            uint32_t value[4];
            load_matrices_transposed(value, values.square(k, j));
#pragma unroll
            for (int i = 0; i < P::row_tiles; i++) {
                Element::multiply_add(out[i][2 * j], probabilities[i][k], value[0], value[1]);
                Element::multiply_add(out[i][2 * j + 1], probabilities[i][k], value[2], value[3]);
            }
        }
    }
}

template <class Element, class P>
struct Flash {
    static constexpr int columns = P::keys / 8;
    static constexpr int outputs = P::value_dim / 8;
    using Walk = MatrixWalk<P::head_dim>;
    using ValueWalk = MatrixWalk<P::value_dim>;
    using Keys = KeyList<P::stored_bytes>;

    // The lane's first row of the block's, and its first column.
    static DEVICE uint32_t lane_row() {
        const uint32_t warp = thread_index() / 32 % P::row_warps;
        return warp * 16 * P::row_tiles + thread_index() % 32 / 4;
    }
    static DEVICE uint32_t lane_column() { return thread_index() % 4 * 2; }

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

        load_query<P>(rows, query);
        if (P::key_warps > 1) {
            // Each warp waits for its own copies only.
            copy_commit();
            copy_wait<0>();
        }
        Ring<P> ring(list, memory, query + P::query_bytes + key_warp * P::ring_bytes);
        ring.store_list();
        if (thread_index() == 0) {
            ring.store_border(rows.left_end(), rows.limit(0));
        }
        for (uint32_t row = thread_index(); row < P::rows; row += P::threads) {
            shared_store(ring.limit_at(row), rows.limit(row));
        }
        for (uint32_t row = 4 * thread_index(); row < P::rows; row += 4 * P::threads) {
            ring.store_tokens(row, rows.tokens(row));
        }
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
                cap(scores, scaled ? p.cap_scale * key_scale : p.cap_scale);
            }
            if (ring.is_border(entry)) {
                mask(scores, entry, ring);
                if (entry < ring.left_end()) {
                    hide(scores, entry, ring);
                }
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
            write(rows, query, out, softmax, value_scale);
        } else {
            write_merged(rows, query, out, softmax, value_scale);
        }
        if (cleared) {
            sync_block();
            add_cleared(rows, list);
        }
    }

    // Where rows of values are not as long as those of keys, a lane's place in them is computed in
    // each step: kept, it would displace accumulators.
    static DEVICE uint32_t thread_of_values() {
        return P::value_dim == P::head_dim ? thread_index() : opaque(thread_index());
    }

    static DEVICE void cap(float (&scores)[P::row_tiles][columns][4], float cap_scale) {
#pragma unroll
        for (int i = 0; i < P::row_tiles; i++) {
#pragma unroll
            for (int j = 0; j < columns; j++) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    scores[i][j][c] = tanh_log2(scores[i][j][c] * cap_scale);
                }
            }
        }
    }

    static DEVICE void mask(float (&scores)[P::row_tiles][columns][4], uint32_t entry, const Ring<P>& ring) {
#pragma unroll
        for (int i = 0; i < P::row_tiles; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                // Of the lane's columns.
                const int limit = static_cast<int>(ring.limit(lane_row() + 16 * i + 8 * half) - entry - lane_column());
#pragma unroll
                for (int j = 0; j < columns; j++) {
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        if (8 * j + c >= limit) {
                            scores[i][j][2 * half + c] = -infinity();
                        }
                    }
                }
            }
        }
    }

    // What a window hides on its left, behind the anchor.
    static DEVICE void hide(float (&scores)[P::row_tiles][columns][4], uint32_t entry, const Ring<P>& ring) {
        const int anchor = static_cast<int>(ring.anchor() - entry - lane_column());
#pragma unroll
        for (int i = 0; i < P::row_tiles; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int hidden = anchor + static_cast<int>(ring.hidden(lane_row() + 16 * i + 8 * half));
#pragma unroll
                for (int j = 0; j < columns; j++) {
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        if (8 * j + c >= anchor && 8 * j + c < hidden) {
                            scores[i][j][2 * half + c] = -infinity();
                        }
                    }
                }
            }
        }
    }

    // Rows of 16 bits go through shared memory, where the warp's own queries were, so that whole
    // lines are written.
    static DEVICE void write(const QueryRows<P>& rows, Shared staging, float (&out)[P::row_tiles][outputs][4],
                             const Softmax<P::row_tiles>& softmax, float value_scale) {
        using Tile = SharedTile<P::value_dim>;
#pragma unroll
        for (int i = 0; i < P::row_tiles; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t row = lane_row() + 16 * i + 8 * half;
                const bool within = row < rows.tile.rows;
                const float own = log_sum_exp(softmax.base[i][half], softmax.sum[i][half], softmax.scale_log2);
                const WithSink whole(own, rows.sink(row));
                const float scale = normaliser(softmax.sum[i][half]) * value_scale;
                const auto result = [&](int j, int c) {
                    return whole.output(normalised(out[i][j][2 * half + c], scale));
                };
                if (within && thread_index() % 4 == 0 && rows.has_lse()) {
                    rows.store_lse(row, whole.lse);
                }
                if (P::staged_f32 && rows.wide()) {
#pragma unroll
                    for (int j = 0; j < outputs; j++) {
                        shared_store(f32_at(staging, row, j) + lane_column() * 4,
                                     float2{result(j, 0), result(j, 1)});
                    }
                } else if (!rows.wide()) {
#pragma unroll
                    for (int j = 0; j < outputs; j++) {
                        shared_store(Tile::at(staging, row, j) + lane_column() * 2,
                                     Element::pack(result(j, 0), result(j, 1)));
                    }
                } else if (within) {
                    float* to = rows.wide_row(row) + lane_column();
#pragma unroll
                    for (int j = 0; j < outputs; j++) {
                        if (8 * j < rows.columns()) {
                            store(reinterpret_cast<float2*>(to + 8 * j), float2{result(j, 0), result(j, 1)});
                        }
                    }
                }
            }
        }
        if (rows.wide() && !P::staged_f32) {
            return;
        }
        sync_warp();
        const uint32_t first = lane_row() - thread_index() % 32 / 4;
        if (rows.wide()) {
            // A lane moves 16 bytes: the warp together whole rows, or parts of them.
            for (uint32_t c = thread_index() % 32; c < 16 * P::row_tiles * (P::value_dim / 4); c += 32) {
                const uint32_t row = first + c / (P::value_dim / 4), quad = c % (P::value_dim / 4);
                if (row < rows.tile.rows && 4 * quad < rows.columns()) {
                    float* to = rows.wide_row(row) + quad * 4;
                    store(reinterpret_cast<float4*>(to), shared_load_float4(f32_at(staging, row, quad / 2) + quad % 2 * 16));
                }
            }
            return;
        }
        const uint32_t lane = thread_index() % Tile::orders;
        for (uint32_t r = thread_index() % 32 / Tile::orders; r < 16 * P::row_tiles; r += 32 / Tile::orders) {
            if (first + r < rows.tile.rows) {
                uint16_t* to = rows.narrow_row(first + r) + lane * 8;
                for (int c = 0; c < Tile::chunks; c += Tile::orders) {
                    if ((lane + c) * 8 < rows.columns()) {
                        store(reinterpret_cast<uint4*>(to + c * 8), shared_load16(Tile::at(staging, first + r, lane + c)));
                    }
                }
            }
        }
    }

    // Eight f32 of a staged row. Rows start at the same bank: each has its pieces of 32 bytes in
    // another order.
    static DEVICE Shared f32_at(Shared staging, uint32_t row, uint32_t eight) {
        return staging + row * P::value_dim * 4 + ((eight ^ row % 4) << 5);
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
                const uint32_t row = lane_row() + 16 * i + 8 * half;
                if (thread_index() % 4 == 0) {
                    shared_store(base_at(warp, row), softmax.base[i][half]);
                    shared_store(base_at(warp, row) + 4, softmax.sum[i][half]);
                }
#pragma unroll
                for (int j = 0; j < outputs; j++) {
                    shared_store(out_at(warp, row) + (8 * j + lane_column()) * 4,
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

    // Adds the values that were zeroed to the outputs of the rows that see them: the weight of such
    // a key is above 0, and the sum is what the value makes it, NaN or infinite.
    static DEVICE void add_cleared(const QueryRows<P>& rows, const Keys& list) {
        const uint32_t begin = rows.tile.begin, open = rows.limit(0);
        const bool paged = rows.p.page_table != 0;
        // With a window the border is on both sides.
        const bool whole = open < begin || rows.left_end() != 0;
        const uint32_t border = whole ? begin : begin + (open - begin) / P::keys * P::keys;
#pragma unroll 1
        for (uint32_t i = thread_index(); i < rows.tile.rows * outputs; i += P::threads) {
            const uint32_t row = i / outputs, column = i % outputs * 8;
            if (column >= rows.columns()) {
                continue;
            }
            const uint32_t limit = rows.limit(row), hidden = rows.hidden(row);
#pragma unroll 1
            for (uint32_t entry = border; entry < limit; entry++) {
                if (entry >= rows.tile.anchor && entry < hidden) {
                    continue;
                }
                const uint4 value = list.template values8<Element>(entry, paged, column);
                const uint4 special = not_finite8<Element>(value);
                if (any_bit(special)) {
                    rows.template add_out<Element>(
                        row, column,
                        uint4{value.x & special.x, value.y & special.y, value.z & special.z, value.w & special.w});
                }
            }
        }
    }
};
