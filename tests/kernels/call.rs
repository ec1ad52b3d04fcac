//! Calls of the kernels on tensors in CPU memory.

use crate::backend::{Backend, Plain};
use crate::common::{Call, Tensor, aligned, extents};
use crate::properties::Attend;
use crate::properties::cases::{Case, Inputs, RUBBISH, cases_of};
use proptest::prelude::*;
use star_attention::cuda::flash::Plan;
use star_attention::cuda::{
    Device, DeviceTensor, DeviceTensorMut, HEAD_DIMS, HalfElement, Partials, Properties, merge,
};
use star_attention::{AttentionConfig, AttentionShape, Element, Result};

/// Makes of each test one on the emulator and one on a GPU; `B` is where it runs.
macro_rules! on_each_device {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident in $strategy:expr),* $(,)?) $body:block)+) => {
        mod emulated {
            use super::*;
            type B = star_attention::cuda::simt::Simt;
            $(crate::call::on_each_device! { @one [$(#[$doc])*] $name ($($arg in $strategy),*) $body })+
        }
        #[cfg(feature = "cuda")]
        mod gpu {
            use super::*;
            type B = crate::backend::Gpu;
            $(crate::call::on_each_device! {
                @one [$(#[$doc])* #[ignore = "needs an NVIDIA GPU"]] $name ($($arg in $strategy),*) $body
            })+
        }
    };
    (@one [$($attribute:tt)*] $name:ident () $body:block) => {
        #[test]
        $($attribute)*
        fn $name() $body
    };
    (@one [$($attribute:tt)*] $name:ident ($($arg:ident in $strategy:expr),+) $body:block) => {
        proptest::prelude::proptest! {
            #[test]
            $($attribute)*
            fn $name($($arg in $strategy),+) $body
        }
    };
}
pub(crate) use on_each_device;

/// Head dims that kernels are built for.
pub fn built_dims() -> impl Strategy<Value = usize> {
    prop::sample::select(HEAD_DIMS.to_vec())
}

/// Head dims with value dims: those that kernels are built for, and some that are padded.
pub fn kernel_dims() -> impl Strategy<Value = (usize, usize)> {
    let padded = vec![(72, 72), (80, 80), (112, 112), (8, 8), (64, 32), (40, 96)];
    prop_oneof![
        20 => built_dims().prop_map(|dim| (dim, dim)),
        4 => Just((192, 128)),
        7 => prop::sample::select(padded),
    ]
}

/// The same, and now and then the widest, which are slow on the emulator.
fn all_dims() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![40 => kernel_dims(), 1 => prop::sample::select(vec![(512, 512), (576, 512)])]
}

/// Random calls that the kernels take.
pub fn kernel_cases() -> impl Strategy<Value = Case> {
    aligned_cases(all_dims())
}

/// The same on head dims that kernels are built for, as variants of them are.
pub fn variant_cases() -> impl Strategy<Value = Case> {
    aligned_cases(built_dims().prop_map(|dim| (dim, dim)))
}

fn aligned_cases(dims: impl Strategy<Value = (usize, usize)>) -> impl Strategy<Value = Case> {
    cases_of(dims).prop_map(|mut case| {
        case.layouts = case.layouts.map(|layout| aligned(&layout));
        case
    })
}

/// A tensor's buffer in a device's memory.
pub struct Memory<B: Backend, T: Plain> {
    pub memory: B::Memory<T>,
    pub shape: [usize; 4],
    pub strides: [usize; 4],
    /// Elements before the first one.
    pub offset: usize,
}

impl<B: Backend, T: Element> Memory<B, T> {
    pub fn of(backend: &B, tensor: &Tensor<T>) -> Self {
        let (shape, strides, offset) = (tensor.shape(), tensor.strides(), tensor.offset());
        Self { memory: backend.memory(tensor.buffer()), shape, strides, offset }
    }

    pub fn view<'a>(&'a self, backend: &'a B, name: &'static str) -> DeviceTensor<'a, B::Device, T> {
        let span = backend.span(&self.memory).range(self.offset..usize::MAX);
        DeviceTensor::new(name, span, self.shape, self.strides).unwrap()
    }

    pub fn view_mut<'a>(
        &'a mut self,
        backend: &'a B,
        name: &'static str,
    ) -> DeviceTensorMut<'a, B::Device, T> {
        let span = backend.span_mut(&mut self.memory).range(self.offset..usize::MAX);
        DeviceTensorMut::new(name, span, self.shape, self.strides).unwrap()
    }
}

/// One call of a plan into an output and a workspace that hold rubbish.
pub fn run_plan<B: Backend, T: HalfElement, O: Element>(
    backend: &B,
    plan: &Plan,
    inputs: &Inputs<T>,
    out: &mut Tensor<O>,
    lse: Option<&mut [f32]>,
) -> Result<()> {
    run_call(backend, plan, inputs.call(None, &None), out, lse)
}

/// The same with prefixes and sinks, where the call has them.
pub fn run_call<B: Backend, T: HalfElement, O: Element>(
    backend: &B,
    plan: &Plan,
    Call { query, key, value, prefix, sinks, .. }: Call<'_, T, T>,
    out: &mut Tensor<O>,
    lse: Option<&mut [f32]>,
) -> Result<()> {
    crate::count::report_at_exit();
    let [query, key, value] = [query, key, value].map(|tensor| Memory::of(backend, tensor));
    let prefix = prefix.map(|prefix| prefix.map(|tensor| Memory::of(backend, tensor)));
    let prefix = prefix.as_ref().map(|prefix| prefix.each_ref().map(|memory| memory.view(backend, "prefix")));
    let mut out_memory = Memory::of(backend, out);
    let mut lse_memory = backend.memory(&vec![RUBBISH; lse.as_ref().map_or(0, |lse| lse.len())]);
    let mut workspace = backend.memory(&vec![0xffu8; plan.workspace_bytes()]);
    let (query, key, value) =
        (query.view(backend, "query"), key.view(backend, "key"), value.view(backend, "value"));
    let mut inputs = star_attention::Inputs::new(&query, &key, &value);
    if let Some([key, value]) = &prefix {
        inputs = inputs.with_prefix(key, value);
    }
    let sinks = sinks.map(|sinks| backend.memory(sinks));
    let sinks = sinks.as_ref().map(|sinks| backend.span(sinks));
    inputs.sinks = sinks.as_ref();
    plan.prepare(backend.device(), backend.stream(), backend.span_mut(&mut workspace))?.run(
        inputs,
        &mut out_memory.view_mut(backend, "out"),
        lse.is_some().then(|| backend.span_mut(&mut lse_memory)).as_mut(),
    )?;
    out.buffer_mut().copy_from_slice(&backend.read(&out_memory.memory));
    if let Some(lse) = lse {
        lse.copy_from_slice(&backend.read(&lse_memory));
    }
    Ok(())
}

impl Case {
    pub fn device_plan<B: Backend>(&self, backend: &B) -> Plan {
        Plan::new(&backend.device().properties(), &self.config, &self.shape).unwrap()
    }
}

fn shape_of<T: Element>(inputs: &Inputs<T>) -> AttentionShape {
    let ([batch, query_len, query_heads, head_dim], [_, key_len, kv_heads, _]) =
        (inputs.query.shape(), inputs.key.shape());
    let [.., value_dim] = inputs.value.shape();
    extents([batch, query_len, key_len], [query_heads, kv_heads], [head_dim, value_dim])
}

/// A variant of the kernel for many rows, by its name.
pub struct Variant<B>(pub B, pub &'static str);

impl<B: Backend, T: HalfElement> Attend<T> for Variant<B> {
    fn attend<O: Element>(
        &self,
        config: &AttentionConfig,
        _: Option<[&[usize]; 2]>,
        inputs: &Inputs<T>,
        out: &mut Tensor<O>,
        lse: Option<&mut [f32]>,
    ) {
        let Self(backend, name) = self;
        // Some need the shared memory of a large chip.
        let large = Properties::new(8, 228 * 1024, 1 << 20);
        let plan = Plan::variant(&large, config, &shape_of(inputs), name).unwrap();
        run_plan(backend, &plan, inputs, out, lse).unwrap();
    }

    fn shard(&self, _: &[[Tensor<T>; 2]]) -> [Tensor<T>; 2] {
        unreachable!("attention alone has variants")
    }

    fn merge(&self, _: &[(Tensor<f32>, Vec<f32>)], _: Option<&[f32]>) -> Vec<(Tensor<f32>, Vec<f32>)> {
        unreachable!("attention alone has variants")
    }
}

/// Merges partials of any types on a device, stacked as an all-gather would leave them, with a sink
/// for each head if given.
pub fn merge_on<B: Backend, T: Element, O: Element>(
    backend: &B,
    partials: &[(Tensor<T>, Vec<f32>)],
    sinks: Option<&[f32]>,
    out: &mut Tensor<O>,
    lse: &mut [f32],
) -> Result<()> {
    crate::count::report_at_exit();
    let [batch, seq, heads, dim] = out.shape();
    let stacked =
        Tensor::<T>::contiguous("partials", [partials.len() * batch, seq, heads, dim], |[b, s, h, d]| {
            partials[b / batch].0.get([b % batch, s, h, d]).to_f32()
        });
    let stacked = Memory::of(backend, &stacked);
    let partials_lse: Vec<f32> = partials.iter().flat_map(|(_, lse)| lse).copied().collect();
    let partials_lse = backend.memory(&partials_lse);
    let all = Partials {
        out: stacked.view(backend, "partials"),
        lse: backend.span(&partials_lse),
        lse_stride: lse.len(),
    };
    let mut out_memory = Memory::of(backend, out);
    let mut lse_memory = backend.memory(lse);
    let sinks = sinks.map(|sinks| backend.memory(sinks));
    merge(
        backend.device(),
        backend.stream(),
        &all,
        sinks.as_ref().map(|sinks| backend.span(sinks)).as_ref(),
        &mut out_memory.view_mut(backend, "out"),
        Some(&mut backend.span_mut(&mut lse_memory)),
    )?;
    out.buffer_mut().copy_from_slice(&backend.read(&out_memory.memory));
    lse.copy_from_slice(&backend.read(&lse_memory));
    Ok(())
}
