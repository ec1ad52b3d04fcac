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

mod sum;

use crate::config::{check_rows, check_sinks};
use crate::simd::InstructionSet;
use crate::tensor::SharedRows;
use crate::{Element, Error, Output, Result, TensorView, TensorViewMut};
use rayon::prelude::*;
use sum::{GROUP, Group};

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
    let instructions = InstructionSet::best();
    if one_by_one(partials.len(), shape[3]) {
        return for_each_row(out, lse, |index, [batch, seq, head], out, lse| {
            let partials = partials.iter().map(|p| (p.row(batch, seq, head), p.lse[index]));
            *lse = merge_row(partials, sink_of(sinks, head), out);
        });
    }
    let Some(rows) = OutputRows::new(out, lse)? else { return Ok(()) };
    let block = block_rows(shape[3]);
    let blocks = (0..rows.count().div_ceil(block)).into_par_iter();
    let blocks = blocks.with_min_len(ROWS_PER_TASK.div_ceil(block));
    blocks.for_each_init(totals, |totals, index| {
        let first = index * block;
        let count = block.min(rows.count() - first);
        let mut places = [RowPlace::default(); MOST_BLOCK_ROWS];
        for (row, place) in places[..count].iter_mut().enumerate() {
            *place = rows.place(first + row);
        }
        let block = Block {
            partials: partials.len(),
            rows: count,
            dim: shape[3],
            row: |part: usize, row: usize| {
                let [batch, seq, head] = places[row].at;
                partials[part].row(batch, seq, head)
            },
            lse: |part: usize, row: usize| partials[part].lse[places[row].lse],
            sink: |row: usize| sink_of(sinks, places[row].at[2]),
        };
        block.merge(instructions, totals, |row, total, scale, lse| {
            // SAFETY: every row is in one block.
            let (out, to_lse) = unsafe { rows.row(places[row]) };
            out.iter_mut().zip(total).for_each(|(out, total)| *out = O::from_f32(scale * total));
            if let Some(to_lse) = to_lse {
                *to_lse = lse;
            }
        });
    });
    Ok(())
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
        let scale = scale_of(max, sum);
        out.iter_mut().zip(total).for_each(|(out, total)| *out = O::from_f32(scale * total));
    }
    lse_of(max, sum)
}

/// Rows of a block at most: so many token rows of most head dims lie in a run of 16 KiB or more.
const MOST_BLOCK_ROWS: usize = 64;
/// Elements of a block: its sums stay in the caches next to the core.
const BLOCK_LEN: usize = MOST_BLOCK_ROWS * 128;

/// Rows of a block of so many columns.
pub(crate) fn block_rows(head_dim: usize) -> usize {
    (BLOCK_LEN / head_dim.max(1)).clamp(1, MOST_BLOCK_ROWS)
}

/// Whether [`merge_row`] is the faster for so many partials of a head dim: few partials are few
/// streams, and a block of long rows is one row.
pub(crate) fn one_by_one(partials: usize, head_dim: usize) -> bool {
    partials < GROUP || head_dim > BLOCK_LEN
}

/// Memory for the sums of a block.
pub(crate) fn totals() -> [f32; BLOCK_LEN] {
    [0.0; BLOCK_LEN]
}

/// The rows of a block, and where to find them.
pub(crate) struct Block<R, L, K> {
    pub partials: usize,
    pub rows: usize,
    pub dim: usize,
    /// The row of a partial: `row(partial, row)`.
    pub row: R,
    /// Its log-sum-exp.
    pub lse: L,
    /// The sink of a row, `-inf` for none.
    pub sink: K,
}

impl<'a, T, R, L, K> Block<R, L, K>
where
    T: Element,
    R: Fn(usize, usize) -> &'a [T],
    L: Fn(usize, usize) -> f32,
    K: Fn(usize) -> f32,
{
    /// What [`merge_row`] computes, bit by bit: but some of the partials over all rows before the
    /// next ones, so that few streams of memory are read at a time, and each in a long run.
    /// `write(row, total, scale, lse)` gets each row's result, which is `scale · total`.
    pub(crate) fn merge(
        self,
        instructions: InstructionSet,
        totals: &mut [f32; BLOCK_LEN],
        mut write: impl FnMut(usize, &[f32], f32, f32),
    ) {
        let (mut max, mut sum) = ([0f32; MOST_BLOCK_ROWS], [0f32; MOST_BLOCK_ROWS]);
        let (max, sum) = (&mut max[..self.rows], &mut sum[..self.rows]);
        for (row, max) in max.iter_mut().enumerate() {
            *max = (self.sink)(row);
        }
        for partial in 0..self.partials {
            for (row, max) in max.iter_mut().enumerate() {
                let lse = (self.lse)(partial, row);
                if lse != f32::NEG_INFINITY {
                    *max = maximum(*max, lse);
                }
            }
        }
        for (row, sum) in sum.iter_mut().enumerate() {
            *sum = ((self.sink)(row) - max[row]).exp();
        }
        let totals = &mut totals[..self.rows * self.dim];
        for first in (0..self.partials).step_by(GROUP) {
            let mut weights = [[None; GROUP]; MOST_BLOCK_ROWS];
            for partial in first..self.partials.min(first + GROUP) {
                for (row, weights) in weights[..self.rows].iter_mut().enumerate() {
                    let lse = (self.lse)(partial, row);
                    if lse != f32::NEG_INFINITY {
                        let weight = (lse - max[row]).exp();
                        sum[row] += weight;
                        weights[partial - first] = Some(weight);
                    }
                }
            }
            sum::add(instructions, first == 0, self.dim, totals, &|row| {
                let mut group = Group::default();
                for (i, weight) in weights[row].iter().enumerate() {
                    if let Some(weight) = *weight {
                        group.push((self.row)(first + i, row), weight);
                    }
                }
                group
            });
        }
        for (row, total) in totals.chunks_exact(self.dim).enumerate() {
            write(row, total, scale_of(max[row], sum[row]), lse_of(max[row], sum[row]));
        }
    }
}

/// The factor of a row's sum.
fn scale_of(max: f32, sum: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { 1.0 / sum }
}

fn lse_of(max: f32, sum: f32) -> f32 {
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
    let Some(rows) = OutputRows::new(out, lse)? else { return Ok(()) };
    (0..rows.count()).into_par_iter().with_min_len(ROWS_PER_TASK).for_each(|index| {
        let place = rows.place(index);
        let mut lost = f32::NEG_INFINITY;
        // SAFETY: every index comes once.
        let (out, own) = unsafe { rows.row(place) };
        row(place.lse, place.at, out, own.unwrap_or(&mut lost));
    });
    Ok(())
}

/// The rows of an output and its log-sum-exp, for threads that each write other rows.
struct OutputRows<'a, O> {
    out: SharedRows<'a, O>,
    lse: Option<SharedRows<'a, f32>>,
    /// Of the axes batch, seq and heads.
    extents: [usize; 3],
}

/// Where a row lies.
#[derive(Clone, Copy, Default)]
struct RowPlace {
    /// `[batch, seq, head]`
    at: [usize; 3],
    /// The index of its log-sum-exp.
    lse: usize,
}

impl<'a, O: Output> OutputRows<'a, O> {
    /// `None` if there are no elements: beside an axis without them the others may have any
    /// extents.
    fn new(out: TensorViewMut<'a, O>, lse: Option<&'a mut [f32]>) -> Result<Option<Self>> {
        let [batches, seqs, heads, _] = out.shape();
        if out.shape().contains(&0) {
            return Ok(None);
        }
        let lse = match lse {
            Some(lse) => {
                Some(SharedRows::new(TensorViewMut::contiguous("lse", lse, [batches, heads, seqs, 1])?))
            }
            None => None,
        };
        Ok(Some(Self { out: SharedRows::new(out), lse, extents: [batches, seqs, heads] }))
    }

    fn count(&self) -> usize {
        self.extents.iter().product()
    }

    /// The place of a row of this index, in the order of row-major outputs.
    fn place(&self, index: usize) -> RowPlace {
        let [_, seqs, heads] = self.extents;
        let at @ [batch, seq, head] = [index / heads / seqs, index / heads % seqs, index % heads];
        RowPlace { at, lse: (batch * heads + head) * seqs + seq }
    }

    /// # Safety
    /// No other reference to the same row may be alive, in this or any other thread.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row(&self, RowPlace { at: [batch, seq, head], .. }: RowPlace) -> (&mut [O], Option<&mut f32>) {
        // SAFETY: the caller's promise.
        let lse = self.lse.as_ref().map(|lse| unsafe { &mut lse.row(batch, head, seq)[0] });
        // SAFETY: as above.
        (unsafe { self.out.row(batch, seq, head) }, lse)
    }
}
