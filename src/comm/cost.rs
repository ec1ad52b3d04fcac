//! What a collective takes, and which way of working is the cheaper one.
//!
//! With latency `α`, bandwidth `β` of one rank, `H` ranks and messages of `n` bytes a rank:
//!
//! ```text
//! all-gather        α + (H-1) n / β
//! all-to-all        α + (H-1)/H n / β
//! broadcast         min(α + (H-1) n / β,  2α + 2 (H-1)/H n / β)       to each, or in parts that all pass on
//! ```

use crate::{Error, Result};

/// What sending between the ranks of a group takes.
///
/// Ways are chosen by it, so it must be the same on every rank: [`agree`](super::agree) compares
/// it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Seconds that a collective takes whatever its length.
    pub latency: f64,
    /// Bytes that a rank sends in a second, while it receives as many.
    pub bandwidth: f64,
}

impl Link {
    /// A link.
    ///
    /// # Errors
    /// [`Error::Value`] for a latency that is negative or not finite, or a bandwidth that is not
    /// above 0.
    pub fn new(latency: f64, bandwidth: f64) -> Result<Self> {
        if !(latency >= 0.0 && latency.is_finite()) {
            return Err(Error::value("latency", "a finite number of seconds, not negative", latency));
        }
        if bandwidth.is_nan() || bandwidth <= 0.0 {
            return Err(Error::value("bandwidth", "bytes per second above 0", bandwidth));
        }
        Ok(Self { latency, bandwidth })
    }

    /// Seconds for every rank to have `bytes` of every rank.
    pub fn all_gather(&self, ranks: usize, bytes: usize) -> f64 {
        self.seconds(1.0, others(ranks) * bytes as f64)
    }

    /// Seconds for every rank to have its share of `bytes` of every rank.
    pub fn all_to_all(&self, ranks: usize, bytes: usize) -> f64 {
        self.seconds(1.0, others(ranks) / ranks.max(1) as f64 * bytes as f64)
    }

    /// Seconds for every rank to have `bytes` of one.
    pub fn broadcast(&self, ranks: usize, bytes: usize) -> f64 {
        let to_each = self.seconds(1.0, others(ranks) * bytes as f64);
        let in_parts = self.seconds(2.0, 2.0 * others(ranks) / ranks.max(1) as f64 * bytes as f64);
        to_each.min(in_parts)
    }

    fn seconds(&self, steps: f64, bytes: f64) -> f64 {
        steps * self.latency + bytes / self.bandwidth
    }
}

fn others(ranks: usize) -> f64 {
    ranks.saturating_sub(1) as f64
}

/// How the partials of all ranks become one on each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeWay {
    /// One all-gather of every partial; every rank merges all rows. The fewest steps: for few query
    /// tokens.
    AllGather,
    /// An all-to-all that gives each rank its share of every partial's rows (by heads, where there
    /// is one query token and the ranks divide the heads); it merges them, and an all-gather of
    /// what is merged. The fewest bytes: for many query tokens.
    ByRows,
}

impl MergeWay {
    /// The way that takes less time on `link`, for partials of `bytes` a rank.
    ///
    /// By rows from `bytes > α β / ((H-1) (1 - 2/H))` on; with two ranks never.
    pub fn cheapest(link: &Link, ranks: usize, bytes: usize) -> Self {
        let [all_gather, by_rows] =
            [Self::AllGather, Self::ByRows].map(|way| way.seconds(link, ranks, bytes));
        if by_rows < all_gather { Self::ByRows } else { Self::AllGather }
    }

    /// Seconds that messages take this way, for partials of `bytes` a rank.
    pub fn seconds(self, link: &Link, ranks: usize, bytes: usize) -> f64 {
        match self {
            Self::AllGather => link.all_gather(ranks, bytes),
            Self::ByRows => {
                link.all_to_all(ranks, bytes) + link.all_gather(ranks, bytes.div_ceil(ranks.max(1)))
            }
        }
    }
}

/// How ranks come by the keys and values of the anchor in context encoding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AnchorKv {
    /// Every rank encodes the anchor's tokens before its own: no message.
    #[default]
    Encoded,
    /// Rank 0, whose block they head, sends them to all, layer by layer.
    Received,
}

impl AnchorKv {
    /// The cheaper one for a layer whose anchor has `bytes` of keys and values, and takes a rank
    /// `encode_seconds` to encode.
    ///
    /// Ranks reach a layer at the same time either way, as rank 0 never has more rows than the
    /// others.
    pub fn cheapest(link: &Link, ranks: usize, bytes: usize, encode_seconds: f64) -> Self {
        if ranks > 1 && link.broadcast(ranks, bytes) < encode_seconds {
            Self::Received
        } else {
            Self::Encoded
        }
    }
}
