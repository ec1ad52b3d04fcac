//! Heads of real models.

use super::backend::On;
use super::cases::Inputs;
use super::expected::Expected;
use crate::common::{Rng, Tensor, extents};
use star_attention::{AttentionConfig, Backend, Batch, DType, Element, Mask, PlanConfig, Scales};

/// Lengths of a call: query rows and keys.
type Lens = [usize; 2];

/// A call on normal values gives what the definition says. fp8 keys have scales.
pub fn normal_values_equal_the_oracle<B: Backend, Q: Element, K: Element>(
    by: &On<B>,
    mask: &Mask,
    [query_len, key_len]: Lens,
    [query_heads, kv_heads]: [usize; 2],
    [head_dim, value_dim]: [usize; 2],
) {
    let shape = extents([1, query_len, key_len], [query_heads, kv_heads], [head_dim, value_dim]);
    let scales = (K::DTYPE == DType::F8E4M3).then(|| Scales::new(vec![0.02], vec![0.5]));
    let [key_scale, value_scale] =
        scales.as_ref().map_or([1.0; 2], |scales| [scales.key[0], scales.value[0]]);
    let mut rng = Rng::new(7);
    let inputs = Inputs::<Q, K> {
        query: Tensor::normal("query", shape.query_shape(), &mut rng),
        key: Tensor::contiguous("key", shape.key_shape(), |_| rng.normal() / key_scale),
        value: Tensor::contiguous("value", shape.value_shape(), |_| rng.normal() / value_scale),
    };
    let batch = Batch::uniform(&shape, mask).unwrap();
    let mut out = Tensor::<Q>::contiguous("out", shape.out_shape(), |_| f32::NAN);
    let mut lse = vec![f32::NAN; shape.lse_len()];
    let call = inputs.call(None, &scales);
    by.run_call(&PlanConfig::new(), &batch, call, &mut out, Some(&mut lse)).unwrap();
    let expected = Expected::of_call(&AttentionConfig::new(mask.clone()), call, false);
    expected.check_out(out.values()).unwrap();
    expected.check_lse(&lse).unwrap();
}

/// Ratios of heads and head dims that kernels were wrong on or did not take: 5 heads of 80 on 1, 71
/// of 64 on 1, heads of 512 (vllm#32161, candle#3417); 72 and 112; DeepSeek's 192 with 128, and 576
/// with 512.
pub fn ratios_and_dims_of_models<B: Backend, T: Element>(by: &On<B>) {
    for (heads, dims) in [
        ([5, 1], [80, 80]),
        ([71, 1], [64, 64]),
        ([2, 1], [512, 512]),
        ([3, 3], [72, 72]),
        ([4, 2], [112, 112]),
        ([2, 2], [192, 128]),
        ([16, 1], [576, 512]),
    ] {
        for lens in [[1, 150], [3, 40], [20, 20]] {
            normal_values_equal_the_oracle::<B, T, T>(by, &Mask::Causal, lens, heads, dims);
        }
    }
}
