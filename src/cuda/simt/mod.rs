//! The SIMT emulator: the kernels of `cuda/`, compiled as C++, one coroutine per CUDA thread.
//!
//! A test instrument. It runs every kernel where there is no GPU, slowly, and finds what a GPU
//! would let pass: reads of shared memory that nothing was written to, that another thread wrote
//! without a barrier between, or whose asynchronous copy was not waited for; accesses outside of
//! shared memory or of any allocation, or not aligned; rows of a matrix in the same bank; barriers
//! that not all threads reach. Warps and their lanes run in a seeded random order.
//!
//! Of Hopper it knows mbarriers, copies of boxes, products of warp groups, named barriers and
//! registers that warps hand over. It finds what no arrival or fence orders, operands written and
//! accumulators left before products were waited for, phases that get too much, and waits that
//! never end.
//!
//! [`Fault`] plants such a bug into a kernel as it runs, to prove that it would be found.

mod block;
mod clock;
mod descriptor;
mod global;
mod hooks;
mod hopper;
mod matrix;
mod mbarrier;
mod run;
mod shared;
mod tensor;
mod warps;
mod wgmma;

use super::device::{Device, Launch, Properties, Span, SpanMut};
use crate::{Error, Result};
use block::{Block, Kernel, WARP};
use global::Regions;
use rayon::prelude::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
pub use tensor::{TensorMap, Tiling};

include!(concat!(env!("OUT_DIR"), "/simt_kernels.rs"));

/// How often each kernel of a plan was launched.
static LAUNCHES: [AtomicU64; KERNELS.len()] = [const { AtomicU64::new(0) }; KERNELS.len()];

/// Names of all kernels of plans, and how often each was launched in this process.
pub fn launches() -> impl Iterator<Item = (&'static str, u64)> {
    KERNELS.iter().zip(&LAUNCHES).map(|(&(name, _), launches)| (name, launches.load(Ordering::Relaxed)))
}

/// A bug planted into running kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// Every thread passes its n-th barrier of the block as if it were not there.
    SkipBarrier(u32),
    /// Every thread passes the barriers of its warp as if they were not there.
    SkipWarpBarriers,
    /// Waits for asynchronous copies leave one group more under way.
    WaitForFewer,
    /// A thread ends instead of coming to its n-th barrier of the block.
    Leave {
        /// Of the block.
        thread: u32,
        /// Counted from 0.
        barrier: u32,
    },
    /// The block has this many bytes of shared memory less than was asked for.
    LessShared(u32),
    /// Every thread passes its n-th arrival at an mbarrier as if it were not there.
    SkipArrival(u32),
    /// Every thread arrives twice where it is its n-th arrival at an mbarrier.
    ArriveTwice(u32),
    /// Every thread's n-th wait at an mbarrier is for the other parity.
    OtherParity(u32),
    /// Phases of mbarriers expect so many bytes less than the kernel says.
    ExpectFewer(u32),
    /// Boxes of tensors lack their last rows.
    ShortBoxes,
    /// Boxes of tensors are not swizzled.
    UnswizzledBoxes,
    /// There is no fence between shared memory and asynchronous units.
    SkipProxyFences,
    /// There is no fence between registers and products of warp groups.
    SkipWgmmaFences,
    /// Waits for products of warp groups leave one group more under way.
    WaitForFewerProducts,
    /// The last warp of each group of four keeps its registers.
    KeepRegisters,
    /// Warps ask for so many registers more than the kernel says.
    MoreRegisters(u32),
    /// Named barriers are for so many threads more than the kernel says.
    MoreAtBarriers(u32),
}

/// The emulator as a device.
#[derive(Clone, Debug, Default)]
pub struct Simt {
    regions: Arc<RwLock<Regions>>,
    seed: u64,
    fault: Option<Fault>,
    hopper: bool,
}

/// Memory of a [`Simt`] device.
#[derive(Debug)]
pub struct Buffer<T: Copy> {
    data: Vec<T>,
    /// Where the first element stands, such that its address is a multiple of 256 as on a GPU.
    start: usize,
    len: usize,
    regions: Arc<RwLock<Regions>>,
}

/// Alignment of allocations, as a GPU's driver gives.
const ALIGNMENT: usize = 256;

impl Simt {
    /// A device whose warps and lanes run in an order drawn from `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// The same memory, of a device on which plans take the kernels for Hopper GPUs. (Both run all
    /// kernels.)
    pub fn with_hopper(&self) -> Self {
        Self { hopper: true, ..self.clone() }
    }

    /// The same memory, with a bug planted into every kernel.
    pub fn with_fault(&self, fault: Fault) -> Self {
        Self { fault: Some(fault), ..self.clone() }
    }

    /// Memory that holds `data`.
    pub fn buffer<T: Copy>(&self, data: &[T]) -> Buffer<T> {
        let mut buffer: Vec<T> = Vec::with_capacity(data.len() + ALIGNMENT / size_of::<T>());
        if let Some(&first) = data.first() {
            buffer.resize(aligned_start(&buffer), first);
            buffer.extend_from_slice(data);
        }
        self.adopt(buffer)
    }

    /// Memory that is `data` itself, without a copy, from its first element at a multiple of 256
    /// bytes on.
    pub fn adopt<T: Copy>(&self, data: Vec<T>) -> Buffer<T> {
        let start = aligned_start(&data);
        let len = data.len().saturating_sub(start);
        let buffer = Buffer { data, start, len, regions: self.regions.clone() };
        if len > 0 {
            let slice = buffer.as_slice();
            let mut regions = self.regions.write().unwrap_or_else(|e| e.into_inner());
            regions.add(slice.as_ptr().addr(), size_of_val(slice));
        }
        buffer
    }
}

/// The first element whose address is a multiple of [`ALIGNMENT`].
fn aligned_start<T>(data: &[T]) -> usize {
    let past = data.as_ptr().addr() % ALIGNMENT;
    (ALIGNMENT - past) % ALIGNMENT / size_of::<T>()
}

impl<T: Copy> Buffer<T> {
    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        self.data.get(self.start..).unwrap_or(&[])
    }

    /// The elements, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        self.data.get_mut(self.start..).unwrap_or(&mut [])
    }

    /// For a kernel to read.
    pub fn span(&self) -> Span<'_, Simt, T> {
        Span::guarded(self.as_slice().as_ptr().expose_provenance() as u64, self.len, &(), ())
    }

    /// For a kernel to write.
    pub fn span_mut(&mut self) -> SpanMut<'_, Simt, T> {
        SpanMut::guarded(self.as_mut_slice().as_mut_ptr().expose_provenance() as u64, self.len, &(), ())
    }
}

impl<T: Copy> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            let address = self.as_slice().as_ptr().addr();
            self.regions.write().unwrap_or_else(|e| e.into_inner()).remove(address);
        }
    }
}

impl Device for Simt {
    type Stream = ();
    type Guard<'a> = ();
    type Memory = Buffer<u8>;
    type Pinned = Vec<u8>;
    /// Work is done when it is asked for, so that every event has passed.
    type Event = ();

    /// Of a device so small that plans split keys already for small shapes.
    fn properties(&self) -> Properties {
        if self.hopper {
            return Properties::new(8, 228 * 1024, 1024 * 1024).with_hopper();
        }
        Properties::new(8, 100 * 1024, 1024 * 1024)
    }

    fn stream_id((): &()) -> [u64; 2] {
        [0; 2]
    }

    fn is_capturing((): &()) -> Result<bool> {
        Ok(false)
    }

    unsafe fn launch(&self, (): &(), launch: &Launch<'_>) -> Result<()> {
        let failed = |reason| Error::Kernel { kernel: launch.kernel.into(), reason };
        let mut kernels = KERNELS.iter().chain(PROBES).enumerate();
        let Some((at, &(_, kernel))) = kernels.find(|(_, (name, _))| *name == launch.kernel) else {
            return Err(Error::value("kernel", "one that was built", launch.kernel));
        };
        if let Some(launches) = LAUNCHES.get(at) {
            launches.fetch_add(1, Ordering::Relaxed);
        }
        let threads = launch.threads as usize;
        if !threads.is_multiple_of(WARP) {
            return Err(failed(format!("{threads} threads are no whole warps")));
        }
        let regions = self.regions.read().unwrap_or_else(|e| e.into_inner()).clone();
        let less = if let Some(Fault::LessShared(bytes)) = self.fault { bytes } else { 0 };
        (0..launch.blocks).into_par_iter().try_for_each(|index| {
            let shared_bytes = launch.shared_bytes.saturating_sub(less) as usize;
            let block = Block::new(index, &regions, shared_bytes, threads, self.fault);
            let mut random = SplitMix64(self.seed ^ u64::from(index) << 32);
            block::run(kernel, launch.params, threads, block, |end| (random.next() % end as u64) as usize)
                .map_err(|reason| failed(format!("block {index}: {reason}")))
        })
    }

    unsafe fn upload(&self, (): &(), to: u64, bytes: &[u8]) -> Result<()> {
        let to = std::ptr::with_exposed_provenance_mut::<u8>(to as usize);
        // SAFETY: the caller's promise.
        unsafe { bytes.as_ptr().copy_to_nonoverlapping(to, bytes.len()) };
        Ok(())
    }

    unsafe fn download(&self, (): &(), from: u64, bytes: &mut [u8]) -> Result<()> {
        let from = std::ptr::with_exposed_provenance::<u8>(from as usize);
        // SAFETY: the caller's promise.
        unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn allocate(&self, (): &(), bytes: usize) -> Result<Buffer<u8>> {
        // Room for the alignment of the first byte, too.
        if Vec::<u8>::new().try_reserve_exact(bytes.saturating_add(ALIGNMENT)).is_err() {
            return Err(Error::value("bytes", "a size that memory has room for", bytes));
        }
        Ok(self.buffer(&vec![0; bytes]))
    }

    fn address(memory: &Buffer<u8>) -> u64 {
        memory.as_slice().as_ptr().expose_provenance() as u64
    }

    fn pinned(&self, bytes: usize) -> Result<Vec<u8>> {
        let mut memory = Vec::new();
        let room = memory.try_reserve_exact(bytes);
        room.map_err(|_| Error::value("bytes", "a size that memory has room for", bytes))?;
        memory.resize(bytes, 0);
        Ok(memory)
    }

    fn event(&self) -> Result<()> {
        Ok(())
    }

    unsafe fn upload_pinned(&self, stream: &(), to: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.upload(stream, to, bytes) }
    }

    fn record((): &(), (): &()) -> Result<()> {
        Ok(())
    }

    fn has_passed((): &()) -> Result<bool> {
        Ok(true)
    }

    fn wait((): &()) -> Result<()> {
        Ok(())
    }
}

/// Sebastiano Vigna's generator: short, and good enough for orders.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
