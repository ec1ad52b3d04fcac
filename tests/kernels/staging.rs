//! Copies through pinned memory: their order, their slots, and what errors leave behind. On a
//! device whose work is done when the test says so, on the emulator, and on a GPU.

use crate::backend::Backend;
use crate::call::on_each_device;
use crate::common::named;
use fake::{Call, Fake, Stream, is_failure};
use proptest::prelude::*;
use star_attention::cuda::{Device, Staging};
use star_attention::{Error, Result};

#[path = "staging_fake.rs"]
mod fake;

/// Bytes of the device's memory.
const MEMORY: usize = 32;

/// A ring, and the device that it copies to.
struct Ring {
    device: Fake,
    stream: Stream,
    staging: Staging<Fake>,
}

impl Ring {
    fn new(slots: usize, bytes: usize) -> Self {
        let device = Fake::new(MEMORY);
        Self { stream: device.stream(0), staging: Staging::new(&device, slots, bytes).unwrap(), device }
    }

    fn copy(&mut self, parts: &[(usize, &[u8])]) -> Result<()> {
        self.staging.copy(&self.device, &self.stream, &mut self.device.span_mut(), parts)
    }
}

fn is_busy(result: &Result<()>, of: usize) -> bool {
    matches!(result, Err(Error::Busy { slots }) if *slots == of)
}

/// What happens to a ring.
#[derive(Clone, Debug)]
enum Step {
    /// An update: each part's offset and bytes.
    Copy(Vec<(usize, Vec<u8>)>),
    /// The stream moves on by so many copies and events.
    Advance(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let part = (0..MEMORY + 2, prop::collection::vec(any::<u8>(), 0..8));
    let step = prop_oneof![
        prop::collection::vec(part, 0..4).prop_map(Step::Copy),
        (0usize..6).prop_map(Step::Advance),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// Each update that was accepted arrives whole and in order, however far the stream is behind;
    /// an update is refused exactly where it does not fit or no slot is free, and then leaves no
    /// trace.
    #[test]
    fn updates_arrive_as_they_were_asked_for(slots in 1usize..4, bytes in 0usize..20, steps in steps()) {
        let mut ring = Ring::new(slots, bytes);
        let mut expected = vec![0; MEMORY];
        for step in steps {
            match step {
                Step::Advance(count) => ring.device.advance(0, count),
                Step::Copy(parts) => {
                    let parts: Vec<_> = parts.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
                    let len: usize = parts.iter().map(|(_, bytes)| bytes.len()).sum();
                    let fits = len <= bytes && parts.iter().all(|(at, part)| at + part.len() <= MEMORY);
                    let (in_flight, pending) = (ring.device.in_flight(), ring.device.pending());
                    let copied = ring.copy(&parts);
                    if !fits {
                        prop_assert_eq!(named(copied.unwrap_err()), ("shape", "parts"));
                        prop_assert_eq!(ring.device.pending(), pending);
                    } else if len > 0 && in_flight == slots {
                        prop_assert!(is_busy(&copied, slots), "{copied:?}");
                        prop_assert_eq!(ring.device.pending(), pending);
                    } else {
                        copied.unwrap();
                        prop_assert_eq!(ring.device.in_flight(), in_flight + usize::from(len > 0));
                        parts.iter().for_each(|(at, part)| expected[*at..][..part.len()].copy_from_slice(part));
                    }
                }
            }
        }
        let device = ring.device.clone();
        // Waits for what is under way.
        drop(ring);
        prop_assert_eq!(device.memory(), expected);
        prop_assert_eq!(device.freed(), slots);
    }
}

/// A stream that stands still keeps the slots of its own updates, and no others.
#[test]
fn slots_are_taken_across_streams() {
    let mut ring = Ring::new(2, 4);
    let slow = ring.device.stream(1);
    ring.staging.copy(&ring.device, &slow, &mut ring.device.span_mut(), &[(0, &[7])]).unwrap();
    for update in 1..10 {
        ring.copy(&[(1, &[update])]).unwrap();
        let refused = ring.copy(&[(1, &[99])]);
        assert!(is_busy(&refused, 2), "{refused:?}");
        ring.device.advance(0, 2);
        assert_eq!(ring.device.memory()[..2], [0, update]);
    }
    ring.device.advance(1, 2);
    assert_eq!(ring.device.memory()[..2], [7, 9]);
    assert_eq!(ring.device.in_flight(), 0);
}

#[test]
fn a_captured_stream_is_refused() {
    let mut ring = Ring::new(1, 4);
    ring.stream = ring.device.captured_stream();
    // Without any bytes as well.
    for parts in [&[(0, &[1u8][..])][..], &[]] {
        assert_eq!(named(ring.copy(parts).unwrap_err()), ("value", "stream"));
    }
    assert_eq!(ring.device.pending(), 0);
    ring.stream = ring.device.stream(0);
    ring.copy(&[(0, &[1])]).unwrap();
}

#[test]
fn parts_beyond_all_addresses_are_refused() {
    let mut ring = Ring::new(1, 4);
    for at in [usize::MAX, MEMORY] {
        assert_eq!(named(ring.copy(&[(at, &[1])]).unwrap_err()), ("shape", "parts"));
    }
    assert_eq!(ring.device.pending(), 0);
}

/// The first of two copies is in flight when the second one fails, and keeps the slot.
#[test]
fn a_copy_that_fails_leaves_its_slot_to_those_before_it() {
    let mut ring = Ring::new(1, 4);
    ring.device.fail(Call::Copy, 1);
    assert!(is_failure(&ring.copy(&[(0, &[1]), (1, &[2])])));
    assert!(is_busy(&ring.copy(&[(0, &[3])]), 1));
    ring.device.advance(0, 2);
    assert_eq!(ring.device.memory()[..2], [1, 0]);
    ring.copy(&[(0, &[3])]).unwrap();
}

/// Without an event nothing tells when a slot's copies end: it is neither written again nor freed.
#[test]
fn a_slot_without_an_event_is_lost() {
    let mut ring = Ring::new(2, 4);
    ring.device.fail(Call::Record, 0);
    assert!(is_failure(&ring.copy(&[(0, &[1])])));
    ring.copy(&[(1, &[2])]).unwrap();
    assert!(is_busy(&ring.copy(&[(2, &[3])]), 2));
    ring.device.advance(0, 3);
    assert_eq!(ring.device.memory()[..3], [1, 2, 0]);
    ring.copy(&[(2, &[3])]).unwrap();
    let device = ring.device.clone();
    drop(ring);
    assert_eq!(device.memory()[..3], [1, 2, 3]);
    assert_eq!(device.freed(), 1);
}

#[test]
fn a_ring_that_lost_all_slots_says_so() {
    let mut ring = Ring::new(2, 4);
    for _ in 0..2 {
        ring.device.fail(Call::Record, 0);
        assert!(is_failure(&ring.copy(&[(0, &[1])])));
    }
    ring.device.advance(0, 2);
    let error = ring.copy(&[(0, &[1])]).unwrap_err();
    assert!(matches!(error, Error::Unavailable { what: "staging memory", .. }), "{error}");
    assert_eq!(ring.device.pending(), 0);
}

#[test]
fn an_error_of_the_query_is_returned_before_anything_is_copied() {
    let mut ring = Ring::new(1, 4);
    ring.device.fail(Call::Query, 0);
    assert!(is_failure(&ring.copy(&[(0, &[1])])));
    assert_eq!(ring.device.pending(), 0);
    ring.copy(&[(0, &[1])]).unwrap();
}

/// A wait that fails costs one slot's memory; the others are waited for and freed.
#[test]
fn memory_that_cannot_be_waited_for_is_leaked() {
    let mut ring = Ring::new(3, 4);
    for at in 0..3 {
        ring.copy(&[(at, &[9])]).unwrap();
    }
    let device = ring.device.clone();
    device.fail(Call::Wait, 1);
    drop(ring);
    assert_eq!(device.freed(), 2);
    assert_eq!(device.pending(), 0);
    assert_eq!(device.memory()[..3], [9; 3]);
}

#[test]
fn a_ring_needs_slots_and_memory() {
    let device = Fake::new(MEMORY);
    let error = Staging::new(&device, 0, 8).unwrap_err();
    assert_eq!(named(error), ("value", "slots"));
    for (call, freed) in [(Call::Pinned, 1), (Call::Event, 2)] {
        let before = device.freed();
        device.fail(call, 1);
        assert!(is_failure(&Staging::new(&device, 3, 8).map(|_| ())));
        assert_eq!(device.freed(), before + freed);
    }
}

#[test]
fn rings_go_from_thread_to_thread() {
    fn check<T: Send>() {}
    check::<Staging<Fake>>();
    check::<Staging<star_attention::cuda::simt::Simt>>();
}

/// Copies `updates` updates of two tables as fast as slots are free, and compares what arrived.
fn many_updates<B: Backend>(seed: u64, slots: usize, updates: usize) {
    const LEN: usize = 64;
    let backend = B::open(seed);
    let (device, stream) = (backend.device(), backend.stream());
    let mut staging = Staging::new(device, slots, 2 * LEN).unwrap();
    // A place for each update, and one that each writes.
    let mut memory = backend.memory(&vec![0u8; (updates + 1) * LEN]);
    let row = |update: usize| -> [u8; LEN] { std::array::from_fn(|i| (update * 31 + i * 7 + 1) as u8) };
    let mut expected = vec![0; (updates + 1) * LEN];
    for update in 0..updates {
        let row = row(update);
        let at = (update + 1) * LEN;
        let mut copy = |memory: &mut _| {
            staging.copy(device, stream, &mut backend.span_mut(memory), &[(0, &row), (at, &row)])
        };
        while let Err(error) = copy(&mut memory) {
            assert!(matches!(error, Error::Busy { .. }), "{error}");
            // Reading waits for the stream, so that all slots are free then.
            assert_eq!(backend.read(&memory), expected);
        }
        expected[..LEN].copy_from_slice(&row);
        expected[at..][..LEN].copy_from_slice(&row);
    }
    assert_eq!(backend.read(&memory), expected);
}

on_each_device! {
    fn every_update_arrives_in_order(seed in any::<u64>(), slots in 1usize..5, updates in 0usize..40) {
        many_updates::<B>(seed, slots, updates);
    }

    /// Its memory lives until they have.
    fn a_ring_may_go_before_its_copies_have_ended(seed in any::<u64>(), len in 1usize..100_000) {
        let backend = B::open(seed);
        let mut memory = backend.memory(&vec![0u8; len]);
        let row = vec![seed as u8 | 1; len];
        let mut staging = Staging::new(backend.device(), 1, len).unwrap();
        let mut to = backend.span_mut(&mut memory);
        staging.copy(backend.device(), backend.stream(), &mut to, &[(0, &row)]).unwrap();
        drop((staging, to));
        assert_eq!(backend.read(&memory), row);
    }

    fn memory_that_there_is_not_is_an_error() {
        let backend = B::open(0);
        assert!(backend.device().pinned(usize::MAX).is_err());
        let mut empty = backend.device().pinned(0).unwrap();
        let empty: &mut [u8] = empty.as_mut();
        assert!(empty.is_empty());
    }
}
