// 8-bit block-wise quantize and dequantize with any 256-entry map, the bits of the CPU's kernels.
//
//   v = x * inverse(absmax[b]), both rounded;  code = #{t in threshold: v > t};  x' = map[code] *
//   absmax
//
// Quantize: a warp takes a block of any size and reads it twice, the second time from the cache;
// eight elements a lane where block size and alignment allow, else one. The 255 thresholds are a
// search tree in shared memory (search8.cuh), eight compares.
//
// What a block of threads makes first, the tree (sixteen barriers) or the table, serves for all
// that it does: there are no more of them than the GPU holds, and each goes on where the others are
// not.
#include "absmax.cuh"
#include "kernels.cuh"
#include "search8.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / HB_LANES,
    TABLE_BYTES = 256 * 4,
    RESIDENT = 8 // blocks a multiprocessor
};

// One block of elements, by a warp. EACH elements a lane and step: 8 (x 16-byte and codes 8-byte
// aligned, blocksize % 8 == 0) or 1.
template <int IO, int EACH>
HB_DEVICE void quantize8_block(const hb_cuda_quantize8 &a, const float *tree, int64_t block)
{
    const int64_t begin = block * a.blocksize;
    const int64_t end = a.n - begin < a.blocksize ? a.n : begin + a.blocksize;
    const int64_t first = begin + lane_index() * EACH;

    uint32_t largest = 0;
    float value[EACH];
    for (int64_t i = first; i < end; i += HB_LANES * EACH) {
        if (EACH == 8 && i + EACH <= end)
            load8<IO>(a.x, i, value);
        else
            for (int j = 0; j < EACH; j++)
                value[j] = i + j < end ? load_float<IO>(a.x, i + j) : 0.0f;
        largest = larger_magnitude<EACH>(value, largest);
    }
    const float absmax = absmax_of_lanes(largest, HB_LANES);
    if (lane_index() == 0) store(a.absmax + block, absmax);

    const float inverse = inverse_scale(absmax);
    for (int64_t i = first; i < end; i += HB_LANES * EACH) {
        if (EACH == 8 && i + EACH <= end) {
            load8<IO>(a.x, i, value);
            uint32_t word[2] = {0, 0};
#pragma unroll
            for (int j = 0; j < EACH; j++)
                word[j / 4] |= search8(tree, mul_rn(value[j], inverse)) << (8 * (j % 4));
            store_once((uint2 *)(a.codes + i), uint2{word[0], word[1]});
        } else {
            for (int j = 0; j < EACH && i + j < end; j++) {
                float v = mul_rn(load_float<IO>(a.x, i + j), inverse);
                store(a.codes + i + j, (uint8_t)search8(tree, v));
            }
        }
    }
}

template <int IO, int EACH> HB_KERNEL(THREADS) quantize8_kernel(HB_ARGS hb_cuda_quantize8 a)
{
    float *tree = (float *)shared_memory();
    search8_fill(a.map, tree);
    const int64_t blocks = (a.n + a.blocksize - 1) / a.blocksize;
    for (int64_t block = block_index() * WARPS + warp_index(); block < blocks;
         block += grid_blocks() * WARPS)
        quantize8_block<IO, EACH>(a, tree, block);
}

template <int IO, bool ALIGNED> HB_KERNEL(THREADS) dequantize8_kernel(HB_ARGS hb_cuda_dequantize8 a)
{
    enum { EACH = 8 };
    float *map = (float *)shared_memory();
    shared_store(map + thread_index(), load(a.map + thread_index()));
    block_sync();
    int64_t i = (block_index() * THREADS + thread_index()) * EACH;
    if constexpr (ALIGNED) // blocksize % 8 == 0: one scale for eight
        for (; i + EACH <= a.n; i += grid_blocks() * THREADS * EACH) {
            const float scale = load(a.absmax + i / a.blocksize);
            const uint2 codes = load_once((const uint2 *)(a.codes + i));
            float value[EACH];
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                uint32_t word = j < 4 ? codes.x : codes.y;
                value[j] = mul_rn(shared_load(map + (word >> (8 * (j % 4)) & 255)), scale);
            }
            store8<IO>(a.out, i, value);
        }
    // The end; without alignment, where there are as many threads as it takes, everything.
    for (int j = 0; j < EACH && i + j < a.n; j++) {
        const float scale = load(a.absmax + (i + j) / a.blocksize);
        store_float<IO>(a.out, i + j, mul_rn(shared_load(map + load(a.codes + i + j)), scale));
    }
}

// As many blocks as the GPU holds, or fewer where there is less to do.
int64_t resident(const hb_cuda_queue *queue, int64_t blocks)
{
    const int64_t most = (int64_t)RESIDENT * hb_cuda_device_multiprocessors(queue->device);
    return most > 0 && most < blocks ? most : blocks;
}

template <int IO> int launch(const hb_cuda_queue *queue, const hb_cuda_quantize8 &a)
{
    const int64_t blocks =
        resident(queue, hb_ceil_div(hb_ceil_div(a.n, a.blocksize), (int64_t)WARPS));
    const bool aligned =
        a.blocksize % 8 == 0 && ((uintptr_t)a.x & 15) == 0 && ((uintptr_t)a.codes & 7) == 0;
    if (aligned)
        return HB_LAUNCH((quantize8_kernel<IO, 8>), blocks, THREADS, SEARCH8_BYTES, queue->stream,
                         a);
    return HB_LAUNCH((quantize8_kernel<IO, 1>), blocks, THREADS, SEARCH8_BYTES, queue->stream, a);
}

template <int IO> int launch(const hb_cuda_queue *queue, const hb_cuda_dequantize8 &a)
{
    const int64_t blocks = hb_ceil_div(a.n, (int64_t)THREADS * 8);
    const bool aligned =
        a.blocksize % 8 == 0 && ((uintptr_t)a.codes & 7) == 0 && ((uintptr_t)a.out & 15) == 0;
    if (aligned)
        return HB_LAUNCH((dequantize8_kernel<IO, true>), resident(queue, blocks), THREADS,
                         TABLE_BYTES, queue->stream, a);
    return HB_LAUNCH((dequantize8_kernel<IO, false>), blocks, THREADS, TABLE_BYTES, queue->stream,
                     a);
}

} // namespace

int hb_cuda_launch_quantize8(const hb_cuda_queue *queue, const hb_cuda_quantize8 *args)
{
    if (args->n == 0) return 0;
    switch (args->x_dtype) {
    case HB_F32: return launch<HB_F32>(queue, *args);
    case HB_BF16: return launch<HB_BF16>(queue, *args);
    default: return launch<HB_F16>(queue, *args);
    }
}

int hb_cuda_launch_dequantize8(const hb_cuda_queue *queue, const hb_cuda_dequantize8 *args)
{
    if (args->n == 0) return 0;
    switch (args->out_dtype) {
    case HB_F32: return launch<HB_F32>(queue, *args);
    case HB_BF16: return launch<HB_BF16>(queue, *args);
    default: return launch<HB_F16>(queue, *args);
    }
}
