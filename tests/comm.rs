//! The collective over threads, and the merge over hosts.

use proptest::prelude::*;
use star_attention::comm::{Collective, ThreadGroup, Traffic, merge, merge_scratch_len};
use star_attention::cpu::{flash, reference};
use star_attention::merge::Partial;
use star_attention::{AttentionConfig, Error, Result, TensorView, TensorViewMut};
use std::thread;
use std::time::{Duration, Instant};

/// Runs `host` on a thread for each rank.
fn on_ranks<T: Send>(
    ranks: Vec<ThreadGroup>,
    host: impl Fn(ThreadGroup) -> T + Sync,
) -> Vec<thread::Result<T>> {
    thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(|| host(rank))).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    })
}

fn all_ranks<T: Send>(size: usize, host: impl Fn(ThreadGroup) -> T + Sync) -> Vec<T> {
    on_ranks(ThreadGroup::ranks(size).unwrap(), host).into_iter().map(|result| result.unwrap()).collect()
}

#[test]
fn every_collective_delivers_for_every_world_size() {
    for size in 1..=8 {
        all_ranks(size, |group| {
            let me = group.rank() as u8;
            assert_eq!(group.size(), size);
            for round in 0..2000u32 {
                let len = (round % 5) as usize;
                let mut gathered = vec![0; size * len];
                group.all_gather(&vec![me ^ round as u8; len], &mut gathered).unwrap();
                let expected: Vec<u8> = (0..size * len).map(|i| (i / len) as u8 ^ round as u8).collect();
                assert_eq!(gathered, expected);

                let send: Vec<u8> = (0..size).map(|to| me.wrapping_mul(16) + to as u8).collect();
                let mut received = vec![0; size];
                group.all_to_all(&send, &mut received).unwrap();
                let expected: Vec<u8> = (0..size).map(|from| (from * 16) as u8 + me).collect();
                assert_eq!(received, expected);

                let root = round as usize % size;
                let mut buffer = [if group.rank() == root { round } else { u32::MAX }; 3];
                group.broadcast(root, bytemuck::cast_slice_mut(&mut buffer)).unwrap();
                assert_eq!(buffer, [round; 3]);
            }
        });
    }
}

#[test]
fn ranks_that_finish_first_disturb_nobody() {
    for _ in 0..200 {
        all_ranks(4, |group| {
            let mut gathered = [0; 4];
            group.all_gather(&[group.rank() as u8], &mut gathered).unwrap();
            assert_eq!(gathered, [0, 1, 2, 3]);
            // Each drops its rank at once, while others may not have read yet.
        });
    }
}

/// Calls until an error comes, or a bound that no healthy group would pass in these tests.
fn until_error(group: &ThreadGroup) -> Error {
    for _ in 0..1_000_000 {
        let mut gathered = vec![0; group.size()];
        if let Err(error) = group.all_gather(&[1], &mut gathered) {
            return error;
        }
    }
    panic!("no error came");
}

#[test]
fn a_rank_that_drops_or_panics_is_an_error_on_all_others() {
    for panics in [false, true] {
        for calls in [0, 1, 2, 17] {
            for size in [2, 5] {
                let start = Instant::now();
                let results = on_ranks(ThreadGroup::ranks(size).unwrap(), |group| {
                    if group.rank() != 1 {
                        return Some(until_error(&group));
                    }
                    for _ in 0..calls {
                        group.all_gather(&[1], &mut vec![0; size]).unwrap();
                    }
                    if panics {
                        std::panic::resume_unwind(Box::new("a host's panic"));
                    }
                    None
                });
                for (rank, result) in results.into_iter().enumerate() {
                    match result {
                        Ok(Some(Error::Disconnected { rank })) => assert!(rank < size),
                        Ok(None) | Err(_) => assert_eq!(rank, 1),
                        Ok(other) => panic!("{other:?}"),
                    }
                }
                assert!(
                    start.elapsed() < Duration::from_secs(20),
                    "the others must not wait for the timeout"
                );
            }
        }
    }
}

#[test]
fn a_rank_that_is_late_is_an_error_and_stays_one() {
    let ranks = ThreadGroup::ranks_with_timeout(3, Duration::from_millis(50)).unwrap();
    let (send, receive) = std::sync::mpsc::channel();
    let (receive, send) = (std::sync::Mutex::new(receive), std::sync::Mutex::new(send));
    on_ranks(ranks, |group| {
        if group.rank() == 2 {
            // Waits until both others have given up.
            let receive = receive.lock().unwrap();
            receive.recv().unwrap();
            receive.recv().unwrap();
            // They had posted: what comes now is right, and the next is an error.
            let mut gathered = [9; 3];
            group.all_gather(&[2], &mut gathered).unwrap();
            assert_eq!(gathered, [0, 1, 2]);
            assert!(matches!(group.all_gather(&[2], &mut gathered), Err(Error::Disconnected { .. })));
        } else {
            let mut gathered = [9; 3];
            let error = group.all_gather(&[group.rank() as u8], &mut gathered).unwrap_err();
            // The one that gave up first may be found missing no more: it had posted.
            assert!(matches!(error, Error::Timeout { rank: 2, .. }), "{error}");
            assert!(error.to_string().contains("rank 2"));
            let again = group.all_gather(&[0], &mut gathered).unwrap_err();
            assert!(matches!(again, Error::Disconnected { rank } if rank == group.rank()));
            assert_eq!(gathered, [9; 3]);
            send.lock().unwrap().send(()).unwrap();
        }
    })
    .into_iter()
    .for_each(|result| result.unwrap());
}

#[test]
fn calls_that_differ_are_errors_on_every_rank() {
    type Call = fn(&ThreadGroup) -> Result<()>;
    let gather: Call = |group| group.all_gather(&[0; 4], &mut vec![0; 4 * group.size()]);
    let longer: Call = |group| group.all_gather(&[0; 8], &mut vec![0; 8 * group.size()]);
    let exchange: Call = |group| group.all_to_all(&[0; 12], &mut [0; 12]);
    let broadcast: Call = |group| group.broadcast(0, &mut [0; 4]);
    let other_root: Call = |group| group.broadcast(1, &mut [0; 4]);
    for (one, two) in [(gather, longer), (gather, exchange), (gather, broadcast), (broadcast, other_root)] {
        let errors = all_ranks(3, |group| {
            let call = if group.rank() == 2 { two } else { one };
            call(&group).unwrap_err()
        });
        for error in errors {
            assert!(
                matches!(error, Error::Peer { argument: "call", .. } | Error::Disconnected { .. }),
                "{error}"
            );
        }
    }
}

#[test]
fn arguments_out_of_range_leave_the_group_as_it_was() {
    assert!(matches!(ThreadGroup::ranks(0), Err(Error::Value { argument: "size", .. })));
    all_ranks(2, |group| {
        let refused = [
            (group.all_gather(&[0; 3], &mut [0; 5]), "receive"),
            (group.all_to_all(&[0; 3], &mut [0; 3]), "send"),
            (group.all_to_all(&[0; 4], &mut [0; 3]), "receive"),
        ];
        for (result, name) in refused {
            assert!(matches!(result, Err(Error::Shape { argument, .. }) if argument == name));
        }
        assert!(matches!(group.broadcast(2, &mut [0]), Err(Error::Value { argument: "root", .. })));
        let mut gathered = [0; 2];
        group.all_gather(&[group.rank() as u8], &mut gathered).unwrap();
        assert_eq!(gathered, [0, 1]);
        assert_eq!(group.traffic(), Traffic { collectives: 1, bytes: 1 });
    });
}

/// A host's partial over its share of the keys.
struct Case {
    shape: [usize; 4],
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    kv_heads: usize,
    cuts: Vec<usize>,
}

impl Case {
    fn kv<'a>(&self, data: &'a [f32], from: usize, to: usize) -> TensorView<'a, f32> {
        let row = self.kv_heads * self.shape[3];
        let shape = [1, to - from, self.kv_heads, self.shape[3]];
        TensorView::contiguous("kv", &data[from * row..to * row], shape).unwrap()
    }

    fn merged(&self, group: &ThreadGroup) -> (Vec<f32>, Vec<f32>) {
        let (from, to) = (self.cuts[group.rank()], self.cuts[group.rank() + 1]);
        let query = TensorView::contiguous("query", &self.query, self.shape).unwrap();
        let [_, seq, heads, _] = self.shape;
        let (mut out, mut lse) = (vec![f32::NAN; self.query.len()], vec![f32::NAN; seq * heads]);
        let view = TensorViewMut::contiguous("out", &mut out, self.shape).unwrap();
        let (key, value) = (self.kv(&self.key, from, to), self.kv(&self.value, from, to));
        flash::attention(&AttentionConfig::default(), query, key, value, view, Some(&mut lse)).unwrap();

        let mut scratch = vec![f32::NAN; merge_scratch_len(self.shape, group.size())];
        let (mut merged, mut merged_lse) = (vec![f32::NAN; out.len()], vec![f32::NAN; lse.len()]);
        let partial =
            Partial { out: TensorView::contiguous("partial", &out, self.shape).unwrap(), lse: &lse };
        let view = TensorViewMut::contiguous("out", &mut merged, self.shape).unwrap();
        merge(group, &partial, view, &mut merged_lse, &mut scratch).unwrap();

        let (rows, dim) = (seq * heads, self.shape[3]);
        let bytes = ((group.size() - 1) * rows * (4 * dim + 4)) as u64;
        assert_eq!(group.traffic(), Traffic { collectives: 1, bytes });
        (merged, merged_lse)
    }
}

proptest! {
    #[test]
    fn the_merge_over_hosts_is_dense_attention_with_the_same_bits_everywhere(
        seq in 1..20usize, kv_heads in 1..3usize, group in 1..4usize, dim in 1..40usize,
        shares in prop::collection::vec(0..30usize, 1..=8), seed in any::<u64>(),
    ) {
        let mut state = seed;
        let mut random = |n: usize| -> Vec<f32> {
            (0..n).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            }).collect()
        };
        let keys: usize = shares.iter().sum();
        let shape = [1, seq, kv_heads * group, dim];
        let mut cuts = vec![0];
        shares.iter().for_each(|share| cuts.push(cuts[cuts.len() - 1] + share));
        let case = Case {
            shape,
            query: random(shape.iter().product()),
            key: random(keys * kv_heads * dim),
            value: random(keys * kv_heads * dim),
            kv_heads,
            cuts,
        };
        let results = all_ranks(shares.len(), |group| case.merged(&group));
        let query = TensorView::contiguous("query", &case.query, shape).unwrap();
        let (key, value) = (case.kv(&case.key, 0, keys), case.kv(&case.value, 0, keys));
        let expected = reference::attention(&AttentionConfig::default(), query, key, value).unwrap();
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for (out, lse) in &results {
            prop_assert_eq!(bits(out), bits(&results[0].0));
            prop_assert_eq!(bits(lse), bits(&results[0].1));
            for (x, y) in out.iter().zip(&expected.out) {
                prop_assert!((f64::from(*x) - y).abs() < 2e-6, "{} {}", x, y);
            }
            for (x, y) in lse.iter().zip(&expected.lse) {
                prop_assert!(f64::from(*x) == *y || (f64::from(*x) - y).abs() < 4e-6, "{} {}", x, y);
            }
        }
    }
}

#[test]
fn a_merge_that_does_not_fit_sends_nothing() {
    all_ranks(2, |group| {
        let (data, lse) = ([0.0; 12], [0.0; 3]);
        let out = TensorView::contiguous("partial", &data, [1, 3, 1, 4]).unwrap();
        let (mut to, mut to_lse, mut scratch) = ([7.0f32; 12], [7.0; 3], [0.0; 45]);
        let mut attempt = |lse: &[f32], to_len: usize, lse_len: usize, scratch_len: usize| {
            let view = TensorViewMut::contiguous("out", &mut to[..to_len], [1, to_len / 4, 1, 4]).unwrap();
            let partial = Partial { out, lse };
            merge(&group, &partial, view, &mut to_lse[..lse_len], &mut scratch[..scratch_len])
        };
        assert!(matches!(attempt(&lse[..2], 12, 3, 45), Err(Error::Shape { argument: "partial", .. })));
        assert!(matches!(attempt(&lse, 8, 3, 45), Err(Error::Shape { argument: "out", .. })));
        assert!(matches!(attempt(&lse, 12, 2, 45), Err(Error::Shape { argument: "lse", .. })));
        assert!(matches!(attempt(&lse, 12, 3, 44), Err(Error::Workspace { expected: 45, got: 44 })));
        assert_eq!((to, to_lse), ([7.0; 12], [7.0; 3]));
        assert_eq!(group.traffic(), Traffic::default());
    });
}
