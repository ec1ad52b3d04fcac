//! The merge over ranks is dense attention over all keys, with the same bits on every rank and by
//! both ways, and sends what it says.

use super::{assert_near, assert_same_everywhere, cuts, traffic};
use crate::common::{Rng, Tensor, indices, sinks};
use star_attention::comm::{Collective, MergePlan, MergeWay};
use star_attention::cpu::{flash, reference};
use star_attention::merge::Partial;
use star_attention::{AttentionConfig, Element, Inputs, bf16, f16};

pub fn merge(group: &dyn Collective) {
    let mut rng = Rng::new(group.size() as u64);
    for query_len in [0, 1, 2, 7, 33, 300] {
        for case in 0..4 {
            let (kv_heads, each, dim) = (1 + rng.below(3), 1 + rng.below(3), 1 + rng.below(24));
            let case = Case {
                batch: 1 + case % 2,
                query_len,
                kv_heads,
                heads: kv_heads * each,
                dim,
                keys: rng.below(80),
                sinks: case < 2,
                seed: rng.next(),
            };
            // Merged in f32 from f32: the sums' own rounding. Each rounding to 16 bits of values
            // below 1 adds half a unit in the last place.
            case.check::<f32, f32>(group, 4e-6);
            case.check::<f32, bf16>(group, 4e-6 + 0.5 / 256.0);
            case.check::<bf16, bf16>(group, 4e-6 + 1.0 / 256.0);
            case.check::<f16, f32>(group, 4e-6 + 0.5 / 2048.0);
        }
    }
}

/// Extents, and the seed of queries, keys, values and cuts.
#[derive(Debug)]
struct Case {
    batch: usize,
    query_len: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    keys: usize,
    /// Whether there are attention sinks.
    sinks: bool,
    seed: u64,
}

impl Case {
    fn check<T: Element, O: Element>(&self, group: &dyn Collective, bound: f64) {
        let mut rng = Rng::new(self.seed);
        let shape = [self.batch, self.query_len, self.heads, self.dim];
        let mut tensor = |name, seq, heads| {
            Tensor::<f32>::contiguous(name, [self.batch, seq, heads, self.dim], |_| 2.0 * rng.uniform() - 1.0)
        };
        let query = tensor("query", self.query_len, self.heads);
        let (key, value) =
            (tensor("key", self.keys, self.kv_heads), tensor("value", self.keys, self.kv_heads));
        let cuts = cuts(&mut rng, self.keys, group.size());
        let (from, to) = (cuts[group.rank()], cuts[group.rank() + 1]);
        let own = |tensor: &Tensor<f32>| tensor.gather(from..to);

        let (own_key, own_value) = (own(&key), own(&value));
        let mut out = Tensor::<f32>::contiguous("out", shape, |_| f32::NAN);
        let mut lse = vec![f32::NAN; shape[..3].iter().product()];
        let config = AttentionConfig::default();
        flash::attention(
            &config,
            query.view(),
            own_key.view(),
            own_value.view(),
            out.view_mut(),
            Some(&mut lse),
        )
        .unwrap();
        let out = Tensor::<T>::contiguous("partial", shape, |index| out.get(index));
        let partial = Partial { out: out.view(), lse: &lse };

        let sinks = self.sinks.then(|| sinks(self.heads, self.seed));
        let sinks = sinks.as_deref();
        let mut inputs = Inputs::new(query.view(), key.view(), value.view());
        inputs.sinks = sinks;
        let expected = reference::attention_of(&config, inputs).unwrap();
        let plan = MergePlan::<T, O>::new(shape, group.size(), &group.link()).unwrap();
        let results = [MergeWay::AllGather, MergeWay::ByRows].map(|way| {
            let plan = plan.with_way(way);
            let before = group.traffic();
            let mut merge = plan.on_cpu();
            // Twice into the message itself, in one call and in two, and once from memory of its
            // own.
            let bits = [0, 1, 2].map(|call| {
                let mut merged = Tensor::<O>::contiguous("merged", shape, |_| f32::NAN);
                let mut merged_lse = vec![f32::NAN; lse.len()];
                let to = merged.view_mut();
                merge.with_sinks(sinks).unwrap();
                if call == 2 {
                    merge.merge(group, &partial, to, Some(&mut merged_lse)).unwrap();
                } else {
                    let (mut view, view_lse) = merge.partial().unwrap();
                    indices(shape).for_each(|index| view.set(index, T::from_f32(out.get(index).to_f32())));
                    view_lse.copy_from_slice(&lse);
                    if call == 0 {
                        merge.run(group, to, Some(&mut merged_lse)).unwrap();
                    } else {
                        merge.start(group).unwrap().wait(to, Some(&mut merged_lse)).unwrap();
                    }
                }
                let merged = Tensor::<f32>::contiguous("merged", shape, |index| merged.get(index).to_f32());
                assert_near(merged.view(), &merged_lse, &expected, bound);
                let mut bits = merged.bits();
                bits.extend(merged_lse.iter().map(|x| x.to_bits()));
                bits
            });
            assert!(bits[0] == bits[1] && bits[0] == bits[2], "{self:?}: the calls have other bits");

            // The bytes of a message, counted literally.
            let part = |rows: usize, size: usize| rows * self.dim * size + rows * 4;
            let (rows, share) = (lse.len(), lse.len().div_ceil(group.size()));
            let sent = match way {
                MergeWay::AllGather => traffic(group, &[part(rows, size_of::<T>())]),
                MergeWay::ByRows => {
                    traffic(group, &[part(share, size_of::<T>()), part(share, size_of::<O>())])
                }
            };
            assert_eq!(group.traffic() - before, sent + sent + sent, "{self:?}");
            assert_eq!(plan.traffic(), sent, "{self:?}");

            let [bits, ..] = bits;
            bits
        });
        assert!(results[0] == results[1], "{self:?}: the two ways have other bits");
        assert_same_everywhere(group, &results[0]);
    }
}
