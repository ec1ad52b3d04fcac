//! Bad input: a typed error that names the argument, and nothing written.

use crate::common::{extents, named};
use star_attention::cpu::flash::{self, Plan};
use star_attention::cpu::{InstructionSet, reference};
use star_attention::{
    AttentionConfig, AttentionShape, Batch, Error, Inputs, Mask, PlanConfig, Result, TensorView,
    TensorViewMut,
};

const SHAPE: AttentionShape = extents([2, 3, 5], [4, 2], [8, 8]);
const QUERY: [usize; 4] = [2, 3, 4, 8];
const KEY: [usize; 4] = [2, 5, 2, 8];
const LSE: usize = 24;

/// A call of which one thing is wrong.
struct Call {
    config: AttentionConfig,
    query: [usize; 4],
    key: [usize; 4],
    value: [usize; 4],
    out: [usize; 4],
    lse: usize,
    /// The tensor (0 query, 1 key, 2 value, 3 out) whose last axis is not contiguous.
    scattered: Option<usize>,
}

const GOOD: Call = Call {
    config: AttentionConfig { mask: Mask::Full, scale: None, softcap: None },
    query: QUERY,
    key: KEY,
    value: KEY,
    out: QUERY,
    lse: LSE,
    scattered: None,
};

fn strides([_, seq, heads, dim]: [usize; 4], scattered: bool) -> [usize; 4] {
    let step = if scattered { 2 } else { 1 };
    [seq * heads * dim * step, heads * dim * step, dim * step, step]
}

impl Call {
    /// Makes the call by way of the convenience and of a plan for the right shape; asserts that
    /// nothing was written.
    fn run(&self) -> [Result<()>; 2] {
        [true, false].map(|convenience| {
            let input = vec![0.5f32; 2048];
            let mut rows = vec![7.0f32; 2048];
            let mut lse = vec![7.0f32; self.lse];
            let view = |i: usize, name, shape| {
                TensorView::new(name, &input, shape, strides(shape, self.scattered == Some(i))).unwrap()
            };
            let (query, key, value) =
                (view(0, "q", self.query), view(1, "k", self.key), view(2, "v", self.value));
            let out =
                TensorViewMut::new("o", &mut rows, self.out, strides(self.out, self.scattered == Some(3)))
                    .unwrap();
            let result = if convenience {
                flash::attention(&self.config, query, key, value, out, Some(&mut lse))
            } else {
                Plan::new(&self.config, &SHAPE).and_then(|plan| {
                    let mut workspace = vec![0u8; plan.workspace_bytes()];
                    plan.run(Inputs::new(query, key, value), out, Some(&mut lse), &mut workspace)
                })
            };
            if result.is_err() {
                assert!(rows.iter().chain(&lse).all(|&x| x == 7.0), "written in spite of {result:?}");
            }
            result
        })
    }

    fn fails_with(&self, kind: &str, argument: &str) {
        for result in self.run() {
            assert_eq!(named(result.unwrap_err()), (kind, argument));
        }
    }
}

#[test]
fn the_good_call_is_good() {
    for result in GOOD.run() {
        result.unwrap();
    }
}

#[test]
fn shapes_that_do_not_fit() {
    for axis in [0, 1, 3] {
        let wrong = |mut shape: [usize; 4]| {
            shape[axis] += 1;
            shape
        };
        // Keys are as many as they are, by themselves: then it is the values that do not fit.
        if axis != 1 {
            Call { key: wrong(KEY), ..GOOD }.fails_with("shape", "key");
        }
        if axis != 3 {
            Call { value: wrong(KEY), ..GOOD }.fails_with("shape", "value");
        }
        Call { out: wrong(QUERY), ..GOOD }.fails_with("shape", "out");
    }
    Call { value: [2, 5, 1, 8], ..GOOD }.fails_with("shape", "value");
    Call { out: [2, 3, 2, 8], ..GOOD }.fails_with("shape", "out");
    Call { out: [2, 4, 3, 8], ..GOOD }.fails_with("shape", "out");
    for lse in [0, LSE - 1, LSE + 1] {
        Call { lse, ..GOOD }.fails_with("shape", "lse");
    }
}

#[test]
fn heads_that_do_not_divide() {
    let plan = |query_heads, kv_heads| {
        Plan::new(&AttentionConfig::default(), &AttentionShape { query_heads, kv_heads, ..SHAPE })
    };
    for (query_heads, kv_heads, argument) in
        [(4, 3, "query"), (1, 2, "query"), (0, 2, "query"), (4, 0, "key")]
    {
        assert_eq!(named(plan(query_heads, kv_heads).unwrap_err()), ("shape", argument));
    }
    let plan = Plan::new(&AttentionConfig::default(), &AttentionShape { head_dim: 0, ..SHAPE });
    assert_eq!(named(plan.unwrap_err()), ("shape", "query"));
    let call = Call { key: [2, 5, 3, 8], value: [2, 5, 3, 8], ..GOOD };
    let [by_convenience, by_plan] = call.run();
    assert_eq!(named(by_convenience.unwrap_err()), ("shape", "query"));
    assert_eq!(named(by_plan.unwrap_err()), ("shape", "key"));
}

/// Values have the dim that they have, by themselves: then it is the output that does not fit.
#[test]
fn value_dims_that_do_not_fit() {
    for dim in [1, 7, 9] {
        let (value, out) = ([2, 5, 2, dim], [2, 3, 4, dim]);
        let [by_convenience, by_plan] = Call { value, ..GOOD }.run();
        assert_eq!(named(by_convenience.unwrap_err()), ("shape", "out"));
        assert_eq!(named(by_plan.unwrap_err()), ("shape", "value"));
        let [by_convenience, by_plan] = Call { value, out, ..GOOD }.run();
        by_convenience.unwrap();
        assert_eq!(named(by_plan.unwrap_err()), ("shape", "value"));
    }
    let [by_convenience, by_plan] = Call { value: [2, 5, 2, 0], out: [2, 3, 4, 0], ..GOOD }.run();
    assert_eq!(named(by_convenience.unwrap_err()), ("shape", "value"));
    assert_eq!(named(by_plan.unwrap_err()), ("shape", "value"));
    let plan = |value_dim| Plan::new(&AttentionConfig::default(), &AttentionShape { value_dim, ..SHAPE });
    assert_eq!(named(plan(0).unwrap_err()), ("shape", "value"));
    assert_eq!(named(plan(1 << 21).unwrap_err()), ("value", "value_dim"));
    let data = [0.5f32; 192];
    let view =
        |shape: [usize; 4]| TensorView::contiguous("x", &data[..shape.iter().product()], shape).unwrap();
    let [query, key, none] = [QUERY, KEY, [2, 5, 2, 0]].map(view);
    let refused = reference::attention(&AttentionConfig::default(), query, key, none);
    assert_eq!(named(refused.unwrap_err()), ("shape", "value"));
}

/// A plan serves the shape that it was made for and no other.
#[test]
fn tensors_that_are_not_the_plans() {
    let others = [[1, 3, 4, 8], [2, 1, 4, 8], [2, 3, 2, 8], [2, 3, 4, 4]];
    for query in others {
        let [_, result] = Call { query, ..GOOD }.run();
        assert_eq!(named(result.unwrap_err()), ("shape", "query"));
    }
    for key in [[1, 5, 2, 8], [2, 4, 2, 8], [2, 5, 1, 8], [2, 5, 2, 4]] {
        let [_, result] = Call { key, value: key, ..GOOD }.run();
        assert_eq!(named(result.unwrap_err()), ("shape", "key"));
    }
}

#[test]
fn last_axes_that_are_not_contiguous() {
    for (tensor, argument) in ["query", "key", "value", "out"].into_iter().enumerate() {
        Call { scattered: Some(tensor), ..GOOD }.fails_with("stride", argument);
    }
}

#[test]
fn configs_out_of_range() {
    let refused = |config: AttentionConfig, argument: &str| {
        Call { config: config.clone(), ..GOOD }.fails_with("value", argument);
        let data = vec![0.5f32; 160];
        let view = TensorView::contiguous("q", &data, KEY).unwrap();
        assert_eq!(named(reference::attention(&config, view, view, view).unwrap_err()), ("value", argument));
        assert_eq!(named(Plan::packed(&config, &ONE, &[0, 3], &[0, 5]).unwrap_err()), ("value", argument));
    };
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, -f32::MIN_POSITIVE] {
        refused(AttentionConfig { scale: Some(scale), ..Default::default() }, "scale");
    }
    for softcap in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, 0.0] {
        refused(AttentionConfig { softcap: Some(softcap), ..Default::default() }, "softcap");
    }
    let batch = Batch::uniform(&SHAPE, &Mask::Full).unwrap();
    let plan = Plan::for_batch(&PlanConfig::new().with_split_keys(0), batch);
    assert_eq!(named(plan.unwrap_err()), ("value", "split_keys"));
    let star = |anchor_len, block_len, first_block_len| {
        AttentionConfig::new(Mask::Star { anchor_len, block_len, first_block_len, left: None })
    };
    refused(star(0, 0, 0), "block_len");
    refused(star(0, 0, 8), "block_len");
    refused(star(5, 4, 8), "anchor_len");
    refused(star(5, 8, 4), "anchor_len");
    refused(star(usize::MAX, 8, usize::MAX), "anchor_len");
}

#[test]
fn workspaces_too_small() {
    let mut tried = 0;
    for (query_len, key_len) in [(1, 20_000), (3, 5), (300, 300)] {
        let shape = AttentionShape { batch: 1, query_len, key_len, ..SHAPE };
        let plan = Plan::new(&AttentionConfig::default(), &shape).unwrap();
        let needed = plan.workspace_bytes();
        let data = vec![0.5f32; (query_len * 4).max(key_len * 2) * 8];
        let of =
            |name, shape: [usize; 4]| TensorView::new(name, &data, shape, strides(shape, false)).unwrap();
        for len in [0, needed / 2, needed.saturating_sub(1)] {
            if len >= needed {
                continue;
            }
            tried += 1;
            let mut rows = vec![7.0f32; query_len * 4 * 8];
            let mut lse = vec![7.0f32; query_len * 4];
            let mut workspace = vec![7u8; len];
            let out = TensorViewMut::contiguous("o", &mut rows, shape.query_shape()).unwrap();
            let (query, key) = (of("q", shape.query_shape()), of("k", shape.key_shape()));
            let result = plan.run(Inputs::new(query, key, key), out, Some(&mut lse), &mut workspace[..]);
            match result {
                Err(Error::Workspace { expected, got }) => assert_eq!((expected, got), (needed, len)),
                other => panic!("{other:?}"),
            }
            assert!(rows.iter().chain(&lse).all(|&x| x == 7.0) && workspace.iter().all(|&x| x == 7));
        }
    }
    assert!(tried > 0, "a plan for one row over 20,000 keys needs a workspace");
}

const ONE: AttentionShape = AttentionShape { batch: 1, ..SHAPE };

#[test]
fn packed_offsets_that_do_not_fit() {
    let refused = |shape: &AttentionShape, query_offsets: &[usize], key_offsets: &[usize], argument: &str| {
        let error = Plan::packed(&AttentionConfig::default(), shape, query_offsets, key_offsets).unwrap_err();
        assert_eq!(named(error).1, argument, "{query_offsets:?} {key_offsets:?}");
    };
    Plan::packed(&AttentionConfig::default(), &ONE, &[0, 1, 1, 3], &[0, 0, 5, 5]).unwrap();
    // One of each, in turn for queries (3 rows) and keys (5 rows).
    for wrong in [
        &[0, 2, 1, 3][..],
        &[1, 2, 2, 3],
        &[0, 1, 1, 2],
        &[0, 1, 1, 4],
        &[0, 4, 4, 3],
        &[0, usize::MAX, 0, 3],
    ] {
        refused(&ONE, wrong, &[0, 0, 5, 5], "query_offsets");
    }
    for wrong in [
        &[0, 2, 1, 5][..],
        &[1, 2, 2, 5],
        &[0, 1, 1, 4],
        &[0, 1, 1, 6],
        &[0, 6, 6, 5],
        &[0, usize::MAX, 0, 5],
    ] {
        refused(&ONE, &[0, 1, 1, 3], wrong, "key_offsets");
    }
    refused(&ONE, &[], &[], "query_offsets");
    refused(&ONE, &[3], &[5], "query_offsets");
    // As many sequences of keys as of queries.
    refused(&ONE, &[], &[0, 5], "key_offsets");
    refused(&ONE, &[0, 3], &[], "key_offsets");
    refused(&ONE, &[0, 3], &[0, 2, 5], "key_offsets");
    refused(&ONE, &[0, 1, 3], &[0, 5], "key_offsets");
    let error = Plan::packed(&AttentionConfig::default(), &SHAPE, &[0, 3], &[0, 5]).unwrap_err();
    assert_eq!(named(error), ("shape", "query"));
}

#[test]
fn instructions_that_the_cpu_has_not_got() {
    let available = InstructionSet::available();
    assert!(available.contains(&InstructionSet::Portable));
    let best = InstructionSet::best();
    assert!(available.contains(&best) && best != InstructionSet::AmxModel);
    let foreign = if cfg!(target_arch = "x86_64") { InstructionSet::Neon } else { InstructionSet::Avx2 };
    assert!(!available.contains(&foreign));
    let plan = Plan::new(&AttentionConfig::default(), &SHAPE).unwrap();
    assert_eq!(named(plan.with_instructions(foreign).unwrap_err()), ("value", "instructions"));
}
