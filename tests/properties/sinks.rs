//! Attention sinks: a term more in the softmax of each row. What they do to rows with keys is in
//! the oracle's cases.

use super::backend::{On, Stored};
use super::batches::BatchCase;
use super::cases::{Inputs, RUBBISH};
use crate::common::{Rng, Tensor, named};
use proptest::prelude::*;
use star_attention::merge::PartialOf;
use star_attention::{Backend, Batch, Element, Error, Keys, Mask, PlanConfig, Sequence};

const HEADS: usize = 4;
const DIM: usize = 64;

/// Sinks of -inf are none, bit for bit.
pub fn minus_infinity_is_no_sink<B: Backend, T: Element, O: Element>(
    by: &On<B>,
    case: &BatchCase,
) -> Result<(), TestCaseError> {
    let batch = case.batch();
    let inputs = case.inputs::<T, T>(&batch);
    let results = |sinks: Option<&[f32]>| {
        let mut out = Tensor::<O>::contiguous("out", batch.out_shape(), |_| RUBBISH);
        let mut lse = vec![RUBBISH; batch.lse_len()];
        let call = inputs.call(sinks, &None);
        by.run_call(&case.score.into(), &batch, call, &mut out, Some(&mut lse)).unwrap();
        (out.bits(), lse.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let none = vec![f32::NEG_INFINITY; batch.query_shape()[2]];
    prop_assert!(results(Some(&none)) == results(None), "sinks of -inf change bits");
    Ok(())
}

/// Few rows and many of `[1, rows, HEADS, DIM]` over keys with a NaN among them, and rows that see
/// no key: by each kernel, of whole lists of keys and of split ones.
fn rows_without_keys_and_with_nan() -> (Batch, [usize; 4], [usize; 4]) {
    let (query, key) = ([1, 150, HEADS, DIM], [1, 1400, 2, DIM]);
    let mut batch = Batch::new(query, key).unwrap();
    let mut start = 0;
    for (rows, keys) in [(1, 0..0), (3, 5..5), (40, 9..9), (1, 0..40), (2, 100..1300), (70, 1300..1390)] {
        batch.push(Sequence::new(0, start..start + rows, Keys::rows(0, keys), Mask::Full)).unwrap();
        start += rows;
    }
    // 20 of these rows stand before the first key.
    batch.push(Sequence::new(0, start..start + 30, Keys::rows(0, 1390..1400), Mask::Causal)).unwrap();
    (batch, query, key)
}

/// A row without keys has the output 0 and its sink for a log-sum-exp. A NaN stays, whatever the
/// sink.
pub fn rows_without_keys_have_their_sink_and_nan_stays<B: Backend, T: Element, O: Element>(by: &On<B>) {
    let (batch, query, key) = rows_without_keys_and_with_nan();
    let mut rng = Rng::new(7);
    let mut inputs = Inputs::<T> {
        query: Tensor::normal("query", query, &mut rng),
        key: Tensor::normal("key", key, &mut rng),
        value: Tensor::normal("value", key, &mut rng),
    };
    let with_nan = [20, 700, 1350, 1390];
    for row in with_nan {
        (0..2).for_each(|head| inputs.key.set([0, row, head, 3], T::from_f32(f32::NAN)));
    }
    let sinks = [f32::NEG_INFINITY, 1e30, -2.5, -1e30];
    for config in [PlanConfig::new(), PlanConfig::new().with_split_keys(96)] {
        let mut out = Tensor::<O>::contiguous("out", query, |_| RUBBISH);
        let mut lse = vec![RUBBISH; batch.lse_len()];
        let call = inputs.call(Some(&sinks), &None);
        by.run_call(&config, &batch, call, &mut out, Some(&mut lse)).unwrap();
        for (row, head) in (0..query[1]).flat_map(|row| (0..HEADS).map(move |head| (row, head))) {
            let own: Vec<f32> = (0..DIM).map(|d| out.get([0, row, head, d]).to_f32()).collect();
            let lse = lse[head * query[1] + row];
            match row {
                // Without keys.
                0..44 | 117..137 => {
                    assert!(own.iter().all(|x| x.to_bits() == 0), "row {row}, head {head}: {own:?}");
                    assert_eq!(lse, sinks[head], "row {row}, head {head}");
                }
                44..117 | 137..147 => {
                    assert!(own.iter().all(|x| x.is_nan()) && lse.is_nan(), "row {row}, head {head}");
                }
                // Padding.
                _ => {
                    let untouched = O::from_f32(RUBBISH).to_f32();
                    assert!(own.iter().all(|&x| x == untouched) && lse == RUBBISH, "row {row}");
                }
            }
        }
    }
}

/// Another number of sinks than heads is refused by name; so are those out of range, where they lie
/// in CPU memory.
pub fn what_does_not_fit_is_named<B: Backend, T: Element>(backend: &B, in_cpu_memory: bool) {
    const SHAPE: [usize; 4] = [1, 2, HEADS, DIM];
    let mut batch = Batch::new(SHAPE, SHAPE).unwrap();
    batch.push(Sequence::new(0, 0..2, Keys::rows(0, 0..2), Mask::Full)).unwrap();
    let mut plan = backend.plan_for(&PlanConfig::new(), &batch).unwrap();
    let rows = Stored::of(backend, &Tensor::<T>::contiguous("rows", SHAPE, |_| 0.5));
    let row_lse = backend.buffer_of(&[0.5f32; 2 * HEADS]).unwrap();
    let mut workspace = backend.buffer::<u8>(backend.workspace_bytes(&plan)).unwrap();
    let mut refused = |sinks: &[f32]| {
        let sinks = backend.buffer_of(sinks).unwrap();
        let mut out = Tensor::<T>::contiguous("out", SHAPE, |_| RUBBISH);
        let mut to = Stored::of(backend, &out);
        let view = |name| rows.view(backend, name);
        let inputs = star_attention::Inputs::new(view("query"), view("key"), view("value"));
        let inputs = inputs.with_sinks(backend.slice(&sinks, ..));
        let workspace = backend.slice_mut(&mut workspace, ..);
        let attended = backend.attend(&mut plan, inputs, to.view_mut(backend, "out"), None, workspace);
        let partial = PartialOf { out: view("partial"), lse: backend.slice(&row_lse, ..) };
        let sinks = Some(backend.slice(&sinks, ..));
        let merged = backend.merge(vec![partial], sinks, to.view_mut(backend, "out"), None);
        to.read_to(backend, &mut out);
        let untouched = T::from_f32(RUBBISH).to_f32();
        assert!(out.values().all(|x| x == untouched), "wrote in spite of the error");
        [attended.unwrap_err(), merged.unwrap_err()]
    };
    for sinks in [&[][..], &[0.0; HEADS - 1], &[0.0; HEADS + 1]] {
        assert_eq!(refused(sinks).map(named), [("shape", "sinks"); 2]);
    }
    if in_cpu_memory {
        for value in [f32::NAN, f32::INFINITY] {
            for error in refused(&[0.0, f32::NEG_INFINITY, value, value]) {
                let Error::Value { argument: "sinks", expected, .. } = error else { panic!("{error}") };
                assert!(expected.ends_with("head 2"), "{expected}");
            }
        }
    }
}
