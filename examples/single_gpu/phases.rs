//! The two phases, timed and checked: one loop for all backends.

use crate::Sizes;
use crate::check::Errors;
use crate::inputs::Inputs;
use crate::report::{Step, report};
use indicatif::{ProgressBar, ProgressStyle};
use star_attention::merge::PartialOf;
use star_attention::{
    Append, Backend, Batch, Element, Inputs as Views, Keys, KvConfig, KvStore, PlanConfig, RankLayout,
    Result, Sequence, SequenceId, StarLayout,
};
use std::time::Instant;

/// Rows of each rank and phase that are compared with the oracle, over all heads.
const CHECKED_ROWS: usize = 8;

/// A rank with the keys and values that it keeps.
struct Rank<B: Backend, T: Element> {
    local: RankLayout,
    store: KvStore<B, T>,
    sequence: SequenceId,
}

/// Queries, keys and values `[1, tokens, heads, dim]` in a backend's memory.
struct Packed<B: Backend, T: Element> {
    shapes: [[usize; 4]; 3],
    buffers: [B::Buffer<T>; 3],
}

impl<B: Backend, T: Element> Packed<B, T> {
    fn new(
        backend: &B,
        sizes: &Sizes,
        inputs: &Inputs<T>,
        tokens: impl ExactSizeIterator<Item = usize> + Clone,
    ) -> Result<Self> {
        let Sizes { heads, kv_heads, head_dim, .. } = *sizes;
        let rows = |rows: &crate::rows::Rows<T>| backend.buffer_of(&rows.gather(tokens.clone()));
        Ok(Self {
            shapes: [heads, kv_heads, kv_heads].map(|heads| [1, tokens.len(), heads, head_dim]),
            buffers: [rows(&inputs.query)?, rows(&inputs.key)?, rows(&inputs.value)?],
        })
    }

    fn query<'a>(&'a self, backend: &'a B) -> Result<B::View<'a, T>> {
        backend.whole("query", &self.buffers[0], self.shapes[0])
    }

    /// Keys and values of the rows from `first` on.
    fn new_rows<'a>(&'a self, backend: &'a B, first: usize) -> Result<[B::View<'a, T>; 2]> {
        let [_, rows, heads, dim] = self.shapes[1];
        let view = |buffer| {
            let shape = [1, rows - first, heads, dim];
            let strides = [rows * heads * dim, heads * dim, dim, 1];
            B::view("new", backend.slice(buffer, first * heads * dim..), shape, strides)
        };
        Ok([view(&self.buffers[1])?, view(&self.buffers[2])?])
    }
}

/// The shortest of `repeats` times of `work`.
fn measure<B: Backend>(backend: &B, repeats: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let sync = backend.buffer_of(&[0u32])?;
    let mut best = f64::INFINITY;
    for _ in 0..repeats {
        backend.read(&sync)?;
        let start = Instant::now();
        work()?;
        backend.read(&sync)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Runs both phases and prints the table. Whether all errors were within the bound.
pub fn run<B: Backend, T: Element>(backend: &B, device: &str, sizes: &Sizes) -> Result<bool> {
    let layout = StarLayout::builder(sizes.context_len)
        .block_len(sizes.block_len)
        .anchor_len(sizes.anchor_len)
        .ranks(sizes.ranks)
        .build()?;
    // Refuses what no call could take, before memory is filled.
    let Sizes { context_len, query_len, heads, kv_heads, head_dim, .. } = *sizes;
    let all = [1, context_len.saturating_add(query_len), kv_heads, head_dim];
    backend.plan_for(&PlanConfig::new(), &Batch::new([1, query_len, heads, head_dim], all)?)?;
    println!("{device}: {}", sizes.describe(T::DTYPE));
    let bar = ProgressBar::new((sizes.ranks as u64).saturating_mul(2).saturating_add(2)).with_style(
        ProgressStyle::with_template("{msg:24} {wide_bar} {pos}/{len}")
            .unwrap_or(ProgressStyle::default_bar()),
    );
    bar.set_message("random inputs");
    let inputs = Inputs::<T>::random(sizes);
    bar.inc(1);
    let (mut steps, mut ranks) = (Vec::new(), Vec::new());
    for rank in 0..sizes.ranks {
        bar.set_message(format!("phase 1, rank {rank}"));
        let (rank, step) = encode(backend, sizes, &layout, layout.rank(rank)?, &inputs)?;
        ranks.push(rank);
        steps.push(step);
        bar.inc(1);
    }
    steps.extend(attend(backend, sizes, &inputs, &mut ranks, &bar)?);
    bar.finish_and_clear();
    Ok(report(&steps))
}

/// Phase 1 on one rank: its local sequence under its star mask, and what it keeps to its store.
fn encode<B: Backend, T: Element>(
    backend: &B,
    sizes: &Sizes,
    layout: &StarLayout,
    local: RankLayout,
    inputs: &Inputs<T>,
) -> Result<(Rank<B, T>, Step)> {
    let packed = Packed::new(backend, sizes, inputs, local.tokens())?;
    let [query_shape, key_shape, _] = packed.shapes;
    let len = local.local_len();
    let mut batch = Batch::new(query_shape, key_shape)?;
    batch.push(Sequence::new(0, 0..len, Keys::rows(0, 0..len), local.mask()))?;
    let mut plan = backend.plan_for(&PlanConfig::new(), &batch)?;
    let mut out = backend.buffer::<T>(query_shape.iter().product())?;
    let mut lse = backend.buffer::<f32>(batch.lse_len())?;
    let mut workspace = backend.buffer(backend.workspace_bytes(&plan))?;
    let seconds = measure(backend, sizes.repeats, || {
        let [key, value] = packed.new_rows(backend, 0)?;
        let views = Views::new(packed.query(backend)?, key, value);
        let to = backend.whole_mut("out", &mut out, query_shape)?;
        let lse = backend.slice_mut(&mut lse, ..);
        backend.attend(&mut plan, views, to, Some(lse), backend.slice_mut(&mut workspace, ..))
    })?;

    let kept = local.kept();
    let room = local.room(sizes.query_len, sizes.query_len);
    let config = KvConfig::new(sizes.kv_heads, sizes.head_dim).in_rows(1, room);
    let mut store = KvStore::new(backend, config)?;
    let sequence = store.open()?;
    store.extend(backend, sequence, kept.len())?;
    store.put(backend, 0, sequence, 0..kept.len(), packed.new_rows(backend, kept.start)?)?;

    let (out, lse) = (backend.read(&out)?, backend.read(&lse)?);
    let tokens: Vec<usize> = local.tokens().collect();
    // The paper's definition: the anchor, and the row's own block up to itself.
    let seen = |token: usize| {
        let block = token / layout.block_len() * layout.block_len();
        (0..if block == 0 { 0 } else { layout.anchor_len() }).chain(block..token + 1)
    };
    let (mut errors, dim) = (Errors::default(), sizes.head_dim);
    for row in spread(len, CHECKED_ROWS) {
        let token = tokens[row];
        for head in 0..sizes.heads {
            let visible = inputs.visible(seen(token), head / (sizes.heads / sizes.kv_heads));
            let got: Vec<f32> =
                out[(row * sizes.heads + head) * dim..][..dim].iter().map(|x| x.to_f32()).collect();
            errors.see(inputs.query.row(token, head), &visible, &got, lse[head * len + row])?;
        }
    }
    let pairs: usize = tokens.iter().map(|&token| seen(token).size_hint().0).sum();
    let elements = 2 * (query_shape.iter().product::<usize>() + key_shape.iter().product::<usize>());
    let step = Step {
        name: format!("phase 1, rank {}", local.rank()),
        seconds,
        flops: sizes.flops(pairs),
        bytes: elements * T::DTYPE.size(),
        errors: Some(errors),
    };
    Ok((Rank { local, store, sequence }, step))
}

/// Phase 2: the query tokens' partial over what every rank holds, and the merge of all.
fn attend<B: Backend, T: Element>(
    backend: &B,
    sizes: &Sizes,
    inputs: &Inputs<T>,
    ranks: &mut [Rank<B, T>],
    bar: &ProgressBar,
) -> Result<Vec<Step>> {
    let Sizes { query_len, heads, kv_heads, head_dim, context_len, .. } = *sizes;
    let packed = Packed::new(backend, sizes, inputs, context_len..context_len + query_len)?;
    let query_shape = packed.shapes[0];
    let (out_len, lse_len) = (query_len * heads * head_dim, heads * query_len);
    let (mut steps, mut partials) = (Vec::new(), Vec::new());
    for Rank { local, store, sequence } in ranks {
        bar.set_message(format!("phase 2, rank {}", local.rank()));
        let step = local.step(0..query_len);
        let rows = store.begin_step(backend, *sequence, &step)?;
        let places = backend.buffer_of(&rows.appended_places)?;
        let [key, value] = packed.new_rows(backend, 0)?;
        store.append(backend, 0, Append::new(key, value, backend.slice(&places, ..)))?;
        let mut batch = Batch::new(query_shape, store.shape())?;
        let keys = store.keys_of(*sequence, rows.attended)?;
        batch.push(Sequence::new(0, 0..query_len, keys, step.mask()))?;
        let mut plan = backend.plan_for(&PlanConfig::new(), &batch)?;
        let mut workspace = backend.buffer(backend.workspace_bytes(&plan))?;
        let mut out = backend.buffer::<f32>(out_len)?;
        let mut lse = backend.buffer::<f32>(lse_len)?;
        let seconds = measure(backend, sizes.repeats, || {
            let views = Views::new(packed.query(backend)?, store.key(backend, 0)?, store.value(backend, 0)?);
            let to = backend.whole_mut("partial", &mut out, query_shape)?;
            let lse = backend.slice_mut(&mut lse, ..);
            backend.attend(&mut plan, views, to, Some(lse), backend.slice_mut(&mut workspace, ..))
        })?;
        partials.push((out, lse));
        // A row of the leader does not see the step's rows behind it.
        let unseen = if step.leads() { query_len * query_len.saturating_sub(1) / 2 } else { 0 };
        steps.push(Step {
            name: format!("phase 2, rank {}", local.rank()),
            seconds,
            flops: sizes.flops(query_len * rows.attended - unseen),
            bytes: rows.attended * store.row_bytes(),
            errors: None,
        });
        bar.inc(1);
    }

    bar.set_message("merge");
    let mut out = backend.buffer::<f32>(out_len)?;
    let mut lse = backend.buffer::<f32>(lse_len)?;
    let seconds = measure(backend, sizes.repeats, || {
        let all = partials.iter().map(|(out, lse)| {
            let out = backend.whole("partial", out, query_shape)?;
            Ok(PartialOf { out, lse: backend.slice(lse, ..) })
        });
        let to = backend.whole_mut("out", &mut out, query_shape)?;
        backend.merge(all.collect::<Result<_>>()?, None, to, Some(backend.slice_mut(&mut lse, ..)))
    })?;
    let (out, lse) = (backend.read(&out)?, backend.read(&lse)?);
    let mut errors = Errors::default();
    for row in spread(query_len, CHECKED_ROWS) {
        for head in 0..heads {
            let visible = inputs.visible(0..context_len + row + 1, head / (heads / kv_heads));
            let got = &out[(row * heads + head) * head_dim..][..head_dim];
            let query = inputs.query.row(context_len + row, head);
            errors.see(query, &visible, got, lse[head * query_len + row])?;
        }
    }
    let bytes = (sizes.ranks + 1) * (out_len + lse_len) * size_of::<f32>();
    steps.push(Step { name: "merge".into(), seconds, flops: 0, bytes, errors: Some(errors) });
    bar.inc(1);
    Ok(steps)
}

/// At most `count` rows from first to last.
fn spread(rows: usize, count: usize) -> impl Iterator<Item = usize> {
    let count = count.min(rows);
    (0..count).map(move |i| i * (rows - 1) / (count - 1).max(1))
}
