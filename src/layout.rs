//! Which context tokens a host encodes, at which positions, and which of their KV rows it keeps.
//!
//! Arithmetic only. The context of `L` tokens is cut into blocks of `b` (the last may be short); the blocks go to the hosts
//! contiguously and as evenly as possible, the first hosts taking one more where it does not divide. A host runs
//! its model once over one local sequence: the anchor (unless it holds block 0, whose head the anchor is) and
//! then its own tokens, at their positions in the context, under [`Mask::Star`].

use crate::{Error, Mask, Result};
use std::ops::Range;

/// Which hosts keep the KV of query and generated tokens.
///
/// These tokens are numbered from 0 on, the first of the query being 0. In a step over the tokens `first..first + n` one host, the
/// [`leader`](StarLayout::leader), appends the KV of all `n` to its shard and attends causally; the others attend to all of theirs. Every key is seen by one host, so
/// the merge is exact. Then the leader truncates its shard to what it held, and each host appends what it
/// [keeps](StarLayout::kept_generated) of the `n`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GeneratedKv {
    /// The query host keeps them all (paper section 2.2).
    #[default]
    QueryHost,
    /// Token `i` stays on host `i mod hosts`: no shard grows faster than another.
    RoundRobin,
}

/// The partition of a context over hosts (paper section 2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StarLayout {
    context_len: usize,
    block_len: usize,
    anchor_len: usize,
    hosts: usize,
}

impl StarLayout {
    /// A context of `context_len` tokens in blocks of `block_len` with an anchor of `anchor_len`, over `hosts` hosts.
    ///
    /// # Errors
    /// [`Error::Value`] for no block, no host, or an anchor longer than a block.
    pub fn new(context_len: usize, block_len: usize, anchor_len: usize, hosts: usize) -> Result<Self> {
        if block_len == 0 {
            return Err(Error::value("block_len", "at least 1", block_len));
        }
        if anchor_len > block_len {
            return Err(Error::value("anchor_len", format!("at most block_len {block_len}"), anchor_len));
        }
        if hosts == 0 {
            return Err(Error::value("hosts", "at least 1", hosts));
        }
        Ok(Self { context_len, block_len, anchor_len, hosts })
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

    /// Hosts, with or without blocks.
    pub fn hosts(&self) -> usize {
        self.hosts
    }

    /// Blocks of the context.
    pub fn blocks(&self) -> usize {
        self.context_len.div_ceil(self.block_len)
    }

    /// The position of the first query token.
    pub fn query_position(&self) -> usize {
        self.context_len
    }

    /// The rank that stores the KV of query and generated tokens: the last, which never holds more context
    /// than another.
    pub fn query_host(&self) -> usize {
        self.hosts - 1
    }

    /// The rank that appends the KV of all tokens of a step that starts with token `first` of query and generation.
    pub fn leader(&self, generated: GeneratedKv, first: usize) -> usize {
        match generated {
            GeneratedKv::QueryHost => self.query_host(),
            GeneratedKv::RoundRobin => first % self.hosts,
        }
    }

    /// Which tokens of a step that starts with token `first` of query and generation a rank keeps: the index in the step of the first one, and the distance from one
    /// to the next, as [`TensorView::every`](crate::TensorView::every) takes them.
    pub fn kept_generated(&self, generated: GeneratedKv, rank: usize, first: usize) -> (usize, usize) {
        match generated {
            GeneratedKv::QueryHost if rank == self.query_host() => (0, 1),
            GeneratedKv::QueryHost => (usize::MAX, 1),
            GeneratedKv::RoundRobin => ((rank + self.hosts - first % self.hosts) % self.hosts, self.hosts),
        }
    }

    /// Room that a rank's shard needs for `tokens` of query and generation in steps of at most `step`: what it keeps, and while it leads a
    /// step all of that.
    pub fn generated_room(&self, generated: GeneratedKv, rank: usize, tokens: usize, step: usize) -> usize {
        match generated {
            GeneratedKv::QueryHost if rank == self.query_host() => tokens,
            GeneratedKv::QueryHost => 0,
            GeneratedKv::RoundRobin => tokens.div_ceil(self.hosts).saturating_add(step),
        }
    }

    /// What the host of this rank does.
    ///
    /// # Errors
    /// [`Error::Value`] if there is no such rank.
    pub fn host(&self, rank: usize) -> Result<HostLayout> {
        if rank >= self.hosts {
            return Err(Error::value("rank", format!("below {}", self.hosts), rank));
        }
        let (each, extra) = (self.blocks() / self.hosts, self.blocks() % self.hosts);
        let first = rank * each + rank.min(extra);
        let last = first + each + usize::from(rank < extra);
        // The last block may be short, and a host without blocks starts past it.
        let token = |block: usize| block.saturating_mul(self.block_len).min(self.context_len);
        Ok(HostLayout { layout: *self, rank, blocks: first..last, own: token(first)..token(last) })
    }
}

/// One host's share of a [`StarLayout`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostLayout {
    layout: StarLayout,
    rank: usize,
    blocks: Range<usize>,
    own: Range<usize>,
}

impl HostLayout {
    /// The rank of this host.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The blocks of this host.
    pub fn blocks(&self) -> Range<usize> {
        self.blocks.clone()
    }

    /// The context tokens whose KV this host keeps.
    pub fn own_tokens(&self) -> Range<usize> {
        self.own.clone()
    }

    /// The context tokens prefixed to the own ones: empty on the host of block 0 and on hosts without blocks.
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
        Mask::Star { anchor_len, block_len, first_block_len }
    }

    /// The local rows whose KV goes to the shard: all but the anchor's.
    pub fn kept(&self) -> Range<usize> {
        self.anchor_tokens().len()..self.local_len()
    }
}
