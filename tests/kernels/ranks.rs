//! The merge over ranks whose partials are in device memory, against the merge of all of them in one place.

use crate::backend::Backend;
use crate::call::on_each_device;
use crate::common::{Rng, Tensor, named};
use star_attention::comm::{
    Collective, DeviceCollective, Link, MergeWay, RanksMerge, Staged, ThreadGroup, Traffic,
};
use star_attention::cuda::DeviceTensorMut;
use star_attention::merge::{self, Partial};
use star_attention::{Element, Error, bf16, f16};

const LINK: Link = Link { latency: 1e-5, bandwidth: 1e10 };

/// A rank's partial, `[batch, seq, heads, dim]`: some rows have seen no key.
fn partial<T: Element>(rank: usize, shape: [usize; 4]) -> (Tensor<T>, Vec<f32>) {
    let mut rng = Rng::new(rank as u64 + 1);
    let out = Tensor::contiguous("partial", shape, |_| 2.0 * rng.uniform() - 1.0);
    let rows = shape[..3].iter().product();
    let lse = (0..rows).map(|_| if rng.below(5) == 0 { f32::NEG_INFINITY } else { 3.0 * rng.normal() });
    (out, lse.collect())
}

/// As attention leaves it: heads before tokens.
fn heads_first<T: Element>(tensor: &Tensor<T>) -> Vec<T> {
    let [batch, seq, heads, dim] = tensor.shape();
    let index = |i: usize| [i / (heads * seq * dim), i / dim % seq, i / (seq * dim) % heads, i % dim];
    (0..batch * heads * seq * dim).map(|i| tensor.get(index(i))).collect()
}

/// One rank's merged output and log-sum-exp as bits.
fn merged<B: Backend, T: Element, O: Element>(
    group: &ThreadGroup,
    shape: [usize; 4],
    way: MergeWay,
) -> Vec<u32> {
    let backend = B::open(group.rank() as u64);
    let staged = Staged { device: backend.device(), group };
    let plan = RanksMerge::<T, O>::new(shape, group.size(), &LINK).unwrap().with_way(way).unwrap();
    let (out, lse) = partial::<T>(group.rank(), shape);
    let elements = shape.iter().product();
    let (partial_out, partial_lse) = (backend.memory(&heads_first(&out)), backend.memory(&lse));
    let mut scratch = backend.memory(&vec![0xa5u8; plan.scratch_len()]);
    let mut merged = backend.memory(&vec![O::from_f32(f32::NAN); elements]);
    let mut merged_lse = backend.memory(&vec![f32::NAN; lse.len()]);
    let before = group.traffic();
    let mut prepared =
        plan.prepare(backend.device(), backend.stream(), backend.span_mut(&mut scratch)).unwrap();
    prepared
        .run(
            &staged,
            (&backend.span(&partial_out), &backend.span(&partial_lse)),
            &mut DeviceTensorMut::contiguous("out", backend.span_mut(&mut merged), shape).unwrap(),
            Some(&mut backend.span_mut(&mut merged_lse)),
        )
        .unwrap();

    // The bytes of a message, counted literally.
    let (rows, dim, others) = (lse.len(), shape[3], group.size() as u64 - 1);
    let row = |size: usize| (dim * size + 4) as u64;
    let (collectives, bytes) = match way {
        MergeWay::AllGather => (1, rows as u64 * row(size_of::<T>())),
        MergeWay::ByRows => (2, (rows / group.size()) as u64 * (row(size_of::<T>()) + row(size_of::<O>()))),
    };
    let sent = Traffic { collectives, messages: collectives * others, bytes: others * bytes };
    assert_eq!((group.traffic() - before, plan.traffic()), (sent, sent));

    let (merged, merged_lse) = (backend.read(&merged), backend.read(&merged_lse));
    merged.iter().map(|x| x.to_f32().to_bits()).chain(merged_lse.iter().map(|x| x.to_bits())).collect()
}

fn check<B: Backend, T: Element, O: Element>(size: usize, shape: [usize; 4], unit: f32) {
    let parts: Vec<_> = (0..size).map(|rank| partial::<T>(rank, shape)).collect();
    let partials: Vec<_> = parts.iter().map(|(out, lse)| Partial { out: out.view(), lse }).collect();
    let mut expected = Tensor::<f32>::contiguous("out", shape, |_| f32::NAN);
    let mut expected_lse = vec![f32::NAN; parts[0].1.len()];
    merge::merge(&partials, expected.view_mut(), &mut expected_lse).unwrap();
    let expected: Vec<f32> = expected.values().chain(expected_lse).collect();

    let divides = shape[..3].iter().product::<usize>().is_multiple_of(size);
    let ways = [MergeWay::AllGather, MergeWay::ByRows];
    let results: Vec<Vec<u32>> = ways[..1 + usize::from(divides)]
        .iter()
        .flat_map(|&way| {
            let ranks = ThreadGroup::ranks(size).unwrap();
            std::thread::scope(|scope| {
                let threads: Vec<_> = ranks
                    .into_iter()
                    .map(|rank| scope.spawn(move || merged::<B, T, O>(&rank, shape, way)))
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            })
        })
        .collect();
    for (got, expected) in results[0].iter().map(|&bits| f32::from_bits(bits)).zip(expected) {
        // Log-sum-exps, which may be larger than 1, come in f32 always.
        let bound = unit + 4e-6 * expected.abs().max(1.0);
        assert!(got == expected || (got - expected).abs() <= bound, "{got} for {expected}");
    }
    assert!(results.iter().all(|bits| *bits == results[0]), "every rank and both ways give the same bits");
}

on_each_device! {
    fn is_the_merge_of_all_partials_on_every_host() {
        for size in [1, 2, 3, 4, 8] {
            for shape in [[1, 1, 8, 64], [1, 5, 24, 32], [2, 3, 4, 128], [1, 2, 3, 20], [1, 0, 8, 8]] {
                check::<B, f32, f32>(size, shape, 0.0);
                check::<B, f32, bf16>(size, shape, 0.5 / 128.0);
                check::<B, bf16, bf16>(size, shape, 0.5 / 128.0);
                check::<B, f16, f32>(size, shape, 0.0);
            }
        }
    }

    fn refuses_what_does_not_fit() {
        let plan = |shape, ranks| RanksMerge::<f32, f32>::new(shape, ranks, &LINK);
        assert_eq!(named(plan([1; 4], 0).unwrap_err()), ("value", "ranks"));
        assert_eq!(named(plan([1, 1, 1, 0], 1).unwrap_err()), ("shape", "partial"));
        assert_eq!(named(plan([1, usize::MAX, 1, 1], 1).unwrap_err()), ("shape", "partial"));
        let by_rows = |shape, ranks| plan(shape, ranks).unwrap().with_way(MergeWay::ByRows).unwrap_err();
        assert_eq!(named(by_rows([1, 5, 3, 8], 2)), ("value", "way"));
        assert_eq!(plan([1, (1 << 20) + 1, 3, 8], 4).unwrap().way(), MergeWay::AllGather);
        assert_eq!(plan([1, 1 << 20, 3, 8], 4).unwrap().way(), MergeWay::ByRows);

        let group = ThreadGroup::ranks(1).unwrap().remove(0);
        let backend = B::open(0);
        let attempt = |ranks: usize, [out_len, lse_len, to_seq, to_lse, less]: [usize; 5]| {
            let plan = plan([1, 2, 2, 8], ranks).unwrap();
            let (from, from_lse) = (backend.memory(&vec![0f32; out_len]), backend.memory(&vec![0f32; lse_len]));
            let (mut to, mut lse) = (backend.memory(&vec![0f32; 16 * to_seq]), backend.memory(&vec![0f32; to_lse]));
            let mut scratch = backend.memory(&vec![0u8; plan.scratch_len() - less]);
            let mut out =
                DeviceTensorMut::contiguous("out", backend.span_mut(&mut to), [1, to_seq, 2, 8]).unwrap();
            plan.prepare(backend.device(), backend.stream(), backend.span_mut(&mut scratch))?.run(
                &Staged { device: backend.device(), group: &group },
                (&backend.span(&from), &backend.span(&from_lse)),
                &mut out,
                Some(&mut backend.span_mut(&mut lse)),
            )
        };
        attempt(1, [32, 4, 2, 4, 0]).unwrap();
        assert_eq!(named(attempt(1, [31, 4, 2, 4, 0]).unwrap_err()), ("shape", "partial"));
        assert_eq!(named(attempt(1, [32, 5, 2, 4, 0]).unwrap_err()), ("shape", "partial"));
        assert_eq!(named(attempt(1, [32, 4, 1, 4, 0]).unwrap_err()), ("shape", "out"));
        assert_eq!(named(attempt(1, [32, 4, 2, 3, 0]).unwrap_err()), ("shape", "lse"));
        assert_eq!(named(attempt(2, [32, 4, 2, 4, 0]).unwrap_err()), ("value", "group"));
        assert!(matches!(attempt(1, [32, 4, 2, 4, 1]).unwrap_err(), Error::Workspace { .. }));
    }

    fn memory_that_does_not_fit_together_is_not_sent() {
        let group = ThreadGroup::ranks(1).unwrap().remove(0);
        let backend = B::open(0);
        let staged = Staged { device: backend.device(), group: &group };
        let (send, mut receive) = (backend.memory(&[1u8; 6]), backend.memory(&[0u8; 5]));
        let parts = [(backend.span(&send), backend.span_mut(&mut receive))];
        assert_eq!(named(staged.all_gather(backend.stream(), &parts).unwrap_err()), ("shape", "receive"));
        assert_eq!(named(staged.all_to_all(backend.stream(), &parts).unwrap_err()), ("shape", "receive"));
        let [(_, mut buffer)] = parts;
        assert_eq!(named(staged.broadcast(backend.stream(), 1, &mut buffer).unwrap_err()), ("value", "root"));
        staged.broadcast(backend.stream(), 0, &mut buffer).unwrap();
        assert_eq!(DeviceCollective::<<B as Backend>::Device>::traffic(&staged).collectives, 1);
    }
}
