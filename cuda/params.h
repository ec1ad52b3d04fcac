/* What the kernels are told: one struct per kernel, passed by value. Addresses are device addresses, strides count elements.
 * src/cuda/params.rs is bindgen's view of this file. */
#pragma once

#include <stdint.h>

/* A tensor [batch, seq, heads, dim] whose last axis is contiguous. */
typedef struct {
    uint64_t data;
    uint64_t batch;
    uint64_t seq;
    uint64_t head;
} StarTensor;

/* Rows that walk one list of keys: entries 0..anchor are the sequence's keys from its first on, the
 * others its keys from `start` on, or, with `ranges`, those of a block list. The first `prefix_len` keys of the sequence lie in the prefix
 * tensors, the others after them in the tensors of keys and values. Where the query heads of a KV
 * head share a tile, a row is one head of one token, heads fastest. */
typedef struct {
    /* Index on the batch axis of queries and outputs. */
    uint32_t batch;
    /* Index on the batch axis of keys and values or, where they lie in pages, of the sequence's
     * first page in the page table. */
    uint32_t key_batch;
    /* First row, on the seq axis times `pack`, and how many: 0 where the tile is surplus room of a
     * table. */
    uint32_t row;
    uint32_t rows;
    /* Where the sequence's keys after its prefix start on their seq axis; 0 where they lie in
     * pages. */
    uint32_t key_start;
    uint32_t anchor;
    uint32_t start;
    /* Entries that the first row's token sees; with `causal` = 1 each token sees one more than the
     * last. */
    uint32_t visible;
    uint32_t causal;
    /* The entries of this tile. */
    uint32_t begin;
    uint32_t end;
    /* In how many parts the list is walked. With 1, results go to `out`. With more, partial results
     * of row r of head h go to the partial row `partial` + (h · rows + r) · splits. */
    uint32_t splits;
    uint32_t partial;
    /* Where the prefix is on the axes batch and seq of its tensors; `prefix_len` 0 if there is
     * none. */
    uint32_t prefix_batch;
    uint32_t prefix_start;
    uint32_t prefix_len;
    /* From the first row's token the entries from `anchor` to this one are hidden, and one more from
     * each further token; -2³¹ if none ever are. */
    int32_t hidden;
    /* The list's ranges in the table of ranges; `ranges` 0 if it is no block list. */
    uint32_t first_range;
    uint32_t ranges;
    uint32_t padding;
} StarTile;

/* A range of a block list: the entry that its first key is, and that key. */
typedef struct {
    uint32_t entry;
    uint32_t key;
} StarRange;

/* flash.cuh: attention of tiles × heads, one block each, heads fastest. */
typedef struct {
    StarTensor query;
    StarTensor key;
    StarTensor value;
    /* The prefixes' keys and values. */
    StarTensor prefix_key;
    StarTensor prefix_value;
    /* 16-bit as the queries, or f32. */
    StarTensor out;
    /* f32 [batch, query_heads, query_len], or 0. */
    uint64_t lse;
    /* f32 [query_heads], or 0: of rows that are not merged. */
    uint64_t sinks;
    /* f32 [1] or [kv_heads], or 0: what fp8 keys and values are multiplied by. */
    uint64_t key_scales;
    uint64_t value_scales;
    /* StarTile[]. */
    uint64_t tiles;
    /* u32[]: the pages of each sequence in order, one sequence after another; a page is an index on
     * the batch axis of keys and values. 0 where these do not lie in pages. */
    uint64_t page_table;
    /* StarRange[]. */
    uint64_t ranges;
    /* f32 [partial row, value_dim] and [partial row]. */
    uint64_t partials;
    uint64_t partials_lse;
    /* Rows of a page, and what divides by them: n / page_len is the high word of 2 n · page_magic,
     * shifted right by page_shift. */
    uint32_t page_len;
    uint32_t page_magic;
    uint32_t page_shift;
    uint32_t query_len;
    uint32_t query_heads;
    /* Elements of a row of queries and keys, and of values and outputs: multiples of 8, not above
     * what the kernel is for. */
    uint32_t head_dim;
    uint32_t value_dim;
    /* From the scale of one head to the next's: 0 or 1. */
    uint32_t key_scale_step;
    uint32_t value_scale_step;
    /* Query heads of a KV head. */
    uint32_t group;
    /* How many of them are rows of one tile: 1 or `group`. */
    uint32_t pack;
    uint32_t out_f32;
    /* Scores are multiplied by this... */
    float scale_log2;
    /* ...after tanh(ln 2 / 2 · score · this), where not 0. */
    float cap_scale;
    /* How far a score may pass the base of its row before the base follows, as a score. */
    float slack;
    uint32_t padding;
} StarFlashParams;

/* A row of the output that is merged from partial rows, which lie one after another. With `count` 0
 * it is left alone: surplus room of a table. */
typedef struct {
    /* On the axes batch, seq and heads of the output. */
    uint32_t batch;
    uint32_t row;
    uint32_t head;
    /* The first partial row, and how many. */
    uint32_t first;
    uint32_t count;
} StarMergedRow;

/* Partials that lie anywhere: [batch, seq, heads, dim], and f32 [batch, heads, seq]. */
typedef struct {
    StarTensor out;
    uint64_t lse;
} StarPartial;

/* merge.cu: partials to one, the same number for each row or as `merged` says. */
typedef struct {
    /* [batch, seq, heads, dim] for each partial, `partial_stride` elements apart; with `merged`
     * [partial row, dim]. */
    StarTensor partials;
    /* [batch, seq, heads, dim]. */
    StarTensor out;
    /* f32 [batch, heads, seq] for each partial, `lse_stride` apart; with `merged` [partial row]. */
    uint64_t partials_lse;
    uint64_t partial_stride;
    uint64_t lse_stride;
    /* f32 [batch, heads, seq], or 0. */
    uint64_t lse;
    /* f32 [sink_heads], or 0. */
    uint64_t sinks;
    /* StarMergedRow[]; 0 where every row has `n` partials. */
    uint64_t merged;
    uint32_t n;
    /* Rows to merge: of `merged`, or tokens times heads. */
    uint32_t rows;
    uint32_t seq;
    uint32_t heads;
    uint32_t dim;
    /* Threads that share a row: a power of two, at most 32. */
    uint32_t lanes;
    /* 1: the partials are those of `each`, of which `n` are there. */
    uint32_t separate;
    /* Which head's sink a row has: the entry i of `lse` is the entry sink_first + i of a
     * log-sum-exp [.., sink_heads, sink_seq]. */
    uint32_t sink_first;
    uint32_t sink_seq;
    uint32_t sink_heads;
    StarPartial each[32];
} StarMergeParams;

/* append.cu: new keys and values to their places. */
typedef struct {
    /* [batch, seq, kv_heads, dim], and [.., value_dim]. */
    StarTensor key;
    StarTensor value;
    /* [pages, page_len, kv_heads, dim], and [.., value_dim]. */
    StarTensor shard_key;
    StarTensor shard_value;
    /* u32 [batch, seq]: each new row's place, page · page_len + row; rows with a place from pages · page_len on are left out. */
    uint64_t places;
    /* u32 [batch, seq], and f32 [position_end, rotated / 2] each; unused where `rotated` is 0. */
    uint64_t positions;
    uint64_t cos;
    uint64_t sin;
    /* f32 [1] or [kv_heads], or 0: what keys and values are divided by, to an fp8 shard. */
    uint64_t key_scales;
    uint64_t value_scales;
    uint32_t batch;
    uint32_t seq;
    uint32_t kv_heads;
    uint32_t dim;
    uint32_t value_dim;
    /* From the scale of one head to the next's: 0 or 1. */
    uint32_t key_scale_step;
    uint32_t value_scale_step;
    uint32_t pages;
    uint32_t page_len;
    /* The first dims of each key that are rotated, a multiple of 16. */
    uint32_t rotated;
    /* 1: the pairs (2 i, 2 i + 1); 0: (i, i + rotated / 2). */
    uint32_t interleaved;
    /* Keys at positions from here on are left out, with their values. */
    uint32_t position_end;
} StarAppendParams;
