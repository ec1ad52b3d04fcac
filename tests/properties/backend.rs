//! Attention, appends and merges by any backend, on tensors in CPU memory.

use super::Attend;
use super::cases::{Inputs, RUBBISH};
use crate::common::{Call, Layout, Tensor, extents};
use star_attention::merge::PartialOf;
use star_attention::{
    Append, AttentionConfig, Backend, Batch, Element, KvConfig, KvStore, Mask, PlanConfig, Result, Scales,
};

/// A tensor's buffer in a backend's memory.
pub struct Stored<B: Backend, T: Element> {
    pub buffer: B::Buffer<T>,
    shape: [usize; 4],
    strides: [usize; 4],
    /// Elements before the first one.
    offset: usize,
}

impl<B: Backend, T: Element> Stored<B, T> {
    pub fn of(backend: &B, tensor: &Tensor<T>) -> Self {
        let buffer = backend.buffer_of(tensor.buffer()).unwrap();
        Self { buffer, shape: tensor.shape(), strides: tensor.strides(), offset: tensor.offset() }
    }

    pub fn view<'a>(&'a self, backend: &'a B, name: &'static str) -> B::View<'a, T> {
        B::view(name, backend.slice(&self.buffer, self.offset..), self.shape, self.strides).unwrap()
    }

    pub fn view_mut<'a>(&'a mut self, backend: &'a B, name: &'static str) -> B::ViewMut<'a, T> {
        let slice = backend.slice_mut(&mut self.buffer, self.offset..);
        B::view_mut(name, slice, self.shape, self.strides).unwrap()
    }

    /// Copies what is stored to a tensor that lies in its buffer in the same way.
    pub fn read_to(&self, backend: &B, tensor: &mut Tensor<T>) {
        tensor.buffer_mut().copy_from_slice(&backend.read(&self.buffer).unwrap());
    }
}

/// A backend as the properties ask it.
#[derive(Debug)]
pub struct On<B>(pub B);

impl<B: Backend> On<B> {
    /// Attention of a batch into `out` and, if given, its log-sum-exp. The workspace holds rubbish.
    pub fn run<Q: Element, K: Element, O: Element>(
        &self,
        config: &PlanConfig,
        batch: &Batch,
        inputs: &Inputs<Q, K>,
        out: &mut Tensor<O>,
        lse: Option<&mut [f32]>,
    ) {
        self.run_call(config, batch, inputs.call(None, &None), out, lse).unwrap();
    }

    /// The same with what else a call may take. What is refused writes nothing.
    pub fn run_call<Q: Element, K: Element, O: Element>(
        &self,
        config: &PlanConfig,
        batch: &Batch,
        call: Call<'_, Q, K>,
        out: &mut Tensor<O>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let backend = &self.0;
        let mut plan = backend.plan_for(config, batch)?;
        let query = Stored::of(backend, call.query);
        let [key, value] = [call.key, call.value].map(|tensor| Stored::of(backend, tensor));
        let prefix = call.prefix.map(|prefix| prefix.map(|tensor| Stored::of(backend, tensor)));
        let mut to = Stored::of(backend, out);
        let mut to_lse = lse.as_ref().map(|lse| backend.buffer_of(lse).unwrap());
        let workspace = vec![0xffu8; backend.workspace_bytes(&plan)];
        let mut workspace = backend.buffer_of(&workspace).unwrap();
        let numbers = |numbers: &[f32]| backend.buffer_of(numbers).unwrap();
        let sinks = call.sinks.map(numbers);
        let scales = call.scales.map(|Scales { key, value, .. }| [key, value].map(numbers));
        let mut inputs = star_attention::Inputs::new(
            query.view(backend, "query"),
            key.view(backend, "key"),
            value.view(backend, "value"),
        );
        if let Some([key, value]) = &prefix {
            inputs = inputs.with_prefix(key.view(backend, "prefix"), value.view(backend, "prefix"));
        }
        inputs.sinks = sinks.as_ref().map(|sinks| backend.slice(sinks, ..));
        if let Some([key, value]) = &scales {
            inputs = inputs.with_scales(Scales::new(backend.slice(key, ..), backend.slice(value, ..)));
        }
        let result = backend.attend(
            &mut plan,
            inputs,
            to.view_mut(backend, "out"),
            to_lse.as_mut().map(|lse| backend.slice_mut(lse, ..)),
            backend.slice_mut(&mut workspace, ..),
        );
        let before = out.bits();
        to.read_to(backend, out);
        let mut written = out.bits() != before;
        if let (Some(lse), Some(stored)) = (lse, &to_lse) {
            let after = backend.read(stored).unwrap();
            written |= after.iter().zip(&*lse).any(|(after, before)| after.to_bits() != before.to_bits());
            lse.copy_from_slice(&after);
        }
        assert!(result.is_ok() || !written, "wrote in spite of {result:?}");
        result
    }
}

impl<B: Backend> On<B> {
    /// Attention under a mask, by a plan of a config; of packed sequences if they have offsets.
    fn attend_by<T: Element, O: Element>(
        &self,
        (config, mask): (&PlanConfig, &Mask),
        offsets: Option<[&[usize]; 2]>,
        inputs: &Inputs<T>,
        out: &mut Tensor<O>,
        lse: Option<&mut [f32]>,
    ) {
        let [batch, query_len, query_heads, head_dim] = inputs.query.shape();
        let [_, key_len, kv_heads, _] = inputs.key.shape();
        let [.., value_dim] = inputs.value.shape();
        let shape = extents([batch, query_len, key_len], [query_heads, kv_heads], [head_dim, value_dim]);
        let batch = match offsets {
            None => Batch::uniform(&shape, mask),
            Some([query, key]) => Batch::packed(&shape, query, key, mask),
        };
        self.run(config, &batch.unwrap(), inputs, out, lse);
    }
}

impl<B: Backend, T: Element> Attend<T> for On<B> {
    fn attend<O: Element>(
        &self,
        config: &AttentionConfig,
        offsets: Option<[&[usize]; 2]>,
        inputs: &Inputs<T>,
        out: &mut Tensor<O>,
        lse: Option<&mut [f32]>,
    ) {
        self.attend_by((&config.score().into(), &config.mask), offsets, inputs, out, lse);
    }

    /// A store with rows for each sequence, `[batch, capacity, kv_heads, head_dim]`.
    fn shard(&self, appended: &[[Tensor<T>; 2]]) -> [Tensor<T>; 2] {
        let backend = &self.0;
        let [batch, _, kv_heads, head_dim] = appended[0][0].shape();
        let capacity: usize = appended.iter().map(|[key, _]| key.shape()[1]).sum();
        let [.., value_dim] = appended[0][1].shape();
        let config = KvConfig::new(kv_heads, head_dim).with_value_dim(value_dim).in_rows(batch, capacity);
        let mut store = KvStore::new(backend, config).unwrap();
        let sequences: Vec<_> = (0..batch).map(|_| store.open().unwrap()).collect();
        for rows in appended {
            let mut places: Vec<u32> = Vec::new();
            for &sequence in &sequences {
                let (held, more) = (store.len(sequence).unwrap(), rows[0].shape()[1]);
                store.extend(backend, sequence, more).unwrap();
                places.extend(store.places(sequence, held..held + more).unwrap());
            }
            let places = backend.buffer_of(&places).unwrap();
            let [key, value] = rows.each_ref().map(|rows| Stored::of(backend, rows));
            let new = Append::new(
                key.view(backend, "key"),
                value.view(backend, "value"),
                backend.slice(&places, ..),
            );
            store.append(backend, 0, new).unwrap();
        }
        read_store(backend, &store, 0)
    }

    /// Each partial in a layout of its own, with the log-sum-exp and without.
    fn merge(
        &self,
        partials: &[(Tensor<f32>, Vec<f32>)],
        sinks: Option<&[f32]>,
    ) -> Vec<(Tensor<f32>, Vec<f32>)> {
        let (like, like_lse) = &partials[0];
        let partials: Vec<_> = partials
            .iter()
            .enumerate()
            .map(|(i, (out, lse))| {
                let layout = &LAYOUTS[i % LAYOUTS.len()];
                let apart =
                    Tensor::<f32>::new("partial", out.shape(), layout, f32::NAN, |index| out.get(index));
                (apart, lse.clone())
            })
            .collect();
        let mut out = Tensor::<f32>::contiguous("out", like.shape(), |_| f32::NAN);
        let (mut without, mut lse) = (out.clone(), vec![f32::NAN; like_lse.len()]);
        merge_on(&self.0, &partials, sinks, &mut out, Some(&mut lse)).unwrap();
        merge_on(&self.0, &partials, sinks, &mut without, None).unwrap();
        assert!(out.bits() == without.bits(), "no log-sum-exp changes the output");
        vec![(out, lse)]
    }
}

/// The same under plans that promise a row's bits for any number of rows.
#[derive(Debug)]
pub struct RowInvariant<B>(pub On<B>);

impl<B: Backend, T: Element> Attend<T> for RowInvariant<B> {
    fn attend<O: Element>(
        &self,
        config: &AttentionConfig,
        offsets: Option<[&[usize]; 2]>,
        inputs: &Inputs<T>,
        out: &mut Tensor<O>,
        lse: Option<&mut [f32]>,
    ) {
        let plan = PlanConfig::from(config.score()).with_row_invariant();
        self.0.attend_by((&plan, &config.mask), offsets, inputs, out, lse);
    }

    fn shard(&self, appended: &[[Tensor<T>; 2]]) -> [Tensor<T>; 2] {
        self.0.shard(appended)
    }

    fn merge(
        &self,
        partials: &[(Tensor<f32>, Vec<f32>)],
        sinks: Option<&[f32]>,
    ) -> Vec<(Tensor<f32>, Vec<f32>)> {
        Attend::<T>::merge(&self.0, partials, sinks)
    }
}

/// Keys and values of a layer of a store, `[pages, page_len, kv_heads, head_dim]` and `[pages,
/// page_len, kv_heads, value_dim]`.
pub fn read_store<B: Backend, T: Element>(
    backend: &B,
    store: &KvStore<B, T>,
    layer: usize,
) -> [Tensor<T>; 2] {
    let [pages, page_len, ..] = store.shape();
    let places: Vec<u32> = (0..(pages * page_len) as u32).collect();
    let places = backend.buffer_of(&places).unwrap();
    let mut copies =
        [store.shape(), store.value_shape()].map(|shape| Tensor::contiguous("copy", shape, |_| RUBBISH));
    let mut stored = copies.each_ref().map(|copy| Stored::of(backend, copy));
    let [to_key, to_value] = &mut stored;
    let all = Append::new(
        store.key(backend, layer).unwrap(),
        store.value(backend, layer).unwrap(),
        backend.slice(&places, ..),
    );
    backend.append(all, to_key.view_mut(backend, "key"), to_value.view_mut(backend, "value")).unwrap();
    copies.iter_mut().zip(&stored).for_each(|(copy, stored)| stored.read_to(backend, copy));
    copies
}

/// Rows one after another, by heads, and with gaps: at multiples of 16 bytes, and at others.
const LAYOUTS: [Layout; 4] = [
    Layout::CONTIGUOUS,
    Layout { order: [0, 2, 1], ..Layout::CONTIGUOUS },
    Layout { order: [1, 0, 2], padding: [8, 16, 24], offset: 8 },
    Layout { order: [2, 1, 0], padding: [3, 1, 5], offset: 7 },
];

/// Merges partials that lie apart, with a sink for each head if given.
pub fn merge_on<B: Backend, T: Element, O: Element>(
    backend: &B,
    partials: &[(Tensor<T>, Vec<f32>)],
    sinks: Option<&[f32]>,
    out: &mut Tensor<O>,
    lse: Option<&mut [f32]>,
) -> Result<()> {
    let stored: Vec<_> = partials
        .iter()
        .map(|(out, lse)| (Stored::of(backend, out), backend.buffer_of(lse).unwrap()))
        .collect();
    let mut to = Stored::of(backend, out);
    let mut to_lse = lse.as_ref().map(|lse| backend.buffer_of(lse).unwrap());
    let views = stored
        .iter()
        .map(|(out, lse)| PartialOf { out: out.view(backend, "partial"), lse: backend.slice(lse, ..) })
        .collect();
    let sinks = sinks.map(|sinks| backend.buffer_of(sinks).unwrap());
    let result = backend.merge(
        views,
        sinks.as_ref().map(|sinks| backend.slice(sinks, ..)),
        to.view_mut(backend, "out"),
        to_lse.as_mut().map(|lse| backend.slice_mut(lse, ..)),
    );
    to.read_to(backend, out);
    if let (Some(lse), Some(stored)) = (lse, &to_lse) {
        lse.copy_from_slice(&backend.read(stored).unwrap());
    }
    result
}
