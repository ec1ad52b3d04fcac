//! A call of the CPU, to be repeated.

use super::random::random;
use star_attention::cpu::flash::Plan;
use star_attention::{Element, Inputs, TensorView, TensorViewMut};

/// A plan, and all memory that it needs: for queries and outputs of `Q`, keys and values of `K`.
pub struct Call<Q, K = Q> {
    pub plan: Plan,
    /// Whether the rows of a head lie one after another, as in a cache, or those of a token.
    pub head_major: bool,
    query: Vec<Q>,
    key: Vec<K>,
    value: Vec<K>,
    out: Vec<Q>,
    workspace: Vec<u8>,
}

impl<Q: Element, K: Element> Call<Q, K> {
    /// The plan on random tensors.
    pub fn of(plan: Plan) -> Self {
        let elements = |shape: [usize; 4]| shape.iter().product::<usize>();
        let batch = plan.batch();
        Self {
            query: random(elements(batch.query_shape()), 1),
            key: random(elements(batch.key_shape()), 2),
            value: random(elements(batch.value_shape()), 3),
            out: vec![Q::default(); elements(batch.out_shape())],
            workspace: Vec::with_capacity(plan.workspace_bytes()),
            plan,
            head_major: true,
        }
    }

    pub fn run(&mut self) {
        let batch = self.plan.batch();
        let query = TensorView::contiguous("query", &self.query, batch.query_shape()).unwrap();
        let key = rows("key", &self.key, batch.key_shape(), self.head_major);
        let value = rows("value", &self.value, batch.value_shape(), self.head_major);
        let out = TensorViewMut::contiguous("out", &mut self.out, batch.out_shape()).unwrap();
        self.plan.run(Inputs::new(query, key, value), out, None, &mut self.workspace).unwrap();
    }
}

fn rows<'a, T: Element>(
    name: &'static str,
    data: &'a [T],
    [batch, seq, heads, dim]: [usize; 4],
    head_major: bool,
) -> TensorView<'a, T> {
    if head_major {
        return TensorView::contiguous(name, data, [batch, heads, seq, dim]).unwrap().swap_seq_heads();
    }
    TensorView::contiguous(name, data, [batch, seq, heads, dim]).unwrap()
}
