//! A call of the CPU, to be repeated.

use super::random::random;
use star_attention::cpu::flash::Plan;
use star_attention::{Element, Inputs, TensorView, TensorViewMut};

/// A plan, and all memory that it needs.
pub struct Call<T> {
    pub plan: Plan,
    query: Vec<T>,
    key: Vec<T>,
    value: Vec<T>,
    out: Vec<T>,
    workspace: Vec<u8>,
}

impl<T: Element> Call<T> {
    /// The plan on random tensors.
    pub fn of(plan: Plan) -> Self {
        let elements = |shape: [usize; 4]| shape.iter().product::<usize>();
        let (query_len, key_len) = (elements(plan.batch().query_shape()), elements(plan.batch().key_shape()));
        Self {
            query: random(query_len, 1),
            key: random(key_len, 2),
            value: random(key_len, 3),
            out: vec![T::default(); query_len],
            workspace: Vec::with_capacity(plan.workspace_bytes()),
            plan,
        }
    }

    pub fn run(&mut self) {
        let (queries, keys) = (self.plan.batch().query_shape(), self.plan.batch().key_shape());
        let inputs = Inputs::new(
            TensorView::contiguous("query", &self.query, queries).unwrap(),
            TensorView::contiguous("key", &self.key, keys).unwrap(),
            TensorView::contiguous("value", &self.value, keys).unwrap(),
        );
        let out = TensorViewMut::contiguous("out", &mut self.out, queries).unwrap();
        self.plan.run(inputs, out, None, &mut self.workspace).unwrap();
    }
}
