//! An engine's decode: a cache in pages, one plan for all steps, sequences that join and leave.
//! Any `Backend` will do: the CPU here, or a GPU's stream (`cuda::Cuda`).
use star_attention::cpu::Cpu;
use star_attention::{Append, Backend, Batch, Capacity, Inputs, KvConfig, KvStore, Mask, PlanConfig};
use star_attention::{Result, Sequence, SequenceId};

const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const MOST: usize = 3; // sequences of a step, each with one row
const PAGES: usize = 32;

struct Engine<B: Backend> {
    backend: B,
    store: KvStore<B, f32>,
    plan: B::Plan,
    workspace: B::Buffer<u8>,
}

impl<B: Backend> Engine<B> {
    fn new(backend: B) -> Result<Self> {
        let store =
            KvStore::new(&backend, KvConfig::new(KV_HEADS, DIM).with_layers(LAYERS).in_pages(PAGES, 16))?;
        let capacity = Capacity::new([1, MOST, HEADS, DIM], store.shape(), MOST, 1).with_pages(PAGES);
        let plan = backend.plan(&PlanConfig::new(), &capacity)?;
        let workspace = backend.buffer(backend.workspace_bytes(&plan))?;
        Ok(Self { backend, store, plan, workspace })
    }

    /// One token more of each sequence; returns the last layer's output. The model's projections
    /// are left out: `value` stands for queries, keys and values of all rows.
    fn step(&mut self, sequences: &[SequenceId], value: f32) -> Result<Vec<f32>> {
        let (backend, store) = (&self.backend, &mut self.store);
        let [query_shape, new_shape] = [HEADS, KV_HEADS].map(|heads| [1, MOST, heads, DIM]);
        let mut batch = Batch::new(query_shape, store.shape())?;
        // Rows without a sequence have no place.
        let mut places = [star_attention::LEFT_OUT; MOST];
        for (row, &id) in sequences.iter().enumerate() {
            store.extend(backend, id, 1)?;
            let len = store.len(id)?;
            batch.push(Sequence::new(0, row..row + 1, store.keys(id)?, Mask::Causal))?;
            places[row] = store.places(id, len - 1..len)?.next().expect("one row");
        }
        backend.update(&mut self.plan, &batch)?;
        let places = backend.buffer_of(&places)?;
        let rows = backend.buffer_of(&vec![value; MOST * HEADS * DIM])?;
        let mut out = backend.buffer::<f32>(MOST * HEADS * DIM)?;
        for layer in 0..LAYERS {
            let [key, value] = ["key", "value"].map(|name| backend.whole(name, &rows, new_shape));
            store.append(backend, layer, Append::new(key?, value?, backend.slice(&places, ..)))?;
            let query = backend.whole("query", &rows, query_shape)?;
            let inputs = Inputs::new(query, store.key(backend, layer)?, store.value(backend, layer)?);
            let to = backend.whole_mut("out", &mut out, query_shape)?;
            let workspace = backend.slice_mut(&mut self.workspace, ..);
            backend.attend(&mut self.plan, inputs, to, None, workspace)?;
        }
        backend.read(&out)
    }
}

fn main() -> Result<()> {
    let mut engine = Engine::new(Cpu::new())?;
    let (first, second) = (engine.store.open()?, engine.store.open()?);
    for _ in 0..20 {
        engine.step(&[first, second], 0.5)?;
    }
    // A third begins with the first's 20 tokens. It shares their pages, and copies what it writes to.
    let third = engine.store.share(first, 20)?;
    engine.store.close(second)?;
    let out = engine.step(&[first, third], 0.5)?;
    assert!(out[..2 * HEADS * DIM].iter().all(|x| (x - 0.5).abs() < 1e-6));
    println!(
        "{} and {} tokens, {} free pages",
        engine.store.len(first)?,
        engine.store.len(third)?,
        engine.store.free_pages()
    );
    Ok(())
}
