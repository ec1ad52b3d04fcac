//! How the attention kernels divide their work, for each head dim. build.rs compiles what stands
//! here, and the plans launch it.

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
    /// Whether a step waits for its values before the softmax.
    pub values_first: bool,
    /// Whether outputs of f32 go through shared memory.
    pub staged_f32: bool,
    /// Blocks that a multiprocessor of sm_90 shall have registers for; 0 leaves it to the compiler.
    pub blocks_sm_90: usize,
}

/// The defaults of what the variants change.
const PLAIN: Policy = Policy {
    kernel: "",
    head_dim: 0,
    row_tiles: 1,
    row_warps: 1,
    key_warps: 1,
    keys: 0,
    slots: 2,
    values_first: false,
    staged_f32: false,
    blocks_sm_90: 0,
};

impl Policy {
    /// For tiles of many rows, bound by products.
    ///
    /// Up to a head dim of 128 a warp has 32 rows, so that each square read from shared memory
    /// serves two products (with 16 rows the reads take as long as the products), and so many keys
    /// that the accumulators of both products just fit 255 registers: what a step costs beyond
    /// products is then shared by most of them. Larger heads leave registers for 16 rows. Two
    /// blocks fit a multiprocessor, one where it has 100 KB of shared memory.
    pub const fn encode(head_dim: usize) -> Self {
        let row_tiles = if head_dim <= 128 { 2 } else { 1 };
        let keys = match head_dim {
            64 => 128,
            96 => 96,
            _ => 64,
        };
        Self { kernel: "encode", head_dim, row_tiles, row_warps: 4, keys, ..PLAIN }
    }

    /// For 33 to 64 rows, where tiles of `encode` have 128: as that with half the rows and the same
    /// tiles of keys. The products of a row accumulate in the same order, so both give it the same
    /// bits. Hopper's shared memory has room for four blocks; d64 comes by as few registers unasked,
    /// and spills some if asked.
    pub const fn encode_64(head_dim: usize) -> Option<Self> {
        let encode = Self::encode(head_dim);
        if encode.rows() != 128 {
            return None;
        }
        let blocks_sm_90 = if head_dim > 64 { 4 } else { 0 };
        Some(Self { kernel: "encode_64", row_tiles: 1, blocks_sm_90, ..encode })
    }

    /// Other divisions of `encode`, which only a GPU can tell the worth of. They are built with the
    /// feature `variants` and timed side by side by the bench `gpu`.
    ///
    /// - `encode_values_first`: between the softmax and the second product there is no barrier, so
    ///   that exponentials of one warp run beside products of another;
    /// - `encode_wide`: eight warps share each tile of keys, so that it is read from the L2 cache
    ///   half as often;
    /// - `encode_staged_f32`: outputs of f32 are written in whole lines.
    #[cfg(feature = "variants")]
    pub fn variants(head_dim: usize) -> Vec<Self> {
        let plain = Self::encode(head_dim);
        match head_dim {
            64 => vec![Self { kernel: "encode_values_first", values_first: true, ..plain }],
            128 => vec![
                Self { kernel: "encode_values_first", values_first: true, ..plain },
                Self { kernel: "encode_staged_f32", staged_f32: true, ..plain },
            ],
            192 | 256 => vec![Self { kernel: "encode_wide", row_warps: 8, ..plain }],
            _ => Vec::new(),
        }
    }

    /// For up to 16 rows, bound by reading keys and values: four warps walk keys of their own,
    /// without a barrier, and as many slots as fit a multiprocessor of 100 KB keep copies on their
    /// way.
    pub const fn query(head_dim: usize) -> Self {
        let keys = if head_dim <= 64 { 32 } else { 16 };
        let mut policy = Self { kernel: "query", head_dim, key_warps: 4, keys, slots: 6, ..PLAIN };
        while policy.shared_bytes() > 92 * 1024 {
            policy.slots -= 1;
        }
        policy
    }

    /// Query rows of a block.
    pub const fn rows(&self) -> usize {
        16 * self.row_tiles * self.row_warps
    }

    /// Keys that a block walks in one step. Splits are whole steps.
    pub const fn step_keys(&self) -> usize {
        self.keys * self.key_warps
    }

    pub const fn threads(&self) -> usize {
        32 * self.row_warps * self.key_warps
    }

    /// What is kept of the list of keys (its ends and border, each row's limit and token, for each
    /// thread two addresses and a flag), then the queries and each ring's slots in 16 bits.
    pub const fn shared_bytes(&self) -> usize {
        let list_bytes = (48 + (4 + 1) * self.rows() + (16 + 4) * self.threads()).next_multiple_of(128);
        list_bytes + 2 * self.head_dim * (self.rows() + self.key_warps * self.slots * self.keys)
    }
}

/// Threads of a block of the merge, which has neither shared memory nor barriers of the block.
pub const MERGE_THREADS: usize = 256;
/// Threads of a block of the append kernel, likewise.
pub const APPEND_THREADS: usize = 256;
