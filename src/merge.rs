//! The exact softmax over several sets of keys, from the partial attention over each.
//!
//! With partials `(out_i, lse_i)` over disjoint keys and `m = max_i lse_i`:
//!
//! ```text
//! out = Σ_i exp(lse_i - m) out_i / Σ_i exp(lse_i - m)        lse = m + ln Σ_i exp(lse_i - m)
//! ```
//!
//! in f32, natural logarithm (paper section 2.2; line 19 of its Algorithm 2 misses the weights'
//! shift). The identity is `(0, -inf)`: a partial with `lse = -inf` saw no key and counts for
//! nothing, whatever its output holds. A NaN stays in its row.
//!
//! Attention sinks (as gpt-oss has them: one logit for each head) are one more part of each row,
//! with the log-sum-exp `sink` and without a value. They count once, in the merge that finishes a
//! row: [`merge_with_sinks`], or the `sinks` of other merges. No partial holds them.
//!
//! A log-sum-exp of `+inf` is not taken for an empty row: it is what scores beyond f32 have, so the
//! merged row is NaN, output and log-sum-exp. FlashAttention-2 marks rows that saw no key by `+inf`
//! (those with a NaN too): write `-inf` for it where the output is not NaN, before merging its
//! partials. All merges do so, on every backend and over ranks.
//!
//! Partials are summed in the order given, so the same list gives the same bits.

use crate::config::{check_rows, check_sinks};
use crate::tensor::SharedRows;
use crate::{Element, Error, Output, Result, TensorView, TensorViewMut};
use rayon::prelude::*;

/// Attention over some of the keys: an output and its log-sum-exp, in the memory of any backend.
#[derive(Clone, Copy, Debug)]
pub struct PartialOf<V, L> {
    /// `[batch, seq, heads, dim]`, the last axis contiguous.
    pub out: V,
    /// f32 `[batch, heads, seq]`, natural logarithm; `-inf` where no key was seen, never `+inf`.
    pub lse: L,
}

/// Attention over some of the keys, in the CPU's memory.
pub type Partial<'a, T> = PartialOf<TensorView<'a, T>, &'a [f32]>;

impl<T: Element> Partial<'_, T> {
    pub(crate) fn check(&self, expected: [usize; 4]) -> Result<()> {
        check_rows("partial", expected, self.out.shape(), self.out.strides())?;
        check_lse("partial", expected, self.lse)
    }

    /// The output of one head of one token.
    pub(crate) fn row(&self, batch: usize, seq: usize, head: usize) -> &[T] {
        let [batch_stride, seq_stride, head_stride, _] = self.out.strides();
        let start = batch * batch_stride + seq * seq_stride + head * head_stride;
        &self.out.data()[start..start + self.out.shape()[3]]
    }
}

fn check_out<O: Output>(out: &TensorViewMut<'_, O>, lse: Option<&[f32]>) -> Result<()> {
    let shape = out.shape();
    if shape[3] == 0 {
        return Err(Error::shape("out", "head_dim of at least 1", format!("{shape:?}")));
    }
    check_rows("out", shape, shape, out.strides())?;
    lse.map_or(Ok(()), |lse| check_lse("lse", shape, lse))
}

pub(crate) fn check_lse(
    argument: &'static str,
    [batch, seq, heads, _]: [usize; 4],
    lse: &[f32],
) -> Result<()> {
    let rows = batch.checked_mul(heads).and_then(|rows| rows.checked_mul(seq));
    if rows != Some(lse.len()) {
        let expected = format!("lse {:?}", [batch, heads, seq]);
        return Err(Error::shape(argument, expected, format!("{} elements", lse.len())));
    }
    Ok(())
}

/// Merges any number of partials into `out` `[batch, seq, heads, dim]`, which may be uninitialised
/// memory, and `lse` `[batch, heads, seq]`.
///
/// No partial at all gives the identity.
///
/// # Errors
/// [`Error::Shape`] or [`Error::Stride`] (last axes must be contiguous) if they do not fit
/// together.
pub fn merge<T: Element, O: Output>(
    partials: &[Partial<'_, T>],
    out: TensorViewMut<'_, O>,
    lse: &mut [f32],
) -> Result<()> {
    merge_rows(partials, None, out, Some(lse))
}

/// [`merge`] with attention sinks `[heads]`, for rows that it finishes:
///
/// ```text
/// out = Σ_i exp(lse_i) out_i / (Σ_i exp(lse_i) + exp(sink))
/// lse = ln(Σ_i exp(lse_i) + exp(sink))
/// ```
///
/// A row without keys gives 0 and its sink; a sink of `-inf` is none.
///
/// # Errors
/// As [`merge`], [`Error::Shape`] for another number of sinks, and [`Error::Value`] for one that is
/// NaN or `+inf`.
pub fn merge_with_sinks<T: Element, O: Output>(
    partials: &[Partial<'_, T>],
    sinks: &[f32],
    out: TensorViewMut<'_, O>,
    lse: &mut [f32],
) -> Result<()> {
    merge_rows(partials, Some(sinks), out, Some(lse))
}

/// [`merge`], with or without sinks and the log-sum-exp.
pub(crate) fn merge_rows<T: Element, O: Output>(
    partials: &[Partial<'_, T>],
    sinks: Option<&[f32]>,
    out: TensorViewMut<'_, O>,
    lse: Option<&mut [f32]>,
) -> Result<()> {
    let shape = out.shape();
    check_out(&out, lse.as_deref())?;
    check_sinks(shape[2], sinks)?;
    partials.iter().try_for_each(|partial| partial.check(shape))?;
    for_each_row(out, lse, |index, [batch, seq, head], out, lse| {
        let partials = partials.iter().map(|p| (p.row(batch, seq, head), p.lse[index]));
        *lse = merge_row(partials, sink_of(sinks, head), out);
    })
}

/// The sink of a head, `-inf` if there is none.
pub(crate) fn sink_of(sinks: Option<&[f32]>, head: usize) -> f32 {
    sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[head])
}

/// Merges `other` into `(out, lse)`, in place. To add sinks in the end, finish with
/// [`merge_with_sinks`] of this one partial.
///
/// # Errors
/// [`Error::Shape`] or [`Error::Stride`] (last axes must be contiguous) if they do not fit
/// together.
pub fn merge_into<T: Element>(
    out: TensorViewMut<'_, f32>,
    lse: &mut [f32],
    other: &Partial<'_, T>,
) -> Result<()> {
    let shape = out.shape();
    check_out(&out, Some(lse))?;
    other.check(shape)?;
    for_each_row(out, Some(lse), |index, [batch, seq, head], out, lse| {
        let (other_row, other_lse) = (other.row(batch, seq, head), other.lse[index]);
        // Before any key was seen `out` may hold anything.
        if *lse == f32::NEG_INFINITY {
            out.fill(0.0);
        }
        if other_lse == f32::NEG_INFINITY {
            return;
        }
        let max = maximum(*lse, other_lse);
        let (mine, theirs) = ((*lse - max).exp(), (other_lse - max).exp());
        let sum = mine + theirs;
        let (scale, other_scale) = (mine / sum, theirs / sum);
        for (out, &x) in out.iter_mut().zip(other_row) {
            *out = scale * *out + other_scale * x.to_f32();
        }
        *lse = max + sum.ln();
    })
}

/// Merges `(out_i, lse_i)` of one row, and its sink (`-inf` for none), into `out`; returns its
/// log-sum-exp.
pub(crate) fn merge_row<'a, T: Element, O: Output>(
    partials: impl Iterator<Item = (&'a [T], f32)> + Clone,
    sink: f32,
    out: &mut [O],
) -> f32 {
    let seen = partials.filter(|&(_, lse)| lse != f32::NEG_INFINITY);
    let max = seen.clone().fold(sink, |max, (_, lse)| maximum(max, lse));
    let mut sum = 0f32;
    // Summed in f32 on the stack, so that `out` may be of any type: most heads in one go.
    const COLUMNS: usize = 128;
    for (chunk, out) in out.chunks_mut(COLUMNS).enumerate() {
        let (mut total, columns) = ([0f32; COLUMNS], out.len());
        // Of the sink alone: 0 without one.
        sum = (sink - max).exp();
        for (row, lse) in seen.clone() {
            let weight = (lse - max).exp();
            sum += weight;
            let row = &row[chunk * COLUMNS..][..columns];
            total[..columns].iter_mut().zip(row).for_each(|(total, &x)| *total += weight * x.to_f32());
        }
        let scale = if max == f32::NEG_INFINITY { 0.0 } else { 1.0 / sum };
        out.iter_mut().zip(total).for_each(|(out, total)| *out = O::from_f32(scale * total));
    }
    if max == f32::NEG_INFINITY { max } else { max + sum.ln() }
}

/// The larger of two, or NaN if one is.
fn maximum(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

/// Below this a thread's start costs more than the rows it takes over.
pub(crate) const ROWS_PER_TASK: usize = 64;

/// Calls `row(index of lse, [batch, seq, head], out, lse)` for each row, in the order of row-major
/// outputs, in parallel where there are many. Without `lse` what is written there is lost.
pub(crate) fn for_each_row<O: Output>(
    out: TensorViewMut<'_, O>,
    lse: Option<&mut [f32]>,
    row: impl Fn(usize, [usize; 3], &mut [O], &mut f32) + Sync,
) -> Result<()> {
    let [batches, seqs, heads, _] = out.shape();
    // Beside an axis without elements the others may have any extents.
    if out.shape().contains(&0) {
        return Ok(());
    }
    let out = SharedRows::new(out);
    let lse = match lse {
        Some(lse) => Some(SharedRows::new(TensorViewMut::contiguous("lse", lse, [batches, heads, seqs, 1])?)),
        None => None,
    };
    (0..batches * seqs * heads).into_par_iter().with_min_len(ROWS_PER_TASK).for_each(|index| {
        let (batch, seq, head) = (index / heads / seqs, index / heads % seqs, index % heads);
        let lse_index = (batch * heads + head) * seqs + seq;
        let mut lost = f32::NEG_INFINITY;
        // SAFETY: every index comes once.
        let own = lse.as_ref().map(|lse| unsafe { &mut lse.row(batch, head, seq)[0] });
        // SAFETY: as above.
        let out = unsafe { out.row(batch, seq, head) };
        row(lse_index, [batch, seq, head], out, own.unwrap_or(&mut lost));
    });
    Ok(())
}
