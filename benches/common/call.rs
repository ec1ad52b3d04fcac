//! A call of the CPU, to be repeated.

use super::random::random;
use star_attention::cpu::flash::Plan;
use star_attention::{Element, Inputs, TensorView, TensorViewMut};

/// The most elements that a case puts before a tensor, or between its rows.
pub const MOST_SPARE: usize = 64;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Where rows of a tensor lie.
#[derive(Clone, Copy)]
pub struct Place {
    /// Whether the rows of a head lie one after another, as in a cache, or those of a token.
    pub head_major: bool,
    /// Elements from a cache line's start to the first.
    pub offset: usize,
    /// Elements between rows.
    pub gap: usize,
}

/// Rows of a head one after another, from a cache line's start on.
pub const CACHE: Place = Place { head_major: true, offset: 0, gap: 0 };
/// A tensor `[batch, seq, heads, dim]`.
pub const TOKENS: Place = Place { head_major: false, ..CACHE };

/// A plan, and all memory that it needs: for queries and outputs of `Q`, keys and values of `K`.
pub struct Call<Q, K = Q> {
    pub plan: Plan,
    pub query_place: Place,
    pub key_place: Place,
    query: Vec<Q>,
    key: Vec<K>,
    value: Vec<K>,
    out: Vec<Q>,
    workspace: Vec<u8>,
}

impl<Q: Element, K: Element> Call<Q, K> {
    /// The plan on random tensors: queries by token, keys and values as in a cache.
    pub fn of(plan: Plan) -> Self {
        let batch = plan.batch();
        Self {
            query: random(room(batch.query_shape()), 1),
            key: random(room(batch.key_shape()), 2),
            value: random(room(batch.value_shape()), 3),
            out: vec![Q::default(); batch.out_shape().iter().product()],
            workspace: Vec::with_capacity(plan.workspace_bytes()),
            plan,
            query_place: TOKENS,
            key_place: CACHE,
        }
    }

    pub fn run(&mut self) {
        let batch = self.plan.batch();
        let query = view("query", &self.query, batch.query_shape(), self.query_place);
        let key = view("key", &self.key, batch.key_shape(), self.key_place);
        let value = view("value", &self.value, batch.value_shape(), self.key_place);
        let out = TensorViewMut::contiguous("out", &mut self.out, batch.out_shape()).unwrap();
        self.plan.run(Inputs::new(query, key, value), out, None, &mut self.workspace).unwrap();
    }
}

/// Elements that a tensor needs in any place.
fn room([batch, seq, heads, dim]: [usize; 4]) -> usize {
    batch * seq * heads * (dim + MOST_SPARE) + MOST_SPARE + LINE
}

fn view<'a, T: Element>(
    name: &'static str,
    data: &'a [T],
    shape: [usize; 4],
    place: Place,
) -> TensorView<'a, T> {
    let [_, seq, heads, dim] = shape;
    let row = dim + place.gap;
    let [of_seq, of_heads] = if place.head_major { [row, seq * row] } else { [heads * row, row] };
    let start = data.as_ptr().align_offset(LINE) + place.offset;
    TensorView::new(name, &data[start..], shape, [seq * heads * row, of_seq, of_heads, 1]).unwrap()
}
