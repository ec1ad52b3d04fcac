//! Windows and block lists with known answers, and whether a key too many or too few would show.

use super::Attend;
use super::cases::Inputs;
use super::expected::Expected;
use crate::common::{Rng, Tensor};
use star_attention::{AttentionConfig, BlockList, Element, Mask};

/// Equal scores over values that are their positions: under a window of two keys row `i` is the
/// mean of `i - 1` and `i` (Megatron-Bridge#2656, transformers#39408).
pub fn a_window_of_two_keys<T: Element>(by: &impl Attend<T>, head_dim: usize) {
    // Positions that 16 bits have exactly.
    let rows = 128;
    let position = |name| Tensor::contiguous(name, [1, rows, 1, head_dim], |[_, s, ..]| s as f32);
    let zeros = |name| Tensor::<T>::contiguous(name, [1, rows, 1, head_dim], |_| 0.0);
    let inputs = Inputs { query: zeros("query"), key: zeros("key"), value: position("value") };
    let config = AttentionConfig::new(Mask::sliding_window(2).unwrap());
    let mut out = Tensor::<f32>::contiguous("out", inputs.query.shape(), |_| f32::NAN);
    let mut lse = vec![f32::NAN; rows];
    by.attend(&config, None, &inputs, &mut out, Some(&mut lse));
    for (row, lse) in lse.into_iter().enumerate() {
        let (mean, count) = if row == 0 { (0.0, 1f32) } else { (row as f32 - 0.5, 2.0) };
        let got = out.get([0, row, 0, 0]);
        assert!((got - mean).abs() <= 1e-5 * (1.0 + mean), "row {row}: {got} for {mean}");
        assert!((lse - count.ln()).abs() <= 1e-6, "row {row}: lse {lse} of {count} keys");
    }
}

/// Each mask beside others that differ by one key at one of its edges: their results are not taken
/// for its own, while its own are.
pub fn edges_off_by_one_are_found<T: Element>(by: &impl Attend<T>, head_dim: usize) {
    let window = |left, right| Mask::Window { left: Some(left), right: Some(right) };
    let star = |left| Mask::Star { anchor_len: 5, block_len: 60, first_block_len: 60, left: Some(left) };
    let anchor = |anchor_len| Mask::Star { anchor_len, block_len: 60, first_block_len: 60, left: Some(7) };
    let blocks = |start: usize, end: usize, last: usize| {
        let ranges = [0..40, start..end, 0..last];
        Mask::from(BlockList::new(70, &[0, 2, 3], &ranges).unwrap())
    };
    let causal =
        |end: usize| Mask::from(BlockList::new(70, &[0, 1, 3], &[0..70, 10..end, 80..150]).unwrap().causal());
    let rows = 140;
    let mut rng = Rng::new(11);
    let inputs = Inputs::<T> {
        query: Tensor::normal("query", [1, rows, 2, head_dim], &mut rng),
        key: Tensor::normal("key", [1, 150, 1, head_dim], &mut rng),
        value: Tensor::normal("value", [1, 150, 1, head_dim], &mut rng),
    };
    for (right, wrong) in [
        (window(7, 0), vec![window(6, 0), window(8, 0), window(7, 1)]),
        (window(0, 3), vec![window(1, 3), window(0, 2), window(0, 4)]),
        (window(90, 40), vec![window(89, 40), window(91, 40), window(90, 39), window(90, 41)]),
        (star(7), vec![star(6), star(8), anchor(4), anchor(6)]),
        (blocks(60, 100, 30), vec![blocks(59, 100, 30), blocks(60, 101, 30), blocks(60, 100, 31)]),
        (causal(40), vec![causal(39), causal(41)]),
    ] {
        let config = AttentionConfig::new(right);
        let expected = Expected::of(&config, &inputs.query, &inputs.key, &inputs.value, false);
        let check = |mask: Mask| {
            let mut out = Tensor::<f32>::contiguous("out", inputs.query.shape(), |_| f32::NAN);
            let mut lse = vec![f32::NAN; 2 * rows];
            by.attend(&AttentionConfig::new(mask), None, &inputs, &mut out, Some(&mut lse));
            expected.check_out(out.values()).and_then(|()| expected.check_lse(&lse))
        };
        check(config.mask.clone()).unwrap();
        for mask in wrong {
            assert!(check(mask.clone()).is_err(), "{mask:?} is taken for {:?}", config.mask);
        }
    }
}
