//! Causal attention on the CPU: eight query heads over two KV heads.
use star_attention::{AttentionConfig, Mask, Result, TensorView, TensorViewMut, cpu::flash};

fn main() -> Result<()> {
    // Tensors are `[batch, seq, heads, dim]`.
    let (queries, keys) = ([1, 100, 8, 64], [1, 100, 2, 64]);
    let (query, key, value) = (vec![0.1f32; 100 * 8 * 64], vec![0.2; 100 * 2 * 64], vec![0.3; 100 * 2 * 64]);
    let mut out = vec![0.0; query.len()];
    flash::attention(
        &AttentionConfig::new(Mask::Causal),
        TensorView::contiguous("query", &query, queries)?,
        TensorView::contiguous("key", &key, keys)?,
        TensorView::contiguous("value", &value, keys)?,
        TensorViewMut::contiguous("out", &mut out, queries)?,
        None, // or memory for the log-sum-exp of each row
    )?;
    // All values are the same, so every weighted mean of them is.
    assert!(out.iter().all(|x| (x - 0.3).abs() < 1e-6));
    println!("{} rows of {} elements", 100 * 8, 64);
    Ok(())
}
