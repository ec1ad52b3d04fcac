use crate::cpu::flash::Plan;
use crate::simd::{FAULT, Fault, InstructionSet};
use crate::{AttentionConfig, AttentionShape, Element, Inputs, Mask, TensorView, TensorViewMut};
use half::{bf16, f16};

/// Numbers of [-1, 1] in no order.
fn random<T: Element>(len: usize, seed: u32) -> Vec<T> {
    let at = |index: usize| (index as u32).wrapping_add(seed).wrapping_mul(2_654_435_761) >> 8;
    (0..len).map(|index| T::from_f32(at(index) as f32 / (1 << 23) as f32 - 1.0)).collect()
}

/// Causal attention of 70 rows over 300 keys on one thread.
fn attention<T: Element>(instructions: InstructionSet) -> Vec<f32> {
    let shape = AttentionShape {
        batch: 1,
        query_len: 70,
        key_len: 300,
        query_heads: 2,
        kv_heads: 1,
        head_dim: 48,
        value_dim: 40,
    };
    let config = AttentionConfig { mask: Mask::Causal, ..AttentionConfig::default() };
    let plan =
        Plan::new(&config, &shape).unwrap().with_instructions(instructions).unwrap().with_threads(1).unwrap();
    let batch = plan.batch();
    let elements = |shape: [usize; 4]| shape.iter().product::<usize>();
    let query = random::<T>(elements(batch.query_shape()), 1);
    let key = random::<T>(elements(batch.key_shape()), 77_777);
    let value = random::<T>(elements(batch.value_shape()), 999_999);
    let mut out = vec![f32::NAN; elements(batch.out_shape())];
    plan.run(
        Inputs::new(
            TensorView::contiguous("query", &query, batch.query_shape()).unwrap(),
            TensorView::contiguous("key", &key, batch.key_shape()).unwrap(),
            TensorView::contiguous("value", &value, batch.value_shape()).unwrap(),
        ),
        TensorViewMut::contiguous("out", &mut out, batch.out_shape()).unwrap(),
        None,
        &mut Vec::with_capacity(plan.workspace_bytes()),
    )
    .unwrap();
    out
}

fn a_broken_unit_shows<T: Element>(tolerance: f32) {
    let expected = attention::<T>(InstructionSet::Portable);
    let off = || {
        let got = attention::<T>(InstructionSet::AmxModel);
        let off = |(a, b): (&f32, &f32)| if b.is_nan() { f32::INFINITY } else { (a - b).abs() };
        expected.iter().zip(&got).map(off).fold(0.0, f32::max)
    };
    assert!(off() <= tolerance, "{:?}: {:e}", T::DTYPE, off());
    use Fault::*;
    for fault in [ShortLoad, ShortStore, SwappedPairs, StaleSums, StaleFactor, LostStore, SwappedRounding] {
        FAULT.set(Some(fault));
        let off = off();
        FAULT.set(None);
        assert!(off > 4.0 * tolerance, "{:?}, {fault:?}: off by {off:e} alone", T::DTYPE);
    }
}

#[test]
fn a_broken_unit_shows_in_every_type() {
    a_broken_unit_shows::<f32>(2e-6);
    a_broken_unit_shows::<f16>(2e-5);
    a_broken_unit_shows::<bf16>(4e-3);
}
