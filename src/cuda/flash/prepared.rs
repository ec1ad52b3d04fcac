//! The calls of a plan.

use super::Plan;
use super::division::divide_by;
use super::tiles::KernelTiles;
use crate::cuda::Launch;
use crate::cuda::device::{Device, DeviceTensor, DeviceTensorMut, HalfElement, SpanMut, bytes_of};
use crate::cuda::merge::{MergeLaunch, MergedFrom, launch_merge};
use crate::cuda::params::{StarFlashParams, StarTensor, StarTile};
use crate::{DType, Element, Error, Inputs, Result};

/// Probabilities stay below 2 to this power, far inside the range of 16-bit floats. As a score it
/// is kept finite, so that it does not cancel a base of -inf.
const SLACK_LOG2: f32 = 8.0;

/// A [`Plan`] in a device's memory. Calls are ordered by its stream, wait for nothing and allocate
/// nothing; on a GPU they can be captured in a graph.
#[derive(Debug)]
pub struct Prepared<'a, D: Device> {
    pub(super) plan: &'a Plan,
    pub(super) device: &'a D,
    pub(super) stream: &'a D::Stream,
    pub(super) workspace: SpanMut<'a, D, u8>,
}

impl<D: Device> Prepared<'_, D> {
    /// Attention of the inputs, of the batch's shapes, into `out` as the query, of its type or f32,
    /// and, if given, `lse` `[batch, query_heads, seq]`: natural logarithm, -inf where a row sees no
    /// key. Rows of no sequence are neither read nor written. A prefix may be left out where no
    /// sequence has one.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Stride`] for tensors that are not the plan's (last axes
    /// contiguous, the others at multiples of 16 bytes), [`Error::Value`] for a prefix that is
    /// missing, addresses that are no multiples of 16 bytes or memory borrowed for another stream,
    /// [`Error::DType`] for an output of another type; errors of the driver. Nothing was written
    /// then.
    pub fn run<T: HalfElement, O: Element>(
        &mut self,
        inputs: Inputs<&DeviceTensor<'_, D, T>, &DeviceTensor<'_, D, T>>,
        out: &mut DeviceTensorMut<'_, D, O>,
        lse: Option<&mut SpanMut<'_, D, f32>>,
    ) -> Result<()> {
        let plan = self.plan;
        if O::DTYPE != T::DTYPE && O::DTYPE != DType::F32 {
            return Err(Error::DType { argument: "out", expected: T::DTYPE, got: O::DTYPE });
        }
        let Inputs { query, key, value, prefix } = inputs;
        if plan.has_prefix && prefix.is_none() {
            return Err(Error::value("prefix", "keys and values of the prefixes", "none"));
        }
        let tensors = [
            self.check("query", plan.query, query)?,
            self.check("key", plan.key, key)?,
            self.check("value", plan.key, value)?,
            prefix.map_or(Ok(StarTensor::default()), |[key, _]| self.check("prefix", plan.prefix, key))?,
            prefix
                .map_or(Ok(StarTensor::default()), |[_, value]| self.check("prefix", plan.prefix, value))?,
        ];
        out.check_rows("out", plan.query)?;
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
        let params = self.params(tensors, out.params(), lse, O::DTYPE == DType::F32);
        for launch in &plan.launches {
            self.launch(launch, params, T::DTYPE)?;
        }
        self.merge(out.params(), O::DTYPE, lse)
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

    /// Starts the kernel for some of the plan's tiles. `params` has all that does not depend on
    /// them.
    fn launch(&self, launch: &KernelTiles, params: StarFlashParams, dtype: DType) -> Result<()> {
        let KernelTiles { policy, pack, tiles } = launch;
        let params = StarFlashParams {
            tiles: self.workspace.address + (tiles.start * size_of::<StarTile>()) as u64,
            pack: *pack as u32,
            ..params
        };
        let kernel = format!("{}_{dtype}_d{}", policy.kernel, policy.head_dim);
        let launch = Launch {
            kernel: &kernel,
            blocks: (tiles.len() * self.plan.heads(launch)) as u32,
            threads: policy.threads() as u32,
            shared_bytes: policy.shared_bytes() as u32,
            params: bytes_of(std::slice::from_ref(&params)),
        };
        // SAFETY: the tensors have the extents of the plan, whose tiles and pages, checked when it
        // was made, are in the workspace.
        unsafe { self.device.launch(self.stream, &launch) }
    }

    /// Merges the partial rows of split lists.
    fn merge(&self, out: StarTensor, dtype: DType, lse: u64) -> Result<()> {
        let (plan, at) = (self.plan, self.plan.workspace());
        if plan.merged.is_empty() {
            return Ok(());
        }
        let merge = MergeLaunch {
            partials: MergedFrom::Listed {
                out: self.workspace.address + at.partials as u64,
                lse: self.workspace.address + at.partials_lse as u64,
                rows: self.workspace.address + at.merged as u64,
                count: plan.merged.len(),
            },
            shape: plan.query,
            dtypes: [DType::F32, dtype],
            out,
            lse,
        };
        // SAFETY: the partials and the list of rows are in the workspace, and the output was
        // checked.
        unsafe { launch_merge(self.device, self.stream, &merge) }
    }

    /// What all launches are told. `tensors` are query, key, value, and key and value of prefixes.
    fn params(&self, tensors: [StarTensor; 5], out: StarTensor, lse: u64, out_f32: bool) -> StarFlashParams {
        let Plan { query: [_, seq, heads, dim], key: [_, page_len, kv_heads, _], score, ref pages, .. } =
            *self.plan;
        let [query, key, value, prefix_key, prefix_value] = tensors;
        let at = self.plan.workspace();
        let (cap_scale, scale_log2) = match score.factors_for(dim) {
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
            out,
            lse,
            out_f32: u32::from(out_f32),
            partials: self.workspace.address + at.partials as u64,
            partials_lse: self.workspace.address + at.partials_lse as u64,
            query_len: seq as u32,
            query_heads: heads as u32,
            group: (heads / kv_heads) as u32,
            scale_log2,
            cap_scale,
            slack: (SLACK_LOG2 / scale_log2).min(1e30),
            ..Default::default()
        };
        if !pages.is_empty() {
            params.page_table = self.workspace.address + at.pages as u64;
            params.page_len = page_len as u32;
            (params.page_magic, params.page_shift) = divide_by(params.page_len);
        }
        params
    }
}
