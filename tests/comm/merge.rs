//! What the merge over ranks refuses, and when it goes by rows.

use crate::common::named;
use crate::threads::all_ranks;
use star_attention::comm::{Collective, Link, MergePlan, MergeWay, Traffic};
use star_attention::merge::{Partial, merge_with_sinks};
use star_attention::{TensorView, TensorViewMut};

const LINK: Link = Link { latency: 1e-5, bandwidth: 1e9 };

#[test]
fn a_merge_that_does_not_fit_sends_nothing() {
    for way in [MergeWay::AllGather, MergeWay::ByRows] {
        all_ranks(2, |group| {
            let plan = MergePlan::<f32, f32>::new([1, 3, 1, 4], 2, &LINK).unwrap().with_way(way);
            let mut merge = plan.on_cpu();
            let (data, lse) = ([0.0; 12], [0.0; 3]);
            let (mut to, mut to_lse) = ([7.0f32; 12], [7.0; 3]);
            let mut attempt = |from_len: usize, lse: &[f32], to_len: usize, lse_len: usize| {
                let out =
                    TensorView::contiguous("partial", &data[..from_len], [1, from_len / 4, 1, 4]).unwrap();
                let view =
                    TensorViewMut::contiguous("out", &mut to[..to_len], [1, to_len / 4, 1, 4]).unwrap();
                merge.merge(&group, &Partial { out, lse }, view, Some(&mut to_lse[..lse_len])).unwrap_err()
            };
            assert_eq!(named(attempt(8, &lse, 12, 3)), ("shape", "partial"));
            assert_eq!(named(attempt(12, &lse[..2], 12, 3)), ("shape", "partial"));
            assert_eq!(named(attempt(12, &lse, 8, 3)), ("shape", "out"));
            assert_eq!(named(attempt(12, &lse, 12, 2)), ("shape", "lse"));
            let view = TensorViewMut::new("out", &mut to, [1, 3, 1, 2], [4, 4, 4, 2]).unwrap();
            assert_eq!(named(merge.run(&group, view, None).unwrap_err()), ("shape", "out"));
            let view = TensorViewMut::contiguous("out", &mut to, [1, 3, 1, 4]).unwrap();
            assert_eq!(named(merge.run(&group, view, None).unwrap_err()), ("value", "partial"));
            assert_eq!(named(merge.with_sinks(Some(&[0.0; 2])).map(drop).unwrap_err()), ("shape", "sinks"));
            assert_eq!(named(merge.with_sinks(Some(&[f32::NAN])).map(drop).unwrap_err()), ("value", "sinks"));
            assert_eq!((to, to_lse), ([7.0; 12], [7.0; 3]));
            assert_eq!(group.traffic(), Traffic::default());
        });
    }
}

#[test]
fn either_way_gives_the_bits_of_a_merge_of_all_partials() {
    // Rows of a rank that do not fill their last block, and ranks of fewer rows.
    for (ranks, shape) in [(2, [1, 40, 3, 20]), (5, [2, 151, 3, 20]), (6, [1, 7, 1, 130])] {
        let [batch, seq, heads, dim] = shape;
        let rows = batch * seq * heads;
        let number = |i: usize| (i as u32).wrapping_mul(2_654_435_769) as f32 / 2f32.powi(32) - 0.5;
        let parts: Vec<(Vec<f32>, Vec<f32>)> = (0..ranks)
            .map(|rank| {
                let out = (0..rows * dim).map(|i| number(rank * rows * dim + i)).collect();
                let lse =
                    (0..rows).map(|i| if (i + rank) % 5 == 0 { f32::NEG_INFINITY } else { number(i + rank) });
                (out, lse.collect())
            })
            .collect();
        let view = |rank: usize| {
            let (out, lse): &(Vec<f32>, Vec<f32>) = &parts[rank];
            Partial { out: TensorView::contiguous("partial", out, shape).unwrap(), lse }
        };
        let sinks: Vec<f32> = (0..heads).map(number).collect();
        let (mut expected, mut expected_lse) = (vec![0f32; rows * dim], vec![0f32; rows]);
        let out = TensorViewMut::contiguous("out", &mut expected, shape).unwrap();
        let all: Vec<_> = (0..ranks).map(view).collect();
        merge_with_sinks(&all, &sinks, out, &mut expected_lse).unwrap();
        for way in [MergeWay::AllGather, MergeWay::ByRows] {
            all_ranks(ranks, |group| {
                let plan = MergePlan::<f32, f32>::new(shape, ranks, &LINK).unwrap().with_way(way);
                let (mut out, mut lse) = (vec![f32::NAN; rows * dim], vec![f32::NAN; rows]);
                let to = TensorViewMut::contiguous("out", &mut out, shape).unwrap();
                let mut merge = plan.on_cpu();
                let merge = merge.with_sinks(Some(&sinks)).unwrap();
                merge.merge(&group, &view(group.rank()), to, Some(&mut lse)).unwrap();
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!((bits(&out), bits(&lse)), (bits(&expected), bits(&expected_lse)));
            });
        }
    }
}

#[test]
fn a_group_of_another_size_is_refused() {
    all_ranks(3, |group| {
        let mut merge = MergePlan::<f32, f32>::new([1, 1, 1, 1], 2, &LINK).unwrap().on_cpu();
        let partial =
            Partial { out: TensorView::contiguous("partial", &[0.0], [1; 4]).unwrap(), lse: &[0.0] };
        let mut out = [0.0f32];
        let view = TensorViewMut::contiguous("out", &mut out, [1; 4]).unwrap();
        assert_eq!(named(merge.merge(&group, &partial, view, None).unwrap_err()), ("value", "group"));
        merge.partial().unwrap();
        assert_eq!(named(merge.start(&group).unwrap_err()), ("value", "group"));
    });
}

#[test]
fn extents_that_no_message_could_have_are_refused() {
    let plan = |shape, ranks| MergePlan::<f32, f32>::new(shape, ranks, &LINK).map(|_| ()).unwrap_err();
    assert_eq!(named(plan([1, 1, 1, 1], 0)), ("value", "ranks"));
    assert_eq!(named(plan([1, 1, 1, 0], 1)), ("shape", "partial"));
    for shape in
        [[usize::MAX, 1, 1, 1], [1, 1 << 40, 1 << 20, 1], [1, 0, 1, usize::MAX], [0, 1 << 62, 1 << 62, 1]]
    {
        assert_eq!(named(plan(shape, 8)), ("shape", "partial"));
    }
}

#[test]
fn few_query_tokens_go_by_all_gather_and_many_by_rows() {
    // Field figures: 10 us and 200 GB/s, 8 ranks, 32 heads of 128 in bf16: the ways take the same
    // time at 46 tokens.
    let link = Link::new(10e-6, 200e9).unwrap();
    let way =
        |tokens| MergePlan::<half::bf16, half::bf16>::new([1, tokens, 32, 128], 8, &link).unwrap().way();
    assert_eq!(way(1), MergeWay::AllGather);
    assert_eq!(way(45), MergeWay::AllGather);
    assert_eq!(way(47), MergeWay::ByRows);
    assert_eq!(way(4096), MergeWay::ByRows);
    let two = MergePlan::<f32, f32>::new([1, 1 << 20, 32, 128], 2, &link).unwrap();
    assert_eq!(two.way(), MergeWay::AllGather, "over two ranks the second step saves no byte");
}

#[test]
fn an_infinite_lse_makes_its_row_nan_on_every_rank() {
    for way in [MergeWay::AllGather, MergeWay::ByRows] {
        all_ranks(2, |group| {
            let plan = MergePlan::<f32, f32>::new([1, 3, 1, 4], 2, &LINK).unwrap().with_way(way);
            let lse = [if group.rank() == 0 { f32::INFINITY } else { 1.0 }, 0.0, f32::NEG_INFINITY];
            let out = TensorView::contiguous("partial", &[1.0; 12], [1, 3, 1, 4]).unwrap();
            let (mut merged, mut merged_lse) = ([7.0f32; 12], [7.0; 3]);
            let to = TensorViewMut::contiguous("out", &mut merged, [1, 3, 1, 4]).unwrap();
            plan.on_cpu().merge(&group, &Partial { out, lse: &lse }, to, Some(&mut merged_lse)).unwrap();
            assert!(merged[..4].iter().chain(&merged_lse[..1]).all(|x| x.is_nan()));
            assert_eq!((&merged[4..8], &merged[8..]), (&[1.0; 4][..], &[0.0; 4][..]));
            assert_eq!(merged_lse[1..], [2f32.ln(), f32::NEG_INFINITY]);
        });
    }
}
