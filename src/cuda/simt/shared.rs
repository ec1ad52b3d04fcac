//! A block's shared memory, and for each word who touched it when.
//!
//! Two threads may touch a word, at least one of them writing, only with a barrier between: of the
//! block, or of the warp if they share one. What is on its way by an asynchronous copy may not be
//! touched until the copying thread has waited for it. What nothing was written to may not be read.

/// Barriers passed: of the block, and of one warp since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    pub block: u32,
    pub warp: u32,
}

/// A thread at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub thread: u32,
    pub time: Time,
}

impl Access {
    fn warp(self) -> u32 {
        self.thread / 32
    }

    /// Whether nothing orders this access and an earlier one.
    fn races(self, earlier: Access) -> bool {
        if self.thread == earlier.thread {
            false
        } else if self.warp() == earlier.warp() {
            self.time == earlier.time
        } else {
            self.time.block == earlier.time.block
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Empty,
    Copying,
    Written,
}

#[derive(Clone, Copy, Debug, Default)]
struct Word {
    state: State,
    write: Option<Access>,
    /// Reads since the block's last barrier by two warps, or one: whichever warp writes next, one
    /// of them was another's.
    reads: [Option<Access>; 2],
}

/// The memory of one block. Accesses are whole words of 4 bytes.
#[derive(Debug)]
pub struct SharedMemory {
    bytes: Vec<u8>,
    words: Vec<Word>,
}

impl SharedMemory {
    pub fn new(bytes: usize) -> Self {
        Self { bytes: vec![0xff; bytes.next_multiple_of(4)], words: vec![Word::default(); bytes.div_ceil(4)] }
    }

    fn words(&mut self, address: u32, bytes: usize) -> Result<&mut [Word], String> {
        let (start, size) = (address as usize, self.bytes.len());
        if start % bytes != 0 {
            return Err(format!("shared memory: address {start} is not aligned to {bytes} bytes"));
        }
        if start + bytes > size {
            return Err(format!("shared memory: bytes {start}..{} of {size}", start + bytes));
        }
        Ok(&mut self.words[start / 4..(start + bytes) / 4])
    }

    /// The `bytes` at an address, a multiple of it.
    pub fn read(&mut self, access: Access, address: u32, bytes: usize) -> Result<&[u8], String> {
        for word in self.words(address, bytes)? {
            match (word.state, word.write) {
                (State::Empty, _) => {
                    return Err(format!(
                        "shared memory: thread {} reads {address}, where nothing was written",
                        access.thread
                    ));
                }
                (State::Copying, Some(write)) => {
                    return Err(format!(
                        "shared memory: thread {} reads {address} before thread {} waited for its copy",
                        access.thread, write.thread
                    ));
                }
                (_, Some(write)) if access.races(write) => {
                    return Err(format!(
                        "shared memory: no barrier between thread {} writing {address} and thread {} reading it",
                        write.thread, access.thread
                    ));
                }
                _ => {}
            }
            let replaced = word.reads[0]
                .is_none_or(|first| first.warp() == access.warp() || first.time.block < access.time.block);
            word.reads[usize::from(!replaced)] = Some(access);
        }
        Ok(&self.bytes[address as usize..][..bytes])
    }

    /// Marks bytes as written, or being written, by `access`.
    fn claim(&mut self, access: Access, address: u32, bytes: usize, state: State) -> Result<(), String> {
        for word in self.words(address, bytes)? {
            if word.state == State::Copying {
                return Err(format!(
                    "shared memory: thread {} writes {address} during a copy",
                    access.thread
                ));
            }
            let earlier = word.reads.iter().chain([&word.write]).flatten();
            if let Some(other) = earlier.copied().find(|&other| access.races(other)) {
                return Err(format!(
                    "shared memory: no barrier between thread {} using {address} and thread {} writing it",
                    other.thread, access.thread
                ));
            }
            *word = Word { state, write: Some(access), reads: [None; 2] };
        }
        Ok(())
    }

    /// Writes `data` at an address that is a multiple of its length.
    pub fn write(&mut self, access: Access, address: u32, data: &[u8]) -> Result<(), String> {
        self.claim(access, address, data.len(), State::Written)?;
        self.bytes[address as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    /// From now on until it lands, a copy to these bytes is on its way.
    pub fn start_copy(&mut self, access: Access, address: u32, bytes: usize) -> Result<(), String> {
        self.claim(access, address, bytes, State::Copying)
    }

    /// The copy is there.
    pub fn land_copy(&mut self, access: Access, address: u32, data: &[u8]) -> Result<(), String> {
        for word in self.words(address, data.len())? {
            *word = Word { state: State::Written, write: Some(access), reads: [None; 2] };
        }
        self.bytes[address as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
}
