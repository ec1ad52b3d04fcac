//! Partials on candle tensors to one: those of this rank, or of all.

use super::borrow::{Locked, axes, table};
use super::memory::{self, Home, Number, dtype, write_pair};
use super::{by_dtype, on_device};
use crate::comm::{self, Collective};
use crate::config::check_addressable;
use crate::cpu::Cpu;
use crate::merge::{Partial, PartialOf};
use crate::{Backend, Element, Error, Result};
use candle_core::Tensor;
#[cfg(feature = "candle-cuda")]
use {
    super::cuda::Gpu,
    crate::comm::{DeviceCollective, MergePlan, Staged},
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
    let Some((first, _)) = partials.first() else {
        return Err(Error::value("partials", "at least 1", 0));
    };
    on_device!("partial", first.device(), home => {
        by_dtype!(dtype("partial", first)?, T => merge_in::<_, T>(&home, partials))
    })
}

fn merge_in<H: Home, T: Element + Number>(
    home: &H,
    partials: &[(Tensor, Tensor)],
) -> Result<(Tensor, Tensor)> {
    let [shape @ [batch, seq, heads, _], _] = axes("partial", partials[0].0.layout())?;
    check_addressable("partial", shape)?;
    let lses = partials.iter().map(|(_, lse)| table(home, "lse", lse, &[batch, heads, seq]));
    let lses = lses.collect::<Result<Vec<_>>>()?;
    let outs = partials.iter().map(|(out, _)| ("partial", out));
    let tensors: Vec<_> = outs.chain(lses.iter().map(|lse| ("lse", lse))).collect();
    let locked = Locked::new(home, &tensors)?;
    let from = (0..partials.len()).map(|index| {
        let lse = locked.elements::<H, f32>(home, partials.len() + index)?;
        Ok(PartialOf { out: locked.view::<H, T>(home, index)?, lse })
    });
    let from = from.collect::<Result<Vec<_>>>()?;
    write_pair(home, shape, false, |to: memory::ViewMut<'_, H, T>, lse| {
        home.backend().merge(from, to, Some(lse))
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
    #[cfg(feature = "candle-cuda")]
    if let Device::Cuda(device) = partial.0.device() {
        let gpu = Gpu::new(device)?;
        return merge_over_gpus(&Staged { device: &**gpu.backend().device(), group }, partial);
    }
    by_dtype!(dtype("partial", &partial.0)?, T => merge_over_in::<T>(group, partial))
}

fn merge_over_in<T: Element + Number>(
    group: &(impl Collective + ?Sized),
    (out, lse): &(Tensor, Tensor),
) -> Result<(Tensor, Tensor)> {
    let home = &Cpu::new();
    let [shape @ [batch, seq, heads, _], _] = axes("partial", out.layout())?;
    let lse = table(home, "lse", lse, &[batch, heads, seq])?;
    let locked = Locked::new(home, &[("partial", out), ("lse", &lse)])?;
    let partial = Partial { out: locked.view::<_, T>(home, 0)?, lse: locked.elements(home, 1)? };
    write_pair(home, shape, false, |to: memory::ViewMut<'_, Cpu, T>, lse| {
        comm::merge(group, &partial, to, lse)
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
    let Device::Cuda(device) = partial.0.device() else {
        return Err(Error::value("partial", "a tensor on an NVIDIA GPU", "one on another device"));
    };
    let gpu = Gpu::new(device)?;
    by_dtype!(dtype("partial", &partial.0)?, T => merge_over_gpus_in::<T>(&gpu, group, partial))
}

#[cfg(feature = "candle-cuda")]
fn merge_over_gpus_in<T: Element + Number>(
    home: &Gpu,
    group: &impl DeviceCollective<Driver>,
    (out, lse): &(Tensor, Tensor),
) -> Result<(Tensor, Tensor)> {
    let [shape @ [batch, seq, heads, _], _] = axes("partial", out.layout())?;
    let lse = table(home, "lse", lse, &[batch, heads, seq])?;
    let locked = Locked::new(home, &[("partial", out), ("lse", &lse)])?;
    let (out, lse) = (locked.view::<_, T>(home, 0)?, locked.elements(home, 1)?);
    let partial = DevicePartial { out, lse };
    let plan = MergePlan::<T, T>::new(shape, group.size(), &group.link())?;
    let mut scratch = home.allocate::<u8>(plan.device_scratch_bytes(), true)?;
    let scratch = home.owned_mut(&mut scratch, plan.device_scratch_bytes());
    let mut merge = plan.on_device(&**home.backend().device(), home.backend().stream(), scratch)?;
    write_pair(home, shape, false, |mut to: memory::ViewMut<'_, Gpu, T>, mut to_lse| {
        merge.merge(group, &partial, &mut to, Some(&mut to_lse))
    })
}
