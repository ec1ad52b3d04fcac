//! What ranks must agree on in a collective, and its form in a message.

/// A collective and its extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    AllGather { bytes: usize },
    AllToAll { bytes: usize },
    Broadcast { root: usize, bytes: usize },
}
