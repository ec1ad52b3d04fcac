//! Layouts partition a context over hosts as the paper does.

use proptest::prelude::*;
use star_attention::cpu::reference::sees;
use star_attention::{Error, StarLayout};

fn layouts() -> impl Strategy<Value = StarLayout> {
    (0..300usize, 1..60usize, 0..60usize, 1..12usize).prop_map(|(context, block, anchor, hosts)| {
        StarLayout::new(context, block, anchor.min(block), hosts).unwrap()
    })
}

proptest! {
    #[test]
    fn hosts_partition_the_context_in_order_and_evenly(layout in layouts()) {
        let (mut token, mut block) = (0, 0);
        let mut counts = vec![];
        for rank in 0..layout.hosts() {
            let host = layout.host(rank).unwrap();
            prop_assert_eq!(host.rank(), rank);
            prop_assert_eq!(host.blocks().start, block);
            block = host.blocks().end;
            counts.push(host.blocks().len());
            if !host.own_tokens().is_empty() {
                prop_assert_eq!(host.own_tokens().start, token);
                prop_assert_eq!(host.own_tokens().start, host.blocks().start * layout.block_len());
                token = host.own_tokens().end;
            }
            prop_assert_eq!(host.own_tokens().is_empty(), host.blocks().is_empty());
        }
        prop_assert_eq!((token, block), (layout.context_len(), layout.blocks()));
        // As even as possible, the first hosts taking one more.
        prop_assert!(counts.is_sorted_by(|a, b| a >= b));
        prop_assert!(counts[0] - counts[counts.len() - 1] <= 1);
        prop_assert_eq!(layout.query_position(), layout.context_len());
        prop_assert!(layout.query_host() < layout.hosts());
    }

    #[test]
    fn local_rows_are_the_anchor_and_the_own_tokens_at_their_positions(layout in layouts()) {
        for rank in 0..layout.hosts() {
            let host = layout.host(rank).unwrap();
            let anchored = !host.own_tokens().is_empty() && host.blocks().start > 0;
            let anchor = if anchored { layout.anchor_len() } else { 0 };
            let expected: Vec<usize> = (0..anchor).chain(host.own_tokens()).collect();
            prop_assert_eq!(host.tokens().collect::<Vec<_>>(), expected.clone());
            prop_assert_eq!(host.positions().collect::<Vec<_>>(), expected.clone());
            prop_assert_eq!(host.anchor_tokens(), 0..anchor);
            prop_assert_eq!(host.local_len(), expected.len());
            prop_assert_eq!(host.kept(), anchor..expected.len());
        }
    }

    /// The paper's definition: every block but the first is prefixed with the anchor, and is causal with it.
    #[test]
    fn the_local_mask_shows_each_block_its_anchor_and_itself(layout in layouts()) {
        for rank in 0..layout.hosts() {
            let host = layout.host(rank).unwrap();
            let tokens: Vec<usize> = host.tokens().collect();
            let len = tokens.len();
            for row in host.kept() {
                let block = tokens[row] / layout.block_len();
                let start = block * layout.block_len();
                let prefix = if block == 0 { 0 } else { layout.anchor_len() };
                let expected: Vec<usize> = (0..prefix).chain(start..=tokens[row]).collect();
                let mut seen: Vec<usize> =
                    (0..len).filter(|&key| sees(host.mask(), len, len, row, key)).map(|key| tokens[key]).collect();
                seen.sort_unstable();
                prop_assert_eq!(seen, expected, "token {}", tokens[row]);
            }
            // The anchor's rows are those of the context's start, so that their KV is too.
            for row in 0..host.kept().start {
                let seen: Vec<usize> = (0..len).filter(|&key| sees(host.mask(), len, len, row, key)).collect();
                prop_assert_eq!(seen, (0..=row).collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn more_hosts_than_blocks_leaves_empty_shards() {
    let layout = StarLayout::new(10, 4, 4, 5).unwrap();
    let own: Vec<_> = (0..5).map(|rank| layout.host(rank).unwrap().own_tokens().len()).collect();
    assert_eq!(own, [4, 4, 2, 0, 0]);
    let empty = layout.host(4).unwrap();
    assert_eq!((empty.local_len(), empty.kept(), empty.tokens().len()), (0, 0..0, 0));
}

#[test]
fn arguments_out_of_range_are_named() {
    let name = |result: star_attention::Result<StarLayout>| match result {
        Err(Error::Value { argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    assert_eq!(name(StarLayout::new(8, 0, 0, 1)), "block_len");
    assert_eq!(name(StarLayout::new(8, 4, 5, 1)), "anchor_len");
    assert_eq!(name(StarLayout::new(8, 4, 4, 0)), "hosts");
    let layout = StarLayout::new(8, 4, 4, 2).unwrap();
    assert!(matches!(layout.host(2), Err(Error::Value { argument: "rank", .. })));
    // Extents at the end of the range do not overflow.
    let huge = StarLayout::new(usize::MAX, usize::MAX - 1, 1, 3).unwrap();
    let own: Vec<_> = (0..3).map(|rank| huge.host(rank).unwrap().own_tokens()).collect();
    assert_eq!(own, [0..usize::MAX - 1, usize::MAX - 1..usize::MAX, usize::MAX..usize::MAX]);
}
