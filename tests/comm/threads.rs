//! The engine for threads of one process.

use crate::programs::PROGRAMS;
use star_attention::comm::{Collective, GroupConfig, ThreadGroup, Traffic};
use star_attention::{Error, Result};
use std::thread;
use std::time::{Duration, Instant};

/// Runs `program` on a thread for each rank.
fn on_ranks<T: Send>(
    ranks: Vec<ThreadGroup>,
    program: impl Fn(ThreadGroup) -> T + Sync,
) -> Vec<thread::Result<T>> {
    thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(|| program(rank))).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    })
}

pub fn all_ranks<T: Send>(size: usize, program: impl Fn(ThreadGroup) -> T + Sync) -> Vec<T> {
    on_ranks(ThreadGroup::ranks(size).unwrap(), program).into_iter().map(|result| result.unwrap()).collect()
}

#[test]
fn all_programs_hold_for_every_world_size() {
    for size in 1..=8 {
        for (_, program) in PROGRAMS {
            all_ranks(size, |group| program(&group));
        }
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
                        std::panic::resume_unwind(Box::new("a rank's panic"));
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
    let config = GroupConfig { timeout: Duration::from_millis(50), ..GroupConfig::default() };
    let ranks = ThreadGroup::ranks_with(3, &config).unwrap();
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
        assert_eq!(group.traffic(), Traffic { collectives: 1, messages: 1, bytes: 1 });
    });
}
