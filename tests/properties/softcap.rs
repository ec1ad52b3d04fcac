//! Softcaps of any size.

use super::Attend;
use super::cases::Inputs;
use crate::common::Tensor;
use star_attention::{AttentionConfig, Element, Mask};

/// Scores 0 and 1 under caps that are far larger: `cap · tanh(score / cap)` is the score itself, so that the second
/// key's weight is e / (1 + e) = 0.7311 (vllm#56578).
pub fn large_caps_change_nothing<T: Element>(by: &impl Attend<T>, head_dim: usize, rows: usize) {
    let unit = |name, rows| {
        Tensor::<T>::contiguous(name, [1, rows, 1, head_dim], |[_, s, _, d]| f32::from(d == 0 && s % 2 == 1))
    };
    let mut query = unit("query", rows);
    (0..rows).for_each(|row| query.set([0, row, 0, 0], T::from_f32(1.0)));
    let inputs = Inputs { query, key: unit("key", 2), value: unit("value", 2) };
    for cap in [1e3, 1e6, 1e8, 1e20, 1e30, 1e37, f32::MAX] {
        let config =
            AttentionConfig { softcap: Some(cap), scale: Some(1.0), ..AttentionConfig::new(Mask::Full) };
        let mut out = Tensor::<f32>::contiguous("out", [1, rows, 1, head_dim], |_| f32::NAN);
        let mut lse = vec![f32::NAN; rows];
        by.attend(&config, None, &inputs, &mut out, Some(&mut lse));
        // Probabilities are rounded to the type of the values.
        let (weight, tolerance) = (0.731_058_6, if size_of::<T>() == 2 { 2e-3 } else { 1e-6 });
        for (row, lse) in lse.into_iter().enumerate() {
            let got = out.get([0, row, 0, 0]);
            assert!((got - weight).abs() < tolerance, "cap {cap:e}: {got} for {weight}");
            assert!((lse - 1.313_261_7).abs() < 1e-6, "cap {cap:e}: lse {lse}");
        }
    }
}
