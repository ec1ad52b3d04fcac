//! The built example: good runs on every device that this machine has, and bad input, which gives
//! one line and exit code 2.

mod common;

use common::{assert_refused, example};
use std::process::Output;

fn run(args: &[&str]) -> Output {
    example("multi_gpu_merge").args(args).output().unwrap()
}

#[test]
fn merged_outputs_are_right_and_the_same_everywhere() {
    let runs: [&[&str]; 7] = [
        &["--shards", "300,17", "--layers", "2"],
        &[
            "--shards",
            "200",
            "--ranks",
            "8",
            "--query-len",
            "40",
            "--way",
            "by-rows",
            "--dtype",
            "f32",
            "--layers",
            "2",
        ],
        &["--shards", "0", "--ranks", "2", "--layers", "1"],
        &["--shards", "90", "--ranks", "1", "--dtype", "f16", "--layers", "1"],
        &["--device", "simt", "--query-len", "2"],
        &["--device", "simt", "--ranks", "2", "--way", "by-rows", "--shards", "70,0", "--head-dim", "64"],
        &["--device", "simt", "--ranks", "2", "--way", "all-gather", "--shards", "70", "--dtype", "f16"],
    ];
    for args in runs {
        let output = run(args);
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{args:?}: {out}{}", String::from_utf8_lossy(&output.stderr));
        for promise in ["as many sent", "the same bits on every rank", "within the bound"] {
            assert!(out.contains(promise), "{args:?}: {promise:?} is not in {out}");
        }
    }
}

#[test]
fn bad_input_gives_one_line_and_exit_code_2() {
    let cases: [(&[&str], &str); 13] = [
        (&["--ranks", "0"], "size"),
        (&["--shards", ""], "--shards"),
        (&["--shards", "99999999999999999"], "key"),
        (&["--query-len", "0"], "--query-len"),
        (&["--heads", "3"], "query"),
        (&["--kv-heads", "0"], "key"),
        (&["--head-dim", "0"], "head_dim"),
        (&["--device", "simt", "--head-dim", "100"], "head_dim"),
        (&["--device", "simt", "--dtype", "f32"], "--dtype"),
        (&["--timeout=-1"], "--timeout"),
        (&["--engine", "nccl", "--device", "cpu"], "NCCL"),
        (&["--engine", "sockets"], "--engine"),
        (&["--no-such-option"], "--no-such-option"),
    ];
    for (args, named) in cases {
        assert_refused(&run(args), named);
    }
}

#[test]
fn what_is_not_there_is_named() {
    #[cfg(not(feature = "mpi"))]
    assert_refused(&run(&["--engine", "mpi"]), "MPI is not available");
    #[cfg(not(feature = "cuda"))]
    assert_refused(&run(&["--device", "cuda"]), "the GPU is not available");
    #[cfg(not(feature = "nccl"))]
    assert_refused(&run(&["--engine", "nccl", "--device", "cuda", "--ranks", "1"]), "NCCL is not available");
}
