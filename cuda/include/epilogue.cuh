// From accumulators to results in global memory.
#pragma once

#include "keys.cuh"
#include "mask.cuh"
#include "rows.cuh"
#include "shared_tile.cuh"

template <class Element, class P>
struct Epilogue {
    static constexpr int outputs = P::value_dim / 8;

    // Rows of 16 bits go through shared memory, where the warp's own queries were, so that whole
    // lines are written.
    static DEVICE void write(const QueryRows<P>& rows, Shared staging, float (&out)[P::row_tiles][outputs][4],
                             const Softmax<P::row_tiles>& softmax, float value_scale) {
        using Tile = SharedTile<P::value_dim>;
#pragma unroll
        for (int i = 0; i < P::row_tiles; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t row = Scores<P>::lane_row() + 16 * i + 8 * half;
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
                        shared_store(f32_at(staging, row, j) + Scores<P>::lane_column() * 4,
                                     float2{result(j, 0), result(j, 1)});
                    }
                } else if (!rows.wide()) {
#pragma unroll
                    for (int j = 0; j < outputs; j++) {
                        shared_store(Tile::at(staging, row, j) + Scores<P>::lane_column() * 2,
                                     Element::pack(result(j, 0), result(j, 1)));
                    }
                } else if (within) {
                    float* to = rows.wide_row(row) + Scores<P>::lane_column();
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
        const uint32_t first = Scores<P>::lane_row() - thread_index() % 32 / 4;
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

    // Adds the values that were zeroed to the outputs of the rows that see them: the weight of such
    // a key is above 0, and the sum is what the value makes it, NaN or infinite.
    static DEVICE void add_cleared(const QueryRows<P>& rows, const KeyList<P::stored_bytes>& list) {
        const uint32_t begin = rows.tile.begin, open = rows.limit(0);
        const bool paged = rows.p.page_table != 0;
        // With a window the border is on both sides.
        const bool whole = open < begin || rows.left_end() != 0;
        const uint32_t border = whole ? begin : begin + (open - begin) / P::keys * P::keys;
#pragma unroll 1
        for (uint32_t i = thread_index() - 32 * P::first_warp; i < rows.tile.rows * outputs; i += P::compute_threads) {
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
