//! Random attention calls.

use super::expected::Expected;
use crate::common::{Layout, Rng, Tensor, indices, layouts, sinks};
use proptest::prelude::*;
use star_attention::cpu::InstructionSet;
use star_attention::cpu::flash::Plan;
use star_attention::{AttentionConfig, AttentionShape, BlockList, Element, Mask, TensorView};
use std::ops::Range;

/// What the tensors hold.
#[derive(Clone, Copy, Debug)]
pub enum Values {
    /// Standard normal.
    Normal,
    /// Normal with the queries this much larger, so that all but a few weights underflow.
    Large(f32),
    /// Every row of q, k and v holds one number.
    ConstantRows,
    /// All keys of a head are the same.
    EqualKeys,
}

impl Values {
    /// Whether many terms of a sum are the same, so that their rounding errors add up instead of
    /// averaging out.
    pub fn correlated(self) -> bool {
        matches!(self, Self::ConstantRows | Self::EqualKeys)
    }
}

pub fn values() -> impl Strategy<Value = Values> {
    prop_oneof![
        5 => Just(Values::Normal),
        2 => (100f32..3000.0).prop_map(Values::Large),
        1 => Just(Values::ConstantRows),
        1 => Just(Values::EqualKeys),
    ]
}

/// One call: all that is needed to make it again.
#[derive(Clone, Debug)]
pub struct Case {
    pub shape: AttentionShape,
    pub config: AttentionConfig,
    /// Of q, k, v and out.
    pub layouts: [Layout; 4],
    pub values: Values,
    /// What the call is compiled to.
    pub instructions: InstructionSet,
    /// Whether there are attention sinks.
    pub sinks: bool,
    pub seed: u64,
}

/// Head dims: those of real models, and any other.
pub fn head_dims() -> impl Strategy<Value = usize> {
    prop_oneof![2 => 1..=160usize, 3 => prop::sample::select(vec![64, 96, 128, 192, 256])]
}

/// Multiply-adds of QKᵀ in the largest case: what the oracle, one row at a time in f64, does in
/// some 20 ms.
const WORK: usize = 3_000_000;

pub fn shapes() -> impl Strategy<Value = AttentionShape> {
    let query_len = prop_oneof![2 => 0..=8usize, 3 => 0..=200usize];
    let key_len = prop_oneof![2 => 0..=20usize, 6 => 0..=300usize, 1 => 300..=1500usize];
    let same_len = prop::bool::weighted(0.3);
    (1..=3usize, query_len, key_len, same_len, 1..=4usize, 1..=8usize, head_dims()).prop_map(
        |(batch, query_len, key_len, same_len, kv_heads, group, head_dim)| {
            let query_len = if same_len { key_len.min(200) } else { query_len };
            let key_len = if same_len { query_len } else { key_len };
            let mut shape = AttentionShape {
                batch,
                query_len,
                key_len,
                query_heads: kv_heads * group,
                kv_heads,
                head_dim,
                value_dim: head_dim,
            };
            let work = |s: &AttentionShape| s.batch * s.query_len * s.key_len * s.query_heads * s.head_dim;
            while work(&shape) > WORK {
                let group = shape.group();
                if shape.kv_heads > 1 && shape.kv_heads >= group {
                    shape.kv_heads -= 1;
                    shape.query_heads = shape.kv_heads * group;
                } else if group > 1 {
                    shape.query_heads = shape.kv_heads * (group - 1);
                } else if shape.batch > 1 {
                    shape.batch -= 1;
                } else if same_len {
                    shape.query_len = shape.query_len * 3 / 4;
                    shape.key_len = shape.query_len;
                } else {
                    shape.query_len = shape.query_len * 3 / 4;
                }
            }
            shape
        },
    )
}

/// Star masks of every kind, also those whose blocks reach far beyond any sequence.
pub fn star_masks() -> impl Strategy<Value = Mask> {
    let block_len = prop_oneof![
        1 => Just(1),
        6 => 1..=70usize,
        3 => 60..=300usize,
        1 => Just(usize::MAX),
    ];
    let lens = (block_len, any::<prop::sample::Index>(), 0..4usize, 0..5usize, 0..=300usize).prop_map(
        |(block_len, index, anchor, first, more)| {
            let anchor_len = match anchor {
                0 => 0,
                1 => block_len,
                _ => index.index(block_len.min(320)),
            };
            let first_block_len = match first {
                0 => anchor_len,
                1 => block_len,
                2 => usize::MAX,
                _ => anchor_len.saturating_add(more),
            };
            (anchor_len, block_len, first_block_len)
        },
    );
    (lens, lefts()).prop_map(|((anchor_len, block_len, first_block_len), left)| Mask::Star {
        anchor_len,
        block_len,
        first_block_len,
        left,
    })
}

/// How far a window reaches.
fn lefts() -> impl Strategy<Value = Option<usize>> {
    prop_oneof![4 => Just(None), 3 => (0..=200usize).prop_map(Some), 1 => Just(Some(usize::MAX))]
}

/// Windows: causal ones, as of models, and others.
fn windows() -> impl Strategy<Value = Mask> {
    let right = prop_oneof![2 => Just(Some(0)), 1 => lefts()];
    (lefts(), right).prop_map(|(left, right)| Mask::Window { left, right })
}

/// How a block list is made once rows and keys are known.
#[derive(Clone, Debug)]
pub struct BlockLists {
    tile_rows: usize,
    /// Ranges begin and end at multiples of this.
    granularity: usize,
    causal: bool,
    seed: u64,
}

/// A block list now and then.
pub fn block_lists() -> impl Strategy<Value = Option<BlockLists>> {
    let lists = (1..=150usize, prop_oneof![1..=8usize, 16..=70usize], any::<bool>(), any::<u64>());
    prop::option::weighted(
        0.2,
        lists.prop_map(|(tile_rows, granularity, causal, seed)| BlockLists {
            tile_rows,
            granularity,
            causal,
            seed,
        }),
    )
}

impl BlockLists {
    pub fn mask(&self, query_len: usize, key_len: usize) -> Mask {
        let mut rng = Rng::new(self.seed);
        let (mut offsets, mut ranges) = (vec![0], Vec::<Range<usize>>::new());
        for _ in 0..query_len.div_ceil(self.tile_rows) {
            let mut end = 0;
            while end < key_len {
                let start = end + self.granularity * rng.below(3);
                end = start + self.granularity * (1 + rng.below(3));
                if start < key_len {
                    ranges.push(start..end.min(key_len));
                }
            }
            offsets.push(ranges.len());
        }
        let list = BlockList::new(self.tile_rows, &offsets, &ranges).unwrap();
        Mask::from(if self.causal { list.causal() } else { list })
    }
}

pub fn masks() -> impl Strategy<Value = Mask> {
    prop_oneof![1 => Just(Mask::Full), 2 => Just(Mask::Causal), 2 => windows(), 3 => star_masks()]
}

pub fn configs() -> impl Strategy<Value = AttentionConfig> {
    let scale = prop_oneof![6 => Just(None), 2 => (0f32..1.0).prop_map(Some), 1 => Just(Some(0.0))];
    // Those of real models, and any other.
    let softcap = prop_oneof![
        6 => Just(None),
        1 => (0.5f32..60.0).prop_map(Some),
        1 => (-3f32..30.0).prop_map(|exponent| Some(10f32.powf(exponent))),
    ];
    (masks(), scale, softcap).prop_map(|(mask, scale, softcap)| AttentionConfig { mask, scale, softcap })
}

pub fn cases() -> impl Strategy<Value = Case> {
    let layouts = [layouts(), layouts(), layouts(), layouts()];
    let instructions = prop::sample::select(InstructionSet::available());
    let sinks = prop::bool::weighted(0.4);
    (shapes(), configs(), block_lists(), layouts, values(), instructions, sinks, any::<u64>()).prop_map(
        |(shape, mut config, blocks, layouts, values, instructions, sinks, seed)| {
            if let Some(blocks) = blocks {
                config.mask = blocks.mask(shape.query_len, shape.key_len);
            }
            Case { shape, config, layouts, values, instructions, sinks, seed }
        },
    )
}

/// Queries, keys and values.
pub struct Inputs<T> {
    pub query: Tensor<T>,
    pub key: Tensor<T>,
    pub value: Tensor<T>,
}

impl<T: Element> Inputs<T> {
    /// What a call of the CPU takes, with sinks if given.
    pub fn views<'a>(
        &'a self,
        sinks: Option<&'a [f32]>,
    ) -> star_attention::Inputs<TensorView<'a, T>, TensorView<'a, T>, &'a [f32]> {
        let mut views = star_attention::Inputs::new(self.query.view(), self.key.view(), self.value.view());
        views.sinks = sinks;
        views
    }

    /// Fills keys and values of a range of tokens.
    pub fn poison(&mut self, tokens: Range<usize>, value: f32) {
        for index @ [_, seq, ..] in indices(self.key.shape()) {
            if tokens.contains(&seq) {
                self.key.set(index, T::from_f32(value));
                self.value.set(index, T::from_f32(value));
            }
        }
    }
}

impl Case {
    /// The tensors of this case. Between their elements they hold NaN, so that reading there shows.
    pub fn inputs<T: Element>(&self) -> Inputs<T> {
        let mut rng = Rng::new(self.seed);
        let mut tensor = |name, shape, layout, factor: f32, repeats: fn([usize; 4]) -> bool| {
            let mut row = Vec::new();
            Tensor::new(name, shape, layout, f32::NAN, |index @ [_, _, _, d]| {
                if row.len() <= d {
                    row.resize(d + 1, 0.0);
                }
                match self.values {
                    Values::ConstantRows if d > 0 => row[d] = row[0],
                    _ if repeats(index) => {}
                    _ => row[d] = factor * rng.normal(),
                }
                row[d]
            })
        };
        let factor = if let Values::Large(factor) = self.values { factor } else { 1.0 };
        let equal_keys = matches!(self.values, Values::EqualKeys);
        // One key for all heads of a sequence: the row drawn first is used again.
        let key_repeats = if equal_keys { |[_, seq, head, _]: [usize; 4]| seq + head > 0 } else { |_| false };
        let [query_layout, key_layout, value_layout, _] = &self.layouts;
        Inputs {
            query: tensor("query", self.shape.query_shape(), query_layout, factor, |_| false),
            key: tensor("key", self.shape.key_shape(), key_layout, 1.0, key_repeats),
            value: tensor("value", self.shape.key_shape(), value_layout, 1.0, |_| false),
        }
    }

    /// The sinks of this case.
    pub fn sinks(&self) -> Option<Vec<f32>> {
        self.sinks.then(|| sinks(self.shape.query_heads, self.seed))
    }

    /// What the definition gives for `inputs`.
    pub fn expected<T: Element>(&self, Inputs { query, key, value }: &Inputs<T>) -> Expected {
        let (sinks, correlated) = (self.sinks(), self.values.correlated());
        Expected::with_sinks(&self.config, query, key, value, sinks.as_deref(), correlated)
    }

    /// The output tensor, holding rubbish.
    pub fn output<O: Element>(&self) -> Tensor<O> {
        Tensor::new("out", self.shape.query_shape(), &self.layouts[3], RUBBISH, |_| f32::NAN)
    }

    pub fn plan(&self) -> Plan {
        Plan::new(&self.config, &self.shape).unwrap().with_instructions(self.instructions).unwrap()
    }

    /// One call into an output and a workspace that hold rubbish.
    pub fn run<T: Element, O: Element>(&self, inputs: &Inputs<T>) -> (Tensor<O>, Vec<f32>) {
        self.run_plan(&self.plan(), inputs)
    }

    /// The same under a plan made before.
    pub fn run_plan<T: Element, O: Element>(&self, plan: &Plan, inputs: &Inputs<T>) -> (Tensor<O>, Vec<f32>) {
        let mut workspace = vec![0xffu8; plan.workspace_bytes()];
        let mut out = self.output();
        let mut lse = vec![RUBBISH; self.shape.lse_len()];
        let sinks = self.sinks();
        let views = inputs.views(sinks.as_deref());
        plan.run(views, out.view_mut(), Some(&mut lse), &mut workspace).unwrap();
        (out, lse)
    }
}

/// What outputs hold before a call, and between their rows also after it.
pub const RUBBISH: f32 = 1.0e4;

/// One element of q, k or v that is not finite.
#[derive(Clone, Copy, Debug)]
pub struct Spot {
    pub tensor: usize,
    pub index: [prop::sample::Index; 4],
    pub value: f32,
}

pub fn spots() -> impl Strategy<Value = Spot> {
    let value = prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    let index = any::<[prop::sample::Index; 4]>();
    (0..3usize, index, value).prop_map(|(tensor, index, value)| Spot { tensor, index, value })
}
