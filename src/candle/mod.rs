//! The same calls on [candle](candle_core) tensors: of the CPU, and with the feature `cuda` of NVIDIA GPUs.
//!
//! Tensors are borrowed where they lie: any strides do whose last axis is contiguous, so a transposed or narrowed tensor costs no
//! copy. Only a broadcast tensor is copied, since its rows share memory, and on a GPU one whose rows do not start at multiples of 16
//! bytes. No gradient flows through these calls.
//!
//! On a GPU the work is asked for on candle's stream, and outputs and workspace are allocated there, as candle's own operations do.

#[cfg(feature = "cuda")]
mod cuda;

use crate::cpu::flash;
use crate::merge::{self, Partial};
use crate::{
    AttentionConfig, AttentionShape, Element, Error, Inputs, Result, TensorView, TensorViewMut, bf16, f16,
};
use candle_core::{CpuStorage, DType, Device, Layout, Storage, StorageRef, Tensor, WithDType};

/// Attention of `query` `[batch, seq, heads, dim]` over `key` and `value` `[batch, keys, kv_heads, dim]`, all f32, f16 or bf16 (f16 or bf16 on a
/// GPU).
///
/// Returns the output, of the shape and dtype of `query`, and its log-sum-exp `[batch, heads, seq]` in f32.
///
/// # Errors
/// [`Error::Value`] for a tensor on another device than the query or of another dtype, [`Error::DType`] for dtypes that differ,
/// [`Error::Shape`], [`Error::Stride`], and [`Error::Value`] for a config out of range.
pub fn attention(
    config: &AttentionConfig,
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
) -> Result<(Tensor, Tensor)> {
    dispatch(config, [query, key, value], false)
}

/// [`attention`] with the output in f32, so that a [`merge()`] of partials rounds once.
///
/// # Errors
/// As [`attention`].
pub fn partial(
    config: &AttentionConfig,
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
) -> Result<(Tensor, Tensor)> {
    dispatch(config, [query, key, value], true)
}

/// By device and dtype; the output in f32 or the query's own.
fn dispatch(config: &AttentionConfig, inputs: [&Tensor; 3], f32_out: bool) -> Result<(Tensor, Tensor)> {
    let dtype = dtype("query", inputs[0])?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = inputs[0].device() {
        return match (dtype, f32_out) {
            (crate::DType::F16, false) => cuda::run::<f16, f16>(device, config, inputs),
            (crate::DType::F16, true) => cuda::run::<f16, f32>(device, config, inputs),
            (crate::DType::BF16, false) => cuda::run::<bf16, bf16>(device, config, inputs),
            (crate::DType::BF16, true) => cuda::run::<bf16, f32>(device, config, inputs),
            (other, _) => Err(cuda::unsupported("query", other)),
        };
    }
    match (dtype, f32_out) {
        (crate::DType::F32, _) => run::<f32, f32>(config, inputs),
        (crate::DType::F16, false) => run::<f16, f16>(config, inputs),
        (crate::DType::F16, true) => run::<f16, f32>(config, inputs),
        (crate::DType::BF16, false) => run::<bf16, bf16>(config, inputs),
        (crate::DType::BF16, true) => run::<bf16, f32>(config, inputs),
    }
}

/// Merges partials `(out [batch, seq, heads, dim], lse [batch, heads, seq] f32)`, in the order given, into one such pair of the partials' dtype.
///
/// # Errors
/// [`Error::Value`] for no partial at all, otherwise as [`attention`].
pub fn merge(partials: &[(Tensor, Tensor)]) -> Result<(Tensor, Tensor)> {
    let Some((first, _)) = partials.first() else {
        return Err(Error::value("partials", "at least 1", 0));
    };
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = first.device() {
        return match dtype("partial", first)? {
            crate::DType::F32 => cuda::merge::<f32>(device, partials),
            crate::DType::F16 => cuda::merge::<f16>(device, partials),
            crate::DType::BF16 => cuda::merge::<bf16>(device, partials),
        };
    }
    match dtype("partial", first)? {
        crate::DType::F32 => merge_as::<f32>(partials),
        crate::DType::F16 => merge_as::<f16>(partials),
        crate::DType::BF16 => merge_as::<bf16>(partials),
    }
}

/// A candle tensor `[batch, seq, heads, dim]` of the CPU, borrowed so that [`TensorView`]s of it can be made.
///
/// While it lives, the tensor's storage is locked against candle's in-place writes.
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
        let (storage, layout) = tensor.storage_and_layout();
        cpu_storage(argument, &storage)?;
        Ok(Self { argument, storage, layout })
    }

    /// The elements in place.
    ///
    /// # Errors
    /// [`Error::DType`] if they are not `T`, [`Error::Shape`] if there are not four axes, [`Error::Stride`] if elements overlap
    /// in another way than those of a broadcast tensor.
    pub fn view<T: Element + WithDType>(&self) -> Result<TensorView<'_, T>> {
        let rank = |_| Error::shape(self.argument, "of 4 axes", format!("{:?}", self.layout.dims()));
        let shape = <[usize; 4]>::try_from(self.layout.dims()).map_err(rank)?;
        let strides = <[usize; 4]>::try_from(self.layout.stride()).map_err(rank)?;
        TensorView::new(self.argument, self.elements()?, shape, strides)
    }

    /// The elements from the tensor's first one on.
    fn elements<T: Element + WithDType>(&self) -> Result<&[T]> {
        let storage = cpu_storage(self.argument, &self.storage)?;
        check_dtype(self.argument, <T as Element>::DTYPE, self.storage.dtype())?;
        let elements = T::cpu_storage_as_slice(storage)?;
        Ok(elements.get(self.layout.start_offset()..).unwrap_or_default())
    }
}

fn run<T: Element + WithDType, O: Element + WithDType>(
    config: &AttentionConfig,
    [query, key, value]: [&Tensor; 3],
) -> Result<(Tensor, Tensor)> {
    let (query, key, value) = (own_rows(query)?, own_rows(key)?, own_rows(value)?);
    let query = Borrowed::new("query", &query)?;
    let key = Borrowed::new("key", &key)?;
    let value = Borrowed::new("value", &value)?;
    let (query, key, value) = (query.view::<T>()?, key.view::<T>()?, value.view::<T>()?);
    let shape = AttentionShape::of(&query, &key, &value)?;
    let plan = flash::Plan::new(config, &shape)?;
    let mut workspace = Vec::with_capacity(plan.workspace_bytes());
    let mut lse = vec![0.0; shape.lse_len()];
    let mut out = vec![O::default(); shape.query_shape().iter().product()];
    let view = TensorViewMut::contiguous("out", &mut out, shape.query_shape())?;
    plan.run(Inputs::new(query, key, value), view, Some(&mut lse), &mut workspace)?;
    tensors(shape.query_shape(), out, lse)
}

fn merge_as<T: Element + WithDType>(partials: &[(Tensor, Tensor)]) -> Result<(Tensor, Tensor)> {
    let owned = partials
        .iter()
        .map(|(out, lse)| Ok((own_rows(out)?, lse.contiguous()?)))
        .collect::<Result<Vec<_>>>()?;
    let borrowed = owned
        .iter()
        .map(|(out, lse)| Ok((Borrowed::new("partial", out)?, Borrowed::new("lse", lse)?)))
        .collect::<Result<Vec<_>>>()?;
    let views = borrowed
        .iter()
        .map(|(out, lse)| {
            let out = out.view::<T>()?;
            let [batch, seq, heads, _] = out.shape();
            if lse.layout.dims() != [batch, heads, seq] {
                let expected = format!("{:?}", [batch, heads, seq]);
                return Err(Error::shape("lse", expected, format!("{:?}", lse.layout.dims())));
            }
            let lse = lse.elements::<f32>()?;
            Ok(Partial { out, lse: &lse[..batch * heads * seq] })
        })
        .collect::<Result<Vec<_>>>()?;
    let shape = views[0].out.shape();
    let [batch, seq, heads, _] = shape;
    let mut lse = vec![0.0; batch * heads * seq];
    let mut out = vec![T::default(); shape.iter().product()];
    merge::merge(&views, TensorViewMut::contiguous("out", &mut out, shape)?, &mut lse)?;
    tensors(shape, out, lse)
}

fn tensors<O: Element + WithDType>(
    [batch, seq, heads, dim]: [usize; 4],
    out: Vec<O>,
    lse: Vec<f32>,
) -> Result<(Tensor, Tensor)> {
    let out = Tensor::from_vec(out, (batch, seq, heads, dim), &Device::Cpu)?;
    let lse = Tensor::from_vec(lse, (batch, heads, seq), &Device::Cpu)?;
    Ok((out, lse))
}

/// The tensor itself, or a copy of it if it is broadcast along an axis.
fn own_rows(tensor: &Tensor) -> Result<Tensor> {
    let broadcast = tensor.dims().iter().zip(tensor.stride()).any(|(&dim, &stride)| dim > 1 && stride == 0);
    Ok(if broadcast { tensor.contiguous()? } else { tensor.clone() })
}

fn dtype(argument: &'static str, tensor: &Tensor) -> Result<crate::DType> {
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

fn check_dtype(argument: &'static str, expected: crate::DType, got: DType) -> Result<()> {
    match crate_dtype(got) {
        Some(got) if got == expected => Ok(()),
        Some(got) => Err(Error::DType { argument, expected, got }),
        None => Err(unsupported(argument, got)),
    }
}

fn unsupported(argument: &'static str, got: DType) -> Error {
    Error::value(argument, "a tensor of f32, f16 or bf16", got.as_str())
}

fn cpu_storage<'a>(argument: &'static str, storage: &'a Storage) -> Result<&'a CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => Err(Error::value(argument, "a tensor on the CPU", "one on another device")),
    }
}
