//! The engine for GPUs, over NCCL: messages go from device memory to device memory, in the order of
//! a stream.
//!
//! NCCL is loaded when it is first asked for; nothing of it is needed to build.
//!
//! ```no_run
//! use star_attention::comm::{GroupConfig, Nccl, ThreadGroup};
//! use star_attention::cuda::driver::Driver;
//!
//! # fn main() -> star_attention::Result<()> {
//! // One process for all of its GPUs, with a thread for each. With a process for each: `Mpi` instead of `ThreadGroup`.
//! std::thread::scope(|scope| {
//!     for (gpu, rank) in ThreadGroup::ranks(Driver::count()?)?.into_iter().enumerate() {
//!         scope.spawn(move || -> star_attention::Result<()> {
//!             let group = Nccl::over(&rank, &Driver::open(gpu)?, &GroupConfig::default())?;
//!             // merge.run(&group, ...) of a DeviceMerge and, in place of stream.synchronize(), group.wait(&stream)?
//!             Ok(())
//!         });
//!     }
//!     Ok(())
//! })
//! # }
//! ```

use super::device::check_exchange;
use super::teardown::{Communicator, Guarded};
use super::{Collective, DeviceCollective, Exchange, GroupConfig, Link, Traffic, check_root};
use crate::cuda::driver::{Driver, check_library, check_stream, driver};
use crate::cuda::{Device, Span, SpanMut, check_not_capturing};
use crate::{Error, Result};
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream};
use cudarc::nccl::{result, sys};
use std::cell::{Cell, RefCell};
use std::sync::Arc;

/// GPUs of one machine on NVLink. To be told of a better one.
const LINK: Link = Link { latency: 10e-6, bandwidth: 200e9 };

/// One rank of a group of GPUs.
///
/// Calls only ask for work. [`wait`](Self::wait) tells whether it was done, and has a deadline. A
/// rank leaves the group with its first error: NCCL then aborts its work under way.
///
/// Dropping a group waits for its work, up to the timeout, and aborts what is not done then. Work
/// of graphs is not waited for. A group whose thread panics aborts at once. NCCL itself may hang as
/// it aborts or frees a group: it does so on a thread of its own, which is left behind, with what
/// it would have freed, if it takes longer than the timeout. So neither `wait` nor a drop takes
/// longer than twice the timeout.
///
/// What has no deadline: NCCL connects the ranks in [`over`](Self::over) and in the first
/// collective, and waits there for all of them.
#[derive(Debug)]
pub struct Nccl {
    communicator: Guarded<Handle>,
    context: Arc<CudaContext>,
    rank: usize,
    size: usize,
    link: Link,
    traffic: Cell<Traffic>,
}

/// NCCL's communicator.
#[derive(Debug)]
struct Handle {
    raw: sys::ncclComm_t,
    context: Arc<CudaContext>,
    /// Streams with work that nobody waited for, and an event after it.
    started: RefCell<Vec<([u64; 2], CudaEvent)>>,
}

// SAFETY: a communicator may be used from any thread, by one at a time; the type is not Sync.
unsafe impl Send for Handle {}

impl Handle {
    /// Calls of one collective, as one piece of work.
    fn together(
        &self,
        stream: &Arc<CudaStream>,
        calls: impl FnOnce(sys::ncclComm_t) -> Result<()>,
    ) -> Result<()> {
        self.context.bind_to_thread().map_err(driver("bind the context"))?;
        check("start a group of calls", result::group_start())?;
        let called = calls(self.raw);
        let ended = check("end a group of calls", result::group_end());
        called.and(ended)?;
        // The work of a graph is done whenever that is launched.
        if Driver::is_capturing(stream)? { Ok(()) } else { self.mark(stream) }
    }

    /// Remembers all work of a stream so far.
    fn mark(&self, stream: &Arc<CudaStream>) -> Result<()> {
        let event = stream
            .record_event(Some(CUevent_flags::CU_EVENT_DISABLE_TIMING))
            .map_err(driver("record an event"))?;
        let mut started = self.started.borrow_mut();
        started.retain(|(of, _)| *of != Driver::stream_id(stream));
        started.push((Driver::stream_id(stream), event));
        Ok(())
    }

    /// Whether all that was marked on a stream, or on any, has been done.
    fn is_done_on(&self, stream: Option<&Arc<CudaStream>>) -> Result<bool> {
        self.context.bind_to_thread().map_err(driver("bind the context"))?;
        let (mut started, mut asked) = (self.started.borrow_mut(), Ok(()));
        started.retain(|(_, event)| match event.try_is_complete() {
            Ok(done) => !done,
            Err(error) => {
                asked = Err(error);
                true
            }
        });
        asked.map_err(driver("ask for an event"))?;
        Ok(!started.iter().any(|(of, _)| stream.is_none_or(|stream| *of == Driver::stream_id(stream))))
    }
}

impl Communicator for Handle {
    const ENGINE: &'static str = "NCCL";

    fn is_done(&self) -> Result<bool> {
        self.is_done_on(None)
    }

    fn check(&self) -> Result<()> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives; the state is written only.
        check("ask for errors", unsafe { sys::ncclCommGetAsyncError(self.raw, &mut state) }.result())?;
        check("wait", state.result())
    }

    fn destroy(self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the communicator lives, and is not used after this.
            let _ = unsafe { result::comm_destroy(self.raw) };
        }
    }

    fn abort(self) {
        // SAFETY: the communicator lives, and is not used after this.
        let _ = unsafe { result::comm_abort(self.raw) };
    }
}

/// cudarc looks for `libnccl.so` alone.
fn check_nccl() -> Result<()> {
    let found = check_library("NCCL", "libnccl.so");
    if found.is_err() && check_library("NCCL", "libnccl.so.2").is_ok() {
        let reason = "there is a libnccl.so.2, but no libnccl.so: make it a link to that".into();
        return Err(Error::Unavailable { what: "NCCL", reason });
    }
    found
}

fn check(
    operation: &'static str,
    answer: std::result::Result<result::NcclStatus, result::NcclError>,
) -> Result<()> {
    answer.map(|_| ()).map_err(|error| transport(operation, format!("{:?}", error.0)))
}

fn transport(operation: &'static str, reason: String) -> Error {
    Error::Transport { engine: "NCCL", operation, reason }
}

impl Nccl {
    /// The version of this machine's NCCL, as 22703 for 2.27.3.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if there is none, [`Error::Transport`] for what NCCL answers.
    pub fn version() -> Result<usize> {
        check_nccl()?;
        let version = result::get_nccl_version()
            .map_err(|error| transport("ask for the version", format!("{:?}", error.0)))?;
        Ok(usize::try_from(version).unwrap_or(0))
    }

    /// A group of the GPUs that the ranks of `group` bring, one each: all its ranks must come here.
    ///
    /// # Errors
    /// [`Error::Unavailable`] on every rank where one has no NCCL; [`Error::Transport`] for what
    /// NCCL answers; errors of `group`.
    pub fn over(group: &(impl Collective + ?Sized), device: &Driver, config: &GroupConfig) -> Result<Self> {
        let context = device.context().clone();
        // All ranks are here, and have NCCL: from here on NCCL itself waits, without a deadline.
        let library = check_nccl();
        let mut ready = vec![0; group.size()];
        group.all_gather(&[u8::from(library.is_ok())], &mut ready)?;
        library?;
        if let Some(rank) = ready.iter().position(|&ready| ready != 1) {
            return Err(Error::Unavailable { what: "NCCL", reason: format!("rank {rank} has none") });
        }
        let mut id = [0u8; 128];
        if group.rank() == 0 {
            let unique =
                result::get_uniqueid().map_err(|error| transport("make an id", format!("{:?}", error.0)))?;
            id = unique.internal.map(|byte| byte as u8);
        }
        group.broadcast(0, &mut id)?;
        let id = sys::ncclUniqueId { internal: id.map(|byte| byte as _) };
        context.bind_to_thread().map_err(driver("bind the context"))?;
        let mut communicator = std::ptr::null_mut();
        // SAFETY: the handle is written only; all ranks have the id.
        check("join the group", unsafe {
            result::comm_init_rank(&mut communicator, group.size() as i32, id, group.rank() as i32)
        })?;
        let handle = Handle { raw: communicator, context: context.clone(), started: RefCell::default() };
        Ok(Self {
            communicator: Guarded::new(handle, group.rank(), config.timeout),
            context,
            rank: group.rank(),
            size: group.size(),
            link: config.link.unwrap_or(LINK),
            traffic: Cell::default(),
        })
    }

    /// Waits until all that was asked for on a stream has been done, up to the timeout: in place of
    /// `stream.synchronize()`.
    ///
    /// # Errors
    /// [`Error::Value`] for a stream of another device, or one that is being captured in a graph;
    /// the group is as it was then. [`Error::Transport`] if a peer failed, or the work is not done
    /// in time; [`Error::Disconnected`] after an earlier error; [`Error::Driver`] for what the
    /// driver answers.
    pub fn wait(&self, stream: &Arc<CudaStream>) -> Result<()> {
        check_stream(&self.context, stream)?;
        check_not_capturing::<Driver>(stream)?;
        self.communicator.call(|handle| handle.mark(stream))?;
        self.communicator.wait(|handle| handle.is_done_on(Some(stream)))
    }

    /// Calls of one collective, as one piece of work.
    fn together(
        &self,
        stream: &Arc<CudaStream>,
        sent: Traffic,
        calls: impl FnOnce(sys::ncclComm_t) -> Result<()>,
    ) -> Result<()> {
        self.communicator.call(|handle| handle.together(stream, calls))?;
        self.traffic.set(self.traffic.get() + sent);
        Ok(())
    }
}

fn address(span: &Span<'_, Driver, u8>, offset: usize) -> *const std::ffi::c_void {
    std::ptr::without_provenance((span.address() + offset as u64) as usize)
}

fn address_mut(span: &SpanMut<'_, Driver, u8>, offset: usize) -> *mut std::ffi::c_void {
    std::ptr::without_provenance_mut((span.address() + offset as u64) as usize)
}

const BYTES: sys::ncclDataType_t = sys::ncclDataType_t::ncclInt8;

impl DeviceCollective<Driver> for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn link(&self) -> Link {
        self.link
    }

    fn all_gather(&self, stream: &Arc<CudaStream>, parts: &[Exchange<'_, Driver>]) -> Result<()> {
        check_stream(&self.context, stream)?;
        for part in parts {
            check_exchange(part, 1, self.size, stream)?;
        }
        let bytes = parts.iter().map(|(send, _)| send.len()).sum();
        self.together(stream, Traffic::of(self.size - 1, bytes), |communicator| {
            parts.iter().try_for_each(|(send, receive)| {
                let (from, to) = (address(send, 0), address_mut(receive, 0));
                // SAFETY: the spans are of this device, of the lengths that this call needs, and
                // are borrowed for the stream.
                check("all-gather", unsafe {
                    result::all_gather(from, to, send.len(), BYTES, communicator, stream.cu_stream().cast())
                })
            })
        })
    }

    fn all_to_all(&self, stream: &Arc<CudaStream>, parts: &[Exchange<'_, Driver>]) -> Result<()> {
        check_stream(&self.context, stream)?;
        for part in parts {
            check_exchange(part, self.size, self.size, stream)?;
        }
        let bytes = parts.iter().map(|(send, _)| send.len() / self.size).sum();
        self.together(stream, Traffic::of(self.size - 1, bytes), |communicator| {
            for (send, receive) in parts {
                let len = send.len() / self.size;
                for peer in 0..self.size {
                    let (from, to) = (address(send, peer * len), address_mut(receive, peer * len));
                    // SAFETY: as above; each part is of `len` bytes.
                    unsafe {
                        let stream = stream.cu_stream().cast();
                        check("send", result::send(from, len, BYTES, peer as i32, communicator, stream))?;
                        check("receive", result::recv(to, len, BYTES, peer as i32, communicator, stream))?;
                    }
                }
            }
            Ok(())
        })
    }

    fn broadcast(
        &self,
        stream: &Arc<CudaStream>,
        root: usize,
        parts: &mut [SpanMut<'_, Driver, u8>],
    ) -> Result<()> {
        check_root(self.size, root)?;
        check_stream(&self.context, stream)?;
        parts.iter().try_for_each(|part| part.check_stream("parts", stream))?;
        let sent = if root == self.rank { self.size - 1 } else { 0 };
        let bytes = parts.iter().map(SpanMut::len).sum();
        self.together(stream, Traffic::of(sent, bytes), |communicator| {
            parts.iter().try_for_each(|part| {
                let data = address_mut(part, 0);
                // SAFETY: the span is of this device, and is borrowed for the stream.
                check("broadcast", unsafe {
                    let stream = stream.cu_stream().cast();
                    result::broadcast(data, data, part.len(), BYTES, root as i32, communicator, stream)
                })
            })
        })
    }

    fn traffic(&self) -> Traffic {
        self.traffic.get()
    }
}
