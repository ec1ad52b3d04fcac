//! The kernels for Hopper GPUs, on the emulator: what holds for the other family holds for them.
//!
//! A few cases of each property; `PROPTEST_CASES` asks for more. Plans that keep a row's bits take
//! these kernels for any number of rows, so that properties of few rows reach them as well.

use crate::backend::Hopper;
use crate::common::aligned;
use crate::engine::Engine;
use crate::invariance::{chunked_of, chunks_change_no_bit, keeps_its_bits};
use crate::oracle::equals_the_oracle;
use crate::paged::{page_table, pages_change_nothing};
use crate::prefix::prefixes_change_nothing;
use crate::properties::backend::{On, RowInvariant};
use crate::properties::batches::{batches, each_sequence_of_a_batch_stands_alone};
use crate::properties::cases::{Case, cases_of};
use crate::properties::engine::{an_engine_serves_requests, histories};
use crate::properties::masks::{a_window_of_two_keys, edges_off_by_one_are_found};
use crate::properties::models::normal_values_equal_the_oracle;
use crate::properties::nonfinite::{
    PLACES, spots_stay_in_their_rows, spotted, values_reach_the_rows_that_see_them,
};
use crate::properties::packed::packed;
use crate::properties::sinks::rows_without_keys_have_their_sink_and_nan_stays;
use crate::properties::softcap::{large_caps_change_nothing, one_key_has_its_capped_score, small_caps_hold};
use proptest::prelude::*;
use star_attention::cuda::Cuda;
use star_attention::cuda::simt::{self, Simt};
use star_attention::{F8E4M3, Mask, PlanConfig, bf16, f16};

fn a_few(cases: u32) -> ProptestConfig {
    let all = std::env::var_os("PROPTEST_CASES").is_some();
    let config = ProptestConfig::default();
    if all { config } else { ProptestConfig { cases, ..config } }
}

/// Head dims and value dims that Hopper has kernels for, and some that are padded.
fn dims() -> impl Strategy<Value = (usize, usize)> {
    let padded = vec![(40, 64), (104, 128), (112, 112), (160, 128)];
    prop_oneof![
        3 => Just((128, 128)),
        3 => prop::sample::select(vec![(64, 64), (192, 128)]),
        2 => prop::sample::select(padded),
    ]
}

fn cases() -> impl Strategy<Value = Case> {
    cases_of(dims()).prop_map(|mut case| {
        case.layouts = case.layouts.map(|layout| aligned(&layout));
        case
    })
}

/// Plans that take Hopper's kernels for any number of rows.
fn by(seed: u64) -> RowInvariant<Cuda<Simt>> {
    RowInvariant(On(Hopper::cuda(seed)))
}

proptest! {
    #![proptest_config(a_few(16))]

    #[test]
    fn kernels_equal_the_oracle(case in cases(), dtypes in 0..4usize) {
        match dtypes {
            0 => equals_the_oracle::<Hopper, f16, f16>(&case)?,
            1 => equals_the_oracle::<Hopper, f16, f32>(&case)?,
            2 => equals_the_oracle::<Hopper, bf16, bf16>(&case)?,
            _ => equals_the_oracle::<Hopper, bf16, f32>(&case)?,
        }
    }

    #[test]
    fn sequences_of_a_batch_stand_alone(case in batches(dims())) {
        let mut case = case;
        case.layouts = case.layouts.map(|layout| aligned(&layout));
        let on = On(Hopper::cuda(case.seed));
        each_sequence_of_a_batch_stands_alone::<bf16, bf16, f32>(&case, |batch, score, inputs, out, lse| {
            let sinks = case.sinks();
            let config = PlanConfig::from(*score).with_row_invariant();
            on.run_call(&config, batch, inputs.call(sinks.as_deref(), &None), out, lse).unwrap();
        })?;
    }

    #[test]
    fn what_is_not_finite_stays_in_its_rows(spotted in spotted(cases()), bf in any::<bool>()) {
        let (mut case, spots) = spotted;
        case.config.scale = case.config.scale.filter(|&scale| scale > 0.0);
        match bf {
            true => spots_stay_in_their_rows::<bf16, bf16>(&by(case.seed), &case, &spots, false)?,
            false => spots_stay_in_their_rows::<f16, f32>(&by(case.seed), &case, &spots, false)?,
        }
    }

    #[test]
    fn under_a_fixed_split_length_a_row_keeps_its_bits(case in batches(dims()), split_keys in 1..400usize) {
        let mut case = case;
        case.layouts = case.layouts.map(|layout| aligned(&layout));
        keeps_its_bits::<Hopper, bf16>(&case, split_keys)?;
    }

    #[test]
    fn chunks_and_decodes_have_the_bits_of_the_prefill(case in chunked_of(dims()), bf in any::<bool>()) {
        match bf {
            true => chunks_change_no_bit::<Hopper, bf16, f32>(&case)?,
            false => chunks_change_no_bit::<Hopper, f16, f16>(&case)?,
        }
    }

    #[test]
    fn pages_change_no_bit(
        packed in packed(dims()),
        page_len in 1..=128usize,
        seed in any::<u64>(),
        poisoned in any::<prop::sample::Index>(),
    ) {
        let mut packed = packed;
        packed.layouts = packed.layouts.map(|layout| aligned(&layout));
        let table = page_table(&packed.lens, page_len, seed);
        pages_change_nothing::<Hopper, bf16>(&packed, &table, poisoned)?;
    }

    #[test]
    fn prefixes_change_no_bit(
        case in batches(dims()),
        cuts in prop::collection::vec(prop_oneof![Just(0usize), 0..60usize, 0..900usize], 6),
        page_len in prop::option::of(1..40usize),
    ) {
        let mut case = case;
        case.layouts = case.layouts.map(|layout| aligned(&layout));
        let batch = case.batch();
        let (rows, inputs) = case.in_rows(&batch, &case.inputs::<bf16, bf16>(&batch));
        prefixes_change_nothing::<Hopper, bf16>(&rows, &inputs, &cuts, page_len);
    }
}

proptest! {
    #![proptest_config(a_few(4))]

    #[test]
    fn an_engine_serves_requests_on_hopper(history in histories(6, dims())) {
        an_engine_serves_requests::<_, bf16, bf16>(&Hopper::cuda(history.seed), &history)?;
    }
}

#[test]
fn values_reach_the_rows_that_see_them_alone() {
    for place in PLACES {
        values_reach_the_rows_that_see_them::<bf16, bf16>(&by(1), 128, place);
    }
}

#[test]
fn windows_block_lists_softcaps_and_sinks() {
    a_window_of_two_keys::<f16>(&by(2), 128);
    edges_off_by_one_are_found::<bf16>(&by(3), 128);
    one_key_has_its_capped_score::<bf16>(&by(4), 128);
    large_caps_change_nothing::<f16>(&by(5), 128, 130);
    small_caps_hold::<bf16>(&by(6), 128, 1);
    rows_without_keys_have_their_sink_and_nan_stays::<_, bf16, bf16>(&On(Hopper::cuda(7)));
}

/// Every kernel of the family by name, on both types, under each mask.
#[test]
fn every_kernel_gives_what_the_definition_says() {
    let star = Mask::Star { anchor_len: 33, block_len: 150, first_block_len: 33, left: None };
    for (dim, value_dim) in [(64, 64), (128, 128), (192, 128)] {
        for mask in [&Mask::Full, &Mask::Causal, &star] {
            let lens = [150, 330];
            let on = On(Hopper::cuda(dim as u64));
            normal_values_equal_the_oracle::<_, bf16, bf16>(&on, mask, lens, [2, 1], [dim, value_dim]);
            normal_values_equal_the_oracle::<_, f16, f16>(&on, mask, lens, [2, 1], [dim, value_dim]);
            // The same plan with fp8 keys takes the other family's kernels.
            normal_values_equal_the_oracle::<_, bf16, F8E4M3>(&on, mask, lens, [2, 1], [dim, value_dim]);
        }
    }
    let mut kernels = simt::launches().filter(|(name, _)| name.contains("hopper"));
    assert!(kernels.all(|(_, launches)| launches > 0));
}
