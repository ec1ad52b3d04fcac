//! Query tokens and generated ones attend to all that came before them, wherever their keys and
//! values are kept.

use super::{assert_near, assert_same_everywhere};
use crate::common::{Rng, Tensor};
use star_attention::comm::{self, Collective};
use star_attention::cpu::{Cpu, flash, reference};
use star_attention::merge::Partial;
use star_attention::{Append, AttentionConfig, GeneratedKv, KvConfig, KvStore, Mask, StarLayout};

const KV_HEADS: usize = 2;
const HEADS: usize = 4;
const DIM: usize = 8;

pub fn generate(group: &dyn Collective) {
    let mut rng = Rng::new(7 + group.size() as u64);
    // Queries of one and many tokens, more or fewer than ranks; contexts with fewer blocks than
    // ranks, and without any.
    for (context_len, steps) in
        [(70, vec![1, 1, 1]), (3, vec![5, 1, 2, 9, 1, 1]), (0, vec![13, 1, 1]), (41, vec![300, 1, 40])]
    {
        let layout = StarLayout::builder(context_len).block_len(7).anchor_len(3).ranks(group.size());
        for generated in [GeneratedKv::QueryRank, GeneratedKv::RoundRobin] {
            let query_rank = rng.next() as usize % group.size();
            let layout = layout.query_rank(query_rank).generated(generated).build().unwrap();
            run(group, &layout, &steps, rng.next());
        }
    }
}

fn run(group: &dyn Collective, layout: &StarLayout, steps: &[usize], seed: u64) {
    let mut rng = Rng::new(seed);
    let (context_len, tokens) = (layout.context_len(), steps.iter().sum::<usize>());
    let mut tensor = |name, heads| {
        Tensor::<f32>::contiguous(name, [1, context_len + tokens, heads, DIM], |_| 2.0 * rng.uniform() - 1.0)
    };
    let (query, key, value) = (tensor("query", HEADS), tensor("key", KV_HEADS), tensor("value", KV_HEADS));

    let local = layout.rank(group.rank()).unwrap();
    let own = local.own_tokens();
    let longest = steps.iter().copied().max().unwrap_or(0);
    let cpu = Cpu::new();
    let room = KvConfig::new(KV_HEADS, DIM).in_rows(1, local.room(tokens, longest));
    let mut shard = KvStore::<_, f32>::new(&cpu, room).unwrap();
    let sequence = shard.open().unwrap();
    shard.extend(&cpu, sequence, own.len()).unwrap();
    let context = [&key, &value].map(|rows| rows.gather(own.clone()));
    shard.put(&cpu, 0, sequence, 0..own.len(), context.each_ref().map(Tensor::view)).unwrap();

    let mut first = 0;
    for &len in steps {
        let step = local.step(first..first + len);
        let rows = step.positions();
        let (q, k, v) = (query.gather(rows.clone()), key.gather(rows.clone()), value.gather(rows.clone()));
        let new = shard.begin_step(&cpu, sequence, &step).unwrap();
        shard.append(&cpu, 0, Append::new(k.view(), v.view(), &new.appended_places)).unwrap();
        let config = AttentionConfig::new(step.mask());
        let mut out = Tensor::<f32>::contiguous("out", q.shape(), |_| f32::NAN);
        let mut lse = vec![f32::NAN; len * HEADS];
        let [held_key, held_value] = shard.rows_of(&cpu, 0, sequence, new.attended).unwrap();
        flash::attention(&config, q.view(), held_key, held_value, out.view_mut(), Some(&mut lse)).unwrap();
        if !step.keeps_appended() {
            shard.append(&cpu, 0, Append::new(k.view(), v.view(), &new.kept_places)).unwrap();
        }
        shard.truncate(sequence, new.kept).unwrap();
        first += len;

        let mut merged = Tensor::<f32>::contiguous("merged", q.shape(), |_| f32::NAN);
        let mut merged_lse = vec![f32::NAN; lse.len()];
        let partial = Partial { out: out.view(), lse: &lse };
        comm::merge(group, &partial, merged.view_mut(), &mut merged_lse).unwrap();

        let seen = 0..rows.end;
        let (k, v) = (key.gather(seen.clone()), value.gather(seen));
        let dense =
            reference::attention(&AttentionConfig::new(Mask::Causal), q.view(), k.view(), v.view()).unwrap();
        assert_near(merged.view(), &merged_lse, &dense, 4e-6);
        assert_same_everywhere(group, &merged.bits());
    }

    let kept = shard.len(sequence).unwrap() - own.len();
    let keeper = |token: usize| match layout.generated() {
        GeneratedKv::QueryRank => layout.query_rank(),
        _ => (layout.query_rank() + token) % group.size(),
    };
    assert_eq!(kept, (0..tokens).filter(|&token| keeper(token) == group.rank()).count());
}
