//! The formulas of the cluster, as the benchmark's head has them.

use super::rates::Rates;
use star_attention::comm::{AnchorKv, Link, MergeWay};
use star_attention::cpu::flash::Plan;
use star_attention::{AttentionConfig, AttentionShape, Mask, RankLayout, StarLayout};

const LAYERS: usize = 32;
const HIDDEN: usize = 4096;
pub const HEADS: usize = 32;
pub const KV_HEADS: usize = 8;
pub const HEAD_DIM: usize = 128;
const INTERMEDIATE: usize = 14336;
const VOCABULARY: usize = 128_256;

/// Weights of a layer: queries and output, keys and values, and the three of the MLP.
const LAYER_WEIGHTS: usize = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INTERMEDIATE;
/// Bytes of a token's keys and values in a layer.
const KV_BYTES: usize = 2 * KV_HEADS * HEAD_DIM * BF16;
const BF16: usize = 2;
const F32: usize = 4;

/// A context on a cluster.
#[derive(Clone, Copy)]
pub struct Case<'a> {
    pub rates: &'a Rates,
    pub link: Link,
    pub ranks: usize,
    pub context: usize,
    /// Tokens of the query.
    pub query: usize,
}

impl Case<'_> {
    /// The same context on one rank.
    pub fn dense(&self) -> Self {
        Self { ranks: 1, ..*self }
    }

    /// Seconds of star to the first token.
    pub fn star_first(&self, anchor: AnchorKv) -> f64 {
        let message = match anchor {
            AnchorKv::Encoded => 0.0,
            AnchorKv::Received => self.link.broadcast(self.ranks, self.anchor_bytes()),
        };
        LAYERS as f64 * (self.encode(anchor) + message)
            + self.step(self.query, self.star_messages(self.query))
    }

    /// Seconds of ring, and of tree, to the first token; of dense on one rank.
    pub fn ring_first(&self) -> f64 {
        let chunk = self.chunk();
        let flops = flops(Mask::Causal, self.context + self.query, self.context + self.query);
        let compute = flops / self.ranks as f64 / self.rates.causal(chunk);
        let send = self.others() * self.message(chunk * KV_BYTES);
        LAYERS as f64 * (self.linear(LAYER_WEIGHTS, chunk) + compute.max(send)) + self.head()
    }

    /// Seconds of a generated token, with so many seconds of messages in each layer.
    pub fn next(&self, messages: f64) -> f64 {
        self.step(1, messages)
    }

    /// Seconds of star's messages in a layer for so many query tokens.
    pub fn star_messages(&self, tokens: usize) -> f64 {
        self.merge(tokens).seconds(&self.link, self.ranks, partial_bytes(tokens))
    }

    /// Seconds of ring's messages in a layer for one token.
    pub fn ring_messages(&self) -> f64 {
        self.others() * self.message(partial_bytes(1))
    }

    /// Seconds of tree's messages in a layer for one token.
    pub fn tree_messages(&self) -> f64 {
        let all_reduce = |bytes: usize| self.message(2 * bytes * (self.ranks - 1) / self.ranks);
        all_reduce(HEADS * F32) + all_reduce(HEADS * (HEAD_DIM + 1) * F32)
    }

    /// How star merges so many query tokens.
    pub fn merge(&self, tokens: usize) -> MergeWay {
        MergeWay::cheapest(&self.link, self.ranks, partial_bytes(tokens))
    }

    /// How star's ranks come by the anchor.
    pub fn anchor(&self) -> AnchorKv {
        let saved = self.encode(AnchorKv::Encoded) - self.encode(AnchorKv::Received);
        AnchorKv::cheapest(&self.link, self.ranks, self.anchor_bytes(), saved)
    }

    /// Seconds of a layer of context encoding, on the rank that has the most to do.
    fn encode(&self, anchor: AnchorKv) -> f64 {
        let rate = self.rates.star(self.layout().block_len());
        let seconds = |local: RankLayout| {
            let rows = match anchor {
                AnchorKv::Encoded => local.local_len(),
                AnchorKv::Received => local.kept().len(),
            };
            self.linear(LAYER_WEIGHTS, rows) + flops(local.mask(), rows, local.local_len()) / rate
        };
        self.rank_layouts().map(seconds).fold(0.0, f64::max)
    }

    /// Seconds of a pass of query tokens, with so many seconds of messages in each layer.
    fn step(&self, tokens: usize, messages: f64) -> f64 {
        let shard = self.rank_layouts().map(|local| local.own_tokens().len()).max().unwrap_or(0);
        let keys = (shard + self.query) as f64;
        let flops = 4.0 * (HEAD_DIM * HEADS * tokens) as f64 * keys;
        let query = (flops / self.rates.query()).max(keys * KV_BYTES as f64 / self.rates.bandwidth());
        LAYERS as f64 * (self.linear(LAYER_WEIGHTS, tokens) + query + messages) + self.head()
    }

    /// Seconds of linear layers with so many weights.
    fn linear(&self, weights: usize, tokens: usize) -> f64 {
        let flops = 2.0 * weights as f64 * tokens as f64;
        (flops / self.rates.linear()).max((BF16 * weights) as f64 / self.rates.bandwidth())
    }

    /// Seconds of the last layer, from a token's hidden state to the vocabulary.
    fn head(&self) -> f64 {
        self.linear(HIDDEN * VOCABULARY, 1)
    }

    /// Seconds of a message between two ranks.
    fn message(&self, bytes: usize) -> f64 {
        self.link.latency + bytes as f64 / self.link.bandwidth
    }

    fn others(&self) -> f64 {
        (self.ranks - 1) as f64
    }

    /// Tokens of one of ring's ranks.
    fn chunk(&self) -> usize {
        (self.context + self.query).div_ceil(self.ranks)
    }

    fn layout(&self) -> StarLayout {
        let block = self.context.div_ceil(self.ranks);
        StarLayout::builder(self.context)
            .block_len(block)
            .anchor_len(block)
            .ranks(self.ranks)
            .build()
            .expect("a block and a rank")
    }

    fn rank_layouts(&self) -> impl Iterator<Item = RankLayout> + use<> {
        let layout = self.layout();
        (0..layout.ranks()).map(move |rank| layout.rank(rank).expect("a rank"))
    }

    fn anchor_bytes(&self) -> usize {
        self.layout().anchor_len() * KV_BYTES
    }
}

/// Bytes of a rank's partial: an output and its log-sum-exp for each row.
fn partial_bytes(tokens: usize) -> usize {
    tokens * HEADS * (HEAD_DIM + 1) * F32
}

/// FLOPs of a layer's attention.
fn flops(mask: Mask, query_len: usize, key_len: usize) -> f64 {
    let (query_heads, kv_heads, head_dim) = (HEADS, KV_HEADS, HEAD_DIM);
    let shape =
        AttentionShape { batch: 1, query_len, key_len, query_heads, kv_heads, head_dim, value_dim: head_dim };
    Plan::new(&AttentionConfig::new(mask), &shape).expect("extents of a model").flops() as f64
}
