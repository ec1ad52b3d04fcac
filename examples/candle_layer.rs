//! An attention layer on candle tensors, in the place of `candle_flash_attn::flash_attn`.
//!
//! | candle-flash-attn | here |
//! |---|---|
//! | `flash_attn(q, k, v, scale, causal)` | `candle::attention(&config, q, k, v)?.0`, with `Mask::Causal` or `Mask::Full` |
//! | `flash_attn_windowed(.., left, right)` | `Mask::Window { left, right }` |
//! | `flash_attn_alibi(..)` | not here |
//! | `flash_attn_varlen(.., seqlens_q, seqlens_k, ..)` | a `Batch` of packed sequences, and a `candle::Plan` |
//!
//! Shapes are the same, `[batch, seq, heads, dim]`. The CPU is served too, and f32.
use candle_core::{DType, Device, Result, Tensor};
use star_attention::{AttentionConfig, Mask, candle};

struct Attention {
    /// `[hidden, heads · dim]`, and for keys and values `[hidden, kv_heads · dim]`.
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    dim: usize,
}

impl Attention {
    /// `[batch, seq, hidden]` to the same.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, seq, _) = x.dims3()?;
        let heads = |weight: &Tensor| x.broadcast_matmul(weight)?.reshape((batch, seq, (), self.dim));
        let config = AttentionConfig::new(Mask::Causal);
        let (out, _lse) =
            candle::attention(&config, &heads(&self.query)?, &heads(&self.key)?, &heads(&self.value)?)
                .map_err(candle_core::Error::wrap)?;
        out.flatten_from(2)?.broadcast_matmul(&self.out)
    }
}

fn main() -> Result<()> {
    let (device, hidden, dim) = (Device::Cpu, 256, 64);
    let weight = |columns| Tensor::randn(0f32, 0.06, (hidden, columns), &device);
    let layer = Attention {
        query: weight(4 * dim)?,
        key: weight(2 * dim)?,
        value: weight(2 * dim)?,
        out: weight(hidden)?,
        dim,
    };
    let x = Tensor::randn(0f32, 1.0, (2, 100, hidden), &device)?;
    let y = layer.forward(&x)?;
    // A causal layer: what follows a token does not change it.
    let start = layer.forward(&x.narrow(1, 0, 10)?)?;
    let difference = (y.narrow(1, 0, 10)? - start)?.abs()?.max_all()?.to_scalar::<f32>()?;
    println!("{:?} to {:?}, largest difference of the first rows alone: {difference:e}", x.dims(), y.dims());
    assert!(difference < 1e-5 && y.dtype() == DType::F32);
    Ok(())
}
