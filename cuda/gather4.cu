// Rows of a 4-bit table (embeddings): out[i, :] = table[index[i], :], the bits of dequantize.
//
// As dequantize4.cu, but each row of the output begins at its own element of the table: a thread
// takes 16 weights of one row where depth % 16 == 0 (every row begins with a byte, and the 16 share
// a scale), else a warp takes a row. An index outside the table gives a row of NaN and reads
// nothing.
//
// Floor at block size 64, bfloat16 out: 2.56 bytes of traffic a weight.
#include "codebooks.cuh"
#include "kernels.cuh"
#include "scales4.cuh"

namespace
{

enum { THREADS = 256, WARPS = THREADS / HB_LANES, EACH = 16, TABLE_BYTES = 16 * 4 };

// First element of the row that output row i shows, or -1.
HB_DEVICE int64_t row_start(const hb_cuda_gather4 &a, int64_t i)
{
    int64_t row = load(a.index + i);
    if (row < 0) row += a.rows;
    return row < 0 || row >= a.rows ? -1 : row * a.depth;
}

template <int IO> HB_KERNEL(THREADS) gather4_kernel(HB_ARGS hb_cuda_gather4 a)
{
    float *table = (float *)shared_memory(), *map = table + 16;
    codebook_fill(table, a.format);
    scale_map_fill(a.scales, map);
    block_sync();
    const int64_t i = (block_index() * THREADS + thread_index()) * EACH;
    if (i >= a.n * a.depth) return;
    const float offset = scale_offset(a.scales);
    const int64_t start = row_start(a, i / a.depth);
    float value[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) value[j] = bits_float(0x7fc00000u);
    if (start >= 0) {
        const int64_t element = start + i % a.depth;
        const float scale = scale_of(a.scales, map, offset, block_of(element, a.blocksize));
        decode16(table, load((const uint2 *)(a.packed + element / 2)), scale, value);
    }
    store8<IO>(a.out, i, value);
    store8<IO>(a.out, i + 8, value + 8);
}

// Any depth and alignment: a warp a row.
template <int IO> HB_KERNEL(THREADS) gather4_any_kernel(HB_ARGS hb_cuda_gather4 a)
{
    float *table = (float *)shared_memory(), *map = table + 16;
    codebook_fill(table, a.format);
    scale_map_fill(a.scales, map);
    block_sync();
    const int64_t i = block_index() * WARPS + warp_index();
    if (i >= a.n) return;
    const float offset = scale_offset(a.scales);
    const int64_t start = row_start(a, i);
    for (int64_t k = lane_index(); k < a.depth; k += HB_LANES) {
        float weight = bits_float(0x7fc00000u);
        if (start >= 0) {
            const int64_t element = start + k;
            const uint32_t byte = load(a.packed + element / 2);
            const uint32_t code = element % 2 ? byte & 15 : byte >> 4;
            weight = mul_rn(shared_load(table + code),
                            scale_of(a.scales, map, offset, block_of(element, a.blocksize)));
        }
        store_float<IO>(a.out, i * a.depth + k, weight);
    }
}

template <int IO> int launch(const hb_cuda_queue *queue, const hb_cuda_gather4 &a)
{
    const int shared_bytes = TABLE_BYTES + scale_map_bytes(a.scales);
    const bool aligned =
        a.depth % EACH == 0 && ((uintptr_t)a.packed & 7) == 0 && ((uintptr_t)a.out & 15) == 0;
    if (aligned)
        return HB_LAUNCH((gather4_kernel<IO>), hb_ceil_div(a.n * a.depth, (int64_t)THREADS * EACH),
                         THREADS, shared_bytes, queue->stream, a);
    return HB_LAUNCH((gather4_any_kernel<IO>), hb_ceil_div(a.n, (int64_t)WARPS), THREADS,
                     shared_bytes, queue->stream, a);
}

} // namespace

int hb_cuda_launch_gather4(const hb_cuda_queue *queue, const hb_cuda_gather4 *args)
{
    if (args->n == 0 || args->depth == 0) return 0;
    switch (args->out_dtype) {
    case HB_F32: return launch<HB_F32>(queue, *args);
    case HB_BF16: return launch<HB_BF16>(queue, *args);
    default: return launch<HB_F16>(queue, *args);
    }
}
