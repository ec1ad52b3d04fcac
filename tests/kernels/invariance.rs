//! What plans promise about bits: under a fixed split length, and for any number of rows.

use crate::backend::Backend;
use crate::call::{kernel_dims, on_each_device, run_call};
use crate::common::{Rng, Tensor, aligned, sinks};
use crate::properties::batches::{BatchCase, batches};
use crate::properties::cases::{Inputs, RUBBISH};
use proptest::prelude::*;
use star_attention::cuda::flash::Plan;
use star_attention::cuda::{Device, HalfElement};
use star_attention::{Batch, Element, Keys, Mask, PlanConfig, Sequence, bf16, f16};

/// Bits of output and log-sum-exp, in memory that held rubbish.
fn bits<B: Backend, T: HalfElement, O: Element>(
    backend: &B,
    config: &PlanConfig,
    batch: &Batch,
    inputs: &Inputs<T>,
    sinks: Option<&[f32]>,
) -> (Tensor<O>, Vec<u32>) {
    let plan = Plan::for_batch(&backend.device().properties(), config, batch).unwrap();
    let mut out = Tensor::contiguous("out", batch.out_shape(), |_| RUBBISH);
    let mut lse = vec![RUBBISH; batch.lse_len()];
    run_call(backend, &plan, inputs.call(sinks, &None), &mut out, Some(&mut lse)).unwrap();
    (out, lse.into_iter().map(f32::to_bits).collect())
}

/// The bits of every sequence, in a batch and alone, its keys where they lie and in rows.
pub fn keeps_its_bits<B: Backend, T: HalfElement>(
    case: &BatchCase,
    split_keys: usize,
) -> Result<(), TestCaseError> {
    let backend = B::open(case.seed);
    let config = PlanConfig::from(case.score).with_split_keys(split_keys);
    let batch = case.batch();
    let inputs = case.inputs::<T, T>(&batch);
    let sinks = case.sinks();
    let sinks = sinks.as_deref();
    let (together, lse) = bits::<B, T, f32>(&backend, &config, &batch, &inputs, sinks);
    let (rows, in_rows) = case.in_rows(&batch, &inputs);
    let (as_rows, lse_as_rows) = bits::<B, T, f32>(&backend, &config, &rows, &in_rows, sinks);
    prop_assert!(as_rows.bits() == together.bits() && lse_as_rows == lse, "other bits from rows");
    let [_, seq, heads, dim] = batch.out_shape();
    for sequence in batch.sequences() {
        let alone = Batch::new(batch.query_shape(), batch.key_shape()).unwrap();
        let mut alone = alone.with_value_dim(batch.value_dim()).unwrap();
        alone.push(sequence.clone()).unwrap();
        let (own, own_lse) = bits::<B, T, f32>(&backend, &config, &alone, &inputs, sinks);
        let Sequence { batch: b, ref rows, .. } = *sequence;
        for (row, head) in rows.clone().flat_map(|row| (0..heads).map(move |head| (row, head))) {
            let at = (b * heads + head) * seq + row;
            prop_assert_eq!(own_lse[at], lse[at], "lse of row {}, head {}", row, head);
            let same = (0..dim)
                .all(|d| own.get([b, row, head, d]).to_bits() == together.get([b, row, head, d]).to_bits());
            prop_assert!(same, "row {row}, head {head}");
        }
    }
    Ok(())
}

/// A causal sequence and the chunks in which its rows come.
#[derive(Clone, Debug)]
pub struct Chunked {
    /// Of queries `[1, rows, heads, head_dim]` and keys `[1, keys, kv_heads, head_dim]`.
    query: [usize; 4],
    key: [usize; 4],
    value_dim: usize,
    /// Ends of chunks, the number of rows last.
    ends: Vec<usize>,
    split_keys: usize,
    seed: u64,
}

/// Half of the chunks have one row: decodes.
fn chunked() -> impl Strategy<Value = Chunked> {
    chunked_of(kernel_dims())
}

/// The same on heads of these dims.
pub fn chunked_of(dims: impl Strategy<Value = (usize, usize)>) -> impl Strategy<Value = Chunked> {
    let chunks = prop::collection::vec(prop_oneof![1 => Just(1usize), 1 => 1..90usize], 1..6);
    let heads = (1..=2usize, 1..=4usize, dims);
    (chunks, 0..500usize, heads, 1..400usize, any::<u64>()).prop_map(
        |(mut chunks, mut before, (mut kv_heads, mut group, (dim, value_dim)), split_keys, seed)| {
            if dim.midpoint(value_dim) > 256 {
                // Keeps the emulator's work small.
                chunks.truncate(2);
                chunks.iter_mut().for_each(|len| *len = (*len).min(20));
                (before, kv_heads, group) = (before % 60, 1, group.min(2));
            }
            let ends: Vec<usize> =
                chunks.iter().scan(0, |end, len| Some(*end + len).inspect(|e| *end = *e)).collect();
            let rows = chunks.iter().sum();
            let query = [1, rows, kv_heads * group, dim];
            Chunked { query, key: [1, before + rows, kv_heads, dim], value_dim, ends, split_keys, seed }
        },
    )
}

/// Scores that run away now and then, and values of both zeros.
fn inputs<T: Element>(query: [usize; 4], key: [usize; 4], value_dim: usize, seed: u64) -> Inputs<T> {
    let mut rng = Rng::new(seed);
    let key_rows =
        Tensor::contiguous("key", key, |[_, row, ..]| rng.normal() * if row % 97 == 60 { 9.0 } else { 1.0 });
    let value = [key[0], key[1], key[2], value_dim];
    let value = Tensor::contiguous("value", value, |[_, row, _, d]| match (row + d) % 11 {
        0 => 0.0,
        1 => -0.0,
        _ => rng.normal(),
    });
    Inputs { query: Tensor::normal("query", query, &mut rng), key: key_rows, value }
}

/// Chunks of rows that end at `ends`, each over the keys up to its last row.
fn batch_of(query: [usize; 4], key: [usize; 4], value_dim: usize, ends: &[usize]) -> Batch {
    let mut batch = Batch::new(query, key).unwrap().with_value_dim(value_dim).unwrap();
    let mut start = 0;
    for &end in ends {
        let keys = Keys::rows(0, 0..key[1] - query[1] + end);
        batch.push(Sequence::new(0, start..end, keys, Mask::Causal)).unwrap();
        start = end;
    }
    batch
}

/// A prefill gives each row the bits that it has in chunks.
pub fn chunks_change_no_bit<B: Backend, T: HalfElement, O: Element>(
    case: &Chunked,
) -> Result<(), TestCaseError> {
    let Chunked { query, key, value_dim, ref ends, split_keys, seed } = *case;
    let backend = B::open(seed);
    let config = PlanConfig::new().with_row_invariant().with_split_keys(split_keys);
    let inputs = inputs::<T>(query, key, value_dim, seed);
    let sinks = seed.is_multiple_of(2).then(|| sinks(query[2], seed));
    let [(whole, lse), (parts, parts_lse)] = [&[query[1]][..], ends].map(|ends| {
        bits::<B, T, O>(&backend, &config, &batch_of(query, key, value_dim, ends), &inputs, sinks.as_deref())
    });
    prop_assert!(whole.bits() == parts.bits(), "other outputs in chunks");
    prop_assert!(lse == parts_lse, "other log-sum-exps in chunks");
    Ok(())
}

on_each_device! {
    fn under_a_fixed_split_length_a_row_keeps_its_bits(
        case in batches(kernel_dims()),
        split_keys in 1..400usize,
        bf in any::<bool>(),
    ) {
        let mut case = case;
        case.layouts = case.layouts.map(|layout| aligned(&layout));
        if bf {
            keeps_its_bits::<B, bf16>(&case, split_keys)?;
        } else {
            keeps_its_bits::<B, f16>(&case, split_keys)?;
        }
    }

    fn chunks_and_decodes_have_the_bits_of_the_prefill(case in chunked(), dtypes in 0..4usize) {
        match dtypes {
            0 => chunks_change_no_bit::<B, f16, f16>(&case)?,
            1 => chunks_change_no_bit::<B, f16, f32>(&case)?,
            2 => chunks_change_no_bit::<B, bf16, bf16>(&case)?,
            _ => chunks_change_no_bit::<B, bf16, f32>(&case)?,
        }
    }

    /// Row 0 sees two tiles of 128 keys: the second takes all weight from the first, whose sum is
    /// negative, and has values of -0. The prefill walks one tile more, of values that row 0 does
    /// not see.
    fn tiles_that_a_row_does_not_see_keep_the_sign_of_zero() {
        let (query, key) = ([1, 45, 1, 64], [1, 300, 1, 64]);
        let inputs = Inputs::<bf16> {
            query: Tensor::contiguous("query", query, |[.., d]| if d == 0 { 16.0 } else { 0.0 }),
            key: Tensor::contiguous("key", key, |[_, row, _, d]| if d == 0 && row >= 128 { 1000.0 } else { 0.0 }),
            value: Tensor::contiguous("value", key, |[_, row, ..]| match row {
                0..128 => -1.0,
                128..256 => -0.0,
                _ => 1.0,
            }),
        };
        for split_keys in [128, 4096] {
            let config = PlanConfig::new().with_row_invariant().with_split_keys(split_keys);
            let [whole, alone] = [45, 1].map(|end| {
                let batch = batch_of(query, key, 64, &[end]);
                bits::<B, bf16, f32>(&B::open(3), &config, &batch, &inputs, None).0
            });
            for d in 0..64 {
                let [whole, alone] = [&whole, &alone].map(|out| out.get([0, 0, 0, d]));
                assert_eq!((whole, whole.to_bits()), (0.0, alone.to_bits()), "{split_keys}");
            }
        }
    }
}
