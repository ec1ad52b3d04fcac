//! A layer as gpt-oss has it: a sliding window, and an attention sink for each query head.
use star_attention::cpu::flash::Plan;
use star_attention::{AttentionConfig, AttentionShape, Inputs, Mask, Result, TensorView, TensorViewMut};

fn main() -> Result<()> {
    let shape = AttentionShape {
        batch: 1,
        query_len: 200,
        key_len: 200,
        query_heads: 4,
        kv_heads: 2,
        head_dim: 64,
        value_dim: 64,
    };
    // Each row sees itself and the 15 keys before it: `sliding_window` of Hugging Face's models.
    let config = AttentionConfig::new(Mask::sliding_window(16)?);
    // One logit for each head, in the softmax of all its rows: -inf is none.
    let sinks = [f32::NEG_INFINITY, 0.0, 16f32.ln(), 10.0];

    // Scores of 0 and values of 1: the output is the share of the softmax that the keys have.
    let query = vec![0f32; shape.query_shape().iter().product()];
    let key = vec![0f32; shape.key_shape().iter().product()];
    let value = vec![1f32; key.len()];
    let mut out = vec![0f32; query.len()];
    let plan = Plan::new(&config, &shape)?;
    let mut workspace = vec![0u8; plan.workspace_bytes()];
    let inputs = Inputs::new(
        TensorView::contiguous("query", &query, shape.query_shape())?,
        TensorView::contiguous("key", &key, shape.key_shape())?,
        TensorView::contiguous("value", &value, shape.value_shape())?,
    );
    plan.run(
        inputs.with_sinks(&sinks[..]),
        TensorViewMut::contiguous("out", &mut out, shape.out_shape())?,
        None,
        &mut workspace,
    )?;

    let out = TensorView::contiguous("out", &out, shape.out_shape())?;
    for (head, sink) in sinks.iter().enumerate() {
        for row in [0, 199] {
            let seen = if row < 16 { row + 1 } else { 16 } as f32;
            let share = out.at([0, row, head, 0]);
            println!(
                "sink {sink:>5.2}, row {row:>3}: {seen:>2} keys have {:.1}% of the softmax",
                100.0 * share
            );
            assert!((share - seen / (seen + sink.exp())).abs() < 1e-6);
        }
    }
    Ok(())
}
