//! The engine for GPUs: on all that this machine has, be it one; and what it says where there is no
//! NCCL.

#![cfg(feature = "nccl")]

mod common;

use common::{Rng, Tensor, named};
use cudarc::driver::CudaStream;
use star_attention::Error;
use star_attention::comm::{
    Collective, DeviceCollective, GroupConfig, Link, MergePlan, MergeWay, Nccl, ThreadGroup, Traffic,
};
use star_attention::cuda::driver::Driver;
use star_attention::cuda::{DevicePartial, DeviceTensor, DeviceTensorMut, Span, SpanMut};
use star_attention::merge::{self, Partial};
use std::sync::Arc;
use std::time::Duration;

#[test]
fn nccl_is_there_or_named() {
    match Nccl::version() {
        Ok(version) => assert!(version > 2000, "{version}"),
        Err(Error::Unavailable { what: "NCCL", reason }) => {
            assert!(reason.contains("libnccl.so"), "{reason}")
        }
        Err(other) => panic!("{other}"),
    }
}

/// Runs `rank` on a thread for each GPU.
fn on_all_gpus(config: GroupConfig, rank: impl Fn(&ThreadGroup, Nccl, &Driver, &Arc<CudaStream>) + Sync) {
    let ranks = ThreadGroup::ranks(Driver::count().unwrap()).unwrap();
    std::thread::scope(|scope| {
        for (gpu, group) in ranks.into_iter().enumerate() {
            let rank = &rank;
            scope.spawn(move || {
                let driver = Driver::open(gpu).unwrap();
                let stream = driver.context().new_stream().unwrap();
                let nccl = Nccl::over(&group, &driver, &config).unwrap();
                rank(&group, nccl, &driver, &stream);
            });
        }
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU and NCCL"]
fn every_collective_delivers() {
    on_all_gpus(GroupConfig::default(), |group, nccl, _, stream| {
        let (rank, size) = (nccl.rank(), nccl.size());
        assert_eq!((rank, size), (group.rank(), group.size()));
        let send: Vec<u8> = (0..64 * size).map(|i| (rank * 37 + i) as u8).collect();
        let from = stream.clone_htod(&send).unwrap();
        let mut gathered = stream.alloc_zeros::<u8>(64 * size * size).unwrap();
        let mut exchanged = stream.alloc_zeros::<u8>(64 * size).unwrap();
        let part = |to| [(Span::of(&from, stream), SpanMut::of(to, stream))];
        nccl.all_gather(stream, &part(&mut gathered)).unwrap();
        nccl.all_to_all(stream, &part(&mut exchanged)).unwrap();
        let mut shared = stream.clone_htod(&send).unwrap();
        nccl.broadcast(stream, size - 1, &mut [SpanMut::of(&mut shared, stream)]).unwrap();
        nccl.wait(stream).unwrap();

        let of = |rank: usize, i: usize| (rank * 37 + i) as u8;
        let gathered = stream.clone_dtoh(&gathered).unwrap();
        assert!((0..64 * size * size).all(|i| gathered[i] == of(i / (64 * size), i % (64 * size))));
        let exchanged = stream.clone_dtoh(&exchanged).unwrap();
        assert!((0..64 * size).all(|i| exchanged[i] == of(i / 64, rank * 64 + i % 64)));
        let shared = stream.clone_dtoh(&shared).unwrap();
        assert!((0..64 * size).all(|i| shared[i] == of(size - 1, i)));
        let others = size as u64 - 1;
        let broadcast = if rank == size - 1 { others } else { 0 };
        let bytes = others * (64 * size as u64 + 64) + broadcast * 64 * size as u64;
        assert_eq!(nccl.traffic(), Traffic { collectives: 3, messages: 2 * others + broadcast, bytes });
    });
}

#[test]
#[ignore = "needs an NVIDIA GPU and NCCL"]
fn merges_are_those_of_the_cpu_on_every_gpu() {
    const SHAPE: [usize; 4] = [1, 12, 8, 128];
    let link = Link::new(1e-5, 1e11).unwrap();
    let partial = |rank: usize| {
        let mut rng = Rng::new(rank as u64 + 1);
        // Heads before tokens, as attention leaves them for the merge.
        let [batch, seq, heads, dim] = SHAPE;
        let out: Vec<f32> = (0..batch * heads * seq * dim).map(|_| rng.normal()).collect();
        let lse: Vec<f32> = (0..batch * heads * seq).map(|_| rng.normal()).collect();
        (out, lse)
    };
    on_all_gpus(GroupConfig::default(), |_, nccl, driver, stream| {
        let [_, seq, heads, dim] = SHAPE;
        let parts: Vec<_> = (0..nccl.size()).map(partial).collect();
        let tensors: Vec<_> = parts
            .iter()
            .map(|(out, _)| Tensor::contiguous("partial", SHAPE, |[_, s, h, d]| out[(h * seq + s) * dim + d]))
            .collect();
        let partials: Vec<_> = tensors
            .iter()
            .zip(&parts)
            .map(|(out, (_, lse)): (&Tensor<f32>, _)| Partial { out: out.view(), lse })
            .collect();
        let mut expected = Tensor::<f32>::contiguous("out", SHAPE, |_| f32::NAN);
        let mut expected_lse = vec![f32::NAN; heads * seq];
        merge::merge(&partials, expected.view_mut(), &mut expected_lse).unwrap();

        let (out, lse) = &parts[nccl.rank()];
        let (out, lse) = (stream.clone_htod(out).unwrap(), stream.clone_htod(lse).unwrap());
        for way in [MergeWay::AllGather, MergeWay::ByRows] {
            let plan = MergePlan::<f32, f32>::new(SHAPE, nccl.size(), &link).unwrap().with_way(way);
            let mut scratch = stream.alloc_zeros::<u8>(plan.device_scratch_bytes()).unwrap();
            let mut merged = stream.alloc_zeros::<f32>(seq * heads * dim).unwrap();
            let mut merged_lse = stream.alloc_zeros::<f32>(seq * heads).unwrap();
            let stored = [1, heads, seq, dim];
            let view = DeviceTensor::contiguous("partial", Span::of(&out, stream), stored).unwrap();
            let partial = DevicePartial { out: view.swap_seq_heads(), lse: Span::of(&lse, stream) };
            plan.on_device(driver, stream, SpanMut::of(&mut scratch, stream))
                .unwrap()
                .merge(
                    &nccl,
                    &partial,
                    &mut DeviceTensorMut::contiguous("out", SpanMut::of(&mut merged, stream), SHAPE).unwrap(),
                    Some(&mut SpanMut::of(&mut merged_lse, stream)),
                )
                .unwrap();
            nccl.wait(stream).unwrap();
            let got = stream.clone_dtoh(&merged).unwrap();
            for (got, expected) in got.iter().zip(expected.values()) {
                assert!((got - expected).abs() < 2e-6, "{got} for {expected}");
            }
            for (got, expected) in stream.clone_dtoh(&merged_lse).unwrap().iter().zip(&expected_lse) {
                assert!((got - expected).abs() < 4e-6, "{got} for {expected}");
            }
        }
    });
}

/// The last rank does not come: the others' wait ends with an error, and so do their next calls.
#[test]
#[ignore = "needs NVIDIA GPUs and NCCL"]
fn a_rank_that_does_not_come_is_an_error() {
    let config = GroupConfig { timeout: Duration::from_secs(2), ..GroupConfig::default() };
    on_all_gpus(config, |group, nccl, _, stream| {
        let mut buffer = stream.alloc_zeros::<u8>(64).unwrap();
        assert_eq!(
            named(nccl.broadcast(stream, nccl.size(), &mut [SpanMut::of(&mut buffer, stream)]).unwrap_err()),
            ("value", "root")
        );
        if nccl.size() > 1 && nccl.rank() + 1 != nccl.size() {
            let from = stream.alloc_zeros::<u8>(64).unwrap();
            let mut to = stream.alloc_zeros::<u8>(64 * nccl.size()).unwrap();
            let mut gather =
                || nccl.all_gather(stream, &[(Span::of(&from, stream), SpanMut::of(&mut to, stream))]);
            gather().unwrap();
            assert!(matches!(nccl.wait(stream), Err(Error::Transport { engine: "NCCL", .. })));
            assert!(matches!(gather(), Err(Error::Disconnected { .. })));
            assert!(matches!(nccl.wait(stream), Err(Error::Disconnected { .. })));
        }
        // Until here the last rank has done nothing.
        group.all_gather(&[], &mut []).unwrap();
    });
}

/// Nobody waits, and the groups are gone before the work is: it is done all the same.
#[test]
#[ignore = "needs an NVIDIA GPU and NCCL"]
fn groups_that_are_dropped_at_once_have_done_their_work() {
    const BYTES: usize = 64 << 20;
    on_all_gpus(GroupConfig::default(), |_, nccl, _, stream| {
        let size = nccl.size();
        let from = stream.clone_htod(&vec![7u8; BYTES]).unwrap();
        let mut to = stream.alloc_zeros::<u8>(BYTES * size).unwrap();
        nccl.all_gather(stream, &[(Span::of(&from, stream), SpanMut::of(&mut to, stream))]).unwrap();
        drop(nccl);
        assert!(stream.clone_dtoh(&to).unwrap().iter().all(|&byte| byte == 7));
    });
}
