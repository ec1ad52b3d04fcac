//! Which tokens a rank works on, at which positions, under which mask, and which KV rows it keeps.
//!
//! Arithmetic only, for one request. [`StarLayout`] spreads the request over ranks;
//! [`StarLayout::rank`] gives one rank's part of phase 1, and [`RankLayout::step`] its part of a
//! step of phase 2.
//!
//! The context of `L` tokens is cut into blocks of `b` (the last may be short). The blocks go to
//! the ranks contiguously and as evenly as possible; the first ranks take one more where it does
//! not divide. A rank runs its model once over one local sequence: the anchor (unless it holds
//! block 0, whose head the anchor is) and then its own tokens, at their positions in the context,
//! under [`Mask::Star`].

mod step;

pub use step::StepLayout;

use crate::{Error, Mask, Result};
use std::ops::Range;

/// Which ranks keep the KV of query and generated tokens. These tokens are numbered from 0 on; the
/// first of the query is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum GeneratedKv {
    /// The query rank keeps them all (paper section 2.2).
    #[default]
    QueryRank,
    /// Token `i` stays on rank `(query_rank + i) mod ranks`: no shard grows faster than another.
    RoundRobin,
}

/// The partition of one request over ranks (paper section 2.1).
///
/// ```
/// use star_attention::StarLayout;
///
/// // 1000 tokens in blocks of 128 with an anchor as long as a block, over 3 ranks.
/// let layout = StarLayout::builder(1000).block_len(128).ranks(3).build()?;
/// assert_eq!(layout.rank(1)?.own_tokens(), 384..768);
/// assert_eq!(layout.rank(1)?.anchor_tokens(), 0..128);
/// # star_attention::Result::Ok(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StarLayout {
    context_len: usize,
    block_len: usize,
    anchor_len: usize,
    ranks: usize,
    query_rank: usize,
    generated: GeneratedKv,
}

/// The lengths and choices of a [`StarLayout`], each by its name.
#[derive(Clone, Copy, Debug)]
pub struct StarLayoutBuilder {
    context_len: usize,
    block_len: Option<usize>,
    anchor_len: Option<usize>,
    ranks: usize,
    query_rank: Option<usize>,
    generated: GeneratedKv,
}

impl StarLayoutBuilder {
    /// Tokens of a block: the context over the ranks, unless said otherwise.
    #[must_use]
    pub fn block_len(self, block_len: usize) -> Self {
        Self { block_len: Some(block_len), ..self }
    }

    /// Tokens of the anchor: as many as of a block, unless said otherwise.
    #[must_use]
    pub fn anchor_len(self, anchor_len: usize) -> Self {
        Self { anchor_len: Some(anchor_len), ..self }
    }

    /// Ranks of the group, with or without blocks: 1, unless said otherwise.
    #[must_use]
    pub fn ranks(self, ranks: usize) -> Self {
        Self { ranks, ..self }
    }

    /// The rank that chooses the request's tokens, and stores their KV under
    /// [`GeneratedKv::QueryRank`]. The last, unless said otherwise, which never holds more context
    /// than another. An engine with many requests spreads their query ranks.
    #[must_use]
    pub fn query_rank(self, query_rank: usize) -> Self {
        Self { query_rank: Some(query_rank), ..self }
    }

    /// Which ranks keep the KV of query and generated tokens.
    #[must_use]
    pub fn generated(self, generated: GeneratedKv) -> Self {
        Self { generated, ..self }
    }

    /// The layout.
    ///
    /// # Errors
    /// [`Error::Value`] for a block or a group of 0, an anchor longer than a block, or a query rank
    /// that is no rank.
    pub fn build(self) -> Result<StarLayout> {
        let Self { context_len, ranks, generated, .. } = self;
        if ranks == 0 {
            return Err(Error::value("ranks", "at least 1", ranks));
        }
        let block_len = self.block_len.unwrap_or(context_len.div_ceil(ranks).max(1));
        if block_len == 0 {
            return Err(Error::value("block_len", "at least 1", block_len));
        }
        let anchor_len = self.anchor_len.unwrap_or(block_len);
        if anchor_len > block_len {
            return Err(Error::value("anchor_len", format!("at most block_len {block_len}"), anchor_len));
        }
        let query_rank = self.query_rank.unwrap_or(ranks - 1);
        if query_rank >= ranks {
            return Err(Error::value("query_rank", format!("below {ranks}"), query_rank));
        }
        Ok(StarLayout { context_len, block_len, anchor_len, ranks, query_rank, generated })
    }
}

impl StarLayout {
    /// A layout of a context of `context_len` tokens.
    pub fn builder(context_len: usize) -> StarLayoutBuilder {
        StarLayoutBuilder {
            context_len,
            block_len: None,
            anchor_len: None,
            ranks: 1,
            query_rank: None,
            generated: GeneratedKv::default(),
        }
    }

    /// A builder that starts from this layout.
    pub fn to_builder(&self) -> StarLayoutBuilder {
        StarLayoutBuilder {
            context_len: self.context_len,
            block_len: Some(self.block_len),
            anchor_len: Some(self.anchor_len),
            ranks: self.ranks,
            query_rank: Some(self.query_rank),
            generated: self.generated,
        }
    }

    /// Tokens of the context.
    pub fn context_len(&self) -> usize {
        self.context_len
    }

    /// Tokens of a block; the last may have fewer.
    pub fn block_len(&self) -> usize {
        self.block_len
    }

    /// Tokens of the anchor.
    pub fn anchor_len(&self) -> usize {
        self.anchor_len
    }

    /// Ranks, with or without blocks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Blocks of the context.
    pub fn blocks(&self) -> usize {
        self.context_len.div_ceil(self.block_len)
    }

    /// The position of the first query token.
    pub fn query_position(&self) -> usize {
        self.context_len
    }

    /// The rank that chooses the request's tokens.
    pub fn query_rank(&self) -> usize {
        self.query_rank
    }

    /// Which ranks keep the KV of query and generated tokens.
    pub fn generated(&self) -> GeneratedKv {
        self.generated
    }

    /// One rank's part.
    ///
    /// # Errors
    /// [`Error::Value`] if there is no such rank.
    pub fn rank(&self, rank: usize) -> Result<RankLayout> {
        if rank >= self.ranks {
            return Err(Error::value("rank", format!("below {}", self.ranks), rank));
        }
        let (each, extra) = (self.blocks() / self.ranks, self.blocks() % self.ranks);
        let first = rank * each + rank.min(extra);
        let last = first + each + usize::from(rank < extra);
        // The last block may be short, and a rank without blocks starts past it.
        let token = |block: usize| block.saturating_mul(self.block_len).min(self.context_len);
        Ok(RankLayout { layout: *self, rank, blocks: first..last, own: token(first)..token(last) })
    }
}

/// One rank's part of a [`StarLayout`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankLayout {
    layout: StarLayout,
    rank: usize,
    blocks: Range<usize>,
    own: Range<usize>,
}

impl RankLayout {
    /// The rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The blocks of this rank.
    pub fn blocks(&self) -> Range<usize> {
        self.blocks.clone()
    }

    /// The context tokens whose KV this rank keeps.
    pub fn own_tokens(&self) -> Range<usize> {
        self.own.clone()
    }

    /// The context tokens prefixed to the own ones: empty on the rank of block 0 and on ranks
    /// without blocks.
    pub fn anchor_tokens(&self) -> Range<usize> {
        if self.own.start == 0 || self.own.is_empty() { 0..0 } else { 0..self.layout.anchor_len }
    }

    /// Rows of the local sequence: anchor and own tokens.
    pub fn local_len(&self) -> usize {
        self.anchor_tokens().len() + self.own.len()
    }

    /// For each local row the index of its token in the context.
    pub fn tokens(&self) -> impl ExactSizeIterator<Item = usize> + Clone + use<> {
        let (anchor, own) = (self.anchor_tokens().len(), self.own.clone());
        (0..anchor + own.len()).map(move |row| if row < anchor { row } else { own.start + row - anchor })
    }

    /// For each local row its position, for RoPE: that of its token in the context.
    pub fn positions(&self) -> impl ExactSizeIterator<Item = usize> + Clone + use<> {
        self.tokens()
    }

    /// The mask of the local sequence in phase 1.
    pub fn mask(&self) -> Mask {
        let StarLayout { block_len, anchor_len, .. } = self.layout;
        let first_block_len = if self.own.start == 0 { block_len } else { anchor_len };
        Mask::Star { anchor_len, block_len, first_block_len, left: None }
    }

    /// The local rows whose KV goes to the shard: all but the anchor's.
    pub fn kept(&self) -> Range<usize> {
        self.anchor_tokens().len()..self.local_len()
    }

    /// This rank's part of a step of phase 2 over the query and generated tokens `tokens`.
    pub fn step(&self, tokens: Range<usize>) -> StepLayout {
        StepLayout::new(self.layout, self.rank, tokens)
    }

    /// KV rows that the rank's shard needs for its context tokens and `tokens` of query and
    /// generation, in steps of at most `step_len`: what it keeps, and while it leads a step all of
    /// that.
    pub fn room(&self, tokens: usize, step_len: usize) -> usize {
        let kept = self.step(0..tokens).kept().len();
        let while_leading = match self.layout.generated {
            GeneratedKv::QueryRank => 0,
            // A leader keeps the first token of its step, and every `ranks`-th after it.
            GeneratedKv::RoundRobin => step_len - step_len.div_ceil(self.layout.ranks),
        };
        self.own.len().saturating_add(kept).saturating_add(while_leading)
    }
}
