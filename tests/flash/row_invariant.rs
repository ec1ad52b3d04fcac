//! Row-invariant plans: the bits of a row depend on nothing but the row and the keys it sees.

use crate::common::{Layout, Rng, Tensor, as_slices, scales, sinks, views};
use crate::properties::cases::{Inputs, block_lists, configs, dims, divided};
use proptest::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use star_attention::cpu::InstructionSet;
use star_attention::cpu::flash::Plan;
use star_attention::{
    AttentionConfig, Batch, BlockList, Element, F8E4M3, Keys, Mask, PlanConfig, Sequence, bf16, f16,
};
use std::ops::Range;
use std::sync::LazyLock;

/// What keys and values hold.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Normal,
    /// Values that underflow when they are weighted: sums of zeros of either sign.
    Tiny,
    /// Some elements are NaN or infinite.
    Special,
}

#[derive(Clone, Debug)]
struct Case {
    config: AttentionConfig,
    rows: usize,
    keys: usize,
    /// Rows of the chunks, in turn.
    chunks: Vec<usize>,
    split_keys: Option<usize>,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    value_dim: usize,
    kind: Kind,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let lens = prop_oneof![
        2 => (1..=140usize).prop_map(|n| (n, n)),
        1 => (1..=140usize, 0..=200usize),
        1 => (1..=6usize, 300..=700usize),
    ];
    let chunks = prop_oneof![
        2 => Just(vec![1]),
        3 => prop::collection::vec(1..=70usize, 1..5),
    ];
    let split_keys = prop::option::weighted(0.7, prop::sample::select(vec![1, 96, 150, 288]));
    let extents = (1..=2usize, 1..=5usize, dims());
    let kind = prop_oneof![3 => Just(Kind::Normal), 1 => Just(Kind::Tiny), 2 => Just(Kind::Special)];
    (configs(), block_lists(), lens, chunks, split_keys, extents, kind, any::<u64>()).prop_map(
        |(mut config, blocks, (rows, keys), chunks, split_keys, (kv_heads, group, dims), kind, seed)| {
            let (head_dim, value_dim) = dims;
            if let Some(blocks) = blocks {
                config.mask = blocks.mask(rows, keys);
            }
            Case { config, rows, keys, chunks, split_keys, kv_heads, group, head_dim, value_dim, kind, seed }
        },
    )
}

static POOLS: LazyLock<[ThreadPool; 3]> = LazyLock::new(|| {
    [1, 3, 16].map(|threads| ThreadPoolBuilder::new().num_threads(threads).build().unwrap())
});

impl Case {
    /// The rows as one sequence, and in chunks, each over the keys up to its last row's own.
    fn batches(&self) -> [Batch; 2] {
        let query = [1, self.rows, self.kv_heads * self.group, self.head_dim];
        let key = [1, self.keys, self.kv_heads, self.head_dim];
        let [mut whole, mut chunks] =
            [0; 2].map(|_| Batch::new(query, key).unwrap().with_value_dim(self.value_dim).unwrap());
        let mask = &self.config.mask;
        whole.push(Sequence::new(0, 0..self.rows, Keys::rows(0, 0..self.keys), mask.clone())).unwrap();
        let mut start = 0;
        for &len in self.chunks.iter().cycle() {
            let mut end = self.rows.min(start + len);
            if let Mask::Blocks(blocks) = mask {
                end = end.min((start / blocks.tile_rows() + 1) * blocks.tile_rows());
            }
            let (mask, keys) = self.chunk(start..end);
            chunks.push(Sequence::new(0, start..end, Keys::rows(0, 0..keys), mask)).unwrap();
            start = end;
            if start == self.rows {
                return [whole, chunks];
            }
        }
        unreachable!("chunks have rows")
    }

    /// The mask of a chunk, and how many keys there are for it.
    fn chunk(&self, rows: Range<usize>) -> (Mask, usize) {
        // A chunk may end before the first key: then its rows see nothing.
        let own = self.keys.saturating_sub(self.rows - rows.end);
        match self.config.mask.clone() {
            Mask::Full => (Mask::Full, self.keys),
            Mask::Window { left, right } => {
                // As far as the last row sees on its right; all rows then stand so much further.
                let end = (self.keys + rows.end) as i128 - self.rows as i128;
                let keys = right.map_or(i128::MAX, |right| end + right as i128).clamp(0, self.keys as i128);
                let shift = (keys - end) as usize;
                let left = left.map(|left| left.saturating_add(shift));
                (Mask::Window { left, right: right.map(|right| right.saturating_sub(shift)) }, keys as usize)
            }
            Mask::Blocks(blocks) => {
                let keys = if blocks.is_causal() { own } else { self.keys };
                let ranges = blocks.ranges(rows.start / blocks.tile_rows()).iter();
                let ranges: Vec<_> = ranges
                    .map(|range| range.start..range.end.min(keys))
                    .filter(|range| !range.is_empty())
                    .collect();
                let list = BlockList::new(rows.len(), &[0, ranges.len()], &ranges).unwrap();
                (Mask::from(if blocks.is_causal() { list.causal() } else { list }), keys)
            }
            mask => (mask, own),
        }
    }

    fn inputs<Q: Element, K: Element>(&self) -> Inputs<Q, K> {
        let mut rng = Rng::new(self.seed);
        let heads = self.kv_heads * self.group;
        let shapes = [
            [1, self.rows, heads, self.head_dim],
            [1, self.keys, self.kv_heads, self.head_dim],
            [1, self.keys, self.kv_heads, self.value_dim],
        ];
        let [query, key, value] = [0, 1, 2].map(|tensor| {
            Tensor::<f32>::contiguous("drawn", shapes[tensor], |_| match self.kind {
                Kind::Tiny if tensor == 2 => [1e-45, -1e-45, 0.0, -0.0, -2e-41, -1e-39][rng.below(6)],
                Kind::Special if rng.below(if tensor == 0 { 2000 } else { 300 }) == 0 => {
                    [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][rng.below(3)]
                }
                _ => rng.normal(),
            })
        });
        let scales = scales::<K>(self.kv_heads, self.seed);
        let scales = as_slices(&scales);
        let layout = &Layout::CONTIGUOUS;
        Inputs {
            query: divided("query", &query, None, layout),
            key: divided("key", &key, scales.map(|scales| scales.key), layout),
            value: divided("value", &value, scales.map(|scales| scales.value), layout),
        }
    }
}

/// Bits of numbers; all NaN are one.
fn bits(values: impl Iterator<Item = f32>) -> Vec<u32> {
    values.map(|x| if x.is_nan() { f32::NAN } else { x }).map(f32::to_bits).collect()
}

/// The rows as one sequence and in chunks of any size, down to one row, on any number of threads.
fn rows_keep_their_bits<Q: Element, K: Element, O: Element>(case: &Case) -> Result<(), TestCaseError> {
    let inputs = case.inputs::<Q, K>();
    let [whole, chunks] = case.batches();
    let mut config = PlanConfig::from(case.config.score()).with_row_invariant();
    config.split_keys = case.split_keys;
    let sinks = case.seed.is_multiple_of(2).then(|| sinks(case.kv_heads * case.group, case.seed));
    let scales = scales::<K>(case.kv_heads, case.seed);
    let views = views(inputs.call(sinks.as_deref(), &scales));
    for instructions in InstructionSet::available() {
        let results = |batch: &Batch, pool: &ThreadPool| {
            pool.install(|| {
                let plan = Plan::for_batch(&config, batch.clone()).unwrap();
                let plan = plan.with_instructions(instructions).unwrap();
                let mut out = Tensor::<O>::contiguous("out", batch.out_shape(), |_| 7.0);
                let mut lse = vec![7.0; batch.lse_len()];
                let mut workspace = vec![0xffu8; plan.workspace_bytes()];
                plan.run(views, out.view_mut(), Some(&mut lse), &mut workspace).unwrap();
                (bits(out.values()), bits(lse.into_iter()))
            })
        };
        let expected = results(&whole, &POOLS[0]);
        for pool in POOLS.iter() {
            let threads = pool.current_num_threads();
            let got = results(&whole, pool);
            prop_assert!(got == expected, "{instructions:?}: other bits on {threads} threads");
            let (out, lse) = results(&chunks, pool);
            prop_assert!(lse == expected.1, "{instructions:?}: other lse in chunks, {threads} threads");
            let differs = out.iter().zip(&expected.0).position(|(a, b)| a != b);
            prop_assert_eq!(differs, None, "{:?}: in chunks, {} threads", instructions, threads);
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn a_row_keeps_its_bits_in_chunks_of_any_size(case in cases(), dtype in 0..5) {
        match dtype {
            0 => rows_keep_their_bits::<f32, f32, f32>(&case)?,
            1 => rows_keep_their_bits::<f16, f16, f16>(&case)?,
            2 => rows_keep_their_bits::<bf16, bf16, f32>(&case)?,
            3 => rows_keep_their_bits::<bf16, F8E4M3, bf16>(&case)?,
            _ => rows_keep_their_bits::<bf16, bf16, bf16>(&case)?,
        }
    }
}

/// Beyond the split length that row-invariant plans have by default: prefill equals each decode.
#[test]
fn a_prefill_equals_its_decodes_over_more_than_one_split() {
    for rows in [3, 20] {
        let case = Case {
            config: AttentionConfig::new(Mask::Causal),
            rows,
            keys: star_attention::ROW_INVARIANT_SPLIT_KEYS + rows / 2,
            chunks: vec![1],
            split_keys: None,
            kv_heads: 1,
            group: 4,
            head_dim: 64,
            value_dim: 64,
            kind: Kind::Normal,
            seed: 3,
        };
        rows_keep_their_bits::<f32, f32, f32>(&case).unwrap();
        rows_keep_their_bits::<bf16, bf16, bf16>(&case).unwrap();
    }
}
