//! Partials on candle tensors to one: those of this rank, or of all.

use super::borrow::{Locked, axes, table};
use super::memory::{self, Home, Number, dtype, write_pair};
use super::{by_dtype, on_device};
use crate::comm::{Collective, MergePlan};
use crate::config::check_addressable;
use crate::cpu::Cpu;
use crate::merge::{Partial, PartialOf};
use crate::{Backend, Element, Error, Result};
use candle_core::Tensor;
#[cfg(feature = "candle-cuda")]
use {
    super::cuda::Gpu,
    crate::comm::{DeviceCollective, Staged},
    crate::cuda::{DevicePartial, driver::Driver},
    candle_core::Device,
};

/// Merges partials `(out [batch, seq, heads, dim], lse [batch, heads, seq] f32)`, in the order
/// given, into one such pair of the partials' dtype.
///
/// # Errors
/// [`Error::Value`] for no partial at all, and on a GPU for more than 32; as [`Backend::merge`],
/// and [`Error::Value`] for a tensor on another device than the first output, or of another dtype.
pub fn merge(partials: &[(Tensor, Tensor)]) -> Result<(Tensor, Tensor)> {
    merge_on(partials, None)
}

/// [`merge`] with attention sinks f32 `[heads]`, for rows that it finishes
/// ([`Inputs::with_sinks`](crate::Inputs::with_sinks)).
///
/// # Errors
/// As [`merge`], [`Error::Shape`] for another number of sinks, and on the CPU [`Error::Value`] for
/// one that is NaN or `+inf`.
pub fn merge_with_sinks(partials: &[(Tensor, Tensor)], sinks: &Tensor) -> Result<(Tensor, Tensor)> {
    merge_on(partials, Some(sinks))
}

fn merge_on(partials: &[(Tensor, Tensor)], sinks: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    let Some((first, _)) = partials.first() else {
        return Err(Error::value("partials", "at least 1", 0));
    };
    on_device!("partial", first.device(), home => {
        by_dtype!(dtype("partial", first)?, T => merge_in::<_, T>(&home, partials, sinks))
    })
}

fn merge_in<H: Home, T: Element + Number>(
    home: &H,
    partials: &[(Tensor, Tensor)],
    sinks: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let [shape @ [batch, seq, heads, _], _] = axes("partial", partials[0].0.layout())?;
    check_addressable("partial", shape)?;
    let lses = partials.iter().map(|(_, lse)| table(home, "lse", lse, &[batch, heads, seq]));
    let lses = lses.collect::<Result<Vec<_>>>()?;
    let outs = partials.iter().map(|(out, _)| ("partial", out));
    let sinks = sinks.map(|sinks| table(home, "sinks", sinks, &[heads])).transpose()?;
    let sinks = sinks.iter().map(|sinks| ("sinks", sinks));
    let tensors: Vec<_> = outs.chain(lses.iter().map(|lse| ("lse", lse))).chain(sinks).collect();
    let locked = Locked::new(home, &tensors)?;
    let from = (0..partials.len()).map(|index| {
        let lse = locked.elements::<H, f32>(home, partials.len() + index)?;
        Ok(PartialOf { out: locked.view::<H, T>(home, index)?, lse })
    });
    let from = from.collect::<Result<Vec<_>>>()?;
    let sinks = (2 * partials.len()..tensors.len()).next().map(|index| locked.elements(home, index));
    let sinks = sinks.transpose()?;
    write_pair(home, shape, false, |to: memory::ViewMut<'_, H, T>, lse| {
        home.backend().merge(from, sinks, to, Some(lse))
    })
}

/// Merges every rank's partial `(out [batch, seq, heads, dim], lse [batch, heads, seq] f32)` into
/// one such pair of its dtype, on every rank and with the same bits. Messages go through CPU
/// memory; with the feature `candle-cuda`, `merge_over_gpus` has them go between GPUs.
///
/// # Errors
/// [`Error::Value`], [`Error::Shape`] or [`Error::Stride`] for tensors that do not fit together,
/// are of other dtypes or on different devices (the ranks that wait for this one then return an
/// error as well); errors of the collective.
pub fn merge_over(
    group: &(impl Collective + ?Sized),
    partial: &(Tensor, Tensor),
) -> Result<(Tensor, Tensor)> {
    merge_over_on(group, partial, None)
}

/// [`merge_over`] with attention sinks f32 `[heads]`, the same on every rank
/// ([`Inputs::with_sinks`](crate::Inputs::with_sinks)).
///
/// # Errors
/// As [`merge_over`], [`Error::Shape`] for another number of sinks, and on the CPU [`Error::Value`]
/// for one that is NaN or `+inf`.
pub fn merge_over_with_sinks(
    group: &(impl Collective + ?Sized),
    partial: &(Tensor, Tensor),
    sinks: &Tensor,
) -> Result<(Tensor, Tensor)> {
    merge_over_on(group, partial, Some(sinks))
}

fn merge_over_on(
    group: &(impl Collective + ?Sized),
    partial: &(Tensor, Tensor),
    sinks: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "candle-cuda")]
    if let Device::Cuda(device) = partial.0.device() {
        let gpu = Gpu::new(device)?;
        let group = Staged { device: &**gpu.backend().device(), group };
        return merge_over_gpus_on(&group, partial, sinks);
    }
    by_dtype!(dtype("partial", &partial.0)?, T => merge_over_in::<T>(group, partial, sinks))
}

fn merge_over_in<T: Element + Number>(
    group: &(impl Collective + ?Sized),
    (out, lse): &(Tensor, Tensor),
    sinks: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let home = &Cpu::new();
    let [shape @ [batch, seq, heads, _], _] = axes("partial", out.layout())?;
    let lse = table(home, "lse", lse, &[batch, heads, seq])?;
    let sinks = sinks.map(|sinks| table(home, "sinks", sinks, &[heads])).transpose()?;
    let tensors = [("partial", out), ("lse", &lse)].into_iter();
    let locked = Locked::new(home, &tensors.chain(sinks.iter().map(|x| ("sinks", x))).collect::<Vec<_>>())?;
    let partial = Partial { out: locked.view::<_, T>(home, 0)?, lse: locked.elements(home, 1)? };
    let sinks = sinks.as_ref().map(|_| locked.elements(home, 2)).transpose()?;
    let plan = MergePlan::<T, T>::new(shape, group.size(), &group.link())?;
    let mut merge = plan.on_cpu();
    write_pair(home, shape, false, |to: memory::ViewMut<'_, Cpu, T>, lse| {
        merge.with_sinks(sinks)?.merge(group, &partial, to, Some(lse))
    })
}

/// [`merge_over`] of partials on GPUs, over a collective between these.
///
/// # Errors
/// As [`merge_over`], and [`Error::Value`] for tensors of the CPU.
#[cfg(feature = "candle-cuda")]
pub fn merge_over_gpus(
    group: &impl DeviceCollective<Driver>,
    partial: &(Tensor, Tensor),
) -> Result<(Tensor, Tensor)> {
    merge_over_gpus_on(group, partial, None)
}

/// [`merge_over_gpus`] with attention sinks f32 `[heads]`, the same on every rank
/// ([`Inputs::with_sinks`](crate::Inputs::with_sinks)).
///
/// # Errors
/// As [`merge_over_gpus`], and [`Error::Shape`] for another number of sinks.
#[cfg(feature = "candle-cuda")]
pub fn merge_over_gpus_with_sinks(
    group: &impl DeviceCollective<Driver>,
    partial: &(Tensor, Tensor),
    sinks: &Tensor,
) -> Result<(Tensor, Tensor)> {
    merge_over_gpus_on(group, partial, Some(sinks))
}

#[cfg(feature = "candle-cuda")]
fn merge_over_gpus_on(
    group: &impl DeviceCollective<Driver>,
    partial: &(Tensor, Tensor),
    sinks: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let Device::Cuda(device) = partial.0.device() else {
        return Err(Error::value("partial", "a tensor on an NVIDIA GPU", "one on another device"));
    };
    let gpu = Gpu::new(device)?;
    by_dtype!(dtype("partial", &partial.0)?, T => merge_over_gpus_in::<T>(&gpu, group, partial, sinks))
}

#[cfg(feature = "candle-cuda")]
fn merge_over_gpus_in<T: Element + Number>(
    home: &Gpu,
    group: &impl DeviceCollective<Driver>,
    (out, lse): &(Tensor, Tensor),
    sinks: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let [shape @ [batch, seq, heads, _], _] = axes("partial", out.layout())?;
    let lse = table(home, "lse", lse, &[batch, heads, seq])?;
    let sinks = sinks.map(|sinks| table(home, "sinks", sinks, &[heads])).transpose()?;
    let tensors = [("partial", out), ("lse", &lse)].into_iter();
    let locked = Locked::new(home, &tensors.chain(sinks.iter().map(|x| ("sinks", x))).collect::<Vec<_>>())?;
    let sinks = sinks.as_ref().map(|_| locked.elements(home, 2)).transpose()?;
    let (out, lse) = (locked.view::<_, T>(home, 0)?, locked.elements(home, 1)?);
    let partial = DevicePartial { out, lse };
    let plan = MergePlan::<T, T>::new(shape, group.size(), &group.link())?;
    let mut scratch = home.allocate::<u8>(plan.device_scratch_bytes(), true)?;
    let scratch = home.owned_mut(&mut scratch, plan.device_scratch_bytes());
    let merge = plan.on_device(&**home.backend().device(), home.backend().stream(), scratch)?;
    let mut merge = merge.with_sinks(sinks.as_ref())?;
    write_pair(home, shape, false, |mut to: memory::ViewMut<'_, Gpu, T>, mut to_lse| {
        merge.merge(group, &partial, &mut to, Some(&mut to_lse))
    })
}
