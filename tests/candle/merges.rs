//! Partials to one: of one rank, and of all.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use star_attention::comm::{Collective, ThreadGroup};
use star_attention::{AttentionConfig, candle};

/// Partials of some queries over parts of some keys, and the attention over all of them.
type Case = (Vec<(Tensor, Tensor)>, (Vec<f32>, Vec<f32>));

pub fn case(device: &Device, dtype: DType, f32_out: bool) -> Case {
    let full = AttentionConfig::default();
    let [q, k, v] = [[2, 3, 4, 64], [2, 31, 2, 64], [2, 31, 2, 64]]
        .map(|shape| random(shape).to_dtype(dtype).unwrap().to_device(device).unwrap());
    let attend = if f32_out { candle::partial } else { candle::attention };
    let partials = [(0, 14), (14, 0), (14, 17)].into_iter().map(|(start, len)| {
        let part = |x: &Tensor| x.narrow(1, start, len).unwrap();
        attend(&full, &q, &part(&k), &part(&v)).unwrap()
    });
    (partials.collect(), oracle(&full, &q, &k, &v))
}

/// The same elements elsewhere in memory.
fn moved((out, lse): &(Tensor, Tensor)) -> (Tensor, Tensor) {
    let lse = lse.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
    (heads_first(out), lse)
}

pub fn partials_merge_on(device: &Device, dtypes: &[(DType, f32)]) {
    for &(dtype, unit) in dtypes {
        for f32_out in [true, false] {
            let (mut partials, (expected, expected_lse)) = case(device, dtype, f32_out);
            let (out, lse) = candle::merge(&partials).unwrap();
            let merged_dtype = if f32_out { DType::F32 } else { dtype };
            assert_eq!((out.dtype(), lse.dtype()), (merged_dtype, DType::F32));
            let rounding = if f32_out { 1e-4 } else { unit };
            assert_close(&flat(&out), &expected, rounding);
            assert_close(&flat(&lse), &expected_lse, 1e-4);

            // Strides do not matter, each partial's own.
            partials[0] = moved(&partials[0]);
            let (again, again_lse) = candle::merge(&partials).unwrap();
            assert_eq!((flat(&again), flat(&again_lse)), (flat(&out), flat(&lse)));
        }
    }
}

#[test]
fn partials_merge() {
    partials_merge_on(&Device::Cpu, &DTYPES);
}

/// Sinks count in the merge that finishes the rows, of this rank or of all, and once.
pub fn sinks_join_the_last_merge_on(device: &Device, dtypes: &[(DType, f32)]) {
    let (full, sinks) = (AttentionConfig::default(), &sinks(device));
    for &(dtype, unit) in dtypes {
        let [q, k] = [[2, 3, 4, 64], [2, 31, 2, 64]]
            .map(|shape| random(shape).to_dtype(dtype).unwrap().to_device(device).unwrap());
        let (expected, expected_lse) = oracle_with_sinks(&full, [&q, &k, &k], Some(sinks));
        let partials = [(0, 14), (14, 0), (14, 17)].map(|(start, len)| {
            let part = k.narrow(1, start, len).unwrap();
            candle::attention(&full, &q, &part, &part).unwrap()
        });
        let (out, lse) = candle::merge_with_sinks(&partials, sinks).unwrap();
        assert_close(&flat(&out), &expected, unit);
        assert_close(&flat(&lse), &expected_lse, 1e-4);
        std::thread::scope(|scope| {
            for (group, partial) in ThreadGroup::ranks(3).unwrap().into_iter().zip(&partials) {
                let (out, lse) = (&out, &lse);
                scope.spawn(move || {
                    let merged = candle::merge_over_with_sinks(&group, partial, sinks).unwrap();
                    assert_eq!((flat(&merged.0), flat(&merged.1)), (flat(out), flat(lse)));
                });
            }
        });
    }
}

#[test]
fn sinks_join_the_last_merge() {
    sinks_join_the_last_merge_on(&Device::Cpu, &DTYPES);
}

/// Every rank gets what one merge of all partials gives, bit for bit.
pub fn ranks_merge_on(device: &Device, dtypes: &[(DType, f32)]) {
    for &(dtype, _) in dtypes {
        for f32_out in [true, false] {
            let (mut partials, _) = case(device, dtype, f32_out);
            let expected = candle::merge(&partials).unwrap();
            partials[2] = moved(&partials[2]);
            let merged: Vec<_> = std::thread::scope(|scope| {
                let ranks = ThreadGroup::ranks(partials.len()).unwrap().into_iter();
                let rank = |group: ThreadGroup| {
                    let partial = &partials[group.rank()];
                    scope.spawn(move || candle::merge_over(&group, partial).unwrap())
                };
                let ranks: Vec<_> = ranks.map(rank).collect();
                ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
            });
            for (out, lse) in merged {
                assert_eq!((out.dtype(), shape(&out)), (expected.0.dtype(), shape(&expected.0)));
                assert_eq!(lse.dims(), expected.1.dims());
                assert_eq!((flat(&out), flat(&lse)), (flat(&expected.0), flat(&expected.1)));
            }
        }
    }
}

#[test]
fn ranks_merge() {
    ranks_merge_on(&Device::Cpu, &DTYPES);
}
