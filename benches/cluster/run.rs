//! An attention whose rate is measured, or given.

use super::model::{HEAD_DIM, HEADS, KV_HEADS};
use star_attention::cpu::flash::Plan;
use star_attention::{AttentionConfig, AttentionShape, Inputs, Mask, TensorView, TensorViewMut, bf16};
use std::fmt;
use std::time::Instant;

/// What a rate counts.
#[derive(Clone, Copy, PartialEq)]
pub enum Work {
    Flops,
    /// Bytes of keys and values.
    KeyBytes,
}

/// An attention and its fastest run so far.
pub struct Run {
    what: String,
    shape: AttentionShape,
    plan: Plan,
    work: Work,
    given: Option<f64>,
    query: Vec<bf16>,
    key: Vec<bf16>,
    value: Vec<bf16>,
    /// f32, as of a partial.
    out: Vec<f32>,
    lse: Vec<f32>,
    workspace: Vec<u8>,
    seconds: f64,
}

impl Run {
    /// The model's attention, or that of some of its KV heads, whose number the rate of products
    /// does not depend on.
    pub fn new(
        what: String,
        mask: Mask,
        [query_len, key_len, kv_heads]: [usize; 3],
        work: Work,
        given: Option<f64>,
    ) -> Self {
        let query_heads = HEADS / KV_HEADS * kv_heads;
        let shape = AttentionShape {
            batch: 1,
            query_len,
            key_len,
            query_heads,
            kv_heads,
            head_dim: HEAD_DIM,
            value_dim: HEAD_DIM,
        };
        let plan = Plan::new(&AttentionConfig::new(mask), &shape).unwrap();
        let [queries, keys] = [shape.query_shape(), shape.key_shape()].map(|shape| shape.iter().product());
        let (query, key, value) = (numbers(queries), numbers(keys), numbers(keys));
        let (out, lse) = (vec![0.0; queries], vec![0.0; shape.lse_len()]);
        let workspace = Vec::with_capacity(plan.workspace_bytes());
        Self {
            what,
            shape,
            plan,
            work,
            given,
            query,
            key,
            value,
            out,
            lse,
            workspace,
            seconds: f64::INFINITY,
        }
    }

    /// Runs once, unless the rate is given.
    pub fn run(&mut self) {
        if self.given.is_some() {
            return;
        }
        let (query_shape, key_shape) = (self.shape.query_shape(), self.shape.key_shape());
        let start = Instant::now();
        let query = TensorView::contiguous("query", &self.query, query_shape).unwrap();
        let key = TensorView::contiguous("key", &self.key, key_shape).unwrap();
        let value = TensorView::contiguous("value", &self.value, key_shape).unwrap();
        let out = TensorViewMut::contiguous("out", &mut self.out, query_shape).unwrap();
        let inputs = Inputs::new(query, key, value);
        self.plan.run(inputs, out, Some(&mut self.lse), &mut self.workspace).unwrap();
        self.seconds = self.seconds.min(start.elapsed().as_secs_f64());
    }

    /// Work per second.
    pub fn rate(&self) -> f64 {
        let amount = match self.work {
            Work::Flops => self.plan.flops() as f64,
            Work::KeyBytes => (size_of::<bf16>() * (self.key.len() + self.value.len())) as f64,
        };
        self.given.unwrap_or(amount / self.seconds)
    }
}

/// A row of a table.
impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, shape: AttentionShape { query_heads, kv_heads, head_dim, .. }, .. } = self;
        let unit = if self.work == Work::Flops { "GFLOP/s" } else { "GB/s" };
        let how = if self.given.is_some() { " (given)" } else { "" };
        let rate = self.rate() / 1e9;
        write!(f, "| {what}, {query_heads}/{kv_heads} heads of {head_dim} | {rate:.1} {unit}{how} |")
    }
}

/// Numbers between -1 and 1.
fn numbers(len: usize) -> Vec<bf16> {
    let number = |i: usize| (i.wrapping_mul(2_654_435_761) % 2001) as f32 / 1000.0 - 1.0;
    (0..len).map(|i| bf16::from_f32(number(i))).collect()
}
