//! One block of threads: a coroutine each, run warp by warp in a random order between barriers.
//!
//! A thread runs until it meets others: at a barrier, a shuffle, a matrix load or product. There it
//! stops, and goes on when all of its warp (all of its block, at a barrier of the block) have come
//! to the same point; at an mbarrier, when its phase is complete.

use super::Fault;
use super::clock::Clocks;
use super::global::Regions;
use super::mbarrier::Mbarriers;
use super::run::run_warps;
use super::shared::{SharedMemory, State};
use super::tensor::{BoxCopy, CHUNK};
use super::warps::{NamedBarriers, Registers};
use super::wgmma::{Product, WARPS, WarpGroup};
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, Yielder};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// Lanes of a warp.
pub const WARP: usize = 32;
/// Of one thread: accumulators and a few frames.
const STACK_BYTES: usize = 64 * 1024;

/// A compiled kernel: reads its parameter struct at the address.
pub type Kernel = unsafe extern "C" fn(*const u8);

/// Where a thread stopped. The pointers go to its stack, which stays while it is stopped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stop {
    BlockBarrier(bool),
    WarpBarrier,
    AnyLane(bool),
    Shuffle {
        value: f32,
        lanes: u32,
    },
    LoadMatrices {
        to: *mut [u32; 4],
        row: u32,
        transposed: bool,
    },
    MultiplyAdd {
        c: *mut [f32; 4],
        a: *const [u32; 4],
        b: *const [u32; 2],
        bf16: bool,
    },
    /// Of one lane: for the others it is not there.
    Mbarrier {
        address: u32,
        parity: u32,
    },
    NamedBarrier {
        id: u32,
        threads: u32,
        waits: bool,
    },
    Registers {
        registers: u32,
        more: bool,
    },
    WgmmaFence,
    Wgmma(*const Product),
    WgmmaCommit,
    WgmmaWait(u32),
    /// It will not go on: the block has failed, or this thread was made to leave.
    Never,
}

/// What a thread is told when it goes on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reply {
    pub value: f32,
    pub flag: bool,
}

type Thread = Coroutine<Reply, Stop, ()>;

/// Where a lane is.
#[derive(Clone, Copy)]
pub enum At {
    Ready,
    Stopped(Stop),
    Ended,
}

/// A thread, and what it is told next.
pub struct Lane {
    pub thread: Thread,
    pub at: At,
    pub reply: Reply,
}

/// A copy that has not landed.
struct Copy {
    to: u32,
    data: [u8; 16],
}

/// What is on its way, and lands at an mbarrier.
enum Flight {
    Box(BoxCopy),
    /// Copies of one thread, with an arrival of their own.
    Copies(Vec<Copy>),
}

/// What the threads of a block share with the hooks that they call.
pub struct Block<'a> {
    pub index: u32,
    pub regions: &'a Regions,
    pub shared: SharedMemory,
    pub clocks: Clocks,
    pub mbarriers: Mbarriers,
    pub named: NamedBarriers,
    pub registers: Registers,
    pub groups: Vec<WarpGroup>,
    pub fault: Option<Fault>,
    /// The running thread.
    pub thread: usize,
    yielders: Vec<*const Yielder<Reply, Stop>>,
    /// Of each thread: groups of copies, the last one still open.
    copies: Vec<VecDeque<Vec<Copy>>>,
    flights: Vec<(u32, Flight)>,
    /// Barriers that each thread has come to; of mbarriers, where it arrived and where it waited.
    pub barriers: Vec<u32>,
    pub arrivals: Vec<u32>,
    pub waits: Vec<u32>,
    /// What went wrong first.
    pub error: Option<String>,
}

thread_local! {
    /// The block that runs on this thread of the CPU.
    static CURRENT: Cell<*const ()> = const { Cell::new(std::ptr::null()) };
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with the block that is running. Only hooks of a running kernel come here.
pub fn with_block<R>(f: impl FnOnce(&mut Block<'_>) -> R) -> R {
    let cell = CURRENT.get().cast::<RefCell<Block<'_>>>();
    // SAFETY: `run` keeps the cell alive while a kernel runs, and only then are hooks called.
    let block = unsafe { &*cell };
    f(&mut block.borrow_mut())
}

/// Stops the running thread.
pub fn stop(at: Stop) -> Reply {
    let yielder = with_block(|block| block.yielders[block.thread]);
    // SAFETY: the running thread set it when it started, and it lives as long as the thread.
    unsafe { &*yielder }.suspend(at)
}

/// Keeps the first error and ends the running thread.
pub fn fail(reason: String) -> ! {
    with_block(|block| {
        let thread = block.thread;
        block.error.get_or_insert(format!("thread {thread}: {reason}"));
    });
    loop {
        stop(Stop::Never);
    }
}

impl Block<'_> {
    pub fn start_copy(&mut self, to: u32, data: [u8; 16]) -> Result<(), String> {
        self.shared.start_copy(&self.clocks, self.thread, to, data.len())?;
        self.copies[self.thread].back_mut().expect("an open group").push(Copy { to, data });
        Ok(())
    }

    pub fn commit_copies(&mut self) {
        self.copies[self.thread].push_back(Vec::new());
    }

    /// Lands all closed groups but the last `groups`.
    pub fn wait_copies(&mut self, groups: usize) -> Result<(), String> {
        let by = self.clocks.now(self.thread);
        while self.copies[self.thread].len() - 1 > groups {
            for copy in self.copies[self.thread].pop_front().expect("a closed group") {
                self.shared.land_copy(by, State::Written, copy.to, &copy.data)?;
            }
        }
        Ok(())
    }

    /// Hands the thread's copies to an mbarrier: they are waited for there alone.
    pub fn hand_copies_over(&mut self, mbarrier: u32) -> Result<(), String> {
        self.mbarriers.check(&self.clocks, self.thread, mbarrier)?;
        let copies = std::mem::replace(&mut self.copies[self.thread], VecDeque::from([Vec::new()]));
        self.flights.push((mbarrier, Flight::Copies(copies.into_iter().flatten().collect())));
        Ok(())
    }

    pub fn start_box(&mut self, copy: BoxCopy, mbarrier: u32) -> Result<(), String> {
        self.mbarriers.check_unit(&self.clocks, self.thread, mbarrier)?;
        for address in copy.chunks() {
            self.shared.start_unit_copy(&self.clocks, self.thread, address, CHUNK)?;
        }
        self.flights.push((mbarrier, Flight::Box(copy)));
        Ok(())
    }

    /// All warps have ended.
    pub fn check_end(&self) -> Result<(), String> {
        self.groups.iter().try_for_each(WarpGroup::check_steps)?;
        self.named.check_end()?;
        self.mbarriers.check_end()
    }

    /// How many copies are on their way to mbarriers.
    pub fn flights(&self) -> usize {
        self.flights.len()
    }

    pub fn land(&mut self, flight: usize) -> Result<(), String> {
        let (mbarrier, flight) = self.flights.swap_remove(flight);
        let by = self.mbarriers.copies(mbarrier);
        match flight {
            Flight::Box(copy) => {
                copy.land(self.regions, &mut self.shared, by)?;
                self.mbarriers.land(mbarrier, copy.bytes() as u32, 0)
            }
            Flight::Copies(copies) => {
                for copy in copies {
                    self.shared.land_copy(by, State::Written, copy.to, &copy.data)?;
                }
                self.mbarriers.land(mbarrier, 0, 1)
            }
        }
    }
}

/// Runs `threads` threads of `kernel`, in an order drawn from `seed`.
pub fn run(
    kernel: Kernel,
    params: &[u8],
    threads: usize,
    block: Block<'_>,
    mut random: impl FnMut(usize) -> usize,
) -> Result<(), String> {
    let cell = RefCell::new(block);
    let outer = CURRENT.replace((&raw const cell).cast());
    let params = params.as_ptr();
    let mut lanes: Vec<Lane> = (0..threads)
        .map(|_| {
            let stack = STACKS.with_borrow_mut(Vec::pop);
            let stack = stack.unwrap_or_else(|| DefaultStack::new(STACK_BYTES).expect("memory for a stack"));
            let thread = Coroutine::with_stack(stack, move |yielder: &Yielder<Reply, Stop>, _| {
                with_block(|block| {
                    let thread = block.thread;
                    block.yielders[thread] = yielder;
                });
                // SAFETY: the launch checked that the parameters are those of the kernel.
                unsafe { kernel(params) }
            });
            Lane { thread, at: At::Ready, reply: Reply::default() }
        })
        .collect();
    let result = run_warps(&cell, &mut lanes, &mut random);
    CURRENT.set(outer);
    STACKS.with_borrow_mut(|stacks| {
        for mut lane in lanes {
            // SAFETY: kernels own nothing that would have to be dropped.
            unsafe { lane.thread.force_reset() };
            stacks.push(lane.thread.into_stack());
        }
    });
    result
}

impl<'a> Block<'a> {
    pub fn new(
        index: u32,
        regions: &'a Regions,
        shared_bytes: usize,
        threads: usize,
        fault: Option<Fault>,
    ) -> Self {
        let groups = (threads / WARP).div_ceil(WARPS);
        Self {
            index,
            regions,
            shared: SharedMemory::new(shared_bytes, threads),
            clocks: Clocks::new(threads),
            mbarriers: Mbarriers::new((threads + groups) as u32),
            named: NamedBarriers::default(),
            registers: Registers::new(threads),
            groups: (0..groups).map(|group| WarpGroup::new((threads + group) as u32)).collect(),
            fault,
            thread: 0,
            yielders: vec![std::ptr::null(); threads],
            copies: (0..threads).map(|_| VecDeque::from([Vec::new()])).collect(),
            flights: Vec::new(),
            barriers: vec![0; threads],
            arrivals: vec![0; threads],
            waits: vec![0; threads],
            error: None,
        }
    }
}
