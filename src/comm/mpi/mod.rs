//! The engine for processes, on one machine or many, over an installed MPI.
//!
//! Every collective is single messages, one for each pair of ranks: the ranks that one waits for
//! are known, and it waits no longer than it was told. Each message starts with 32 bytes that say
//! what it belongs to.
//!
//! ```no_run
//! use star_attention::comm::{Collective, GroupConfig, Mpi};
//!
//! # fn main() -> star_attention::Result<()> {
//! // mpirun -n 4 --hostfile hosts program
//! let group = Mpi::init(&GroupConfig::default())?;
//! let mut ranks = vec![0; group.size()];
//! group.all_gather(&[group.rank() as u8], &mut ranks)?;
//! # Ok(())
//! # }
//! ```

mod exchange;
mod requests;

use super::call::{Call, Header};
use super::message::{Bytes, Message, Pattern, Received, Started, cut, range_of};
use super::{
    Collective, GroupConfig, Link, Traffic, check_all_gather, check_all_to_all, check_root, check_under_way,
};
use crate::{Error, Result};
use exchange::{Parcel, Post};
use mpi::Threading;
use mpi::environment::Universe;
use mpi::topology::{Communicator, SimpleCommunicator};
use std::cell::{Cell, RefCell};
use std::ops::Range;

/// A network of 10 Gbit/s under TCP. To be told of a better one.
const LINK: Link = Link { latency: 50e-6, bandwidth: 1.2e9 };
/// Bytes of one message at most: what a rank keeps room for, of every other.
const PIECE: usize = 16 << 20;
/// From so many bytes on a broadcast goes in parts, which all pass on.
const LONG_BROADCAST: usize = 64 << 10;

/// One rank of a group of processes.
///
/// A rank that drops its group, by a panic too, has left, and the others get
/// [`Error::Disconnected`] at once from the first collective that waits for it. One that was
/// killed, stopped or cut off makes them return [`Error::Timeout`], or [`Error::Disconnected`]
/// where another rank noticed first; either names the rank that failed. `mpirun` itself ends all
/// processes as soon as one dies, unless told otherwise (`--enable-recovery` of Open MPI 4,
/// `-disable-auto-cleanup` of MPICH).
///
/// Dropping it waits until all others drop theirs, up to the timeout, and then ends MPI if
/// [`init`](Self::init) has started it. After a failure it waits a second at most, and leaves MPI
/// as it is: `MPI_Finalize` would wait for the dead.
pub struct Mpi {
    rank: usize,
    size: usize,
    link: Link,
    post: RefCell<Post>,
    traffic: Cell<Traffic>,
    /// Ends MPI when it is dropped.
    universe: Option<Universe>,
}

impl std::fmt::Debug for Mpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mpi").field("rank", &self.rank).field("size", &self.size).finish_non_exhaustive()
    }
}

impl Mpi {
    /// Starts MPI; the group is all processes that were started together.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if MPI was started before, or is not made for programs with threads.
    pub fn init(config: &GroupConfig) -> Result<Self> {
        let unavailable = |reason: &str| Error::Unavailable { what: "MPI", reason: reason.into() };
        let (universe, threading) = mpi::initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| unavailable("it was started before; give its communicator to `Mpi::over`"))?;
        if threading < Threading::Serialized {
            return Err(unavailable("this one cannot be called from different threads in turn"));
        }
        let mut group = Self::over(&SimpleCommunicator::world(), config)?;
        group.universe = Some(universe);
        Ok(group)
    }

    /// The group of a communicator that there is already, in a duplicate of its own: all its ranks
    /// must come here.
    ///
    /// The program ends MPI, after this group was dropped. While the group lives, other calls of
    /// MPI must not run at the same time as its own, unless MPI was started with
    /// `Threading::Multiple`.
    ///
    /// # Errors
    /// [`Error::Transport`] for what MPI answers.
    pub fn over(communicator: &impl Communicator, config: &GroupConfig) -> Result<Self> {
        let communicator = requests::Communicator::duplicate(communicator.as_raw())?;
        let (rank, size) = communicator.rank_and_size()?;
        Ok(Self {
            rank,
            size,
            link: config.link.unwrap_or(LINK),
            post: RefCell::new(Post::new(communicator, rank, size, config.timeout)),
            traffic: Cell::default(),
            universe: None,
        })
    }

    fn exchange(&self, call: Call, send: &[Parcel<'_>], receive: &mut [(usize, &mut [u8])]) -> Result<()> {
        self.post.borrow_mut().exchange(call, send, receive)?;
        self.count_sent(send);
        Ok(())
    }

    /// Starts to exchange the bytes `piece` of each part of a message.
    fn start_piece(&self, pattern: Pattern, message: &Message, piece: &Range<usize>) -> Result<()> {
        let parcel = |to: Vec<usize>, rank| Parcel {
            to,
            payload: range_of(&message.part(pattern, self.size, rank), piece),
        };
        let send: Vec<_> = match pattern {
            Pattern::AllGather => vec![parcel(self.others().collect(), self.rank)],
            Pattern::AllToAll => self.others().map(|rank| parcel(vec![rank], rank)).collect(),
        };
        let expected: Vec<_> = self.others().map(|rank| (rank, piece.len())).collect();
        self.post.borrow_mut().start(Call::of(pattern, message), &send, &expected)?;
        self.count_sent(&send);
        Ok(())
    }

    fn count_sent(&self, send: &[Parcel<'_>]) {
        for Parcel { to, payload } in send {
            let (messages, bytes) =
                (to.len() as u64, payload.iter().map(|slice| slice.len() as u64).sum::<u64>());
            let sent = Traffic { collectives: 0, messages, bytes: messages * bytes };
            self.traffic.set(self.traffic.get() + sent);
        }
    }

    fn check_free(&self) -> Result<()> {
        check_under_way(false, self.post.borrow().is_under_way())
    }

    /// A payload for all other ranks.
    fn to_others<'a>(&self, payload: &'a [u8]) -> [Parcel<'a>; 1] {
        [Parcel { to: self.others().collect(), payload: vec![payload] }]
    }

    /// All ranks but this one.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.size).filter(move |&other| other != rank)
    }

    fn count(&self) {
        self.traffic.set(self.traffic.get() + Traffic::of(0, 0));
    }

    /// `root` sends each rank its part, and each passes it on to the others.
    fn broadcast_in_parts(&self, call: Call, root: usize, buffer: &mut [u8]) -> Result<()> {
        let part = |rank: usize| {
            let each = buffer.len().div_ceil(self.size);
            (rank * each).min(buffer.len())..((rank + 1) * each).min(buffer.len())
        };
        let parts: Vec<Range<usize>> = (0..self.size).map(part).collect();
        if self.rank == root {
            let buffer = &*buffer;
            let part = |rank: usize| Parcel { to: vec![rank], payload: vec![&buffer[parts[rank].clone()]] };
            self.exchange(call, &self.others().map(part).collect::<Vec<_>>(), &mut [])?;
            return self.exchange(call, &self.to_others(&buffer[parts[root].clone()]), &mut []);
        }
        self.exchange(call, &[], &mut [(root, &mut buffer[parts[self.rank].clone()])])?;
        let mine = buffer[parts[self.rank].clone()].to_vec();
        let to = self.others().filter(|&rank| rank != root).collect();
        let send = [Parcel { to, payload: vec![&mine] }];
        let mut receive = Vec::new();
        let mut rest = buffer;
        for (rank, range) in parts.into_iter().enumerate() {
            let (part, after) = rest.split_at_mut(range.len());
            if rank != self.rank {
                receive.push((rank, part));
            }
            rest = after;
        }
        self.exchange(call, &send, &mut receive)
    }
}

/// The ranges that a message is cut into: at least one, which may be empty.
fn pieces(bytes: usize) -> impl Iterator<Item = Range<usize>> {
    (0..bytes.max(1)).step_by(PIECE).map(move |start| start..bytes.min(start + PIECE))
}

/// The same piece of every other rank's part of a buffer.
fn piece_of_each<'a>(
    buffer: &'a mut [u8],
    each: usize,
    piece: &Range<usize>,
    others: impl Iterator<Item = usize>,
) -> Vec<(usize, &'a mut [u8])> {
    let (mut rest, mut at) = (buffer, 0);
    let piece_of = |rank: usize| {
        let start = rank * each + piece.start;
        let (part, after) = std::mem::take(&mut rest).split_at_mut(start - at).1.split_at_mut(piece.len());
        (rest, at) = (after, start + piece.len());
        (rank, part)
    };
    others.map(piece_of).collect()
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn link(&self) -> Link {
        self.link
    }

    fn all_gather(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        check_all_gather(self.size, send, receive)?;
        self.check_free()?;
        let bytes = send.len();
        let call = Call::with_regions(Pattern::AllGather, &[bytes]);
        for piece in pieces(bytes) {
            let messages = self.to_others(&send[piece.clone()]);
            let mut parts = piece_of_each(receive, bytes, &piece, self.others());
            self.exchange(call, &messages, &mut parts)?;
        }
        receive[self.rank * bytes..][..bytes].copy_from_slice(send);
        self.count();
        Ok(())
    }

    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        check_all_to_all(self.size, send, receive)?;
        self.check_free()?;
        let part = send.len() / self.size;
        let call = Call::with_regions(Pattern::AllToAll, &[send.len()]);
        for piece in pieces(part) {
            let message =
                |rank| Parcel { to: vec![rank], payload: vec![&send[rank * part..][piece.clone()]] };
            let messages: Vec<_> = self.others().map(message).collect();
            let mut parts = piece_of_each(receive, part, &piece, self.others());
            self.exchange(call, &messages, &mut parts)?;
        }
        let own = self.rank * part..(self.rank + 1) * part;
        receive[own.clone()].copy_from_slice(&send[own]);
        self.count();
        Ok(())
    }

    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()> {
        check_root(self.size, root)?;
        self.check_free()?;
        let call = Call::Broadcast { root, bytes: buffer.len() };
        for piece in pieces(buffer.len()) {
            let buffer = &mut buffer[piece];
            if self.size > 2 && buffer.len() >= LONG_BROADCAST {
                self.broadcast_in_parts(call, root, buffer)?;
            } else if self.rank == root {
                self.exchange(call, &self.to_others(buffer), &mut [])?;
            } else {
                self.exchange(call, &[], &mut [(root, buffer)])?;
            }
        }
        self.count();
        Ok(())
    }

    /// The first 16 MiB for each rank are under way from here on; what is longer goes in
    /// [`finish`](Collective::finish). MPI moves messages while it is called: long ones mostly
    /// then, too.
    fn start(&self, pattern: Pattern, message: Message) -> Result<Started> {
        message.check(pattern, self.size)?;
        self.check_free()?;
        let len = message.part_len(pattern, self.size);
        self.start_piece(pattern, &message, &(0..len.min(PIECE)))?;
        Ok(Started { pattern, message })
    }

    fn finish(&self, started: Started, read: &mut dyn FnMut(&Received<'_>)) -> Result<()> {
        check_under_way(true, self.post.borrow().is_under_way())?;
        let Started { pattern, message } = started;
        let (len, call) = (message.part_len(pattern, self.size), Call::of(pattern, &message));
        // As they come, headers first; longer messages are put together.
        let mut buffers: Vec<Bytes> = (0..self.size).map(|_| Bytes::default()).collect();
        let (in_one, head) = (len <= PIECE, if len <= PIECE { Header::LEN } else { 0 });
        for piece in pieces(len) {
            if piece.start > 0 {
                self.start_piece(pattern, &message, &piece)?;
            }
            let mut post = self.post.borrow_mut();
            post.finish(call)?;
            if in_one {
                post.swap_buffers(&mut buffers);
            } else {
                for rank in self.others() {
                    buffers[rank].resize(piece.end)?;
                    buffers[rank][piece.clone()].copy_from_slice(post.payload(rank));
                }
            }
        }
        self.count();
        let own = message.part(pattern, self.size, self.rank);
        let regions: Vec<usize> = own.iter().map(|slice| slice.len()).collect();
        let slices = buffers.iter().enumerate().flat_map(|(rank, buffer)| {
            if rank == self.rank { own.clone() } else { cut(&buffer[head..], &regions) }
        });
        // The buffers are MPI's again before anything else may be received.
        self.post.borrow_mut().hold(true);
        read(&Received::new(regions.len(), slices.collect()));
        let mut post = self.post.borrow_mut();
        if in_one {
            post.swap_buffers(&mut buffers);
        }
        post.hold(false);
        Ok(())
    }

    fn traffic(&self) -> Traffic {
        self.traffic.get()
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if !self.post.get_mut().close() {
            std::mem::forget(self.universe.take());
        }
    }
}
