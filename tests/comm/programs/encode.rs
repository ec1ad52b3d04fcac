//! Context encoding gives the same whether each rank encodes the anchor or gets its keys and values
//! from rank 0.

use super::{assert_near, traffic};
use crate::common::{Rng, Tensor};
use star_attention::comm::{Collective, anchor_scratch_len, share_anchor};
use star_attention::cpu::{flash, reference};
use star_attention::{AttentionConfig, StarLayout, bf16};

const KV_HEADS: usize = 2;
const HEADS: usize = 4;
const DIM: usize = 16;

pub fn encode(group: &dyn Collective) {
    let mut rng = Rng::new(11 + group.size() as u64);
    for (context_len, block_len, anchor_len) in
        [(90, 10, 10), (61, 8, 5), (20, 32, 32), (5, 1, 1), (64, 16, 0), (0, 4, 4)]
    {
        let layout = StarLayout::builder(context_len)
            .block_len(block_len)
            .anchor_len(anchor_len)
            .ranks(group.size())
            .build()
            .unwrap();
        run(group, &layout, rng.next());
    }
}

fn run(group: &dyn Collective, layout: &StarLayout, seed: u64) {
    let mut rng = Rng::new(seed);
    let local = layout.rank(group.rank()).unwrap();
    let mut tensor = |name, heads| {
        let shape = [1, layout.context_len(), heads, DIM];
        Tensor::<bf16>::contiguous(name, shape, |_| 2.0 * rng.uniform() - 1.0)
    };
    let (query, key, value) = (tensor("query", HEADS), tensor("key", KV_HEADS), tensor("value", KV_HEADS));
    let (local_key, local_value) = (key.gather(local.tokens()), value.gather(local.tokens()));

    // Rank 0 sends the head of its block 0; the others have only their own tokens' keys and values,
    // behind room for the anchor's.
    let (mut shared_key, mut shared_value) = (local_key.clone(), local_value.clone());
    let anchor = local.anchor_tokens().len();
    for index in crate::common::indices([1, anchor, KV_HEADS, DIM]) {
        shared_key.set(index, bf16::NAN);
        shared_value.set(index, bf16::NAN);
    }
    let shape = [1, layout.anchor_len().min(layout.context_len()), KV_HEADS, DIM];
    let mut scratch = vec![bf16::NAN; anchor_scratch_len(shape, shape[3])];
    // Ranks without blocks have no use for it, and take part.
    let mut unused = [(); 2].map(|()| Tensor::<bf16>::contiguous("unused", shape, |_| 0.0));
    let before = group.traffic();
    if local.local_len() == 0 {
        let [key, value] = &mut unused;
        share_anchor(group, key.view_mut(), value.view_mut(), &mut scratch).unwrap();
    } else {
        let key = shared_key.view_mut().narrow(1, 0, shape[1]).unwrap();
        let value = shared_value.view_mut().narrow(1, 0, shape[1]).unwrap();
        share_anchor(group, key, value, &mut scratch).unwrap();
    }
    let bytes = 2 * 2 * shape.iter().product::<usize>();
    if group.rank() == 0 {
        assert_eq!(group.traffic() - before, traffic(group, &[bytes]));
    }
    assert_eq!(shared_key.bits(), local_key.bits());
    assert_eq!(shared_value.bits(), local_value.bits());

    let kept = local.kept();
    let own_query = query.gather(local.own_tokens());
    let mut out = Tensor::<f32>::contiguous("out", own_query.shape(), |_| f32::NAN);
    let mut lse = vec![f32::NAN; kept.len() * HEADS];
    let config = AttentionConfig::new(local.mask());
    flash::attention(
        &config,
        own_query.view(),
        shared_key.view(),
        shared_value.view(),
        out.view_mut(),
        Some(&mut lse),
    )
    .unwrap();

    // The oracle, with the anchor's queries before the own ones.
    let local_query = query.gather(local.tokens());
    let expected =
        reference::attention(&config, local_query.view(), local_key.view(), local_value.view()).unwrap();
    let local = local.local_len();
    let own = reference::Reference {
        out: expected.out[kept.start * HEADS * DIM..].to_vec(),
        lse: expected.lse.chunks(local.max(1)).flat_map(|head| head[kept.start..].to_vec()).collect(),
    };
    // Probabilities are rounded to bf16 for the products with values.
    assert_near(out.view(), &lse, &own, 1.0 / 128.0);
}
