//! What is measured.

use serde_json::{Value, json};
use star_attention::cuda::Properties;
use star_attention::cuda::flash::Plan;
use star_attention::{AttentionConfig, AttentionShape, Batch, Mask, PlanConfig, Result};

/// One row of the table.
#[derive(Clone, Debug)]
pub struct Case {
    pub label: String,
    pub work: Work,
    /// Takes seconds: one launch is timed.
    pub once: bool,
    /// Label of the row whose time and FLOPs this one's are compared with.
    pub against: Option<String>,
    /// Labels of the rows that together do the same work.
    pub parts: Vec<String>,
}

#[derive(Clone, Debug)]
pub enum Work {
    /// The device's own copy: the rate that the others are held against.
    Copy { bytes: usize },
    /// One attention call in bf16.
    Attention(Call),
    /// `n` partials of f32 `[1, tokens, heads, dim]` to one.
    Merge { n: usize, tokens: usize, heads: usize, dim: usize },
    /// New bf16 keys and values `[1, tokens, heads, dim]` to a shard; `rotated` dims by RoPE.
    Append { tokens: usize, heads: usize, dim: usize, rotated: usize },
}

/// How keys and values lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `[batch, seq, heads, dim]`.
    SeqHeads,
    /// `[batch, heads, seq, dim]`.
    HeadsSeq,
}

/// An attention call.
#[derive(Clone, Debug)]
pub struct Call {
    pub config: AttentionConfig,
    pub shape: AttentionShape,
    pub order: Order,
    /// Whether outputs are f32 instead of bf16.
    pub f32_out: bool,
    /// Where packed sequences begin on the axes of queries and keys.
    pub offsets: Option<[Vec<usize>; 2]>,
    /// Whether bits do not depend on the rows of the call.
    pub row_invariant: bool,
}

impl Call {
    /// The library's own plan.
    ///
    /// # Errors
    /// Those of [`Batch`] and [`Plan::for_batch`].
    pub fn plan(&self, properties: &Properties) -> Result<Plan> {
        let Self { config: AttentionConfig { mask, .. }, shape, .. } = self;
        let batch = match &self.offsets {
            None => Batch::uniform(shape, mask)?,
            Some([query, key]) => Batch::packed(shape, query, key, mask)?,
        };
        let config = PlanConfig::from(self.config.score());
        let config = if self.row_invariant { config.with_row_invariant() } else { config };
        Plan::for_batch(properties, &config, &batch)
    }
}

impl Case {
    fn new(label: String, work: Work) -> Self {
        Self { label, work, once: false, against: None, parts: Vec::new() }
    }

    /// The row without figures.
    pub fn describe(&self) -> Value {
        let mut row = match &self.work {
            Work::Copy { bytes } => json!({ "kind": "rate", "bytes": bytes }),
            Work::Attention(Call { config, shape, order, f32_out, offsets, row_invariant }) => {
                let AttentionShape { batch, query_len, key_len, query_heads, kv_heads, head_dim, .. } = shape;
                let (anchor_len, block_len) = match config.mask {
                    Mask::Star { anchor_len, block_len, .. } => (anchor_len, block_len),
                    _ => (0, 0),
                };
                json!({
                    "kind": "attention", "batch": batch, "query_len": query_len, "key_len": key_len,
                    "query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim,
                    "causal": config.mask == Mask::Causal, "anchor_len": anchor_len, "block_len": block_len,
                    "heads_first": *order == Order::HeadsSeq, "packed": offsets.is_some(),
                    "f32_out": f32_out, "row_invariant": row_invariant,
                })
            }
            Work::Merge { n, tokens, .. } => json!({ "kind": "merge", "n": n, "tokens": tokens }),
            Work::Append { tokens, rotated, .. } => {
                json!({ "kind": "append", "tokens": tokens, "rotated": rotated })
            }
        };
        row["label"] = json!(self.label);
        if let Some(against) = &self.against {
            row["against"] = json!(against);
        }
        if !self.parts.is_empty() {
            row["parts"] = json!(self.parts);
        }
        row
    }
}

/// How large the cases are.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// What lengths are divided by.
    divisor: usize,
    query_heads: usize,
    kv_heads: usize,
    /// Whether one row fails on purpose.
    with_error: bool,
}

impl Sizes {
    /// The heads of Llama-3-8B.
    pub const GPU: Self = Self { divisor: 1, query_heads: 32, kv_heads: 8, with_error: false };
    /// Small enough for the emulator.
    pub const REHEARSAL: Self = Self { divisor: 512, query_heads: 4, kv_heads: 1, with_error: true };

    fn len(&self, len: usize) -> usize {
        (len / self.divisor).max(1)
    }

    fn call(&self, mask: Mask, batch: usize, query_len: usize, key_len: usize, head_dim: usize) -> Call {
        let Self { query_heads, kv_heads, .. } = *self;
        let shape = AttentionShape {
            batch,
            query_len,
            key_len,
            query_heads,
            kv_heads,
            head_dim,
            value_dim: head_dim,
        };
        Call {
            config: AttentionConfig::new(mask),
            shape,
            order: Order::SeqHeads,
            f32_out: false,
            offsets: None,
            row_invariant: false,
        }
    }

    pub fn causal(&self, len: usize, head_dim: usize) -> Case {
        let len = self.len(len);
        attention("causal", self.call(Mask::Causal, 1, len, len, head_dim))
    }

    /// The same with outputs of f32.
    pub fn causal_f32(&self, len: usize, head_dim: usize) -> Case {
        let len = self.len(len);
        let call = self.call(Mask::Causal, 1, len, len, head_dim);
        attention("causal, f32 out", Call { f32_out: true, ..call })
    }

    pub fn full(&self, len: usize) -> Case {
        let len = self.len(len);
        attention("full", self.call(Mask::Full, 1, len, len, 128))
    }

    /// Context encoding on the first rank, beside dense causal attention over `against` tokens.
    pub fn star(&self, len: usize, anchor_len: usize, block_len: usize, against: usize) -> Case {
        let [len, anchor_len, block_len] = [len, anchor_len, block_len].map(|len| self.len(len));
        let mask = Mask::Star { anchor_len, block_len, first_block_len: block_len, left: None };
        let name = format!("star a {anchor_len} b {block_len}");
        let case = attention(&name, self.call(mask, 1, len, len, 128));
        Case { against: Some(self.causal(against, 128).label), ..case }
    }

    /// Query attention: a few tokens over many keys.
    pub fn query(&self, batch: usize, query_len: usize, key_len: usize, head_dim: usize) -> Case {
        attention("query", self.call(Mask::Full, batch, query_len, self.len(key_len), head_dim))
    }

    /// The same with bits that do not depend on the rows of the call, beside plain ones.
    fn query_row_invariant(&self, query_len: usize, key_len: usize) -> Case {
        let call = self.call(Mask::Full, 1, query_len, self.len(key_len), 128);
        let case = attention("query, row-invariant", Call { row_invariant: true, ..call });
        Case { parts: vec![self.query(1, query_len, key_len, 128).label], ..case }
    }

    /// The same over keys in the order `[batch, heads, seq, dim]`.
    fn query_heads_first(&self, query_len: usize, key_len: usize) -> Case {
        let call = self.call(Mask::Full, 1, query_len, self.len(key_len), 128);
        attention("query, keys [heads, seq]", Call { order: Order::HeadsSeq, ..call })
    }

    /// Packed causal sequences: so many, each of so many queries and keys.
    fn ragged(&self, sequences: &[[usize; 3]]) -> Case {
        let lens = sequences.iter().flat_map(|&[count, query, key]| std::iter::repeat_n([query, key], count));
        let offsets = [0, 1].map(|axis| {
            let mut offsets = vec![0];
            offsets.extend(lens.clone().scan(0, |end, len| {
                *end += len[axis];
                Some(*end)
            }));
            offsets
        });
        let [query_len, key_len] = offsets.each_ref().map(|offsets| offsets[offsets.len() - 1]);
        let call = Call { offsets: Some(offsets), ..self.call(Mask::Causal, 1, query_len, key_len, 128) };
        let name = |[count, query, key]: &[usize; 3]| format!("{count} x {query} over {key}");
        let label = sequences.iter().map(name).collect::<Vec<_>>().join(" + ");
        Case::new(format!("packed {label}, d 128"), Work::Attention(call))
    }

    fn merge(&self, n: usize, tokens: usize) -> Case {
        let tokens = self.len(tokens);
        let label = format!("merge of {n}, {tokens} x {} x 128, f32", self.query_heads);
        Case::new(label, Work::Merge { n, tokens, heads: self.query_heads, dim: 128 })
    }

    fn append(&self, tokens: usize, rotated: usize) -> Case {
        let name = if rotated > 0 { "append with RoPE" } else { "append" };
        let label = format!("{name}, {tokens} x {} x 128", self.kv_heads);
        Case::new(label, Work::Append { tokens, heads: self.kv_heads, dim: 128, rotated })
    }
}

fn attention(name: &str, call: Call) -> Case {
    let AttentionShape { batch, query_len, key_len, head_dim, .. } = call.shape;
    Case::new(format!("{name}, {batch} x {query_len} x {key_len}, d {head_dim}"), Work::Attention(call))
}

const KILO: usize = 1024;

/// All rows: the copy first, then those that matter most.
pub fn all(sizes: &Sizes) -> Vec<Case> {
    let mut cases = vec![Case::new("copy".into(), Work::Copy { bytes: sizes.len(1 << 30) })];
    if sizes.with_error {
        // No kernel has this head dim.
        cases.push(sizes.causal(16 * KILO, 84));
    }
    for len in [16, 32, 64, 128].map(|kilo| kilo * KILO) {
        cases.push(sizes.causal(len, 128));
        // The paper's setting: blocks of a quarter of the context, each behind an anchor as long.
        cases.push(sizes.star(len, len / 4, len / 4, len));
        cases.push(sizes.star(len, KILO, 4 * KILO, len));
    }
    for query_len in [1, 4, 16, 64, 128] {
        cases.push(sizes.query(1, query_len, 128 * KILO, 128));
    }
    cases.extend([1, 16].map(|query_len| sizes.query_row_invariant(query_len, 128 * KILO)));
    cases.push(sizes.query_heads_first(1, 128 * KILO));
    cases.push(sizes.query_heads_first(16, 128 * KILO));
    cases.push(sizes.query(1, 1, 16 * KILO, 128));
    cases.push(sizes.query(16, 1, 16 * KILO, 128));
    cases.push(sizes.query(1, 1, 128 * KILO, 64));
    cases.push(sizes.query(1, 1, 128 * KILO, 256));
    cases.extend([(2, 8192), (8, 2048), (64, 256)].map(|(n, tokens)| sizes.merge(n, tokens)));
    cases.push(sizes.full(16 * KILO));
    cases.extend([64, 96, 192, 256].map(|head_dim| sizes.causal(16 * KILO, head_dim)));
    // A prefill beside decodes, and one long decode beside short ones.
    let prefill = [[1, sizes.len(4 * KILO), sizes.len(4 * KILO)], [31, 1, sizes.len(32 * KILO)]];
    let decodes = [[1, 1, sizes.len(KILO * KILO)], [128, 1, 128]];
    for sequences in [prefill, decodes] {
        let parts = sequences.map(|part| sizes.ragged(&[part]));
        let labels = parts.iter().map(|part| part.label.clone()).collect();
        cases.push(Case { parts: labels, ..sizes.ragged(&sequences) });
        cases.extend(parts);
    }
    let rows = sizes.len(64 * KILO);
    cases.extend([(rows, 0), (rows, 128), (16, 128)].map(|(tokens, rotated)| sizes.append(tokens, rotated)));
    // Queries and outputs of 8 GiB, keys and values of 2 GiB: 20.5 GiB of the GPU's memory.
    let million = sizes.star(KILO * KILO, 32 * KILO, 32 * KILO, 128 * KILO);
    cases.push(Case { once: true, ..million });
    cases
}
