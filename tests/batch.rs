//! What a batch refuses, naming the sequence; it is as it was then.

mod common;

use common::{extents, named, of_sequence};
use star_attention::{AttentionShape, Batch, BlockList, Keys, Mask, Sequence};
use std::ops::Range;

const QUERY: [usize; 4] = [2, 10, 4, 64];
const KEY: [usize; 4] = [3, 16, 2, 64];

/// Rows 2..5 of index 0 over 5 keys as rows, and rows 0..4 of index 1 over 20 keys in pages.
fn batch() -> Batch {
    let mut batch = Batch::new(QUERY, KEY).unwrap();
    batch.push(Sequence::new(0, 2..5, Keys::rows(1, 3..8), Mask::Causal)).unwrap();
    batch.push(Sequence::new(1, 0..4, Keys::pages(20, [2, 0]), Mask::Full)).unwrap();
    batch
}

#[test]
fn extents_that_do_not_fit() {
    let refused = |query, key| named(Batch::new(query, key).unwrap_err());
    assert_eq!(refused([2, 10, 4, 32], KEY), ("shape", "key"));
    assert_eq!(refused([2, 10, 4, 0], [3, 16, 2, 0]), ("shape", "query"));
    assert_eq!(refused([2, 10, 3, 64], KEY), ("shape", "query"));
    assert_eq!(refused([2, 10, 0, 64], KEY), ("shape", "query"));
    assert_eq!(refused(QUERY, [3, 16, 0, 64]), ("shape", "key"));
    assert_eq!(refused([usize::MAX, 10, 4, 64], KEY), ("shape", "query"));
    assert_eq!(refused(QUERY, [3, usize::MAX, 2, 64]), ("shape", "key"));
}

#[test]
fn value_dims() {
    let batch = batch().with_prefix(1, 5);
    assert_eq!(named(batch.unwrap_err()), ("value", "prefix"));
    let batch = Batch::new(QUERY, KEY).unwrap().with_prefix(1, 5).unwrap();
    assert_eq!((batch.value_dim(), batch.out_shape(), batch.value_shape()), (64, QUERY, KEY));
    let refused = |value_dim| named(batch.clone().with_value_dim(value_dim).unwrap_err());
    assert_eq!(refused(0), ("shape", "value"));
    assert_eq!(refused(usize::MAX), ("shape", "value"));
    // What could be held of values could not be of outputs, which have more rows.
    let many = Batch::new([1 << 20, 1 << 20, 1, 1], [1, 1, 1, 1]).unwrap();
    assert_eq!(named(many.with_value_dim(1 << 40).unwrap_err()), ("shape", "out"));
    let prefix = Batch::new([1, 1, 1, 1], [1, 1, 1, 1]).unwrap().with_prefix(1 << 20, 1 << 20).unwrap();
    assert_eq!(named(prefix.with_value_dim(1 << 40).unwrap_err()), ("shape", "prefix"));
    let long = Batch::new([1, 1, 1, 1], [1, 1, 1, 1]).unwrap().with_value_dim(1 << 40).unwrap();
    assert_eq!(named(long.with_prefix(1 << 20, 1 << 20).unwrap_err()), ("shape", "prefix"));

    let batch = batch.with_value_dim(24).unwrap();
    assert_eq!((batch.query_shape(), batch.key_shape(), batch.prefix_shape()), (QUERY, KEY, [1, 5, 2, 64]));
    assert_eq!((batch.out_shape(), batch.value_shape()), ([2, 10, 4, 24], [3, 16, 2, 24]));
    assert_eq!((batch.value_dim(), batch.prefix_value_shape()), (24, [1, 5, 2, 24]));
}

#[test]
fn sequences_that_are_refused() {
    let mut batch = batch();
    let none = || Keys::rows(0, 0..0);
    let mut refused = |sequence| of_sequence(batch.push(sequence).unwrap_err());
    let rows = |batch, rows| Sequence::new(batch, rows, none(), Mask::Full);
    // Outside of the queries, or backwards.
    assert_eq!(refused(rows(2, 0..0)), (2, "value", "rows"));
    assert_eq!(refused(rows(0, 9..11)), (2, "value", "rows"));
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = 7..6;
    assert_eq!(refused(rows(0, backwards)), (2, "value", "rows"));
    // Rows that another sequence has: its first, its last, all, or more than all.
    for taken in [0..3, 4..6, 3..4, 2..5, 0..10] {
        assert_eq!(refused(rows(0, taken)), (2, "value", "rows"));
    }

    let over = |keys| Sequence::new(0, 0..1, keys, Mask::Full);
    assert_eq!(refused(over(Keys::rows(3, 0..1))), (2, "value", "keys"));
    assert_eq!(refused(over(Keys::rows(0, 15..17))), (2, "value", "keys"));
    assert_eq!(refused(over(Keys::pages(33, [0, 1]))), (2, "value", "pages"));
    assert_eq!(refused(over(Keys::pages(1, []))), (2, "value", "pages"));
    assert_eq!(refused(over(Keys::pages(17, [0, 3]))), (2, "value", "pages"));
    assert_eq!(refused(over(Keys::pages(usize::MAX, [0]))), (2, "value", "pages"));
    let mask = Mask::Star { anchor_len: 9, block_len: 8, first_block_len: 9, left: None };
    assert_eq!(refused(Sequence::new(0, 0..1, none(), mask)), (2, "value", "anchor_len"));

    let blocks = |tile_rows, keys| BlockList::new(tile_rows, &[0, 1], &[keys]).unwrap();
    let listed = |blocks| Sequence::new(0, 0..2, Keys::rows(1, 0..16), Mask::from(blocks));
    assert_eq!(refused(listed(blocks(1, 0..16))), (2, "value", "row_offsets"));
    assert_eq!(refused(listed(blocks(2, 0..17))), (2, "value", "row_ranges"));

    assert_eq!(batch.sequences().len(), 2);
    // Between and behind the others, keys shared, and a page that is not needed and not there.
    batch.push(Sequence::new(0, 0..2, Keys::rows(1, 0..16), Mask::Full)).unwrap();
    batch.push(Sequence::new(0, 5..10, Keys::pages(16, [2, 99]), Mask::Full)).unwrap();
    batch.push(Sequence::new(0, 5..5, Keys::pages(0, []), Mask::Full)).unwrap();
    assert_eq!(batch.sequences().len(), 5);
}

#[test]
fn block_lists_and_windows_out_of_range() {
    let refused = |tile_rows, offsets: &[usize], ranges: &[Range<usize>]| {
        named(BlockList::new(tile_rows, offsets, ranges).unwrap_err())
    };
    assert_eq!(refused(0, &[0], &[]), ("value", "tile_rows"));
    let first = std::slice::from_ref(&(0..4));
    for offsets in [&[][..], &[1, 1], &[0, 2], &[0, 1, 0, 1]] {
        assert_eq!(refused(4, offsets, first), ("value", "row_offsets"));
    }
    #[allow(clippy::reversed_empty_ranges)]
    for ranges in [[0..4, 3..8], [4..8, 0..2], [0..0, 1..2], [0..4, 9..7]] {
        assert_eq!(refused(4, &[0, 2], &ranges), ("value", "row_ranges"));
    }
    // The next tile begins anew, and may have none.
    let list = BlockList::new(4, &[0, 2, 2, 3], &[0..4, 4..8, 0..4]).unwrap();
    assert_eq!((list.tiles(), list.count(), list.ranges(1).len(), list.ranges(2)), (3, 3, 0, first));

    assert_eq!(named(Mask::sliding_window(0).unwrap_err()), ("value", "sliding_window"));
    assert_eq!(named(Mask::from(list).with_sliding_window(4).unwrap_err()), ("value", "mask"));
    assert_eq!(named(Mask::chunked(0).unwrap_err()), ("value", "chunk_len"));
}

#[test]
fn a_sliding_window_counts_the_rows_own_key() {
    let causal = Mask::Window { left: Some(3), right: Some(0) };
    assert_eq!(Mask::sliding_window(4).unwrap(), causal);
    // The narrower of two holds.
    assert_eq!(causal.clone().with_sliding_window(9).unwrap(), causal);
    let full = Mask::Full.with_sliding_window(4).unwrap();
    assert_eq!(full, Mask::Window { left: Some(3), right: None });
    let star = |left| Mask::Star { anchor_len: 2, block_len: 8, first_block_len: 8, left };
    assert_eq!(star(None).with_sliding_window(1).unwrap(), star(Some(0)));
}

#[test]
fn pages_without_rows_hold_no_key() {
    let mut batch = Batch::new(QUERY, [3, 0, 2, 64]).unwrap();
    let refused = batch.push(Sequence::new(0, 0..1, Keys::pages(1, [0, 1, 2]), Mask::Full));
    assert_eq!(of_sequence(refused.unwrap_err()), (0, "value", "pages"));
    batch.push(Sequence::new(0, 0..1, Keys::pages(0, [0]), Mask::Full)).unwrap();
}

#[test]
fn uniform_and_packed_batches() {
    let shape = extents([2, 3, 5], [4, 2], [8, 6]);
    let uniform = Batch::uniform(&shape, &Mask::Causal).unwrap();
    assert_eq!((uniform.out_shape(), uniform.value_shape()), (shape.out_shape(), shape.value_shape()));
    let expected: Vec<_> =
        (0..2).map(|b| Sequence::new(b, 0..3, Keys::rows(b, 0..5), Mask::Causal)).collect();
    assert_eq!(uniform.sequences(), expected);

    let one = AttentionShape { batch: 1, ..shape };
    let packed = Batch::packed(&one, &[0, 1, 3], &[0, 5, 5], &Mask::Full).unwrap();
    assert_eq!((packed.out_shape(), packed.value_shape()), ([1, 3, 4, 6], [1, 5, 2, 6]));
    let expected = [(0..1, 0..5), (1..3, 5..5)]
        .map(|(rows, keys)| Sequence::new(0, rows, Keys::rows(0, keys), Mask::Full));
    assert_eq!(packed.sequences(), expected);

    let refused = |shape, query: &[usize], key: &[usize]| {
        named(Batch::packed(shape, query, key, &Mask::Full).unwrap_err())
    };
    assert_eq!(refused(&shape, &[0, 3], &[0, 5]), ("shape", "query"));
    assert_eq!(refused(&one, &[0, 3], &[0, 2, 5]), ("shape", "key_offsets"));
    assert_eq!(refused(&one, &[0, 2, 1, 3], &[0, 1, 2, 5]), ("value", "query_offsets"));
    assert_eq!(refused(&one, &[0, 3], &[0, 6]), ("value", "key_offsets"));
    assert_eq!(refused(&one, &[], &[]), ("value", "query_offsets"));
}
