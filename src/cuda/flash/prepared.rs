//! The calls of a plan.

use super::Plan;
use super::division::divide_by;
use crate::cuda::Launch;
use crate::cuda::device::{Device, DeviceTensor, DeviceTensorMut, HalfElement, SpanMut, bytes_of};
use crate::cuda::merge::{MergeLaunch, launch_merge};
use crate::cuda::params::{StarFlashParams, StarTensor};
use crate::{DType, Element, Error, Result};

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
    /// Attention of `query` over `key` and `value`, of the batch's shapes, into `out` as `query`,
    /// of its type or f32, and, if given, `lse` `[batch, query_heads, seq]`: natural logarithm,
    /// -inf where a row sees no key. Rows of no sequence are neither read nor written.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Stride`] for tensors that are not the plan's (last axes
    /// contiguous, the others at multiples of 16 bytes), [`Error::Value`] for addresses that are
    /// not or memory borrowed for another stream, [`Error::DType`] for an output of another type;
    /// errors of the driver. Nothing was written then.
    pub fn run<T: HalfElement, O: Element>(
        &mut self,
        query: &DeviceTensor<'_, D, T>,
        key: &DeviceTensor<'_, D, T>,
        value: &DeviceTensor<'_, D, T>,
        out: &mut DeviceTensorMut<'_, D, O>,
        lse: Option<&mut SpanMut<'_, D, f32>>,
    ) -> Result<()> {
        let Plan { query: shape, key: key_shape, policy, splits, .. } = *self.plan;
        if O::DTYPE != T::DTYPE && O::DTYPE != DType::F32 {
            return Err(Error::DType { argument: "out", expected: T::DTYPE, got: O::DTYPE });
        }
        query.check_rows("query", shape)?;
        key.check_rows("key", key_shape)?;
        value.check_rows("value", key_shape)?;
        out.check_rows("out", shape)?;
        query.check_stream("query", self.stream)?;
        key.check_stream("key", self.stream)?;
        value.check_stream("value", self.stream)?;
        out.check_stream("out", self.stream)?;
        lse.as_ref().map_or(Ok(()), |lse| lse.check_stream("lse", self.stream))?;
        if let Some(lse) = &lse
            && lse.len != self.plan.lse_len()
        {
            let expected = [shape[0], shape[2], shape[1]];
            return Err(Error::shape("lse", format!("{expected:?}"), format!("{} elements", lse.len)));
        }
        if self.plan.tiles.is_empty() {
            return Ok(());
        }
        let lse = lse.map_or(0, |lse| lse.address);
        let mut params = self.params(query.params(), key.params(), value.params());
        let partials = self.workspace.address + self.plan.workspace().partials as u64;
        let partials_lse = partials + (4 * splits * self.plan.out_len()) as u64;
        if splits == 1 {
            (params.out, params.lse) = (out.params(), lse);
            params.out_f32 = u32::from(O::DTYPE == DType::F32);
        } else {
            let [_, seq, heads, dim] = shape.map(|extent| extent as u64);
            params.out = StarTensor { data: partials, batch: seq * heads * dim, seq: heads * dim, head: dim };
            params.lse = partials_lse;
            params.out_f32 = 1;
            (params.out_split, params.lse_split) = (self.plan.out_len() as u64, self.plan.lse_len() as u64);
        }
        let kernel = format!("{}_{}_d{}", policy.kernel, T::DTYPE, shape[3]);
        let launch = Launch {
            kernel: &kernel,
            blocks: (self.plan.tiles.len() * self.plan.heads()) as u32,
            threads: policy.threads() as u32,
            shared_bytes: policy.shared_bytes() as u32,
            params: bytes_of(std::slice::from_ref(&params)),
        };
        // SAFETY: the tensors have the extents of the plan, whose tiles and pages, checked when it
        // was made, are in the workspace.
        unsafe { self.device.launch(self.stream, &launch)? };
        if splits > 1 {
            let merge = MergeLaunch {
                partials: params.out,
                partials_lse,
                partial_stride: params.out_split,
                lse_stride: self.plan.lse_len(),
                n: splits,
                shape,
                tokens: self.merged(),
                dtypes: [DType::F32, O::DTYPE],
                out: out.params(),
                lse,
            };
            // SAFETY: the partials and the list of tokens are in the workspace, and the output was
            // checked.
            unsafe { launch_merge(self.device, self.stream, &merge)? };
        }
        Ok(())
    }

    fn params(&self, query: StarTensor, key: StarTensor, value: StarTensor) -> StarFlashParams {
        let Plan {
            query: [_, seq, heads, dim], key: [_, page_len, kv_heads, _], score, pack, ref pages, ..
        } = *self.plan;
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
            tiles: self.workspace.address,
            query_len: seq as u32,
            query_heads: heads as u32,
            group: (heads / kv_heads) as u32,
            pack: pack as u32,
            scale_log2,
            cap_scale,
            slack: (SLACK_LOG2 / scale_log2).min(1e30),
            ..Default::default()
        };
        if !pages.is_empty() {
            params.page_table = self.workspace.address + self.plan.workspace().pages as u64;
            params.page_len = page_len as u32;
            (params.page_magic, params.page_shift) = divide_by(params.page_len);
        }
        params
    }

    /// Where the tokens that are merged are listed, and how many; none if these are all of them.
    fn merged(&self) -> Option<(u64, usize)> {
        let count = self.plan.merged.len();
        let address = self.workspace.address + self.plan.workspace().merged as u64;
        (count > 0).then_some((address, count))
    }
}
