// The two products of attention, by warps: fragments are loaded from shared memory.
#pragma once

#include "shared_tile.cuh"

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
