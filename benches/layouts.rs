//! What tensors that do not begin at a cache line, or whose rows have gaps, cost on the CPU. Both
//! sides take turns in one run.
//!
//! `cargo bench --bench layouts`, and `-- TEXT` for the rows whose name holds a text.

#[path = "common/call.rs"]
mod call;
#[path = "common/random.rs"]
mod random;
#[path = "common/turns.rs"]
mod turns;

use call::{CACHE, Call, MOST_SPARE, Place, TOKENS};
use star_attention::cpu::flash::Plan;
use star_attention::{AttentionConfig, AttentionShape, Element, Mask, bf16, f16};
use turns::Turns;

/// So many rows of 32 heads on 8 over keys in a place, and over keys as in a cache.
fn compare<T: Element>(turns: &mut Turns, query_len: usize, key_len: usize) {
    for (what, place) in [
        ("one element off a line", Place { offset: 1, ..CACHE }),
        ("8 elements between rows", Place { gap: 8, ..CACHE }),
        ("33 elements between rows", Place { gap: 33, offset: 1, ..CACHE }),
        ("64 elements between rows", Place { gap: MOST_SPARE, ..CACHE }),
        ("heads of a token together", TOKENS),
    ] {
        let name = format!("{} {query_len} rows over {key_len} keys, {what}", T::DTYPE);
        if !turns.wants(&name) {
            continue;
        }
        let shape = AttentionShape {
            batch: 1,
            query_len,
            key_len,
            query_heads: 32,
            kv_heads: 8,
            head_dim: 128,
            value_dim: 128,
        };
        let mask = if query_len == key_len { Mask::Causal } else { Mask::Full };
        let plan = Plan::new(&AttentionConfig::new(mask), &shape).unwrap();
        let (mut placed, mut packed) = (Call::<T>::of(plan.clone()), Call::<T>::of(plan));
        (placed.query_place.offset, placed.query_place.gap) = (place.offset, place.gap);
        placed.key_place = place;
        turns.compare(&name, &mut || placed.run(), &mut || packed.run(), 1.0);
    }
}

fn main() {
    let mut turns = Turns::from_args();
    let scale = if turns.quick { 16 } else { 1 };
    for (rows, keys) in [(2048, 2048), (1, 32 * 1024), (16, 16 * 1024)] {
        let rows = if rows == keys { rows / scale } else { rows };
        compare::<f32>(&mut turns, rows, keys / scale);
        compare::<f16>(&mut turns, rows, keys / scale);
        compare::<bf16>(&mut turns, rows, keys / scale);
    }
    turns.print(["in place", "as in a cache"]);
}
