//! What is measured.

use star_attention::{AttentionConfig, AttentionShape, Mask};

/// One row of the table.
#[derive(Clone, Debug)]
pub enum Case {
    /// The device's own copy, read and written: what the others are held against.
    Copy { bytes: usize },
    /// One attention call in bf16.
    Attention { name: String, config: AttentionConfig, shape: AttentionShape },
    /// `n` partials of f32 `[1, tokens, 32, 128]` to one.
    Merge { n: usize, tokens: usize },
}

/// Query heads and KV heads of Llama-3-8B's shapes.
const HEADS: (usize, usize) = (32, 8);

fn attention(
    name: &str,
    mask: Mask,
    batch: usize,
    query_len: usize,
    key_len: usize,
    head_dim: usize,
) -> Case {
    let (query_heads, kv_heads) = HEADS;
    Case::Attention {
        name: name.into(),
        config: AttentionConfig::new(mask),
        shape: AttentionShape { batch, query_len, key_len, query_heads, kv_heads, head_dim },
    }
}

/// All of them, the copy first.
pub fn all() -> Vec<Case> {
    let mut cases = vec![Case::Copy { bytes: 1 << 30 }];
    for kilo in [16, 32, 64, 128] {
        let len = kilo << 10;
        cases.push(attention("causal", Mask::Causal, 1, len, len, 128));
        // The paper's setting: blocks of a quarter of the context, each behind an anchor as long.
        let quarter = len / 4;
        let star = Mask::Star { anchor_len: quarter, block_len: quarter, first_block_len: quarter };
        cases.push(attention("star, a = b = L/4", star, 1, len, len, 128));
        let star = Mask::Star { anchor_len: 1024, block_len: 4096, first_block_len: 4096 };
        cases.push(attention("star, a = 1024, b = 4096", star, 1, len, len, 128));
    }
    cases.push(attention("full", Mask::Full, 1, 16 << 10, 16 << 10, 128));
    for head_dim in [64, 96, 192, 256] {
        cases.push(attention("causal", Mask::Causal, 1, 16 << 10, 16 << 10, head_dim));
    }
    for query_len in [1, 4, 16, 64, 128] {
        cases.push(attention("query", Mask::Full, 1, query_len, 128 << 10, 128));
    }
    cases.push(attention("query", Mask::Full, 1, 1, 16 << 10, 128));
    cases.push(attention("query", Mask::Full, 16, 1, 16 << 10, 128));
    cases.push(attention("query", Mask::Full, 1, 1, 128 << 10, 64));
    cases.push(attention("query", Mask::Full, 1, 1, 128 << 10, 256));
    cases.extend([(2, 8192), (8, 2048), (64, 256)].map(|(n, tokens)| Case::Merge { n, tokens }));
    cases
}
