//! What a call must give, and how far from it rounding may lead.
//!
//! The values are the oracle's, in f64. With weights `w_j = exp(s_j - lse)` an error `δ_j` of the
//! score `s_j` moves the output by `Σ w_j δ_j (v_j - out)` and the log-sum-exp by `Σ w_j δ_j`. In
//! f32, with `u = 2⁻²⁴` the unit roundoff:
//!
//! - the dot product of `d` terms: `growth(d) u |q||k|` times the scale;
//! - scaling, the shift by the maximum `m` and the argument of exp: a few `u (|s_j| + |m|)`; exp
//!   itself a few `u`;
//! - the softcap: 16 `u |s_j|`, as tanh is right to a few units of its own magnitude, whatever the
//!   cap;
//! - a sink, which meets the log-sum-exp `l` of the keys: a few `u (|sink| + |l|)`, and the rounding
//!   of the sum in `l`;
//! - the sums over `n` keys, rescaled now and then: `growth(n) u Σ w_j |v_j|`, and rounding the
//!   output;
//! - scales of keys and values: `u |s_j|` for the product with the factor of the scores, and `u
//!   |out|` for that with the output.
//!
//! `growth(n)` is n where the terms repeat and their errors add up (the worst case), and `3 √n`
//! where they are random: a walk of n steps. (Higham and Mary, A new approach to probabilistic
//! rounding error analysis, 2019.)
//!
//! For f16 and bf16 the rule is FlashAttention's: `max|out - ref| <= 2 max|lowp - ref| + atol`,
//! where `lowp` is the same maths done naively with the probabilities and the output rounded to the
//! type, which is that of the queries. Scores and log-sum-exp get no such allowance: they are
//! accumulated in f32 whatever the type. `atol` is for tensors of so few elements that `lowp` may
//! be exact by luck: four standard deviations of the rounding of probabilities and output.

use crate::common::{Call, Tensor, scale_of, views};
use proptest::prelude::*;
use star_attention::cpu::reference::{self, sees};
use star_attention::{AttentionConfig, DType, Element};

/// The unit roundoff of f32.
const U: f64 = 1.0 / (1 << 24) as f64;

/// The unit roundoff of a type.
fn roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1.0 / (1 << 11) as f64,
        DType::BF16 => 1.0 / (1 << 8) as f64,
        _ => U,
    }
}

/// The oracle's answer to one call, and the tolerances.
#[derive(Clone, Debug)]
pub struct Expected {
    dtype: DType,
    pub shape: [usize; 4],
    /// Row-major.
    pub out: Vec<f64>,
    /// `[batch, heads, seq]`.
    pub lse: Vec<f64>,
    /// For each of `out`: what f32 may lose.
    out_tolerance: Vec<f64>,
    lse_tolerance: Vec<f64>,
    /// `2 max|lowp - ref| + atol` for the whole tensor; 0 for f32.
    low_tolerance: f64,
}

/// A `[batch, heads, seq]` tensor of contiguous rows, in f64.
struct Rows {
    data: Vec<f64>,
    shape: [usize; 4],
}

impl Rows {
    fn new<T: Element>(tensor: &Tensor<T>) -> Self {
        let shape @ [batch, seq, heads, dim] = tensor.shape();
        let mut data = Vec::with_capacity(batch * seq * heads * dim);
        for b in 0..batch {
            for head in 0..heads {
                for row in 0..seq {
                    data.extend((0..dim).map(|d| f64::from(tensor.get([b, row, head, d]).to_f32())));
                }
            }
        }
        Self { data, shape }
    }

    fn row(&self, batch: usize, head: usize, seq: usize) -> &[f64] {
        let [_, seqs, heads, dim] = self.shape;
        &self.data[((batch * heads + head) * seqs + seq) * dim..][..dim]
    }
}

/// In lanes, for speed.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    let mut lanes = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for i in 0..8 {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

impl Expected {
    /// `correlated`: whether many terms of the sums are the same.
    pub fn of<T: Element>(
        config: &AttentionConfig,
        query: &Tensor<T>,
        key: &Tensor<T>,
        value: &Tensor<T>,
        correlated: bool,
    ) -> Self {
        Self::of_call(config, Call::new(query, key, value), correlated)
    }

    /// The same with a sink for each head (a key more, whose value is 0) and with scales, if given.
    pub fn of_call<Q: Element, K: Element>(
        config: &AttentionConfig,
        call: Call<'_, Q, K>,
        correlated: bool,
    ) -> Self {
        let oracle = reference::attention_of(config, views(call)).unwrap();
        let Call { query, key, value, sinks, scales, .. } = call;
        let [batch, query_len, heads, dim] = query.shape();
        let [_, key_len, kv_heads, _] = key.shape();
        let [.., value_dim] = value.shape();
        let (q, k, v) = (Rows::new(query), Rows::new(key), Rows::new(value));
        let scale = f64::from(config.scale_for(dim));
        let scales_of = |kv_head| {
            let of_head = |of| f64::from(scale_of(of, kv_head));
            scales.map_or([1.0; 2], |scales| [scales.key, scales.value].map(of_head))
        };
        // Roundings that scales add.
        let scaled = if scales.is_some() { 1.0 } else { 0.0 };
        let cap = config.softcap.map(f64::from);
        let growth = |n: usize| if correlated { n as f64 } else { 3.0 * (n as f64).sqrt() };
        let norm = |row: &[f64]| dot(row, row).sqrt();
        let key_norms: Vec<f64> = k.data.chunks(dim).map(norm).collect();
        let largest_value = (0..kv_heads).map(|head| scales_of(head)[1]).fold(0.0, f64::max)
            * v.data.iter().map(|v| v.abs()).filter(|v| v.is_finite()).fold(0.0, f64::max);
        let low_u = roundoff(Q::DTYPE);
        let round = |x: f64| f64::from(Q::from_f32(x as f32).to_f32());

        let mut out_tolerance = vec![0.0; oracle.out.len()];
        let mut lse_tolerance = vec![0.0; oracle.lse.len()];
        let (mut lowp_error, mut atol) = (0f64, 0f64);
        for row in 0..query_len {
            let visible: Vec<usize> =
                (0..key_len).filter(|&j| sees(&config.mask, query_len, key_len, row, j)).collect();
            let n = visible.len();
            for (b, head) in (0..batch).flat_map(|b| (0..heads).map(move |head| (b, head))) {
                let kv_head = head / (heads / kv_heads);
                let [key_scale, value_scale] = scales_of(kv_head);
                let factor = scale * key_scale;
                let q_row = q.row(b, head, row);
                let q_norm = norm(q_row);
                let at = ((b * query_len + row) * heads + head) * value_dim;
                let out = &oracle.out[at..at + value_dim];
                let lse_at = (b * heads + head) * query_len + row;
                let lse = oracle.lse[lse_at];
                if !lse.is_finite() {
                    continue;
                }
                let scores: Vec<f64> = visible
                    .iter()
                    .map(|&j| {
                        let score = factor * dot(q_row, k.row(b, kv_head, j));
                        cap.map_or(score, |cap| cap * (score / cap).tanh())
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                // Per output element: error through the scores, Σ w|v|, Σ (w v)², and the naive
                // low-precision sum.
                let mut through = vec![0.0; value_dim];
                let mut magnitude = vec![0.0; value_dim];
                let mut squares = vec![0.0; value_dim];
                let mut lowp = vec![0.0; value_dim];
                let (mut score_error, mut largest_error) = (0.0, 0f64);
                for (&j, &score) in visible.iter().zip(&scores) {
                    let product = factor * q_norm * key_norms[(b * kv_heads + kv_head) * key_len + j];
                    let weight = (score - lse).exp();
                    if weight == 0.0 {
                        continue;
                    }
                    // An infinite score under a softcap is the cap, whatever was rounded.
                    let product = if product.is_finite() { product } else { 0.0 };
                    let error = U
                        * ((growth(dim) + 2.0) * product
                            + 4.0 * (score.abs() + max.abs() + 2.0)
                            + cap.map_or(0.0, |_| 16.0 * score.abs())
                            + scaled * score.abs());
                    let moved = weight * error.exp_m1();
                    let low_weight = round(weight);
                    score_error += moved;
                    largest_error = largest_error.max(error);
                    for (d, &v) in v.row(b, kv_head, j).iter().enumerate() {
                        let v = value_scale * v;
                        // Where all visible values are the same, no error moves their mean.
                        through[d] += if v == out[d] { 0.0 } else { moved * (v - out[d]).abs() };
                        magnitude[d] += weight * v.abs();
                        squares[d] += weight * v * weight * v;
                        lowp[d] += low_weight * v;
                    }
                }
                let sink = sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[head]));
                let weight = (sink - lse).exp();
                if weight > 0.0 {
                    let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                    let keys = if sum > 0.0 { max + sum.ln() } else { 0.0 };
                    let error = U * (4.0 * (sink.abs() + keys.abs() + 2.0) + growth(n));
                    let moved = weight * error.exp_m1();
                    score_error += moved;
                    largest_error = largest_error.max(error);
                    for (through, &out) in through.iter_mut().zip(out) {
                        *through += if out == 0.0 { 0.0 } else { moved * out.abs() };
                    }
                }
                // No log-sum-exp moves further than the score that moves most.
                lse_tolerance[lse_at] =
                    score_error.min(largest_error) + U * (growth(n) + 4.0 * lse.abs() + 8.0);
                for d in 0..value_dim {
                    if !out[d].is_finite() {
                        continue;
                    }
                    let sums =
                        U * ((growth(n) + 8.0) * (magnitude[d] + out[d].abs()) + scaled * out[d].abs());
                    // Weights below f32's normal range may become 0.
                    let underflow = n as f64 * f64::from(f32::MIN_POSITIVE) * largest_value.max(8.0);
                    out_tolerance[at + d] = through[d] + sums + underflow;
                    let spread = low_u
                        * if correlated {
                            magnitude[d] + out[d].abs()
                        } else {
                            4.0 * (squares[d] + out[d] * out[d]).sqrt()
                        };
                    atol = atol.max(out_tolerance[at + d] + spread);
                    lowp_error = lowp_error.max((round(lowp[d]) - out[d]).abs());
                }
            }
        }
        let low_tolerance = if Q::DTYPE == DType::F32 { 0.0 } else { 2.0 * lowp_error + atol };
        Self {
            dtype: Q::DTYPE,
            shape: [batch, query_len, heads, value_dim],
            out: oracle.out,
            lse: oracle.lse,
            out_tolerance,
            lse_tolerance,
            low_tolerance,
        }
    }

    /// The same values with every tolerance `factor` times as wide, for results that went through
    /// several steps.
    pub fn widened(mut self, factor: f64) -> Self {
        self.out_tolerance.iter_mut().for_each(|t| *t *= factor);
        self.lse_tolerance.iter_mut().for_each(|t| *t *= factor);
        self.low_tolerance *= factor;
        self
    }

    /// Compares an output, in row-major order; NaN must be where the definition has it, and nowhere
    /// else.
    pub fn check_out(&self, out: impl Iterator<Item = f32>) -> Result<(), TestCaseError> {
        let [_, seqs, heads, dim] = self.shape;
        let mut elements = 0;
        for (i, got) in out.enumerate() {
            let (exact, got) = (self.out[i], f64::from(got));
            let tolerance = self.tolerance(i);
            // An infinite value times a weight too small for the type is NaN, not infinite.
            let infinite = exact.is_infinite() && !got.is_finite();
            prop_assert!(
                infinite || near(exact, got, tolerance),
                "out[batch {}, seq {}, head {}, dim {}]: expected {exact:e}, got {got:e}, off by {:e}, tolerance {tolerance:e}",
                i / dim / heads / seqs,
                i / dim / heads % seqs,
                i / dim % heads,
                i % dim,
                (exact - got).abs(),
            );
            elements += 1;
        }
        prop_assert_eq!(elements, self.out.len());
        Ok(())
    }

    /// Compares a log-sum-exp `[batch, heads, seq]`.
    pub fn check_lse(&self, lse: &[f32]) -> Result<(), TestCaseError> {
        let [_, seqs, heads, _] = self.shape;
        prop_assert_eq!(lse.len(), self.lse.len());
        for (i, &got) in lse.iter().enumerate() {
            let (exact, got, tolerance) = (self.lse[i], f64::from(got), self.lse_tolerance[i]);
            prop_assert!(
                near(exact, got, tolerance),
                "lse[batch {}, head {}, seq {}]: expected {exact:e}, got {got:e}, off by {:e}, tolerance {tolerance:e}",
                i / seqs / heads,
                i / seqs % heads,
                i % seqs,
                (exact - got).abs(),
            );
        }
        Ok(())
    }

    /// Compares two outputs that ought to be the same, each with its own rounding.
    pub fn check_pairs(&self, one: &[f32], other: &[f32]) -> Result<(), TestCaseError> {
        prop_assert_eq!(one.len(), other.len());
        for (i, (&one, &other)) in one.iter().zip(other).enumerate() {
            let tolerance = 2.0 * self.tolerance(i);
            prop_assert!(
                near(one.into(), other.into(), tolerance),
                "out at {i}: {one:e} and {other:e} differ by more than {tolerance:e}"
            );
        }
        Ok(())
    }

    fn tolerance(&self, index: usize) -> f64 {
        if self.dtype == DType::F32 { self.out_tolerance[index] } else { self.low_tolerance }
    }
}

/// Whether `got` is `exact` up to `tolerance`. NaN must be NaN and -inf must be -inf.
fn near(exact: f64, got: f64, tolerance: f64) -> bool {
    if exact.is_finite() {
        (exact - got).abs() <= tolerance
    } else {
        exact == got || (exact.is_nan() && got.is_nan())
    }
}
