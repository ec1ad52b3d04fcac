//! Memory that the caller lends: uninitialised, of any alignment, too small.

use crate::common::{Rng, Tensor, extents};
use star_attention::cpu::flash::{Plan, Workspace};
use star_attention::merge::{Partial, merge};
use star_attention::{AttentionConfig, AttentionShape, Error, Inputs, Mask, Output};
use star_attention::{TensorViewMut, bf16};
use std::mem::MaybeUninit;

/// Few rows whose keys are split, and many rows.
const SHAPES: [AttentionShape; 2] =
    [extents([1, 1, 5000], [4, 2], [40, 40]), extents([2, 70, 90], [4, 2], [24, 40])];

struct Call {
    plan: Plan,
    inputs: [Tensor<bf16>; 3],
}

impl Call {
    fn new(shape: &AttentionShape) -> Self {
        let mut rng = Rng::new(11);
        let plan = Plan::new(&AttentionConfig::new(Mask::Causal), shape).unwrap();
        let shapes = [shape.query_shape(), shape.key_shape(), shape.value_shape()];
        Self { plan, inputs: shapes.map(|shape| Tensor::normal("input", shape, &mut rng)) }
    }

    fn run<'w, O: Output>(&self, out: &mut [O], workspace: impl Into<Workspace<'w>>) -> Result<(), Error> {
        let [query, key, value] = &self.inputs;
        let inputs = Inputs::new(query.view(), key.view(), value.view());
        let out = TensorViewMut::contiguous("out", out, self.plan.batch().out_shape())?;
        self.plan.run(inputs, out, None, workspace)
    }

    fn elements(&self) -> usize {
        self.plan.batch().out_shape().iter().product()
    }

    /// The bits of a call into an output and a workspace that hold zeros.
    fn expected(&self) -> Vec<u32> {
        let mut out = vec![0f32; self.elements()];
        self.run(&mut out, &mut vec![0u8; self.plan.workspace_bytes()]).unwrap();
        out.into_iter().map(f32::to_bits).collect()
    }
}

/// What was written to all of some memory.
fn written<T: Copy>(memory: &[MaybeUninit<T>]) -> Vec<T> {
    // SAFETY: the callers have had all elements written.
    memory.iter().map(|x| unsafe { x.assume_init() }).collect()
}

#[test]
fn outputs_and_workspaces_may_be_uninitialised() {
    for shape in SHAPES {
        let call = Call::new(&shape);
        let bytes = call.plan.workspace_bytes();
        let mut out = Box::<[f32]>::new_uninit_slice(call.elements());
        call.run(&mut out, &mut Box::<[u8]>::new_uninit_slice(bytes)[..]).unwrap();
        let got: Vec<u32> = written(&out).into_iter().map(f32::to_bits).collect();
        assert_eq!(got, call.expected());

        let mut rounded = Box::<[bf16]>::new_uninit_slice(call.elements());
        call.run(&mut rounded, &mut Vec::with_capacity(bytes)).unwrap();
        let expected = call.expected().into_iter().map(|x| bf16::from_f32(f32::from_bits(x)));
        assert_eq!(written(&rounded), expected.collect::<Vec<_>>());
    }
}

/// The spare capacity counts, and the vector keeps its length.
#[test]
fn a_vector_lends_its_capacity() {
    let call = Call::new(&SHAPES[0]);
    let mut workspace = Vec::with_capacity(call.plan.workspace_bytes());
    workspace.extend([1u8, 2, 3]);
    let mut out = vec![0f32; call.elements()];
    call.run(&mut out, &mut workspace).unwrap();
    assert_eq!(workspace.len(), 3);
    assert_eq!(out.into_iter().map(f32::to_bits).collect::<Vec<_>>(), call.expected());
}

#[test]
fn workspaces_of_any_alignment() {
    for shape in SHAPES {
        let call = Call::new(&shape);
        let bytes = call.plan.workspace_bytes();
        let mut memory = vec![0xffu8; bytes + 130];
        for start in [0, 1, 2, 3, 4, 63, 64, 65, 127] {
            memory.fill(0xa5);
            let mut out = vec![f32::NAN; call.elements()];
            call.run(&mut out, &mut memory[start..start + bytes]).unwrap();
            assert_eq!(out.into_iter().map(f32::to_bits).collect::<Vec<_>>(), call.expected());
            let (before, after) = (&memory[..start], &memory[start + bytes..]);
            assert!(before.iter().chain(after).all(|&x| x == 0xa5), "wrote beyond the workspace");
        }
    }
}

#[test]
fn merges_write_uninitialised_outputs() {
    let mut rng = Rng::new(2);
    let shape = [2, 3, 4, 150];
    let parts = [0, 1].map(|_| Tensor::<f32>::normal("partial", shape, &mut rng));
    let partials = [&parts[0], &parts[1]].map(|out| Partial { out: out.view(), lse: &[0.5; 24] });
    let mut expected = vec![0f32; 3600];
    let mut out = Box::<[f32]>::new_uninit_slice(3600);
    let mut lse = [[0f32; 24]; 2];
    let view = TensorViewMut::contiguous("out", &mut expected, shape).unwrap();
    merge(&partials, view, &mut lse[0]).unwrap();
    merge(&partials, TensorViewMut::contiguous("out", &mut out, shape).unwrap(), &mut lse[1]).unwrap();
    assert_eq!(written(&out), expected);
    assert_eq!(lse[0], lse[1]);
}
