//! Attention of a batch by a plan that is kept.

use super::borrow::{Locked, axes, table};
use super::memory::{self, Home, Number, dtype, write_pair};
use super::on_device;
use crate::batch::with_dim;
use crate::cpu::Cpu;
use crate::{Backend, Batch, Capacity, Element, Error, Inputs, PlanConfig, Result, bf16, f16};
use candle_core::{Device, Tensor};

/// The schedule of a batch on candle tensors of one device, and the memory that calls need beside
/// them.
///
/// An engine makes it once for a [`Capacity`], sets each step's batch by [`update`](Self::update),
/// and calls [`attend`](Self::attend) for each layer:
///
/// ```
/// use candle_core::{Device, Tensor};
/// use star_attention::{Append, Batch, Capacity, Inputs, Keys, Mask, PlanConfig, Sequence, candle};
///
/// # fn main() -> star_attention::Result<()> {
/// // 4 query heads, 2 KV heads, a cache of 8 pages of 16 rows; a step has 3 rows at most.
/// let device = Device::Cpu;
/// let cache = [(); 2].map(|()| Tensor::zeros((8, 16, 2, 64), candle_core::DType::BF16, &device));
/// let [cache_key, cache_value] = [&cache[0], &cache[1]].map(|cache| cache.as_ref().expect("zeros"));
/// let capacity = Capacity::new([1, 3, 4, 64], [8, 16, 2, 64], 4, 3).with_pages(8);
/// let mut plan = candle::Plan::new(&device, &PlanConfig::new(), &capacity)?;
///
/// // A prefill of two rows, in page 5, and a decode behind 16 keys in page 2, in page 7.
/// let mut batch = Batch::new(capacity.query, capacity.key)?;
/// batch.push(Sequence::new(0, 0..2, Keys::pages(2, [5]), Mask::Causal))?;
/// batch.push(Sequence::new(0, 2..3, Keys::pages(17, [2, 7]), Mask::Causal))?;
/// plan.update(&batch)?;
/// let places = Tensor::new(&[[5 * 16, 5 * 16 + 1, 7 * 16_u32]], &device)?;
///
/// // For each layer:
/// let query = Tensor::ones((1, 3, 4, 64), candle_core::DType::BF16, &device)?;
/// let new = Tensor::ones((1, 3, 2, 64), candle_core::DType::BF16, &device)?;
/// candle::append(Append::new(&new, &new, &places), cache_key, cache_value)?;
/// let (out, lse) = plan.attend(Inputs::new(&query, cache_key, cache_value))?;
/// assert_eq!((out.dims(), lse.dims()), (&[1, 3, 4, 64][..], &[1, 4, 3][..]));
/// # Ok(())
/// # }
/// ```
///
/// On a GPU it belongs to candle's stream, and its workspace and tables lie there.
#[derive(Debug)]
pub struct Plan(Of);

#[derive(Debug)]
enum Of {
    Cpu(Box<Kept<Cpu>>),
    #[cfg(feature = "candle-cuda")]
    Cuda(Box<Kept<super::cuda::Gpu>>),
}

/// Calls a method of the device's plan.
macro_rules! of_plan {
    ($plan:expr, $kept:ident => $call:expr) => {
        match $plan {
            Of::Cpu($kept) => $call,
            #[cfg(feature = "candle-cuda")]
            Of::Cuda($kept) => $call,
        }
    };
}

impl Plan {
    /// A plan for batches within a capacity, on tensors of `device`. It has no sequence until the
    /// first [`update`](Self::update).
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) or [`Error::Shape`](crate::Error::Shape) for what is
    /// out of range or has no kernels, or a device that is neither the CPU nor, with the feature
    /// `candle-cuda`, an NVIDIA GPU; errors of the driver.
    pub fn new(device: &Device, config: &PlanConfig, capacity: &Capacity) -> Result<Self> {
        on_device!("device", device, home => {
            let plan = home.backend().plan(config, capacity)?;
            Ok(Self(Kept::new(home, plan, with_dim(capacity.query, capacity.value_dim))?.into()))
        })
    }

    /// A plan for one batch alone: [`update`](Self::update) refuses it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn for_batch(device: &Device, config: &PlanConfig, batch: &Batch) -> Result<Self> {
        on_device!("device", device, home => {
            let plan = home.backend().plan_for(config, batch)?;
            let mut kept = Kept::new(home, plan, batch.out_shape())?;
            kept.padded = is_padded(batch);
            Ok(Self(kept.into()))
        })
    }

    /// Sets the batch of the calls that follow.
    ///
    /// # Errors
    /// As [`Backend::update`].
    pub fn update(&mut self, batch: &Batch) -> Result<()> {
        of_plan!(&mut self.0, kept => kept.update(batch))
    }

    /// Attention of the plan's batch: the output, of the batch's [`out_shape`](Batch::out_shape)
    /// and the dtype of the query, and its log-sum-exp `[batch, query_heads, seq]` in f32. A row
    /// that sees no key, or belongs to no sequence, gets 0 and `-inf`.
    ///
    /// All are f32, f16 or bf16, keys and values of one dtype. On the CPU queries may be of
    /// another; on a GPU all are f16 or all bf16. Sinks are f32 `[query_heads]`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::Stride`](crate::Error::Stride) or
    /// [`Error::Value`](crate::Error::Value) for tensors that are not the plan's, or on another
    /// device, or of other dtypes; [`Error::DType`](crate::Error::DType) for dtypes that do not go
    /// together; errors of candle and of the driver.
    pub fn attend(&mut self, inputs: Inputs<&Tensor, &Tensor, &Tensor>) -> Result<(Tensor, Tensor)> {
        of_plan!(&mut self.0, kept => kept.attend(inputs, false))
    }

    /// [`attend`](Self::attend) with the output in f32, so that a merge of partials rounds once.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    pub fn partial(&mut self, inputs: Inputs<&Tensor, &Tensor, &Tensor>) -> Result<(Tensor, Tensor)> {
        of_plan!(&mut self.0, kept => kept.attend(inputs, true))
    }
}

/// A backend's plan, with its workspace.
struct Kept<H: Home> {
    home: H,
    plan: memory::Plan<H>,
    workspace: H::Owned<u8>,
    workspace_len: usize,
    /// The shape of outputs.
    out: [usize; 4],
    /// Whether rows may belong to no sequence: attention does not write them.
    padded: bool,
}

impl From<Kept<Cpu>> for Of {
    fn from(kept: Kept<Cpu>) -> Self {
        Self::Cpu(Box::new(kept))
    }
}

#[cfg(feature = "candle-cuda")]
impl From<Kept<super::cuda::Gpu>> for Of {
    fn from(kept: Kept<super::cuda::Gpu>) -> Self {
        Self::Cuda(Box::new(kept))
    }
}

impl<H: Home> std::fmt::Debug for Kept<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").field("out", &self.out).finish_non_exhaustive()
    }
}

impl<H: Home> Kept<H> {
    fn new(home: H, plan: memory::Plan<H>, out: [usize; 4]) -> Result<Self> {
        let workspace_len = home.backend().workspace_bytes(&plan);
        let workspace = home.allocate(workspace_len, true)?;
        Ok(Self { home, plan, workspace, workspace_len, out, padded: true })
    }

    fn update(&mut self, batch: &Batch) -> Result<()> {
        self.home.backend().update(&mut self.plan, batch)?;
        self.padded = is_padded(batch);
        Ok(())
    }

    fn attend(
        &mut self,
        inputs: Inputs<&Tensor, &Tensor, &Tensor>,
        f32_out: bool,
    ) -> Result<(Tensor, Tensor)> {
        use crate::DType::{BF16, F16, F32};
        let types = [dtype("query", inputs.query)?, dtype("key", inputs.key)?];
        // Each row is kernels of its own: no more of them than engines ask for.
        match (types, f32_out) {
            ([F32, F32], _) => self.run::<f32, f32, f32>(inputs),
            ([F32, F16], _) => self.run::<f32, f16, f32>(inputs),
            ([F32, BF16], _) => self.run::<f32, bf16, f32>(inputs),
            ([F16, F16], false) => self.run::<f16, f16, f16>(inputs),
            ([F16, F16], true) => self.run::<f16, f16, f32>(inputs),
            ([BF16, BF16], false) => self.run::<bf16, bf16, bf16>(inputs),
            ([BF16, BF16], true) => self.run::<bf16, bf16, f32>(inputs),
            ([query, key], _) => Err(Error::DType { argument: "key", expected: query, got: key }),
        }
    }

    fn run<Q: Element + Number, T: Element + Number, O: Element + Number>(
        &mut self,
        inputs: Inputs<&Tensor, &Tensor, &Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let Self { home, plan, workspace, workspace_len, out: shape, padded } = self;
        let home = &*home;
        let mut tensors = vec![("query", inputs.query), ("key", inputs.key), ("value", inputs.value)];
        if let Some([key, value]) = inputs.prefix {
            tensors.extend([("prefix", key), ("prefix", value)]);
        }
        let tensors = tensors.into_iter().map(|(argument, tensor)| {
            home.check(argument, tensor)?;
            axes(argument, tensor.layout())?;
            Ok((argument, home.readable(tensor)?))
        });
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        let mut tensors: Vec<_> = tensors.iter().map(|(argument, tensor)| (*argument, tensor)).collect();
        let sinks = inputs.sinks.map(|sinks| table(home, "sinks", sinks, &[shape[2]])).transpose()?;
        tensors.extend(sinks.iter().map(|sinks| ("sinks", sinks)));
        let locked = Locked::new(home, &tensors)?;
        let key = |index: usize| locked.view::<H, T>(home, index);
        let has_prefix = inputs.prefix.is_some();
        let mut inputs = Inputs::new(locked.view::<H, Q>(home, 0)?, key(1)?, key(2)?);
        if has_prefix {
            inputs = inputs.with_prefix(key(3)?, key(4)?);
        }
        if sinks.is_some() {
            inputs = inputs.with_sinks(locked.elements(home, tensors.len() - 1)?);
        }
        write_pair(home, *shape, *padded, |out: memory::ViewMut<'_, H, O>, lse| {
            let workspace = home.owned_mut(workspace, *workspace_len);
            home.backend().attend(plan, inputs, out, Some(lse), workspace)
        })
    }
}

/// Whether query rows belong to no sequence. No row belongs to two.
fn is_padded(batch: &Batch) -> bool {
    let [batches, seq, ..] = batch.query_shape();
    batch.sequences().iter().map(|sequence| sequence.rows.len()).sum::<usize>() < batches * seq
}
