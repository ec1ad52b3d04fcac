//! How a layer's keys or values lie in memory: `[pages, kv_heads, page_len, dim]`, so that the
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
    dims: [usize; 2],
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
    /// from 0 on. `dims` are the elements of a row of keys and of values.
    pub(super) fn new(
        backend: &B,
        dims: [usize; 2],
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
        Ok(Self { calls, dims })
    }

    pub(super) fn run<T: Element>(
        &self,
        backend: &B,
        [from_key, from_value]: &Layer<B, T>,
        [to_key, to_value]: &mut Layer<B, T>,
    ) -> Result<()> {
        let [key_dim, value_dim] = self.dims;
        for Call { from, to, count, rows, places } in &self.calls {
            // A plane is a page of one head.
            let shape = |rows, dim| [*count, rows, 1, dim];
            let strides = |planes: &Planes, dim| [planes.len * dim, dim, dim, 1];
            let part = |planes: &Planes, dim| planes.first * planes.len * dim..;
            let read = |argument, buffer, dim| {
                B::view(
                    argument,
                    backend.slice(buffer, part(from, dim)),
                    shape(*rows, dim),
                    strides(from, dim),
                )
            };
            let write = |argument, buffer, dim| {
                let slice = backend.slice_mut(buffer, part(to, dim));
                B::view_mut(argument, slice, shape(to.len, dim), strides(to, dim))
            };
            let new = Append::new(
                read("key", from_key, key_dim)?,
                read("value", from_value, value_dim)?,
                backend.slice(places, ..),
            );
            backend.append(
                new,
                write("cache_key", to_key, key_dim)?,
                write("cache_value", to_value, value_dim)?,
            )?;
        }
        Ok(())
    }
}
