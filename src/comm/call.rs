//! What ranks must agree on in a collective, and its form in a message.

use super::message::{Message, Pattern};

/// A collective and its extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// `form` tells the regions of the message.
    AllGather {
        bytes: usize,
        form: u64,
    },
    AllToAll {
        bytes: usize,
        form: u64,
    },
    Broadcast {
        root: usize,
        bytes: usize,
    },
}

impl Call {
    pub fn of(pattern: Pattern, message: &Message) -> Self {
        Self::with_regions(pattern, message.regions())
    }

    /// An exchange of messages that are regions of so many bytes.
    pub fn with_regions(pattern: Pattern, regions: &[usize]) -> Self {
        let bytes = regions.iter().sum();
        // FNV-1a, a word at a time.
        let fold = |sum: u64, &len: &usize| (sum ^ len as u64).wrapping_mul(0x0000_0100_0000_01b3);
        let form = regions.iter().fold(0xcbf2_9ce4_8422_2325, fold);
        match pattern {
            Pattern::AllGather => Self::AllGather { bytes, form },
            Pattern::AllToAll => Self::AllToAll { bytes, form },
        }
    }
}

/// What stands at the head of a message.
#[cfg(feature = "mpi")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Header {
    /// The `number`-th exchange of the group, and the collective that it is a part of.
    Call { call: Call, number: u64 },
    /// The sender has left the group after so many exchanges, because of `cause`: another rank that
    /// failed, or itself.
    Left { cause: usize, number: u64, failed: bool },
}

#[cfg(feature = "mpi")]
impl Header {
    /// Bytes of a header.
    pub const LEN: usize = 32;

    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let [kind, of, number, bytes] = match self {
            Self::Call { call: Call::AllGather { bytes, form }, number } => [1, form, number, bytes as u64],
            Self::Call { call: Call::AllToAll { bytes, form }, number } => [2, form, number, bytes as u64],
            Self::Call { call: Call::Broadcast { root, bytes }, number } => {
                [3, root as u64, number, bytes as u64]
            }
            Self::Left { cause, number, failed } => [4, cause as u64, number, u64::from(failed)],
        };
        let mut all = [0; Self::LEN];
        for (to, word) in all.chunks_exact_mut(8).zip([kind, of, number, bytes]) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        all
    }

    /// `None` if these are not the bytes of a header.
    pub fn from_bytes(all: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u64::from_le_bytes(all.get(8 * at..8 * at + 8)?.try_into().ok()?));
        let (kind, of, number, bytes) = (word(0)?, word(1)?, word(2)?, usize::try_from(word(3)?).ok()?);
        Some(match kind {
            1 => Self::Call { call: Call::AllGather { bytes, form: of }, number },
            2 => Self::Call { call: Call::AllToAll { bytes, form: of }, number },
            3 => {
                let call = Call::Broadcast { root: usize::try_from(of).ok()?, bytes };
                Self::Call { call, number }
            }
            4 => Self::Left { cause: usize::try_from(of).ok()?, number, failed: bytes != 0 },
            _ => return None,
        })
    }
}
