//! Calls of the kernels on tensors of the host.

use crate::backend::{Backend, Plain};
use crate::cases::{Case, Inputs, RUBBISH, cases};
use crate::common::{Layout, Tensor};
use proptest::prelude::*;
use star_attention::Element;
use star_attention::cuda::flash::Plan;
use star_attention::cuda::{Device, DeviceTensor, DeviceTensorMut, HEAD_DIMS, HalfElement};

/// Rows at multiples of 16 bytes.
pub fn aligned(layout: &Layout) -> Layout {
    Layout { order: layout.order, padding: layout.padding.map(|p| p / 4 * 8), offset: layout.offset / 4 * 8 }
}

/// Random calls that the kernels take.
pub fn kernel_cases() -> impl Strategy<Value = Case> {
    (cases(), prop::sample::select(HEAD_DIMS.to_vec())).prop_map(|(mut case, head_dim)| {
        case.shape.head_dim = head_dim;
        case.layouts = std::array::from_fn(|i| aligned(&case.layouts[i]));
        case
    })
}

/// A tensor's buffer in a device's memory.
pub struct Memory<B: Backend, T: Plain> {
    pub memory: B::Memory<T>,
    shape: [usize; 4],
    strides: [usize; 4],
    offset: usize,
}

impl<B: Backend, T: Element> Memory<B, T> {
    pub fn of(backend: &B, tensor: &Tensor<T>) -> Self {
        let (shape, strides, offset) = (tensor.shape(), tensor.strides(), tensor.offset());
        Self { memory: backend.memory(tensor.buffer()), shape, strides, offset }
    }

    pub fn view<'a>(&'a self, backend: &'a B, name: &'static str) -> DeviceTensor<'a, B::Device, T> {
        let span = backend.span(&self.memory).from(self.offset);
        DeviceTensor::new(name, span, self.shape, self.strides).unwrap()
    }

    pub fn view_mut<'a>(
        &'a mut self,
        backend: &'a B,
        name: &'static str,
    ) -> DeviceTensorMut<'a, B::Device, T> {
        let span = backend.span_mut(&mut self.memory).from(self.offset);
        DeviceTensorMut::new(name, span, self.shape, self.strides).unwrap()
    }
}

/// One call of a plan into an output and a workspace that hold rubbish.
pub fn run_plan<B: Backend, T: HalfElement, O: Element>(
    backend: &B,
    plan: &Plan,
    Inputs { query, key, value }: &Inputs<T>,
    mut out: Tensor<O>,
    lse_len: Option<usize>,
) -> star_attention::Result<(Tensor<O>, Vec<f32>)> {
    let [query, key, value] = [query, key, value].map(|tensor| Memory::of(backend, tensor));
    let mut out_memory = Memory::of(backend, &out);
    let mut lse = backend.memory(&vec![RUBBISH; lse_len.unwrap_or(0)]);
    let mut workspace = backend.memory(&vec![0xffu8; plan.workspace_len()]);
    plan.prepare(backend.device(), backend.stream(), backend.span_mut(&mut workspace))?.run(
        &query.view(backend, "query"),
        &key.view(backend, "key"),
        &value.view(backend, "value"),
        &mut out_memory.view_mut(backend, "out"),
        lse_len.map(|_| backend.span_mut(&mut lse)).as_mut(),
    )?;
    out.buffer_mut().copy_from_slice(&backend.read(&out_memory.memory));
    Ok((out, backend.read(&lse)))
}

impl Case {
    pub fn device_plan<B: Backend>(&self, backend: &B) -> Plan {
        Plan::new(&backend.device().properties(), &self.config, &self.shape).unwrap()
    }
}
