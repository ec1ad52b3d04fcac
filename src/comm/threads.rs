//! The engine for threads of one process.
//!
//! Each rank posts its message in a slot and waits until all have posted theirs: one
//! synchronisation for each collective. Messages are shared, not copied: each rank reads the
//! others' where they lie. A rank has two slots, used in turn: it can post message `n + 2` only
//! after all have posted `n + 1`, and so after all have read message `n`, which then is free to be
//! written again.

use super::call::Call;
use super::message::{Message, Pattern, Received, Started};
use super::{
    Collective, GroupConfig, Link, Traffic, check_all_gather, check_all_to_all, check_root, check_under_way,
};
use crate::{Error, Result};
use std::cell::{Cell, RefCell};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bandwidth as measured between threads on two cores. The latency is not that of a message (10
/// us): it is what makes the ways of merging take the same time where they did, at partials of 1
/// MB, as a second step copies in memory what a network would have carried.
const LINK: Link = Link { latency: 1e-3, bandwidth: 1.4e9 };

/// One rank of a group of threads: hand each to its thread.
///
/// A rank that is dropped, by a panic too, has left the group: the others get
/// [`Error::Disconnected`] from the first collective that it has not posted its part of, and at
/// once; what it has posted they still receive. A rank that is late makes the others return
/// [`Error::Timeout`]. Ranks that call different collectives, or with different lengths, all get
/// [`Error::Peer`].
#[derive(Debug)]
pub struct ThreadGroup {
    rank: usize,
    shared: Arc<Shared>,
    timeout: Duration,
    link: Link,
    /// Collectives completed.
    done: Cell<u64>,
    /// Whether one more has been posted.
    under_way: Cell<bool>,
    traffic: Cell<Traffic>,
    /// Messages of calls on borrowed memory, in the slots' turn.
    copies: RefCell<[Option<Message>; 2]>,
}

#[derive(Debug)]
struct Shared {
    members: Mutex<Vec<Member>>,
    changed: Condvar,
    size: usize,
}

#[derive(Clone, Debug, Default)]
struct Member {
    posted: u64,
    gone: bool,
    /// Two slots, for messages of even and of odd number.
    slots: [Option<(Call, Message)>; 2],
}

impl ThreadGroup {
    /// The ranks of a group of `size`, in order.
    ///
    /// # Errors
    /// [`Error::Value`] for a size of 0.
    pub fn ranks(size: usize) -> Result<Vec<Self>> {
        Self::ranks_with(size, &GroupConfig::default())
    }

    /// As [`ranks`](Self::ranks), otherwise configured.
    ///
    /// # Errors
    /// [`Error::Value`] for a size of 0.
    pub fn ranks_with(size: usize, config: &GroupConfig) -> Result<Vec<Self>> {
        if size == 0 {
            return Err(Error::value("size", "at least 1", size));
        }
        let shared = Arc::new(Shared {
            members: Mutex::new(vec![Member::default(); size]),
            changed: Condvar::new(),
            size,
        });
        let rank = |rank| Self {
            rank,
            shared: shared.clone(),
            timeout: config.timeout,
            link: config.link.unwrap_or(LINK),
            done: Cell::new(0),
            under_way: Cell::new(false),
            traffic: Cell::default(),
            copies: RefCell::default(),
        };
        Ok((0..size).map(rank).collect())
    }

    /// The slot of the next collective, or of the one under way.
    fn slot(&self) -> usize {
        (self.done.get() % 2) as usize
    }

    /// A message with a copy of `bytes`.
    fn copy(&self, bytes: &[u8]) -> Result<Message> {
        let kept = &mut self.copies.borrow_mut()[self.slot()];
        if let Some(message) = kept
            && message.refill(bytes)?
        {
            return Ok(message.clone());
        }
        let mut message = Message::new(&[])?;
        message.refill(bytes)?;
        Ok(kept.insert(message).clone())
    }

    /// Puts a message in this rank's slot.
    fn post(&self, call: Call, message: Message) -> Result<()> {
        check_under_way(false, self.under_way.get())?;
        let mut members = self.members();
        let member = &mut members[self.rank];
        if member.gone {
            return Err(Error::Disconnected { rank: self.rank });
        }
        member.slots[self.slot()] = Some((call, message));
        member.posted = self.done.get() + 1;
        self.under_way.set(true);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Waits until all have posted, and takes part in every rank's message.
    fn collect(&self, sent: Traffic) -> Result<Vec<Message>> {
        self.under_way.set(false);
        let messages = self.wait();
        match messages {
            Ok(_) => {
                self.done.set(self.done.get() + 1);
                self.traffic.set(self.traffic.get() + sent);
            }
            Err(_) => self.leave(),
        }
        messages
    }

    fn wait(&self) -> Result<Vec<Message>> {
        let (number, slot) = (self.done.get(), self.slot());
        let start = Instant::now();
        let mut members = self.members();
        while let Some(missing) = members.iter().position(|member| member.posted <= number) {
            if let Some(rank) = members.iter().position(|member| member.posted <= number && member.gone) {
                return Err(Error::Disconnected { rank });
            }
            let Some(left) = self.timeout.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) else {
                return Err(Error::Timeout { rank: missing, seconds: self.timeout.as_secs_f64() });
            };
            let waited = self.shared.changed.wait_timeout(members, left);
            members = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        // All have read what this rank posted before.
        members[self.rank].slots[1 - slot] = None;
        let Some((call, own)) = members[self.rank].slots[slot].clone() else {
            return Err(Error::Disconnected { rank: self.rank });
        };
        let message = |(rank, member): (usize, &Member)| match &member.slots[slot] {
            Some((theirs, message)) if *theirs == call => Ok(message.clone()),
            other => {
                let show =
                    |call: &Call, message: &Message| format!("{call:?} of {:?} bytes", message.regions());
                let got = other.as_ref().map_or_else(String::new, |(call, message)| show(call, message));
                Err(Error::Peer { rank, argument: "call", expected: show(&call, &own), got })
            }
        };
        members.iter().enumerate().map(message).collect()
    }

    fn to_others(&self, bytes: usize) -> Traffic {
        Traffic::of(self.size() - 1, bytes)
    }

    fn members(&self) -> MutexGuard<'_, Vec<Member>> {
        self.shared.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self) {
        self.members()[self.rank].gone = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for ThreadGroup {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Collective for ThreadGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn link(&self) -> Link {
        self.link
    }

    fn all_gather(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        check_all_gather(self.size(), send, receive)?;
        let bytes = send.len();
        self.post(Call::with_regions(Pattern::AllGather, &[bytes]), self.copy(send)?)?;
        for (rank, message) in self.collect(self.to_others(bytes))?.iter().enumerate() {
            receive[rank * bytes..][..bytes].copy_from_slice(message.bytes());
        }
        Ok(())
    }

    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        check_all_to_all(self.size(), send, receive)?;
        let part = send.len() / self.size();
        self.post(Call::with_regions(Pattern::AllToAll, &[send.len()]), self.copy(send)?)?;
        for (rank, message) in self.collect(self.to_others(part))?.iter().enumerate() {
            receive[rank * part..][..part].copy_from_slice(&message.bytes()[self.rank * part..][..part]);
        }
        Ok(())
    }

    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()> {
        check_root(self.size(), root)?;
        let call = Call::Broadcast { root, bytes: buffer.len() };
        if root == self.rank {
            self.post(call, self.copy(buffer)?)?;
            return self.collect(self.to_others(buffer.len())).map(drop);
        }
        self.post(call, self.copy(&[])?)?;
        let messages = self.collect(Traffic::of(0, 0))?;
        buffer.copy_from_slice(messages[root].bytes());
        Ok(())
    }

    fn start(&self, pattern: Pattern, message: Message) -> Result<Started> {
        message.check(pattern, self.size())?;
        self.post(Call::of(pattern, &message), message.clone())?;
        Ok(Started { pattern, message })
    }

    fn finish(&self, started: Started, read: &mut dyn FnMut(&Received<'_>)) -> Result<()> {
        check_under_way(true, self.under_way.get())?;
        let Started { pattern, message } = started;
        let messages = self.collect(self.to_others(message.part_len(pattern, self.size())))?;
        let slices = messages.iter().flat_map(|message| message.part(pattern, self.size(), self.rank));
        read(&Received::new(messages[self.rank].regions().len(), slices.collect()));
        Ok(())
    }

    fn traffic(&self) -> Traffic {
        self.traffic.get()
    }
}
