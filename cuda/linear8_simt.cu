// Products with row-wise int8 weights, any shape and alignment, any GPU: what the tensor-core
// kernels do not take. Formulas in linear8.cuh.
//
// Forward: a warp makes one row of W by up to 8 rows of x, its lanes take every 32nd word (four
// codes where rows are aligned to words, else one) and are summed in a tree. Integers by dp4a,
// exact; floats in float32. Transposed: a lane makes 4 columns (or 1) of W by up to 8 rows of x,
// the eight warps of a block take every eighth row of W and are summed in order. No float is added
// in an order that depends on anything but the shape.
#include "linear8.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / HB_LANES,
    COLUMNS = 8, // rows of x a block
};

// Four codes at i, of which the first `count` are there.
template <int EACH> HB_DEVICE uint32_t codes_at(const int8_t *codes, int64_t i)
{
    if constexpr (EACH == 4) return load((const uint32_t *)(codes + i));
    return (uint8_t)load(codes + i);
}

// Rows [rows.begin, rows.end) of y become 0, by the threads of a block that has outputs
// [first, first + count).
template <int IO>
HB_DEVICE void store_zeros(void *y, const expert_rows &rows, int64_t outputs, int64_t first,
                           int64_t count)
{
    const int64_t n = first + count < outputs ? count : outputs - first;
    for (int64_t i = thread_index(); i < (rows.end - rows.begin) * n; i += THREADS)
        store_float<IO>(y, (rows.begin + i / n) * outputs + first + i % n, 0.0f);
}

template <int IO, int EACH> HB_KERNEL(THREADS) linear8_dot_kernel(HB_ARGS linear8_job job)
{
    const hb_cuda_linear8 &a = job.a;
    const int64_t tiles = (a.rows + WARPS - 1) / WARPS, first = block_index() % tiles * WARPS;
    const expert_rows rows = expert_find(a, block_index() / tiles, COLUMNS);
    if (rows.begin >= rows.end) return;
    if (rows.expert < 0) return store_zeros<IO>(a.y, rows, a.rows, first, WARPS);
    const int64_t row = first + warp_index();
    if (row >= a.rows) return; // the whole warp
    const int64_t i = rows.expert * a.rows + row;
    const int8_t *w = a.codes + i * a.depth, *x = job.x_codes + rows.begin * a.depth;
    const int n_x = (int)(rows.end - rows.begin);
    int32_t sum[COLUMNS] = {0};
    for (int64_t k = lane_index() * EACH; k < a.depth; k += HB_LANES * EACH) {
        const uint32_t codes = codes_at<EACH>(w, k);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
            if (j < n_x) sum[j] = dot4_int8(codes, codes_at<EACH>(x + j * a.depth, k), sum[j]);
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        for (int mask = 1; mask < HB_LANES; mask *= 2)
            sum[j] += (int32_t)shuffle_xor((uint32_t)sum[j], mask);
        if (lane_index() != j || j >= n_x) continue;
        const int64_t x_row = rows.begin + j;
        if (job.c != nullptr) {
            store(job.c + x_row * a.rows + row, sum[j]);
            continue;
        }
        const int outliers = linear8_columns(job);
        const float value = linear8_value(sum[j], linear8_factor(job.x_scale, x_row), outliers > 0,
                                          linear8_outliers<IO>(job, outliers, x_row, i));
        store_float<IO>(a.y, x_row * a.rows + row, linear8_finish(a, i, value));
    }
}

template <int IO, int EACH> HB_KERNEL(THREADS) linear8_float_kernel(HB_ARGS linear8_job job)
{
    const hb_cuda_linear8 &a = job.a;
    const int64_t tiles = (a.rows + WARPS - 1) / WARPS, first = block_index() % tiles * WARPS;
    const expert_rows rows = expert_find(a, block_index() / tiles, COLUMNS);
    if (rows.begin >= rows.end) return;
    if (rows.expert < 0) return store_zeros<IO>(a.y, rows, a.rows, first, WARPS);
    const int64_t row = first + warp_index();
    if (row >= a.rows) return; // the whole warp
    const int64_t i = rows.expert * a.rows + row;
    const int8_t *w = a.codes + i * a.depth;
    const int n_x = (int)(rows.end - rows.begin);
    float sum[COLUMNS] = {0.0f};
    for (int64_t k = lane_index() * EACH; k < a.depth; k += HB_LANES * EACH) {
        const uint32_t codes = codes_at<EACH>(w, k);
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const float weight = (float)(int8_t)(codes >> (8 * e) & 255);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
                if (j < n_x)
                    sum[j] += weight * load_float<IO>(a.x, (rows.begin + j) * a.depth + k + e);
        }
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        for (int mask = 1; mask < HB_LANES; mask *= 2)
            sum[j] += bits_float(shuffle_xor(float_bits(sum[j]), mask));
        if (lane_index() == j && j < n_x)
            store_float<IO>(a.y, (rows.begin + j) * a.rows + row, linear8_finish(a, i, sum[j]));
    }
}

template <int IO, int EACH>
HB_KERNEL_RESIDENT(THREADS, 1)
linear8_back_kernel(HB_ARGS linear8_job job)
{
    enum { TILE = HB_LANES * EACH };
    const hb_cuda_linear8 &a = job.a;
    float *parts = (float *)shared_memory(); // [WARPS][COLUMNS][TILE]
    const int64_t tiles = (a.depth + TILE - 1) / TILE, first = block_index() % tiles * TILE;
    const expert_rows rows = expert_find(a, block_index() / tiles, COLUMNS);
    if (rows.begin >= rows.end) return;
    if (rows.expert < 0) return store_zeros<IO>(a.y, rows, a.depth, first, TILE);
    const int n_x = (int)(rows.end - rows.begin);
    const int64_t k = first + lane_index() * EACH;
    float sum[COLUMNS][EACH] = {{0.0f}};
    for (int64_t row = warp_index(); row < a.rows && k < a.depth; row += WARPS) {
        const int64_t i = rows.expert * a.rows + row;
        const uint32_t codes = codes_at<EACH>(a.codes, i * a.depth + k);
        const float factor = linear8_factor(a.scale, i);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            if (j >= n_x) continue;
            const float x = mul_rn(load_float<IO>(a.x, (rows.begin + j) * a.rows + row), factor);
#pragma unroll
            for (int e = 0; e < EACH; e++) sum[j][e] += x * (float)(int8_t)(codes >> (8 * e) & 255);
        }
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; j++)
#pragma unroll
        for (int e = 0; e < EACH; e++)
            shared_store(parts + (warp_index() * COLUMNS + j) * TILE + lane_index() * EACH + e,
                         sum[j][e]);
    block_sync();
    for (int i = thread_index(); i < COLUMNS * TILE; i += THREADS) {
        const int j = i / TILE;
        if (j >= n_x || first + i % TILE >= a.depth) continue;
        float total = 0.0f;
        for (int w = 0; w < WARPS; w++) total += shared_load(parts + w * COLUMNS * TILE + i);
        store_float<IO>(a.y, (rows.begin + j) * a.depth + first + i % TILE, total);
    }
}

bool words(const void *p, int64_t depth)
{
    return depth % 4 == 0 && ((uintptr_t)p & 3) == 0;
}

template <int IO> int launch(const hb_cuda_queue *queue, const linear8_job &job)
{
    const hb_cuda_linear8 &a = job.a;
    const int64_t columns = expert_tiles(a, COLUMNS);
    const bool aligned = words(a.codes, a.depth);
    if (a.transposed) {
        const int64_t blocks =
            hb_ceil_div(a.depth, (int64_t)HB_LANES * (aligned ? 4 : 1)) * columns;
        const int bytes = WARPS * COLUMNS * HB_LANES * 4;
        if (aligned)
            return HB_LAUNCH((linear8_back_kernel<IO, 4>), blocks, THREADS, 4 * bytes,
                             queue->stream, job);
        return HB_LAUNCH((linear8_back_kernel<IO, 1>), blocks, THREADS, bytes, queue->stream, job);
    }
    const int64_t blocks = hb_ceil_div(a.rows, (int64_t)WARPS) * columns;
    if (job.x_codes == nullptr) {
        if (aligned)
            return HB_LAUNCH((linear8_float_kernel<IO, 4>), blocks, THREADS, 0, queue->stream, job);
        return HB_LAUNCH((linear8_float_kernel<IO, 1>), blocks, THREADS, 0, queue->stream, job);
    }
    if (aligned && words(job.x_codes, a.depth))
        return HB_LAUNCH((linear8_dot_kernel<IO, 4>), blocks, THREADS, 0, queue->stream, job);
    return HB_LAUNCH((linear8_dot_kernel<IO, 1>), blocks, THREADS, 0, queue->stream, job);
}

} // namespace

int hb_cuda_launch_linear8_simt(const hb_cuda_queue *queue, const linear8_job &job)
{
    switch (job.a.io_dtype) {
    case HB_F32: return launch<HB_F32>(queue, job);
    case HB_BF16: return launch<HB_BF16>(queue, job);
    default: return launch<HB_F16>(queue, job);
    }
}
