//! Writes to tensors in place: candle lends a storage to be written only to an [`InplaceOp1`].

use super::borrow::{Locked, Locks, storage_id};
use super::memory::{Home, StorageMut};
use crate::{Error, Result};
use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};
use std::cell::Cell;

/// Calls `write` with the storages of two tensors, which no one else then reads or writes, and the
/// tensors of `read`, which no one else writes.
///
/// # Errors
/// [`Error::Value`] if a storage is that of the other tensor or of one of `read`, or a tensor is on
/// another device, [`Error::Stride`] for a broadcast tensor; those of `write`.
pub fn write_two<'a>(
    home: &impl Home,
    [first, second]: [(&'static str, &Tensor); 2],
    read: &[(&'static str, &'a Tensor)],
    write: impl FnOnce(StorageMut<'_>, StorageMut<'_>, Locked<'a>) -> Result<()>,
) -> Result<()> {
    check_apart(first, &[second])?;
    check_apart(first, read)?;
    check_apart(second, read)?;
    let mut locks = Locks::new(home, read)?;
    let [first_id, second_id] = [storage_id(first.1), storage_id(second.1)];
    // In one order in all threads, so that no two of them wait for each other.
    locks.lock_before(first_id.min(second_id));
    if first_id < second_id {
        write_one(first, |to_first| {
            locks.lock_before(second_id);
            write_one(second, |to_second| write(to_first, to_second, locks.lock()))
        })
    } else {
        write_one(second, |to_second| {
            locks.lock_before(first_id);
            write_one(first, |to_first| write(to_first, to_second, locks.lock()))
        })
    }
}

fn check_apart(
    (argument, tensor): (&'static str, &Tensor),
    others: &[(&'static str, &Tensor)],
) -> Result<()> {
    match others.iter().find(|(_, other)| storage_id(other) == storage_id(tensor)) {
        Some((other, _)) => {
            Err(Error::value(other, format!("memory of another tensor than {argument}"), "the same"))
        }
        None => Ok(()),
    }
}

fn write_one(
    (argument, tensor): (&'static str, &Tensor),
    write: impl FnOnce(StorageMut<'_>) -> Result<()>,
) -> Result<()> {
    let layout = tensor.layout();
    if layout.dims().iter().zip(layout.stride()).any(|(&extent, &stride)| extent > 1 && stride == 0) {
        return Err(Error::stride(argument, "that never overlap", format!("{:?}", layout.stride())));
    }
    let op = Write { write: Cell::new(Some(write)), result: Cell::new(None) };
    tensor.inplace_op1(&op)?;
    op.result
        .take()
        .unwrap_or_else(|| Err(Error::value(argument, "a tensor that candle writes in place", "another")))
}

/// Hands on the storage, and keeps what comes of it: candle knows only errors of its own.
struct Write<F> {
    write: Cell<Option<F>>,
    result: Cell<Option<Result<()>>>,
}

impl<F: FnOnce(StorageMut<'_>) -> Result<()>> Write<F> {
    fn call(&self, storage: StorageMut<'_>) -> candle_core::Result<()> {
        self.result.set(self.write.take().map(|write| write(storage)));
        Ok(())
    }
}

impl<F: FnOnce(StorageMut<'_>) -> Result<()>> InplaceOp1 for Write<F> {
    fn name(&self) -> &'static str {
        "append"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        self.call(StorageMut::Cpu(storage))
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, _: &Layout) -> candle_core::Result<()> {
        self.call(StorageMut::Cuda(storage))
    }
}
