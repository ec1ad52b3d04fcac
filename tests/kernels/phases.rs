//! Packed sequences, the two phases and their merge by kernels, against their definitions.

use crate::call::{built_dims, kernel_dims, on_each_device};
use crate::common::aligned;
use crate::engine::Engine;
use crate::properties::backend::On;
use crate::properties::packed::{each_sequence_stands_alone, packed};
use crate::properties::query::{both_phases, merged_shards_equal_dense, splits};
use crate::properties::star::{contexts, star_equals_re_encoding};
use proptest::prelude::*;
use star_attention::{bf16, f16};

on_each_device! {
    fn the_star_mask_equals_re_encoding_each_block(context in contexts(built_dims()), bf in any::<bool>()) {
        let by = On(B::cuda(0));
        if bf {
            star_equals_re_encoding::<bf16>(&by, &context)?;
        } else {
            star_equals_re_encoding::<f16>(&by, &context)?;
        }
    }

    fn merged_shards_equal_the_dense_softmax(split in splits(kernel_dims()), bf in any::<bool>()) {
        let by = On(B::cuda(1));
        let mut split = split;
        split.layout = aligned(&split.layout);
        if bf {
            merged_shards_equal_dense::<bf16>(&by, &split)?;
        } else {
            merged_shards_equal_dense::<f16>(&by, &split)?;
        }
    }

    fn both_phases_equal_their_definition(
        context in contexts(built_dims()),
        query_len in 1..=40usize,
        bf in any::<bool>(),
    ) {
        let by = On(B::cuda(2));
        if bf {
            both_phases::<bf16>(&by, &context, query_len)?;
        } else {
            both_phases::<f16>(&by, &context, query_len)?;
        }
    }

    fn packed_sequences_stand_alone(packed in packed(kernel_dims()), bf in any::<bool>()) {
        let by = On(B::cuda(3));
        let mut packed = packed;
        packed.layouts = packed.layouts.map(|layout| aligned(&layout));
        if bf {
            each_sequence_stands_alone::<bf16, bf16>(&by, &packed)?;
        } else {
            each_sequence_stands_alone::<f16, f32>(&by, &packed)?;
        }
    }
}
