//! Keys and values in fp8 on the kernels.

use crate::call::on_each_device;
use crate::common::Layout;
use crate::engine::Engine;
use crate::properties::backend::On;
use crate::properties::batches::batches;
use crate::properties::nonfinite::PLACES;
use crate::properties::quantised::{
    a_store_keeps_its_codes, appended_codes_are_those_of_the_quotients, attention_equals_the_oracle,
    every_code_counts_for_what_it_says, nan_reaches_the_rows_that_see_it, plans, what_does_not_fit_is_named,
};
use proptest::prelude::*;
use star_attention::cuda::HEAD_DIMS;
use star_attention::{Backend, bf16, f16};
use star_attention::{Batch, Error, F8E4M3, Inputs, Keys, Mask, PlanConfig, Sequence};

/// Dims of kernels, and padded ones: multiples of 16.
fn dims() -> impl Strategy<Value = (usize, usize)> {
    let equal = prop::sample::select(HEAD_DIMS.to_vec()).prop_map(|dim| (dim, dim));
    prop_oneof![5 => equal, 2 => prop::sample::select(vec![(192, 128), (80, 80), (16, 48), (112, 32)])]
}

/// fp8 rows begin at multiples of 16 elements.
fn aligned(layout: &Layout) -> Layout {
    Layout {
        order: layout.order,
        padding: layout.padding.map(|p| p / 4 * 16),
        offset: layout.offset / 4 * 16,
    }
}

/// Head dims that no fp8 kernel takes are refused.
fn refused_dims<B: Backend>(backend: &B, head_dim: usize, value_dim: usize) -> Error {
    let (query, key) = ([1, 1, 2, head_dim], [1, 3, 1, head_dim]);
    let mut batch = Batch::new(query, key).unwrap().with_value_dim(value_dim).unwrap();
    batch.push(Sequence::new(0, 0..1, Keys::rows(0, 0..3), Mask::Full)).unwrap();
    let mut plan = backend.plan_for(&PlanConfig::new(), &batch).unwrap();
    let queries = backend.buffer::<bf16>(2 * head_dim).unwrap();
    let keys = backend.buffer::<F8E4M3>(3 * head_dim.max(value_dim)).unwrap();
    let mut out = backend.buffer::<bf16>(2 * value_dim).unwrap();
    let mut workspace = backend.buffer::<u8>(backend.workspace_bytes(&plan)).unwrap();
    let inputs = Inputs::new(
        backend.whole("query", &queries, query).unwrap(),
        backend.whole("key", &keys, key).unwrap(),
        backend.whole("value", &keys, batch.value_shape()).unwrap(),
    );
    let to = backend.whole_mut("out", &mut out, batch.out_shape()).unwrap();
    backend.attend(&mut plan, inputs, to, None, backend.slice_mut(&mut workspace, ..)).unwrap_err()
}

on_each_device! {
    fn attention_over_codes_equals_the_oracle(
        case in batches(dims()),
        config in plans(),
        dtypes in 0..4usize,
    ) {
        let mut case = case;
        case.layouts = case.layouts.map(|layout| aligned(&layout));
        let by = On(B::cuda(case.seed));
        match dtypes {
            0 => attention_equals_the_oracle::<_, f16, f16>(&by, &case, &config)?,
            1 => attention_equals_the_oracle::<_, f16, f32>(&by, &case, &config)?,
            2 => attention_equals_the_oracle::<_, bf16, bf16>(&by, &case, &config)?,
            _ => attention_equals_the_oracle::<_, bf16, f32>(&by, &case, &config)?,
        }
    }

    /// By the kernel for few rows, and that for many.
    fn each_of_the_256_codes_counts_for_what_it_says() {
        for rows in [1, 17] {
            every_code_counts_for_what_it_says::<_, bf16, f32>(&On(B::cuda(1)), [64, 64], rows);
            every_code_counts_for_what_it_says::<_, f16, f16>(&On(B::cuda(2)), [48, 32], rows);
        }
        every_code_counts_for_what_it_says::<_, f16, f32>(&On(B::cuda(3)), [192, 128], 2);
    }

    fn nan_reaches_the_rows_that_see_it_alone() {
        for place in PLACES {
            nan_reaches_the_rows_that_see_it::<_, bf16, bf16>(&On(B::cuda(4)), [64, 64], place, false);
            nan_reaches_the_rows_that_see_it::<_, f16, f32>(&On(B::cuda(5)), [80, 48], place, false);
        }
    }

    fn caches_of_codes() {
        appended_codes_are_those_of_the_quotients::<_, f16>(&B::cuda(6), false);
        appended_codes_are_those_of_the_quotients::<_, bf16>(&B::cuda(7), false);
        a_store_keeps_its_codes(&B::cuda(8));
    }

    fn scales_that_do_not_fit_are_named_and_nothing_is_written() {
        what_does_not_fit_is_named::<_, bf16>(&On(B::cuda(9)), false);
    }

    fn heads_without_kernels_for_codes_are_named() {
        for (dims, argument) in [((24, 32), "head_dim"), ((32, 24), "value_dim"), ((512, 64), "head_dim"), ((64, 512), "value_dim")] {
            let error = refused_dims(&B::cuda(10), dims.0, dims.1);
            assert!(matches!(error, Error::Value { argument: got, .. } if got == argument), "{dims:?}: {error}");
        }
    }
}
