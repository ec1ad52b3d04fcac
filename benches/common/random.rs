//! Inputs of benches.

use star_attention::Element;

/// Numbers between -1 and 1.
pub fn random<T: Element>(len: usize, seed: u64) -> Vec<T> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| T::from_f32(next())).collect()
}
