use super::*;
use crate::cpu::reference::sees;
use proptest::prelude::*;

fn left() -> impl Strategy<Value = Option<usize>> {
    prop_oneof![Just(None), (0..12usize).prop_map(Some), Just(Some(usize::MAX))]
}

fn star() -> impl Strategy<Value = Mask> {
    let lens = (0..6usize, 1..9usize, 0..12usize, left());
    lens.prop_map(|(anchor, block_len, first_block_len, left)| Mask::Star {
        anchor_len: anchor.min(block_len).min(first_block_len),
        block_len,
        first_block_len,
        left,
    })
}

/// A list for so many rows and keys.
fn blocks(query_len: usize, key_len: usize) -> impl Strategy<Value = Mask> {
    let seen = proptest::collection::vec(any::<bool>(), 41 * key_len);
    (1..9usize, any::<bool>(), seen).prop_map(move |(tile_rows, causal, seen)| {
        let (mut offsets, mut ranges) = (vec![0], Vec::new());
        for tile in 0..query_len.div_ceil(tile_rows) {
            let seen = &seen[tile * key_len..][..key_len];
            let mut key = 0;
            while key < key_len {
                let end = (key..key_len).find(|&end| seen[end] != seen[key]).unwrap_or(key_len);
                if seen[key] {
                    ranges.push(key..end);
                }
                key = end;
            }
            offsets.push(ranges.len());
        }
        let list = BlockList::new(tile_rows, &offsets, &ranges).unwrap();
        Mask::from(if causal { list.causal() } else { list })
    })
}

/// A mask, and rows and keys that it is for.
fn cases() -> impl Strategy<Value = (Mask, usize, usize)> {
    (0..40usize, 0..40usize).prop_flat_map(|(query_len, key_len)| {
        let window = (left(), left()).prop_map(|(left, right)| Mask::Window { left, right });
        let mask =
            prop_oneof![Just(Mask::Full), Just(Mask::Causal), window, star(), blocks(query_len, key_len)];
        mask.prop_map(move |mask| (mask, query_len, key_len))
    })
}

/// The keys that a row of a segment sees, by its list.
fn seen(segment: &Segment, mask: &Mask, row: usize) -> Vec<usize> {
    let visible =
        (0..segment.visible(row)).filter(|&entry| entry < segment.prefix || entry >= segment.hidden(row));
    visible.map(|entry| segment.key(mask, entry).0).collect()
}

fn segments_of(mask: &Mask, query_len: usize, key_len: usize) -> Vec<Segment> {
    let mut all = Vec::new();
    segments(mask, query_len, key_len, |segment| all.push(segment));
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn segments_show_what_the_mask_shows((mask, query_len, key_len) in cases()) {
        let mut rows = 0;
        for segment in segments_of(&mask, query_len, key_len) {
            prop_assert_eq!(segment.rows.start, rows);
            rows = segment.rows.end;
            let mut pairs = 0;
            for row in segment.rows.clone() {
                let part = segment.part(row..segment.rows.end);
                let expected: Vec<usize> =
                    (0..key_len).filter(|&key| sees(&mask, query_len, key_len, row, key)).collect();
                prop_assert_eq!(&seen(&part, &mask, row), &expected, "row {} of {:?}", row, segment);
                prop_assert!(part.len() <= key_len);
                pairs += expected.len();
            }
            prop_assert_eq!(segment.pairs(), pairs);
        }
        prop_assert_eq!(rows, query_len);
    }

    #[test]
    fn entries_that_follow_each_other_are_counted((mask, query_len, key_len) in cases()) {
        for segment in segments_of(&mask, query_len, key_len) {
            let mut entry = 0;
            while entry < segment.len() {
                let (key, count) = segment.key(&mask, entry);
                let end = segment.len().min(entry.saturating_add(count));
                prop_assert!(end > entry);
                for i in entry..end {
                    prop_assert_eq!(segment.key(&mask, i).0, key + i - entry);
                }
                entry = end;
            }
        }
    }

    /// Skipping leaves out whole tiles of a grid that does not depend on the rows, and nothing
    /// that a row sees.
    #[test]
    fn only_hidden_tiles_are_skipped(
        (mask, query_len, key_len) in cases(),
        tile in 1..6usize,
        split in proptest::option::of(1..12usize),
        part in (0..40usize, 1..40usize),
    ) {
        let grid = Grid { tile, split };
        for whole in segments_of(&mask, query_len, key_len) {
            let start = whole.rows.start + part.0 % whole.rows.len();
            let whole = whole.part(start..whole.rows.end.min(start + part.1));
            let segment = whole.clone().skipping(grid);
            for row in whole.rows.clone() {
                prop_assert_eq!(seen(&segment, &mask, row), seen(&whole, &mask, row));
            }
            prop_assert_eq!(segment.pairs(), whole.pairs());
            let Skipped { at, count } = segment.skipped;
            prop_assert!(grid.down(at) == at && grid.down(at + count) == at + count);
            // What is left of the hidden keys is less than a tile on either side.
            if whole.first_hidden.is_some() && grid.split.is_none() {
                let hidden = segment.hidden(segment.rows.start) - segment.prefix;
                prop_assert!(hidden <= 2 * (tile - 1), "{hidden} of {tile}");
            }
        }
    }

    /// Splits partition the list, at the borders that the whole list has.
    #[test]
    fn fixed_splits_partition_the_list(
        (mask, query_len, key_len) in cases(),
        tile in 1..6usize,
        len in 1..12usize,
    ) {
        for whole in segments_of(&mask, query_len, key_len) {
            let segment = whole.clone().skipping(Grid { tile, split: Some(len) });
            let splits: Vec<_> =
                (0..segment.splits(len)).map(|split| segment.split(len, split)).collect();
            let mut end = 0;
            for split in &splits {
                prop_assert_eq!(split.start, end);
                end = split.end;
                let at = |entry| if entry < segment.skipped.at { entry } else { entry + segment.skipped.count };
                if !split.is_empty() {
                    prop_assert_eq!(at(split.start) / len, at(split.end - 1) / len);
                }
                prop_assert!(splits.len() == 1 || !split.is_empty());
            }
            prop_assert_eq!(end, segment.len());
        }
    }
}
