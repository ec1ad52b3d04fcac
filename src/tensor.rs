//! Borrowed, strided views of `[batch, seq, heads, dim]` tensors.
//!
//! A view of a `[batch, heads, seq, dim]` buffer is the same thing with other strides:
//! `TensorView::new("q", data, [batch, heads, seq, dim], strides)?.swap_seq_heads()`.

use crate::{Element, Error, Output, Result};

/// The extents and strides of a view, checked against its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Strided {
    pub(crate) shape: [usize; 4],
    pub(crate) strides: [usize; 4],
}

impl Strided {
    /// Accepts strides under which every index lies inside `len` elements and no two indices meet:
    /// for tensors that are written.
    ///
    /// Axes must nest: taken from the smallest stride up, each one steps over all that lies below
    /// it. Any permutation and any padding passes; only interleaved axes, which no framework makes,
    /// are refused.
    pub(crate) fn new(
        argument: &'static str,
        len: usize,
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<Self> {
        if (0..4).any(|axis| shape[axis] > 1 && strides[axis] == 0) && !shape.contains(&0) {
            let got = format!("{strides:?} for shape {shape:?}");
            return Err(Error::stride(argument, "that never overlap", got));
        }
        Self::read_only(argument, len, shape, strides)
    }

    /// The same for tensors that are only read: an axis of stride 0 repeats its elements.
    pub(crate) fn read_only(
        argument: &'static str,
        len: usize,
        shape: [usize; 4],
        mut strides: [usize; 4],
    ) -> Result<Self> {
        let given = strides;
        let got = || format!("{given:?} for shape {shape:?}");
        // Steps that are never taken may be anything; as 0 they do no harm in address arithmetic.
        for axis in 0..4 {
            if shape[axis] <= 1 || shape.contains(&0) {
                strides[axis] = 0;
            }
        }
        if shape.contains(&0) {
            return Ok(Self { shape, strides });
        }
        let mut axes = [0, 1, 2, 3];
        axes.sort_by_key(|&axis| strides[axis]);
        let mut last = 0usize; // the offset of the last element over the axes seen so far
        for axis in axes {
            if strides[axis] == 0 {
                continue;
            }
            if strides[axis] <= last {
                return Err(Error::stride(argument, "that never overlap", got()));
            }
            last = (shape[axis] - 1)
                .checked_mul(strides[axis])
                .and_then(|span| last.checked_add(span))
                .ok_or_else(|| Error::stride(argument, "that fit in memory", got()))?;
        }
        if last >= len {
            return Err(Error::stride(argument, format!("inside the buffer of {len} elements"), got()));
        }
        Ok(Self { shape, strides })
    }

    pub(crate) fn contiguous(argument: &'static str, len: usize, shape: [usize; 4]) -> Result<Self> {
        let elements = shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
        if elements != Some(len) {
            return Err(Error::shape(argument, format!("of {len} elements"), format!("{shape:?}")));
        }
        let [_, seq, heads, dim] = shape;
        // Without elements no step is taken, and the products may be out of range.
        let strides = if len == 0 { [0; 4] } else { [seq * heads * dim, heads * dim, dim, 1] };
        Ok(Self { shape, strides })
    }

    fn offset(&self, index: [usize; 4]) -> usize {
        (0..4).map(|axis| index[axis] * self.strides[axis]).sum()
    }

    pub(crate) fn swap_seq_heads(mut self) -> Self {
        self.shape.swap(1, 2);
        self.strides.swap(1, 2);
        self
    }

    pub(crate) fn narrow(mut self, axis: usize, start: usize, len: usize) -> Result<(Self, usize)> {
        if axis > 3 {
            return Err(Error::value("axis", "0 to 3", axis));
        }
        if start.checked_add(len).is_none_or(|end| end > self.shape[axis]) {
            return Err(Error::value(
                "narrow",
                format!("a range inside 0..{}", self.shape[axis]),
                format!("{len} from {start}"),
            ));
        }
        self.shape[axis] = len;
        let empty = self.shape.contains(&0);
        Ok((self, if empty { 0 } else { start * self.strides[axis] }))
    }

    /// Every `step`-th index of one axis, from `first` on.
    pub(crate) fn every(self, axis: usize, first: usize, step: usize) -> Result<(Self, usize)> {
        if axis > 3 {
            return Err(Error::value("axis", "0 to 3", axis));
        }
        if step == 0 {
            return Err(Error::value("step", "at least 1", step));
        }
        let len = self.shape[axis].saturating_sub(first).div_ceil(step);
        let start = if len == 0 { 0 } else { first };
        let (mut view, offset) = self.narrow(axis, start, len)?;
        view.strides[axis] = if len <= 1 { 0 } else { view.strides[axis] * step };
        Ok((view, offset))
    }
}

/// A borrowed tensor `[batch, seq, heads, dim]`, read only.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a, T> {
    data: &'a [T],
    layout: Strided,
}

impl<'a, T: Element> TensorView<'a, T> {
    /// A view of `data` with explicit strides, in elements. An axis of stride 0 repeats its
    /// elements: one context serves many queries without a copy.
    ///
    /// # Errors
    /// [`Error::Stride`], naming `argument`, if an index leaves `data`, or two indices meet along
    /// axes of other strides.
    pub fn new(
        argument: &'static str,
        data: &'a [T],
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<Self> {
        Ok(Self { data, layout: Strided::read_only(argument, data.len(), shape, strides)? })
    }

    /// A row-major view of the whole of `data`.
    ///
    /// # Errors
    /// [`Error::Shape`], naming `argument`, if `shape` has not exactly `data.len()` elements.
    pub fn contiguous(argument: &'static str, data: &'a [T], shape: [usize; 4]) -> Result<Self> {
        Ok(Self { data, layout: Strided::contiguous(argument, data.len(), shape)? })
    }

    /// The extents `[batch, seq, heads, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.layout.shape
    }

    /// The strides of `[batch, seq, heads, dim]`, in elements; 0 where [`new`](Self::new) was given
    /// an axis of one element or none.
    pub fn strides(&self) -> [usize; 4] {
        self.layout.strides
    }

    /// The same elements with the axes seq and heads exchanged.
    #[must_use]
    pub fn swap_seq_heads(self) -> Self {
        Self { layout: self.layout.swap_seq_heads(), ..self }
    }

    /// The elements `start..start + len` of one axis.
    ///
    /// # Errors
    /// [`Error::Value`] if there is no such axis or the range leaves it.
    pub fn narrow(self, axis: usize, start: usize, len: usize) -> Result<Self> {
        let (layout, offset) = self.layout.narrow(axis, start, len)?;
        Ok(Self { data: &self.data[offset..], layout })
    }

    /// The elements `first`, `first + step`, `first + 2 step` and so on of one axis; none if there
    /// is no `first`.
    ///
    /// # Errors
    /// [`Error::Value`] if there is no such axis, or for a step of 0.
    pub fn every(self, axis: usize, first: usize, step: usize) -> Result<Self> {
        let (layout, offset) = self.layout.every(axis, first, step)?;
        Ok(Self { data: &self.data[offset..], layout })
    }

    /// The element at `[batch, seq, head, dim]`.
    ///
    /// # Panics
    /// If the index leaves the buffer.
    pub fn at(&self, index: [usize; 4]) -> T {
        self.data[self.layout.offset(index)]
    }

    /// The buffer from the view's first element on.
    pub fn data(&self) -> &'a [T] {
        self.data
    }
}

/// A borrowed tensor `[batch, seq, heads, dim]` to be written, of elements or of memory that may be
/// uninitialised (`MaybeUninit<T>`).
#[derive(Debug)]
pub struct TensorViewMut<'a, T> {
    data: &'a mut [T],
    layout: Strided,
}

impl<'a, T: Output> TensorViewMut<'a, T> {
    /// A view of `data` with explicit strides, in elements.
    ///
    /// # Errors
    /// [`Error::Stride`], naming `argument`, if an index leaves `data` or two indices meet.
    pub fn new(
        argument: &'static str,
        data: &'a mut [T],
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<Self> {
        let layout = Strided::new(argument, data.len(), shape, strides)?;
        Ok(Self { data, layout })
    }

    /// A row-major view of the whole of `data`.
    ///
    /// # Errors
    /// [`Error::Shape`], naming `argument`, if `shape` has not exactly `data.len()` elements.
    pub fn contiguous(argument: &'static str, data: &'a mut [T], shape: [usize; 4]) -> Result<Self> {
        let layout = Strided::contiguous(argument, data.len(), shape)?;
        Ok(Self { data, layout })
    }

    /// The extents `[batch, seq, heads, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.layout.shape
    }

    /// The strides of `[batch, seq, heads, dim]`, in elements; 0 where [`new`](Self::new) was given
    /// an axis of one element or none.
    pub fn strides(&self) -> [usize; 4] {
        self.layout.strides
    }

    /// The same elements with the axes seq and heads exchanged.
    #[must_use]
    pub fn swap_seq_heads(self) -> Self {
        Self { layout: self.layout.swap_seq_heads(), ..self }
    }

    /// The elements `start..start + len` of one axis.
    ///
    /// # Errors
    /// [`Error::Value`] if there is no such axis or the range leaves it.
    pub fn narrow(self, axis: usize, start: usize, len: usize) -> Result<Self> {
        let (layout, offset) = self.layout.narrow(axis, start, len)?;
        Ok(Self { data: &mut self.data[offset..], layout })
    }

    /// The same view, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> TensorViewMut<'_, T> {
        TensorViewMut { data: self.data, layout: self.layout }
    }

    /// Sets the element at `[batch, seq, head, dim]`.
    ///
    /// # Panics
    /// If the index leaves the buffer.
    pub fn set(&mut self, index: [usize; 4], value: T) {
        self.data[self.layout.offset(index)] = value;
    }

    /// The buffer from the view's first element on.
    pub fn data_mut(&mut self) -> &mut [T] {
        self.data
    }
}

impl<T: Element> TensorViewMut<'_, T> {
    /// The same view, read only.
    pub fn as_view(&self) -> TensorView<'_, T> {
        TensorView { data: self.data, layout: self.layout }
    }
}

/// The rows of an output, for threads that each write other rows.
pub(crate) struct SharedRows<'a, T> {
    data: *mut T,
    layout: Strided,
    view: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `row`, whose caller promises that no two threads hold the same row;
// `Strided::new` has checked that different rows never overlap.
unsafe impl<T: Send> Sync for SharedRows<'_, T> {}

impl<'a, T: Output> SharedRows<'a, T> {
    /// The last axis of `view` must be contiguous.
    pub(crate) fn new(view: TensorViewMut<'a, T>) -> Self {
        debug_assert!(
            view.layout.strides[3] == 1 || view.layout.shape[3] <= 1 || view.layout.shape.contains(&0)
        );
        Self { data: view.data.as_mut_ptr(), layout: view.layout, view: std::marker::PhantomData }
    }

    /// The elements of one head of one token.
    ///
    /// # Safety
    /// No other reference to the same row may be alive, in this or any other thread.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn row(&self, batch: usize, seq: usize, head: usize) -> &mut [T] {
        let [batches, seqs, heads, dim] = self.layout.shape;
        assert!(batch < batches && seq < seqs && head < heads);
        // SAFETY: the index lies inside the shape, and `Strided::new` has checked that the shape
        // lies inside the buffer, which `view` keeps borrowed; that nobody else holds the row is
        // the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(self.data.add(self.layout.offset([batch, seq, head, 0])), dim)
        }
    }
}
