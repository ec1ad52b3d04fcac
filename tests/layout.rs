//! Layouts partition a context over ranks as the paper does.

use proptest::prelude::*;
use star_attention::cpu::reference::sees;
use star_attention::{Error, GeneratedKv, Mask, StarLayout};

fn layouts() -> impl Strategy<Value = StarLayout> {
    (0..300usize, 1..60usize, 0..60usize, 1..12usize).prop_map(|(context, block, anchor, ranks)| {
        StarLayout::builder(context)
            .block_len(block)
            .anchor_len(anchor.min(block))
            .ranks(ranks)
            .build()
            .unwrap()
    })
}

proptest! {
    #[test]
    fn ranks_partition_the_context_in_order_and_evenly(layout in layouts()) {
        let (mut token, mut block) = (0, 0);
        let mut counts = vec![];
        for rank in 0..layout.ranks() {
            let local = layout.rank(rank).unwrap();
            prop_assert_eq!(local.rank(), rank);
            prop_assert_eq!(local.blocks().start, block);
            block = local.blocks().end;
            counts.push(local.blocks().len());
            if !local.own_tokens().is_empty() {
                prop_assert_eq!(local.own_tokens().start, token);
                prop_assert_eq!(local.own_tokens().start, local.blocks().start * layout.block_len());
                token = local.own_tokens().end;
            }
            prop_assert_eq!(local.own_tokens().is_empty(), local.blocks().is_empty());
        }
        prop_assert_eq!((token, block), (layout.context_len(), layout.blocks()));
        // As even as possible, the first ranks taking one more.
        prop_assert!(counts.is_sorted_by(|a, b| a >= b));
        prop_assert!(counts[0] - counts[counts.len() - 1] <= 1);
        prop_assert_eq!(layout.query_position(), layout.context_len());
        prop_assert_eq!(layout.query_rank(), layout.ranks() - 1);
        prop_assert_eq!(layout.to_builder().build().unwrap(), layout);
    }

    /// Paper section 2.2, and its round-robin variant: one rank leads a step, each token is kept
    /// once, and no shard needs more than it was given room for.
    #[test]
    fn every_new_token_is_kept_by_one_rank(
        layout in layouts(), query_rank in 0..12usize, dealt in any::<bool>(),
        steps in prop::collection::vec(0..20usize, 0..12),
    ) {
        let query_rank = query_rank % layout.ranks();
        let generated = if dealt { GeneratedKv::RoundRobin } else { GeneratedKv::QueryRank };
        let layout = layout.to_builder().query_rank(query_rank).generated(generated).build().unwrap();
        let (tokens, longest) = (steps.iter().sum::<usize>(), steps.iter().copied().max().unwrap_or(0));
        let locals: Vec<_> = (0..layout.ranks()).map(|rank| layout.rank(rank).unwrap()).collect();
        let mut held: Vec<usize> = locals.iter().map(|local| local.own_tokens().len()).collect();
        let mut first = 0;
        for &len in &steps {
            let step: Vec<_> = locals.iter().map(|local| local.step(first..first + len)).collect();
            let leader = step[0].leader();
            let mut keepers = vec![0; len];
            for (rank, step) in step.iter().enumerate() {
                prop_assert_eq!(step.leads(), rank == leader);
                prop_assert_eq!(step.positions(), layout.context_len() + first..layout.context_len() + first + len);
                let (appended, mask) = if rank == leader { (len, Mask::Causal) } else { (0, Mask::Full) };
                prop_assert_eq!((step.appended(), step.mask()), (0..appended, mask));
                prop_assert!(held[rank] + appended <= locals[rank].room(tokens, longest));
                prop_assert_eq!(step.keeps_appended(), step.kept().eq(step.appended()));
                for row in step.kept() {
                    keepers[row] += 1;
                    let keeper = if dealt { (query_rank + first + row) % layout.ranks() } else { query_rank };
                    prop_assert_eq!(rank, keeper);
                }
                held[rank] += step.kept().len();
                prop_assert!(held[rank] <= locals[rank].room(tokens, longest));
            }
            prop_assert!(keepers.iter().all(|&count| count == 1));
            first += len;
        }
        // The room is no larger than that.
        for (local, &held) in locals.iter().zip(&held) {
            let while_leading = if dealt { longest - longest.div_ceil(layout.ranks()) } else { 0 };
            prop_assert_eq!(local.room(tokens, longest), held + while_leading);
        }
    }

    #[test]
    fn local_rows_are_the_anchor_and_the_own_tokens_at_their_positions(layout in layouts()) {
        for rank in 0..layout.ranks() {
            let local = layout.rank(rank).unwrap();
            let anchored = !local.own_tokens().is_empty() && local.blocks().start > 0;
            let anchor = if anchored { layout.anchor_len() } else { 0 };
            let expected: Vec<usize> = (0..anchor).chain(local.own_tokens()).collect();
            prop_assert_eq!(local.tokens().collect::<Vec<_>>(), expected.clone());
            prop_assert_eq!(local.positions().collect::<Vec<_>>(), expected.clone());
            prop_assert_eq!(local.anchor_tokens(), 0..anchor);
            prop_assert_eq!(local.local_len(), expected.len());
            prop_assert_eq!(local.kept(), anchor..expected.len());
        }
    }

    /// The paper's definition: every block but the first is prefixed with the anchor, and is causal
    /// with it.
    #[test]
    fn the_local_mask_shows_each_block_its_anchor_and_itself(layout in layouts()) {
        for rank in 0..layout.ranks() {
            let local = layout.rank(rank).unwrap();
            let tokens: Vec<usize> = local.tokens().collect();
            let len = tokens.len();
            for row in local.kept() {
                let block = tokens[row] / layout.block_len();
                let start = block * layout.block_len();
                let prefix = if block == 0 { 0 } else { layout.anchor_len() };
                let expected: Vec<usize> = (0..prefix).chain(start..=tokens[row]).collect();
                let mut seen: Vec<usize> =
                    (0..len).filter(|&key| sees(&local.mask(), len, len, row, key)).map(|key| tokens[key]).collect();
                seen.sort_unstable();
                prop_assert_eq!(seen, expected, "token {}", tokens[row]);
            }
            // The anchor's rows are those of the context's start, so that their KV is too.
            for row in 0..local.kept().start {
                let seen: Vec<usize> = (0..len).filter(|&key| sees(&local.mask(), len, len, row, key)).collect();
                prop_assert_eq!(seen, (0..=row).collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn more_ranks_than_blocks_leaves_empty_shards() {
    let layout = StarLayout::builder(10).block_len(4).anchor_len(4).ranks(5).build().unwrap();
    let own: Vec<_> = (0..5).map(|rank| layout.rank(rank).unwrap().own_tokens().len()).collect();
    assert_eq!(own, [4, 4, 2, 0, 0]);
    let empty = layout.rank(4).unwrap();
    assert_eq!((empty.local_len(), empty.kept(), empty.tokens().len()), (0, 0..0, 0));
}

#[test]
fn arguments_out_of_range_are_named() {
    let name = |result: star_attention::Result<StarLayout>| match result {
        Err(Error::Value { argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    let layout = StarLayout::builder(8);
    assert_eq!(name(layout.block_len(0).build()), "block_len");
    assert_eq!(name(layout.block_len(4).anchor_len(5).build()), "anchor_len");
    assert_eq!(name(layout.ranks(0).build()), "ranks");
    assert_eq!(name(layout.ranks(3).query_rank(3).build()), "query_rank");
    let layout = StarLayout::builder(8).block_len(4).anchor_len(4).ranks(2).build().unwrap();
    assert!(matches!(layout.rank(2), Err(Error::Value { argument: "rank", .. })));
    // Extents at the end of the range do not overflow.
    let huge =
        StarLayout::builder(usize::MAX).block_len(usize::MAX - 1).anchor_len(1).ranks(3).build().unwrap();
    let own: Vec<_> = (0..3).map(|rank| huge.rank(rank).unwrap().own_tokens()).collect();
    assert_eq!(own, [0..usize::MAX - 1, usize::MAX - 1..usize::MAX, usize::MAX..usize::MAX]);
    let dealt = StarLayout::builder(8).ranks(usize::MAX).generated(GeneratedKv::RoundRobin).build().unwrap();
    let step = dealt.rank(1).unwrap().step(3..5);
    assert_eq!((step.leader(), step.kept().len()), (2, 0));
    assert_eq!(dealt.rank(3).unwrap().step(3..5).kept().collect::<Vec<_>>(), [1]);
}
