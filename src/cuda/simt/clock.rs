//! What happened before what, by vector clocks.
//!
//! Whoever touches memory is an *actor* and counts: each thread; the products of each warp group;
//! the copies that an mbarrier waits for. A clock tells for each actor up to which count its
//! accesses are known to be over. Lanes of a warp share a clock; what a lane learns alone, at an
//! mbarrier, the others learn at the next barrier of the warp.

use super::block::WARP;

/// What an actor did at a count of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    pub actor: u32,
    pub count: u32,
}

/// For each actor the first count that is not known of.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    seen: Vec<u32>,
    /// The same, as far as a fence made it visible to asynchronous units. Empty until there is one.
    fenced: Vec<u32>,
}

fn raise(counts: &mut Vec<u32>, actor: usize, count: u32) {
    if counts.len() <= actor {
        counts.resize(actor + 1, 0);
    }
    counts[actor] = counts[actor].max(count);
}

fn join(counts: &mut Vec<u32>, others: &[u32]) {
    if counts.len() < others.len() {
        counts.resize(others.len(), 0);
    }
    counts.iter_mut().zip(others).for_each(|(count, &other)| *count = (*count).max(other));
}

fn has(counts: &[u32], access: Access) -> bool {
    counts.get(access.actor as usize).is_some_and(|&count| access.count < count)
}

impl Clock {
    pub fn learn(&mut self, actor: u32, count: u32) {
        raise(&mut self.seen, actor as usize, count);
    }

    pub fn join(&mut self, other: &Self) {
        join(&mut self.seen, &other.seen);
        join(&mut self.fenced, &other.fenced);
    }
}

/// The clocks of a block.
#[derive(Debug)]
pub struct Clocks {
    /// Of each thread, the count of what it does now.
    counts: Vec<u32>,
    /// Of each warp, what all its lanes know.
    warps: Vec<Clock>,
    /// What single lanes have learned since their warp's last barrier.
    lanes: Vec<Option<Box<Clock>>>,
}

fn lanes_of(warp: usize) -> std::ops::Range<usize> {
    warp * WARP..(warp + 1) * WARP
}

impl Clocks {
    pub fn new(threads: usize) -> Self {
        Self {
            counts: vec![0; threads],
            warps: vec![Clock { seen: vec![0; threads], fenced: Vec::new() }; threads / WARP],
            lanes: (0..threads).map(|_| None).collect(),
        }
    }

    pub fn threads(&self) -> usize {
        self.counts.len()
    }

    /// What a thread does now.
    pub fn now(&self, thread: usize) -> Access {
        Access { actor: thread as u32, count: self.counts[thread] }
    }

    /// Whether an earlier access is over, as far as the thread knows.
    pub fn knows(&self, thread: usize, earlier: Access) -> bool {
        thread == earlier.actor as usize
            || has(&self.warps[thread / WARP].seen, earlier)
            || self.lanes[thread].as_ref().is_some_and(|lane| has(&lane.seen, earlier))
    }

    /// Whether a fence stands between the access and what asynchronous units do for the thread now.
    pub fn has_fenced(&self, thread: usize, earlier: Access) -> bool {
        has(&self.warps[thread / WARP].fenced, earlier)
            || self.lanes[thread].as_ref().is_some_and(|lane| has(&lane.fenced, earlier))
    }

    /// Tells `to` what the thread knows, its own accesses up to now included.
    pub fn release(&mut self, thread: usize, to: &mut Clock) {
        to.join(&self.warps[thread / WARP]);
        if let Some(lane) = &self.lanes[thread] {
            to.join(lane);
        }
        self.counts[thread] += 1;
        to.learn(thread as u32, self.counts[thread]);
    }

    /// The thread, and no other lane, learns what a clock knows.
    pub fn acquire(&mut self, thread: usize, from: &Clock) {
        self.lanes[thread].get_or_insert_default().join(from);
    }

    /// A fence of the thread between memory accesses and asynchronous units.
    pub fn fence(&mut self, thread: usize) {
        let mut all = Clock::default();
        self.release(thread, &mut all);
        self.lanes[thread].get_or_insert_default().fenced = all.seen;
    }

    /// A barrier of the warp.
    pub fn sync_warp(&mut self, warp: usize) {
        let lanes = lanes_of(warp);
        let counts = &mut self.counts[lanes.clone()];
        let next = 1 + counts.iter().max().expect("a warp has lanes");
        counts.fill(next);
        let clock = &mut self.warps[warp];
        clock.seen[lanes.clone()].fill(next);
        for lane in self.lanes[lanes].iter_mut().filter_map(Option::take) {
            clock.join(&lane);
        }
    }

    /// A barrier of the warp, which tells `to` what it knows.
    pub fn release_warp(&mut self, warp: usize, to: &mut Clock) {
        self.sync_warp(warp);
        to.join(&self.warps[warp]);
    }

    /// All lanes learn what a clock knows.
    pub fn acquire_warp(&mut self, warp: usize, from: &Clock) {
        self.warps[warp].join(from);
    }

    /// All lanes learn of an actor.
    pub fn learn(&mut self, warp: usize, actor: u32, count: u32) {
        self.warps[warp].learn(actor, count);
    }

    /// A barrier of the block.
    pub fn sync_block(&mut self) {
        let mut all = Clock::default();
        for warp in 0..self.warps.len() {
            self.release_warp(warp, &mut all);
        }
        self.warps.fill(all);
    }
}
