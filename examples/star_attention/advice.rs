//! Whether to encode the anchor on every rank or to send it.

use super::llama::error::Result;
use super::llama::model::Llama;
use star_attention::StarLayout;
use star_attention::comm::{AnchorKv, Link};
use std::time::Instant;

/// Tokens on which the linear layers are timed.
const SAMPLE: usize = 256;

/// The cheaper way for one layer, by the time that this rank's linear layers take on a sample of
/// the anchor. Its attention is left out.
pub fn cheapest_anchor(model: &Llama, layout: &StarLayout, link: &Link, context: &[u32]) -> Result<AnchorKv> {
    let anchor = layout.anchor_len().min(context.len());
    let sample = &context[..anchor.min(SAMPLE)];
    if sample.is_empty() {
        return Ok(AnchorKv::Encoded);
    }
    let config = &model.config;
    let positions: Vec<usize> = (0..sample.len()).collect();
    let start = Instant::now();
    model.forward(sample, &positions, 0, &mut |_, [query, _, _]| Ok(query))?;
    let per_token = start.elapsed().as_secs_f64() / (sample.len() * config.layers) as f64;
    let bytes = 2 * anchor * config.kv_heads * config.head_dim * model.dtype.size_in_bytes();
    Ok(AnchorKv::cheapest(link, layout.ranks(), bytes, per_token * anchor as f64))
}
