//! The products of warp groups (`wgmma`): started by four warps, done at the latest when they are
//! waited for.
//!
//! Until its warp has waited, an accumulator is poison, and the memory and registers of the
//! operands are as good as lent. A group of products is computed when the first of the four warps
//! waits for it, from what memory then holds: a wait of one warp speaks for all four.

use super::block::WARP;
use super::clock::{Access, Clocks};
use super::descriptor::Descriptor;
use super::matrix::unpack;
use super::shared::SharedMemory;
use std::collections::VecDeque;

/// Warps of a group, with 16 rows each.
pub const WARPS: usize = 4;
const ROWS: usize = 16;
/// The depth of a product.
const DEPTH: usize = 16;
/// What accumulators hold while they are under way: a NaN that no arithmetic gives.
const POISON: f32 = f32::from_bits(0x7fc5_a5a5);

/// What all lanes say alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    pub columns: u32,
    /// `None`: A is in registers.
    pub a: Option<u64>,
    pub b: u64,
    /// Whether columns of B are contiguous, not its rows.
    pub b_transposed: bool,
    pub accumulate: bool,
    pub bf16: bool,
}

/// What a lane says. The pointers go to its stack.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub d: *mut f32,
    pub a: *const [u32; 4],
    pub form: Form,
}

/// What the warps of a group must do alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Fence,
    Product(Form),
    Commit,
    Wait(u32),
    Registers(u32),
}

/// A started product of a warp.
struct Started {
    form: Form,
    lanes: [Product; WARP],
    /// A's registers as they were.
    a: Option<[[u32; 4]; WARP]>,
}

/// An accumulator of products under way.
struct Accumulator {
    lanes: [*mut f32; WARP],
    /// Row by row.
    values: Vec<f32>,
    products: usize,
}

#[derive(Default)]
struct Warp {
    fenced: bool,
    steps: usize,
    open: Vec<Started>,
    /// Committed groups that were not waited for, and how many of these were computed.
    groups: VecDeque<Vec<Started>>,
    computed: usize,
    committed: u32,
    accumulators: Vec<Accumulator>,
}

/// Four warps and the products that they have under way.
pub struct WarpGroup {
    actor: u32,
    warps: [Warp; WARPS],
    /// The steps that not all warps have taken, and how many all have.
    steps: VecDeque<Step>,
    taken: usize,
}

/// Of a lane's accumulators, the row and the column of number `i`: 16×8 fragments side by side.
fn place(lane: usize, i: usize) -> (usize, usize) {
    (lane / 4 + i % 4 / 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2)
}

impl Accumulator {
    /// Takes the values of the lanes' registers and leaves poison.
    fn take(lanes: [*mut f32; WARP], columns: usize) -> Self {
        let mut values = vec![0.0; ROWS * columns];
        for (lane, &d) in lanes.iter().enumerate() {
            for i in 0..columns / 2 {
                let (row, column) = place(lane, i);
                // SAFETY: each lane has columns / 2 accumulators on its stack, and is stopped.
                values[row * columns + column] = unsafe { d.add(i).replace(POISON) };
            }
        }
        Self { lanes, values, products: 0 }
    }

    fn give_back(&self) -> Result<(), String> {
        let columns = self.values.len() / ROWS;
        for (lane, &d) in self.lanes.iter().enumerate() {
            for i in 0..columns / 2 {
                let (row, column) = place(lane, i);
                // SAFETY: as when they were taken; a thread that waits has not left the function
                // whose variables they are.
                let before = unsafe { d.add(i).replace(self.values[row * columns + column]) };
                if before.to_bits() != POISON.to_bits() {
                    return Err("accumulators were written before wgmma.wait_group".into());
                }
            }
        }
        Ok(())
    }
}

impl Started {
    /// A's rows of the warp, in f32.
    fn rows(&self, shared: &SharedMemory, warp: usize) -> Result<Vec<f32>, String> {
        if let Some(a) = self.form.a {
            let rows = (warp * ROWS, (warp + 1) * ROWS);
            return Ok(Descriptor::new(a, false)?.matrix(shared, rows.0..rows.1, self.form.bf16));
        }
        let mut rows = vec![0.0; ROWS * DEPTH];
        for (lane, words) in self.a.iter().flatten().enumerate() {
            for (i, pair) in unpack::<4, 8>(*words, self.form.bf16).as_chunks::<2>().0.iter().enumerate() {
                let at = (lane / 4 + i % 2 * 8) * DEPTH + lane % 4 * 2 + i / 2 * 8;
                rows[at..at + 2].copy_from_slice(pair);
            }
        }
        Ok(rows)
    }

    fn compute(&self, to: &mut Accumulator, shared: &SharedMemory, warp: usize) -> Result<(), String> {
        let Form { columns, b, b_transposed, accumulate, bf16, .. } = self.form;
        let columns = columns as usize;
        let a = self.rows(shared, warp)?;
        let b = Descriptor::new(b, b_transposed)?.matrix(shared, 0..columns, bf16);
        let mut b_rows = vec![0.0; b.len()];
        for (i, &x) in b.iter().enumerate() {
            b_rows[i % DEPTH * columns + i / DEPTH] = x;
        }
        for (d, a) in to.values.chunks_mut(columns).zip(a.chunks(DEPTH)) {
            if !accumulate {
                d.fill(0.0);
            }
            for (&x, b) in a.iter().zip(b_rows.chunks(columns)) {
                d.iter_mut().zip(b).for_each(|(d, &y)| *d += x * y);
            }
        }
        Ok(())
    }
}

impl WarpGroup {
    pub fn new(actor: u32) -> Self {
        Self { actor, warps: Default::default(), steps: VecDeque::new(), taken: 0 }
    }

    /// A warp takes a step: the same as the others before it.
    pub fn step(&mut self, warp: usize, step: Step) -> Result<(), String> {
        let at = self.warps[warp].steps - self.taken;
        match self.steps.get(at) {
            None => self.steps.push_back(step),
            Some(&other) if other == step => {}
            Some(other) => {
                return Err(format!("wgmma: unequal warps of a group: {step:?} and {other:?}"));
            }
        }
        self.warps[warp].steps += 1;
        if self.warps.iter().all(|warp| warp.steps > self.taken) {
            self.steps.pop_front();
            self.taken += 1;
        }
        Ok(())
    }

    pub fn fence(&mut self, warp: usize) -> Result<(), String> {
        self.warps[warp].fenced = true;
        self.step(warp, Step::Fence)
    }

    /// A warp starts a product. The last of its lanes speaks for what the warp knows: one that
    /// waited alone is the first.
    pub fn start(
        &mut self,
        clocks: &Clocks,
        shared: &mut SharedMemory,
        first_thread: usize,
        lanes: [Product; WARP],
    ) -> Result<(), String> {
        let warp = first_thread / WARP % WARPS;
        let form = lanes[0].form;
        if lanes.iter().any(|lane| lane.form != form) {
            return Err("wgmma: lanes differ".into());
        }
        self.step(warp, Step::Product(form))?;
        let state = &mut self.warps[warp];
        if !state.fenced {
            return Err("wgmma: no wgmma.fence before the first of a group of products".into());
        }
        let group = Access { actor: self.actor, count: state.committed };
        let thread = first_thread + WARP - 1;
        let mut chunks = Descriptor::new(form.b, form.b_transposed)?.chunks(0..form.columns as usize);
        if let Some(a) = form.a {
            chunks.extend(Descriptor::new(a, false)?.chunks(warp * ROWS..(warp + 1) * ROWS));
        }
        for address in chunks {
            shared.start_products(clocks, thread, group, address, 16)?;
        }
        let d = lanes.map(|lane| lane.d);
        if !state.accumulators.iter().any(|accumulator| accumulator.lanes == d) {
            state.accumulators.push(Accumulator::take(d, form.columns as usize));
        }
        let accumulator = state.accumulators.iter_mut().find(|accumulator| accumulator.lanes == d);
        accumulator.expect("there is one now").products += 1;
        // SAFETY: each lane has its fragment on its stack, and is stopped.
        let a = form.a.is_none().then(|| lanes.map(|lane| unsafe { *lane.a }));
        state.open.push(Started { form, lanes, a });
        Ok(())
    }

    /// Each group of products has a fence of its own.
    pub fn commit(&mut self, warp: usize) -> Result<(), String> {
        self.step(warp, Step::Commit)?;
        let warp = &mut self.warps[warp];
        warp.groups.push_back(std::mem::take(&mut warp.open));
        warp.committed += 1;
        warp.fenced = false;
        Ok(())
    }

    /// The groups that a warp's wait for all but the last `n` is for: those before this one.
    pub fn target(&self, warp: usize, n: u32) -> u32 {
        self.warps[warp].committed.saturating_sub(n)
    }

    /// Whether all four warps have started them.
    pub fn is_complete(&self, target: u32) -> bool {
        self.warps.iter().all(|warp| warp.committed >= target)
    }

    /// A warp has waited for the groups before `target`, which are complete.
    pub fn finish(
        &mut self,
        clocks: &mut Clocks,
        shared: &SharedMemory,
        first_thread: usize,
        target: u32,
    ) -> Result<(), String> {
        for (i, warp) in self.warps.iter_mut().enumerate() {
            let waited = warp.committed - warp.groups.len() as u32;
            while waited + (warp.computed as u32) < target {
                for product in &warp.groups[warp.computed] {
                    let d = product.lanes.map(|lane| lane.d);
                    let to = warp.accumulators.iter_mut().find(|accumulator| accumulator.lanes == d);
                    product.compute(to.expect("kept while it is used"), shared, i)?;
                }
                warp.computed += 1;
            }
        }
        let warp = &mut self.warps[first_thread / WARP % WARPS];
        while warp.committed - (warp.groups.len() as u32) < target {
            warp.computed -= 1;
            for product in warp.groups.pop_front().expect("as many as were committed") {
                // SAFETY: as when it was started; a thread that waits has not left the function
                // whose variables they are.
                let same = |(lane, a): (&Product, &[u32; 4])| unsafe { *lane.a == *a };
                if !product.a.iter().all(|a| product.lanes.iter().zip(a).all(same)) {
                    return Err("wgmma: A's registers were written before wgmma.wait_group".into());
                }
                let d = product.lanes.map(|lane| lane.d);
                let at = warp.accumulators.iter().position(|accumulator| accumulator.lanes == d);
                let at = at.expect("kept while it is used");
                warp.accumulators[at].products -= 1;
                if warp.accumulators[at].products == 0 {
                    warp.accumulators.swap_remove(at).give_back()?;
                }
            }
        }
        clocks.learn(first_thread / WARP, self.actor, target);
        Ok(())
    }

    /// What a warp may not leave behind when it ends.
    pub fn check_end(&self, warp: usize) -> Result<(), String> {
        let warp = &self.warps[warp];
        if warp.groups.iter().any(|group| !group.is_empty()) || !warp.open.is_empty() {
            return Err("wgmma: a warp ends without waiting for its products".into());
        }
        Ok(())
    }

    /// All warps have ended, after as many steps each.
    pub fn check_steps(&self) -> Result<(), String> {
        match self.steps.front() {
            None => Ok(()),
            Some(step) => Err(format!("wgmma: unequal warps of a group: not all come to {step:?}")),
        }
    }
}
