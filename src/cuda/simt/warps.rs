//! What warps do with others without the whole block: named barriers, and registers that they hand
//! over.

use super::block::WARP;
use super::clock::{Clock, Clocks};

/// One of the barriers that `bar.sync` and `bar.arrive` name.
#[derive(Clone, Debug, Default)]
struct NamedBarrier {
    threads: usize,
    /// Warps that have come, and those of them that wait.
    arrived: Vec<usize>,
    waiting: Vec<usize>,
    clock: Clock,
}

/// The barriers that a block has beside its own, the barrier 0.
#[derive(Debug, Default)]
pub struct NamedBarriers([NamedBarrier; 16]);

impl NamedBarriers {
    /// A warp comes, to wait or not.
    pub fn arrive(
        &mut self,
        clocks: &mut Clocks,
        warp: usize,
        id: u32,
        threads: u32,
        waits: bool,
    ) -> Result<(), String> {
        let failed = |reason| Err(format!("barrier {id}: {reason}"));
        let threads = threads as usize;
        let Some(barrier) = self.0.get_mut(id as usize).filter(|_| id != 0) else {
            return failed("names are 1 to 15".into());
        };
        if threads == 0 || !threads.is_multiple_of(WARP) || threads > clocks.threads() {
            return failed(format!("{threads} threads of a block of {}", clocks.threads()));
        }
        if !barrier.arrived.is_empty() && barrier.threads != threads {
            return failed(format!("warp {warp} has {threads} threads come, others {}", barrier.threads));
        }
        if barrier.arrived.contains(&warp) {
            return failed(format!("warp {warp} comes again before all have come"));
        }
        barrier.threads = threads;
        barrier.arrived.push(warp);
        if waits {
            barrier.waiting.push(warp);
        }
        clocks.release_warp(warp, &mut barrier.clock);
        if barrier.arrived.len() * WARP == threads {
            for &waiting in &barrier.waiting {
                clocks.acquire_warp(waiting, &barrier.clock);
            }
            *barrier = NamedBarrier::default();
        }
        Ok(())
    }

    pub fn is_waiting(&self, warp: usize, id: u32) -> bool {
        self.0[id as usize].waiting.contains(&warp)
    }

    /// The block has ended.
    pub fn check_end(&self) -> Result<(), String> {
        match self.0.iter().position(|barrier| !barrier.arrived.is_empty()) {
            None => Ok(()),
            Some(id) => Err(format!("the block ends with {}", self.describe(id as u32))),
        }
    }

    pub fn describe(&self, id: u32) -> String {
        let barrier = &self.0[id as usize];
        format!("barrier {id}, to which warps {:?} of {} came", barrier.arrived, barrier.threads / WARP)
    }
}

/// Registers of a multiprocessor.
const POOL: usize = 64 * 1024;
/// What a thread may ask for.
const FEWEST: u32 = 24;
const MOST: u32 = 256;

/// Registers of the warps' threads, and those that nobody has.
#[derive(Debug)]
pub struct Registers {
    of: Vec<u32>,
    free: u32,
}

impl Registers {
    /// All warps have what a block alone on a multiprocessor gives them.
    pub fn new(threads: usize) -> Self {
        let each = (POOL / threads.max(1) / 8 * 8).min(MOST as usize) as u32;
        Self { of: vec![each; threads / WARP], free: 0 }
    }

    /// What `setmaxnreg` would be refused for.
    pub fn check(&self, warp: usize, registers: u32, more: bool) -> Result<(), String> {
        let now = self.of[warp];
        let failed =
            |reason| Err(format!("setmaxnreg: warp {warp} asks for {registers} registers, {reason}"));
        if !registers.is_multiple_of(8) {
            failed("no multiple of 8".into())
        } else if !(FEWEST..=MOST).contains(&registers) {
            failed(format!("not {FEWEST} to {MOST}"))
        } else if more != (registers >= now) && registers != now {
            failed(format!("and has {now}: the wrong direction"))
        } else {
            Ok(())
        }
    }

    /// Whether enough are free for a warp.
    pub fn has_room(&self, warp: usize, registers: u32) -> bool {
        registers <= self.of[warp] + self.free
    }

    /// Gives or takes; there is room.
    pub fn set(&mut self, warp: usize, registers: u32) {
        self.free = self.free + self.of[warp] - registers;
        self.of[warp] = registers;
    }

    pub fn describe(&self, registers: u32) -> String {
        format!("setmaxnreg for {registers} registers, where {} a thread are free", self.free)
    }
}
