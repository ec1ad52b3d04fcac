// Attention, for one pair of head dims and one division of the work. The CPU names the kernel and
// gives its policy: `encode` for tiles of many rows (context encoding), `query` for few rows
// against many keys (query attention).
#include "include/flash.cuh"

using Division = Policy<HEAD_DIM, VALUE_DIM, STORED_BYTES, ROW_TILES, ROW_WARPS, KEY_WARPS, KEYS, SLOTS, VALUES_FIRST, STAGED_F32>;
static_assert(Division::shared_bytes == SHARED_BYTES && Division::threads == THREADS, "the CPU launches what was compiled");

#define NAME(dtype) NAME_WITH(KERNEL_NAME, dtype, DIMS)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && BLOCKS_SM_90 > 0
KERNEL_WITH_ROOM(NAME(f16), StarFlashParams, THREADS, BLOCKS_SM_90) { Flash<F16, Division>::run(p); }
KERNEL_WITH_ROOM(NAME(bf16), StarFlashParams, THREADS, BLOCKS_SM_90) { Flash<BF16, Division>::run(p); }
#else
KERNEL(NAME(f16), StarFlashParams, THREADS) { Flash<F16, Division>::run(p); }
KERNEL(NAME(bf16), StarFlashParams, THREADS) { Flash<BF16, Division>::run(p); }
#endif
