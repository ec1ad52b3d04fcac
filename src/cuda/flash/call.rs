//! One attention call: a launch for each kernel, and the merge of what was split.

use super::division::divide_by;
use super::room::Room;
use super::tiles::KernelTiles;
use super::{DeviceInputs, Plan};
use crate::batch::with_dim;
use crate::cuda::Launch;
use crate::cuda::device::{Device, DeviceTensor, DeviceTensorMut, SpanMut, bytes_of};
use crate::cuda::merge::{MergeLaunch, MergedFrom, RowSinks, launch_merge};
use crate::cuda::params::{StarFlashParams, StarTensor, StarTile};
use crate::cuda::scales::ScaleParams;
use crate::{DType, Element, Error, Inputs, Result};

/// Probabilities stay below 2 to this power, far inside the range of 16-bit floats. As a score it
/// is kept finite, so that it does not cancel a base of -inf.
const SLACK_LOG2: f32 = 8.0;

/// The addresses of a plan's tables and partial results.
pub(super) struct Tables {
    tiles: u64,
    /// 0 where keys do not lie in pages.
    pages: u64,
    ranges: u64,
    merged: u64,
    partials: u64,
    partials_lse: u64,
}

impl Tables {
    /// `tables` is the address of the tables, `partials` that of the partial results.
    pub fn new(room: &Room, tables: u64, partials: u64, paged: bool) -> Self {
        let places = room.places();
        Self {
            tiles: tables,
            pages: if paged { tables + places.pages as u64 } else { 0 },
            ranges: tables + places.ranges as u64,
            merged: tables + places.merged as u64,
            partials,
            partials_lse: partials + room.partial_out_bytes() as u64,
        }
    }
}

/// Refuses types that no kernel takes together.
fn check_types(query: DType, key: DType, out: DType) -> Result<()> {
    let half = |dtype| matches!(dtype, DType::F16 | DType::BF16);
    if !half(key) && key != DType::F8E4M3 {
        return Err(Error::DType { argument: "key", expected: DType::BF16, got: key });
    }
    let expected = if half(key) { key } else { DType::BF16 };
    if query != expected && (half(key) || !half(query)) {
        return Err(Error::DType { argument: "query", expected, got: query });
    }
    if out != query && out != DType::F32 {
        return Err(Error::DType { argument: "out", expected: query, got: out });
    }
    Ok(())
}

/// Refuses heads for which there are no kernels that read fp8 elements.
fn check_narrow_dims(head_dim: usize, value_dim: usize) -> Result<()> {
    for (argument, dim) in [("head_dim", head_dim), ("value_dim", value_dim)] {
        if !dim.is_multiple_of(16) || dim > 256 {
            let expected = "a multiple of 16, at most 256, with keys of f8e4m3";
            return Err(Error::value(argument, expected, dim));
        }
    }
    Ok(())
}

/// A call of a plan that is in device memory.
pub(super) struct Call<'a, D: Device> {
    pub plan: &'a Plan,
    pub device: &'a D,
    pub stream: &'a D::Stream,
    /// Kernels, and the tiles of the table that they work off.
    pub launches: &'a [KernelTiles],
    /// Rows in the list of those that are merged.
    pub merged: usize,
    pub needs_prefix: bool,
    pub tables: Tables,
}

impl<D: Device> Call<'_, D> {
    pub fn run<Q: Element, T: Element, O: Element>(
        &self,
        inputs: DeviceInputs<'_, '_, '_, '_, D, Q, T>,
        out: &mut DeviceTensorMut<'_, D, O>,
        lse: Option<&mut SpanMut<'_, D, f32>>,
    ) -> Result<()> {
        let plan = self.plan;
        check_types(Q::DTYPE, T::DTYPE, O::DTYPE)?;
        let narrow = T::DTYPE == DType::F8E4M3;
        if narrow {
            check_narrow_dims(plan.query[3], plan.value_dim)?;
        }
        let Inputs { query, key, value, prefix, sinks, scales } = inputs;
        if self.needs_prefix && prefix.is_none() {
            return Err(Error::value("prefix", "keys and values of the prefixes", "none"));
        }
        let tensors = [
            self.check("query", plan.query, query)?,
            self.check("key", plan.key, key)?,
            self.check("value", with_dim(plan.key, plan.value_dim), value)?,
            prefix.map_or(Ok(StarTensor::default()), |[key, _]| self.check("prefix", plan.prefix, key))?,
            prefix.map_or(Ok(StarTensor::default()), |[_, value]| {
                self.check("prefix", with_dim(plan.prefix, plan.value_dim), value)
            })?,
        ];
        let scales = ScaleParams::new(self.stream, T::DTYPE, plan.key[2], scales.as_ref())?;
        let sinks = RowSinks::new(self.stream, plan.query, sinks)?;
        out.check_rows("out", plan.out())?;
        out.check_stream("out", self.stream)?;
        lse.as_ref().map_or(Ok(()), |lse| lse.check_stream("lse", self.stream))?;
        if let Some(lse) = &lse
            && lse.len != plan.lse_len()
        {
            let [batch, seq, heads, _] = plan.query;
            let expected = format!("{:?}", [batch, heads, seq]);
            return Err(Error::shape("lse", expected, format!("{} elements", lse.len)));
        }
        let lse = lse.map_or(0, |lse| lse.address);
        let params = StarFlashParams {
            out: out.params(),
            out_f32: u32::from(O::DTYPE == DType::F32),
            lse,
            sinks: sinks.address,
            key_scales: scales.key,
            value_scales: scales.value,
            key_scale_step: scales.key_step,
            value_scale_step: scales.value_step,
            ..self.params(tensors)
        };
        for launch in self.launches.iter().filter(|launch| !launch.tiles.is_empty()) {
            self.launch(launch, params, Q::DTYPE, narrow)?;
        }
        self.merge(sinks, out.params(), O::DTYPE, lse)
    }

    fn check<T: Element>(
        &self,
        name: &'static str,
        shape: [usize; 4],
        tensor: &DeviceTensor<'_, D, T>,
    ) -> Result<StarTensor> {
        tensor.check_rows(name, shape)?;
        tensor.check_stream(name, self.stream)?;
        Ok(tensor.params())
    }

    /// Starts the kernel for some tiles of the table. `params` has all that does not depend on
    /// them.
    fn launch(
        &self,
        launch: &KernelTiles,
        params: StarFlashParams,
        dtype: DType,
        narrow: bool,
    ) -> Result<()> {
        let KernelTiles { policy, pack, tiles } = launch;
        let params = StarFlashParams {
            tiles: self.tables.tiles + (tiles.start * size_of::<StarTile>()) as u64,
            pack: *pack as u32,
            ..params
        };
        let policy = policy.e4m3().filter(|_| narrow).unwrap_or(*policy);
        let kernel = policy.entry(dtype);
        let launch = Launch {
            kernel: &kernel,
            blocks: (tiles.len() * self.plan.heads(launch) * self.plan.parts()) as u32,
            threads: policy.threads() as u32,
            shared_bytes: policy.shared_bytes() as u32,
            params: bytes_of(std::slice::from_ref(&params)),
        };
        // SAFETY: the tensors have the extents of the plan, whose tiles and pages were checked when
        // it was made, and are in device memory.
        unsafe { self.device.launch(self.stream, &launch) }
    }

    /// Merges the partial rows of split lists.
    fn merge(&self, sinks: RowSinks, out: StarTensor, dtype: DType, lse: u64) -> Result<()> {
        if self.merged == 0 {
            return Ok(());
        }
        let merge = MergeLaunch {
            partials: MergedFrom::Listed {
                out: self.tables.partials,
                lse: self.tables.partials_lse,
                rows: self.tables.merged,
                count: self.merged,
            },
            sinks,
            shape: self.plan.out(),
            dtypes: [DType::F32, dtype],
            out,
            lse,
        };
        // SAFETY: the partials and the list of rows are in device memory, and the output was
        // checked.
        unsafe { launch_merge(self.device, self.stream, &merge) }
    }

    /// What all launches are told of the plan and its inputs. `tensors` are query, key, value, and
    /// key and value of prefixes.
    fn params(&self, tensors: [StarTensor; 5]) -> StarFlashParams {
        let Plan { query: [_, seq, heads, dim], key: [_, page_len, kv_heads, _], score, .. } = *self.plan;
        let [query, key, value, prefix_key, prefix_value] = tensors;
        let (cap_scale, scale_log2) = match score.factors_for(score.scale_for(dim)) {
            // The kernels compute tanh(ln 2 / 2 · x).
            (factor, Some(cap)) => (factor * (2.0 * std::f32::consts::LOG2_E), cap),
            (factor, None) => (0.0, factor),
        };
        // A scale of 0 would make NaN of the -inf of hidden keys; this one makes 0 of every score.
        let scale_log2 = scale_log2.max(f32::MIN_POSITIVE);
        let mut params = StarFlashParams {
            query,
            key,
            value,
            prefix_key,
            prefix_value,
            ranges: self.tables.ranges,
            partials: self.tables.partials,
            partials_lse: self.tables.partials_lse,
            query_len: seq as u32,
            query_heads: heads as u32,
            head_dim: dim as u32,
            value_dim: self.plan.value_dim as u32,
            group: (heads / kv_heads) as u32,
            scale_log2,
            cap_scale,
            slack: (SLACK_LOG2 / scale_log2).min(1e30),
            ..Default::default()
        };
        if self.tables.pages != 0 {
            params.page_table = self.tables.pages;
            params.page_len = page_len as u32;
            (params.page_magic, params.page_shift) = divide_by(params.page_len);
        }
        params
    }
}
