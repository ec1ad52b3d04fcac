//! One rank's part of a step of phase 2.

use super::{GeneratedKv, StarLayout};
use crate::Mask;
use std::ops::Range;

/// One rank's part of a step over new tokens: the query, a chunk of it, or one generated token
/// (paper section 2.2).
///
/// One rank, the leader, appends the KV of all tokens of the step to its shard and attends
/// causally; the others attend to all that they hold. Every key is seen on one rank, so the merge
/// is exact. Afterwards each rank holds what it [keeps](Self::kept) of the step:
///
/// ```
/// # use star_attention::{GeneratedKv, Mask, StarLayout};
/// let layout = StarLayout::builder(1000).ranks(3).generated(GeneratedKv::RoundRobin).build()?;
/// // The query's 4 tokens, on the query rank.
/// let step = layout.rank(2)?.step(0..4);
/// // 1. Append the KV of these tokens of the step. The shard held `before` rows.
/// assert_eq!(step.appended(), 0..4);
/// // 2. Attend under this mask, at these positions, and merge.
/// assert_eq!((step.mask(), step.positions()), (Mask::Causal, 1000..1004));
/// // 3. Unless it keeps what it appended: truncate to `before`, and append the KV of these.
/// assert!(!step.keeps_appended());
/// assert_eq!(step.kept().collect::<Vec<_>>(), [0, 3]);
///
/// // Another rank appends nothing, attends to all it holds, and then keeps one token.
/// let step = layout.rank(0)?.step(0..4);
/// assert_eq!((step.appended(), step.mask()), (0..0, Mask::Full));
/// assert_eq!(step.kept().collect::<Vec<_>>(), [1]);
/// # star_attention::Result::Ok(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepLayout {
    layout: StarLayout,
    rank: usize,
    tokens: Range<usize>,
}

impl StepLayout {
    pub(super) fn new(layout: StarLayout, rank: usize, tokens: Range<usize>) -> Self {
        Self { layout, rank, tokens: tokens.start..tokens.end.max(tokens.start) }
    }

    /// The step's tokens, numbered from the first of the query on.
    pub fn tokens(&self) -> Range<usize> {
        self.tokens.clone()
    }

    /// The positions of the step's tokens, for RoPE, as far as they fit the address space.
    pub fn positions(&self) -> Range<usize> {
        let position = self.layout.query_position();
        position.saturating_add(self.tokens.start)..position.saturating_add(self.tokens.end)
    }

    /// The rank that appends the KV of all tokens of the step: the one that keeps the first of
    /// them.
    pub fn leader(&self) -> usize {
        let StarLayout { ranks, query_rank, generated, .. } = self.layout;
        match generated {
            GeneratedKv::QueryRank => query_rank,
            GeneratedKv::RoundRobin => {
                let before_the_end = ranks - query_rank;
                let ahead = self.tokens.start % ranks;
                if ahead < before_the_end { query_rank + ahead } else { ahead - before_the_end }
            }
        }
    }

    /// Whether this rank is the leader.
    pub fn leads(&self) -> bool {
        self.rank == self.leader()
    }

    /// The mask of the step's rows over the keys that the rank holds, the appended ones among them.
    pub fn mask(&self) -> Mask {
        if self.leads() { Mask::Causal } else { Mask::Full }
    }

    /// The step's rows, counted from 0, whose KV the rank appends before it attends: all, or none.
    pub fn appended(&self) -> Range<usize> {
        if self.leads() { 0..self.tokens.len() } else { 0..0 }
    }

    /// The step's rows, counted from 0, whose KV stays on the rank after the step.
    pub fn kept(&self) -> impl ExactSizeIterator<Item = usize> + Clone + use<> {
        let StarLayout { ranks, .. } = self.layout;
        let len = self.tokens.len();
        let (first, every) = match self.layout.generated {
            GeneratedKv::QueryRank if self.leads() => (0, 1),
            GeneratedKv::QueryRank => (len, 1),
            GeneratedKv::RoundRobin => {
                let (rank, leader) = (self.rank, self.leader());
                (if rank >= leader { rank - leader } else { ranks - (leader - rank) }, ranks)
            }
        };
        (first.min(len)..len).step_by(every)
    }

    /// Whether the rank keeps exactly what it appended, so that its shard is as it should be when
    /// it has attended. Always so in a step of one token.
    pub fn keeps_appended(&self) -> bool {
        self.kept().len() == self.appended().len()
    }
}
