//! Query tokens and generated ones attend to all that came before them, wherever their keys and values are kept.

use super::{assert_near, assert_same_everywhere};
use crate::common::{Rng, Tensor};
use star_attention::comm::{self, Collective};
use star_attention::cpu::{flash, reference};
use star_attention::merge::Partial;
use star_attention::{AttentionConfig, GeneratedKv, KvShard, Mask, StarLayout};

const KV_HEADS: usize = 2;
const HEADS: usize = 4;
const DIM: usize = 8;

pub fn generate(group: &dyn Collective) {
    let mut rng = Rng::new(7 + group.size() as u64);
    // Queries of one and many tokens, more or fewer than hosts; contexts with fewer blocks than hosts, and without any.
    for (context_len, steps) in
        [(70, vec![1, 1, 1]), (3, vec![5, 1, 2, 9, 1, 1]), (0, vec![13, 1, 1]), (41, vec![300, 1, 40])]
    {
        let layout = StarLayout::new(context_len, 7, 3, group.size()).unwrap();
        for generated in [GeneratedKv::QueryHost, GeneratedKv::RoundRobin] {
            run(group, &layout, generated, &steps, rng.next());
        }
    }
}

fn run(group: &dyn Collective, layout: &StarLayout, generated: GeneratedKv, steps: &[usize], seed: u64) {
    let mut rng = Rng::new(seed);
    let (context_len, tokens) = (layout.context_len(), steps.iter().sum::<usize>());
    let mut tensor = |name, heads| {
        Tensor::<f32>::contiguous(name, [1, context_len + tokens, heads, DIM], |_| 2.0 * rng.uniform() - 1.0)
    };
    let (query, key, value) = (tensor("query", HEADS), tensor("key", KV_HEADS), tensor("value", KV_HEADS));

    let own = layout.host(group.rank()).unwrap().own_tokens();
    let longest = steps.iter().copied().max().unwrap_or(0);
    let room = layout.generated_room(generated, group.rank(), tokens, longest);
    let mut shard = KvShard::new(1, KV_HEADS, DIM, own.len() + room).unwrap();
    shard.append(key.gather(own.clone()).view(), value.gather(own.clone()).view()).unwrap();

    let mut first = 0;
    for &step in steps {
        let rows = context_len + first..context_len + first + step;
        let (q, k, v) = (query.gather(rows.clone()), key.gather(rows.clone()), value.gather(rows.clone()));
        let leads = layout.leader(generated, first) == group.rank();
        let held = shard.len();
        if leads {
            shard.append(k.view(), v.view()).unwrap();
        }
        let config = AttentionConfig::new(if leads { Mask::Causal } else { Mask::Full });
        let mut out = Tensor::<f32>::contiguous("out", q.shape(), |_| f32::NAN);
        let mut lse = vec![f32::NAN; step * HEADS];
        flash::attention(&config, q.view(), shard.keys(), shard.values(), out.view_mut(), Some(&mut lse))
            .unwrap();
        shard.truncate(held);
        let (kept, apart) = layout.kept_generated(generated, group.rank(), first);
        shard
            .append(k.view().every(1, kept, apart).unwrap(), v.view().every(1, kept, apart).unwrap())
            .unwrap();
        first += step;

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

    let kept = shard.len() - own.len();
    match generated {
        GeneratedKv::QueryHost => assert_eq!(kept, if group.rank() == group.size() - 1 { tokens } else { 0 }),
        GeneratedKv::RoundRobin => {
            // Token i on host i mod hosts.
            assert_eq!(kept, (0..tokens).filter(|token| token % group.size() == group.rank()).count());
        }
    }
}
