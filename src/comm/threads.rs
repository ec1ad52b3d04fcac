//! The engine for threads of one process.
//!
//! Each rank posts its message in a slot and waits until all have posted theirs: one synchronisation for each collective. A rank has
//! two slots, used in turn: it can post message `n + 2` only after all have posted `n + 1`, and so after all have read message `n`.

use super::call::Call;
use super::{Collective, GroupConfig, Link, Traffic, check_all_gather, check_all_to_all, check_root};
use crate::{Error, Result};
use std::cell::Cell;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// Bandwidth as measured between threads on two cores. The latency is not that of a message (10 us): it is what makes the ways of merging take the same time where they did,
/// at partials of 1 MB, as a second step copies in memory what a network would have carried.
const LINK: Link = Link { latency: 1e-3, bandwidth: 1.4e9 };

/// One rank of a group of threads: hand each to its thread.
///
/// A rank that is dropped, by a panic too, has left the group: the others get [`Error::Disconnected`] from the first collective that it
/// has not posted its part of, and at once; what it has posted they still receive. A rank that is late makes the others
/// return [`Error::Timeout`]. Ranks that call different collectives, or with different lengths, all get [`Error::Peer`].
#[derive(Debug)]
pub struct ThreadGroup {
    rank: usize,
    shared: Arc<Shared>,
    timeout: Duration,
    link: Link,
    posted: Cell<u64>,
    traffic: Cell<Traffic>,
}

#[derive(Debug)]
struct Shared {
    members: Mutex<Vec<Member>>,
    changed: Condvar,
    /// For each rank two messages, of even and of odd number.
    slots: Vec<[RwLock<Vec<u8>>; 2]>,
}

#[derive(Clone, Debug, Default)]
struct Member {
    posted: u64,
    gone: bool,
    /// The collectives of the two slots.
    calls: [Option<Call>; 2],
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
            slots: (0..size).map(|_| Default::default()).collect(),
        });
        let rank = |rank| Self {
            rank,
            shared: shared.clone(),
            timeout: config.timeout,
            link: config.link.unwrap_or(LINK),
            posted: Cell::new(0),
            traffic: Cell::default(),
        };
        Ok((0..size).map(rank).collect())
    }

    /// Posts `message`, waits for all, and gives `read` each rank's message in order.
    fn exchange(
        &self,
        call: Call,
        message: &[u8],
        sent: Traffic,
        mut read: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let number = self.posted.get();
        let parity = (number % 2) as usize;
        let result = self.wait(call, message, number, parity);
        if result.is_err() {
            self.leave();
            return result;
        }
        for (rank, slots) in self.shared.slots.iter().enumerate() {
            read(rank, &slots[parity].read().unwrap_or_else(PoisonError::into_inner));
        }
        self.posted.set(number + 1);
        self.traffic.set(self.traffic.get() + sent);
        Ok(())
    }

    fn wait(&self, call: Call, message: &[u8], number: u64, parity: usize) -> Result<()> {
        if self.members()[self.rank].gone {
            return Err(Error::Disconnected { rank: self.rank });
        }
        {
            let slot = &self.shared.slots[self.rank][parity];
            let mut slot = slot.write().unwrap_or_else(PoisonError::into_inner);
            slot.clear();
            slot.extend_from_slice(message);
        }
        let start = Instant::now();
        let mut members = self.members();
        members[self.rank].calls[parity] = Some(call);
        members[self.rank].posted = number + 1;
        self.shared.changed.notify_all();
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
        match members.iter().position(|member| member.calls[parity] != Some(call)) {
            None => Ok(()),
            Some(rank) => {
                let got = members[rank].calls[parity].map_or_else(String::new, |call| format!("{call:?}"));
                Err(Error::Peer { rank, argument: "call", expected: format!("{call:?}"), got })
            }
        }
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
        self.shared.slots.len()
    }

    fn link(&self) -> Link {
        self.link
    }

    fn all_gather(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        let bytes = send.len();
        check_all_gather(self.size(), send, receive)?;
        self.exchange(Call::AllGather { bytes }, send, self.to_others(bytes), |rank, message| {
            receive[rank * bytes..][..bytes].copy_from_slice(message);
        })
    }

    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        check_all_to_all(self.size(), send, receive)?;
        let part = send.len() / self.size();
        let call = Call::AllToAll { bytes: send.len() };
        self.exchange(call, send, self.to_others(part), |rank, message| {
            receive[rank * part..][..part].copy_from_slice(&message[self.rank * part..][..part]);
        })
    }

    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()> {
        check_root(self.size(), root)?;
        let call = Call::Broadcast { root, bytes: buffer.len() };
        if root == self.rank {
            return self.exchange(call, buffer, self.to_others(buffer.len()), |_, _| {});
        }
        self.exchange(call, &[], Traffic::of(0, 0), |rank, message| {
            if rank == root {
                buffer.copy_from_slice(message);
            }
        })
    }

    fn traffic(&self) -> Traffic {
        self.traffic.get()
    }
}
