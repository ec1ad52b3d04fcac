//! How sure an accuracy is.

use super::llama::random::Random;

/// Of the normal distribution, for 95%.
const Z: f64 = 1.959_964;
/// Samples drawn with replacement for an interval of a ratio.
const DRAWS: usize = 2000;

/// A figure with its 95% interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

/// Mean of scores between 0 and 1, with Wilson's interval: exact enough for scores of 0 and 1, and
/// too wide rather than too narrow for those between. `None` without scores.
pub fn accuracy(scores: &[f64]) -> Option<Estimate> {
    let n = scores.len() as f64;
    if scores.is_empty() {
        return None;
    }
    let mean = scores.iter().sum::<f64>() / n;
    let centre = (mean + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (mean * (1.0 - mean) / n + Z * Z / (4.0 * n * n)).max(0.0).sqrt();
    Some(Estimate {
        value: mean,
        low: (centre - half).clamp(0.0, mean),
        high: (centre + half).clamp(mean, 1.0),
    })
}

/// Mean of `star - dense` over pairs `(star, dense)` of the same samples.
pub fn difference(pairs: &[(f64, f64)]) -> Option<Estimate> {
    let n = pairs.len() as f64;
    if pairs.is_empty() {
        return None;
    }
    let mean = pairs.iter().map(|(star, dense)| star - dense).sum::<f64>() / n;
    let squares = pairs.iter().map(|(star, dense)| (star - dense - mean).powi(2)).sum::<f64>();
    let half = Z * (squares / (n - 1.0).max(1.0) / n).sqrt();
    Some(Estimate { value: mean, low: mean - half, high: mean + half })
}

/// Share of dense's mean that star's is, over pairs `(star, dense)` of the same samples; its
/// interval by drawing pairs anew. `None` if dense's mean is 0.
pub fn share(pairs: &[(f64, f64)]) -> Option<Estimate> {
    let ratio = |pairs: &mut dyn Iterator<Item = (f64, f64)>| {
        let (star, dense) = pairs.fold((0.0, 0.0), |sum, pair| (sum.0 + pair.0, sum.1 + pair.1));
        (dense > 0.0).then_some(star / dense)
    };
    let value = ratio(&mut pairs.iter().copied())?;
    let mut random = Random(pairs.len() as u64);
    let mut drawn: Vec<f64> = (0..DRAWS)
        .filter_map(|_| {
            ratio(&mut (0..pairs.len()).map(|_| *random.choose(pairs)).collect::<Vec<_>>().into_iter())
        })
        .collect();
    drawn.sort_by(f64::total_cmp);
    let at = |part: f64| drawn.get((part * (drawn.len() - 1) as f64).round() as usize).copied();
    Some(Estimate { value, low: at(0.025)?, high: at(0.975)? })
}
