//! What stands before a block while it is encoded: the anchor, and what the paper puts in its place
//! to find out why it works.

use super::error::{Error, Result};
use super::model::Llama;
use super::random::Random;
use super::run::Scheme;
use star_attention::comm::AnchorKv;
use star_attention::{RankLayout, StarLayout};

/// Content and positions of the anchor block (paper section 4.1). Block 0 has none in any case, and
/// the length is that of the layout's anchor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AnchorBlock {
    /// The context's first tokens at their own positions: Star Attention.
    #[default]
    First,
    /// None: each block sees only itself.
    None,
    /// The context's first tokens, at the positions of the previous block.
    FirstAtPrevious,
    /// The context's first tokens, at random positions before the block, ascending.
    FirstAtRandom { seed: u64 },
    /// One token throughout, at the first positions.
    Constant(u32),
    /// Random tokens at the first positions, the same for every block: ids from `from` to the
    /// vocabulary's last.
    Random { seed: u64, from: u32 },
    /// The context's first tokens in random order, the same for every block, at the first
    /// positions.
    Shuffled { seed: u64 },
    /// The previous block's first tokens at their own positions.
    Previous,
}

impl AnchorBlock {
    /// The tokens before a rank's own, and their positions. `layout` and `rank` are of a [`Scheme`]
    /// that was [`checked`](Scheme::checked).
    pub fn rows(
        self,
        layout: &StarLayout,
        local: &RankLayout,
        context: &[u32],
        vocab_size: usize,
    ) -> (Vec<u32>, Vec<usize>) {
        let (first, block) = (local.anchor_tokens(), local.own_tokens().start);
        let previous = block.saturating_sub(layout.block_len());
        let previous = previous..previous + first.len();
        let positions = match self {
            Self::FirstAtPrevious | Self::Previous => previous.clone().collect(),
            Self::FirstAtRandom { seed } => {
                Random(seed.wrapping_add(block as u64)).ascending(0..block, first.len())
            }
            _ => first.clone().collect(),
        };
        let mut tokens = context[if self == Self::Previous { previous } else { first }].to_vec();
        match self {
            Self::Constant(token) => tokens.fill(token),
            Self::Random { seed, from } => {
                let mut random = Random(seed);
                tokens.fill_with(|| random.within(from..vocab_size as u32));
            }
            Self::Shuffled { seed } => Random(seed).shuffle(&mut tokens),
            _ => {}
        }
        (tokens, positions)
    }

    /// Whether a rank can have several blocks: they share one anchor, and on rank 0 that is the
    /// head of block 0 itself.
    fn is_shared(self) -> bool {
        matches!(self, Self::First | Self::None)
    }
}

impl Scheme {
    /// The scheme, its layout without an anchor where the anchor block is none.
    ///
    /// # Errors
    /// [`Error::Input`] for an anchor block other than the first that is to be received; for
    /// content or positions of its own while a rank has several blocks; for a token outside the
    /// vocabulary.
    pub fn checked(mut self, model: &Llama) -> Result<Self> {
        let Self { layout, anchor, anchor_block, .. } = self;
        if anchor_block != AnchorBlock::First && anchor == AnchorKv::Received {
            let reason = format!("expected the first block where ranks receive it, got {anchor_block:?}");
            return Err(Error::input("anchor block", reason));
        }
        if !anchor_block.is_shared() && layout.blocks() > layout.ranks() {
            let (blocks, ranks) = (layout.blocks(), layout.ranks());
            let reason = format!(
                "expected at most 1 block for each of {ranks} ranks under {anchor_block:?}, got {blocks} blocks"
            );
            return Err(Error::input("anchor block", reason));
        }
        match anchor_block {
            AnchorBlock::Constant(token) | AnchorBlock::Random { from: token, .. } => {
                model.check_ids("anchor block", &[token])?
            }
            AnchorBlock::None => {
                self.layout = layout.to_builder().anchor_len(0).build()?;
            }
            _ => {}
        }
        Ok(self)
    }
}
