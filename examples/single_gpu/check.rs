//! Rows against the oracle, by FlashAttention's rule: `max|out - ref| <= 2 max|lowp - ref| + atol`,
//! where `lowp` is the same maths done naively with probabilities and output rounded to the element
//! type.

use star_attention::cpu::reference;
use star_attention::{AttentionConfig, Element, Result, TensorView};

/// What f32 sums of some thousand terms of size 1 lose.
const ATOL: f64 = 1e-5;

/// The largest errors over the rows seen so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Errors {
    pub rows: usize,
    pub out: f64,
    pub lse: f64,
    lowp: f64,
}

/// One head's keys and values that a row sees, contiguous.
pub struct Visible<T> {
    pub keys: Vec<T>,
    pub values: Vec<T>,
}

impl Errors {
    /// What the error of outputs may be.
    pub fn bound(&self) -> f64 {
        2.0 * self.lowp + ATOL
    }

    /// Whether it is, and that of the log-sum-exp, which is in f32, too.
    pub fn within(&self) -> bool {
        // NaN is not.
        self.out <= self.bound() && self.lse <= 10.0 * ATOL
    }

    /// Compares one row of one head.
    pub fn see<T: Element>(
        &mut self,
        query: &[T],
        visible: &Visible<T>,
        out: &[f32],
        lse: f32,
    ) -> Result<()> {
        let dim = query.len();
        let keys = visible.keys.len() / dim;
        let key = TensorView::contiguous("key", &visible.keys, [1, keys, 1, dim])?;
        let value = TensorView::contiguous("value", &visible.values, [1, keys, 1, dim])?;
        let query = TensorView::contiguous("query", query, [1, 1, 1, dim])?;
        let exact = reference::attention(&AttentionConfig::default(), query, key, value)?;
        let scale = 1.0 / (dim as f64).sqrt();
        let round = |x: f64| f64::from(T::from_f32(x as f32).to_f32());
        let mut lowp = vec![0.0; dim];
        for (key, value) in visible.keys.chunks(dim).zip(visible.values.chunks(dim)) {
            let products =
                query.data().iter().zip(key).map(|(q, k)| f64::from(q.to_f32()) * f64::from(k.to_f32()));
            let weight = round((scale * products.sum::<f64>() - exact.lse[0]).exp());
            lowp.iter_mut().zip(value).for_each(|(sum, v)| *sum += weight * f64::from(v.to_f32()));
        }
        self.rows += 1;
        for ((&got, exact), lowp) in out.iter().zip(&exact.out).zip(lowp) {
            self.out = larger(self.out, (f64::from(got) - exact).abs());
            self.lowp = self.lowp.max((round(lowp) - exact).abs());
        }
        // No key, no difference: both are -inf.
        let lse = f64::from(lse);
        self.lse = larger(self.lse, if lse == exact.lse[0] { 0.0 } else { (lse - exact.lse[0]).abs() });
        Ok(())
    }
}

/// The larger, or NaN if one is.
fn larger(a: f64, b: f64) -> f64 {
    if a > b || a.is_nan() { a } else { b }
}
