//! The errors of every call: each names the argument, what was expected and what came.

use crate::DType;

/// A `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call was refused. Unless a variant says otherwise, nothing was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Extents that do not fit together, or a buffer of the wrong length.
    #[error("{argument}: expected shape {expected}, got {got}")]
    Shape {
        /// The argument at fault.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// Strides that leave the buffer, let elements overlap, or are not contiguous where they must
    /// be.
    #[error("{argument}: expected strides {expected}, got {got}")]
    Stride {
        /// The argument at fault.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// Element types that differ where they must agree, or that the backend does not take.
    #[error("{argument}: expected dtype {expected}, got {got}")]
    DType {
        /// The argument at fault.
        argument: &'static str,
        /// What would have been accepted.
        expected: DType,
        /// What came.
        got: DType,
    },
    /// A number outside its range.
    #[error("{argument}: expected {expected}, got {got}")]
    Value {
        /// The argument at fault.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// A sequence of a batch that is not in order.
    #[error("sequence {index}: {source}")]
    Sequence {
        /// Its index in the batch.
        index: usize,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// The caller's workspace or scratch is smaller than what is asked for.
    #[error("workspace: expected at least {expected} bytes, got {got}")]
    Workspace {
        /// Bytes needed.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// A sequence would grow beyond the rows that it has. The store is as it was.
    #[error("sequence: capacity of {capacity} tokens exceeded: holds {len}, asked for {requested} more")]
    Capacity {
        /// Tokens the sequence can hold.
        capacity: usize,
        /// Tokens it holds.
        len: usize,
        /// Tokens by which it was to grow.
        requested: usize,
    },
    /// A store has too few free pages. The store is as it was.
    #[error("store: {needed} more pages needed, {free} free")]
    Pages {
        /// Pages asked for.
        needed: usize,
        /// Pages that no sequence has.
        free: usize,
    },
    /// Every slot of a ring of staging memory is still being copied from. Try again after the
    /// stream has moved on.
    #[error("staging: all {slots} slots are in flight")]
    Busy {
        /// Slots of the ring.
        slots: usize,
    },
    /// A peer left the group (dropped or panicked) before a collective was complete.
    /// The receive buffer's contents are unspecified.
    #[error("collective: rank {rank} left the group")]
    Disconnected {
        /// The first rank found missing.
        rank: usize,
    },
    /// A peer did not reach a collective in time. The receive buffer's contents are unspecified.
    #[error("collective: rank {rank} did not arrive within {seconds} s")]
    Timeout {
        /// The first rank found missing.
        rank: usize,
        /// How long was waited.
        seconds: f64,
    },
    /// A peer called the collective with something that does not match this rank's call.
    #[error("collective: rank {rank}: {argument}: expected {expected}, got {got}")]
    Peer {
        /// The rank that differs.
        rank: usize,
        /// What differs.
        argument: &'static str,
        /// What this rank has.
        expected: String,
        /// What the peer has.
        got: String,
    },
    /// An error of the engine under a collective, in its own words. The receive buffer's contents
    /// are unspecified.
    #[error("{engine}: {operation}: {reason}")]
    Transport {
        /// `MPI` or `NCCL`.
        engine: &'static str,
        /// What was asked of it.
        operation: &'static str,
        /// Its answer.
        reason: String,
    },
    /// Something this machine or this build has not got: a driver, a device, a library.
    #[error("{what} is not available: {reason}")]
    Unavailable {
        /// What is missing.
        what: &'static str,
        /// Why, and what would help.
        reason: String,
    },
    /// A kernel did what it must not. Only the checks of the SIMT emulator find this. Outputs are
    /// unspecified.
    #[error("kernel {kernel}: {reason}")]
    Kernel {
        /// Its name.
        kernel: String,
        /// What went wrong, where.
        reason: String,
    },
    /// An error of the CUDA driver, kept as it came. Outputs are unspecified.
    #[cfg(feature = "cuda")]
    #[error("CUDA driver: {operation}: {source}")]
    Driver {
        /// What was asked of it.
        operation: &'static str,
        /// Its answer.
        source: cudarc::driver::DriverError,
    },
    /// An error of candle, kept as it came.
    #[cfg(feature = "candle")]
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn shape(argument: &'static str, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Shape { argument, expected: expected.into(), got: got.into() }
    }

    pub(crate) fn stride(
        argument: &'static str,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Self {
        Self::Stride { argument, expected: expected.into(), got: got.into() }
    }

    /// For a scratch of elements of `T`, of which there are `got` where `expected` are needed.
    pub(crate) fn scratch<T>(expected: usize, got: usize) -> Self {
        let bytes = |len: usize| len.saturating_mul(size_of::<T>());
        Self::Workspace { expected: bytes(expected), got: bytes(got) }
    }

    pub(crate) fn value(argument: &'static str, expected: impl Into<String>, got: impl ToString) -> Self {
        Self::Value { argument, expected: expected.into(), got: got.to_string() }
    }
}
