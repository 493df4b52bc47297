// Small kernels for test_async.py: one right use of barriers, tensor copies and products, the same
// with one fault each, and products of operands that the test has laid out.
#include "hopper.cuh"

namespace
{

enum fault {
    FINE,
    NO_PROXY_FENCE,
    ACCUMULATORS_WRITTEN,
    ACCUMULATORS_READ, // no fault is named, but the result is NaN
    OPERAND_OVERWRITTEN,
    COPY_READ_EARLY,
    COPY_USED_EARLY,
    NO_WARPGROUP_FENCE,
    REFILLED_EARLY,
    TOO_MANY_ARRIVALS,
    BYTES_NOT_EXPECTED,
    INIT_NOT_SHARED,
    INIT_NOT_FENCED,
    PRODUCTS_LEFT,
    BOX_MISALIGNED,
    BARRIER_OVERWRITTEN,
    DESCRIPTORS_DIFFER,
    COPY_LEFT,
    COPY_OVER_STORES,
    STORED_WITHOUT_BARRIER,
    FAULTS
};

struct pipeline_args {
    const uint16_t *b; // [128, 64]
    float *out;        // [64, 128]
    tensor_map a;      // [64, 64]
};

HB_DEVICE void write_out(float *out, const float *d)
{
    const int row = 16 * warp_index() + lane_index() / 4;
    for (int r = 0; r < 64; r++)
        store(out + (row + 8 * (r / 2 % 2)) * 128 + 8 * (r / 4) + 2 * (lane_index() % 4) + r % 2,
              d[r]);
}

// out = A B: a tensor copy brings A, the threads store B.
template <int FAULT> HB_KERNEL_RESIDENT(160, 1) pipeline(HB_ARGS pipeline_args a)
{
    unsigned char *a_tile = shared_tiles() + (FAULT == BOX_MISALIGNED ? 512 : 0);
    unsigned char *b_tile = shared_tiles() + 9216;
    uint64_t *full = (uint64_t *)(b_tile + 16384);
    if (thread_index() == 0) {
        mbarrier_init(full, 129);
        if (FAULT != INIT_NOT_FENCED) fence_mbarrier_init();
    }
    if (FAULT == COPY_OVER_STORES && thread_index() == 128) shared_store((uint32_t *)a_tile, 0u);
    if (FAULT != INIT_NOT_SHARED) block_sync();
    if (thread_index() == 128) {
        mbarrier_arrive_expect(
            full, FAULT == BYTES_NOT_EXPECTED || FAULT == TOO_MANY_ARRIVALS ? 9000 : 8192);
        tensor_copy(a_tile, &a.a, 0, 0, full);
        if (FAULT == TOO_MANY_ARRIVALS) mbarrier_arrive(full);
    }
    if (thread_index() >= 128) return;

    for (int i = thread_index(); i < 1024; i += 128) // piece i % 8 of line i / 8
        shared_store((uint4 *)(b_tile + swizzle128((uint32_t)i * 16)), load((uint4 *)a.b + i));
    if (FAULT != NO_PROXY_FENCE) fence_async_proxy();
    if (FAULT == STORED_WITHOUT_BARRIER) {
        if (thread_index() == 0)
            for (int i = 0; i < 128; i++) mbarrier_arrive(full);
    } else {
        mbarrier_arrive(full);
    }
    if (FAULT == BARRIER_OVERWRITTEN && thread_index() == 7) shared_store(full, (uint64_t)0);
    if (FAULT == COPY_LEFT) return;
    if (FAULT == COPY_READ_EARLY) (void)shared_load((uint32_t *)a_tile);
    if (FAULT != COPY_USED_EARLY) mbarrier_wait(full, 0);

    float d[64] = {0.0f};
    if (FAULT != NO_WARPGROUP_FENCE) warpgroup_fence();
    for (int k = 0; k < 4; k++)
        warpgroup_mma_64x128x16<1, 0>(
            d,
            operand(a_tile + 32 * k, FAULT == DESCRIPTORS_DIFFER ? 16 * (warp_index() % 2) : 0,
                    1024),
            operand(b_tile + 32 * k, 0, 1024), k > 0);
    warpgroup_commit();
    if (FAULT == ACCUMULATORS_WRITTEN && thread_index() == 5) d[3] = 1.0f;
    if (FAULT == ACCUMULATORS_READ) store(a.out + thread_index(), d[1] + 1.0f);
    if (FAULT == OPERAND_OVERWRITTEN && thread_index() == 9)
        shared_store((uint32_t *)b_tile + 100, 0u);
    if (FAULT == REFILLED_EARLY && thread_index() == 64) tensor_copy(a_tile, &a.a, 0, 0, full);
    if (FAULT == PRODUCTS_LEFT) return;
    warpgroup_wait<0>();
    if (FAULT != ACCUMULATORS_READ) write_out(a.out, d);
}

typedef int launcher(const pipeline_args &);
template <int FAULT> int pipeline_launch(const pipeline_args &a)
{
    return HB_LAUNCH((pipeline<FAULT>), 1, 160, 9216 + 16384 + 8, nullptr, a);
}

struct product_args {
    const uint8_t *image; // of shared memory
    float *out;           // [64, 128]
    int64_t bytes;
    int32_t a, b, a_stride, b_leading, b_stride, b_mn_major;
};

// out = 2 A B, operands at byte a and b of the image.
HB_KERNEL_RESIDENT(128, 1) product_of_image(HB_ARGS product_args a)
{
    unsigned char *image = shared_tiles();
    for (int64_t i = thread_index(); i < a.bytes / 16; i += 128)
        shared_store((uint4 *)image + i, load((const uint4 *)a.image + i));
    fence_async_proxy();
    block_sync();
    float d[64];
    const uint64_t a_operand = operand(image + a.a, 0, (uint32_t)a.a_stride);
    const uint64_t b_operand = operand(image + a.b, (uint32_t)a.b_leading, (uint32_t)a.b_stride);
    warpgroup_fence();
    for (int twice = 0; twice < 2; twice++) {
        if (a.b_mn_major)
            warpgroup_mma_64x128x16<2, 1>(d, a_operand, b_operand, twice);
        else
            warpgroup_mma_64x128x16<2, 0>(d, a_operand, b_operand, twice);
        warpgroup_commit();
    }
    warpgroup_wait<1>();
    warpgroup_wait<0>();
    write_out(a.out, d);
}

struct ring_args {
    const uint16_t *in; // [rows, columns]
    uint16_t *out;      // [steps, 64, 64]
    int64_t rows, columns;
    tensor_map map;
};

// Boxes at (64 step - 16, 8 step - 8) through a ring of two, each read back by 64 threads.
HB_KERNEL_RESIDENT(96, 1) ring(HB_ARGS ring_args a)
{
    enum { STEPS = 5, STAGES = 2, BOX = 8192 };
    unsigned char *tile = shared_tiles();
    uint64_t *full = (uint64_t *)(tile + STAGES * BOX), *empty = full + STAGES;
    if (thread_index() == 95) {
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(full + s, 1);
            mbarrier_init(empty + s, 2);
        }
        fence_mbarrier_init();
    }
    block_sync();
    if (warp_index() == 2) {
        if (lane_index() != 0) return;
        tensor_map_prefetch(&a.map);
        for (int step = 0; step < STEPS; step++) {
            const int s = step % STAGES;
            mbarrier_wait(empty + s, (uint32_t)(step / STAGES % 2 ^ 1));
            mbarrier_arrive_expect(full + s, BOX);
            tensor_copy(tile + s * BOX, &a.map, 64 * step - 16, 8 * step - 8, full + s);
        }
        return;
    }
    for (int step = 0; step < STEPS; step++) {
        const int s = step % STAGES;
        mbarrier_wait(full + s, (uint32_t)(step / STAGES % 2));
        for (int i = thread_index(); i < 512; i += 64)
            store((uint4 *)a.out + 512 * step + i,
                  shared_load((const uint4 *)(tile + s * BOX + swizzle128((uint32_t)i * 16))));
        warp_sync();
        if (lane_index() == 0) mbarrier_arrive(empty + s);
    }
}

} // namespace

#define EXPORTED extern "C" __attribute__((visibility("default"))) int

EXPORTED hopper_pipeline(int fault, const uint16_t *a, const uint16_t *b, float *out)
{
    static launcher *const launchers[FAULTS] = {
        pipeline_launch<0>,  pipeline_launch<1>,  pipeline_launch<2>,  pipeline_launch<3>,
        pipeline_launch<4>,  pipeline_launch<5>,  pipeline_launch<6>,  pipeline_launch<7>,
        pipeline_launch<8>,  pipeline_launch<9>,  pipeline_launch<10>, pipeline_launch<11>,
        pipeline_launch<12>, pipeline_launch<13>, pipeline_launch<14>, pipeline_launch<15>,
        pipeline_launch<16>, pipeline_launch<17>, pipeline_launch<18>, pipeline_launch<19>};
    pipeline_args args = {b, out, {}};
    const int status = tensor_map_make(&args.a, 1, a, 64, 64, 64);
    return status != 0 ? status : launchers[fault](args);
}

EXPORTED hopper_product(const uint8_t *image, float *out, int64_t bytes, int32_t a, int32_t b,
                        int32_t a_stride, int32_t b_leading, int32_t b_stride, int32_t b_mn_major)
{
    product_args args = {image, out, bytes, a, b, a_stride, b_leading, b_stride, b_mn_major};
    return HB_LAUNCH(product_of_image, 1, 128, bytes, nullptr, args);
}

EXPORTED hopper_ring(const uint16_t *in, uint16_t *out, int64_t rows, int64_t columns)
{
    ring_args args = {in, out, rows, columns, {}};
    const int status = tensor_map_make(&args.map, 2, in, rows, columns, 64);
    if (status != 0) return status;
    return HB_LAUNCH(ring, 1, 96, 2 * 8192 + 32, nullptr, args);
}

EXPORTED hopper_swizzle(int offset)
{
    return (int)swizzle128((uint32_t)offset);
}
