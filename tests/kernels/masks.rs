//! Windows and block lists on the kernels.

use crate::call::on_each_device;
use crate::engine::Engine;
use crate::properties::backend::On;
use crate::properties::masks::{a_window_of_two_keys, edges_off_by_one_are_found};
use star_attention::{bf16, f16};

on_each_device! {
    fn windows_and_block_lists() {
        let by = On(B::cuda(4));
        a_window_of_two_keys::<f16>(&by, 64);
        a_window_of_two_keys::<bf16>(&by, 128);
        edges_off_by_one_are_found::<f16>(&by, 64);
        edges_off_by_one_are_found::<bf16>(&by, 96);
        edges_off_by_one_are_found::<bf16>(&by, 256);
    }
}
