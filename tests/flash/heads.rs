//! KV heads that are walked together, over many keys: each keeps the bits it has alone.

use crate::common::{Call, Layout, Rng, Tensor, as_slices, views};
use crate::properties::cases::divided;
use star_attention::cpu::InstructionSet;
use star_attention::cpu::flash::Plan;
use star_attention::{Batch, DType, Element, F8E4M3, Keys, Mask, PlanConfig, Scales, Sequence, bf16, f16};

/// Enough of these splits, for each KV head, that heads go together.
const SPLIT_KEYS: usize = 96;
const KEYS: usize = 96 * 64;
const PAGE_LEN: usize = 16;
const PREFIX: usize = 50;

/// A long sequence and a short one with a prefix, both in pages in no order.
fn batch(kv_heads: usize, group: usize, [head_dim, value_dim]: [usize; 2]) -> Batch {
    let pages: usize = KEYS / PAGE_LEN + 44;
    let mut tables = (0..pages).map(|page| (page * 37 % pages) as u32);
    let mut batch =
        Batch::new([1, 4, kv_heads * group, head_dim], [pages, PAGE_LEN, kv_heads, head_dim]).unwrap();
    batch = batch.with_value_dim(value_dim).unwrap().with_prefix(1, PREFIX).unwrap();
    let long: Vec<u32> = tables.by_ref().take(KEYS / PAGE_LEN).collect();
    batch.push(Sequence::new(0, 0..1, Keys::pages(KEYS - 5, long), Mask::Causal)).unwrap();
    let short = Keys::pages(700, tables.collect::<Vec<u32>>());
    let short = Sequence::new(0, 2..4, short, Mask::Full).with_prefix(0, 0..PREFIX);
    batch.push(short).unwrap();
    batch
}

/// Those heads of a tensor.
fn heads<T: Element>(tensor: &Tensor<T>, first: usize, count: usize) -> Tensor<T> {
    let [batch, seq, _, dim] = tensor.shape();
    Tensor::contiguous("part", [batch, seq, count, dim], |[b, s, h, d]| {
        tensor.get([b, s, first + h, d]).to_f32()
    })
}

/// Keys and values, those of prefixes, and their scales.
struct Cache<K> {
    rows: [Tensor<K>; 4],
    scales: Option<Scales<Vec<f32>>>,
}

impl<K: Element> Cache<K> {
    /// Scales, where there are any, are others for each head.
    fn new(batch: &Batch, rng: &mut Rng) -> Self {
        let shapes =
            [batch.key_shape(), batch.value_shape(), batch.prefix_shape(), batch.prefix_value_shape()];
        let scales = (K::DTYPE == DType::F8E4M3).then(|| {
            let numbers = 1..=batch.key_shape()[2];
            Scales::new(
                numbers.clone().map(|n| 0.02 * n as f32).collect(),
                numbers.map(|n| 3.0 / n as f32).collect(),
            )
        });
        let of = as_slices(&scales);
        let of = [of.map(|scales| scales.key), of.map(|scales| scales.value)];
        let rows = [0, 1, 2, 3].map(|i| {
            let drawn = Tensor::<f32>::normal("drawn", shapes[i], rng);
            divided("input", &drawn, of[i % 2], &Layout::CONTIGUOUS)
        });
        Self { rows, scales }
    }

    fn head(&self, head: usize) -> Self {
        let rows = self.rows.each_ref().map(|rows| heads(rows, head, 1));
        let scales = self.scales.as_ref();
        Self {
            rows,
            scales: scales.map(|scales| Scales::new(vec![scales.key[head]], vec![scales.value[head]])),
        }
    }
}

fn results<Q: Element, K: Element>(
    batch: Batch,
    query: &Tensor<Q>,
    cache: &Cache<K>,
    instructions: InstructionSet,
) -> (Tensor<f32>, Vec<f32>) {
    let plan = Plan::for_batch(&PlanConfig::new().with_split_keys(SPLIT_KEYS), batch).unwrap();
    let plan = plan.with_instructions(instructions).unwrap();
    let mut out = Tensor::contiguous("out", plan.batch().out_shape(), |_| 0.0);
    let mut lse = vec![0.0; plan.batch().lse_len()];
    let [key, value, prefix_key, prefix_value] = &cache.rows;
    let mut call = Call::new(query, key, value).with_prefix(prefix_key, prefix_value);
    call.scales = as_slices(&cache.scales);
    let mut workspace = Vec::with_capacity(plan.workspace_bytes());
    plan.run(views(call), out.view_mut(), Some(&mut lse), &mut workspace).unwrap();
    (out, lse)
}

fn heads_together_keep_their_bits<Q: Element, K: Element>(kv_heads: usize, group: usize, dims: [usize; 2]) {
    let together = batch(kv_heads, group, dims);
    let mut rng = Rng::new(kv_heads as u64);
    let query = Tensor::<Q>::normal("query", together.query_shape(), &mut rng);
    let cache = Cache::<K>::new(&together, &mut rng);
    let [_, rows, query_heads, _] = query.shape();
    for instructions in InstructionSet::available() {
        let (out, lse) = results(together.clone(), &query, &cache, instructions);
        for head in 0..kv_heads {
            let own_query = heads(&query, head * group, group);
            let (alone, own_lse) =
                results(batch(1, group, dims), &own_query, &cache.head(head), instructions);
            let same = heads(&out, head * group, group).bits() == alone.bits();
            assert!(same, "{instructions:?}: KV head {head} of {kv_heads} has other bits alone");
            let lse = &lse[head * group * rows..][..group * rows];
            assert!(lse.iter().zip(&own_lse).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
        assert_eq!(lse.len(), query_heads * rows);
    }
}

#[test]
fn heads_that_are_walked_together_keep_their_bits() {
    heads_together_keep_their_bits::<f32, f32>(2, 3, [40, 40]);
    heads_together_keep_their_bits::<bf16, bf16>(3, 4, [24, 56]);
    heads_together_keep_their_bits::<f16, f16>(8, 1, [16, 16]);
    heads_together_keep_their_bits::<f32, F8E4M3>(4, 2, [40, 24]);
    // Nine go by threes.
    heads_together_keep_their_bits::<bf16, bf16>(9, 2, [8, 8]);
    // More than caches hold: the kernel reads ahead.
    heads_together_keep_their_bits::<bf16, bf16>(8, 1, [128, 128]);
    heads_together_keep_their_bits::<bf16, F8E4M3>(8, 1, [128, 64]);
}
