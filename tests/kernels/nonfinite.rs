//! NaN and infinities in the data. In queries and keys they stay in the rows that see them; in values, in the tiles of rows that do.

use crate::backend::Backend;
use crate::call::{kernel_cases, on_each_device, run_plan};
use crate::properties::cases::{Case, Inputs, Spot, Values, spots};
use proptest::prelude::*;
use star_attention::cpu::reference::sees;
use star_attention::cuda::HalfElement;
use star_attention::{Mask, bf16, f16};

/// Where the definition is not finite, neither is the result, in the same way; elsewhere it is right. A value that is not finite may spread to
/// rows of its head that do not see it: those are compared by their log-sum-exp.
fn spot_stays<B: Backend, T: HalfElement>(case: &Case, spot: Spot) -> Result<(), TestCaseError> {
    let shape = case.shape;
    let extents = if spot.tensor == 0 { shape.query_shape() } else { shape.key_shape() };
    if extents.contains(&0) {
        return Ok(());
    }
    let mut inputs = case.inputs::<T>();
    let index: [usize; 4] = std::array::from_fn(|axis| spot.index[axis].index(extents[axis]));
    let Inputs { query, key, value } = &mut inputs;
    [query, key, value][spot.tensor].set(index, T::from_f32(spot.value));

    let backend = B::open(case.seed);
    let mut out = case.output::<f32>();
    let mut lse = vec![f32::NAN; shape.lse_len()];
    run_plan(&backend, &case.device_plan(&backend), &inputs, &mut out, Some(&mut lse)).unwrap();
    let mut expected = case.expected(&inputs);
    expected.check_lse(&lse)?;
    let [batch, key, kv_head, d] = index;
    if spot.tensor == 2 && case.config.mask != Mask::Full {
        for row in 0..shape.query_len {
            if sees(case.config.mask, shape.query_len, shape.key_len, row, key) {
                continue;
            }
            for head in kv_head * shape.group()..(kv_head + 1) * shape.group() {
                let at = ((batch * shape.query_len + row) * shape.query_heads + head) * shape.head_dim + d;
                if out.get([batch, row, head, d]).is_nan() {
                    expected.out[at] = f64::NAN;
                }
            }
        }
    }
    expected.check_out(out.values())
}

fn normal_cases() -> impl Strategy<Value = Case> {
    kernel_cases().prop_map(|mut case| {
        case.values = Values::Normal;
        // The kernels take the smallest positive number for a scale of 0: it times infinity is no NaN.
        case.config.scale = case.config.scale.filter(|&scale| scale > 0.0);
        case
    })
}

on_each_device! {
    fn what_is_not_finite_stays_where_it_is_seen(case in normal_cases(), spot in spots(), bf in any::<bool>()) {
        if bf {
            spot_stays::<B, bf16>(&case, spot)?;
        } else {
            spot_stays::<B, f16>(&case, spot)?;
        }
    }
}
