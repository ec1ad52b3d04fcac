// Kernels that ask whether a Hopper GPU, and the emulator, do what hopper.cuh says. They are part
// of no plan. tests/hopper has their parameters once more, in Rust.
#include "include/hopper.cuh"
#include "include/shared_tile.cuh"

// Shared memory from a multiple of 1,024 on: mbarriers, and 1,024 bytes further what is swizzled.
DEVICE Shared barriers_at() { return (shared_memory() + 1023) / 1024 * 1024; }

struct BoxParams {
    TensorMap map;
    uint64_t out;
    int32_t at[4];
    uint32_t bytes;
    uint32_t padding[9];
};

// One box, as it lies in shared memory.
KERNEL(probe_box, BoxParams, 32) {
    const Shared full = barriers_at();
    const Shared box = full + 1024;
    if (thread_index() == 0) {
        prefetch_tensor_map(p.map);
        mbarrier_init(full, 1);
        fence_mbarrier_init();
    }
    sync_block();
    if (thread_index() == 0) {
        mbarrier_arrive_expect_tx(full, p.bytes);
        copy_box(box, p.map, p.at[0], p.at[1], p.at[2], p.at[3], full);
    }
    mbarrier_wait_parity(full, 0);
    for (uint32_t i = thread_index(); i < p.bytes / 4; i += 32) {
        store(reinterpret_cast<uint32_t*>(p.out) + i, shared_load4(box + 4 * i));
    }
}

struct WgmmaParams {
    // f32 [64, columns].
    uint64_t out;
    // The operand B: where it starts in its memory, and in the descriptor.
    uint32_t start;
    uint32_t leading;
    uint32_t stride;
    uint32_t transposed;
    // Bytes of its memory. Each element is its own index there, ten bits of it from `shift` on.
    uint32_t bytes;
    uint32_t shift;
    uint32_t a_in_registers;
    uint32_t padding;
};

// Of each form there is a straight line of its own: where lines meet the compiler would add fences.
template <bool Transposed, int Columns, class A>
DEVICE void multiply_one_hot(const WgmmaParams& p, const A& a, uint64_t b) {
    float d[Columns / 8][4] = {};
    wgmma_registers(d);
    wgmma_fence();
    wgmma<F16, Transposed>(d, a, b, false);
    wgmma_commit_group();
    wgmma_wait_group<0>();
    wgmma_registers(d);
    const uint32_t first = thread_index() / 32 * 16 + thread_index() % 32 / 4;
#pragma unroll
    for (int j = 0; j < Columns / 8; j++) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const uint32_t column = 8 * j + thread_index() % 4 * 2 + c % 2;
            store(reinterpret_cast<float*>(p.out) + (first + c / 2 * 8) * Columns + column, d[j][c]);
        }
    }
}

// Row m of A is 1 at depth m % 16 alone, so that row m of the product is B's depth m % 16: where
// its elements were read.
template <int Columns>
DEVICE void one_hot(const WgmmaParams& p) {
    const Shared a = barriers_at();
    const Shared b = a + 64 * 128;
    const uint32_t row = thread_index() / 2;
    for (uint32_t chunk = thread_index() % 2 * 4; chunk < thread_index() % 2 * 4 + 4; chunk++) {
        uint32_t words[4] = {};
        if (chunk == row % 16 / 8) {
            words[row % 8 / 2] = row % 2 ? 0x3c000000 : 0x3c00;
        }
        shared_store(SharedTile<64>::at(a, row, chunk), uint4{words[0], words[1], words[2], words[3]});
    }
    for (uint32_t i = thread_index(); i < p.bytes / 4; i += 128) {
        const auto index = [&](uint32_t element) { return static_cast<float>(element >> p.shift & 1023); };
        shared_store(b + 4 * i, F16::pack(index(2 * i), index(2 * i + 1)));
    }
    fence_proxy_async();
    sync_block();
    const uint64_t descriptor = wgmma_descriptor(b + p.start, p.leading, p.stride);
    const uint32_t lane_row = thread_index() % 32 / 4, lane_column = thread_index() % 4 * 2;
    const uint32_t one = lane_row == lane_column ? 0x3c00 : lane_row == lane_column + 1 ? 0x3c000000 : 0;
    const uint32_t registers[4] = {one, 0, 0, one};
    const uint64_t matrix = wgmma_descriptor(a, 16, 1024);
    if (p.transposed && p.a_in_registers) {
        multiply_one_hot<true, Columns>(p, registers, descriptor);
    } else if (p.transposed) {
        multiply_one_hot<true, Columns>(p, matrix, descriptor);
    } else if (p.a_in_registers) {
        multiply_one_hot<false, Columns>(p, registers, descriptor);
    } else {
        multiply_one_hot<false, Columns>(p, matrix, descriptor);
    }
}

KERNEL(probe_wgmma_n64, WgmmaParams, 128) { one_hot<64>(p); }
KERNEL(probe_wgmma_n80, WgmmaParams, 128) { one_hot<80>(p); }
KERNEL(probe_wgmma_n96, WgmmaParams, 128) { one_hot<96>(p); }
KERNEL(probe_wgmma_n112, WgmmaParams, 128) { one_hot<112>(p); }
KERNEL(probe_wgmma_n128, WgmmaParams, 128) { one_hot<128>(p); }
KERNEL(probe_wgmma_n176, WgmmaParams, 128) { one_hot<176>(p); }
KERNEL(probe_wgmma_n192, WgmmaParams, 128) { one_hot<192>(p); }
KERNEL(probe_wgmma_n256, WgmmaParams, 128) { one_hot<256>(p); }

struct RingParams {
    // bf16 [rows, depth] and [depth, 64], in boxes of 64×64.
    TensorMap a;
    TensorMap b;
    uint64_t b_data;
    // f32 [rows, 64].
    uint64_t out;
    // A multiple of 64.
    uint32_t depth;
    // Whether threads copy B.
    uint32_t by_threads;
    // A planted fault: a stage is released while it is read.
    uint32_t early;
    uint32_t padding[9];
};

// Two stages of a box of A for each of two warp groups, and a box of B for both.
struct Stages {
    static constexpr uint32_t box_bytes = 64 * 128;
    static constexpr uint32_t stages = 2;
    Shared full, empty, boxes;

    DEVICE explicit Stages(Shared memory) : full(memory), empty(memory + 8 * stages), boxes(memory + 1024) {}
    DEVICE static uint32_t parity(uint32_t step) { return step / stages % 2; }
    DEVICE Shared full_at(uint32_t step) const { return full + step % stages * 8; }
    DEVICE Shared empty_at(uint32_t step) const { return empty + step % stages * 8; }
    DEVICE Shared a(uint32_t step, uint32_t group) const { return boxes + (step % stages * 3 + group) * box_bytes; }
    DEVICE Shared b(uint32_t step) const { return a(step, 2); }
    DEVICE Shared staging(uint32_t group) const { return boxes + (3 * stages + 2 * group) * box_bytes; }
};

DEVICE void produce(const RingParams& p, const Stages& ring) {
    setmaxnreg_dec<24>();
    if (!p.by_threads && (warp_index() != 0 || !elect_one())) {
        return;
    }
    const uint32_t row = thread_index() / 2;
    for (uint32_t step = 0; step < p.depth / 64; step++) {
        mbarrier_wait_parity(ring.empty_at(step), ring.parity(step) ^ 1);
        const Shared full = ring.full_at(step);
        if (thread_index() == 0) {
            mbarrier_arrive_expect_tx(full, (p.by_threads ? 2 : 3) * Stages::box_bytes);
            for (int group = 0; group < 2; group++) {
                const int first = (block_index() * 2 + group) * 64;
                copy_box(ring.a(step, group), p.a, step * 64, first, 0, 0, full);
            }
            if (!p.by_threads) {
                copy_box(ring.b(step), p.b, 0, step * 64, 0, 0, full);
            }
        }
        if (p.by_threads) {
            const uint16_t* from = reinterpret_cast<const uint16_t*>(p.b_data) + (step * 64 + row) * 64;
            for (uint32_t chunk = thread_index() % 2 * 4; chunk < thread_index() % 2 * 4 + 4; chunk++) {
                copy_async(SharedTile<64>::at(ring.b(step), row, chunk), from + chunk * 8, false);
            }
            copy_mbarrier_arrive_noinc(full);
        }
    }
}

// The stage of a step is released when the product of the next is under way.
DEVICE void consume(const RingParams& p, const Stages& ring) {
    setmaxnreg_inc<240>();
    const uint32_t group = warp_index() / 4 - 1, thread = thread_index() % 128;
    float d[8][4] = {};
    for (uint32_t step = 0; step < p.depth / 64; step++) {
        mbarrier_wait_parity(ring.full_at(step), ring.parity(step));
        if (p.by_threads) {
            fence_proxy_async();
        }
        wgmma_registers(d);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            wgmma<BF16, true>(d, wgmma_descriptor(ring.a(step, group) + 32 * k, 16, 1024),
                              wgmma_descriptor(ring.b(step) + 2048 * k, 0, 1024), step > 0 || k > 0);
        }
        wgmma_commit_group();
        if (p.early && thread == 0) {
            mbarrier_arrive(ring.empty_at(step));
        }
        wgmma_wait_group<1>();
        if (!p.early && step > 0 && thread == 0) {
            mbarrier_arrive(ring.empty_at(step - 1));
        }
    }
    wgmma_wait_group<0>();
    wgmma_registers(d);
    // Through shared memory, so that whole rows are written.
    const Shared staging = ring.staging(group);
    const uint32_t first = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const Shared to = staging + first * 256 + j * 32 + thread % 4 * 8;
        shared_store(to, float2{d[j][0], d[j][1]});
        shared_store(to + 8 * 256, float2{d[j][2], d[j][3]});
    }
    bar_sync(1 + group, 128);
    float* const out = reinterpret_cast<float*>(p.out) + (block_index() * 2 + group) * 64 * 64;
    for (uint32_t i = thread; i < 64 * 64 / 4; i += 128) {
        store(reinterpret_cast<float4*>(out) + i, shared_load_float4(staging + 16 * i));
    }
}

// A product of [128 · blocks, depth] and [depth, 64] by a producer and two consumers.
KERNEL_WITH_ROOM(probe_ring, RingParams, 384, 1) {
    const Stages ring(barriers_at());
    if (thread_index() == 0) {
        for (uint32_t stage = 0; stage < Stages::stages; stage++) {
            mbarrier_init(ring.full_at(stage), p.by_threads ? 1 + 128 : 1);
            mbarrier_init(ring.empty_at(stage), 2);
        }
        fence_mbarrier_init();
    }
    sync_block();
    if (warp_index() < 4) {
        produce(p, ring);
    } else {
        consume(p, ring);
    }
}
