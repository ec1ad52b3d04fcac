//! Random attention calls.

use super::expected::Expected;
use crate::common::{
    Call, Layout, Rng, Tensor, as_slices, extents, indices, layouts, scale_of, scales, sinks, views,
};
use proptest::prelude::*;
use star_attention::cpu::InstructionSet;
use star_attention::cpu::flash::Plan;
use star_attention::{AttentionConfig, AttentionShape, BlockList, Element, Mask, Scales};
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

/// Head dims with value dims: mostly the same, else any other; now and then those of models with
/// latent keys.
pub fn dims() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![
        14 => head_dims().prop_map(|dim| (dim, dim)),
        5 => (head_dims(), 1..=160usize),
        1 => prop::sample::select(vec![(192, 128), (576, 512)]),
    ]
}

/// Multiply-adds of QKᵀ, and of the values' sums, in the largest case: what the oracle, one row at
/// a time in f64, does in some 20 ms.
const WORK: usize = 3_000_000;

pub fn shapes(dims: impl Strategy<Value = (usize, usize)>) -> impl Strategy<Value = AttentionShape> {
    let query_len = prop_oneof![2 => 0..=8usize, 3 => 0..=200usize];
    let key_len = prop_oneof![2 => 0..=20usize, 6 => 0..=300usize, 1 => 300..=1500usize];
    let same_len = prop::bool::weighted(0.3);
    (1..=3usize, query_len, key_len, same_len, 1..=4usize, 1..=8usize, dims).prop_map(
        |(batch, query_len, key_len, same_len, kv_heads, group, (head_dim, value_dim))| {
            let query_len = if same_len { key_len.min(200) } else { query_len };
            let key_len = if same_len { query_len } else { key_len };
            let mut shape =
                extents([batch, query_len, key_len], [kv_heads * group, kv_heads], [head_dim, value_dim]);
            let work = |s: &AttentionShape| {
                s.batch * s.query_len * s.key_len * s.query_heads * s.head_dim.midpoint(s.value_dim)
            };
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
    cases_of(dims())
}

/// Calls on heads of these dims.
pub fn cases_of(dims: impl Strategy<Value = (usize, usize)>) -> impl Strategy<Value = Case> {
    let layouts = [layouts(), layouts(), layouts(), layouts()];
    let instructions = prop::sample::select(InstructionSet::available());
    let sinks = prop::bool::weighted(0.4);
    (shapes(dims), configs(), block_lists(), layouts, values(), instructions, sinks, any::<u64>()).prop_map(
        |(shape, mut config, blocks, layouts, values, instructions, sinks, seed)| {
            if let Some(blocks) = blocks {
                config.mask = blocks.mask(shape.query_len, shape.key_len);
            }
            Case { shape, config, layouts, values, instructions, sinks, seed }
        },
    )
}

/// Queries, keys and values.
pub struct Inputs<Q, K = Q> {
    pub query: Tensor<Q>,
    pub key: Tensor<K>,
    pub value: Tensor<K>,
}

impl<Q: Element, K: Element> Inputs<Q, K> {
    /// A call on these, with a sink for each head and with scales, if given.
    pub fn call<'a>(
        &'a self,
        sinks: Option<&'a [f32]>,
        scales: &'a Option<Scales<Vec<f32>>>,
    ) -> Call<'a, Q, K> {
        let mut call = Call::new(&self.query, &self.key, &self.value);
        (call.sinks, call.scales) = (sinks, as_slices(scales));
        call
    }

    /// Fills keys and values of a range of tokens.
    pub fn poison(&mut self, tokens: Range<usize>, value: f32) {
        for index @ [_, seq, ..] in indices(self.key.shape()) {
            if tokens.contains(&seq) {
                self.key.set(index, K::from_f32(value));
            }
        }
        for index @ [_, seq, ..] in indices(self.value.shape()) {
            if tokens.contains(&seq) {
                self.value.set(index, K::from_f32(value));
            }
        }
    }
}

/// The elements of `from` divided by the scales of their heads, if there are any, in a layout. NaN
/// lies between them.
pub fn divided<T: Element>(
    name: &'static str,
    from: &Tensor<f32>,
    scales: Option<&[f32]>,
    layout: &Layout,
) -> Tensor<T> {
    Tensor::new(name, from.shape(), layout, f32::NAN, |index| {
        from.get(index) / scales.map_or(1.0, |scales| scale_of(scales, index[2]))
    })
}

impl Case {
    /// The tensors of this case. Between their elements they hold NaN, so that reading there shows.
    pub fn inputs<Q: Element, K: Element>(&self) -> Inputs<Q, K> {
        let mut rng = Rng::new(self.seed);
        let mut tensor = |shape, factor: f32, repeats: fn([usize; 4]) -> bool| {
            let mut row = Vec::new();
            Tensor::<f32>::contiguous("drawn", shape, |index @ [_, _, _, d]| {
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
        let query = tensor(self.shape.query_shape(), factor, |_| false);
        let key = tensor(self.shape.key_shape(), 1.0, key_repeats);
        let value = tensor(self.shape.value_shape(), 1.0, |_| false);
        let [query_layout, key_layout, value_layout, _] = &self.layouts;
        let scales = self.scales::<K>();
        let scales = as_slices(&scales);
        Inputs {
            query: divided("query", &query, None, query_layout),
            key: divided("key", &key, scales.map(|scales| scales.key), key_layout),
            value: divided("value", &value, scales.map(|scales| scales.value), value_layout),
        }
    }

    /// The scales of keys and values, if they have any.
    pub fn scales<K: Element>(&self) -> Option<Scales<Vec<f32>>> {
        scales::<K>(self.shape.kv_heads, self.seed)
    }

    /// The sinks of this case.
    pub fn sinks(&self) -> Option<Vec<f32>> {
        self.sinks.then(|| sinks(self.shape.query_heads, self.seed))
    }

    /// What the definition gives for `inputs`.
    pub fn expected<Q: Element, K: Element>(&self, inputs: &Inputs<Q, K>) -> Expected {
        let (sinks, scales) = (self.sinks(), self.scales::<K>());
        Expected::of_call(&self.config, inputs.call(sinks.as_deref(), &scales), self.values.correlated())
    }

    /// The output tensor, holding rubbish.
    pub fn output<O: Element>(&self) -> Tensor<O> {
        Tensor::new("out", self.shape.out_shape(), &self.layouts[3], RUBBISH, |_| f32::NAN)
    }

    pub fn plan(&self) -> Plan {
        Plan::new(&self.config, &self.shape).unwrap().with_instructions(self.instructions).unwrap()
    }

    /// A call by a plan into an output and a workspace that hold rubbish.
    pub fn run_plan<Q: Element, K: Element, O: Element>(
        &self,
        plan: &Plan,
        inputs: &Inputs<Q, K>,
    ) -> (Tensor<O>, Vec<f32>) {
        let mut workspace = vec![0xffu8; plan.workspace_bytes()];
        let mut out = self.output();
        let mut lse = vec![RUBBISH; self.shape.lse_len()];
        let (sinks, scales) = (self.sinks(), self.scales::<K>());
        let views = views(inputs.call(sinks.as_deref(), &scales));
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
