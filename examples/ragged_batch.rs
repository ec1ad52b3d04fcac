//! Sequences of different lengths and masks in one call: a prefill, a chunk of a longer prompt, and
//! a decode. Their query rows are packed one after another; their keys lie in rows of one cache.
use star_attention::cpu::flash::Plan;
use star_attention::{Batch, Inputs, Keys, Mask, PlanConfig, Result, Sequence, TensorView, TensorViewMut};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
/// Sequences that the cache has room for, and tokens of each.
const CACHE: [usize; 2] = [3, 128];

fn main() -> Result<()> {
    // (query rows, keys with those of the rows, mask)
    let sequences = [
        (50, 50, Mask::Causal),               // a prompt
        (30, 110, Mask::sliding_window(64)?), // rows 80 to 109 of a longer one, in a layer with windows
        (1, 77, Mask::Causal),                // a generated token
    ];
    let rows = sequences.iter().map(|(rows, ..)| rows).sum();
    let (query_shape, key_shape) = ([1, rows, HEADS, DIM], [CACHE[0], CACHE[1], KV_HEADS, DIM]);
    let mut batch = Batch::new(query_shape, key_shape)?;
    let mut first = 0;
    for (index, (rows, keys, mask)) in sequences.iter().enumerate() {
        batch.push(Sequence::new(0, first..first + rows, Keys::rows(index, 0..*keys), mask.clone()))?;
        first += rows;
    }

    // The keys of a sequence are all 1; its values are its index.
    let query = vec![0.5f32; query_shape.iter().product()];
    let key = vec![1.0f32; key_shape.iter().product()];
    let of_index = |index| std::iter::repeat_n(index as f32, CACHE[1] * KV_HEADS * DIM);
    let value: Vec<f32> = (0..CACHE[0]).flat_map(of_index).collect();
    let mut out = vec![0.0f32; query.len()];
    let mut lse = vec![0.0f32; batch.lse_len()];

    let plan = Plan::for_batch(&PlanConfig::new(), batch)?;
    let mut workspace = vec![0u8; plan.workspace_bytes()];
    plan.run(
        Inputs::new(
            TensorView::contiguous("query", &query, query_shape)?,
            TensorView::contiguous("key", &key, key_shape)?,
            TensorView::contiguous("value", &value, key_shape)?,
        ),
        TensorViewMut::contiguous("out", &mut out, query_shape)?,
        Some(&mut lse),
        &mut workspace,
    )?;

    // Each row has seen the keys of its own sequence alone. All scores are 0.5 · √64, so the
    // log-sum-exp of a row tells how many keys it has seen.
    let mut row = 0;
    for (index, (rows, keys, _)) in sequences.iter().enumerate() {
        let last = row + rows - 1;
        let seen = (lse[last] - 0.5 * (DIM as f32).sqrt()).exp().round();
        println!("sequence {index}: {rows} rows over {keys} keys, the last row sees {seen}");
        assert!(
            out[row * HEADS * DIM..][..rows * HEADS * DIM].iter().all(|&x| (x - index as f32).abs() < 1e-5)
        );
        assert_eq!(seen, if index == 1 { 64.0 } else { *keys as f32 });
        row += rows;
    }
    Ok(())
}
