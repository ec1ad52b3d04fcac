//! How a layer's keys or values lie in memory: `[pages, kv_heads, page_len, head_dim]`, so that the
//! keys of a head are contiguous. A *plane* is one head's rows of one page.

use crate::{Append, Backend, Element, LEFT_OUT, Result};

/// Keys and values of one layer.
pub(super) type Layer<B, T> = [<B as Backend>::Buffer<T>; 2];

/// Rows of planes that one call copies at most, unless a plane has more.
const ROWS_PER_CALL: usize = 1 << 20;

/// Consecutive planes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planes {
    pub(super) first: usize,
    /// Rows of a plane.
    pub(super) len: usize,
}

/// Rows that go from planes to as many others, in the order of memory: row by row to the same rows.
pub(super) struct PlaneCopy<B: Backend> {
    calls: Vec<Call<B>>,
    head_dim: usize,
}

struct Call<B: Backend> {
    from: Planes,
    to: Planes,
    count: usize,
    /// Rows of each plane that are looked at.
    rows: usize,
    places: B::Buffer<u32>,
}

impl<B: Backend> PlaneCopy<B> {
    /// A copy of the first rows of `count` planes: as many of each as `rows` says, by its number
    /// from 0 on.
    pub(super) fn new(
        backend: &B,
        head_dim: usize,
        (from, to): (Planes, Planes),
        count: usize,
        rows: impl Fn(usize) -> usize,
    ) -> Result<Self> {
        let mut calls = Vec::new();
        let at_once = (ROWS_PER_CALL / from.len.max(to.len).max(1)).max(1);
        for first in (0..count).step_by(at_once) {
            let count = at_once.min(count - first);
            let most = (first..first + count).map(&rows).max().unwrap_or(0);
            if most == 0 {
                continue;
            }
            let place = |plane: usize, row: usize| match row < rows(first + plane) {
                true => (plane * to.len + row) as u32,
                false => LEFT_OUT,
            };
            let places: Vec<u32> =
                (0..count).flat_map(|plane| (0..most).map(move |row| place(plane, row))).collect();
            calls.push(Call {
                from: Planes { first: from.first + first, ..from },
                to: Planes { first: to.first + first, ..to },
                count,
                rows: most,
                places: backend.buffer_of(&places)?,
            });
        }
        Ok(Self { calls, head_dim })
    }

    pub(super) fn run<T: Element>(
        &self,
        backend: &B,
        [from_key, from_value]: &Layer<B, T>,
        [to_key, to_value]: &mut Layer<B, T>,
    ) -> Result<()> {
        let dim = self.head_dim;
        for Call { from, to, count, rows, places } in &self.calls {
            // A plane is a page of one head.
            let shape = |rows| [*count, rows, 1, dim];
            let strides = |planes: &Planes| [planes.len * dim, dim, dim, 1];
            let part = |planes: &Planes| planes.first * planes.len * dim..;
            let read = |argument, buffer| {
                B::view(argument, backend.slice(buffer, part(from)), shape(*rows), strides(from))
            };
            let write = |argument, buffer| {
                B::view_mut(argument, backend.slice_mut(buffer, part(to)), shape(to.len), strides(to))
            };
            let new =
                Append::new(read("key", from_key)?, read("value", from_value)?, backend.slice(places, ..));
            backend.append(new, write("cache_key", to_key)?, write("cache_value", to_value)?)?;
        }
        Ok(())
    }
}
