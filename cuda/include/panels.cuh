// Tiles of 16-bit elements as products of warp groups read them: panels of 64 columns side by side,
// each with rows of 128 bytes, swizzled over eight rows.
#pragma once

#include "hopper.cuh"
#include "shared_tile.cuh"

// It begins at a multiple of 1,024. The last panel may have columns that are used by nobody.
template <int Dim, int Rows>
struct PanelTile {
    static constexpr int chunks = Dim / 8;
    static constexpr int row_bytes = 128;
    static constexpr int panel_bytes = Rows * row_bytes;
    static constexpr int bytes = (Dim + 63) / 64 * panel_bytes;
    static constexpr int orders = 8;
    // For copies: eight lanes copy a panel's row, and go on in the next panel.
    static constexpr int lanes = 8;
    static constexpr int round_bytes = panel_bytes;
    static_assert(Rows % 8 == 0, "the swizzle is one of eight rows");

    static DEVICE Shared at(Shared tile, uint32_t row, uint32_t chunk) {
        return SharedTile<64>::at(tile + chunk / 8 * panel_bytes, row, chunk % 8);
    }

    // Columns as the depth: the operand's descriptor, and how much further the 16 columns from
    // 16 k on are.
    static DEVICE uint64_t by_columns(Shared tile) { return wgmma_descriptor(tile, 16, 1024); }
    static DEVICE uint64_t columns_further(int k) { return (k / 4 * panel_bytes + k % 4 * 32) / 16; }

    // Rows as the depth: the same, of the 16 rows from 16 k on.
    static DEVICE uint64_t by_rows(Shared tile) { return wgmma_descriptor(tile, panel_bytes, 1024); }
    static DEVICE uint64_t rows_further(int k) { return k * 16 * row_bytes / 16; }
};
