//! Numbers at the ends of their types, with answers that are known exactly.

use super::Attend;
use super::cases::Inputs;
use crate::common::Tensor;
use star_attention::{AttentionConfig, Element, Mask};

/// Keys of a call: more than a tile of any backend has.
const KEYS: usize = 300;

/// One head of attention with a scale of 1, where the score of a key is `query · key(index)` and
/// all elements of its value are `value(index)`. Gives the first output and the log-sum-exp of each
/// row.
fn rows_of<T: Element>(
    by: &impl Attend<T>,
    rows: usize,
    query: f32,
    key: impl Fn(usize) -> f32,
    value: impl Fn(usize) -> f32,
) -> Vec<(f32, f32)> {
    let dim = 32;
    let inputs = Inputs {
        query: Tensor::<T>::contiguous(
            "query",
            [1, rows, 1, dim],
            |[.., d]| if d == 0 { query } else { 0.0 },
        ),
        key: Tensor::contiguous("key", [1, KEYS, 1, dim], |[_, s, _, d]| if d == 0 { key(s) } else { 0.0 }),
        value: Tensor::contiguous("value", [1, KEYS, 1, dim], |[_, s, ..]| value(s)),
    };
    let config = AttentionConfig { scale: Some(1.0), ..AttentionConfig::new(Mask::Full) };
    let mut out = Tensor::<f32>::contiguous("out", inputs.query.shape(), |_| f32::NAN);
    let mut lse = vec![f32::NAN; rows];
    by.attend(&config, None, &inputs, &mut out, Some(&mut lse));
    lse.into_iter().enumerate().map(|(row, lse)| (out.get([0, row, 0, 0]), lse)).collect()
}

fn near(got: f32, expected: f32, relative: f32) -> bool {
    got == expected || (got - expected).abs() <= relative * expected.abs()
}

/// Few rows and many.
pub fn extremes_are_exact<T: Element>(by: &impl Attend<T>) {
    for rows in [1, 40] {
        // Far scores, wherever the largest is: it has all of the weight.
        for at in [0, 40, 255, 299] {
            let keys = |index| if index == at { 8192.0 } else { -8192.0 * f32::from(index % 3 == 0) };
            for row in rows_of(by, rows, 1.0, keys, |index| index as f32 % 128.0) {
                assert_eq!(row, (at as f32 % 128.0, 8192.0), "{:?}: key {at} of {rows} rows", T::DTYPE);
            }
        }
        // Scores that are equal, however low.
        for row in rows_of(by, rows, 1.0, |_| -8192.0, |_| 3.0) {
            let lse = -8192.0 + (KEYS as f32).ln();
            assert!(near(row.0, 3.0, 2e-6) && near(row.1, lse, 1e-6), "{:?}: {row:?}", T::DTYPE);
        }
        // The largest f16, and the nearest bf16 below it.
        let largest = 65504.0f32.min(f32::from_bits(65504.0f32.to_bits() & 0xffff_0000));
        let largest = if T::from_f32(65504.0).to_f32() == 65504.0 { 65504.0 } else { largest };
        let keys = |index| if index == 270 { largest } else { 0.0 };
        for row in rows_of(by, rows, largest, keys, |_| largest) {
            let lse = largest * largest;
            assert!(near(row.0, largest, 2e-6) && near(row.1, lse, 1e-6), "{:?}: {row:?}", T::DTYPE);
        }
        // The smallest f16, which is no denormal of the other types.
        let smallest = 2f32.powi(-24);
        for row in rows_of(by, rows, 1024.0, |_| 1024.0 * smallest, |_| smallest) {
            let lse = 2f32.powi(-4) + (KEYS as f32).ln();
            assert!(near(row.0, smallest, 2e-6) && near(row.1, lse, 1e-6), "{:?}: {row:?}", T::DTYPE);
        }
        // Denormals of f32 and bf16 count for themselves or for 0.
        for row in rows_of(by, rows, 1.0, |_| 1e-40, |_| 1e-40) {
            let lse = (KEYS as f32).ln();
            assert!((0.0..=1.1e-40).contains(&row.0) && near(row.1, lse, 1e-6), "{:?}: {row:?}", T::DTYPE);
        }
    }
}
