//! Both phases of Star Attention in one layer, over three ranks, beside dense attention.
use star_attention::comm::{self, Collective, ThreadGroup};
use star_attention::cpu::{Cpu, flash};
use star_attention::{Append, AttentionConfig, KvConfig, KvStore, Mask, Result, StarLayout, merge::Partial};
use star_attention::{TensorView, TensorViewMut};

const HEADS: [usize; 3] = [4, 2, 2]; // of queries, keys and values
const DIM: usize = 64;
/// Stands for the model: the queries, keys and values of some tokens.
fn project(tokens: impl Iterator<Item = usize> + Clone) -> [Vec<f32>; 3] {
    let element = |x, t, i| ((t * 31 + (i + x) * 7) % 17) as f32 / 17.0 - 0.5;
    let row = |x, t: usize| (0..HEADS[x] * DIM).map(move |i| element(x, t, i));
    [0, 1, 2].map(|x| tokens.clone().flat_map(|t| row(x, t)).collect())
}
fn views(x: &[Vec<f32>; 3]) -> Result<[TensorView<'_, f32>; 3]> {
    let view = |i: usize| TensorView::contiguous("x", &x[i], [1, x[i].len() / HEADS[i] / DIM, HEADS[i], DIM]);
    Ok([view(0)?, view(1)?, view(2)?])
}
fn attend(mask: Mask, q: TensorView<'_, f32>, [k, v]: [TensorView<'_, f32>; 2]) -> Result<[Vec<f32>; 2]> {
    let [mut out, mut lse] = [DIM, 1].map(|dim| vec![0.0; q.shape()[1] * HEADS[0] * dim]);
    let to = TensorViewMut::contiguous("out", &mut out, q.shape())?;
    flash::attention(&AttentionConfig::new(mask), q, k, v, to, Some(&mut lse))?;
    Ok([out, lse])
}
fn rank(layout: &StarLayout, group: &impl Collective) -> Result<()> {
    // Phase 1: each block sees the anchor and itself. The output goes on into the next layer.
    let local = layout.rank(group.rank())?;
    let inputs = project(local.tokens());
    let [q, k, v] = views(&inputs)?;
    let _out = attend(local.mask(), q, [k, v])?;
    // The store keeps the rank's own rows, not the anchor's, and has room for the query's.
    let (cpu, kept) = (Cpu::new(), local.kept());
    let mut store = KvStore::new(&cpu, KvConfig::new(HEADS[1], DIM).in_rows(1, local.room(5, 5)))?;
    let sequence = store.open()?;
    store.extend(&cpu, sequence, kept.len())?;
    let own = [k.narrow(1, kept.start, kept.len())?, v.narrow(1, kept.start, kept.len())?];
    store.put(&cpu, 0, sequence, 0..kept.len(), own)?;
    // Phase 2: every rank attends from the query to the keys it holds. One appends the query's own.
    let step = local.step(0..5);
    let inputs = project(step.positions());
    let [q, k, v] = views(&inputs)?;
    let rows = store.begin_step(&cpu, sequence, &step)?;
    store.append(&cpu, 0, Append::new(k, v, &rows.appended_places))?;
    let [out, lse] = attend(step.mask(), q, store.rows_of(&cpu, 0, sequence, rows.attended)?)?;
    // The merge is the softmax over the keys of all ranks, on every rank.
    let [mut all, mut all_lse] = [out.clone(), lse.clone()];
    let partial = Partial { out: TensorView::contiguous("partial", &out, q.shape())?, lse: &lse };
    comm::merge(group, &partial, TensorViewMut::contiguous("all", &mut all, q.shape())?, &mut all_lse)?;
    // Dense attention from the query to all keys gives the same.
    let inputs = project(0..1005);
    let [dense, _] = attend(Mask::Causal, q, [views(&inputs)?[1], views(&inputs)?[2]])?;
    assert!(all.iter().zip(&dense).all(|(a, b)| (a - b).abs() < 1e-5));
    Ok(())
}
fn main() -> Result<()> {
    let layout = StarLayout::builder(1000).block_len(128).ranks(3).build()?;
    let start = |group| std::thread::spawn(move || rank(&layout, &group));
    let ranks: Vec<_> = ThreadGroup::ranks(3)?.into_iter().map(start).collect();
    ranks.into_iter().try_for_each(|rank| rank.join().expect("no rank panics"))
}
