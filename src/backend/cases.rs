//! Random capacities and batches within them, for tests of what plans need at most.

use crate::{Batch, BlockList, Capacity, Keys, Mask, PlanConfig, Sequence};
use proptest::prelude::*;

/// Of decodes, of a few rows and of prefills; with keys in rows or pages, and perhaps prefixes.
fn capacities(head_dims: impl Strategy<Value = usize>) -> impl Strategy<Value = Capacity> {
    let heads = (prop_oneof![1..=2usize, 1..=16usize], prop_oneof![1..=8usize, 1..=80usize], head_dims);
    let rows = prop_oneof![Just(1), 0..=40usize, 0..=200usize];
    let query = (1..=2usize, 0..=600usize);
    let keys = prop_oneof![Just(0), 0..=2000usize, 0..=30_000usize];
    let page_len = prop::option::of(prop::sample::select(vec![1, 16, 100]));
    let prefix = prop_oneof![Just([0, 0]), (1..=2usize, 0..=9000usize).prop_map(|(batch, seq)| [batch, seq])];
    (heads, query, keys, page_len, prefix, 0..=8usize, rows).prop_map(
        |((kv_heads, group, dim), (batch, seq), keys, page_len, prefix, sequences, rows)| {
            let query = [batch, seq, kv_heads * group, dim];
            let capacity = match page_len {
                // Sequences share pages: there are fewer than the tables name.
                Some(len) => Capacity::new(query, [7, len, kv_heads, dim], sequences, rows)
                    .with_pages(keys.div_ceil(len).max(1)),
                None => Capacity::new(query, [2, keys, kv_heads, dim], sequences, rows),
            };
            capacity.with_prefix(prefix[0], prefix[1])
        },
    )
}

fn masks() -> impl Strategy<Value = Mask> {
    let blocks = prop_oneof![1..=8usize, 1..=300usize, 1..=20_000usize];
    let star = (blocks.clone(), blocks, 0.0..=1.0f64).prop_map(|(block_len, first_block_len, anchor)| {
        let anchor_len = (anchor * block_len.min(first_block_len) as f64) as usize;
        Mask::Star { anchor_len, block_len, first_block_len, left: None }
    });
    let left = prop_oneof![0..=8usize, 0..=300usize, 0..=20_000usize];
    let window = (prop::option::of(left.clone()), prop::option::of(left.clone()));
    let window = window.prop_map(|(left, right)| Mask::Window { left, right });
    let windowed = (star.clone(), left).prop_map(|(star, left)| star.with_sliding_window(left + 1).unwrap());
    prop_oneof![Just(Mask::Full), Just(Mask::Causal), window, windowed, star.clone(), star]
}

/// A list of at most so many ranges, of tiles of any number of rows.
fn block_list(seed: u64, rows: usize, keys: usize, most_ranges: usize) -> Mask {
    let tiles = |tile_rows: usize| rows.div_ceil(tile_rows);
    let tile_rows = (1 << (seed % 10)..).find(|&tile_rows| tiles(tile_rows) <= most_ranges).unwrap_or(1);
    let (mut offsets, mut ranges) = (vec![0], Vec::new());
    for tile in 0..tiles(tile_rows) {
        // All keys, the later half, or none.
        let start = [0, keys / 2, keys][(seed >> (10 + tile % 50)) as usize % 3];
        if start < keys {
            ranges.push(start..keys);
        }
        offsets.push(ranges.len());
    }
    let list = BlockList::new(tile_rows, &offsets, &ranges).unwrap();
    Mask::from(if seed.is_multiple_of(2) { list.causal() } else { list })
}

/// A part of what is left: all of it, or any.
fn parts() -> impl Strategy<Value = f64> {
    prop_oneof![Just(1.0), 0.0..=1.0f64]
}

fn part_of(part: f64, whole: usize) -> usize {
    (part * whole as f64).round() as usize
}

/// A capacity, and a batch within it that often takes all there is of one thing or another.
pub(crate) fn within_capacities(
    head_dims: impl Strategy<Value = usize>,
) -> impl Strategy<Value = (Capacity, Batch)> {
    let lists = prop::option::weighted(0.3, any::<u64>());
    let sequence = (parts(), parts(), prop::option::of(parts()), masks(), lists);
    let ranges = prop_oneof![2 => Just(0), 1 => 1..=400usize];
    (capacities(head_dims), ranges, prop::collection::vec(sequence, 8), any::<bool>()).prop_map(
        |(capacity, ranges, mut sequences, evenly)| {
            let capacity = capacity.with_ranges(ranges);
            sequences.truncate(capacity.sequences);
            let mut batch = capacity.empty_batch().unwrap();
            let (mut at, mut start, mut pages_left) = (0, 0, capacity.pages);
            let mut sequences_left = sequences.len();
            for (rows, keys, prefix, mask, list) in sequences {
                if start == capacity.query[1] {
                    (at, start) = (at + 1, 0);
                }
                if at == capacity.query[0] {
                    break;
                }
                let rows = part_of(rows, capacity.rows).min(capacity.query[1] - start);
                let keys = match capacity.pages {
                    0 => Keys::rows(1, 0..part_of(keys, capacity.key[1])),
                    _ => {
                        let most = if evenly { pages_left.div_ceil(sequences_left) } else { pages_left };
                        let pages = part_of(keys, most);
                        pages_left -= pages;
                        let len = (pages * capacity.key[1]).saturating_sub(rows % capacity.key[1]);
                        Keys::pages(len, (0..pages as u32).map(|page| page % 7).collect::<Vec<_>>())
                    }
                };
                let mut sequence = Sequence::new(at, start..start + rows, keys, mask);
                if let Some(part) = prefix
                    && capacity.prefix[0] > 0
                {
                    sequence = sequence.with_prefix(0, 0..part_of(part, capacity.prefix[1]));
                }
                let ranges_left = capacity.ranges - batch.ranges();
                if let Some(seed) = list
                    && ranges_left > 0
                {
                    sequence.mask = block_list(seed, rows, sequence.key_len(), ranges_left);
                }
                batch.push(sequence).unwrap();
                start += rows;
                sequences_left -= 1;
            }
            capacity.check(&batch).unwrap();
            (capacity, batch)
        },
    )
}

/// Plain, with a fixed split length, and row-invariant.
pub(crate) fn configs() -> impl Strategy<Value = PlanConfig> {
    let plain = PlanConfig::new();
    prop_oneof![
        2 => Just(plain),
        2 => (1..=5000usize).prop_map(move |len| plain.with_split_keys(len)),
        1 => Just(plain.with_row_invariant()),
        1 => (1..=5000usize).prop_map(move |len| plain.with_row_invariant().with_split_keys(len)),
    ]
}
