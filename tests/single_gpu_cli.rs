//! `examples/single_gpu`: both phases within the bound on the CPU and the emulator, and one clear
//! line for what cannot be.

mod common;

use common::{assert_refused, example};
use std::process::Output;

fn single_gpu(options: &[&str]) -> Output {
    example("single_gpu")
        .args(options)
        .output()
        .expect("examples/single_gpu, which `cargo test` builds with the tests")
}

#[test]
fn both_phases_are_within_the_bound() {
    // Uneven: the last block is short, a rank has two blocks, the anchor is shorter than a block.
    let small = ["--context-len", "210", "--block-len", "50", "--anchor-len", "20", "--heads", "4"];
    for (device, more) in [
        ("simt", ["--ranks", "3", "--head-dim", "64", "--dtype", "f16"]),
        ("simt", ["--ranks", "6", "--head-dim", "96", "--dtype", "bf16"]),
        ("cpu", ["--ranks", "3", "--head-dim", "80", "--dtype", "f16"]),
        // The name of the option before ranks were called ranks.
        ("cpu", ["--hosts", "6", "--head-dim", "64", "--dtype", "bf16"]),
    ] {
        let options =
            [&["--device", device, "--kv-heads", "2", "--repeats", "1"], &small[..], &more].concat();
        let output = single_gpu(&options);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.trim_end().ends_with("errors within the bound"), "{text}");
        assert_eq!(text.matches("phase 1, rank").count(), more[1].parse::<usize>().unwrap(), "{text}");
    }
}

#[test]
fn without_a_gpu_one_line_says_so() {
    let output = single_gpu(&["--device", "cuda", "--context-len", "4096", "--repeats", "1"]);
    if !output.status.success() {
        assert_refused(&output, "is not available");
    }
}

#[test]
fn what_no_kernel_takes_is_refused() {
    for (options, message) in [
        (&["--head-dim", "84"][..], "head_dim"),
        (&["--block-len", "0"], "block_len"),
        (&["--anchor-len", "1000"], "anchor_len"),
        (&["--heads", "3"], "heads"),
        (&["--ranks", "0"], "ranks"),
    ] {
        assert_refused(&single_gpu(&[&["--device", "simt"][..], options].concat()), message);
    }
    assert_refused(&single_gpu(&["--device", "tpu"]), "tpu");
}
