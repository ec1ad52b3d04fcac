//! A block's shared memory, and for each word who touched it when.
//!
//! Two threads may touch a word, at least one of them writing, only where something orders them: a
//! barrier, or an mbarrier at which one arrives and the other waits. What is on its way by an
//! asynchronous copy may not be touched until somebody has waited for it. What nothing was written
//! to may not be read. What threads wrote, asynchronous units may read or replace only behind a
//! fence.

use super::block::WARP;
use super::clock::{Access, Clocks};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    #[default]
    Empty,
    /// A copy is on its way.
    Copying,
    /// By a thread, or by a copy for it.
    Written,
    /// By an asynchronous unit.
    Landed,
    /// Part of an mbarrier.
    Mbarrier,
}

#[derive(Clone, Copy, Debug, Default)]
struct Word {
    state: State,
    write: Access,
}

/// Lanes of a warp that read a word at the same count.
#[derive(Clone, Copy, Debug, Default)]
struct Readers {
    count: u32,
    lanes: u32,
}

/// The memory of one block. Accesses are whole words of 4 bytes.
#[derive(Debug)]
pub struct SharedMemory {
    bytes: Vec<u8>,
    words: Vec<Word>,
    /// Since a word was written, its readers of each warp, then those of each warp group's
    /// products: `columns` for a word.
    readers: Vec<Readers>,
    columns: usize,
    threads: usize,
}

impl SharedMemory {
    pub fn new(bytes: usize, threads: usize) -> Self {
        let (words, warps) = (bytes.div_ceil(4), threads / WARP);
        let columns = warps + warps.div_ceil(4);
        Self {
            bytes: vec![0xff; 4 * words],
            words: vec![Word::default(); words],
            readers: vec![Readers::default(); words * columns],
            columns,
            threads,
        }
    }

    /// The words of an access.
    fn words(&self, address: u32, bytes: usize) -> Result<std::ops::Range<usize>, String> {
        let (start, size) = (address as usize, self.bytes.len());
        if start % bytes != 0 {
            return Err(format!("shared memory: address {start} is not aligned to {bytes} bytes"));
        }
        if start + bytes > size {
            return Err(format!("shared memory: bytes {start}..{} of {size}", start + bytes));
        }
        Ok(start / 4..(start + bytes) / 4)
    }

    fn name(&self, actor: u32) -> String {
        let actor = actor as usize;
        let groups = self.columns - self.threads / WARP;
        if actor < self.threads {
            format!("thread {actor}")
        } else if actor < self.threads + groups {
            format!("wgmma of warp group {}", actor - self.threads)
        } else {
            "a copy to an mbarrier".into()
        }
    }

    /// Whether a thread may read a word.
    fn check_read(&self, clocks: &Clocks, thread: usize, word: usize) -> Result<(), String> {
        let Word { state, write } = self.words[word];
        let reads = || format!("shared memory: thread {thread} reads {}", 4 * word);
        match state {
            State::Empty => Err(reads() + ", where nothing was written"),
            State::Mbarrier => Err(reads() + ", an mbarrier"),
            State::Copying => {
                Err(format!("{} before {} waited for its copy", reads(), self.name(write.actor)))
            }
            State::Written | State::Landed if !clocks.knows(thread, write) => Err(format!(
                "shared memory: no barrier between {} writing {} and thread {thread} reading it",
                self.name(write.actor),
                4 * word
            )),
            State::Written | State::Landed => Ok(()),
        }
    }

    /// The `bytes` at an address, a multiple of it.
    pub fn read(
        &mut self,
        clocks: &Clocks,
        thread: usize,
        address: u32,
        bytes: usize,
    ) -> Result<&[u8], String> {
        let now = clocks.now(thread);
        for word in self.words(address, bytes)? {
            self.check_read(clocks, thread, word)?;
            self.mark(word, thread / WARP, Readers { count: now.count, lanes: 1 << (thread % WARP) });
        }
        Ok(&self.bytes[address as usize..][..bytes])
    }

    /// Of readers at different counts the last are kept.
    fn mark(&mut self, word: usize, column: usize, new: Readers) {
        let old = &mut self.readers[word * self.columns + column];
        let lanes = if old.count == new.count { old.lanes | new.lanes } else { new.lanes };
        *old = Readers { lanes, ..new };
    }

    /// A warp group's products, which a thread starts, read these bytes until they are waited for.
    pub fn start_products(
        &mut self,
        clocks: &Clocks,
        thread: usize,
        group: Access,
        address: u32,
        bytes: usize,
    ) -> Result<(), String> {
        for word in self.words(address, bytes)? {
            self.check_read(clocks, thread, word)?;
            self.check_fence(clocks, thread, word)?;
            let column = self.threads / WARP + group.actor as usize - self.threads;
            self.mark(word, column, Readers { count: group.count, lanes: 1 });
        }
        Ok(())
    }

    /// Whether an asynchronous unit that a thread starts may use what a word holds.
    fn check_fence(&self, clocks: &Clocks, thread: usize, word: usize) -> Result<(), String> {
        let Word { state, write } = self.words[word];
        if state == State::Written && !clocks.has_fenced(thread, write) {
            return Err(format!(
                "shared memory: no fence.proxy.async between {} writing {} and its asynchronous use",
                self.name(write.actor),
                4 * word
            ));
        }
        Ok(())
    }

    /// A reader of a word of whom a thread does not know that it is done.
    fn unknown_reader(&self, clocks: &Clocks, thread: usize, word: usize) -> Option<u32> {
        let warps = self.threads / WARP;
        let columns = &self.readers[word * self.columns..][..self.columns];
        columns.iter().enumerate().find_map(|(column, readers)| {
            let first = if column < warps { column * WARP } else { self.threads + column - warps };
            let mut lanes = readers.lanes;
            while lanes != 0 {
                let actor = first as u32 + lanes.trailing_zeros();
                if !clocks.knows(thread, Access { actor, count: readers.count }) {
                    return Some(actor);
                }
                lanes &= lanes - 1;
            }
            None
        })
    }

    /// Marks bytes as written, or being written, by a thread.
    pub fn claim(
        &mut self,
        clocks: &Clocks,
        thread: usize,
        address: u32,
        bytes: usize,
        state: State,
    ) -> Result<(), String> {
        for word in self.words(address, bytes)? {
            let Word { state: old, write } = self.words[word];
            match old {
                State::Copying => {
                    return Err(format!("shared memory: thread {thread} writes {} during a copy", 4 * word));
                }
                State::Mbarrier => {
                    return Err(format!("shared memory: thread {thread} writes {}, an mbarrier", 4 * word));
                }
                State::Empty | State::Written | State::Landed => {}
            }
            let unknown_write = old != State::Empty && !clocks.knows(thread, write);
            let unknown = unknown_write.then_some(write.actor);
            if let Some(other) = unknown.or_else(|| self.unknown_reader(clocks, thread, word)) {
                return Err(format!(
                    "shared memory: no barrier between {} using {} and thread {thread} writing it",
                    self.name(other),
                    4 * word
                ));
            }
            self.set(word, state, clocks.now(thread));
        }
        Ok(())
    }

    fn set(&mut self, word: usize, state: State, write: Access) {
        self.words[word] = Word { state, write };
        self.readers[word * self.columns..][..self.columns].fill(Readers::default());
    }

    /// Writes `data` at an address that is a multiple of its length.
    pub fn write(&mut self, clocks: &Clocks, thread: usize, address: u32, data: &[u8]) -> Result<(), String> {
        self.claim(clocks, thread, address, data.len(), State::Written)?;
        self.bytes[address as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    /// From now on until it lands, a copy to these bytes is on its way.
    pub fn start_copy(
        &mut self,
        clocks: &Clocks,
        thread: usize,
        address: u32,
        bytes: usize,
    ) -> Result<(), String> {
        self.claim(clocks, thread, address, bytes, State::Copying)
    }

    /// The same for an asynchronous unit.
    pub fn start_unit_copy(
        &mut self,
        clocks: &Clocks,
        thread: usize,
        address: u32,
        bytes: usize,
    ) -> Result<(), String> {
        for word in self.words(address, bytes)? {
            self.check_fence(clocks, thread, word)?;
        }
        self.start_copy(clocks, thread, address, bytes)
    }

    /// A copy is there.
    pub fn land_copy(&mut self, by: Access, state: State, address: u32, data: &[u8]) -> Result<(), String> {
        for word in self.words(address, data.len())? {
            self.set(word, state, by);
        }
        self.bytes[address as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    /// Bytes whose reading was checked before.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
