//! The online softmax of a panel, lane by lane.

use super::{Limits, Panel, Vectors};
use crate::simd::{Product, Simd, load, store};

/// Turns scores, which have the factor, into probabilities and updates the state of the rows:
/// their running maximum (log2 domain) and sum, and `alpha`, the factor that the tile puts on them.
#[inline(always)]
pub(super) fn softmax<S: Simd, P: Product<S>>(
    tile: &Vectors<S, P>,
    panel: &mut Panel<'_>,
    scores: &mut [f32],
) {
    match (panel.limits.is_some(), tile.softcap.is_some()) {
        (false, false) => softmax_of::<S, P, false, false>(tile, panel, scores),
        (true, false) => softmax_of::<S, P, true, false>(tile, panel, scores),
        (false, true) => softmax_of::<S, P, false, true>(tile, panel, scores),
        (true, true) => softmax_of::<S, P, true, true>(tile, panel, scores),
    }
}

#[inline(always)]
fn softmax_of<S: Simd, P: Product<S>, const BOUNDARY: bool, const SOFTCAP: bool>(
    tile: &Vectors<S, P>,
    panel: &mut Panel<'_>,
    scores: &mut [f32],
) {
    let simd = tile.simd;
    let (zero, none) = (simd.splat(0.0), simd.splat(f32::NEG_INFINITY));
    let cap = simd.splat(tile.softcap.unwrap_or(0.0));
    let (width, keys) = (2 * S::LANES, scores.len() / (2 * S::LANES));
    let everything = Limits::default();
    let limits = panel.limits.unwrap_or(&everything);
    for half in [0, S::LANES] {
        let visible = load(simd, &limits.visible[half..]);
        let hidden = load(simd, &limits.hidden[half..]);
        let before = load(simd, &panel.max[half..]);
        let mut max = before;
        for (key, scores) in scores.chunks_exact_mut(width).enumerate() {
            let scores = &mut scores[half..][..S::LANES];
            let mut score = load(simd, scores);
            if SOFTCAP {
                score = simd.mul(cap, simd.tanh(score));
            }
            if BOUNDARY {
                let at = simd.splat(key as f32);
                score = simd.if_greater(visible, at, score, none);
                if key >= limits.anchor {
                    score = simd.if_greater(hidden, at, none, score);
                }
            }
            if SOFTCAP || BOUNDARY {
                store(simd, score, scores);
            }
            max = simd.max(score, max);
        }
        // Where nothing has been seen there is nothing to shift by, and -inf - -inf would be
        // NaN.
        let shift = simd.if_greater(max, none, max, zero);
        let alpha = simd.exp2(simd.sub(before, shift));
        let mut sum = zero;
        for pair in 0..keys / 2 {
            let (first, second) = (2 * pair * width + half, (2 * pair + 1) * width + half);
            let (first, second) = (load(simd, &scores[first..]), load(simd, &scores[second..]));
            let (first, second) = (simd.exp2(simd.sub(first, shift)), simd.exp2(simd.sub(second, shift)));
            sum = simd.add(sum, simd.add(first, second));
            let to = &mut scores[2 * pair / P::ELEMENTS * width + half..];
            assert!(to.len() >= if P::ELEMENTS == 1 { width + S::LANES } else { S::LANES });
            // SAFETY: the words end inside `to`, as just asserted.
            unsafe { tile.product.store_pair(first, second, to.as_mut_ptr(), width) };
        }
        let total = simd.fma(load(simd, &panel.sum[half..]), alpha, sum);
        store(simd, total, &mut panel.sum[half..]);
        store(simd, max, &mut panel.max[half..]);
        store(simd, alpha, &mut panel.alpha[half..]);
    }
}
