//! One block of threads: a coroutine each, run warp by warp in a random order between barriers.
//!
//! A thread runs until it meets others: at a barrier, a shuffle, a matrix load or product. There it
//! stops, and goes on when all of its warp (all of its block, at a barrier of the block) have come
//! to the same point.

use super::global::Regions;
use super::shared::{Access, SharedMemory, Time};
use super::{Fault, matrix};
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// Lanes of a warp.
pub const WARP: usize = 32;
/// Of one thread: accumulators and a few frames.
const STACK_BYTES: usize = 64 * 1024;

/// A compiled kernel: reads its parameter struct at the address.
pub type Kernel = unsafe extern "C" fn(*const u8);

/// Where a thread stopped. The pointers go to its stack, which stays while it is stopped.
#[derive(Clone, Copy, Debug)]
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

/// A copy that has not landed.
struct Copy {
    to: u32,
    data: [u8; 16],
}

/// What the threads of a block share with the hooks that they call.
pub struct Block<'a> {
    pub index: u32,
    pub regions: &'a Regions,
    pub shared: SharedMemory,
    pub fault: Option<Fault>,
    /// The running thread.
    pub thread: usize,
    yielders: Vec<*const Yielder<Reply, Stop>>,
    /// Of each thread: groups of copies, the last one still open.
    copies: Vec<VecDeque<Vec<Copy>>>,
    /// Barriers that each thread has come to.
    pub barriers: Vec<u32>,
    times: Vec<Time>,
    /// What went wrong first.
    error: Option<String>,
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
    pub fn access(&self) -> Access {
        Access { thread: self.thread as u32, time: self.times[self.thread / WARP] }
    }

    pub fn start_copy(&mut self, to: u32, data: [u8; 16]) -> Result<(), String> {
        self.shared.start_copy(self.access(), to, data.len())?;
        self.copies[self.thread].back_mut().expect("an open group").push(Copy { to, data });
        Ok(())
    }

    pub fn commit_copies(&mut self) {
        self.copies[self.thread].push_back(Vec::new());
    }

    /// Lands all closed groups but the last `groups`.
    pub fn wait_copies(&mut self, groups: usize) -> Result<(), String> {
        let access = self.access();
        while self.copies[self.thread].len() - 1 > groups {
            for copy in self.copies[self.thread].pop_front().expect("a closed group") {
                self.shared.land_copy(access, copy.to, &copy.data)?;
            }
        }
        Ok(())
    }
}

/// What one warp is doing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Warp {
    Running,
    AtBarrier,
    Finished,
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
    let mut lanes: Vec<Thread> = (0..threads)
        .map(|_| {
            let stack = STACKS.with_borrow_mut(Vec::pop);
            let stack = stack.unwrap_or_else(|| DefaultStack::new(STACK_BYTES).expect("memory for a stack"));
            Coroutine::with_stack(stack, move |yielder: &Yielder<Reply, Stop>, _| {
                with_block(|block| {
                    let thread = block.thread;
                    block.yielders[thread] = yielder;
                });
                // SAFETY: the launch checked that the parameters are those of the kernel.
                unsafe { kernel(params) }
            })
        })
        .collect();
    let result = run_warps(&cell, &mut lanes, &mut random);
    CURRENT.set(outer);
    STACKS.with_borrow_mut(|stacks| {
        for mut lane in lanes {
            // SAFETY: kernels own nothing that would have to be dropped.
            unsafe { lane.force_reset() };
            stacks.push(lane.into_stack());
        }
    });
    result
}

fn run_warps(
    cell: &RefCell<Block<'_>>,
    lanes: &mut [Thread],
    random: &mut impl FnMut(usize) -> usize,
) -> Result<(), String> {
    let mut warps = vec![Warp::Running; lanes.len() / WARP];
    let mut replies = vec![Reply::default(); lanes.len()];
    loop {
        let running: Vec<usize> = (0..warps.len()).filter(|&warp| warps[warp] == Warp::Running).collect();
        if !running.is_empty() {
            let warp = running[random(running.len())];
            let range = warp * WARP..(warp + 1) * WARP;
            warps[warp] = run_warp(cell, warp, &mut lanes[range.clone()], &mut replies[range], random)?;
        } else if warps.iter().all(|&warp| warp == Warp::AtBarrier) {
            for time in &mut cell.borrow_mut().times {
                *time = Time { block: time.block + 1, warp: 0 };
            }
            let any = replies.iter().any(|reply| reply.flag);
            replies.iter_mut().for_each(|reply| reply.flag = any);
            warps.fill(Warp::Running);
        } else if warps.iter().all(|&warp| warp == Warp::Finished) {
            return Ok(());
        } else {
            let waiting = warps.iter().filter(|&&warp| warp == Warp::AtBarrier).count();
            return Err(format!("barrier: {waiting} of {} warps came, the others have ended", warps.len()));
        }
    }
}

/// Runs a warp to its next barrier of the block, or to its end.
fn run_warp(
    cell: &RefCell<Block<'_>>,
    warp: usize,
    lanes: &mut [Thread],
    replies: &mut [Reply],
    random: &mut impl FnMut(usize) -> usize,
) -> Result<Warp, String> {
    loop {
        let mut stops = [None; WARP];
        // Any rotation and any odd step visit each lane once.
        let (first, step) = (random(WARP), 2 * random(WARP / 2) + 1);
        for i in 0..WARP {
            let lane = (first + i * step) % WARP;
            cell.borrow_mut().thread = warp * WARP + lane;
            stops[lane] = match lanes[lane].resume(replies[lane]) {
                CoroutineResult::Yield(at) => Some(at),
                CoroutineResult::Return(()) => None,
            };
            if let Some(error) = cell.borrow_mut().error.take() {
                return Err(error);
            }
        }
        if stops.iter().all(Option::is_none) {
            return Ok(Warp::Finished);
        }
        let kind = |stop: &Option<Stop>| stop.as_ref().map(std::mem::discriminant);
        if let Some(lane) = (1..WARP).find(|&lane| kind(&stops[lane]) != kind(&stops[0])) {
            let name = |stop: Option<Stop>| stop.map_or("its end".into(), |stop| format!("{stop:?}"));
            return Err(format!(
                "barrier: warp {warp} diverges: lane 0 is at {}, lane {lane} at {}",
                name(stops[0]),
                name(stops[lane])
            ));
        }
        let stops = stops.map(|stop| stop.unwrap_or(Stop::Never));
        match stops[0] {
            Stop::BlockBarrier(_) => {
                let any = stops.iter().any(|stop| matches!(stop, Stop::BlockBarrier(true)));
                replies.iter_mut().for_each(|reply| reply.flag = any);
                return Ok(Warp::AtBarrier);
            }
            Stop::WarpBarrier => cell.borrow_mut().times[warp].warp += 1,
            Stop::AnyLane(_) => {
                let any = stops.iter().any(|stop| matches!(stop, Stop::AnyLane(true)));
                replies.iter_mut().for_each(|reply| reply.flag = any);
            }
            Stop::Shuffle { .. } => matrix::shuffle(&stops, replies),
            Stop::LoadMatrices { .. } => {
                let mut block = cell.borrow_mut();
                let time = block.times[warp];
                let access = |lane: usize| Access { thread: (warp * WARP + lane) as u32, time };
                matrix::load(&stops, |lane, row| {
                    let bytes = block.shared.read(access(lane), row, 16)?;
                    Ok(bytes.try_into().expect("16 bytes"))
                })?;
            }
            Stop::MultiplyAdd { .. } => matrix::multiply_add(&stops),
            Stop::Never => return Err(format!("barrier: warp {warp} was made to leave")),
        }
    }
}

impl<'a> Block<'a> {
    pub fn new(
        index: u32,
        regions: &'a Regions,
        shared_bytes: usize,
        threads: usize,
        fault: Option<Fault>,
    ) -> Self {
        Self {
            index,
            regions,
            shared: SharedMemory::new(shared_bytes),
            fault,
            thread: 0,
            yielders: vec![std::ptr::null(); threads],
            copies: (0..threads).map(|_| VecDeque::from([Vec::new()])).collect(),
            barriers: vec![0; threads],
            times: vec![Time::default(); threads / WARP],
            error: None,
        }
    }
}
