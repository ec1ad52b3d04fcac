//! Which keys a query row sees.

mod blocks;

pub use blocks::BlockList;

use crate::{Error, Result};
use std::sync::Arc;

/// Which keys a query row sees.
///
/// Masks are aligned at the bottom right: with `T` query rows and `S` keys, row `i` stands at
/// position `p = i + S - T` of the keys. Under a mask that is causal a row at a negative position
/// sees nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mask {
    /// Every key.
    #[default]
    Full,
    /// Keys `0..=p`.
    Causal,
    /// A window around each row's position: keys `p - left..=p + right`, as far as there are any.
    Window {
        /// Keys before `p` that the row sees; all if `None`.
        left: Option<usize>,
        /// Keys behind `p` that the row sees; all if `None`. With 0 the window is causal.
        right: Option<usize>,
    },
    /// Context encoding of Star Attention (paper section 2.1), as one mask over a rank's local
    /// sequence.
    ///
    /// Block 0 is positions `0..first_block_len` and is causal. Every later block has `block_len`
    /// positions (the last may be short); its rows see keys `0..anchor_len` and their own block up
    /// to `p`.
    Star {
        /// Keys every row sees, unless it lies in block 0 (where it is causal). At most
        /// `first_block_len` and `block_len`.
        anchor_len: usize,
        /// Tokens of every block but block 0; at least 1.
        block_len: usize,
        /// Tokens of block 0: `block_len` on the rank that holds the start of the context,
        /// `anchor_len` on the others.
        first_block_len: usize,
        /// If `Some(n)`, a row sees of its own block only the keys from `p - n` on, and those of
        /// the anchor up to `p`, also in block 0: for layers with a sliding window.
        left: Option<usize>,
    },
    /// For each tile of rows the ranges of keys that it sees.
    Blocks(Arc<BlockList>),
}

impl Mask {
    /// The causal window of `window` keys, the row's own among them: keys `p - window + 1..=p`.
    /// This is `sliding_window` of Hugging Face's models; FlashAttention's `window_size` is then
    /// `(window - 1, 0)`.
    ///
    /// # Errors
    /// [`Error::Value`] for a window of 0, in which a row would see nothing.
    pub fn sliding_window(window: usize) -> Result<Self> {
        Self::Causal.with_sliding_window(window)
    }

    /// The same mask, where a row sees of the keys up to its position only the last `window`, its
    /// own among them. Under a star mask it still sees the anchor.
    ///
    /// # Errors
    /// [`Error::Value`] for a window of 0, or a mask of blocks, whose ranges say what is seen.
    pub fn with_sliding_window(self, window: usize) -> Result<Self> {
        let Some(left) = window.checked_sub(1) else {
            return Err(Error::value("sliding_window", "at least 1", window));
        };
        let left = |own: Option<usize>| Some(own.map_or(left, |own| own.min(left)));
        Ok(match self {
            Self::Full => Self::Window { left: left(None), right: None },
            Self::Causal => Self::Window { left: left(None), right: Some(0) },
            Self::Window { left: own, right } => Self::Window { left: left(own), right },
            Self::Star { anchor_len, block_len, first_block_len, left: own } => {
                Self::Star { anchor_len, block_len, first_block_len, left: left(own) }
            }
            Self::Blocks(_) => return Err(Error::value("mask", "one without a block list", "a block list")),
        })
    }

    /// Causal attention within chunks of `chunk_len` positions, as in Llama 4: a star mask without
    /// anchor.
    ///
    /// # Errors
    /// [`Error::Value`] for chunks of 0 positions.
    pub fn chunked(chunk_len: usize) -> Result<Self> {
        if chunk_len == 0 {
            return Err(Error::value("chunk_len", "at least 1", chunk_len));
        }
        Ok(Self::Star { anchor_len: 0, block_len: chunk_len, first_block_len: chunk_len, left: None })
    }

    /// # Errors
    /// [`Error::Value`] for a star mask without blocks, or with an anchor longer than its blocks.
    pub fn validate(&self) -> Result<()> {
        if let Self::Star { anchor_len, block_len, first_block_len, .. } = *self {
            if block_len == 0 {
                return Err(Error::value("block_len", "at least 1", block_len));
            }
            if anchor_len > block_len.min(first_block_len) {
                let most = format!("at most block_len {block_len} and first_block_len {first_block_len}");
                return Err(Error::value("anchor_len", most, anchor_len));
            }
        }
        Ok(())
    }

    /// Checks the mask of `query_len` rows over `key_len` keys.
    ///
    /// # Errors
    /// As [`validate`](Self::validate), and [`Error::Value`] for a block list that is not of these
    /// rows, or names keys that are not there.
    pub fn validate_for(&self, query_len: usize, key_len: usize) -> Result<()> {
        self.validate()?;
        match self {
            Self::Blocks(blocks) => blocks.check(query_len, key_len),
            _ => Ok(()),
        }
    }
}

impl From<BlockList> for Mask {
    fn from(blocks: BlockList) -> Self {
        Self::Blocks(Arc::new(blocks))
    }
}
