//! Messages under way: what a rank may do meanwhile, and what becomes of those that nobody waits
//! for.

use crate::common::named;
use crate::programs::PROGRAMS;
use crate::threads::all_ranks;
use star_attention::comm::{
    Collective, CpuMerge, GroupConfig, Link, MergePlan, MergeWay, Message, Pattern, Received, Started,
    ThreadGroup, Traffic,
};
use star_attention::{Error, Result, TensorViewMut};
use std::sync::{Barrier, Mutex};
use std::time::Duration;

const LINK: Link = Link { latency: 1e-5, bandwidth: 1e9 };
const SHAPE: [usize; 4] = [1, 3, 1, 4];
const WAYS: [MergeWay; 2] = [MergeWay::AllGather, MergeWay::ByRows];

fn merge_of(ranks: usize, way: MergeWay) -> CpuMerge<f32, f32> {
    MergePlan::new(SHAPE, ranks, &LINK).unwrap().with_way(way).on_cpu()
}

/// Rows of `value` with a log-sum-exp of 0.
fn write(merge: &mut CpuMerge<f32, f32>, value: f32) {
    let (mut out, lse) = merge.partial().unwrap();
    lse.fill(0.0);
    (0..3).for_each(|row| (0..4).for_each(|dim| out.set([0, row, 0, dim], value)));
}

fn to(out: &mut [f32]) -> TensorViewMut<'_, f32> {
    TensorViewMut::contiguous("out", out, SHAPE).unwrap()
}

#[test]
fn a_rank_works_on_while_its_merge_is_under_way() {
    for way in WAYS {
        all_ranks(3, |group| {
            let mut merge = merge_of(3, way);
            for layer in 0..5 {
                write(&mut merge, (group.rank() + layer) as f32);
                let pending = merge.start(&group).unwrap();
                // Another merge is written meanwhile; the group does nothing else.
                let mut next = merge_of(3, way);
                write(&mut next, 7.0);
                let refused = [
                    next.start(&group).map(drop).unwrap_err(),
                    group.all_gather(&[1], &mut [0; 3]).unwrap_err(),
                    group.all_to_all(&[1; 3], &mut [0; 3]).unwrap_err(),
                    group.broadcast(0, &mut [0]).unwrap_err(),
                ];
                assert!(refused.into_iter().all(|error| named(error) == ("value", "group")));
                let (mut out, mut lse) = ([f32::NAN; 12], [f32::NAN; 3]);
                pending.wait(to(&mut out), Some(&mut lse)).unwrap();
                assert!(out.iter().all(|x| (x - (1 + layer) as f32).abs() < 1e-6), "{out:?}");
                assert!(lse.iter().all(|x| (x - 3f32.ln()).abs() < 1e-6), "{lse:?}");
            }
            assert_eq!(group.traffic().collectives, if way == WAYS[0] { 5 } else { 10 });
        });
    }
}

#[test]
fn a_merge_that_is_dropped_is_completed_for_the_others() {
    for way in WAYS {
        all_ranks(3, |group| {
            let mut merge = merge_of(3, way);
            for _ in 0..3 {
                write(&mut merge, group.rank() as f32);
                let pending = merge.start(&group).unwrap();
                let mut out = [f32::NAN; 12];
                match group.rank() {
                    0 => drop(pending),
                    1 => {
                        let short = TensorViewMut::contiguous("out", &mut out[..8], [1, 2, 1, 4]).unwrap();
                        assert_eq!(named(pending.wait(short, None).unwrap_err()), ("shape", "out"));
                        assert!(out.iter().all(|x| x.is_nan()));
                    }
                    _ => {
                        pending.wait(to(&mut out), None).unwrap();
                        assert!(out.iter().all(|x| (x - 1.0).abs() < 1e-6), "{out:?}");
                    }
                }
            }
            group.all_gather(&[1], &mut [0; 3]).unwrap();
        });
    }
}

/// Sinks are in the share of a rank that gives up its own result, and in no merge but the next.
#[test]
fn sinks_count_in_the_next_merge_whoever_waits_for_it() {
    for way in WAYS {
        all_ranks(3, |group| {
            let mut merge = merge_of(3, way);
            for sink in [Some(3f32.ln()), None] {
                write(&mut merge, 1.0);
                if let Some(sink) = sink {
                    merge.with_sinks(Some(&[sink])).unwrap();
                }
                let pending = merge.start(&group).unwrap();
                if group.rank() == 0 {
                    drop(pending);
                    continue;
                }
                let (mut out, mut lse) = ([f32::NAN; 12], [f32::NAN; 3]);
                pending.wait(to(&mut out), Some(&mut lse)).unwrap();
                // The weights of three partials and, if there is one, of as much in the sink.
                let (part, sum) = if sink.is_some() { (0.5, 6f32) } else { (1.0, 3.0) };
                assert!(out.iter().all(|x| (x - part).abs() < 1e-6), "{out:?}");
                assert!(lse.iter().all(|x| (x - sum.ln()).abs() < 1e-6), "{lse:?}");
            }
        });
    }
}

#[test]
fn a_merge_that_is_forgotten_leaves_the_group_when_that_is_dropped() {
    for way in WAYS {
        all_ranks(2, |group| {
            let mut merge = merge_of(2, way);
            write(&mut merge, group.rank() as f32);
            let pending = merge.start(&group).unwrap();
            let mut out = [f32::NAN; 12];
            if group.rank() == 0 {
                std::mem::forget(pending);
                // Its memory is another than that of the message under way.
                write(&mut merge, f32::NAN);
                assert_eq!(named(merge.run(&group, to(&mut out), None).unwrap_err()), ("value", "group"));
                return;
            }
            let result = pending.wait(to(&mut out), None);
            if way == MergeWay::AllGather {
                // What was sent is received.
                result.unwrap();
                assert!(out.iter().all(|x| (x - 0.5).abs() < 1e-6), "{out:?}");
            } else {
                assert!(matches!(result.unwrap_err(), Error::Disconnected { rank: 0 }));
                assert!(out.iter().all(|x| x.is_nan()));
            }
            write(&mut merge, 0.0);
            let error = merge.run(&group, to(&mut out), None).unwrap_err();
            assert!(matches!(error, Error::Disconnected { .. }), "{error}");
        });
    }
}

#[test]
fn a_rank_that_panics_with_a_merge_under_way_does_not_wait() {
    let ranks = ThreadGroup::ranks(2).unwrap();
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|group| {
                scope.spawn(move || {
                    let mut merge = merge_of(2, MergeWay::AllGather);
                    write(&mut merge, 0.0);
                    if group.rank() == 0 {
                        let _pending = merge.start(&group).unwrap();
                        std::panic::resume_unwind(Box::new("a rank's panic"));
                    }
                    merge.run(&group, to(&mut [0.0; 12]), None).unwrap();
                    write(&mut merge, 0.0);
                    merge.run(&group, to(&mut [0.0; 12]), None).unwrap_err()
                })
            })
            .collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        assert!(matches!(results[1], Ok(Error::Disconnected { rank: 0 })));
    });
}

#[test]
fn a_merge_that_fails_writes_nothing() {
    let config = GroupConfig { timeout: Duration::from_millis(50), ..GroupConfig::default() };
    for way in WAYS {
        let ranks = ThreadGroup::ranks_with(2, &config).unwrap();
        let mut merge = merge_of(2, way);
        write(&mut merge, 1.0);
        let (mut out, mut lse) = ([7.0; 12], [7.0; 3]);
        let error = merge.run(&ranks[0], to(&mut out), Some(&mut lse)).unwrap_err();
        assert!(matches!(error, Error::Timeout { rank: 1, .. }), "{error}");
        write(&mut merge, 1.0);
        let error = merge.start(&ranks[0]).map(drop).unwrap_err();
        assert!(matches!(error, Error::Disconnected { rank: 0 }), "{error}");
        assert_eq!((out, lse), ([7.0; 12], [7.0; 3]));
    }
}

/// The others read it where it lies.
#[test]
fn a_message_is_not_written_while_it_is_read() {
    let barrier = Barrier::new(2);
    all_ranks(2, |group| {
        let mut own = Message::new(&[4, 4]).unwrap();
        own.get_mut().unwrap().into_iter().for_each(|region| region.fill(1 + group.rank() as u8));
        let started = group.start(Pattern::AllGather, own.clone()).unwrap();
        if group.rank() == 0 {
            let read = &mut |received: &Received<'_>| {
                barrier.wait();
                // Here rank 1 has its result, and asks for its message.
                barrier.wait();
                assert_eq!((received.get(1, 0), received.get(1, 1)), (Some(&[2; 4][..]), Some(&[2; 4][..])));
                assert_eq!((received.get(1, 2), received.get(2, 0)), (None, None));
            };
            group.finish(started, read).unwrap();
        } else {
            barrier.wait();
            group.finish(started, &mut |_| {}).unwrap();
            assert!(own.get_mut().is_none());
            barrier.wait();
        }
        // After the next exchange all have read it.
        group.all_gather(&[], &mut []).unwrap();
        assert!(own.get_mut().is_some());
    });
}

#[test]
fn messages_that_do_not_fit_are_refused() {
    all_ranks(2, |group| {
        let odd = || Message::new(&[4, 3]).unwrap();
        let refused = group.start(Pattern::AllToAll, odd()).unwrap_err();
        assert_eq!(named(refused), ("shape", "message"));
        let started = group.start(Pattern::AllGather, odd()).unwrap();
        // It takes the place of another's.
        let other = ThreadGroup::ranks(1).unwrap().remove(0);
        assert_eq!(named(other.finish(started, &mut |_| {}).unwrap_err()), ("value", "group"));
    });
    assert_eq!(named(Message::new(&[usize::MAX, 1]).unwrap_err()), ("value", "message"));
    // As long as the others', in other regions.
    let errors = all_ranks(2, |group| {
        let message = Message::new(&[4 + 4 * group.rank(), 8 - 4 * group.rank()]).unwrap();
        let started = group.start(Pattern::AllGather, message).unwrap();
        group.finish(started, &mut |_| panic!("nothing is shown")).unwrap_err()
    });
    for error in errors {
        assert!(matches!(error, Error::Peer { argument: "call", .. }), "{error}");
    }
}

/// What an engine shows is not trusted to be what was sent.
#[test]
fn an_engine_that_shows_too_little_is_an_error() {
    for way in WAYS {
        let group = Silent(Plain(Mutex::new(ThreadGroup::ranks(1).unwrap().remove(0))));
        let mut merge = merge_of(1, way);
        write(&mut merge, 1.0);
        let mut out = [7.0; 12];
        assert_eq!(named(merge.run(&group, to(&mut out), None).unwrap_err()), ("shape", "received"));
        assert_eq!(out, [7.0; 12]);
    }
}

/// An engine that shows nothing of what it has received.
struct Silent(Plain);

impl Collective for Silent {
    fn rank(&self) -> usize {
        self.0.rank()
    }
    fn size(&self) -> usize {
        self.0.size()
    }
    fn link(&self) -> Link {
        self.0.link()
    }
    fn all_gather(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        self.0.all_gather(send, receive)
    }
    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        self.0.all_to_all(send, receive)
    }
    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()> {
        self.0.broadcast(root, buffer)
    }
    fn finish(&self, _: Started, read: &mut dyn FnMut(&Received<'_>)) -> Result<()> {
        read(&Received::new(2, Vec::new()));
        Ok(())
    }
    fn traffic(&self) -> Traffic {
        self.0.traffic()
    }
}

/// An engine that has no more than the calls on borrowed memory.
struct Plain(Mutex<ThreadGroup>);

impl Plain {
    fn group(&self) -> std::sync::MutexGuard<'_, ThreadGroup> {
        self.0.lock().unwrap()
    }
}

impl Collective for Plain {
    fn rank(&self) -> usize {
        self.group().rank()
    }
    fn size(&self) -> usize {
        self.group().size()
    }
    fn link(&self) -> Link {
        self.group().link()
    }
    fn all_gather(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        self.group().all_gather(send, receive)
    }
    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        self.group().all_to_all(send, receive)
    }
    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()> {
        self.group().broadcast(root, buffer)
    }
    fn traffic(&self) -> Traffic {
        self.group().traffic()
    }
}

#[test]
fn all_programs_hold_with_blocking_calls_alone() {
    for size in [1, 3, 4] {
        for (_, program) in PROGRAMS {
            all_ranks(size, |group| program(&Plain(Mutex::new(group))));
        }
    }
}
