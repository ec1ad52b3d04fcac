//! What a measurement needs of a device.

use crate::backend::{Backend, Plain};
use crate::measure::Effort;
use star_attention::Result;
use star_attention::cuda::simt::Simt;
use std::time::Instant;

/// A device to measure on.
pub trait Bench: Backend + Sized {
    /// How thoroughly a row is measured.
    const EFFORT: Effort;

    /// The first device of this machine.
    ///
    /// # Errors
    /// [`Unavailable`](star_attention::Error::Unavailable) if there is none; errors of the driver.
    fn first() -> Result<Self>;

    /// As `NVIDIA H200`.
    fn name(&self) -> Result<String>;

    /// Memory of `len` elements of any value, without a copy from CPU memory.
    fn empty<T: Plain>(&self, len: usize) -> Result<Self::Memory<T>>;

    /// Copies `from` to `to`, which has as many elements.
    fn copy<T: Plain>(&self, from: &Self::Memory<T>, to: &mut Self::Memory<T>) -> Result<()>;

    /// Memory of `len` elements that repeats `period`, of which only one copy comes from CPU
    /// memory.
    fn repeat<T: Plain>(&self, period: &[T], len: usize) -> Result<Self::Memory<T>>;

    /// Milliseconds that the device takes for the work asked for by `work`.
    fn ms(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64>;
}

/// The emulator as a device, for rehearsals.
impl Bench for Simt {
    const EFFORT: Effort = Effort::ONCE;

    fn first() -> Result<Self> {
        Ok(Self::new(0))
    }

    fn name(&self) -> Result<String> {
        Ok("the SIMT emulator".into())
    }

    fn empty<T: Plain>(&self, len: usize) -> Result<Self::Memory<T>> {
        Ok(self.buffer(&vec![T::default(); len]))
    }

    fn copy<T: Plain>(&self, from: &Self::Memory<T>, to: &mut Self::Memory<T>) -> Result<()> {
        to.as_mut_slice().copy_from_slice(from.as_slice());
        Ok(())
    }

    fn repeat<T: Plain>(&self, period: &[T], len: usize) -> Result<Self::Memory<T>> {
        Ok(self.buffer(&period.iter().copied().cycle().take(len).collect::<Vec<T>>()))
    }

    fn ms(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use crate::backend::Gpu;
    use cudarc::driver::sys::CUevent_flags;
    use cudarc::driver::{DriverError, result};
    use star_attention::Error;
    use star_attention::cuda::driver::Driver;
    use std::sync::Arc;

    fn driver(operation: &'static str) -> impl Fn(DriverError) -> Error {
        move |source| Error::Driver { operation, source }
    }

    impl Gpu {
        /// # Safety
        /// Both are memory of this GPU of so many bytes, and do not overlap.
        unsafe fn copy_bytes(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
            // SAFETY: the caller's promise; the stream orders the copy.
            unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream().cu_stream()) }
                .map_err(driver("copy on the device"))
        }
    }

    impl Bench for Gpu {
        const EFFORT: Effort = Effort::GPU;

        fn first() -> Result<Self> {
            Self::new(Arc::new(Driver::open(0)?))
        }

        fn name(&self) -> Result<String> {
            self.device().name()
        }

        fn empty<T: Plain>(&self, len: usize) -> Result<Self::Memory<T>> {
            self.uninitialised(len).map_err(driver("allocate"))
        }

        fn copy<T: Plain>(&self, from: &Self::Memory<T>, to: &mut Self::Memory<T>) -> Result<()> {
            let (from, to) = (self.span(from), self.span_mut(to));
            let bytes = from.len().min(to.len()) * size_of::<T>();
            // SAFETY: two pieces of memory that are at least as long.
            unsafe { self.copy_bytes(from.address(), to.address(), bytes) }
        }

        fn repeat<T: Plain>(&self, period: &[T], len: usize) -> Result<Self::Memory<T>> {
            let first = self.memory(&period[..period.len().min(len)]);
            let mut memory = self.empty::<T>(len)?;
            let address = self.span_mut(&mut memory).address();
            let from = self.span(&first);
            let bytes = |elements: usize| elements * size_of::<T>();
            let mut filled = from.len();
            // SAFETY: `filled` elements of `memory` are filled from its start, and those after them
            // up to `len` are written next.
            unsafe { self.copy_bytes(from.address(), address, bytes(filled))? };
            while filled < len {
                let next = filled.min(len - filled);
                // SAFETY: as above.
                unsafe { self.copy_bytes(address, address + bytes(filled) as u64, bytes(next))? };
                filled += next;
            }
            Ok(memory)
        }

        fn ms(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
            let event = || {
                let event = self.stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
                event.map_err(driver("record an event"))
            };
            let start = event()?;
            work()?;
            let end = event()?;
            start.elapsed_ms(&end).map(f64::from).map_err(driver("wait for an event"))
        }
    }
}
