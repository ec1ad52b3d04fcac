//! Which warp of a block goes on when, and what happens where its lanes meet.

use super::block::{At, Block, Lane, Stop, WARP};
use super::matrix;
use super::wgmma::{Step, WARPS};
use corosensei::CoroutineResult;
use std::cell::RefCell;

/// What one warp is doing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Warp {
    Running,
    AtBarrier,
    Waiting(Wait),
    Finished,
}

/// What a warp waits for, other than the whole block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// Some lanes wait at mbarriers; none can go on.
    Lanes,
    Barrier(u32),
    Registers(u32),
    /// The groups of products before this one, which other warps have not all started.
    Products(u32),
}

type Random<'a> = &'a mut dyn FnMut(usize) -> usize;

/// Runs all warps to their ends. Copies to mbarriers land in between.
pub fn run_warps(cell: &RefCell<Block<'_>>, lanes: &mut [Lane], random: Random<'_>) -> Result<(), String> {
    let mut warps = vec![Warp::Running; lanes.len() / WARP];
    loop {
        let range = |warp: usize| warp * WARP..(warp + 1) * WARP;
        let running: Vec<usize> = (0..warps.len())
            .filter(|&warp| match warps[warp] {
                Warp::Running => true,
                Warp::Waiting(wait) => can_go(&cell.borrow(), warp, wait, &lanes[range(warp)]),
                Warp::AtBarrier | Warp::Finished => false,
            })
            .collect();
        let flights = cell.borrow().flights();
        let finished = warps.iter().all(|&warp| warp == Warp::Finished);
        if finished && flights > 0 {
            return Err("mbarrier: the block ends before all copies have landed".into());
        } else if finished {
            return cell.borrow().check_end();
        } else if running.len() + flights > 0 {
            let at = random(running.len() + flights);
            let Some(&warp) = running.get(at) else {
                cell.borrow_mut().land(at - running.len())?;
                continue;
            };
            let lanes = &mut lanes[range(warp)];
            if let Warp::Waiting(wait) = warps[warp] {
                go_on(&mut cell.borrow_mut(), warp, wait, lanes)?;
            }
            warps[warp] = run_warp(cell, warp, lanes, random)?;
        } else if warps.iter().all(|&warp| warp == Warp::AtBarrier) {
            cell.borrow_mut().clocks.sync_block();
            let any = lanes.iter().any(|lane| lane.reply.flag);
            lanes.iter_mut().for_each(|lane| lane.reply.flag = any);
            warps.fill(Warp::Running);
        } else {
            return Err(deadlock(&cell.borrow(), &warps, lanes));
        }
    }
}

fn can_go(block: &Block<'_>, warp: usize, wait: Wait, lanes: &[Lane]) -> bool {
    match wait {
        Wait::Lanes => lanes.iter().any(|lane| match lane.at {
            At::Stopped(Stop::Mbarrier { address, parity }) => block.mbarriers.would_pass(address, parity),
            _ => false,
        }),
        Wait::Barrier(id) => !block.named.is_waiting(warp, id),
        Wait::Registers(registers) => block.registers.has_room(warp, registers),
        Wait::Products(target) => block.groups[warp / WARPS].is_complete(target),
    }
}

/// Ends a wait that can go on.
fn go_on(block: &mut Block<'_>, warp: usize, wait: Wait, lanes: &mut [Lane]) -> Result<(), String> {
    match wait {
        // Each lane sees to itself.
        Wait::Lanes => return Ok(()),
        Wait::Barrier(_) => {}
        Wait::Registers(registers) => block.registers.set(warp, registers),
        Wait::Products(target) => {
            let Block { groups, clocks, shared, .. } = block;
            groups[warp / WARPS].finish(clocks, shared, warp * WARP, target)?;
        }
    }
    lanes.iter_mut().for_each(|lane| lane.at = At::Ready);
    Ok(())
}

/// Nobody can go on: who waits for what.
fn deadlock(block: &Block<'_>, warps: &[Warp], lanes: &[Lane]) -> String {
    let mut waits = Vec::new();
    for (warp, state) in warps.iter().enumerate() {
        let Warp::Waiting(wait) = *state else { continue };
        let what = match wait {
            Wait::Lanes => {
                let first = (warp * WARP..(warp + 1) * WARP).find_map(|thread| match lanes[thread].at {
                    At::Stopped(Stop::Mbarrier { address, parity }) => Some((thread, address, parity)),
                    _ => None,
                });
                let (thread, address, parity) = first.expect("a lane at an mbarrier");
                waits.push(format!("thread {thread} at {}", block.mbarriers.describe(address, parity)));
                continue;
            }
            Wait::Barrier(id) => block.named.describe(id),
            Wait::Registers(registers) => block.registers.describe(registers),
            Wait::Products(_) => {
                "wgmma.wait_group, for products that not all warps of the group started".into()
            }
        };
        waits.push(format!("warp {warp} at {what}"));
    }
    let came = warps.iter().filter(|&&warp| warp == Warp::AtBarrier).count();
    let came = format!("barrier: {came} of {} warps came", warps.len());
    if waits.is_empty() {
        came + ", the others have ended"
    } else {
        format!("deadlock: {}; {came}", waits.join("; "))
    }
}

/// Runs a warp until it has to wait, ends, or makes way for others.
fn run_warp(
    cell: &RefCell<Block<'_>>,
    warp: usize,
    lanes: &mut [Lane],
    random: Random<'_>,
) -> Result<Warp, String> {
    loop {
        // Any rotation and any odd step visit each lane once.
        let (first, step) = (random(WARP), 2 * random(WARP / 2) + 1);
        for i in 0..WARP {
            let at = (first + i * step) % WARP;
            let lane = &mut lanes[at];
            if !matches!(lane.at, At::Ready) {
                continue;
            }
            cell.borrow_mut().thread = warp * WARP + at;
            lane.at = match lane.thread.resume(lane.reply) {
                CoroutineResult::Yield(stop) => At::Stopped(stop),
                CoroutineResult::Return(()) => At::Ended,
            };
            if let Some(error) = cell.borrow_mut().error.take() {
                return Err(error);
            }
        }
        let (mut waiting, mut passed) = (false, false);
        for (at, lane) in lanes.iter_mut().enumerate() {
            if let At::Stopped(Stop::Mbarrier { address, parity }) = lane.at {
                let Block { mbarriers, clocks, .. } = &mut *cell.borrow_mut();
                if mbarriers.has_passed(clocks, warp * WARP + at, address, parity)? {
                    (lane.at, passed) = (At::Ready, true);
                } else {
                    waiting = true;
                }
            }
        }
        // Another warp may be as ready: its turn comes at random.
        if passed && random(2) == 0 {
            return Ok(Warp::Running);
        } else if passed {
            continue;
        } else if waiting {
            return Ok(Warp::Waiting(Wait::Lanes));
        }
        if let Some(state) = meet(&mut cell.borrow_mut(), warp, lanes)? {
            return Ok(state);
        }
    }
}

/// All lanes have stopped, none of them at an mbarrier: what they do together, and, if the warp
/// does not go on, what it does then.
fn meet(block: &mut Block<'_>, warp: usize, lanes: &mut [Lane]) -> Result<Option<Warp>, String> {
    if lanes.iter().all(|lane| matches!(lane.at, At::Ended)) {
        block.groups[warp / WARPS].check_end(warp % WARPS)?;
        return Ok(Some(Warp::Finished));
    }
    let name = |at: At| match at {
        At::Stopped(stop) => format!("{stop:?}"),
        At::Ready | At::Ended => "its end".into(),
    };
    let kind = |at: At| match at {
        At::Stopped(stop) => Some(std::mem::discriminant(&stop)),
        At::Ready | At::Ended => None,
    };
    if let Some(lane) = (1..WARP).find(|&lane| kind(lanes[lane].at) != kind(lanes[0].at)) {
        let (first, other) = (name(lanes[0].at), name(lanes[lane].at));
        return Err(format!("barrier: warp {warp} diverges: lane 0 is at {first}, lane {lane} at {other}"));
    }
    let stops: [Stop; WARP] = std::array::from_fn(|lane| match lanes[lane].at {
        At::Stopped(stop) => stop,
        At::Ready | At::Ended => Stop::Never,
    });
    lanes.iter_mut().for_each(|lane| lane.at = At::Ready);
    let mut reply_any = |any: bool| lanes.iter_mut().for_each(|lane| lane.reply.flag = any);
    match stops[0] {
        Stop::BlockBarrier(_) => {
            reply_any(stops.contains(&Stop::BlockBarrier(true)));
            return Ok(Some(Warp::AtBarrier));
        }
        Stop::WarpBarrier => block.clocks.sync_warp(warp),
        Stop::AnyLane(_) => reply_any(stops.contains(&Stop::AnyLane(true))),
        Stop::Shuffle { .. } => matrix::shuffle(&stops, lanes),
        Stop::LoadMatrices { .. } => {
            let Block { shared, clocks, .. } = block;
            matrix::load(&stops, |lane, row| {
                let bytes = shared.read(clocks, warp * WARP + lane, row, 16)?;
                Ok(bytes.try_into().expect("16 bytes"))
            })?;
        }
        Stop::MultiplyAdd { .. } => matrix::multiply_add(&stops),
        Stop::Mbarrier { .. } | Stop::Never => {
            return Err(format!("barrier: warp {warp} was made to leave"));
        }
        _ => {
            let state = meet_others(block, warp, &stops)?;
            if let Some(Warp::Waiting(wait)) = state {
                // Whoever waits is told by `go_on`.
                let at = At::Stopped(stops[0]);
                lanes.iter_mut().for_each(|lane| lane.at = at);
                if can_go(block, warp, wait, lanes) {
                    go_on(block, warp, wait, lanes)?;
                    return Ok(None);
                }
            }
            return Ok(state);
        }
    }
    Ok(None)
}

/// The same where warps meet other warps.
fn meet_others(block: &mut Block<'_>, warp: usize, stops: &[Stop; WARP]) -> Result<Option<Warp>, String> {
    let Block { groups, clocks, shared, named, registers: pool, .. } = block;
    let (group, of_group) = (&mut groups[warp / WARPS], warp % WARPS);
    let alike = stops.iter().all(|stop| *stop == stops[0]);
    match stops[0] {
        Stop::Wgmma(_) => {
            let products = stops.map(|stop| match stop {
                // SAFETY: the lane waits in the hook that has it on its stack.
                Stop::Wgmma(product) => unsafe { *product },
                _ => unreachable!("all are at a product"),
            });
            group.start(clocks, shared, warp * WARP, products)?;
            Ok(None)
        }
        _ if !alike => Err(format!("barrier: lanes of warp {warp} differ at {:?}", stops[0])),
        Stop::NamedBarrier { id, threads, waits } => {
            named.arrive(clocks, warp, id, threads, waits)?;
            Ok(waits.then_some(Warp::Waiting(Wait::Barrier(id))))
        }
        Stop::Registers { registers, more } => {
            pool.check(warp, registers, more)?;
            group.step(of_group, Step::Registers(registers))?;
            Ok(Some(Warp::Waiting(Wait::Registers(registers))))
        }
        Stop::WgmmaFence => group.fence(of_group).map(|()| None),
        Stop::WgmmaCommit => group.commit(of_group).map(|()| None),
        Stop::WgmmaWait(n) => {
            group.step(of_group, Step::Wait(n))?;
            Ok(Some(Warp::Waiting(Wait::Products(group.target(of_group, n)))))
        }
        stop => unreachable!("{stop:?} is met elsewhere"),
    }
}
