//! The two phases, timed and checked.

use crate::Sizes;
use crate::backend::Backend;
use crate::check::{Errors, Visible};
use crate::table::{table, time};
use indicatif::{ProgressBar, ProgressStyle};
use star_attention::cuda::flash::Plan;
use star_attention::cuda::{Cuda, Device, DeviceTensor, DeviceTensorMut, HalfElement, Partials, merge};
use star_attention::{
    AttentionConfig, AttentionShape, KvConfig, KvStore, Mask, RankLayout, Result, SequenceId, StarLayout,
};
use std::time::Instant;

/// Rows of each rank and phase that are compared with the oracle, over all heads.
const CHECKED_ROWS: usize = 8;

/// Standard normal values of any token: a token's are the same on every rank.
struct Tensor<T> {
    heads: usize,
    dim: usize,
    data: Vec<T>,
}

impl<T: HalfElement> Tensor<T> {
    fn random(seed: u64, tokens: usize, heads: usize, dim: usize) -> Self {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as f32 + 0.5) / (1u64 << 31) as f32
        };
        // The sum of four uniform numbers, scaled to variance 1, is near enough to normal.
        let mut value = || (0..4).map(|_| uniform() - 0.5).sum::<f32>() * 3f32.sqrt();
        let data = (0..tokens * heads * dim).map(|_| T::from_f32(value())).collect();
        Self { heads, dim, data }
    }

    fn row(&self, token: usize, head: usize) -> &[T] {
        &self.data[(token * self.heads + head) * self.dim..][..self.dim]
    }

    fn gather(&self, tokens: impl Iterator<Item = usize>) -> Vec<T> {
        let size = self.heads * self.dim;
        tokens.flat_map(|token| &self.data[token * size..][..size]).copied().collect()
    }
}

/// Queries, keys and values of the context's tokens and then the query's.
struct Inputs<T> {
    query: Tensor<T>,
    key: Tensor<T>,
    value: Tensor<T>,
}

impl<T: HalfElement> Inputs<T> {
    fn visible(&self, tokens: impl Iterator<Item = usize> + Clone, kv_head: usize) -> Visible<T> {
        let rows =
            |tensor: &Tensor<T>| tokens.clone().flat_map(|t| tensor.row(t, kv_head).to_vec()).collect();
        Visible { keys: rows(&self.key), values: rows(&self.value) }
    }
}

/// A step's time, work, and errors.
struct Step {
    name: String,
    seconds: f64,
    flops: u64,
    bytes: usize,
    errors: Option<Errors>,
}

/// A rank's keys and values in the device's memory: one sequence in rows.
struct Shard<D: Device, T: HalfElement> {
    store: KvStore<Cuda<D>, T>,
    sequence: SequenceId,
}

impl<D: Device, T: HalfElement> Shard<D, T> {
    /// Stores keys and values `[1, rows, kv_heads, dim]` behind those that are held.
    fn push<'a>(&mut self, cuda: &Cuda<D>, rows: [DeviceTensor<'a, D, T>; 2]) -> Result<()>
    where
        D: 'a,
    {
        let (held, more) = (self.store.len(self.sequence)?, rows[0].shape()[1]);
        self.store.extend(cuda, self.sequence, more)?;
        self.store.put(cuda, 0, self.sequence, held..held + more, rows)
    }
}

/// The shortest of `repeats` times of `work`, after one that is not counted on devices that must warm up.
fn measure<B: Backend>(backend: &B, repeats: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let sync = backend.memory(&[0u32]);
    let mut best = f64::INFINITY;
    for _ in 0..repeats.max(1) {
        backend.read(&sync);
        let start = Instant::now();
        work()?;
        backend.read(&sync);
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Runs both phases and prints the table. Whether all errors were within the bound.
pub fn run<B: Backend, T: HalfElement>(backend: &B, device: &str, sizes: &Sizes) -> Result<bool> {
    let layout = StarLayout::builder(sizes.context_len)
        .block_len(sizes.block_len)
        .anchor_len(sizes.anchor_len)
        .ranks(sizes.ranks)
        .build()?;
    let tokens = sizes.context_len + sizes.query_len;
    // Refuses what no call could take, before memory is filled.
    let all = attention_shape(sizes, sizes.query_len, tokens);
    Plan::new(&backend.device().properties(), &AttentionConfig::default(), &all)?;
    println!(
        "{device}: {} tokens, block {}, anchor {}, {} ranks, {}/{} heads of {}, {}, {} query tokens",
        sizes.context_len,
        sizes.block_len,
        sizes.anchor_len,
        sizes.ranks,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        T::DTYPE,
        sizes.query_len,
    );
    let bar = ProgressBar::new(2 * sizes.ranks as u64 + 2).with_style(
        ProgressStyle::with_template("{msg:24} {wide_bar} {pos}/{len}")
            .unwrap_or(ProgressStyle::default_bar()),
    );
    bar.set_message("random inputs");
    let Sizes { heads, kv_heads, head_dim, seed, .. } = *sizes;
    let inputs = Inputs {
        query: Tensor::<T>::random(seed ^ 1, tokens, heads, head_dim),
        key: Tensor::<T>::random(seed ^ 2, tokens, kv_heads, head_dim),
        value: Tensor::<T>::random(seed ^ 3, tokens, kv_heads, head_dim),
    };
    bar.inc(1);
    let mut steps = Vec::new();
    let mut shards = Vec::new();
    for rank in 0..sizes.ranks {
        bar.set_message(format!("phase 1, rank {rank}"));
        let local = layout.rank(rank)?;
        let (shard, step) = encode(backend, sizes, &layout, &local, &inputs)?;
        shards.push(shard);
        steps.push(step);
        bar.inc(1);
    }
    steps.extend(attend(backend, sizes, &layout, &inputs, &mut shards, &bar)?);
    bar.finish_and_clear();
    Ok(report(&steps))
}

fn attention_shape(sizes: &Sizes, query_len: usize, key_len: usize) -> AttentionShape {
    let Sizes { heads: query_heads, kv_heads, head_dim, .. } = *sizes;
    AttentionShape { batch: 1, query_len, key_len, query_heads, kv_heads, head_dim }
}

/// Phase 1 on one rank: its local sequence under its star mask, and what it keeps to its shard.
fn encode<B: Backend, T: HalfElement>(
    backend: &B,
    sizes: &Sizes,
    layout: &StarLayout,
    local: &RankLayout,
    inputs: &Inputs<T>,
) -> Result<(Shard<B::Device, T>, Step)> {
    let shape = attention_shape(sizes, local.local_len(), local.local_len());
    let plan = Plan::new(&backend.device().properties(), &AttentionConfig::new(local.mask()), &shape)?;
    let [query, key, value] =
        [&inputs.query, &inputs.key, &inputs.value].map(|t| backend.memory(&t.gather(local.tokens())));
    let mut out = backend.memory(&vec![T::default(); shape.query_shape().iter().product()]);
    let mut lse = backend.memory(&vec![0f32; shape.lse_len()]);
    let mut workspace = backend.memory(&vec![0u8; plan.workspace_bytes()]);
    let view = |name, memory, extents| DeviceTensor::contiguous(name, backend.span(memory), extents);
    let (q, k, v) = (
        view("query", &query, shape.query_shape())?,
        view("key", &key, shape.key_shape())?,
        view("value", &value, shape.key_shape())?,
    );
    let seconds = {
        let out_span = backend.span_mut(&mut out);
        let mut out = DeviceTensorMut::contiguous("out", out_span, shape.query_shape())?;
        let mut lse = backend.span_mut(&mut lse);
        let workspace = backend.span_mut(&mut workspace);
        let mut prepared = plan.prepare(backend.device(), backend.stream(), workspace)?;
        measure(backend, sizes.repeats, || {
            prepared.run(star_attention::Inputs::new(&q, &k, &v), &mut out, Some(&mut lse))
        })?
    };

    let kept = local.kept();
    let own = if local.rank() == layout.query_rank() { sizes.query_len } else { 0 };
    let cuda = backend.as_cuda();
    let room = KvConfig::new(sizes.kv_heads, sizes.head_dim).in_rows(1, kept.len() + own);
    let mut store = KvStore::new(&cuda, room)?;
    let mut shard = Shard { sequence: store.open()?, store };
    shard.push(&cuda, [k.narrow(1, kept.start, kept.len())?, v.narrow(1, kept.start, kept.len())?])?;

    let (out, lse) = (backend.read(&out), backend.read(&lse));
    let tokens: Vec<usize> = local.tokens().collect();
    let mut errors = Errors::default();
    for row in spread(local.local_len(), CHECKED_ROWS) {
        // The paper's definition: the anchor, and the row's own block up to itself.
        let token = tokens[row];
        let block = token / layout.block_len() * layout.block_len();
        let anchor = if block == 0 { 0 } else { layout.anchor_len() };
        for head in 0..sizes.heads {
            let group = sizes.heads / sizes.kv_heads;
            let visible = inputs.visible((0..anchor).chain(block..token + 1), head / group);
            let at = (row * sizes.heads + head) * sizes.head_dim;
            let got: Vec<f32> = out[at..at + sizes.head_dim].iter().map(|x| x.to_f32()).collect();
            errors.see(inputs.query.row(token, head), &visible, &got, lse[head * local.local_len() + row])?;
        }
    }
    let elements =
        2 * shape.query_shape().iter().product::<usize>() + 2 * shape.key_shape().iter().product::<usize>();
    let step = Step {
        name: format!("phase 1, rank {}", local.rank()),
        seconds,
        flops: plan.flops(),
        bytes: elements * T::DTYPE.size(),
        errors: Some(errors),
    };
    Ok((shard, step))
}

/// Phase 2: the query tokens' partial over every shard, and the merge of all.
fn attend<B: Backend, T: HalfElement>(
    backend: &B,
    sizes: &Sizes,
    layout: &StarLayout,
    inputs: &Inputs<T>,
    shards: &mut [Shard<B::Device, T>],
    bar: &ProgressBar,
) -> Result<Vec<Step>> {
    let Sizes { query_len, heads, kv_heads, head_dim, context_len, .. } = *sizes;
    let asked = context_len..context_len + query_len;
    let [query, key, value] =
        [&inputs.query, &inputs.key, &inputs.value].map(|t| backend.memory(&t.gather(asked.clone())));
    let query_shape = [1, query_len, heads, head_dim];
    let q = DeviceTensor::contiguous("query", backend.span(&query), query_shape)?;
    let own = [1, query_len, kv_heads, head_dim];
    let k = DeviceTensor::contiguous("key", backend.span(&key), own)?;
    let v = DeviceTensor::contiguous("value", backend.span(&value), own)?;
    let query_rank = layout.query_rank();
    let cuda = backend.as_cuda();
    shards[query_rank].push(&cuda, [k, v])?;

    // Each rank's partial, one after another, as an all-gather would leave them.
    let (out_len, lse_len) = (query_len * heads * head_dim, heads * query_len);
    let mut partials = backend.memory(&vec![0f32; sizes.ranks * out_len]);
    let mut partials_lse = backend.memory(&vec![0f32; sizes.ranks * lse_len]);
    let mut steps = Vec::new();
    for (rank, shard) in shards.iter().enumerate() {
        bar.set_message(format!("phase 2, rank {rank}"));
        // Only the keys of the query's own tokens are hidden from earlier ones.
        let mask = if rank == query_rank { Mask::Causal } else { Mask::Full };
        let shape = attention_shape(sizes, query_len, shard.store.len(shard.sequence)?);
        let plan = Plan::new(&backend.device().properties(), &AttentionConfig::new(mask), &shape)?;
        let mut workspace = backend.memory(&vec![0u8; plan.workspace_bytes()]);
        let [k, v] = shard.store.rows(&cuda, 0, shard.sequence)?;
        let stacked = [sizes.ranks, query_len, heads, head_dim];
        let out_span = backend.span_mut(&mut partials);
        let mut out = DeviceTensorMut::contiguous("out", out_span, stacked)?.narrow(0, rank, 1)?;
        let mut lse = backend.span_mut(&mut partials_lse).range(rank * lse_len..(rank + 1) * lse_len);
        let workspace = backend.span_mut(&mut workspace);
        let mut prepared = plan.prepare(backend.device(), backend.stream(), workspace)?;
        let seconds = measure(backend, sizes.repeats, || {
            prepared.run(star_attention::Inputs::new(&q, &k, &v), &mut out, Some(&mut lse))
        })?;
        steps.push(Step {
            name: format!("phase 2, rank {rank}"),
            seconds,
            flops: plan.flops(),
            bytes: 2 * shape.key_shape().iter().product::<usize>() * T::DTYPE.size(),
            errors: None,
        });
        bar.inc(1);
    }

    bar.set_message("merge");
    let mut out = backend.memory(&vec![0f32; out_len]);
    let mut lse = backend.memory(&vec![0f32; lse_len]);
    let seconds = {
        let stacked = [sizes.ranks, query_len, heads, head_dim];
        let all = Partials {
            out: DeviceTensor::contiguous("partials", backend.span(&partials), stacked)?,
            lse: backend.span(&partials_lse),
            lse_stride: lse_len,
        };
        let mut out = DeviceTensorMut::contiguous("out", backend.span_mut(&mut out), query_shape)?;
        let mut lse = backend.span_mut(&mut lse);
        measure(backend, sizes.repeats, || {
            merge(backend.device(), backend.stream(), &all, &mut out, Some(&mut lse))
        })?
    };
    let (out, lse) = (backend.read(&out), backend.read(&lse));
    let mut errors = Errors::default();
    for row in spread(query_len, CHECKED_ROWS) {
        for head in 0..heads {
            let visible = inputs.visible(0..context_len + row + 1, head / (heads / kv_heads));
            let got = &out[(row * heads + head) * head_dim..][..head_dim];
            errors.see(
                inputs.query.row(context_len + row, head),
                &visible,
                got,
                lse[head * query_len + row],
            )?;
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

/// Prints the table. Whether all errors were within the bound.
fn report(steps: &[Step]) -> bool {
    let mut rows = vec![
        ["step", "time", "TFLOP/s", "GB/s", "max error", "bound", "lse error"].map(String::from).to_vec(),
    ];
    for step in steps {
        let rate = |amount: f64, unit: f64| format!("{:.3}", amount / step.seconds / unit);
        let mut row = vec![
            step.name.clone(),
            time(step.seconds),
            if step.flops == 0 { "-".into() } else { rate(step.flops as f64, 1e12) },
            rate(step.bytes as f64, 1e9),
        ];
        match &step.errors {
            Some(errors) => row.extend([errors.out, errors.bound(), errors.lse].map(|x| format!("{x:.1e}"))),
            None => row.extend(["-"; 3].map(String::from)),
        }
        rows.push(row);
    }
    print!("{}", table(&rows));
    let within = steps.iter().filter_map(|step| step.errors).all(|errors| errors.within());
    let checked: usize = steps.iter().filter_map(|step| step.errors).map(|errors| errors.rows).sum();
    println!(
        "{checked} rows of heads compared with the oracle: errors {}",
        if within { "within the bound" } else { "ABOVE THE BOUND" }
    );
    within
}
