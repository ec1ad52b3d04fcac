//! The merge over ranks whose partials are in device memory, against the merge of all of them in
//! one place.

use crate::backend::Backend;
use crate::call::on_each_device;
use crate::common::{Rng, Tensor, indices, named, sinks};
use star_attention::comm::{
    Collective, DeviceCollective, Link, MergePlan, MergeWay, Staged, ThreadGroup, Traffic,
    share_anchor_on_device,
};
use star_attention::cuda::{self, DevicePartial, DeviceTensor, DeviceTensorMut};
use star_attention::merge::{self, Partial};
use star_attention::{Element, Error, bf16, f16};

const LINK: Link = Link { latency: 1e-5, bandwidth: 1e10 };

/// A rank's partial, `[batch, seq, heads, dim]`: some rows have seen no key, and some elements are -0
/// in f16.
fn partial<T: Element>(rank: usize, shape: [usize; 4]) -> (Tensor<T>, Vec<f32>) {
    let mut rng = Rng::new(rank as u64 + 1);
    let out = Tensor::contiguous("partial", shape, |[.., d]| match d % 5 {
        0 => -1e-9,
        _ => 2.0 * rng.uniform() - 1.0,
    });
    let rows = shape[..3].iter().product();
    let lse = (0..rows).map(|_| if rng.below(5) == 0 { f32::NEG_INFINITY } else { 3.0 * rng.normal() });
    (out, lse.collect())
}

/// Strides of `[batch, seq, heads, dim]` with heads before tokens, or with tokens first and room
/// between rows.
fn strides([_, seq, heads, dim]: [usize; 4], heads_first: bool) -> [usize; 4] {
    match heads_first {
        true => [heads * seq * dim, dim, seq * dim, 1],
        false => [seq * heads * (dim + 3), heads * (dim + 3), dim + 3, 1],
    }
}

/// A tensor's elements at strides.
fn laid_out<T: Element>(tensor: &Tensor<T>, strides: [usize; 4]) -> Vec<T> {
    let shape = tensor.shape();
    let mut data = vec![T::from_f32(f32::NAN); shape[0] * strides[0].max(1)];
    for index in indices(shape) {
        data[(0..4).map(|axis| index[axis] * strides[axis]).sum::<usize>()] = tensor.get(index);
    }
    data
}

/// One rank's merged output and log-sum-exp as bits, the same in four calls: of partials that lie
/// as one of the ways wants them, that do not, and that attention has written into the message.
fn merged<B: Backend, T: Element, O: Element>(
    group: &ThreadGroup,
    shape: [usize; 4],
    way: MergeWay,
    sinks: Option<&[f32]>,
) -> Vec<u32> {
    let backend = B::open(group.rank() as u64);
    let staged = Staged { device: backend.device(), group };
    let plan = MergePlan::<T, O>::new(shape, group.size(), &LINK).unwrap().with_way(way);
    let (out, lse) = partial::<T>(group.rank(), shape);
    let mut scratch = backend.memory(&vec![0xa5u8; plan.device_scratch_bytes()]);
    let sinks = sinks.map(|sinks| backend.memory(sinks));
    let sinks = sinks.as_ref().map(|sinks| backend.span(sinks));
    let merge = plan.on_device(backend.device(), backend.stream(), backend.span_mut(&mut scratch)).unwrap();
    let mut merge = merge.with_sinks(sinks.as_ref()).unwrap();
    // The output's rows have room between them.
    let to_strides = strides(shape, false);
    let unwritten = vec![O::from_f32(f32::NAN); shape[0] * to_strides[0].max(1)];
    let row_major = [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1];
    let before = group.traffic();
    let results =
        [Some(row_major), Some(strides(shape, true)), Some(strides(shape, false)), None].map(|from| {
            let mut merged = backend.memory(&unwritten);
            let mut merged_lse = backend.memory(&vec![f32::NAN; lse.len()]);
            let data = laid_out(&out, from.unwrap_or(row_major));
            let (memory, memory_lse) = (backend.memory(&data), backend.memory(&lse));
            let view = DeviceTensor::new("partial", backend.span(&memory), shape, from.unwrap_or(row_major))
                .unwrap();
            let partial = DevicePartial { out: view, lse: backend.span(&memory_lse) };
            let mut to =
                DeviceTensorMut::new("out", backend.span_mut(&mut merged), shape, to_strides).unwrap();
            let mut to_lse = backend.span_mut(&mut merged_lse);
            if from.is_some() {
                merge.merge(&staged, &partial, &mut to, Some(&mut to_lse)).unwrap();
            } else {
                {
                    // In attention's place: a merge of one partial.
                    let (mut place, mut place_lse) = merge.partial().unwrap();
                    let one = std::slice::from_ref(&partial);
                    cuda::merge_separate(
                        backend.device(),
                        backend.stream(),
                        one,
                        None,
                        &mut place,
                        Some(&mut place_lse),
                    )
                    .unwrap();
                }
                merge.run(&staged, &mut to, Some(&mut to_lse)).unwrap();
            }
            drop((to, to_lse));
            let (merged, merged_lse) = (backend.read(&merged), backend.read(&merged_lse));
            let at =
                |index: [usize; 4]| merged[(0..4).map(|axis| index[axis] * to_strides[axis]).sum::<usize>()];
            let out = indices(shape).map(|index| at(index).to_f32().to_bits());
            let written = indices(shape).count();
            assert_eq!(merged.iter().filter(|x| !x.to_f32().is_nan()).count(), written, "wrote between rows");
            out.chain(merged_lse.iter().map(|x| x.to_bits())).collect::<Vec<u32>>()
        });
    assert!(results.iter().all(|bits| *bits == results[0]), "partials at other strides have other bits");

    // The bytes of a message, counted literally.
    let (rows, dim, others) = (lse.len(), shape[3], group.size() as u64 - 1);
    let row = |size: usize| (dim * size + 4) as u64;
    let (collectives, bytes) = match way {
        MergeWay::AllGather => (1, rows as u64 * row(size_of::<T>())),
        MergeWay::ByRows => {
            (2, rows.div_ceil(group.size()) as u64 * (row(size_of::<T>()) + row(size_of::<O>())))
        }
    };
    let sent = Traffic { collectives, messages: collectives * others, bytes: others * bytes };
    assert_eq!((group.traffic() - before, plan.traffic()), (sent + sent + sent + sent, sent));
    let [bits, ..] = results;
    bits
}

fn check<B: Backend, T: Element, O: Element>(size: usize, shape: [usize; 4], unit: f32) {
    check_with_sinks::<B, T, O>(size, shape, unit, None);
    check_with_sinks::<B, T, O>(size, shape, unit, Some(&sinks(shape[2], size as u64)));
}

fn check_with_sinks<B: Backend, T: Element, O: Element>(
    size: usize,
    shape: [usize; 4],
    unit: f32,
    sinks: Option<&[f32]>,
) {
    let parts: Vec<_> = (0..size).map(|rank| partial::<T>(rank, shape)).collect();
    let partials: Vec<_> = parts.iter().map(|(out, lse)| Partial { out: out.view(), lse }).collect();
    let mut expected = Tensor::<f32>::contiguous("out", shape, |_| f32::NAN);
    let mut expected_lse = vec![f32::NAN; parts[0].1.len()];
    match sinks {
        Some(sinks) => merge::merge_with_sinks(&partials, sinks, expected.view_mut(), &mut expected_lse),
        None => merge::merge(&partials, expected.view_mut(), &mut expected_lse),
    }
    .unwrap();
    let expected: Vec<f32> = expected.values().chain(expected_lse).collect();

    let results: Vec<Vec<u32>> = [MergeWay::AllGather, MergeWay::ByRows]
        .into_iter()
        .flat_map(|way| {
            let ranks = ThreadGroup::ranks(size).unwrap();
            std::thread::scope(|scope| {
                let threads: Vec<_> = ranks
                    .into_iter()
                    .map(|rank| scope.spawn(move || merged::<B, T, O>(&rank, shape, way, sinks)))
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
    fn is_the_merge_of_all_partials_on_every_rank() {
        for size in [1, 2, 3, 4, 8] {
            for shape in [[1, 1, 8, 64], [1, 5, 6, 32], [2, 3, 4, 24], [1, 2, 3, 20], [1, 1, 1, 7], [1, 0, 8, 8]] {
                check::<B, f32, f32>(size, shape, 0.0);
                check::<B, f32, bf16>(size, shape, 0.5 / 128.0);
                check::<B, bf16, bf16>(size, shape, 0.5 / 128.0);
                check::<B, f16, f32>(size, shape, 0.0);
                check::<B, f32, f16>(size, shape, 0.5 / 1024.0);
            }
        }
    }

    /// An infinite log-sum-exp is no mark of an empty row: the row is NaN on every rank, and no
    /// other is.
    fn an_infinite_lse_makes_its_row_nan() {
        const SHAPE: [usize; 4] = [1, 5, 1, 8];
        for way in [MergeWay::AllGather, MergeWay::ByRows] {
            let ranks = ThreadGroup::ranks(2).unwrap();
            std::thread::scope(|scope| {
                for group in ranks {
                    scope.spawn(move || {
                        let backend = B::open(0);
                        let staged = Staged { device: backend.device(), group: &group };
                        let plan = MergePlan::<f32, f32>::new(SHAPE, 2, &LINK).unwrap().with_way(way);
                        let lse = [if group.rank() == 0 { f32::INFINITY } else { 1.0 }, 0.0, 0.0, 0.0, 0.0];
                        let (out, lse) = (backend.memory(&[1f32; 40]), backend.memory(&lse));
                        let mut scratch = backend.memory(&vec![0u8; plan.device_scratch_bytes()]);
                        let (mut merged, mut merged_lse) = (backend.memory(&[7f32; 40]), backend.memory(&[7f32; 5]));
                        let partial = DevicePartial {
                            out: DeviceTensor::contiguous("partial", backend.span(&out), SHAPE).unwrap(),
                            lse: backend.span(&lse),
                        };
                        plan.on_device(backend.device(), backend.stream(), backend.span_mut(&mut scratch))
                            .unwrap()
                            .merge(
                                &staged,
                                &partial,
                                &mut DeviceTensorMut::contiguous("out", backend.span_mut(&mut merged), SHAPE)
                                    .unwrap(),
                                Some(&mut backend.span_mut(&mut merged_lse)),
                            )
                            .unwrap();
                        let (merged, merged_lse) = (backend.read(&merged), backend.read(&merged_lse));
                        for row in 0..5 {
                            let nan = merged[8 * row..][..8].iter().chain(&merged_lse[row..=row]).map(|x| x.is_nan());
                            assert!(nan.into_iter().all(|nan| nan == (row == 0)), "row {row}");
                        }
                    });
                }
            });
        }
    }

    fn the_anchor_of_rank_0_comes_to_all() {
        // Rows of a cache with room behind them, heads first, and without gaps.
        for strides in [[200, 16, 8, 1], [96, 8, 48, 1], [96, 16, 8, 1]] {
            const SHAPE: [usize; 4] = [2, 6, 2, 8];
            let ranks = ThreadGroup::ranks(3).unwrap();
            std::thread::scope(|scope| {
                for group in ranks {
                    scope.spawn(move || {
                        let backend = B::open(0);
                        let staged = Staged { device: backend.device(), group: &group };
                        let value_at = |[b, s, h, d]: [usize; 4], of: usize| (of * 1000 + b * 500 + s * 20 + h * 10 + d) as f32;
                        let place = |index: [usize; 4]| (0..4).map(|axis| index[axis] * strides[axis]).sum::<usize>();
                        let mut memory = [0, 1].map(|of| {
                            let mut data = vec![-1f32; 400];
                            if group.rank() == 0 {
                                indices(SHAPE).for_each(|index| data[place(index)] = value_at(index, of));
                            }
                            backend.memory(&data)
                        });
                        let before = group.traffic();
                        {
                            let [key, value] = &mut memory;
                            let view = |span| DeviceTensorMut::new("anchor", span, SHAPE, strides).unwrap();
                            let (mut key, mut value) = (view(backend.span_mut(key)), view(backend.span_mut(value)));
                            share_anchor_on_device(&staged, backend.stream(), &mut key, &mut value).unwrap();
                        }
                        let sent = if group.rank() == 0 { 2 } else { 0 };
                        let sent = Traffic { collectives: 1, messages: sent, bytes: sent * 2 * 192 * 4 };
                        assert_eq!(group.traffic() - before, sent);
                        for (of, memory) in memory.iter().enumerate() {
                            let data = backend.read(memory);
                            assert!(indices(SHAPE).all(|index| data[place(index)] == value_at(index, of)));
                            assert_eq!(data.iter().filter(|&&x| x == -1.0).count(), 400 - 192, "wrote between rows");
                        }
                    });
                }
            });
        }
    }

    fn an_anchor_that_does_not_fit_is_not_sent() {
        let group = ThreadGroup::ranks(1).unwrap().remove(0);
        let backend = B::open(0);
        let staged = Staged { device: backend.device(), group: &group };
        let mut memory = [(); 3].map(|()| backend.memory(&[0f32; 64]));
        let [key, value, other] = &mut memory;
        let view = |span, shape, strides| DeviceTensorMut::new("anchor", span, shape, strides).unwrap();
        let mut key = view(backend.span_mut(key), [1, 2, 2, 8], [32, 16, 8, 1]);
        let mut value = view(backend.span_mut(value), [1, 3, 2, 8], [48, 16, 8, 1]);
        let error = share_anchor_on_device(&staged, backend.stream(), &mut key, &mut value).unwrap_err();
        assert_eq!(named(error), ("shape", "value"));
        let mut value = value.narrow(1, 0, 2).unwrap().narrow(3, 0, 4).unwrap();
        let mut key = view(backend.span_mut(other), [1, 2, 2, 4], [32, 16, 8, 2]);
        let error = share_anchor_on_device(&staged, backend.stream(), &mut key, &mut value).unwrap_err();
        assert_eq!(named(error), ("stride", "key"));
        assert_eq!(group.traffic(), Traffic::default());
    }

    fn refuses_what_does_not_fit() {
        let group = ThreadGroup::ranks(1).unwrap().remove(0);
        let backend = B::open(0);
        let attempt = |ranks: usize, [out_len, lse_len, to_seq, to_lse, less]: [usize; 5]| {
            let plan = MergePlan::<f32, f32>::new([1, 2, 2, 8], ranks, &LINK).unwrap();
            let (from, from_lse) = (backend.memory(&vec![0f32; out_len]), backend.memory(&vec![0f32; lse_len]));
            let (mut to, mut lse) = (backend.memory(&vec![0f32; 16 * to_seq]), backend.memory(&vec![0f32; to_lse]));
            let mut scratch = backend.memory(&vec![0u8; plan.device_scratch_bytes() - less]);
            let mut out =
                DeviceTensorMut::contiguous("out", backend.span_mut(&mut to), [1, to_seq, 2, 8]).unwrap();
            let partial = DevicePartial {
                out: DeviceTensor::contiguous("partial", backend.span(&from), [1, out_len / 16, 2, 8]).unwrap(),
                lse: backend.span(&from_lse),
            };
            let span = backend.span_mut(&mut scratch);
            plan.on_device(backend.device(), backend.stream(), span)?.merge(
                &Staged { device: backend.device(), group: &group },
                &partial,
                &mut out,
                Some(&mut backend.span_mut(&mut lse)),
            )
        };
        attempt(1, [32, 4, 2, 4, 0]).unwrap();
        let before = group.traffic();
        assert_eq!(named(attempt(1, [16, 4, 2, 4, 0]).unwrap_err()), ("shape", "partial"));
        assert_eq!(named(attempt(1, [32, 5, 2, 4, 0]).unwrap_err()), ("shape", "partial"));
        assert_eq!(named(attempt(1, [32, 4, 1, 4, 0]).unwrap_err()), ("shape", "out"));
        assert_eq!(named(attempt(1, [32, 4, 2, 3, 0]).unwrap_err()), ("shape", "lse"));
        assert_eq!(named(attempt(2, [32, 4, 2, 4, 0]).unwrap_err()), ("value", "group"));
        assert!(matches!(attempt(1, [32, 4, 2, 4, 1]).unwrap_err(), Error::Workspace { .. }));
        for heads in [1, 3] {
            let plan = MergePlan::<f32, f32>::new([1, 2, 2, 8], 1, &LINK).unwrap();
            let mut scratch = backend.memory(&vec![0u8; plan.device_scratch_bytes()]);
            let sinks = backend.memory(&vec![0f32; heads]);
            let merge = plan.on_device(backend.device(), backend.stream(), backend.span_mut(&mut scratch)).unwrap();
            let refused = merge.with_sinks(Some(&backend.span(&sinks))).map(drop);
            assert_eq!(named(refused.unwrap_err()), ("shape", "sinks"));
        }
        let halves = MergePlan::<bf16, f16>::new([1, 2, 2, 8], 1, &LINK).unwrap();
        let mut scratch = backend.memory(&vec![0u8; halves.device_scratch_bytes()]);
        let span = backend.span_mut(&mut scratch);
        let refused = halves.on_device(backend.device(), backend.stream(), span).map(drop);
        assert!(matches!(refused.unwrap_err(), Error::DType { argument: "out", .. }));
        assert_eq!(group.traffic(), before);
    }

    fn memory_that_does_not_fit_together_is_not_sent() {
        let group = ThreadGroup::ranks(1).unwrap().remove(0);
        let backend = B::open(0);
        let staged = Staged { device: backend.device(), group: &group };
        let (send, mut receive) = (backend.memory(&[1u8; 6]), backend.memory(&[0u8; 5]));
        let parts = [(backend.span(&send), backend.span_mut(&mut receive))];
        assert_eq!(named(staged.all_gather(backend.stream(), &parts).unwrap_err()), ("shape", "receive"));
        assert_eq!(named(staged.all_to_all(backend.stream(), &parts).unwrap_err()), ("shape", "receive"));
        let [(_, buffer)] = parts;
        let mut parts = [buffer];
        assert_eq!(named(staged.broadcast(backend.stream(), 1, &mut parts).unwrap_err()), ("value", "root"));
        staged.broadcast(backend.stream(), 0, &mut parts).unwrap();
        assert_eq!(DeviceCollective::<<B as Backend>::Device>::traffic(&staged).collectives, 1);
    }
}
