// Rows of 16-bit elements in shared memory, swizzled so that neither copies nor matrix loads meet
// in a bank.
//
// A row is cut into chunks of 16 bytes, and each row has its chunks in another order: eight rows of
// one column then fill all 32 banks.
#pragma once

#include "device.cuh"

template <int HeadDim>
struct SharedTile {
    static constexpr int chunks = HeadDim / 8;
    static constexpr int row_bytes = HeadDim * 2;
    static_assert(chunks % 4 == 0, "a head dim is a multiple of 32");
    // Rows of a multiple of 128 bytes start at the same bank: eight orders. Others start at two
    // places in turn: four.
    static constexpr int orders = chunks % 8 == 0 ? 8 : 4;

    // What the chunk's number is xored with.
    static DEVICE uint32_t order(uint32_t row) { return (orders == 8 ? row : row >> 1) % orders; }

    static DEVICE Shared at(Shared tile, uint32_t row, uint32_t chunk) {
        return tile + row * row_bytes + ((chunk ^ order(row)) << 4);
    }
};

// Rows of 8-bit elements in shared memory, as copies leave them. Only the threads that copied them
// read them.
template <int Dim>
struct ByteTile {
    static constexpr int chunks = Dim / 16;
    static constexpr int row_bytes = Dim;
    static constexpr int orders = 1;
    static_assert(chunks % 2 == 0, "a head dim is a multiple of 32");

    static DEVICE Shared at(Shared tile, uint32_t row, uint32_t chunk) { return tile + row * row_bytes + (chunk << 4); }
};

// A tile of keys or values as it lies in global memory, of `Bytes` for each element, and how many
// lanes copy a row of it, each its chunk of every `lanes`. In the last round some may have none.
template <int Dim, int Bytes>
struct StoredTile : SharedTile<Dim> {
    static constexpr int lanes = SharedTile<Dim>::orders;
    // From a lane's chunk of one round to that of the next.
    static constexpr int round_bytes = lanes * 16;
};
template <int Dim>
struct StoredTile<Dim, 1> : ByteTile<Dim> {
    static constexpr int lanes = ByteTile<Dim>::chunks % 8 == 0 ? 8 : 4;
    static constexpr int round_bytes = lanes * 16;
};

// The rows that a lane gives to load_matrices in a walk over 16×16 squares: rows first + 16 i,
// columns 16 j on.
template <int HeadDim>
struct MatrixWalk {
    using Tile = SharedTile<HeadDim>;
    Shared row;
    uint32_t swizzled;

    // The square's quarters in order: (low rows, low columns), then the low rows' high columns or
    // the high rows' low columns.
    DEVICE MatrixWalk(Shared tile, uint32_t first, bool columns_first, uint32_t thread = thread_index()) {
        const uint32_t lane = thread % 32;
        const uint32_t high_row = columns_first ? lane / 16 : lane / 8 % 2;
        const uint32_t high_column = columns_first ? lane / 8 % 2 : lane / 16;
        const uint32_t index = first + high_row * 8 + lane % 8;
        row = tile + index * Tile::row_bytes;
        swizzled = (high_column ^ Tile::order(index)) << 4;
    }

    // `order` is the same 16 rows further on; an even chunk is xored in its low bits, and whole
    // rounds of orders are added.
    DEVICE Shared square(int i, int j) const {
        const int low = 2 * j % Tile::orders;
        return row + (swizzled ^ (low << 4)) + (i * 16 * Tile::row_bytes + (2 * j - low) * 16);
    }
};
