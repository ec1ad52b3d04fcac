//! What a merge over ranks sends, whichever memory it runs in.

use crate::comm::{Link, MergeWay, Traffic};
use crate::{Element, Error, Result};
use std::marker::PhantomData;

/// A merge over ranks of partials of given extents: made once, it serves every layer.
///
/// It runs in CPU memory ([`on_cpu`](Self::on_cpu)) and in device memory (`on_device`).
#[derive(Clone, Copy, Debug)]
pub struct MergePlan<T, O> {
    /// `[batch, seq, heads, dim]`.
    pub(super) shape: [usize; 4],
    pub(super) ranks: usize,
    way: MergeWay,
    types: PhantomData<(T, O)>,
}

impl<T: Element, O: Element> MergePlan<T, O> {
    /// Partials with outputs `[batch, seq, heads, dim]` of `T` over `ranks`, merged into outputs of
    /// `O`, by the way that is cheapest on `link`.
    ///
    /// f32 partials round once, 16-bit ones are half the bytes. Every rank must make the plan with
    /// the same arguments.
    ///
    /// # Errors
    /// [`Error::Value`] for no rank, [`Error::Shape`] if dim is 0 or the messages could not be
    /// addressed.
    pub fn new(shape: [usize; 4], ranks: usize, link: &Link) -> Result<Self> {
        check_extents(shape, ranks)?;
        let plan = Self { shape, ranks, way: MergeWay::AllGather, types: PhantomData };
        Ok(plan.with_way(MergeWay::cheapest(link, ranks, plan.rows() * plan.row_bytes::<T>())))
    }

    /// The same merge, by another way.
    #[must_use]
    pub fn with_way(self, way: MergeWay) -> Self {
        Self { way, ..self }
    }

    /// How it merges.
    pub fn way(&self) -> MergeWay {
        self.way
    }

    /// What a rank sends in one merge.
    pub fn traffic(&self) -> Traffic {
        let step = |bytes: usize| Traffic::of(self.ranks - 1, bytes);
        match self.way {
            MergeWay::AllGather => step(self.rows() * self.row_bytes::<T>()),
            MergeWay::ByRows => {
                step(self.share() * self.row_bytes::<T>()) + step(self.share() * self.row_bytes::<O>())
            }
        }
    }

    fn row_bytes<E: Element>(&self) -> usize {
        self.shape[3] * size_of::<E>() + size_of::<f32>()
    }

    /// Rows of a partial.
    pub(super) fn rows(&self) -> usize {
        self.shape[..3].iter().product()
    }

    /// Rows of each rank's part of a message by rows. The last parts are filled up to as many.
    pub(super) fn share(&self) -> usize {
        self.rows().div_ceil(self.ranks)
    }

    /// Rows of a message: those of a partial, filled up by rows to a share for each rank.
    pub(super) fn message_rows(&self) -> usize {
        match self.way {
            MergeWay::AllGather => self.rows(),
            MergeWay::ByRows => self.ranks * self.share(),
        }
    }

    /// Rows that a rank merges by rows. The last ranks may have fewer than a share, or none.
    pub(super) fn own_rows(&self, rank: usize) -> usize {
        self.rows().saturating_sub(rank.saturating_mul(self.share())).min(self.share())
    }

    /// Strides of a partial's outputs in a message. Shares are cut from outputs and log-sum-exps
    /// alike, so by rows both have heads before tokens.
    pub(super) fn strides(&self) -> [usize; 4] {
        let [_, seq, heads, dim] = self.shape;
        if self.rows() == 0 {
            return [0; 4];
        }
        match self.way {
            MergeWay::AllGather => [seq * heads * dim, heads * dim, dim, 1],
            MergeWay::ByRows => [seq * heads * dim, dim, seq * dim, 1],
        }
    }

    /// Refuses a group of another size.
    pub(super) fn check_group(&self, size: usize) -> Result<()> {
        if size != self.ranks {
            return Err(Error::value("group", format!("of {} ranks", self.ranks), size));
        }
        Ok(())
    }
}

/// Refuses merges over no rank, of no elements, or whose messages could not be addressed.
fn check_extents(shape: [usize; 4], ranks: usize) -> Result<()> {
    if ranks == 0 {
        return Err(Error::value("ranks", "at least 1", ranks));
    }
    // A row is at most dim + 1 words of 4 bytes; all messages together have less than 4 ranks + 4
    // times all rows, each share rounded up.
    let extents = [shape[0], shape[1], shape[2], shape[3].saturating_add(1), ranks, 16];
    let words = extents.iter().try_fold(4usize, |n, &extent| n.checked_mul(extent.max(1)));
    if shape[3] == 0 || words.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
        let expected = "dim of at least 1, and extents that can be addressed";
        return Err(Error::shape("partial", expected, format!("{shape:?}")));
    }
    Ok(())
}
