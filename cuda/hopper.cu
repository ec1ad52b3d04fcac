// Attention of many rows on Hopper GPUs, for one pair of head dims. The CPU names the kernel and
// gives its policy, as for flash.cu.
#include "include/warp_groups.cuh"

using Division = GroupPolicy<HEAD_DIM, VALUE_DIM, GROUPS, KEYS, STAGES>;
static_assert(Division::shared_bytes == SHARED_BYTES && Division::threads == THREADS, "the CPU launches what was compiled");

#define NAME(dtype) NAME_WITH(KERNEL_NAME, dtype, DIMS)

// With room for one block: the compiler takes the warp groups' own counts of registers only where
// launch bounds name blocks.
KERNEL_WITH_ROOM(NAME(f16), StarFlashParams, THREADS, 1) { WarpGroups<F16, Division>::run(p); }
KERNEL_WITH_ROOM(NAME(bf16), StarFlashParams, THREADS, 1) { WarpGroups<BF16, Division>::run(p); }
