//! Softcaps of any size.

use super::Attend;
use super::cases::Inputs;
use crate::common::Tensor;
use star_attention::{AttentionConfig, Element, Mask};

/// Scores 0 and 1 under caps that are far larger: `cap · tanh(score / cap)` is the score itself, so
/// that the second key's weight is e / (1 + e) = 0.7311 (vllm#56578).
pub fn large_caps_change_nothing<T: Element>(by: &impl Attend<T>, head_dim: usize, rows: usize) {
    for cap in [1e3, 1e6, 1e8, 1e20, 1e30, 1e37, f32::MAX] {
        two_keys(by, head_dim, rows, 1.0, cap, 0.731_058_6, 1.313_261_7);
    }
}

/// The same under caps so small that both scores are 0, also where `scale / cap` is beyond f32. A
/// cap that is not that small holds, however large the scale.
pub fn small_caps_hold<T: Element>(by: &impl Attend<T>, head_dim: usize, rows: usize) {
    let ln_2 = std::f32::consts::LN_2;
    for (scale, cap) in [
        (0.0, f32::MIN_POSITIVE),
        (1.0, 1e-30),
        (1.0, f32::MIN_POSITIVE),
        (1.0, 4e-39),
        (4.0, f32::MIN_POSITIVE),
        (1e30, 1e-8),
        (1e30, 1e-30),
        (f32::MAX, f32::from_bits(1)),
    ] {
        two_keys(by, head_dim, rows, scale, cap, 0.5, ln_2);
    }
    for scale in [1e10, 1e30, f32::MAX] {
        // 1 / (1 + e^-2), and 2 + ln of the inverse.
        two_keys(by, head_dim, rows, scale, 2.0, 0.880_797, 2.126_928);
    }
}

/// The log-sum-exp of a single key is its capped score: right to a few units of f32's roundoff at
/// every score, on either side of where the approximation of tanh changes.
pub fn one_key_has_its_capped_score<T: Element>(by: &impl Attend<T>, head_dim: usize) {
    // All bf16 numbers from 2^-8 to 8, which f16 has too.
    let scores: Vec<f32> = (0x3b80u32..0x4100).map(|bits| f32::from_bits(bits << 16)).collect();
    let rows = scores.len();
    let query =
        Tensor::<T>::contiguous(
            "query",
            [1, rows, 1, head_dim],
            |[_, s, _, d]| {
                if d == 0 { scores[s] } else { 0.0 }
            },
        );
    let unit = |name| Tensor::contiguous(name, [1, 1, 1, head_dim], |[.., d]| f32::from(d == 0));
    let inputs = Inputs { query, key: unit("key"), value: unit("value") };
    let config = AttentionConfig { softcap: Some(1.0), scale: Some(1.0), ..AttentionConfig::new(Mask::Full) };
    let mut out = Tensor::<f32>::contiguous("out", inputs.query.shape(), |_| f32::NAN);
    let mut lse = vec![f32::NAN; rows];
    by.attend(&config, None, &inputs, &mut out, Some(&mut lse));
    for (score, lse) in scores.into_iter().map(f64::from).zip(lse) {
        let (exact, got) = (score.tanh(), f64::from(lse));
        // tanh to 4 units in the last place, and the roundings on the way to the logarithm.
        let tolerance = 12.0 / f64::from(1 << 24) * exact;
        assert!((got - exact).abs() <= tolerance, "score {score:e}: {got:e} for {exact:e}");
    }
}

/// Scores 0 and `scale` over the values 0 and 1 under a cap.
fn two_keys<T: Element>(
    by: &impl Attend<T>,
    head_dim: usize,
    rows: usize,
    scale: f32,
    cap: f32,
    weight: f32,
    expected_lse: f32,
) {
    let unit = |name, rows| {
        Tensor::<T>::contiguous(name, [1, rows, 1, head_dim], |[_, s, _, d]| f32::from(d == 0 && s % 2 == 1))
    };
    let mut query = unit("query", rows);
    (0..rows).for_each(|row| query.set([0, row, 0, 0], T::from_f32(1.0)));
    let inputs = Inputs { query, key: unit("key", 2), value: unit("value", 2) };
    let config =
        AttentionConfig { softcap: Some(cap), scale: Some(scale), ..AttentionConfig::new(Mask::Full) };
    let mut out = Tensor::<f32>::contiguous("out", [1, rows, 1, head_dim], |_| f32::NAN);
    let mut lse = vec![f32::NAN; rows];
    by.attend(&config, None, &inputs, &mut out, Some(&mut lse));
    // Probabilities are rounded to the type of the values.
    let tolerance = if size_of::<T>() == 2 { 2e-3 } else { 1e-6 };
    for (row, lse) in lse.into_iter().enumerate() {
        let got = out.get([0, row, 0, 0]);
        assert!((got - weight).abs() < tolerance, "scale {scale:e}, cap {cap:e}: {got} for {weight}");
        assert!(
            (lse - expected_lse).abs() < 1e-6,
            "scale {scale:e}, cap {cap:e}: lse {lse} for {expected_lse}"
        );
    }
}
