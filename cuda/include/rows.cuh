// The query rows of a block's tile: where they are read, what they see, and where their results go.
#pragma once

#include "eight.cuh"
#include "list.cuh"

// Results go to the output or, where the tile's list is split, to partial rows.
template <class P>
struct QueryRows {
    const StarFlashParams& p;
    const StarTile& tile;
    uint32_t head;
    // The block's first column of outputs.
    uint32_t first_column;

    DEVICE uint32_t token(uint32_t row) const { return (tile.row + row) / p.pack; }
    DEVICE uint32_t query_head(uint32_t row) const { return head * p.pack + (tile.row + row) % p.pack; }
    DEVICE uint64_t offset(const StarTensor& tensor, uint32_t row) const {
        return tile.batch * tensor.batch + token(row) * tensor.seq + query_head(row) * tensor.head;
    }
    DEVICE bool partial() const { return tile.splits > 1; }
    DEVICE uint64_t partial_row(uint32_t row) const {
        return tile.partial + (static_cast<uint64_t>(head) * tile.rows + row) * tile.splits;
    }
    // Whether results are f32.
    DEVICE bool wide() const { return p.out_f32 || partial(); }
    // The address of a row of f32 results.
    DEVICE float* wide_row(uint32_t row) const {
        float* const start = partial() ? reinterpret_cast<float*>(p.partials) + partial_row(row) * p.value_dim
                                       : reinterpret_cast<float*>(p.out.data) + offset(p.out, row);
        return start + first_column;
    }
    DEVICE uint16_t* narrow_row(uint32_t row) const {
        return reinterpret_cast<uint16_t*>(p.out.data) + offset(p.out, row) + first_column;
    }
    // Columns of the block's that a row of results has.
    DEVICE uint32_t columns() const { return p.value_dim - first_column; }
    // The row sees the entries before this one.
    DEVICE uint32_t limit(uint32_t row) const {
        const uint32_t visible = tile.visible + tile.causal * (token(row) - token(0));
        return visible < tile.end ? visible : tile.end;
    }
    // The tokens of four rows from `row` on, in bytes, counted from the first row's.
    DEVICE uint32_t tokens(uint32_t row) const {
        uint32_t tokens = 0;
        for (uint32_t i = 0; i < 4; i++) {
            tokens |= (token(row + i) - token(0)) << 8 * i;
        }
        return tokens;
    }
    // From the row the entries from the anchor's end to this one are hidden.
    DEVICE uint32_t hidden(uint32_t row) const {
        const int32_t hidden = tile.hidden + static_cast<int32_t>(token(row) - token(0));
        const int32_t anchor = static_cast<int32_t>(tile.anchor);
        return hidden > anchor ? hidden : anchor;
    }
    // Up to where entries behind the anchor are hidden from some row; 0 if none are.
    DEVICE uint32_t left_end() const {
        const uint32_t hidden = this->hidden(tile.rows - 1);
        return hidden > tile.anchor ? hidden : 0;
    }
    DEVICE bool has_lse() const { return (p.lse != 0 || partial()) && first_column == 0; }
    DEVICE void store_lse(uint32_t row, float lse) const {
        if (partial()) {
            store(reinterpret_cast<float*>(p.partials_lse) + partial_row(row), lse);
        } else {
            const uint64_t plane = tile.batch * static_cast<uint64_t>(p.query_heads) + query_head(row);
            store(reinterpret_cast<float*>(p.lse) + plane * p.query_len + token(row), lse);
        }
    }
    // What a row's softmax has beside its keys; -inf if nothing. Partial rows get theirs when they
    // are merged.
    DEVICE float sink(uint32_t row) const {
        return p.sinks == 0 || partial() ? -infinity()
                                         : load(reinterpret_cast<const float*>(p.sinks) + query_head(row));
    }
    // Eight elements of an output row from `column` on.
    template <class Element>
    DEVICE void store_out(uint32_t row, uint32_t column, const float (&x)[8]) const {
        if (wide()) {
            write8(wide_row(row) + column, x);
        } else {
            store(reinterpret_cast<uint4*>(narrow_row(row) + column), pack8<Element>(x));
        }
    }
    // Adds to what `store_out` stored.
    template <class Element>
    DEVICE void add_out(uint32_t row, uint32_t column, const uint4& more) const {
        float x[8], y[8];
        if (wide()) {
            const float4* from = reinterpret_cast<const float4*>(wide_row(row) + column);
            unpack8(load(from), load(from + 1), x);
        } else {
            unpack8<Element>(load(reinterpret_cast<const uint4*>(narrow_row(row) + column)), x);
        }
        unpack8<Element>(more, y);
#pragma unroll
        for (int c = 0; c < 8; c++) {
            x[c] += y[c];
        }
        store_out<Element>(row, column, x);
    }
};

// Copies query rows to shared memory, by so many threads. Rows after the tile's last, and what rows
// lack of the head dim, become zeros.
template <class Tile, int Rows, int Threads, class P>
DEVICE void load_query(const QueryRows<P>& rows, uint32_t first, Shared to, uint32_t thread) {
    const uint32_t lane = thread % Tile::orders;
    for (uint32_t row = thread / Tile::orders; row < Rows; row += Threads / Tile::orders) {
        const bool beyond = first + row >= rows.tile.rows;
        const uint16_t* from = reinterpret_cast<const uint16_t*>(rows.p.query.data) +
                               rows.offset(rows.p.query, beyond ? 0 : first + row) + lane * 8;
        for (int c = 0; c < Tile::chunks; c += Tile::orders) {
            const bool zeros = beyond || (lane + c) * 8 >= rows.p.head_dim;
            copy_async(Tile::at(to, row, lane + c), zeros ? from : from + c * 8, zeros);
        }
    }
}

// Tells all, after a barrier, each row's limit and token, and where the border is.
template <class P>
DEVICE void store_rows(const SharedList<P>& list, const QueryRows<P>& rows) {
    if (thread_index() == 0) {
        list.store_border(rows.tile, rows.left_end(), rows.limit(0));
    }
    for (uint32_t row = thread_index(); row < P::rows; row += P::threads) {
        shared_store(list.limit_at(row), rows.limit(row));
    }
    for (uint32_t row = 4 * thread_index(); row < P::rows; row += 4 * P::threads) {
        list.store_tokens(row, rows.tokens(row));
    }
}
