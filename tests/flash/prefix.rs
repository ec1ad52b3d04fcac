//! Sequences whose first keys lie in prefix tensors.

use crate::common::{Call, Layout, Rng, Tensor, as_slices, layouts, named, scales, views};
use crate::properties::cases::{divided, star_masks};
use crate::properties::expected::Expected;
use proptest::prelude::*;
use star_attention::cpu::InstructionSet;
use star_attention::cpu::flash::Plan;
use star_attention::{
    AttentionConfig, Batch, Element, F8E4M3, Inputs, Keys, Mask, PlanConfig, Sequence, TensorView, bf16, f16,
};

/// Keys of a split: some sequences have several, most have one.
const SPLIT_KEYS: usize = 192;

/// A sequence of `rows` queries over `prefix` and then `keys` further keys.
#[derive(Clone, Debug)]
struct Member {
    rows: usize,
    prefix: usize,
    keys: usize,
    mask: Mask,
}

#[derive(Clone, Debug)]
struct Case {
    members: Vec<Member>,
    page_len: Option<usize>,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    value_dim: usize,
    row_invariant: bool,
    layouts: [Layout; 2],
    seed: u64,
}

/// Prefixes of a star mask are shorter than the anchor, as long, and longer.
fn members() -> impl Strategy<Value = Member> {
    let mask = prop_oneof![1 => Just(Mask::Full), 2 => Just(Mask::Causal), 3 => star_masks()];
    let rows = prop_oneof![1 => Just(1usize), 1 => 0..5usize, 2 => 0..90usize];
    let keys = prop_oneof![4 => 0..100usize, 1 => 300..700usize];
    (rows, 0..120usize, keys, mask, 0..3).prop_map(|(rows, prefix, keys, mask, equal)| {
        let prefix = match mask {
            Mask::Star { anchor_len, .. } if equal == 0 => anchor_len.min(300),
            _ => prefix,
        };
        Member { rows, prefix, keys, mask }
    })
}

fn cases() -> impl Strategy<Value = Case> {
    let dims = prop::sample::select(vec![(5, 5), (16, 16), (40, 40), (64, 64), (40, 7), (16, 64)]);
    let extents = (1..=2usize, 1..=3usize, dims);
    let page_len = prop::option::of(prop::sample::select(vec![1, 7, 16, 48]));
    let members = prop::collection::vec(members(), 1..4);
    (members, page_len, extents, any::<bool>(), [layouts(), layouts()], any::<u64>()).prop_map(
        |(members, page_len, (kv_heads, group, (head_dim, value_dim)), row_invariant, layouts, seed)| Case {
            members,
            page_len,
            kv_heads,
            group,
            head_dim,
            value_dim,
            row_invariant,
            layouts,
            seed,
        },
    )
}

/// Bits of the output and of the log-sum-exp.
type Bits = (Tensor<f32>, Vec<u32>);

impl Case {
    fn bits<Q: Element, K: Element>(
        &self,
        batch: &Batch,
        call: Call<'_, Q, K>,
        instructions: InstructionSet,
    ) -> Bits {
        let config = PlanConfig::new().with_split_keys(SPLIT_KEYS);
        let config = if self.row_invariant { config.with_row_invariant() } else { config };
        let plan = Plan::for_batch(&config, batch.clone()).unwrap();
        let plan = plan.with_instructions(instructions).unwrap();
        let mut out = Tensor::<f32>::contiguous("out", batch.out_shape(), |_| 0.0);
        let mut lse = vec![0.0; batch.lse_len()];
        let mut workspace = vec![0xffu8; plan.workspace_bytes()];
        plan.run(views(call), out.view_mut(), Some(&mut lse), &mut workspace).unwrap();
        (out, lse.into_iter().map(f32::to_bits).collect())
    }
}

/// The bits of the same keys one after another in one tensor, which are those of the oracle.
fn prefixes_change_no_bit<Q: Element, K: Element>(case: &Case) -> Result<(), TestCaseError> {
    let Case { kv_heads, group, head_dim, value_dim, .. } = *case;
    let mut rng = Rng::new(case.seed);
    let heads = kv_heads * group;
    let total = |count: fn(&Member) -> usize| case.members.iter().map(count).sum::<usize>();
    let query = Tensor::<Q>::normal("query", [1, total(|m| m.rows), heads, head_dim], &mut rng);
    let together = [head_dim, value_dim].map(|dim| [1, total(|m| m.prefix + m.keys), kv_heads, dim]);
    let drawn = together.map(|shape| Tensor::<f32>::normal("drawn", shape, &mut rng));
    let scales = scales::<K>(kv_heads, case.seed);
    let scales = as_slices(&scales);
    let of = [scales.map(|scales| scales.key), scales.map(|scales| scales.value)];
    let kv = [0, 1].map(|i| divided::<K>("rows", &drawn[i], of[i], &Layout::CONTIGUOUS));

    // Where each key of `together` lies apart from the others: in the prefix tensors or not, and
    // the places there.
    let page_len = case.page_len.unwrap_or(1 << 20);
    let (mut places, mut prefix_end, mut key_end, mut query_end) = (Vec::new(), 3, 0, 0);
    let mut sequences = [Vec::new(), Vec::new()];
    for member in &case.members {
        let rows = query_end..query_end + member.rows;
        query_end = rows.end;
        let all = Keys::rows(0, places.len()..places.len() + member.prefix + member.keys);
        sequences[0].push(Sequence::new(0, rows.clone(), all, member.mask.clone()));
        let prefix = prefix_end..prefix_end + member.prefix;
        prefix_end = prefix.end + 2;
        places.extend(prefix.clone().map(|row| (true, [1, row])));
        let first = if case.page_len.is_some() { key_end / page_len } else { 0 };
        let keys = match case.page_len {
            // In descending order, so that no two pages are consecutive.
            Some(_) => {
                let pages = first..first + member.keys.div_ceil(page_len);
                key_end = pages.end * page_len;
                let pages: Vec<u32> = pages.rev().map(|page| page as u32).collect();
                let place = |key: usize| (false, [pages[key / page_len] as usize, key % page_len]);
                places.extend((0..member.keys).map(place));
                Keys::pages(member.keys, pages)
            }
            None => {
                let keys = key_end + 1..key_end + 1 + member.keys;
                key_end = keys.end;
                places.extend(keys.clone().map(|row| (false, [0, row])));
                Keys::rows(0, keys)
            }
        };
        let sequence = Sequence::new(0, rows, keys, member.mask.clone());
        sequences[1].push(sequence.with_prefix(1, prefix));
    }
    let rest = match case.page_len {
        Some(page_len) => [key_end / page_len, page_len],
        None => [1, key_end],
    };
    let apart = |from: &Tensor<K>, [batch, seq]: [usize; 2], prefix, layout| {
        let dim = from.shape()[3];
        let shape = [batch, seq, kv_heads, dim];
        let mut to = Tensor::new("apart", shape, layout, f32::NAN, |_| f32::NAN);
        for (row, &(_, [b, s])) in places.iter().enumerate().filter(|(_, place)| place.0 == prefix) {
            for (head, d) in (0..kv_heads).flat_map(|head| (0..dim).map(move |d| (head, d))) {
                to.set([b, s, head, d], from.get([0, row, head, d]));
            }
        }
        to
    };
    let [prefix_layout, layout] = &case.layouts;
    let prefixes = [&kv[0], &kv[1]].map(|from| apart(from, [2, prefix_end], true, prefix_layout));
    let rest = [&kv[0], &kv[1]].map(|from| apart(from, rest, false, layout));

    let [whole, parts] = sequences;
    let mut batch = Batch::new(query.shape(), together[0]).unwrap().with_value_dim(value_dim).unwrap();
    whole.into_iter().for_each(|sequence| batch.push(sequence).unwrap());
    let apart = Batch::new(query.shape(), rest[0].shape()).unwrap().with_value_dim(value_dim).unwrap();
    let mut apart = apart.with_prefix(2, prefix_end).unwrap();
    parts.into_iter().for_each(|sequence| apart.push(sequence).unwrap());
    for instructions in InstructionSet::available() {
        let mut call = Call::new(&query, &kv[0], &kv[1]);
        call.scales = scales;
        let (expected, expected_lse) = case.bits(&batch, call, instructions);
        let mut call = Call::new(&query, &rest[0], &rest[1]).with_prefix(&prefixes[0], &prefixes[1]);
        call.scales = scales;
        let (out, lse) = case.bits(&apart, call, instructions);
        prop_assert!(out.bits() == expected.bits(), "{instructions:?}: other bits with prefixes");
        prop_assert!(lse == expected_lse, "{instructions:?}: other bits of lse with prefixes");
        for sequence in batch.sequences() {
            let Keys::Rows { rows, .. } = &sequence.keys else { unreachable!("as made above") };
            let [key, value] = [&kv[0], &kv[1]].map(|kv| kv.gather(rows.clone()));
            let own = query.gather(sequence.rows.clone());
            let config = AttentionConfig::new(sequence.mask.clone());
            let mut call = Call::new(&own, &key, &value);
            call.scales = scales;
            let oracle = Expected::of_call(&config, call, false);
            oracle.check_out(out.gather(sequence.rows.clone()).values())?;
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn where_the_first_keys_lie_changes_no_bit(case in cases(), dtype in 0..4) {
        match dtype {
            0 => prefixes_change_no_bit::<f32, f32>(&case)?,
            1 => prefixes_change_no_bit::<f16, f16>(&case)?,
            2 => prefixes_change_no_bit::<f32, F8E4M3>(&case)?,
            _ => prefixes_change_no_bit::<bf16, bf16>(&case)?,
        }
    }
}

/// Prefixes that are named must come with the call, in the shape of the batch.
#[test]
fn prefixes_that_do_not_fit() {
    let run = |prefix_rows: usize, prefix: Option<[[usize; 4]; 2]>| {
        let mut batch = Batch::new([1, 1, 2, 8], [1, 4, 1, 8]).unwrap().with_prefix(2, 6).unwrap();
        batch = batch.with_value_dim(5).unwrap();
        let sequence = Sequence::new(0, 0..1, Keys::rows(0, 0..4), Mask::Full);
        batch.push(sequence.with_prefix(1, 1..1 + prefix_rows)).unwrap();
        let plan = Plan::for_batch(&PlanConfig::new(), batch).unwrap();
        let data = [0.5f32; 256];
        let view = |shape: [usize; 4]| {
            TensorView::contiguous("data", &data[..shape.iter().product()], shape).unwrap()
        };
        let inputs = Inputs::new(view([1, 1, 2, 8]), view([1, 4, 1, 8]), view([1, 4, 1, 5]));
        let inputs = match prefix {
            Some([key, value]) => inputs.with_prefix(view(key), view(value)),
            None => inputs,
        };
        let mut out = Tensor::<f32>::contiguous("out", [1, 1, 2, 5], |_| 7.0);
        let mut workspace = Vec::with_capacity(plan.workspace_bytes());
        let result = plan.run(inputs, out.view_mut(), None, &mut workspace);
        let written = out.values().any(|x| x != 7.0);
        assert_eq!(written, result.is_ok());
        result
    };
    let [key, value] = [[2, 6, 1, 8], [2, 6, 1, 5]];
    run(5, Some([key, value])).unwrap();
    // A prefix without rows needs no tensor.
    run(0, None).unwrap();
    assert_eq!(named(run(1, None).unwrap_err()), ("value", "prefix"));
    for wrong in [[1, 6, 1, 8], [2, 5, 1, 8], [2, 6, 2, 8], [2, 6, 1, 4], value] {
        assert_eq!(named(run(1, Some([wrong, value])).unwrap_err()), ("shape", "prefix"));
    }
    for wrong in [[1, 6, 1, 5], [2, 5, 1, 5], [2, 6, 2, 5], [2, 6, 1, 4], key] {
        assert_eq!(named(run(1, Some([key, wrong])).unwrap_err()), ("shape", "prefix"));
    }
}
