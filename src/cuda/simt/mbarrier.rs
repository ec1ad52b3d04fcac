//! mbarriers: in phases, each of which is complete when as many arrivals and bytes have come as are
//! expected.

use super::clock::{Access, Clock, Clocks};
use super::shared::{SharedMemory, State};
use std::collections::BTreeMap;

/// What an object takes in shared memory.
const OBJECT_BYTES: usize = 8;
/// The largest count of arrivals, and of bytes.
const MOST: i64 = (1 << 20) - 1;

#[derive(Debug)]
struct Mbarrier {
    /// Of copies that land here.
    actor: u32,
    init: Access,
    /// Whether asynchronous units can see it.
    fenced: bool,
    count: u32,
    /// Arrivals that the phase lacks.
    pending: u32,
    /// Bytes that are expected and have not come.
    bytes: i64,
    /// Phases that are complete.
    phase: u32,
    /// Whether bytes or copies have come that nobody has waited for.
    unread: bool,
    /// What those who arrived knew, up to now and in complete phases.
    arriving: Clock,
    completed: Clock,
}

impl Mbarrier {
    fn arrive(&mut self, arrivals: u32) -> Result<(), String> {
        if self.pending < arrivals {
            return Err(format!("{arrivals} arrive where {} are expected", self.pending));
        }
        self.pending -= arrivals;
        self.settle()
    }

    fn expect(&mut self, bytes: i64) -> Result<(), String> {
        self.bytes += bytes;
        if self.bytes.abs() > MOST {
            return Err(format!("{} bytes are expected: tx-count overflow", self.bytes));
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<(), String> {
        if self.pending > 0 || self.bytes > 0 {
            return Ok(());
        }
        if self.bytes < 0 {
            return Err(format!("{} bytes more than expected: tx-count overflow", -self.bytes));
        }
        self.pending = self.count;
        self.phase += 1;
        self.arriving.learn(self.actor, self.phase);
        self.completed = self.arriving.clone();
        Ok(())
    }
}

/// The mbarriers of a block, by address.
#[derive(Debug)]
pub struct Mbarriers {
    at: BTreeMap<u32, Mbarrier>,
    next_actor: u32,
}

impl Mbarriers {
    pub fn new(next_actor: u32) -> Self {
        Self { at: BTreeMap::new(), next_actor }
    }

    pub fn init(
        &mut self,
        clocks: &Clocks,
        shared: &mut SharedMemory,
        thread: usize,
        address: u32,
        count: u32,
    ) -> Result<(), String> {
        if count == 0 || i64::from(count) > MOST {
            return Err(format!("mbarrier {address}: a count of {count}"));
        }
        shared.claim(clocks, thread, address, OBJECT_BYTES, State::Mbarrier)?;
        let mbarrier = Mbarrier {
            actor: self.next_actor,
            init: clocks.now(thread),
            fenced: false,
            count,
            pending: count,
            bytes: 0,
            phase: 0,
            unread: false,
            arriving: Clock::default(),
            completed: Clock::default(),
        };
        self.next_actor += 1;
        self.at.insert(address, mbarrier);
        Ok(())
    }

    /// A fence, of either kind, of a thread that knows of their init.
    pub fn fence(&mut self, clocks: &Clocks, thread: usize) {
        self.at.values_mut().for_each(|mbarrier| mbarrier.fenced |= clocks.knows(thread, mbarrier.init));
    }

    fn get(&mut self, clocks: &Clocks, thread: usize, address: u32) -> Result<&mut Mbarrier, String> {
        let Some(mbarrier) = self.at.get_mut(&address) else {
            return Err(format!("mbarrier {address}: there is none"));
        };
        if !clocks.knows(thread, mbarrier.init) {
            return Err(format!("mbarrier {address}: no barrier between its init and thread {thread}"));
        }
        Ok(mbarrier)
    }

    /// Whether a thread may use it.
    pub fn check(&mut self, clocks: &Clocks, thread: usize, address: u32) -> Result<(), String> {
        self.get(clocks, thread, address).map(|_| ())
    }

    /// Whether an asynchronous unit may be told of it.
    pub fn check_unit(&mut self, clocks: &Clocks, thread: usize, address: u32) -> Result<(), String> {
        if !self.get(clocks, thread, address)?.fenced {
            return Err(format!("mbarrier {address}: no fence between its init and asynchronous use"));
        }
        Ok(())
    }

    pub fn arrive(&mut self, clocks: &mut Clocks, thread: usize, address: u32) -> Result<(), String> {
        let mbarrier = self.get(clocks, thread, address)?;
        clocks.release(thread, &mut mbarrier.arriving);
        mbarrier.arrive(1).map_err(|reason| format!("mbarrier {address}: {reason}"))
    }

    pub fn expect(&mut self, clocks: &Clocks, thread: usize, address: u32, bytes: u32) -> Result<(), String> {
        let mbarrier = self.get(clocks, thread, address)?;
        mbarrier.expect(i64::from(bytes)).map_err(|reason| format!("mbarrier {address}: {reason}"))
    }

    /// Whether a wait for the phase of a parity would pass; the thread then knows what those knew
    /// who arrived.
    pub fn has_passed(
        &mut self,
        clocks: &mut Clocks,
        thread: usize,
        address: u32,
        parity: u32,
    ) -> Result<bool, String> {
        let mbarrier = self.get(clocks, thread, address)?;
        let passed = mbarrier.phase % 2 != parity;
        if passed {
            mbarrier.unread = false;
            clocks.acquire(thread, &mbarrier.completed);
        }
        Ok(passed)
    }

    /// Whether it would pass, for nobody to know.
    pub fn would_pass(&self, address: u32, parity: u32) -> bool {
        self.at.get(&address).is_none_or(|mbarrier| mbarrier.phase % 2 != parity)
    }

    /// What copies that land now do, as an access.
    pub fn copies(&self, address: u32) -> Access {
        let mbarrier = &self.at[&address];
        Access { actor: mbarrier.actor, count: mbarrier.phase }
    }

    /// Copies of so many bytes have landed, or an arrival that waited for copies has come.
    pub fn land(&mut self, address: u32, bytes: u32, arrivals: u32) -> Result<(), String> {
        let mbarrier = self.at.get_mut(&address).expect("checked when the copy was started");
        mbarrier.unread = true;
        mbarrier
            .expect(-i64::from(bytes))
            .and_then(|()| if arrivals > 0 { mbarrier.arrive(arrivals) } else { mbarrier.settle() })
            .map_err(|reason| format!("mbarrier {address}: {reason}"))
    }

    /// The block has ended.
    pub fn check_end(&self) -> Result<(), String> {
        match self.at.iter().find(|(_, mbarrier)| mbarrier.unread) {
            None => Ok(()),
            Some((address, _)) => Err(format!("mbarrier {address}: copies that nobody waited for")),
        }
    }

    /// What a wait that does not end waits for.
    pub fn describe(&self, address: u32, parity: u32) -> String {
        match self.at.get(&address) {
            Some(Mbarrier { phase, pending, bytes, .. }) => format!(
                "mbarrier {address} for parity {parity}, in its phase {phase}, \
                 which lacks {pending} arrivals and {bytes} bytes"
            ),
            None => format!("mbarrier {address}, which is none"),
        }
    }
}
