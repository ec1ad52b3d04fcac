//! What other head dims and fp8 keys cost on the CPU. Both sides take turns in one
//! run.
//!
//! `cargo bench --bench heads`, and `-- TEXT` for the rows whose name holds a text.

#[path = "common/call.rs"]
mod call;
#[path = "common/random.rs"]
mod random;
#[path = "common/turns.rs"]
mod turns;

use call::Call;
use star_attention::cpu::flash::Plan;
use star_attention::{AttentionConfig, AttentionShape, Element, F8E4M3, Mask, bf16, f16};
use turns::Turns;

fn call<Q: Element, K: Element>(shape: AttentionShape) -> Call<Q, K> {
    Call::of(Plan::new(&AttentionConfig::new(Mask::Causal), &shape).unwrap())
}

/// The extents of 32 heads of 128 on 8, for `query_len` rows over `key_len` keys.
fn shape(query_len: usize, key_len: usize) -> AttentionShape {
    AttentionShape {
        batch: 1,
        query_len,
        key_len,
        query_heads: 32,
        kv_heads: 8,
        head_dim: 128,
        value_dim: 128,
    }
}

/// Decodes over keys of `K`, and the same over keys of bf16.
fn decode<Q: Element, K: Element>(turns: &mut Turns, keys: usize, group: usize) {
    let name = format!("{} decode over {} and bf16 keys, {} heads on 8", Q::DTYPE, K::DTYPE, 8 * group);
    if turns.wants(&name) {
        let shape = AttentionShape { query_heads: 8 * group, ..shape(1, keys) };
        let (mut narrow, mut wide) = (call::<Q, K>(shape), call::<Q, bf16>(shape));
        turns.compare(&name, &mut || narrow.run(), &mut || wide.run(), 1.0);
    }
}

/// Causal attention with other head dims, and with 128, for as many multiply-adds.
fn dims<T: Element>(turns: &mut Turns, head_dim: usize, value_dim: usize, len: usize) {
    let name = format!("{} {head_dim}/{value_dim} and 128/128, {len} tokens", T::DTYPE);
    if turns.wants(&name) {
        let of = AttentionShape { head_dim, value_dim, query_heads: 4, kv_heads: 1, ..shape(len, len) };
        let (mut other, mut square) =
            (call::<T, T>(of), call::<T, T>(AttentionShape { head_dim: 128, value_dim: 128, ..of }));
        let work = other.plan.flops() as f64 / square.plan.flops() as f64;
        turns.compare(&name, &mut || other.run(), &mut || square.run(), work);
    }
}

fn main() {
    let mut turns = Turns::from_args();
    let (keys, len) = if turns.quick { (256, 128) } else { (1 << 16, 4096) };
    for group in [1, 4, 8] {
        decode::<f32, F8E4M3>(&mut turns, keys, group);
    }
    decode::<f32, f16>(&mut turns, keys, 4);
    decode::<bf16, F8E4M3>(&mut turns, keys, 4);
    for (head_dim, value_dim) in [(192, 128), (192, 192), (576, 512), (80, 80)] {
        dims::<f32>(&mut turns, head_dim, value_dim, len);
        dims::<bf16>(&mut turns, head_dim, value_dim, len);
    }
    turns.print(["first", "second"]);
}
