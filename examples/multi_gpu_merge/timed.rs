//! Collectives that tell how long their messages took: with the wait for the other ranks.

use star_attention::Result;
use star_attention::comm::{Collective, Link, Message, Pattern, Received, Started, Traffic};
use std::cell::Cell;
use std::time::{Duration, Instant};

pub struct Timed<C> {
    pub group: C,
    spent: Cell<Duration>,
}

impl<C> Timed<C> {
    pub fn new(group: C) -> Self {
        Self { group, spent: Cell::default() }
    }

    /// Time spent since this was last asked.
    pub fn take(&self) -> Duration {
        self.spent.take()
    }

    fn time<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = work();
        self.spent.set(self.spent.get() + start.elapsed());
        result
    }
}

impl<C: Collective> Collective for Timed<C> {
    fn rank(&self) -> usize {
        self.group.rank()
    }
    fn size(&self) -> usize {
        self.group.size()
    }
    fn link(&self) -> Link {
        self.group.link()
    }
    fn all_gather(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        self.time(|| self.group.all_gather(send, receive))
    }
    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        self.time(|| self.group.all_to_all(send, receive))
    }
    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()> {
        self.time(|| self.group.broadcast(root, buffer))
    }
    fn start(&self, pattern: Pattern, message: Message) -> Result<Started> {
        self.time(|| self.group.start(pattern, message))
    }
    /// With what the rank makes of the messages left out.
    fn finish(&self, started: Started, read: &mut dyn FnMut(&Received<'_>)) -> Result<()> {
        let reading = Cell::new(Duration::ZERO);
        let result = self.time(|| {
            self.group.finish(started, &mut |received| {
                let start = Instant::now();
                read(received);
                reading.set(start.elapsed());
            })
        });
        self.spent.set(self.spent.get() - reading.get());
        result
    }
    fn traffic(&self) -> Traffic {
        self.group.traffic()
    }
}

#[cfg(feature = "nccl")]
mod device {
    use super::*;
    use star_attention::comm::{DeviceCollective, Exchange, Nccl};
    use star_attention::cuda::driver::Driver;
    use star_attention::cuda::{Device, SpanMut};

    type Stream = <Driver as Device>::Stream;

    /// Waits for all work before a message, and then for the message.
    impl Timed<Nccl> {
        fn on(&self, stream: &Stream, work: impl FnOnce() -> Result<()>) -> Result<()> {
            self.group.wait(stream)?;
            self.time(|| work().and_then(|()| self.group.wait(stream)))
        }
    }

    impl DeviceCollective<Driver> for Timed<Nccl> {
        fn rank(&self) -> usize {
            self.group.rank()
        }
        fn size(&self) -> usize {
            self.group.size()
        }
        fn link(&self) -> Link {
            self.group.link()
        }
        fn all_gather(&self, stream: &Stream, parts: &[Exchange<'_, Driver>]) -> Result<()> {
            self.on(stream, || self.group.all_gather(stream, parts))
        }
        fn all_to_all(&self, stream: &Stream, parts: &[Exchange<'_, Driver>]) -> Result<()> {
            self.on(stream, || self.group.all_to_all(stream, parts))
        }
        fn broadcast(
            &self,
            stream: &Stream,
            root: usize,
            parts: &mut [SpanMut<'_, Driver, u8>],
        ) -> Result<()> {
            self.on(stream, || self.group.broadcast(stream, root, parts))
        }
        fn traffic(&self) -> Traffic {
            self.group.traffic()
        }
    }
}
