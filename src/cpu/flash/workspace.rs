//! Memory that the caller lends to a call, and how threads take it as f32.

use crate::{Error, Result};
use std::mem::MaybeUninit;

/// Where each thread's part begins: at a cache line, in bytes.
pub(super) const ALIGNMENT: usize = 64;

/// Memory that a call may write to: of any alignment, initialised or not. A call writes it as it
/// likes and leaves nothing of meaning in it.
///
/// ```
/// # use star_attention::cpu::flash::Workspace;
/// // Without a write to the memory, and without a length to keep:
/// let mut memory: Vec<u8> = Vec::with_capacity(4096);
/// assert!(Workspace::from(&mut memory).bytes() >= 4096);
/// ```
#[derive(Debug)]
pub struct Workspace<'a> {
    // Only initialised values are written to it, since it may be the memory of a `&mut [u8]`.
    memory: &'a mut [MaybeUninit<u8>],
}

impl<'a> Workspace<'a> {
    /// How many bytes there are.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// `len` f32, the first at a cache line.
    ///
    /// # Errors
    /// [`Error::Workspace`] if the memory is smaller than [`bytes_for`] `len`.
    pub(super) fn take(self, len: usize) -> Result<&'a mut [MaybeUninit<f32>]> {
        let (expected, got) = (bytes_for(len), self.bytes());
        if got < expected {
            return Err(Error::Workspace { expected, got });
        }
        let start = self.memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        let memory = &mut self.memory[start..][..len * size_of::<f32>()];
        // SAFETY: the memory holds `len` f32, aligned and borrowed for 'a, and any bytes are a
        // `MaybeUninit<f32>`.
        Ok(unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), len) })
    }
}

/// Bytes of memory of any alignment that hold `len` f32 from a cache line on.
pub(super) fn bytes_for(len: usize) -> usize {
    len.saturating_mul(size_of::<f32>()).saturating_add(ALIGNMENT)
}

impl<'a> From<&'a mut [MaybeUninit<u8>]> for Workspace<'a> {
    fn from(memory: &'a mut [MaybeUninit<u8>]) -> Self {
        Self { memory }
    }
}

impl<'a> From<&'a mut [u8]> for Workspace<'a> {
    fn from(memory: &'a mut [u8]) -> Self {
        // SAFETY: the layouts are the same, and nothing uninitialised is ever written.
        let memory = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), memory.len()) };
        Self { memory }
    }
}

/// The whole capacity of the vector: its elements, which are overwritten, and what is spare. It
/// neither grows nor changes its length.
impl<'a> From<&'a mut Vec<u8>> for Workspace<'a> {
    fn from(memory: &'a mut Vec<u8>) -> Self {
        let capacity = memory.capacity();
        // SAFETY: the vector owns `capacity` bytes, borrowed for 'a; nothing uninitialised is ever
        // written, so that its elements stay initialised.
        let memory = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), capacity) };
        Self { memory }
    }
}

/// The f32 memory of one thread, set to 0 as far as it was asked for.
pub(super) struct Scratch<'a> {
    memory: &'a mut [MaybeUninit<f32>],
    initialised: usize,
}

impl<'a> Scratch<'a> {
    pub fn new(memory: &'a mut [MaybeUninit<f32>]) -> Self {
        Self { memory, initialised: 0 }
    }

    /// The first `len` elements, of any value.
    pub fn first(&mut self, len: usize) -> &mut [f32] {
        let memory = &mut self.memory[..len];
        if self.initialised < len {
            memory[self.initialised..].fill(MaybeUninit::new(0.0));
            self.initialised = len;
        }
        // SAFETY: the first `initialised` elements were written, and `len` is no more than that.
        unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), len) }
    }
}
