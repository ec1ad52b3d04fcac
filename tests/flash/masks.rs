//! Windows and block lists on the CPU.

use crate::phases::each_cpu;
use crate::properties::masks::{a_window_of_two_keys, edges_off_by_one_are_found};
use star_attention::{bf16, f16};

#[test]
fn windows_and_block_lists() {
    for by in each_cpu() {
        a_window_of_two_keys::<f32>(&by, 24);
        a_window_of_two_keys::<bf16>(&by, 64);
        edges_off_by_one_are_found::<f32>(&by, 40);
        edges_off_by_one_are_found::<f16>(&by, 64);
        edges_off_by_one_are_found::<bf16>(&by, 128);
    }
}
