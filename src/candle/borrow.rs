//! Tensors that a call reads, where they lie.

use super::memory::{Home, Number, Slice, View, cpu_elements};
use crate::cpu::Cpu;
use crate::{Backend, Element, Error, Result, TensorView};
use candle_core::{Layout, StorageRef, Tensor, WithDType};

/// A candle tensor of the CPU, borrowed so that [`TensorView`]s of it can be made.
///
/// While it lives, the tensor's storage is locked against candle's in-place writes, which wait until it
/// is dropped: also those of this thread.
pub struct Borrowed<'a> {
    argument: &'static str,
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Borrowed<'a> {
    /// Borrows `tensor`, called `argument` in errors.
    ///
    /// # Errors
    /// [`Error::Value`] for a tensor that is not on the CPU.
    pub fn new(argument: &'static str, tensor: &'a Tensor) -> Result<Self> {
        Cpu::new().check(argument, tensor)?;
        let (storage, layout) = tensor.storage_and_layout();
        Ok(Self { argument, storage, layout })
    }

    /// The elements in place.
    ///
    /// # Errors
    /// [`Error::DType`] if they are not `T`, [`Error::Shape`] if there are not four axes,
    /// [`Error::Stride`] if elements overlap in another way than those of a broadcast tensor.
    pub fn view<T: Element + WithDType>(&self) -> Result<TensorView<'_, T>> {
        let [shape, strides] = axes(self.argument, self.layout)?;
        let elements = cpu_elements(self.argument, &self.storage, self.layout.start_offset()..usize::MAX)?;
        TensorView::new(self.argument, elements, shape, strides)
    }
}

/// The tensors of a call, whose storages are locked against candle's in-place writes.
pub struct Locked<'a> {
    storages: Vec<StorageRef<'a>>,
    /// What each is called in errors, which storage is its own, and its layout.
    tensors: Vec<(&'static str, usize, &'a Layout)>,
}

/// Tensors of a call, whose storages are still to be locked. Each is locked once, and all in the
/// order of their addresses, with those that are written between them: so that no two threads wait
/// for each other.
pub struct Locks<'a> {
    order: Vec<(usize, &'a Tensor)>,
    locked: Locked<'a>,
}

impl<'a> Locks<'a> {
    /// Tensors of one device, none of which is locked yet.
    pub fn new(home: &impl Home, tensors: &[(&'static str, &'a Tensor)]) -> Result<Self> {
        tensors.iter().try_for_each(|(argument, tensor)| home.check(argument, tensor))?;
        let ids: Vec<_> = tensors.iter().map(|(_, tensor)| storage_id(tensor)).collect();
        let mut order: Vec<_> = ids.iter().copied().zip(tensors.iter().map(|(_, tensor)| *tensor)).collect();
        order.sort_by_key(|(id, _)| *id);
        order.dedup_by_key(|(id, _)| *id);
        let tensors = tensors.iter().zip(&ids).map(|((argument, tensor), id)| {
            (*argument, order.partition_point(|(before, _)| before < id), tensor.layout())
        });
        Ok(Self { locked: Locked { storages: Vec::new(), tensors: tensors.collect() }, order })
    }

    /// Locks the storages before an address.
    pub fn lock_before(&mut self, id: usize) {
        let next = self.locked.storages.len();
        let rest = self.order[next..].iter().take_while(|(own, _)| *own < id);
        self.locked.storages.extend(rest.map(|(_, tensor)| tensor.storage_and_layout().0));
    }

    /// Locks all that are left.
    pub fn lock(mut self) -> Locked<'a> {
        self.lock_before(usize::MAX);
        self.locked
    }
}

impl<'a> Locked<'a> {
    /// Locks tensors of one device.
    pub fn new(home: &impl Home, tensors: &[(&'static str, &'a Tensor)]) -> Result<Self> {
        Ok(Locks::new(home, tensors)?.lock())
    }

    /// The elements of a tensor in place, as a view of a device's backend.
    pub fn view<'b, H: Home, T: Number + Element>(
        &'b self,
        home: &'b H,
        tensor: usize,
    ) -> Result<View<'b, H, T>> {
        let (argument, storage, layout) = self.tensors[tensor];
        let [shape, strides] = axes(argument, layout)?;
        let elements = home.slice(argument, &self.storages[storage], layout.start_offset()..usize::MAX)?;
        H::Backend::view(argument, elements, shape, strides)
    }

    /// The elements of a tensor without gaps, as [`table`] gives one.
    pub fn elements<'b, H: Home, T: Number>(&'b self, home: &'b H, tensor: usize) -> Result<Slice<'b, H, T>> {
        let (argument, storage, layout) = self.tensors[tensor];
        let start = layout.start_offset();
        home.slice(argument, &self.storages[storage], start..start + layout.shape().elem_count())
    }
}

/// What tells a tensor's storage from all others: its address.
pub fn storage_id(tensor: &Tensor) -> usize {
    std::ptr::from_ref(&*tensor.storage_and_layout().0).addr()
}

/// A tensor of these extents without gaps: the one given, or a copy if it has some.
pub fn table(home: &impl Home, argument: &'static str, tensor: &Tensor, extents: &[usize]) -> Result<Tensor> {
    home.check(argument, tensor)?;
    if tensor.dims() != extents {
        return Err(Error::shape(argument, format!("{extents:?}"), format!("{:?}", tensor.dims())));
    }
    // A broadcast tensor may stand for more than memory has.
    if extents.iter().try_fold(8usize, |n, &extent| n.checked_mul(extent)).is_none() {
        return Err(Error::shape(argument, "extents that can be addressed", format!("{extents:?}")));
    }
    Ok(tensor.contiguous()?)
}

/// Shape and strides of four axes.
pub fn axes(argument: &'static str, layout: &Layout) -> Result<[[usize; 4]; 2]> {
    let four = |of: &[usize]| {
        let rank = |_| Error::shape(argument, "of 4 axes", format!("{:?}", layout.dims()));
        <[usize; 4]>::try_from(of).map_err(rank)
    };
    Ok([four(layout.dims())?, four(layout.stride())?])
}
