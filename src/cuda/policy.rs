//! How the attention kernels divide their work, for each head dim. build.rs compiles what stands
//! here, and the plans launch it.
//!
//! There are two families: by warps that copy and multiply alike, on every GPU, and by warp groups
//! of which one copies, on Hopper alone.

/// The head dims that have kernels of their own, with values of the same dim.
pub const HEAD_DIMS: [usize; 5] = [64, 96, 128, 192, 256];

/// Elements of a head of queries and keys, and of values and outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    pub key: usize,
    pub value: usize,
}

/// All that kernels are built for. Those for the longest keys compute longer values in parts of so
/// many columns, each by a block that computes the scores anew: 512, or DeepSeek's 576 and 512.
pub const DIMS: [Dims; 7] = [
    Dims::same(64),
    Dims::same(96),
    Dims::same(128),
    Dims { key: 192, value: 128 },
    Dims::same(192),
    Dims::same(256),
    Dims { key: 576, value: 256 },
];

impl Dims {
    pub const fn same(dim: usize) -> Self {
        Self { key: dim, value: dim }
    }

    /// Whether the kernels for these compute values in parts.
    pub const fn in_parts(self) -> bool {
        self.key > 256 && self.value < self.key
    }

    /// The dims of the kernels that do the least for heads of these: shorter rows are padded with
    /// zeros in shared memory. Rows are moved 16 bytes at a time.
    pub fn of_kernel(self) -> Option<Self> {
        let fits =
            |kernel: &Self| self.key <= kernel.key && (self.value <= kernel.value || kernel.in_parts());
        let work = |kernel: &Self| (kernel.key + kernel.value) * self.parts(*kernel);
        let multiples = self.key.is_multiple_of(8) && self.value.is_multiple_of(8);
        DIMS.into_iter().filter(|kernel| multiples && fits(kernel)).min_by_key(work)
    }

    /// In how many parts a kernel computes values.
    pub const fn parts(self, kernel: Self) -> usize {
        self.value.div_ceil(kernel.value)
    }
}

impl std::fmt::Display for Dims {
    /// As in the names of kernels: `d128`, or `d192_v128`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "d{}", self.key)?;
        if self.value != self.key { write!(f, "_v{}", self.value) } else { Ok(()) }
    }
}

/// The division of an attention kernel: `cuda/include/flash.cuh` says what its parts mean, and
/// `cuda/include/warp_groups.cuh` where there are warps that copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    pub kernel: &'static str,
    pub dims: Dims,
    /// Bytes of an element of keys and values: 2, or 1 for E4M3.
    pub stored_bytes: usize,
    /// Tiles of 16 rows of a warp.
    pub row_tiles: usize,
    /// Warps that divide the rows.
    pub row_warps: usize,
    /// Warps that divide the keys.
    pub key_warps: usize,
    /// Warps that only copy, beside the others; 0 where all do.
    pub copy_warps: usize,
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
    dims: Dims::same(0),
    stored_bytes: 2,
    row_tiles: 1,
    row_warps: 1,
    key_warps: 1,
    copy_warps: 0,
    keys: 0,
    slots: 2,
    values_first: false,
    staged_f32: false,
    blocks_sm_90: 0,
};

impl Policy {
    /// For tiles of many rows, bound by products.
    ///
    /// Up to a value dim of 128 a warp has 32 rows, so that each square read from shared memory
    /// serves two products (with 16 rows the reads take as long as the products), and so many keys
    /// that the accumulators of both products just fit 255 registers: what a step costs beyond
    /// products is then shared by most of them. Larger heads leave registers for 16 rows. Two
    /// blocks fit a multiprocessor, one where it has 100 KB of shared memory. The longest heads
    /// leave room there for 32 rows.
    pub const fn encode(dims: Dims) -> Self {
        let row_tiles = if dims.value <= 128 { 2 } else { 1 };
        let (row_warps, keys) = match dims.key {
            64 => (4, 128),
            96 => (4, 96),
            576 => (2, 32),
            _ => (4, 64),
        };
        Self { kernel: "encode", dims, row_tiles, row_warps, keys, ..PLAIN }
    }

    /// For 33 to 64 rows, where tiles of `encode` have 128: as that with half the rows and the same
    /// tiles of keys. The products of a row accumulate in the same order, so both give it the same
    /// bits. Hopper's shared memory has room for four blocks; d64 comes by as few registers
    /// unasked, and spills some if asked.
    pub const fn encode_64(dims: Dims) -> Option<Self> {
        let encode = Self::encode(dims);
        if encode.rows() != 128 {
            return None;
        }
        let blocks_sm_90 = if dims.key > 64 && dims.key <= 128 { 4 } else { 0 };
        Some(Self { kernel: "encode_64", row_tiles: 1, blocks_sm_90, ..encode })
    }

    /// `encode` on a Hopper GPU: two warp groups of 64 rows, and one that copies, for values of up
    /// to 128 elements. So many keys that the accumulators of both products, and probabilities, fit
    /// the registers that the groups get. There are two stages of keys and two of values, or as
    /// many as have 64 KB of keys. Steps are whole ones of the kernels for fp8 keys, which share the
    /// plan: those of d96 are not.
    pub const fn hopper(dims: Dims) -> Option<Self> {
        let stages = match dims {
            Dims { key: 64, value: 64 } => 4,
            Dims { key: 128 | 192, value: 128 } => 2,
            _ => return None,
        };
        let encode = Self { kernel: "encode_hopper", dims, ..PLAIN };
        Some(Self { row_warps: 8, copy_warps: 4, keys: 128, slots: 2 * stages, ..encode })
    }

    /// Whether it is a kernel of the family for Hopper.
    pub const fn is_hopper(&self) -> bool {
        self.copy_warps > 0
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
    pub fn variants(dims: Dims) -> Vec<Self> {
        let plain = Self::encode(dims);
        match dims.key {
            _ if dims != Dims::same(dims.key) => Vec::new(),
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
    ///
    /// The longest heads leave room for two warps and two slots.
    pub const fn query(dims: Dims) -> Self {
        let keys = if dims.key <= 64 { 32 } else { 16 };
        let key_warps = if dims.key <= 256 { 4 } else { 2 };
        Self { kernel: "query", dims, key_warps, keys, slots: 6, ..PLAIN }.with_slots_that_fit()
    }

    const fn with_slots_that_fit(mut self) -> Self {
        while self.shared_bytes() > 92 * 1024 && self.slots > 2 {
            self.slots -= 1;
        }
        self
    }

    /// The kernel that does the same with fp8 keys and values, so that a plan serves both:
    /// its tiles have at least as many rows, and its steps walk as many keys or a part of them. For
    /// `encode_64` and `encode_hopper` that is the one for `encode`. None for the longest heads.
    pub fn e4m3(&self) -> Option<Self> {
        if self.dims.in_parts() {
            return None;
        }
        Some(match self.kernel {
            "query" => {
                // In bytes about as many are on their way.
                let plain =
                    Self { kernel: "query_e4m3", stored_bytes: 1, slots: 10, ..Self::query(self.dims) };
                plain.with_slots_that_fit()
            }
            _ => Self { kernel: "encode_e4m3", stored_bytes: 1, ..Self::encode(self.dims) },
        })
    }

    /// Name of the entry point for queries of a type, which is `f16` or `bf16`.
    pub fn entry(&self, dtype: impl std::fmt::Display) -> String {
        format!("{}_{dtype}_{}", self.kernel, self.dims)
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
        32 * (self.row_warps * self.key_warps + self.copy_warps)
    }

    /// Threads that copy keys and values.
    const fn copy_threads(&self) -> usize {
        if self.is_hopper() { 32 * self.copy_warps } else { self.threads() }
    }

    /// What is kept of the list of keys (its ends and border, each row's limit and token, for each
    /// thread two addresses and a flag), then the queries in 16 bits and each ring's slots. Two
    /// slots are one for keys and one for values, others serve both. fp8 elements are widened
    /// to one more tile.
    ///
    /// For Hopper each stage has two mbarriers, tiles are cut into panels of 64 columns, and all
    /// begins at a multiple of 1,024.
    pub const fn shared_bytes(&self) -> usize {
        let Dims { key, value } = self.dims;
        let list_bytes = 48 + (4 + 1) * self.rows() + (16 + 4) * self.copy_threads();
        if self.is_hopper() {
            let list_bytes = (list_bytes.next_multiple_of(8) + 16 * self.slots).next_multiple_of(1024);
            let (key, value) = (key.next_multiple_of(64), value.next_multiple_of(64));
            return 1024 + list_bytes + 2 * (key * self.rows() + self.slots / 2 * self.keys * (key + value));
        }
        let list_bytes = list_bytes.next_multiple_of(128);
        let elements = if self.slots == 2 { key + value } else { self.slots * key };
        let wide = if self.stored_bytes == 1 { 2 * key } else { 0 };
        let ring = self.keys * (elements * self.stored_bytes + wide);
        list_bytes + 2 * key * self.rows() + self.key_warps * ring
    }
}

/// Threads of a block of the merge, which has neither shared memory nor barriers of the block.
pub const MERGE_THREADS: usize = 256;
/// Threads of a block of the append kernel, likewise.
pub const APPEND_THREADS: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_take_the_kernels_that_do_the_least_for_them() {
        let of = |key: usize, value: usize| {
            let dims = Dims { key, value };
            dims.of_kernel().map(|kernel| (kernel.key, kernel.value, dims.parts(kernel)))
        };
        for dims in DIMS {
            assert_eq!(of(dims.key, dims.value), Some((dims.key, dims.value, 1)));
        }
        assert_eq!(of(8, 8), Some((64, 64, 1)));
        assert_eq!(of(72, 72), Some((96, 96, 1)));
        assert_eq!(of(80, 80), Some((96, 96, 1)));
        assert_eq!(of(112, 112), Some((128, 128, 1)));
        assert_eq!(of(40, 96), Some((96, 96, 1)));
        assert_eq!(of(160, 128), Some((192, 128, 1)));
        assert_eq!(of(160, 160), Some((192, 192, 1)));
        assert_eq!(of(512, 512), Some((576, 256, 2)));
        assert_eq!(of(576, 512), Some((576, 256, 2)));
        assert_eq!(of(128, 600), Some((576, 256, 3)));
        for (key, value) in [(584, 64), (130, 128), (128, 130)] {
            assert_eq!(of(key, value), None);
        }
    }

    /// A plan is made before it is known of which type keys are.
    #[test]
    fn kernels_for_8_bits_take_the_tiles_of_the_others() {
        for dims in DIMS.into_iter().filter(|dims| !dims.in_parts()) {
            let policies = [
                Some(Policy::encode(dims)),
                Policy::encode_64(dims),
                Policy::hopper(dims),
                Some(Policy::query(dims)),
            ];
            for policy in policies.into_iter().flatten() {
                let narrow = policy.e4m3().unwrap();
                assert!(policy.step_keys().is_multiple_of(narrow.step_keys()), "{dims}");
                assert!(narrow.rows() >= policy.rows(), "{dims}");
            }
        }
    }

    /// The least that a block has on chips of compute capability 8.0 and up.
    #[test]
    fn every_kernel_fits_99_kb_of_shared_memory() {
        for dims in DIMS {
            let plain = [Policy::encode(dims), Policy::query(dims)];
            for policy in plain.into_iter().chain(plain.iter().filter_map(Policy::e4m3)) {
                assert!(policy.shared_bytes() <= 99 * 1024, "{} {dims}", policy.kernel);
            }
        }
    }

    #[test]
    fn every_kernel_for_hopper_fits_227_kb_of_shared_memory() {
        for policy in DIMS.into_iter().filter_map(Policy::hopper) {
            assert!(policy.shared_bytes() <= 227 * 1024, "{}", policy.dims);
        }
    }
}
