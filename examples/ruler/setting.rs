//! How a context is encoded: a row of the tables.

use super::llama::anchor::AnchorBlock;
use super::llama::error::{Error, Result};
use super::llama::run::{Mode, Scheme};
use star_attention::StarLayout;
use std::fmt;
use std::str::FromStr;

/// Attention over the context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Setting {
    /// Plain causal attention.
    Dense,
    Star(Star),
}

/// Star Attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Star {
    /// Tokens of a block, of the context's nominal length.
    pub block: Extent,
    /// Tokens of the anchor, of the block's.
    pub anchor: Extent,
    pub ranks: usize,
    /// What the anchor is made of.
    pub anchor_block: AnchorBlock,
}

/// A number of tokens: absolute, or a part of another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Extent {
    Tokens(usize),
    /// The whole, divided by this.
    Part(usize),
}

impl Extent {
    /// Tokens, where `whole` tokens are the whole: rounded up, so that as many parts hold it.
    pub fn of(self, whole: usize) -> usize {
        match self {
            Self::Tokens(tokens) => tokens,
            Self::Part(divisor) => whole.div_ceil(divisor),
        }
    }

    fn text(self, whole: &str) -> String {
        match self {
            Self::Tokens(tokens) => tokens.to_string(),
            Self::Part(1) => whole.to_owned(),
            Self::Part(divisor) => format!("{whole}/{divisor}"),
        }
    }
}

/// `4096` are tokens, `/4` a quarter, `/1` the whole.
impl FromStr for Extent {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parsed = match text.strip_prefix('/') {
            Some(divisor) => divisor.parse().ok().filter(|&divisor| divisor > 0).map(Self::Part),
            None => text.parse().ok().map(Self::Tokens),
        };
        parsed.ok_or_else(|| format!("expected tokens (4096) or a part (/4), got {text:?}"))
    }
}

impl Setting {
    /// For a context of `context_len` tokens that was asked to have `len`.
    ///
    /// # Errors
    /// [`Error::Attention`] for extents that make no layout.
    pub fn mode(&self, len: usize, context_len: usize) -> Result<Mode> {
        let Self::Star(star) = self else { return Ok(Mode::Dense) };
        let block = star.block.of(len);
        let layout = StarLayout::builder(context_len)
            .block_len(block)
            .anchor_len(star.anchor.of(block).min(block))
            .ranks(star.ranks)
            .build()?;
        Ok(Mode::Star(Scheme { anchor_block: star.anchor_block, ..Scheme::from(layout) }))
    }

    /// Refuses what no context could be encoded with.
    ///
    /// # Errors
    /// [`Error::Input`] naming the option.
    pub fn check(&self, len: usize) -> Result<()> {
        let Self::Star(star) = self else { return Ok(()) };
        let (block, most) = (star.block.of(len), 1024);
        if block == 0 {
            return Err(Error::input("--block", "expected at least 1 token, got 0"));
        }
        if star.anchor.of(block) > block {
            let reason =
                format!("expected at most the block's {block} tokens, got {}", star.anchor.of(block));
            return Err(Error::input("--anchor", reason));
        }
        if !(1..=most).contains(&star.ranks) {
            return Err(Error::input("--ranks", format!("expected 1 to {most}, got {}", star.ranks)));
        }
        Ok(())
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dense => write!(f, "dense"),
            Self::Star(star) => {
                write!(f, "star b={} a={}", star.block.text("L"), star.anchor.text("b"))?;
                if star.anchor_block != AnchorBlock::default() {
                    write!(f, " {:?}", star.anchor_block)?;
                }
                write!(f, " on {}", star.ranks)
            }
        }
    }
}
