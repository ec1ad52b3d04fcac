//! How the attention kernels divide their work, for each head dim. build.rs compiles what stands here, and the plans launch it.

/// The head dims that kernels can be built for.
pub const HEAD_DIMS: [usize; 5] = [64, 96, 128, 192, 256];

/// The division of an attention kernel: `cuda/include/flash.cuh` says what its parts mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    pub kernel: &'static str,
    pub head_dim: usize,
    /// Tiles of 16 rows of a warp.
    pub row_tiles: usize,
    /// Warps that divide the rows.
    pub row_warps: usize,
    /// Warps that divide the keys.
    pub key_warps: usize,
    /// Keys of a tile.
    pub keys: usize,
    /// Tiles of keys or values in shared memory.
    pub slots: usize,
}

impl Policy {
    /// For tiles of many rows, bound by products.
    ///
    /// Up to a head dim of 128 a warp has 32 rows, so that each square read from shared memory serves two products (with 16 rows the
    /// reads take as long as the products), and so many keys that the accumulators of both products just fit 255 registers: what a step
    /// costs beyond products is then shared by most of them. Larger heads leave registers for 16 rows. Two blocks fit a multiprocessor,
    /// one where it has 100 KB of shared memory.
    pub const fn encode(head_dim: usize) -> Self {
        let row_tiles = if head_dim <= 128 { 2 } else { 1 };
        let keys = match head_dim {
            64 => 128,
            96 => 96,
            _ => 64,
        };
        Self { kernel: "encode", head_dim, row_tiles, row_warps: 4, key_warps: 1, keys, slots: 2 }
    }

    /// For up to 16 rows, bound by reading keys and values: four warps walk keys of their own, without a barrier, and as many slots as fit
    /// a multiprocessor of 100 KB keep copies on their way.
    pub const fn query(head_dim: usize) -> Self {
        let keys = if head_dim <= 64 { 32 } else { 16 };
        let mut policy =
            Self { kernel: "query", head_dim, row_tiles: 1, row_warps: 1, key_warps: 4, keys, slots: 6 };
        while policy.shared_bytes() > 92 * 1024 {
            policy.slots -= 1;
        }
        policy
    }

    /// Query rows of a block.
    pub const fn rows(&self) -> usize {
        16 * self.row_tiles * self.row_warps
    }

    pub const fn threads(&self) -> usize {
        32 * self.row_warps * self.key_warps
    }

    /// What is kept of the list of keys; the queries and each ring's slots in 16 bits.
    pub const fn shared_bytes(&self) -> usize {
        let list_bytes = (16 + 4 * self.rows() + (16 + 4) * self.threads()).next_multiple_of(128);
        list_bytes + 2 * self.head_dim * (self.rows() + self.key_warps * self.slots * self.keys)
    }
}

/// Threads of a block of the merge, which has neither shared memory nor barriers of the block.
pub const MERGE_THREADS: usize = 256;
/// Threads of a block of the append kernel, likewise.
pub const APPEND_THREADS: usize = 256;
