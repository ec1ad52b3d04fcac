//! Sequences of any lengths, places and masks in one call.

use super::backend::On;
use super::cases::{Inputs, RUBBISH, block_lists, configs, divided, masks};
use super::expected::Expected;
use crate::common::{Call, Layout, Rng, Tensor, as_slices, layouts, scales, sinks};
use proptest::prelude::*;
use star_attention::{
    AttentionConfig, Backend, Batch, Element, Keys, Mask, PlanConfig, Scales, ScoreConfig, Sequence,
};
use std::ops::Range;

/// A sequence, and how it lies beside the others.
#[derive(Clone, Debug)]
struct Member {
    rows: usize,
    keys: usize,
    mask: Mask,
    /// Rows of padding before its query rows, and of unused capacity before its keys.
    gaps: [usize; 2],
    /// Whether its keys begin with those of the sequence before it.
    shares: bool,
}

/// A call on a batch: all that is needed to make it again.
#[derive(Clone, Debug)]
pub struct BatchCase {
    members: Vec<Member>,
    /// Extents of the batch axes of queries and of keys.
    batches: [usize; 2],
    /// Rows of a page, where keys lie in pages.
    page_len: Option<usize>,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    value_dim: usize,
    pub score: ScoreConfig,
    /// Of q, k, v and out.
    pub layouts: [Layout; 4],
    /// Whether there are attention sinks.
    sinks: bool,
    pub seed: u64,
}

/// Up to six sequences, none among them; all of few rows in half of the cases, and one over many
/// keys in a third of these.
pub fn batches(dims: impl Strategy<Value = (usize, usize)>) -> impl Strategy<Value = BatchCase> {
    let page_len = prop_oneof![
        2 => Just(None),
        3 => prop::sample::select(vec![1, 3, 16, 48, 528]).prop_map(Some),
    ];
    let extents = ([1..=3usize, 1..=3usize], page_len, 1..=3usize, 1..=4usize, dims);
    let layouts = [layouts(), layouts(), layouts(), layouts()];
    (members(), extents, configs(), layouts, any::<bool>(), any::<u64>()).prop_map(
        |(mut members, (batches, page_len, kv_heads, group, dims), config, layouts, sinks, seed)| {
            let (head_dim, value_dim) = dims;
            // Keeps the oracle's work small.
            let (kv_heads, group) = match head_dim.midpoint(value_dim) {
                0..=64 => (kv_heads, group),
                65..=256 => (1 + kv_heads % 2, group.min(2)),
                _ => {
                    members.truncate(2);
                    (1, group.min(2))
                }
            };
            let score = config.score();
            BatchCase {
                members,
                batches,
                page_len,
                kv_heads,
                group,
                head_dim,
                value_dim,
                score,
                layouts,
                sinks,
                seed,
            }
        },
    )
}

fn members() -> impl Strategy<Value = Vec<Member>> {
    let member = |most_rows: usize, keys: Range<usize>| {
        let rows = prop_oneof![1 => 0..=1usize, 3 => 0..=most_rows];
        let gaps = [0..4usize, 0..40usize];
        (rows, keys, masks(), block_lists(), gaps, prop::bool::weighted(0.3)).prop_map(
            |(rows, keys, mask, blocks, gaps, shares)| {
                let mask = blocks.map_or(mask, |blocks| blocks.mask(rows, keys));
                Member { rows, keys, mask, gaps, shares }
            },
        )
    };
    let several = move |most_rows| {
        prop::collection::vec(prop_oneof![1 => member(most_rows, 0..2), 4 => member(most_rows, 0..90)], 0..=5)
    };
    let long = prop::option::weighted(0.4, member(3, 500..1500));
    let few = (several(4), long).prop_map(|(mut members, long)| {
        members.extend(long);
        members
    });
    prop_oneof![few, several(80)]
}

impl BatchCase {
    /// The sequences, one after another on the batch axes in turn.
    pub fn batch(&self) -> Batch {
        let (mut query_ends, mut sequences) = (vec![0; self.batches[0]], Vec::new());
        let mut keys = Placed::new(self.batches[1], self.page_len);
        for (i, member) in self.members.iter().enumerate() {
            let b = i % self.batches[0];
            let start = query_ends[b] + member.gaps[0];
            query_ends[b] = start + member.rows;
            sequences.push(Sequence::new(
                b,
                start..query_ends[b],
                keys.place(i, member),
                member.mask.clone(),
            ));
        }
        let seq = query_ends.into_iter().max().unwrap_or(0) + self.seed as usize % 3;
        let query = [self.batches[0], seq, self.kv_heads * self.group, self.head_dim];
        let [key_batch, key_seq] = keys.extents(self.seed);
        let batch = Batch::new(query, [key_batch, key_seq, self.kv_heads, self.head_dim]).unwrap();
        let mut batch = batch.with_value_dim(self.value_dim).unwrap();
        sequences.into_iter().for_each(|sequence| batch.push(sequence).unwrap());
        batch
    }

    /// The attention sinks, if there are any.
    pub fn sinks(&self) -> Option<Vec<f32>> {
        self.sinks.then(|| sinks(self.kv_heads * self.group, self.seed))
    }

    /// The scales of keys and values, if they have any.
    pub fn scales<K: Element>(&self) -> Option<Scales<Vec<f32>>> {
        scales::<K>(self.kv_heads, self.seed)
    }

    /// Queries, keys and values. What belongs to no sequence holds NaN.
    pub fn inputs<Q: Element, K: Element>(&self, batch: &Batch) -> Inputs<Q, K> {
        let mut rng = Rng::new(self.seed);
        let [query_shape, key_shape] = [batch.query_shape(), batch.key_shape()];
        let [mut query_rows, mut key_rows] =
            [query_shape, key_shape].map(|[batch, seq, ..]| vec![vec![false; seq]; batch]);
        for sequence in batch.sequences() {
            sequence.rows.clone().for_each(|row| query_rows[sequence.batch][row] = true);
            for key in 0..sequence.keys.len() {
                let [batch, row] = place(&sequence.keys, key, key_shape[1]);
                key_rows[batch][row] = true;
            }
        }
        let mut tensor = |shape, used: &[Vec<bool>]| {
            Tensor::<f32>::contiguous(
                "drawn",
                shape,
                |[b, s, ..]| {
                    if used[b][s] { rng.normal() } else { f32::NAN }
                },
            )
        };
        let query = tensor(query_shape, &query_rows);
        let [key, value] = [key_shape, batch.value_shape()].map(|shape| tensor(shape, &key_rows));
        let [query_layout, key_layout, value_layout, _] = &self.layouts;
        let scales = self.scales::<K>();
        let scales = as_slices(&scales);
        Inputs {
            query: divided("query", &query, None, query_layout),
            key: divided("key", &key, scales.map(|scales| scales.key), key_layout),
            value: divided("value", &value, scales.map(|scales| scales.value), value_layout),
        }
    }

    /// The same sequences with the keys of each in rows of its own, one sequence after another.
    pub fn in_rows<Q: Element, K: Element>(
        &self,
        batch: &Batch,
        inputs: &Inputs<Q, K>,
    ) -> (Batch, Inputs<Q, K>) {
        let [_, page_len, kv_heads, head_dim] = batch.key_shape();
        let places: Vec<[usize; 2]> = batch
            .sequences()
            .iter()
            .flat_map(|sequence| (0..sequence.keys.len()).map(|key| place(&sequence.keys, key, page_len)))
            .collect();
        let rows = Batch::new(batch.query_shape(), [1, places.len(), kv_heads, head_dim]).unwrap();
        let mut rows = rows.with_value_dim(batch.value_dim()).unwrap();
        let mut end = 0;
        for Sequence { batch: b, rows: own, keys, mask, .. } in batch.sequences() {
            let start = end;
            end += keys.len();
            rows.push(Sequence::new(*b, own.clone(), Keys::rows(0, start..end), mask.clone())).unwrap();
        }
        let [key, value] =
            [&inputs.key, &inputs.value].map(|from| gather(from, places.len(), |row| places[row]));
        (rows, Inputs { query: inputs.query.clone(), key, value })
    }
}

/// Where keys have been placed so far.
struct Placed {
    page_len: Option<usize>,
    /// The end of what is used on each index of the batch axis, where keys are rows.
    ends: Vec<usize>,
    /// How many pages are used.
    pages: usize,
    last: Keys,
}

impl Placed {
    fn new(batch: usize, page_len: Option<usize>) -> Self {
        let last = page_len.map_or(Keys::rows(0, 0..0), |_| Keys::pages(0, []));
        Self { page_len, ends: vec![0; batch], pages: 0, last }
    }

    fn place(&mut self, index: usize, member: &Member) -> Keys {
        let len = member.keys;
        self.last = match (&self.last, self.page_len) {
            (Keys::Pages { pages, .. }, Some(page_len)) => {
                let needed = len.div_ceil(page_len);
                let shared = if member.shares { needed.min(pages.len()) } else { 0 };
                // One more than needed now and then.
                let own = needed - shared + usize::from(member.gaps[1].is_multiple_of(4));
                self.pages += own;
                let own = (self.pages - own..self.pages).rev().map(|page| page as u32);
                Keys::pages(len, pages[..shared].iter().copied().chain(own).collect::<Vec<u32>>())
            }
            (Keys::Rows { batch, rows }, _) if member.shares => {
                let (batch, rows) = (*batch, rows.start..rows.start + len);
                self.ends[batch] = self.ends[batch].max(rows.end);
                Keys::rows(batch, rows)
            }
            _ => {
                let batch = index % self.ends.len();
                let start = self.ends[batch] + member.gaps[1];
                self.ends[batch] = start + len;
                Keys::rows(batch, start..start + len)
            }
        };
        self.last.clone()
    }

    /// Extents of the axes batch and seq, with some capacity that nobody uses.
    fn extents(&self, seed: u64) -> [usize; 2] {
        let unused = (seed >> 8) as usize % 3;
        match self.page_len {
            Some(page_len) => [self.pages + unused, page_len],
            None => [self.ends.len(), self.ends.iter().max().unwrap_or(&0) + 20 * unused],
        }
    }
}

/// Where a key lies on the axes batch and seq.
fn place(keys: &Keys, key: usize, page_len: usize) -> [usize; 2] {
    match keys {
        Keys::Rows { batch, rows } => [*batch, rows.start + key],
        Keys::Pages { pages, .. } => [pages[key / page_len] as usize, key % page_len],
        other => panic!("{other:?}"),
    }
}

/// Rows of a tensor, one after another in a batch of 1.
fn gather<T: Element>(from: &Tensor<T>, len: usize, place: impl Fn(usize) -> [usize; 2]) -> Tensor<T> {
    let [_, _, heads, dim] = from.shape();
    Tensor::contiguous("rows", [1, len, heads, dim], |[_, row, head, d]| {
        let [batch, seq] = place(row);
        from.get([batch, seq, head, d]).to_f32()
    })
}

/// `run` computes attention for a batch, with the case's sinks and scales, into an output and, if
/// asked for, its log-sum-exp. Each of the sequences gets what it gets alone, and nothing else is
/// written.
pub fn each_sequence_of_a_batch_stands_alone<Q: Element, K: Element, O: Element>(
    case: &BatchCase,
    run: impl Fn(&Batch, &ScoreConfig, &Inputs<Q, K>, &mut Tensor<O>, Option<&mut [f32]>),
) -> Result<(), TestCaseError> {
    let batch = case.batch();
    let inputs = case.inputs::<Q, K>(&batch);
    let shape @ [batches, seq, heads, dim] = batch.out_shape();
    let rubbish = || Tensor::<O>::new("out", shape, &case.layouts[3], RUBBISH, |_| RUBBISH);
    let (mut out, mut lse) = (rubbish(), vec![RUBBISH; batch.lse_len()]);
    run(&batch, &case.score, &inputs, &mut out, Some(&mut lse));

    let (sinks, scales) = (case.sinks(), case.scales::<K>());
    let lse_at = |b: usize, head: usize, row: usize| (b * heads + head) * seq + row;
    let mut padding = vec![vec![true; seq]; batches];
    let ScoreConfig { scale, softcap, .. } = case.score;
    for (index, sequence) in batch.sequences().iter().enumerate() {
        let Sequence { batch: b, ref rows, ref keys, ref mask, .. } = *sequence;
        let row_place = |row| [b, rows.start + row];
        let key_place = |key| place(keys, key, batch.key_shape()[1]);
        let config = AttentionConfig { mask: mask.clone(), scale, softcap };
        let query = gather(&inputs.query, rows.len(), row_place);
        let [key, value] = [&inputs.key, &inputs.value].map(|from| gather(from, keys.len(), key_place));
        let mut call = Call::new(&query, &key, &value);
        (call.sinks, call.scales) = (sinks.as_deref(), as_slices(&scales));
        let expected = Expected::of_call(&config, call, false);
        let of_sequence = |error: TestCaseError| TestCaseError::fail(format!("sequence {index}: {error}"));
        expected.check_out(gather(&out, rows.len(), row_place).values()).map_err(of_sequence)?;
        let own_lse = (0..heads).flat_map(|head| rows.clone().map(move |row| lse_at(b, head, row)));
        expected.check_lse(&own_lse.map(|at| lse[at]).collect::<Vec<f32>>()).map_err(of_sequence)?;
        rows.clone().for_each(|row| padding[b][row] = false);
    }

    let untouched = O::from_f32(RUBBISH).to_f32();
    for (b, row) in
        (0..batches).flat_map(|b| (0..seq).map(move |row| (b, row))).filter(|&(b, s)| padding[b][s])
    {
        for head in 0..heads {
            let written = (0..dim).any(|d| out.get([b, row, head, d]).to_f32() != untouched);
            prop_assert!(!written, "wrote the out of padding, row {row} of batch {b}");
            prop_assert_eq!(
                lse[lse_at(b, head, row)],
                RUBBISH,
                "wrote the lse of padding, row {} of batch {}",
                row,
                b
            );
        }
    }
    prop_assert!(out.padding_is(RUBBISH), "wrote between the rows of out");

    let mut again = rubbish();
    run(&batch, &case.score, &inputs, &mut again, None);
    prop_assert!(out.bits() == again.bits(), "no log-sum-exp changes the output");
    Ok(())
}

/// Bits of the rows of a batch, and of their log-sum-exps.
fn bits<B: Backend, Q: Element, K: Element>(
    by: &On<B>,
    config: &PlanConfig,
    batch: &Batch,
    inputs: &Inputs<Q, K>,
) -> (Tensor<f32>, Vec<u32>) {
    let mut out = Tensor::contiguous("out", batch.out_shape(), |_| RUBBISH);
    let mut lse = vec![RUBBISH; batch.lse_len()];
    by.run(config, batch, inputs, &mut out, Some(&mut lse));
    (out, lse.into_iter().map(f32::to_bits).collect())
}

/// 60 keys in pages of 48 and of 528, in the order [1, 0], are what they are in rows.
pub fn keys_in_pages_of_48_and_528_keep_their_bits<B: Backend, Q: Element, K: Element>(
    by: &On<B>,
    value_dim: usize,
) {
    let mut rng = Rng::new(4);
    let query = Tensor::<Q>::normal("query", [1, 3, 4, 64], &mut rng);
    let [key, value] = [64, value_dim].map(|dim| Tensor::<K>::normal("rows", [1, 60, 2, dim], &mut rng));
    let call = |key: &Tensor<K>, value: &Tensor<K>, keys: Keys| {
        let batch = Batch::new(query.shape(), key.shape()).unwrap();
        let mut batch = batch.with_value_dim(value_dim).unwrap();
        batch.push(Sequence::new(0, 0..3, keys, Mask::Causal)).unwrap();
        let inputs = Inputs { query: query.clone(), key: key.clone(), value: value.clone() };
        let (out, lse) = bits(by, &PlanConfig::new(), &batch, &inputs);
        (out.bits(), lse)
    };
    let unpaged = call(&key, &value, Keys::rows(0, 0..60));
    for page_len in [48, 528] {
        let paged = |rows: &Tensor<K>| {
            Tensor::contiguous("paged", [2, page_len, 2, rows.shape()[3]], |[page, row, head, d]| {
                let key = (1 - page) * page_len + row;
                if key < 60 { rows.get([0, key, head, d]).to_f32() } else { f32::NAN }
            })
        };
        assert!(call(&paged(&key), &paged(&value), Keys::pages(60, [1, 0])) == unpaged, "{page_len}");
    }
}

/// A decode over `keys` keys has the same bits alone and as row 0 among `requests` requests over
/// other numbers of keys, where the split length is fixed.
pub fn a_request_keeps_its_bits_among_others<B: Backend, Q: Element, K: Element>(
    by: &On<B>,
    keys: usize,
    requests: usize,
    split_keys: usize,
) -> (Tensor<f32>, Vec<u32>) {
    const HEADS: [usize; 2] = [4, 2];
    let mut rng = Rng::new(keys as u64);
    let lens: Vec<usize> =
        (0..requests).map(|i| if i == 0 { keys } else { 1 + rng.below(keys / 8) }).collect();
    let shape = |rows: usize, heads: usize| [1, rows, heads, 64];
    let inputs = Inputs::<Q, K> {
        query: Tensor::normal("query", shape(requests, HEADS[0]), &mut rng),
        key: Tensor::normal("key", shape(lens.iter().sum(), HEADS[1]), &mut rng),
        value: Tensor::normal("value", shape(lens.iter().sum(), HEADS[1]), &mut rng),
    };
    let of_first = |requests: usize| {
        let mut batch = Batch::new(inputs.query.shape(), inputs.key.shape()).unwrap();
        let mut start = 0;
        for (row, &len) in lens[..requests].iter().enumerate() {
            let keys = Keys::rows(0, start..start + len);
            batch.push(Sequence::new(0, row..row + 1, keys, Mask::Causal)).unwrap();
            start += len;
        }
        let (out, lse) = bits(by, &PlanConfig::new().with_split_keys(split_keys), &batch, &inputs);
        (out.gather(0..1), lse.iter().step_by(inputs.query.shape()[1]).copied().collect::<Vec<u32>>())
    };
    let ((alone, alone_lse), (among, among_lse)) = (of_first(1), of_first(requests));
    assert!(alone.bits() == among.bits(), "other outputs among {requests} requests");
    assert_eq!(alone_lse, among_lse, "other log-sum-exps among {requests} requests");
    (alone, alone_lse)
}

/// 128 query heads on one KV head, and 16,777,216 packed keys of 64 sequences: for plans alone.
pub fn many_packed_keys_of_one_head() -> Batch {
    const SEQUENCES: usize = 64;
    const KEYS: usize = 16_777_216 / SEQUENCES;
    let mut batch = Batch::new([1, SEQUENCES, 128, 128], [1, SEQUENCES * KEYS, 1, 128]).unwrap();
    for i in 0..SEQUENCES {
        let keys = Keys::rows(0, i * KEYS..(i + 1) * KEYS);
        batch.push(Sequence::new(0, i..i + 1, keys, Mask::Causal)).unwrap();
    }
    batch
}
