//! One captured graph serves a batch that grows, joins and leaves: what it attends to is the batch
//! of the plan's last update.

use crate::common::Rng;
use crate::recording::{Captures, Recording};
use star_attention::cuda::Cuda;
use star_attention::{
    Append, Backend, Batch, Capacity, Error, Inputs, Keys, LEFT_OUT, Mask, PlanConfig, Result, Sequence, bf16,
};
use std::sync::atomic::AtomicBool;

const SEQUENCES: usize = 4;
const PAGE_LEN: usize = 16;
/// Of a sequence.
const PAGES: usize = 24;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
/// Of the prefix tensors.
const PREFIX: [usize; 4] = [2, 100, KV_HEADS, DIM];

/// What an engine's steps have in common.
#[derive(Clone, Copy, Debug)]
struct Steps {
    /// Query rows of a sequence at most: new tokens, each with its key.
    rows: usize,
    paged: bool,
    prefixes: bool,
}

const DECODES: Steps = Steps { rows: 1, paged: true, prefixes: false };

impl Steps {
    fn query(&self) -> [usize; 4] {
        [SEQUENCES, self.rows, HEADS, DIM]
    }

    fn new_rows(&self) -> [usize; 4] {
        [SEQUENCES, self.rows, KV_HEADS, DIM]
    }

    /// In pages, or all rows of a sequence one after another.
    fn cache(&self) -> [usize; 4] {
        match self.paged {
            true => [SEQUENCES * PAGES, PAGE_LEN, KV_HEADS, DIM],
            false => [SEQUENCES, PAGES * PAGE_LEN, KV_HEADS, DIM],
        }
    }

    fn prefix(&self) -> [usize; 2] {
        if self.prefixes { [PREFIX[0], PREFIX[1]] } else { [0, 0] }
    }

    fn capacity(&self) -> Capacity {
        let pages = if self.paged { SEQUENCES * PAGES } else { 0 };
        let [batch, seq] = self.prefix();
        Capacity::new(self.query(), self.cache(), SEQUENCES, self.rows)
            .with_pages(pages)
            .with_prefix(batch, seq)
    }

    fn empty_batch(&self) -> Batch {
        let [batch, seq] = self.prefix();
        Batch::new(self.query(), self.cache()).unwrap().with_prefix(batch, seq).unwrap()
    }

    /// The keys of a sequence, and the place of each of them in the cache.
    fn keys(&self, index: usize, len: usize) -> (Keys, Vec<u32>) {
        if !self.paged {
            let first = index * PAGES * PAGE_LEN;
            return (Keys::rows(index, 0..len), (first..first + len).map(|place| place as u32).collect());
        }
        // From the last page to the first.
        let pages: Vec<u32> = (0..PAGES).rev().map(|page| (index * PAGES + page) as u32).collect();
        let place = |key: usize| pages[key / PAGE_LEN] * PAGE_LEN as u32 + (key % PAGE_LEN) as u32;
        let places = (0..len).map(place).collect();
        (Keys::pages(len, pages), places)
    }
}

fn len(shape: [usize; 4]) -> usize {
    shape.iter().product()
}

/// The memory of an engine.
struct Memory<B: Backend> {
    steps: Steps,
    query: B::Buffer<bf16>,
    new: B::Buffer<bf16>,
    places: B::Buffer<u32>,
    cache: [B::Buffer<bf16>; 2],
    prefix: [B::Buffer<bf16>; 2],
    out: B::Buffer<f32>,
    lse: B::Buffer<f32>,
    workspace: B::Buffer<u8>,
}

fn normal(rng: &mut Rng, shape: [usize; 4]) -> Vec<bf16> {
    (0..len(shape)).map(|_| bf16::from_f32(rng.normal())).collect()
}

impl<B: Backend> Memory<B> {
    /// With no rows to append, and prefixes that are drawn.
    fn new(backend: &B, steps: Steps, workspace_bytes: usize, rng: &mut Rng) -> Self {
        Self {
            steps,
            query: backend.buffer(len(steps.query())).unwrap(),
            new: backend.buffer(len(steps.new_rows())).unwrap(),
            places: backend.buffer_of(&vec![LEFT_OUT; SEQUENCES * steps.rows]).unwrap(),
            cache: [(); 2].map(|()| backend.buffer(len(steps.cache())).unwrap()),
            prefix: [(); 2].map(|()| backend.buffer_of(&normal(rng, PREFIX)).unwrap()),
            out: backend.buffer(len(steps.query())).unwrap(),
            lse: backend.buffer(SEQUENCES * HEADS * steps.rows).unwrap(),
            workspace: backend.buffer(workspace_bytes).unwrap(),
        }
    }

    /// One step: the new keys to the cache, and attention.
    fn step(&mut self, backend: &B, plan: &mut B::Plan) -> Result<()> {
        let Self { steps, query, new, places, cache: [key, value], prefix, out, lse, workspace } = self;
        let (queries, cache) = (steps.query(), steps.cache());
        let rows = Append::new(
            backend.whole("key", new, steps.new_rows())?,
            backend.whole("value", new, steps.new_rows())?,
            backend.slice(places, ..),
        );
        let to_key = backend.whole_mut("cache_key", key, cache)?;
        backend.append(rows, to_key, backend.whole_mut("cache_value", value, cache)?)?;
        let mut inputs = Inputs::new(
            backend.whole("query", query, queries)?,
            backend.whole("key", key, cache)?,
            backend.whole("value", value, cache)?,
        );
        if steps.prefixes {
            let [key, value] = prefix;
            inputs = inputs
                .with_prefix(backend.whole("prefix", key, PREFIX)?, backend.whole("prefix", value, PREFIX)?);
        }
        let out = backend.whole_mut("out", out, queries)?;
        let (lse, workspace) = (backend.slice_mut(lse, ..), backend.slice_mut(workspace, ..));
        backend.attend(plan, inputs, out, Some(lse), workspace)
    }

    /// The bits of outputs and log-sum-exps that `call` writes, over others.
    fn results_of(&mut self, backend: &B, call: impl FnOnce(&mut Self)) -> Vec<u32> {
        backend.write(&mut self.out, 0, &vec![7.0; len(self.steps.query())]).unwrap();
        backend.write(&mut self.lse, 0, &vec![7.0; SEQUENCES * HEADS * self.steps.rows]).unwrap();
        call(self);
        let results = [backend.read(&self.out).unwrap(), backend.read(&self.lse).unwrap()];
        results.concat().iter().map(|x| x.to_bits()).collect()
    }
}

/// Serves `count` steps by one captured graph, each compared bit for bit with plain calls.
fn a_graph_serves_a_growing_batch<B: Captures>(backend: &B, config: &PlanConfig, steps: Steps, count: usize) {
    let mut rng = Rng::new(9);
    let mut plan = backend.plan(config, &steps.capacity()).unwrap();
    let mut memory = Memory::new(backend, steps, backend.workspace_bytes(&plan), &mut rng);
    // Kernels are loaded by a first call; all rows are left out of it.
    memory.step(backend, &mut plan).unwrap();
    let graph = backend.capture(|| memory.step(backend, &mut plan).unwrap());

    let mut lens = [0usize; SEQUENCES];
    for step in 0..count {
        // A sequence starts, with some keys at once, or ends, now and then.
        let at = rng.below(SEQUENCES);
        match rng.below(8) {
            0 => lens[at] = 0,
            1 | 2 if lens[at] == 0 => lens[at] = 1 + rng.below(PAGES * PAGE_LEN - count * steps.rows),
            _ => {}
        }
        let mut batch = steps.empty_batch();
        let mut places = vec![LEFT_OUT; SEQUENCES * steps.rows];
        for (index, len) in lens.iter_mut().enumerate().filter(|(_, len)| **len > 0 || step == 0) {
            let rows = if rng.below(3) == 0 { 1 + rng.below(steps.rows) } else { steps.rows };
            *len += rows;
            let (keys, of_keys) = steps.keys(index, *len);
            places[index * steps.rows..][..rows].copy_from_slice(&of_keys[*len - rows..]);
            let mut sequence = Sequence::new(index, 0..rows, keys, Mask::Causal);
            if steps.prefixes && index > 0 {
                sequence = sequence.with_prefix(index % PREFIX[0], index..PREFIX[1] - index);
            }
            batch.push(sequence).unwrap();
        }
        backend.write(&mut memory.query, 0, &normal(&mut rng, steps.query())).unwrap();
        backend.write(&mut memory.new, 0, &normal(&mut rng, steps.new_rows())).unwrap();
        backend.write(&mut memory.places, 0, &places).unwrap();
        loop {
            match backend.update(&mut plan, &batch) {
                // The device has not yet come to earlier updates.
                Err(Error::Busy { .. }) => drop(backend.read(&memory.lse).unwrap()),
                updated => break updated.unwrap(),
            }
        }
        let replayed = memory.results_of(backend, |_| backend.replay(&graph));
        // The same keys are stored again.
        let plain = memory.results_of(backend, |memory| memory.step(backend, &mut plan).unwrap());
        let mut alone = backend.plan_for(config, &batch).unwrap();
        let mut workspace = backend.buffer(backend.workspace_bytes(&alone)).unwrap();
        std::mem::swap(&mut workspace, &mut memory.workspace);
        let of_one_batch = memory.results_of(backend, |memory| memory.step(backend, &mut alone).unwrap());
        std::mem::swap(&mut workspace, &mut memory.workspace);
        assert_eq!(replayed, plain, "step {step}, keys {lens:?}");
        assert_eq!(replayed, of_one_batch, "step {step}, keys {lens:?}");
    }
}

fn graphs_of_decodes<B: Captures>(backend: &B, counts: [usize; 3]) {
    let plain = PlanConfig::new();
    let configs = [plain, plain.with_split_keys(64), plain.with_row_invariant()];
    for (config, count) in configs.iter().zip(counts) {
        a_graph_serves_a_growing_batch(backend, config, DECODES, count);
    }
}

/// Steps of up to so many rows of a sequence, which take the kernel for few rows and the one for
/// 64.
fn graphs_of_a_few_rows<B: Captures>(backend: &B, count: usize) {
    let plain = PlanConfig::new();
    for (rows, paged) in [(1, false), (5, true), (20, true), (20, false)] {
        let steps = Steps { rows, paged, prefixes: true };
        for config in [&plain, &plain.with_split_keys(64)] {
            a_graph_serves_a_growing_batch(backend, config, steps, count);
        }
    }
}

#[test]
fn a_graph_of_decodes_on_the_emulator() {
    graphs_of_decodes(&emulator(), [100, 100, 20]);
}

#[test]
fn a_graph_of_a_few_rows_on_the_emulator() {
    graphs_of_a_few_rows(&emulator(), 6);
}

#[test]
#[cfg(feature = "cuda")]
#[ignore = "needs an NVIDIA GPU"]
fn graphs_on_a_gpu() {
    let backend = crate::engine::gpu();
    graphs_of_decodes(&backend, [100; 3]);
    graphs_of_a_few_rows(&backend, 15);
}

fn emulator() -> Cuda<Recording> {
    Cuda::new(Recording::default(), AtomicBool::new(false))
}

/// A batch of the first sequences, one row and 300 keys each.
fn batch_of(sequences: usize) -> Batch {
    let mut batch = DECODES.empty_batch();
    for index in 0..sequences {
        let (keys, _) = DECODES.keys(index, 300);
        batch.push(Sequence::new(index, 0..1, keys, Mask::Causal)).unwrap();
    }
    batch
}

/// What a graph would copy again and again is an error, and the plan stays as it was.
#[test]
fn no_update_is_captured() {
    let backend = emulator();
    let mut plan = backend.plan(&PlanConfig::new(), &DECODES.capacity()).unwrap();
    let refused = |result: Result<()>| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Value { argument: "stream", .. }), "{error}");
    };
    let graph = backend.capture(|| {
        refused(backend.update(&mut plan, &batch_of(1)));
        refused(backend.plan_for(&PlanConfig::new(), &batch_of(1)).map(drop));
        refused(backend.plan(&PlanConfig::new(), &DECODES.capacity()).map(drop));
    });
    assert!(graph.is_empty());
    backend.update(&mut plan, &batch_of(1)).unwrap();
}

/// After an update whose copies fail in part, calls are refused until one succeeds, and that clears
/// what either batch has left in the tables.
#[test]
fn updates_that_fail_halfway() {
    let backend = emulator();
    let config = PlanConfig::new().with_split_keys(64);
    for copy in 1..=3 {
        let mut plan = backend.plan(&config, &DECODES.capacity()).unwrap();
        let mut memory = Memory::new(&backend, DECODES, backend.workspace_bytes(&plan), &mut Rng::new(3));
        backend.write(&mut memory.cache[0], 0, &normal(&mut Rng::new(5), DECODES.cache())).unwrap();
        let graph = backend.capture(|| memory.step(&backend, &mut plan).unwrap());
        backend.update(&mut plan, &batch_of(1)).unwrap();

        // Tiles, pages and rows to merge, one after another.
        backend.device().fail_copy(copy);
        backend.update(&mut plan, &batch_of(SEQUENCES)).unwrap_err();
        let error = memory.step(&backend, &mut plan).unwrap_err();
        assert!(matches!(error, Error::Value { argument: "plan", .. }), "{error}");

        backend.update(&mut plan, &batch_of(1)).unwrap();
        let replayed = memory.results_of(&backend, |_| backend.replay(&graph));
        let plain = memory.results_of(&backend, |memory| memory.step(&backend, &mut plan).unwrap());
        assert_eq!(replayed, plain, "copy {copy}");
    }
}

/// Room for nothing, or pages without rows, is room for a batch without keys.
#[test]
fn empty_capacities() {
    let backend = emulator();
    let query = DECODES.query();
    let no_rows = [3, 0, KV_HEADS, DIM];
    for capacity in [
        Capacity::new(query, DECODES.cache(), 0, 1).with_pages(2),
        Capacity::new(query, DECODES.cache(), 4, 0),
        Capacity::new(query, no_rows, 4, 1).with_pages(3),
        Capacity::new(query, no_rows, 4, 1),
    ] {
        let mut plan = backend.plan(&PlanConfig::new(), &capacity).unwrap();
        let mut batch = Batch::new(query, capacity.key).unwrap();
        if capacity.sequences * capacity.rows > 0 {
            let keys = if capacity.pages > 0 { Keys::pages(0, []) } else { Keys::rows(0, 0..0) };
            batch.push(Sequence::new(0, 0..1, keys, Mask::Causal)).unwrap();
        }
        backend.update(&mut plan, &batch).unwrap();
        let queries = backend.buffer::<bf16>(len(query)).unwrap();
        let keys = backend.buffer::<bf16>(len(capacity.key)).unwrap();
        let mut out = backend.buffer_of(&vec![7f32; len(query)]).unwrap();
        let mut workspace = backend.buffer(backend.workspace_bytes(&plan)).unwrap();
        let mut attend = || {
            let inputs = Inputs::new(
                backend.whole("query", &queries, query).unwrap(),
                backend.whole("key", &keys, capacity.key).unwrap(),
                backend.whole("value", &keys, capacity.key).unwrap(),
            );
            let to = backend.whole_mut("out", &mut out, query).unwrap();
            backend.attend(&mut plan, inputs, to, None, backend.slice_mut(&mut workspace, ..)).unwrap();
        };
        attend();
        let graph = backend.capture(attend);
        backend.replay(&graph);
        let out = backend.read(&out).unwrap();
        let served = batch.sequences().len() * HEADS * DIM;
        assert!(out[..served].iter().all(|&x| x == 0.0) && out[served..].iter().all(|&x| x == 7.0));
    }
}

/// Heads that do not fit together, and more than kernels can count, are errors.
#[test]
fn capacities_out_of_range() {
    let backend = emulator();
    let plan = |capacity: Capacity| backend.plan(&PlanConfig::new(), &capacity).map(drop).unwrap_err();
    for [query_heads, kv_heads] in [[0, 2], [4, 0], [3, 2]] {
        let (query, key) = ([1, 1, query_heads, DIM], [1, 9, kv_heads, DIM]);
        let error = plan(Capacity::new(query, key, 1, 1));
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    }
    let error = plan(DECODES.capacity().with_pages(usize::MAX));
    assert!(matches!(error, Error::Value { argument: "capacity", .. }), "{error}");
}
