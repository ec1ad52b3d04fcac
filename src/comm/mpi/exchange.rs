//! Messages to and from the other ranks, with a deadline, and with a farewell.

use super::super::call::{Call, Header};
use super::super::message::Bytes;
use super::requests::{Communicator, Request, Tag, one_at_a_time};
use crate::{Error, Result};
use std::time::{Duration, Instant};

/// How long a rank that has failed waits for the others to hear of it.
const GRACE: Duration = Duration::from_secs(1);
/// How long a rank that misses several others waits beyond its time for one that misses fewer: that
/// one knows better which has failed.
const HEARSAY: Duration = Duration::from_millis(100);

/// What a rank sends and receives.
#[derive(Debug)]
pub(super) struct Post {
    communicator: Communicator,
    rank: usize,
    timeout: Duration,
    /// Exchanges started so far.
    number: u64,
    /// Of each rank; this one's is not used.
    inboxes: Vec<Inbox>,
    /// Messages that are being sent.
    outgoing: Vec<u8>,
    sends: Vec<(usize, Request)>,
    failed: bool,
    /// Whether an exchange was started and not finished.
    under_way: bool,
}

/// One payload, in slices, for some ranks.
#[derive(Debug)]
pub(super) struct Parcel<'a> {
    pub to: Vec<usize>,
    pub payload: Vec<&'a [u8]>,
}

/// What one other rank sends.
#[derive(Debug, Default)]
struct Inbox {
    /// Header and payload, both at multiples of 16.
    buffer: Bytes,
    state: State,
    left: Option<Farewell>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    /// A message of the buffer's length is to come.
    Awaited,
    /// It comes into the buffer.
    Receiving(Request),
}

/// What a rank said when it left.
#[derive(Clone, Copy, Debug)]
struct Farewell {
    cause: usize,
    /// Exchanges that it has completed.
    number: u64,
    failed: bool,
}

/// Longer and longer pauses between looks: short for messages that are on their way, sparing for
/// cores on which others compute.
struct Pauses(Instant);

impl Pauses {
    fn pause(&self) {
        let waited = self.0.elapsed();
        if waited < Duration::from_micros(20) {
            std::hint::spin_loop();
        } else if waited < Duration::from_millis(1) {
            std::thread::yield_now();
        } else {
            std::thread::sleep((waited / 20).min(Duration::from_millis(1)));
        }
    }
}

impl Post {
    pub fn new(communicator: Communicator, rank: usize, size: usize, timeout: Duration) -> Self {
        Self {
            communicator,
            rank,
            timeout,
            number: 0,
            inboxes: (0..size).map(|_| Inbox::default()).collect(),
            outgoing: Vec::new(),
            sends: Vec::new(),
            failed: false,
            under_way: false,
        }
    }

    /// Whether an exchange was started and not finished.
    pub fn is_under_way(&self) -> bool {
        self.under_way
    }

    /// Sends to some ranks, receives from some, and returns when all of it is done.
    ///
    /// After an error this rank has left the group; its later exchanges are errors at once.
    pub fn exchange(
        &mut self,
        call: Call,
        send: &[Parcel<'_>],
        receive: &mut [(usize, &mut [u8])],
    ) -> Result<()> {
        let expected: Vec<_> = receive.iter().map(|(from, payload)| (*from, payload.len())).collect();
        self.start(call, send, &expected)?;
        self.finish(call)?;
        for (from, payload) in receive {
            payload.copy_from_slice(self.payload(*from));
        }
        Ok(())
    }

    /// Starts an exchange: sends to some ranks, and expects payloads of so many bytes from some.
    /// What is sent is copied.
    ///
    /// After an error this rank has left the group.
    pub fn start(&mut self, call: Call, send: &[Parcel<'_>], expected: &[(usize, usize)]) -> Result<()> {
        if self.failed {
            return Err(Error::Disconnected { rank: self.rank });
        }
        self.number += 1;
        self.under_way = true;
        let started = expected.iter().try_for_each(|&(from, len)| {
            let inbox = &mut self.inboxes[from];
            inbox.state = State::Awaited;
            inbox.buffer.resize(Header::LEN + len)
        });
        started.and_then(|()| self.start_sends(call, send)).map_err(|error| self.fail(error))
    }

    /// Waits until the exchange under way is done. Payloads then lie in the inboxes.
    ///
    /// After an error this rank has left the group.
    pub fn finish(&mut self, call: Call) -> Result<()> {
        if self.failed {
            return Err(Error::Disconnected { rank: self.rank });
        }
        self.wait(call).map_err(|error| self.fail(error))?;
        self.under_way = false;
        Ok(())
    }

    /// Refuses other exchanges, as one under way does, or no longer.
    pub fn hold(&mut self, held: bool) {
        self.under_way = held;
    }

    /// What has come from a rank in the last exchange.
    pub fn payload(&self, from: usize) -> &[u8] {
        &self.inboxes[from].buffer[Header::LEN..]
    }

    /// The inboxes' buffers, each a header and what has come; taken, and given back.
    pub fn swap_buffers(&mut self, buffers: &mut [Bytes]) {
        for (inbox, buffer) in self.inboxes.iter_mut().zip(buffers) {
            std::mem::swap(&mut inbox.buffer, buffer);
        }
    }

    /// Leaves the group because of an error.
    fn fail(&mut self, error: Error) -> Error {
        let cause = match error {
            Error::Disconnected { rank } | Error::Timeout { rank, .. } => rank,
            _ => self.rank,
        };
        self.failed = true;
        self.under_way = false;
        self.take_leave(cause);
        error
    }

    fn start_sends(&mut self, call: Call, send: &[Parcel<'_>]) -> Result<()> {
        let header = Header::Call { call, number: self.number }.to_bytes();
        let mut places = Vec::new();
        self.outgoing.clear();
        // One copy for all ranks that get the same.
        for Parcel { to, payload } in send {
            let start = self.outgoing.len();
            self.outgoing.extend_from_slice(&header);
            payload.iter().for_each(|slice| self.outgoing.extend_from_slice(slice));
            places.extend(to.iter().map(|&to| (to, start..self.outgoing.len())));
        }
        let _lock = one_at_a_time();
        for (to, place) in places {
            // SAFETY: nothing touches `outgoing` until all sends have ended, and it is given up if
            // one does not.
            let request = unsafe { self.communicator.send(to, Tag::Data, &self.outgoing[place])? };
            self.sends.push((to, request));
        }
        Ok(())
    }

    /// Waits for all messages of an exchange.
    fn wait(&mut self, call: Call) -> Result<()> {
        let pauses = Pauses(Instant::now());
        loop {
            let missing = self.look(call)?;
            let Some(&rank) = missing.first() else { return Ok(()) };
            let alone = missing.iter().all(|&other| other == rank);
            let limit = if alone { self.timeout } else { self.timeout.saturating_add(HEARSAY) };
            if pauses.0.elapsed() >= limit {
                return Err(Error::Timeout { rank, seconds: self.timeout.as_secs_f64() });
            }
            pauses.pause();
        }
    }

    /// Takes what has come; returns the ranks that are missing: first those whose messages have not
    /// come, then those that have not taken theirs.
    fn look(&mut self, call: Call) -> Result<Vec<usize>> {
        let _lock = one_at_a_time();
        let mut missing = Vec::new();
        for rank in 0..self.inboxes.len() {
            if !self.take(rank, call)? {
                missing.push(rank);
            }
        }
        self.look_after_sends()?;
        missing.extend(self.sends.iter().map(|&(to, _)| to));
        if !missing.is_empty() {
            self.hear_farewells()?;
        }
        for &rank in &missing {
            if let Some(farewell) = self.inboxes[rank].left
                && farewell.number < self.number
            {
                return Err(Error::Disconnected { rank: farewell.cause });
            }
        }
        Ok(missing)
    }

    /// Takes a rank's message; whether it is there in full, or none is awaited.
    fn take(&mut self, rank: usize, call: Call) -> Result<bool> {
        let inbox = &mut self.inboxes[rank];
        let differs =
            |got: String| Err(Error::Peer { rank, argument: "call", expected: format!("{call:?}"), got });
        if let State::Awaited = inbox.state {
            let Some(message) = self.communicator.probe(Some(rank), Tag::Data)? else { return Ok(false) };
            if message.len != inbox.buffer.len() {
                let bytes = |len: usize| format!("{} bytes", len.saturating_sub(Header::LEN));
                return differs(format!(
                    "{} in a message for {}",
                    bytes(message.len),
                    bytes(inbox.buffer.len())
                ));
            }
            // SAFETY: the buffer is on the heap, nothing touches it in this state, and it is given
            // up if the message never comes.
            inbox.state = State::Receiving(unsafe { message.receive(&mut inbox.buffer)? });
        }
        let State::Receiving(request) = &mut inbox.state else { return Ok(true) };
        if !request.has_ended()? {
            return Ok(false);
        }
        inbox.state = State::Idle;
        match Header::from_bytes(&inbox.buffer) {
            Some(Header::Call { call: theirs, number }) if (theirs, number) == (call, self.number) => {
                Ok(true)
            }
            Some(Header::Call { call: theirs, number }) => {
                differs(format!("{theirs:?} as exchange {number}"))
            }
            _ => differs("something else".into()),
        }
    }

    /// Lets sends go on, and forgets those that have ended.
    fn look_after_sends(&mut self) -> Result<()> {
        let mut at = 0;
        while at < self.sends.len() {
            if self.sends[at].1.has_ended()? {
                self.sends.remove(at);
            } else {
                at += 1;
            }
        }
        Ok(())
    }

    fn hear_farewells(&mut self) -> Result<()> {
        while let Some(message) = self.communicator.probe(None, Tag::Left)? {
            let (from, size) = (message.from, self.inboxes.len());
            let mut bytes = [0; Header::LEN];
            let mut farewell = Farewell { cause: from, number: 0, failed: true };
            // One of another length is a farewell all the same; it is not read.
            if message.len == Header::LEN {
                message.read(&mut bytes)?;
                if let Some(Header::Left { cause, number, failed }) = Header::from_bytes(&bytes) {
                    // A rank by a peer's word: a name here, if it is one.
                    farewell = Farewell { cause: if cause < size { cause } else { from }, number, failed };
                }
            }
            self.inboxes[from].left = Some(farewell);
        }
        Ok(())
    }

    /// Tells all others that this rank has left.
    fn take_leave(&mut self, cause: usize) {
        let failed = self.failed || std::thread::panicking();
        // An exchange that failed, or was not finished, does not count.
        let number = self.number - u64::from(self.failed || self.under_way);
        // Memory of its own, as sends may be under way after a failure: a few bytes, once.
        let message: &'static [u8] = Vec::leak(Header::Left { cause, number, failed }.to_bytes().to_vec());
        let _lock = one_at_a_time();
        for to in (0..self.inboxes.len()).filter(|&rank| rank != self.rank) {
            // SAFETY: the message lives forever.
            if let Ok(request) = unsafe { self.communicator.send(to, Tag::Left, message) } {
                self.sends.push((to, request));
            }
        }
    }

    /// Leaves the group, and waits for the others to do so. Whether all have left in good order, so
    /// that MPI can be ended.
    pub fn close(&mut self) -> bool {
        let orderly = !self.failed && !std::thread::panicking();
        if !self.failed {
            self.take_leave(self.rank);
        }
        let limit = if orderly { self.timeout } else { self.timeout.min(GRACE) };
        let pauses = Pauses(Instant::now());
        while self.wait_for_farewells().is_ok_and(|waiting| waiting) && pauses.0.elapsed() < limit {
            pauses.pause();
        }
        let all_orderly = self.others().all(|inbox| inbox.left.is_some_and(|left| !left.failed));
        let clean = orderly && all_orderly && self.sends.is_empty();
        if clean {
            let _lock = one_at_a_time();
            self.communicator.free();
        } else {
            // MPI may still write to these, or read them.
            std::mem::forget(std::mem::take(&mut self.inboxes));
            std::mem::forget(std::mem::take(&mut self.outgoing));
        }
        clean
    }

    /// Whether a rank has not left yet, or has not heard that this one has.
    fn wait_for_farewells(&mut self) -> Result<bool> {
        let _lock = one_at_a_time();
        self.look_after_sends()?;
        self.hear_farewells()?;
        Ok(!self.sends.is_empty() || self.others().any(|inbox| inbox.left.is_none()))
    }

    fn others(&self) -> impl Iterator<Item = &Inbox> {
        let others = self.inboxes.iter().enumerate();
        others.filter(|&(rank, _)| rank != self.rank).map(|(_, inbox)| inbox)
    }
}
