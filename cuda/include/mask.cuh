// Where a lane's scores are in a tile of rows and keys, and which of them the mask hides.
#pragma once

#include "list.cuh"
#include "softmax.cuh"

template <class P>
struct Scores {
    static constexpr int columns = P::keys / 8;

    // The lane's first row of the block's, and its first column.
    static DEVICE uint32_t lane_row() {
        const uint32_t warp = (thread_index() / 32 - P::first_warp) % P::row_warps;
        return warp * 16 * P::row_tiles + thread_index() % 32 / 4;
    }
    static DEVICE uint32_t lane_column() { return thread_index() % 4 * 2; }

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

    static DEVICE void mask(float (&scores)[P::row_tiles][columns][4], uint32_t entry, const SharedList<P>& list) {
#pragma unroll
        for (int i = 0; i < P::row_tiles; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                // Of the lane's columns.
                const int limit = static_cast<int>(list.limit(lane_row() + 16 * i + 8 * half) - entry - lane_column());
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
    static DEVICE void hide(float (&scores)[P::row_tiles][columns][4], uint32_t entry, const SharedList<P>& list) {
        const int anchor = static_cast<int>(list.anchor() - entry - lane_column());
#pragma unroll
        for (int i = 0; i < P::row_tiles; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int hidden = anchor + static_cast<int>(list.hidden(lane_row() + 16 * i + 8 * half));
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

    // The mask at a tile of the border.
    static DEVICE void mask_border(float (&scores)[P::row_tiles][columns][4], uint32_t entry,
                                   const SharedList<P>& list) {
        mask(scores, entry, list);
        if (entry < list.left_end()) {
            hide(scores, entry, list);
        }
    }
};
