//! Names and layout of a GGUF file's tensors.

use candle_core::Tensor;

/// The tensor that has a row for each token.
pub const EMBEDDING: &str = "token_embd.weight";

/// The name that transformers gives a tensor of a GGUF file; none for one that no layer takes.
pub fn name_in_transformers(name: &str) -> Option<String> {
    let whole = match name {
        EMBEDDING => "model.embed_tokens.weight",
        "output_norm.weight" => "model.norm.weight",
        "output.weight" => "lm_head.weight",
        "rope_freqs.weight" => "rope_freqs.weight",
        _ => "",
    };
    if !whole.is_empty() {
        return Some(whole.to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (part, kind) = rest.split_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.{kind}"))
}

/// Queries' or keys' rows in the order of transformers, which turns element `i` of a head with
/// element `i + dim / 2`. llama.cpp turns neighbours in Llamas, and keeps each pair side by side.
pub fn unpermuted(tensor: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let shape = tensor.dims();
    let rows = shape.first().copied().unwrap_or(0);
    if rows == 0 || !rows.is_multiple_of(2 * heads) {
        candle_core::bail!("expected rows for {heads} heads of an even dim, got {rows}");
    }
    tensor.reshape((heads, rows / heads / 2, 2, ()))?.transpose(1, 2)?.contiguous()?.reshape(shape)
}
