//! Sends and receives that are under way, over MPI's C interface.
//!
//! Collectives of MPI itself cannot be given up: one that a peer never joins never ends. Single
//! messages can be asked for their state, so that a deadline is kept. And they can be looked at
//! before there is a buffer for them: a message longer than its buffer makes Open MPI 4 write past
//! its end.

use crate::{Error, Result};
use mpi::ffi;
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// MPI was initialised for calls from one thread at a time.
static CALLS: Mutex<()> = Mutex::new(());

pub(super) fn one_at_a_time() -> MutexGuard<'static, ()> {
    CALLS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a message is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tag {
    /// An exchange.
    Data,
    /// The sender's farewell.
    Left,
}

/// The communicator of a group, of its own.
#[derive(Debug)]
pub(super) struct Communicator(ffi::MPI_Comm);

// SAFETY: a handle, used under the lock of all calls only.
unsafe impl Send for Communicator {}

/// A message that has come, and waits for a buffer.
#[derive(Debug)]
pub(super) struct Message {
    handle: ffi::MPI_Message,
    pub from: usize,
    pub len: usize,
}

/// A send or receive. Its buffer must stay as long as it is under way.
#[derive(Debug)]
pub(super) struct Request(ffi::MPI_Request);

// SAFETY: a handle, used under the lock of all calls only.
unsafe impl Send for Request {}

impl Communicator {
    /// A duplicate of `comm` whose errors are returned. All ranks of `comm` must come here.
    pub fn duplicate(comm: ffi::MPI_Comm) -> Result<Self> {
        let _lock = one_at_a_time();
        // SAFETY: `comm` is a communicator of an initialised MPI; both calls write one handle each.
        unsafe {
            let mut duplicate = ffi::RSMPI_COMM_NULL;
            check("duplicate the communicator", ffi::MPI_Comm_dup(comm, &mut duplicate))?;
            check("return errors", ffi::MPI_Comm_set_errhandler(duplicate, ffi::RSMPI_ERRORS_RETURN))?;
            Ok(Self(duplicate))
        }
    }

    pub fn rank_and_size(&self) -> Result<(usize, usize)> {
        let _lock = one_at_a_time();
        let (mut rank, mut size) = (0, 0);
        // SAFETY: the communicator lives; both calls write one number each.
        unsafe {
            check("ask for the rank", ffi::MPI_Comm_rank(self.0, &mut rank))?;
            check("ask for the size", ffi::MPI_Comm_size(self.0, &mut size))?;
        }
        Ok((rank as usize, size as usize))
    }

    /// # Safety
    /// `bytes` stay, unchanged, until the request has ended; fewer than 2³¹.
    pub unsafe fn send(&self, to: usize, tag: Tag, bytes: &[u8]) -> Result<Request> {
        let mut request = Request::none();
        let (data, len) = (bytes.as_ptr().cast::<c_void>(), bytes.len() as c_int);
        // SAFETY: the buffer is the caller's promise; `to` is a rank.
        let code = unsafe {
            ffi::MPI_Isend(data, len, ffi::RSMPI_UINT8_T, to as c_int, tag as c_int, self.0, &mut request.0)
        };
        check("send", code).map(|()| request)
    }

    /// Lets MPI work, and tells whether a message has come: from a rank, or from any.
    pub fn probe(&self, from: Option<usize>, tag: Tag) -> Result<Option<Message>> {
        let (mut came, mut len) = (0, 0);
        // SAFETY: the communicator lives; flag, handle, status and length are written only.
        unsafe {
            let mut handle = ffi::RSMPI_MESSAGE_NULL;
            let mut status = std::mem::zeroed::<ffi::MPI_Status>();
            let from = from.map_or(ffi::RSMPI_ANY_SOURCE, |from| from as c_int);
            let code = ffi::MPI_Improbe(from, tag as c_int, self.0, &mut came, &mut handle, &mut status);
            check("look for messages", code)?;
            if came == 0 {
                return Ok(None);
            }
            check("count bytes", ffi::MPI_Get_count(&status, ffi::RSMPI_UINT8_T, &mut len))?;
            let (from, len) = (status.MPI_SOURCE as usize, usize::try_from(len).unwrap_or(usize::MAX));
            Ok(Some(Message { handle, from, len }))
        }
    }

    pub fn free(&mut self) {
        // SAFETY: the communicator lives, and no request is under way on it.
        unsafe { ffi::MPI_Comm_free(&mut self.0) };
    }
}

impl Request {
    fn none() -> Self {
        // SAFETY: a constant of the MPI library.
        Self(unsafe { ffi::RSMPI_REQUEST_NULL })
    }

    /// Lets MPI work, and tells whether this one has ended. After that it must not be asked again.
    pub fn has_ended(&mut self) -> Result<bool> {
        let mut ended = 0;
        // SAFETY: the request is of MPI; the flag is written only.
        let code = unsafe { ffi::MPI_Test(&mut self.0, &mut ended, ffi::RSMPI_STATUS_IGNORE) };
        check("wait", code).map(|()| ended != 0)
    }
}

impl Message {
    /// Starts to receive the message.
    ///
    /// # Safety
    /// Nobody else touches `bytes` until the request has ended.
    ///
    /// # Panics
    /// If `bytes` has not the message's length.
    pub unsafe fn receive(mut self, bytes: &mut [u8]) -> Result<Request> {
        assert_eq!(bytes.len(), self.len);
        let mut request = Request::none();
        let (data, len) = (bytes.as_mut_ptr().cast::<c_void>(), bytes.len() as c_int);
        // SAFETY: the buffer has the message's length, and is left alone by the caller's promise.
        let code =
            unsafe { ffi::MPI_Imrecv(data, len, ffi::RSMPI_UINT8_T, &mut self.handle, &mut request.0) };
        check("receive", code).map(|()| request)
    }

    /// Receives a message of a few bytes, which have come with its announcement.
    ///
    /// # Panics
    /// If `bytes` has not the message's length.
    pub fn read(mut self, bytes: &mut [u8]) -> Result<()> {
        assert_eq!(bytes.len(), self.len);
        let (data, len) = (bytes.as_mut_ptr().cast::<c_void>(), bytes.len() as c_int);
        // SAFETY: the buffer has the message's length, and the call ends when it was written.
        let code = unsafe {
            ffi::MPI_Mrecv(data, len, ffi::RSMPI_UINT8_T, &mut self.handle, ffi::RSMPI_STATUS_IGNORE)
        };
        check("receive", code)
    }
}

fn check(operation: &'static str, code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let mut text = [0u8; 1024]; // more than MPI_MAX_ERROR_STRING of any MPI
    let mut len = 0;
    // SAFETY: the buffer is longer than any text.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut len) };
    let reason =
        String::from_utf8_lossy(&text[..usize::try_from(len).unwrap_or(0).min(text.len())]).into_owned();
    Err(Error::Transport { engine: "MPI", operation, reason })
}
