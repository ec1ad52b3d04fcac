//! A device that does its work when it is told to, and fails when it is told to.

use star_attention::cuda::{Device, Launch, Properties, SpanMut};
use star_attention::{Error, Result};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Pinned,
    Event,
    Copy,
    Record,
    Query,
    Wait,
}

/// Work of a stream.
#[derive(Debug)]
enum Work {
    /// Of pinned memory, by addresses. It is read when the work is done.
    Copy { from: Range<usize>, to: usize },
    /// By its number.
    Event(usize),
}

#[derive(Debug, Default)]
struct State {
    memory: Vec<u8>,
    /// Work of each stream that is not done yet.
    work: BTreeMap<u64, VecDeque<Work>>,
    events: usize,
    /// Pinned memory that was dropped. It is kept so that copies from it are found, not undefined.
    freed: Vec<Box<[u8]>>,
    /// What fails, after how many that do not.
    failing: Option<(Call, usize)>,
}

impl State {
    fn call(&mut self, call: Call) -> Result<()> {
        match &mut self.failing {
            Some((failing, 0)) if *failing == call => {
                self.failing = None;
                Err(Error::Unavailable { what: "the device", reason: format!("{call:?}") })
            }
            Some((failing, before)) if *failing == call => {
                *before -= 1;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn advance(&mut self, stream: u64) {
        let Some(Work::Copy { from, to }) = self.work.get_mut(&stream).and_then(VecDeque::pop_front) else {
            return;
        };
        let freed =
            self.freed.iter().any(|memory| memory.as_ptr_range().contains(&(from.start as *const u8)));
        assert!(!freed, "a copy reads memory that was freed");
        let bytes = std::ptr::with_exposed_provenance::<u8>(from.start);
        // SAFETY: pinned memory, which is not freed before the state is dropped.
        let bytes = unsafe { std::slice::from_raw_parts(bytes, from.len()) };
        self.memory[to..][..from.len()].copy_from_slice(bytes);
    }

    fn has_passed(&self, event: usize) -> bool {
        !self.work.values().flatten().any(|work| matches!(work, Work::Event(of) if *of == event))
    }
}

type Shared = Arc<Mutex<State>>;

fn lock(state: &Shared) -> MutexGuard<'_, State> {
    // A test that failed still drops its memory.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device, and all that the test asks of it.
#[derive(Clone, Debug)]
pub struct Fake(Shared);

#[derive(Debug)]
pub struct Stream {
    number: u64,
    captured: bool,
    state: Shared,
}

#[derive(Debug)]
pub struct Pinned {
    bytes: Box<[u8]>,
    state: Shared,
}

#[derive(Debug)]
pub struct Event {
    number: usize,
    state: Shared,
}

/// Where the device's memory begins.
const ADDRESS: u64 = 256;

impl Fake {
    /// A device with so many bytes of memory.
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Mutex::new(State { memory: vec![0; bytes], ..State::default() })))
    }

    pub fn stream(&self, number: u64) -> Stream {
        Stream { number, captured: false, state: self.0.clone() }
    }

    pub fn captured_stream(&self) -> Stream {
        Stream { captured: true, ..self.stream(0) }
    }

    /// All of the memory.
    pub fn span_mut<'a>(&self) -> SpanMut<'a, Self, u8> {
        // SAFETY: the device checks accesses, and makes them under a lock.
        unsafe { SpanMut::from_raw(ADDRESS, lock(&self.0).memory.len()) }
    }

    pub fn memory(&self) -> Vec<u8> {
        lock(&self.0).memory.clone()
    }

    /// Does the next `count` copies and events of a stream.
    pub fn advance(&self, stream: u64, count: usize) {
        (0..count).for_each(|_| lock(&self.0).advance(stream));
    }

    /// Copies and events that are not done yet.
    pub fn pending(&self) -> usize {
        lock(&self.0).work.values().flatten().count()
    }

    /// Events that have not passed.
    pub fn in_flight(&self) -> usize {
        let is_event = |work: &&Work| matches!(work, Work::Event(_));
        lock(&self.0).work.values().flatten().filter(is_event).count()
    }

    /// Pieces of pinned memory that were dropped.
    pub fn freed(&self) -> usize {
        lock(&self.0).freed.len()
    }

    /// Has one call fail, after `before` of its kind that do not.
    pub fn fail(&self, call: Call, before: usize) {
        lock(&self.0).failing = Some((call, before));
    }
}

/// Whether this is an error that the test asked for.
pub fn is_failure(result: &Result<()>) -> bool {
    matches!(result, Err(Error::Unavailable { what: "the device", .. }))
}

impl AsMut<[u8]> for Pinned {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        lock(&self.state).freed.push(std::mem::take(&mut self.bytes));
    }
}

impl Device for Fake {
    type Stream = Stream;
    type Guard<'a> = ();
    type Memory = Vec<u8>;
    type Pinned = Pinned;
    type Event = Event;

    fn properties(&self) -> Properties {
        Properties::new(8, 100 * 1024, 1024 * 1024)
    }

    fn stream_id(stream: &Stream) -> [u64; 2] {
        [0, stream.number]
    }

    fn is_capturing(stream: &Stream) -> Result<bool> {
        Ok(stream.captured)
    }

    unsafe fn launch(&self, _: &Stream, launch: &Launch<'_>) -> Result<()> {
        unreachable!("no launch of {} was asked for", launch.kernel)
    }

    unsafe fn upload(&self, _: &Stream, _: u64, _: &[u8]) -> Result<()> {
        unreachable!("pageable memory is not copied")
    }

    unsafe fn download(&self, _: &Stream, _: u64, _: &mut [u8]) -> Result<()> {
        unreachable!("nothing is read back through the device")
    }

    fn allocate(&self, _: &Stream, bytes: usize) -> Result<Vec<u8>> {
        Ok(vec![0; bytes])
    }

    fn address(memory: &Vec<u8>) -> u64 {
        memory.as_ptr().expose_provenance() as u64
    }

    fn pinned(&self, bytes: usize) -> Result<Pinned> {
        lock(&self.0).call(Call::Pinned)?;
        Ok(Pinned { bytes: vec![0; bytes].into(), state: self.0.clone() })
    }

    fn event(&self) -> Result<Event> {
        let mut state = lock(&self.0);
        state.call(Call::Event)?;
        state.events += 1;
        Ok(Event { number: state.events, state: self.0.clone() })
    }

    unsafe fn upload_pinned(&self, stream: &Stream, to: u64, bytes: &[u8]) -> Result<()> {
        let mut state = lock(&self.0);
        state.call(Call::Copy)?;
        let start = bytes.as_ptr().expose_provenance();
        let copy = Work::Copy { from: start..start + bytes.len(), to: (to - ADDRESS) as usize };
        state.work.entry(stream.number).or_default().push_back(copy);
        Ok(())
    }

    fn record(stream: &Stream, event: &Event) -> Result<()> {
        let mut state = lock(&stream.state);
        state.call(Call::Record)?;
        state.work.entry(stream.number).or_default().push_back(Work::Event(event.number));
        Ok(())
    }

    fn has_passed(event: &Event) -> Result<bool> {
        let mut state = lock(&event.state);
        state.call(Call::Query)?;
        Ok(state.has_passed(event.number))
    }

    /// The streams move on, in turns, until the event has passed.
    fn wait(event: &Event) -> Result<()> {
        let mut state = lock(&event.state);
        state.call(Call::Wait)?;
        while !state.has_passed(event.number) {
            let streams: Vec<u64> = state.work.keys().copied().collect();
            streams.into_iter().for_each(|stream| state.advance(stream));
        }
        Ok(())
    }
}
