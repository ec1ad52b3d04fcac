//! What a backend refuses leaves all as it was.

use super::backend::Stored;
use crate::common::{Rng, Tensor};
use star_attention::{
    Backend, Batch, Capacity, Element, Error, Inputs, Keys, Mask, PlanConfig, Result, Sequence,
};

/// A plan that refuses a batch beyond its capacity still serves the batch before.
pub fn a_refused_update_leaves_the_plan<B: Backend, T: Element>(backend: &B) {
    let (query, key) = ([3, 1, 2, 64], [3, 100, 1, 64]);
    let batch = |lens: &[usize]| {
        let mut batch = Batch::new(query, key).unwrap();
        for (index, &len) in lens.iter().enumerate() {
            batch.push(Sequence::new(index, 0..1, Keys::rows(index, 0..len), Mask::Causal)).unwrap();
        }
        batch
    };
    let mut rng = Rng::new(3);
    let [query, key, value] =
        [query, key, key].map(|shape| Stored::of(backend, &Tensor::<T>::normal("input", shape, &mut rng)));
    let mut plan = backend.plan(&PlanConfig::new(), &Capacity::new([3, 1, 2, 64], [3, 100, 1, 64], 2, 1));
    let plan = plan.as_mut().unwrap();
    let workspace = backend.workspace_bytes(plan);
    let attend = |plan: &mut B::Plan| {
        let mut out = Tensor::<T>::contiguous("out", [3, 1, 2, 64], |_| 7.0);
        let mut stored = Stored::of(backend, &out);
        let mut workspace = backend.buffer::<u8>(workspace).unwrap();
        let inputs =
            Inputs::new(query.view(backend, "query"), key.view(backend, "key"), value.view(backend, "value"));
        let workspace = backend.slice_mut(&mut workspace, ..);
        backend.attend(plan, inputs, stored.view_mut(backend, "out"), None, workspace).unwrap();
        stored.read_to(backend, &mut out);
        out.bits()
    };
    backend.update(plan, &batch(&[100, 30])).unwrap();
    let before = attend(plan);
    let refused: Result<()> = backend.update(plan, &batch(&[5, 6, 7]));
    assert!(matches!(refused, Err(Error::Value { argument: "sequences", .. })), "{refused:?}");
    assert!(attend(plan) == before, "the refused batch was set");
    backend.update(plan, &batch(&[5, 6])).unwrap();
    assert!(attend(plan) != before);
}

/// A write that does not fit its buffer writes nothing.
pub fn writes_stay_inside_buffers<B: Backend>(backend: &B) {
    let mut buffer = backend.buffer_of(&[1u32, 2, 3, 4]).unwrap();
    for (at, count) in [(3, 2), (0, 5), (4, 1), (usize::MAX, 1), (usize::MAX - 1, 4)] {
        let refused = backend.write(&mut buffer, at, &[9u32; 5][..count]);
        assert!(matches!(refused, Err(Error::Value { argument: "data", .. })), "{at}: {refused:?}");
    }
    backend.write(&mut buffer, 4, &[]).unwrap();
    assert_eq!(backend.read(&buffer).unwrap(), [1, 2, 3, 4]);
    backend.write(&mut buffer, 2, &[8, 9]).unwrap();
    assert_eq!(backend.read(&buffer).unwrap(), [1, 2, 8, 9]);
}
