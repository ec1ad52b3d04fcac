//! Candle's tensors as memory of a backend.

use crate::backend::{Backend, Plain, clamp, row_major};
use crate::cpu::Cpu;
use crate::{Element, Error, Result, bf16, f16};
use candle_core::{CpuStorage, DType, Device, Shape, Storage, Tensor, WithDType};
use std::ops::Range;

/// A number that candle's tensors and a backend's memory both hold.
#[cfg(not(feature = "candle-cuda"))]
pub trait Number: Plain + WithDType {}
#[cfg(feature = "candle-cuda")]
pub trait Number: Plain + WithDType + super::cuda::CudaNumber {}

impl Number for f32 {}
impl Number for f16 {}
impl Number for bf16 {}
impl Number for u32 {}
impl Number for u8 {}

/// A storage that candle lends to be written.
pub enum StorageMut<'a> {
    Cpu(&'a mut CpuStorage),
    #[cfg(feature = "candle-cuda")]
    Cuda(&'a mut candle_core::CudaStorage),
}

impl<'a> StorageMut<'a> {
    fn of_cpu(self) -> Option<&'a mut CpuStorage> {
        match self {
            Self::Cpu(storage) => Some(storage),
            #[cfg(feature = "candle-cuda")]
            Self::Cuda(_) => None,
        }
    }
}

/// A device of candle's, with the backend that works in its memory.
pub trait Home {
    type Backend: Backend + 'static;
    /// Memory for a tensor to be.
    type Owned<T: Number>: Send;

    fn backend(&self) -> &Self::Backend;

    /// Refuses a tensor of another device.
    fn check(&self, argument: &'static str, tensor: &Tensor) -> Result<()>;

    /// The tensor itself, or a copy of it where attention could not read its rows in place.
    fn readable(&self, tensor: &Tensor) -> Result<Tensor>;

    /// The elements of a range of a storage, as far as there are any.
    fn slice<'a, T: Number>(
        &'a self,
        argument: &'static str,
        storage: &'a Storage,
        range: Range<usize>,
    ) -> Result<Slice<'a, Self, T>>;

    /// The elements of a range of a storage, as far as there are any, to be written.
    fn slice_mut<'a, T: Number>(
        &'a self,
        argument: &'static str,
        storage: StorageMut<'a>,
        range: Range<usize>,
    ) -> Result<SliceMut<'a, Self, T>>;

    /// Memory for `len` elements. They hold 0, or if `written` whatever they hold: the caller
    /// writes all of them before anything reads them.
    fn allocate<T: Number>(&self, len: usize, written: bool) -> Result<Self::Owned<T>>;

    /// `len` times -inf.
    fn minus_infinity(&self, len: usize) -> Result<Self::Owned<f32>>;

    /// All of what was [`allocate`](Self::allocate)d as `len` elements.
    fn owned_mut<'a, T: Number>(&'a self, owned: &'a mut Self::Owned<T>, len: usize)
    -> SliceMut<'a, Self, T>;

    /// The tensor of that memory, which has the shape's elements.
    fn tensor<T: Number>(&self, owned: Self::Owned<T>, shape: Shape) -> Result<Tensor>;
}

pub type Plan<H> = <<H as Home>::Backend as Backend>::Plan;
pub type Slice<'a, H, T> = <<H as Home>::Backend as Backend>::Slice<'a, T>;
pub type SliceMut<'a, H, T> = <<H as Home>::Backend as Backend>::SliceMut<'a, T>;
pub type ViewMut<'a, H, T> = <<H as Home>::Backend as Backend>::ViewMut<'a, T>;
pub type View<'a, H, T> = <<H as Home>::Backend as Backend>::View<'a, T>;

impl Home for Cpu {
    type Backend = Cpu;
    type Owned<T: Number> = Vec<T>;

    fn backend(&self) -> &Cpu {
        self
    }

    fn check(&self, argument: &'static str, tensor: &Tensor) -> Result<()> {
        if tensor.device().is_cpu() {
            return Ok(());
        }
        Err(Error::value(argument, "a tensor on the CPU", "one on another device"))
    }

    fn readable(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.clone())
    }

    fn slice<'a, T: Number>(
        &'a self,
        argument: &'static str,
        storage: &'a Storage,
        range: Range<usize>,
    ) -> Result<&'a [T]> {
        cpu_elements(argument, storage, range)
    }

    fn slice_mut<'a, T: Number>(
        &'a self,
        argument: &'static str,
        storage: StorageMut<'a>,
        range: Range<usize>,
    ) -> Result<&'a mut [T]> {
        let Some(storage) = storage.of_cpu() else {
            return Err(Error::value(argument, "a tensor on the CPU", "one on another device"));
        };
        let elements = match storage {
            CpuStorage::F32(elements) => same_mut(argument, elements),
            CpuStorage::F16(elements) => same_mut(argument, elements),
            CpuStorage::BF16(elements) => same_mut(argument, elements),
            _ => Err(unsupported(argument, candle_core::backend::BackendStorage::dtype(storage))),
        }?;
        let range = clamp(range, elements.len());
        Ok(&mut elements[range])
    }

    fn allocate<T: Number>(&self, len: usize, _written: bool) -> Result<Vec<T>> {
        // Vectors of zeros take pages from the system when they are touched, but end the process
        // where there are none.
        if Vec::<T>::new().try_reserve_exact(len).is_err() {
            return Err(Error::value("len", "a size that memory has room for", len));
        }
        Ok(vec![T::default(); len])
    }

    fn minus_infinity(&self, len: usize) -> Result<Vec<f32>> {
        let mut lse = self.buffer(len)?;
        lse.fill(f32::NEG_INFINITY);
        Ok(lse)
    }

    fn owned_mut<'a, T: Number>(&'a self, owned: &'a mut Vec<T>, _len: usize) -> &'a mut [T] {
        owned
    }

    fn tensor<T: Number>(&self, owned: Vec<T>, shape: Shape) -> Result<Tensor> {
        Ok(Tensor::from_vec(owned, shape, &Device::Cpu)?)
    }
}

/// The elements, if they are `T`.
fn same_mut<'a, T: Number, U: Number>(argument: &'static str, elements: &'a mut [U]) -> Result<&'a mut [T]> {
    check_dtype::<T>(argument, <U as WithDType>::DTYPE)?;
    Ok(bytemuck::cast_slice_mut(elements))
}

/// The elements of a range of a storage of the CPU, as far as there are any.
pub fn cpu_elements<'a, T: WithDType>(
    argument: &'static str,
    storage: &'a Storage,
    range: Range<usize>,
) -> Result<&'a [T]> {
    check_dtype::<T>(argument, storage.dtype())?;
    let Storage::Cpu(storage) = storage else {
        return Err(Error::value(argument, "a tensor on the CPU", "one on another device"));
    };
    let elements = T::cpu_storage_as_slice(storage)?;
    Ok(&elements[clamp(range, elements.len())])
}

/// The element type of a tensor of queries, keys, values or outputs.
pub fn dtype(argument: &'static str, tensor: &Tensor) -> Result<crate::DType> {
    crate_dtype(tensor.dtype()).ok_or_else(|| unsupported(argument, tensor.dtype()))
}

fn crate_dtype(dtype: DType) -> Option<crate::DType> {
    match dtype {
        DType::F32 => Some(crate::DType::F32),
        DType::F16 => Some(crate::DType::F16),
        DType::BF16 => Some(crate::DType::BF16),
        _ => None,
    }
}

/// Refuses elements that are not `T`.
pub fn check_dtype<T: WithDType>(argument: &'static str, got: DType) -> Result<()> {
    if got == T::DTYPE {
        return Ok(());
    }
    match (crate_dtype(T::DTYPE), crate_dtype(got)) {
        (Some(expected), Some(got)) => Err(Error::DType { argument, expected, got }),
        _ => Err(Error::value(argument, format!("a tensor of {}", T::DTYPE.as_str()), got.as_str())),
    }
}

fn unsupported(argument: &'static str, got: DType) -> Error {
    Error::value(argument, "a tensor of f32, f16 or bf16", got.as_str())
}

/// An output of this shape and its log-sum-exp `[batch, heads, seq]`, which `write` writes. Where
/// it leaves rows alone (`padded`) they hold 0 and -inf.
pub fn write_pair<H: Home, O: Element + Number>(
    home: &H,
    shape: [usize; 4],
    padded: bool,
    write: impl FnOnce(ViewMut<'_, H, O>, SliceMut<'_, H, f32>) -> Result<()>,
) -> Result<(Tensor, Tensor)> {
    let [batch, seq, heads, dim] = shape;
    let rows = batch * seq * heads;
    let mut out = home.allocate::<O>(rows * dim, !padded)?;
    let mut lse = if padded { home.minus_infinity(rows)? } else { home.allocate(rows, true)? };
    {
        let elements = home.owned_mut(&mut out, rows * dim);
        let to = H::Backend::view_mut("out", elements, shape, row_major(shape))?;
        write(to, home.owned_mut(&mut lse, rows))?;
    }
    let out = home.tensor(out, Shape::from((batch, seq, heads, dim)))?;
    Ok((out, home.tensor(lse, Shape::from((batch, heads, seq)))?))
}
