//! The CPU as a [`Backend`].

use super::{InstructionSet, append::append, flash};
use crate::backend::{Backend, Capacity, Plain, clamp};
use crate::merge::{PartialOf, merge_rows};
use crate::{Append, Batch, Element, Error, Inputs, PlanConfig, Result, TensorView, TensorViewMut};
use std::ops::RangeBounds;

/// The CPU: memory is vectors, slices and views of them, and calls are done when they return.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu {
    instructions: Option<InstructionSet>,
    threads: Option<usize>,
}

impl Cpu {
    /// This CPU with the best of its instructions, and as many threads as the rayon pool has in
    /// which plans are made.
    pub const fn new() -> Self {
        Self { instructions: None, threads: None }
    }

    /// The same with other instructions.
    ///
    /// # Errors
    /// [`Error::Value`] if the CPU has not got them.
    pub fn with_instructions(self, instructions: InstructionSet) -> Result<Self> {
        instructions.check()?;
        Ok(Self { instructions: Some(instructions), ..self })
    }

    /// The same with plans for at most `threads` threads, or as many as the rayon pool has in which
    /// they are made, if that is fewer.
    ///
    /// # Errors
    /// [`Error::Value`] for 0.
    pub fn with_threads(self, threads: usize) -> Result<Self> {
        if threads == 0 {
            return Err(Error::value("threads", "at least 1", threads));
        }
        Ok(Self { threads: Some(threads), ..self })
    }

    fn threads(&self) -> usize {
        match self.threads {
            Some(1) => 1,
            Some(threads) => threads.min(rayon::current_num_threads()),
            None => rayon::current_num_threads(),
        }
    }

    fn flash_plan(&self, config: &PlanConfig, batch: Batch, threads: usize) -> Result<flash::Plan> {
        let plan = flash::Plan::for_batch(config, batch)?.with_threads(threads)?;
        match self.instructions {
            Some(instructions) => plan.with_instructions(instructions),
            None => Ok(plan),
        }
    }
}

/// The schedule of a batch on the CPU, with room for others. Instructions and threads are those of
/// the backend that made the plan.
#[derive(Clone, Debug)]
pub struct Plan {
    cpu: Cpu,
    config: PlanConfig,
    /// None for one batch alone.
    capacity: Option<Capacity>,
    /// Threads at most: the workspace has memory for each.
    threads: usize,
    plan: flash::Plan,
    workspace_bytes: usize,
}

impl Backend for Cpu {
    type Buffer<T: Plain> = Vec<T>;
    type Slice<'a, T: Plain> = &'a [T];
    type SliceMut<'a, T: Plain> = &'a mut [T];
    type View<'a, T: Element> = TensorView<'a, T>;
    type ViewMut<'a, T: Element> = TensorViewMut<'a, T>;
    type Plan = Plan;

    fn buffer<T: Plain>(&self, len: usize) -> Result<Vec<T>> {
        let mut buffer = Vec::new();
        if buffer.try_reserve_exact(len).is_err() {
            return Err(Error::value("len", "a size that memory has room for", len));
        }
        buffer.resize(len, T::default());
        Ok(buffer)
    }

    fn write<T: Plain>(&self, buffer: &mut Vec<T>, at: usize, data: &[T]) -> Result<()> {
        let len = buffer.len();
        let end = at.checked_add(data.len()).filter(|&end| end <= len);
        let Some(end) = end else {
            let got = format!("{} from {at} on", data.len());
            return Err(Error::value("data", format!("elements within 0..{len}"), got));
        };
        buffer[at..end].copy_from_slice(data);
        Ok(())
    }

    fn read<T: Plain>(&self, buffer: &Vec<T>) -> Result<Vec<T>> {
        Ok(buffer.clone())
    }

    fn slice<'a, T: Plain>(&'a self, buffer: &'a Vec<T>, range: impl RangeBounds<usize>) -> &'a [T] {
        &buffer[clamp(range, buffer.len())]
    }

    fn slice_mut<'a, T: Plain>(
        &'a self,
        buffer: &'a mut Vec<T>,
        range: impl RangeBounds<usize>,
    ) -> &'a mut [T] {
        let range = clamp(range, buffer.len());
        &mut buffer[range]
    }

    fn view<'a, T: Element>(
        argument: &'static str,
        slice: &'a [T],
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<TensorView<'a, T>>
    where
        Self: 'a,
    {
        TensorView::new(argument, slice, shape, strides)
    }

    fn view_mut<'a, T: Element>(
        argument: &'static str,
        slice: &'a mut [T],
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<TensorViewMut<'a, T>>
    where
        Self: 'a,
    {
        TensorViewMut::new(argument, slice, shape, strides)
    }

    fn plan(&self, config: &PlanConfig, capacity: &Capacity) -> Result<Plan> {
        let threads = self.threads();
        let plan = self.flash_plan(config, capacity.empty_batch()?, threads)?;
        let workspace_bytes = plan.most_workspace_bytes(capacity, threads);
        let (capacity, config) = (Some(capacity.clone()), *config);
        Ok(Plan { cpu: *self, config, capacity, threads, plan, workspace_bytes })
    }

    fn plan_for(&self, config: &PlanConfig, batch: &Batch) -> Result<Plan> {
        let threads = self.threads();
        let plan = self.flash_plan(config, batch.clone(), threads)?;
        let workspace_bytes = plan.workspace_bytes();
        Ok(Plan { cpu: *self, config: *config, capacity: None, threads, plan, workspace_bytes })
    }

    fn update(&self, plan: &mut Plan, batch: &Batch) -> Result<()> {
        match &plan.capacity {
            Some(capacity) => capacity.check(batch)?,
            None => return Err(Error::value("plan", "one that was made for a capacity", "one for a batch")),
        }
        plan.plan = plan.cpu.flash_plan(&plan.config, batch.clone(), plan.threads)?;
        Ok(())
    }

    fn workspace_bytes(&self, plan: &Plan) -> usize {
        plan.workspace_bytes
    }

    fn attend<Q: Element, T: Element, O: Element>(
        &self,
        plan: &mut Plan,
        inputs: Inputs<TensorView<'_, Q>, TensorView<'_, T>, &[f32]>,
        out: TensorViewMut<'_, O>,
        lse: Option<&mut [f32]>,
        workspace: &mut [u8],
    ) -> Result<()> {
        plan.plan.run(inputs, out, lse, workspace)
    }

    fn append<T: Element, C: Element>(
        &self,
        new: Append<TensorView<'_, T>, &[f32], &[u32]>,
        cache_key: TensorViewMut<'_, C>,
        cache_value: TensorViewMut<'_, C>,
    ) -> Result<()> {
        append(&new, cache_key, cache_value)
    }

    fn merge<T: Element, O: Element>(
        &self,
        partials: Vec<PartialOf<TensorView<'_, T>, &[f32]>>,
        sinks: Option<&[f32]>,
        out: TensorViewMut<'_, O>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        merge_rows(&partials, sinks, out, lse)
    }
}
