//! What masks cost on the CPU for each multiply-add that they leave, over dense attention. Both
//! sides take turns in one run; 1.00 is a mask that costs what its FLOPs say.
//!
//! `cargo bench --bench masks`, and `-- TEXT` for the rows whose name holds a text.

#[path = "common/call.rs"]
mod call;
#[path = "common/random.rs"]
mod random;
#[path = "common/turns.rs"]
mod turns;

use call::Call;
use star_attention::cpu::flash::Plan;
use star_attention::{AttentionConfig, AttentionShape, BlockList, Element, Mask, bf16};
use turns::Turns;

/// `len` rows over as many keys, 4/1 heads of 128.
fn call<T: Element>(mask: Mask, len: usize) -> Call<T> {
    let shape = AttentionShape {
        batch: 1,
        query_len: len,
        key_len: len,
        query_heads: 4,
        kv_heads: 1,
        head_dim: 128,
        value_dim: 128,
    };
    Call::of(Plan::new(&AttentionConfig::new(mask), &shape).unwrap())
}

/// Every key block of 64 with a chance of one half, for each tile of 128 rows.
fn half_of_the_blocks(len: usize) -> Mask {
    let (mut offsets, mut ranges) = (vec![0], Vec::new());
    let mut state = 1u64;
    for _ in 0..len.div_ceil(128) {
        for start in (0..len).step_by(64) {
            // An LCG of Knuth's: its high bits are random enough.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            if state >> 63 == 0 {
                ranges.push(start..(start + 64).min(len));
            }
        }
        offsets.push(ranges.len());
    }
    Mask::from(BlockList::new(128, &offsets, &ranges).unwrap())
}

fn row<T: Element>(turns: &mut Turns, name: &str, mask: impl FnOnce() -> Mask, len: usize) {
    let name = format!("{name}, {}", T::DTYPE);
    if !turns.wants(&name) {
        return;
    }
    let mut masked = call::<T>(mask(), len);
    let mut full = call::<T>(Mask::Full, len.min(4096));
    let work = masked.plan.flops() as f64 / full.plan.flops() as f64;
    turns.compare(&name, &mut || masked.run(), &mut || full.run(), work);
}

fn of_type<T: Element>(turns: &mut Turns, scale: usize) {
    let sliding = || Mask::sliding_window(1024 / scale).unwrap();
    let block_len = 8192 / scale;
    let star = Mask::Star { anchor_len: block_len / 8, block_len, first_block_len: block_len, left: None };
    row::<T>(turns, "causal, 8K tokens", || Mask::Causal, 8192 / scale);
    row::<T>(turns, "window of 1024, 64K tokens", sliding, 65_536 / scale);
    let windowed = star.clone().with_sliding_window(1024 / scale).unwrap();
    row::<T>(turns, "star, blocks of 8K, 32K tokens", || star, 32_768 / scale);
    row::<T>(turns, "the same, window of 1024", || windowed, 32_768 / scale);
    row::<T>(
        turns,
        "half of the blocks of 128 x 64, 8K tokens",
        || half_of_the_blocks(8192 / scale),
        8192 / scale,
    );
}

fn main() {
    let mut turns = Turns::from_args();
    let scale = if turns.quick { 64 } else { 1 };
    of_type::<f32>(&mut turns, scale);
    of_type::<bf16>(&mut turns, scale);
    turns.print(["mask", "dense, up to 4K tokens"]);
}
