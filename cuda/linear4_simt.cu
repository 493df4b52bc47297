// y = x W^T + b with 4-bit W for everything that the tensor-core kernel does not take: float32 x
// (exact float32 products), any depth, block size and alignment, GPUs before sm_80.
//
// A warp takes one row of W and up to 8 rows of x; lane l the bytes l, l + 32, ... of the row.
// Where depth is odd, every second row begins in the middle of a byte, hence the parity.
#include "codebooks.cuh"
#include "kernels.cuh"
#include "scales4.cuh"

namespace
{

enum { THREADS = 256, WARPS = THREADS / HB_LANES, COLUMNS = 8, TABLE_BYTES = 16 * 4 };

template <int IO> HB_KERNEL(THREADS) linear4_simt_kernel(HB_ARGS hb_cuda_linear4 a)
{
    float *value = (float *)shared_memory(), *map = value + 16;
    codebook_fill(value, a.format);
    scale_map_fill(a.scales, map);
    block_sync();
    const int64_t row_blocks = (a.rows + WARPS - 1) / WARPS;
    const int64_t row = block_index() % row_blocks * WARPS + warp_index();
    const int64_t first_x = block_index() / row_blocks * COLUMNS;
    if (row >= a.rows) return; // the whole warp
    const int64_t begin = row * a.depth, end = begin + a.depth;
    const float offset = scale_offset(a.scales);
    float sum[COLUMNS] = {0.0f};
    for (int64_t byte = begin / 2 + lane_index(); 2 * byte < end; byte += HB_LANES) {
        const uint32_t codes = load(a.packed + byte);
        // An even element and the next lie in one block: block sizes are even.
        const float scale = scale_of(a.scales, map, offset, block_of(2 * byte, a.blocksize));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t element = 2 * byte + half;
            if (element < begin || element >= end) continue;
            const float w = mul_rn(shared_load(value + (half ? codes & 15 : codes >> 4)), scale);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
                if (first_x + j < a.m)
                    sum[j] += w * load_float<IO>(a.x, (first_x + j) * a.depth + element - begin);
        }
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        for (int mask = 1; mask < HB_LANES; mask *= 2)
            sum[j] += bits_float(shuffle_xor(float_bits(sum[j]), mask));
        if (lane_index() == j && first_x + j < a.m)
            store_float<IO>(a.y, (first_x + j) * a.rows + row, sum[j] + bias_of(a, row));
    }
}

template <int IO> int launch(const hb_cuda_queue *queue, const hb_cuda_linear4 &a)
{
    const int64_t blocks = hb_ceil_div(a.rows, (int64_t)WARPS) * hb_ceil_div(a.m, (int64_t)COLUMNS);
    const int shared_bytes = TABLE_BYTES + scale_map_bytes(a.scales);
    return HB_LAUNCH((linear4_simt_kernel<IO>), blocks, THREADS, shared_bytes, queue->stream, a);
}

} // namespace

bool hb_cuda_linear4_simt_fits(const hb_cuda_queue *, const hb_cuda_linear4 *a)
{
    return !a->transposed && a->offsets == nullptr;
}

int64_t hb_cuda_linear4_simt_workspace(const hb_cuda_queue *, const hb_cuda_linear4 *)
{
    return 0;
}

int hb_cuda_launch_linear4_simt(const hb_cuda_queue *queue, const hb_cuda_linear4 *args)
{
    switch (args->io_dtype) {
    case HB_F32: return launch<HB_F32>(queue, *args);
    case HB_BF16: return launch<HB_BF16>(queue, *args);
    default: return launch<HB_F16>(queue, *args);
    }
}
