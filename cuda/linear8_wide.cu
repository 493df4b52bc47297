// Products of x in floats with int8 weights on tensor cores (sm_80): the exact mode, and gradients
// (transposed). Formulas in linear8.cuh.
//
// The codes become 16-bit floats in registers, exactly. x of 16 bits goes in as it is; float32 x,
// and for gradients x times scale / 127 in float32, as the sum of three bfloat16, exactly, at three
// mma instead of one. So every product is exact and every sum float32, as on the CPU. The three
// parts are made first, by a kernel of their own, into the workspace: every block needs them.
//
//   exact      as linear8_few.cu: 16 rows of W a block, lane (g, t) 16 bytes of rows g and g + 8 of
//   a
//              chunk of 64 k; four mma of 16 k, the order of k free
//   gradient   the 16-row operand is W^T: 32 columns k of W a block (two mma), 16 rows r of W at a
//              time; lane (g, t) reads 4 bytes of each of rows 4t .. 4t + 3, at k = 4g, and pairs
//              bytes of rows 4t and 4t + 1, 4t + 2 and 4t + 3 by byte permutes. Row g of mma i is k
//              = 4g + 2i, row g + 8 the next
//
// The eight warps of a block take every eighth chunk and are summed in order. Floor: one byte a
// weight, for which an H200 has time for 7.8 instructions of a lane. Where there are so many rows
// of x that this is no longer the floor (over 64, say), dequantizing and a dense product are
// faster.
#include "linear8.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / HB_LANES,
    ROWS = 16, // of W, a block of the exact mode, and at a time of gradients
    CHUNK = 64,
    AHEAD = 2,             // chunks of a warp under way: exact
    STEPS = 4,             // and of gradients
    COLUMNS = 32,          // of W, a block of gradients
    SPLIT_ROWS = 8,        // of x, a block that splits them
    SPLIT_EACH = 4,        // elements of a row, a thread
    MOST_BYTES = 32 << 20, // of split rows at a time; without experts more are done in turns
};

// Four codes as two pairs of 16-bit floats (TYPE 1 bfloat16, 2 float16), exactly.
//   float16:  1024 + (code + 128) has the biased code as its low byte; 1152 is subtracted
//   bfloat16: 128 + the low seven bits, minus 128, or 256 where the sign bit is set
template <int TYPE> HB_DEVICE void pairs_of(uint32_t codes, uint32_t *low, uint32_t *high)
{
    if (TYPE == 2) {
        const uint32_t biased = codes ^ 0x80808080u;
        *low = sub_pair<2>(merge_bytes(biased, 0x64646464u, 0x4140), 0x64806480u);
        *high = sub_pair<2>(merge_bytes(biased, 0x64646464u, 0x4342), 0x64806480u);
    } else {
        const uint32_t even = merge_bytes(codes, 0, 0x4140), odd = merge_bytes(codes, 0, 0x4342);
        *low = sub_pair<1>((even & 0x007f007fu) | 0x43004300u, (even & 0x00800080u) | 0x43004300u);
        *high = sub_pair<1>((odd & 0x007f007fu) | 0x43004300u, (odd & 0x00800080u) | 0x43004300u);
    }
}

// Two floats as three pairs of bfloat16.
HB_DEVICE void split_pair(float first, float second, uint32_t *terms, int stride)
{
    uint16_t a[3], b[3];
    split_bf16(first, a);
    split_bf16(second, b);
#pragma unroll
    for (int term = 0; term < 3; term++) terms[term * stride] = a[term] | (uint32_t)b[term] << 16;
}

HB_DEVICE void store_io(int io, void *y, int64_t i, float value)
{
    switch (io) {
    case 0: return store_float<0>(y, i, value);
    case 1: return store_float<1>(y, i, value);
    default: return store_float<2>(y, i, value);
    }
}

// y of the rows of x that meet nobody.
HB_DEVICE void store_zeros(const hb_cuda_linear8 &a, const expert_rows &rows, int64_t outputs,
                           int64_t first, int64_t most)
{
    const int n = (int)(outputs - first < most ? outputs - first : most);
    for (int i = thread_index(); i < (int)(rows.end - rows.begin) * n; i += THREADS)
        store_io(a.io_dtype, a.y, (rows.begin + i / n) * outputs + first + i % n, 0.0f);
}

// ---- x in three parts ---------------------------------------------------------------------------

// planes [3][m][pitch]: x, or for gradients x * (scale / 127); 0 behind the steps.
template <int IO> HB_KERNEL(THREADS) linear8_split_kernel(HB_ARGS linear8_job job)
{
    const hb_cuda_linear8 &a = job.a;
    const uint32_t block = (uint32_t)block_index(), x_tiles = (uint32_t)job.x_tiles;
    const int64_t step = ((int64_t)(block / x_tiles) * THREADS + thread_index()) * SPLIT_EACH;
    const int64_t steps = a.transposed ? a.rows : a.depth;
    const expert_rows rows = expert_find(a, block % x_tiles, SPLIT_ROWS);
    if (step >= job.pitch || rows.expert < 0) return;
    float factor[SPLIT_EACH];
#pragma unroll
    for (int e = 0; e < SPLIT_EACH; e++)
        factor[e] = !a.transposed      ? 1.0f
                    : step + e < steps ? linear8_factor(a.scale, rows.expert * a.rows + step + e)
                                       : 0.0f;
    for (int64_t row = rows.begin; row < rows.end; row++) {
        float x[SPLIT_EACH];
#pragma unroll
        for (int e = 0; e < SPLIT_EACH; e++)
            x[e] = step + e < steps ? mul_rn(load_float<IO>(a.x, row * steps + step + e), factor[e])
                                    : 0.0f;
        uint32_t words[3][2];
        split_pair(x[0], x[1], words[0], 2);
        split_pair(x[2], x[3], words[0] + 1, 2);
#pragma unroll
        for (int term = 0; term < 3; term++)
            store((uint2 *)(job.planes + (term * a.m + row) * job.pitch + step),
                  uint2{words[term][0], words[term][1]});
    }
}

// ---- exact --------------------------------------------------------------------------------------

template <int TYPE, int TERMS, int TILES>
HB_KERNEL(THREADS)
linear8_exact_kernel(HB_ARGS linear8_job job)
{
    enum { X = 8 * TILES, PITCH = 20 };
    const hb_cuda_linear8 &a = job.a;
    float *sums = (float *)shared_memory(); // [WARPS][X][PITCH]
    const int g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t block = (uint32_t)block_index(), x_tiles = (uint32_t)job.x_tiles;
    const int64_t first = (int64_t)(block / x_tiles) * ROWS;
    const expert_rows rows = expert_find(a, block % x_tiles, X);
    if (rows.begin >= rows.end) return;
    if (rows.expert < 0) return store_zeros(a, rows, a.rows, first, ROWS);
    const int n_x = (int)(rows.end - rows.begin), depth = (int)a.depth;
    const uint16_t *x = TERMS == 1 ? (const uint16_t *)a.x : job.planes;
    const int64_t pitch = TERMS == 1 ? a.depth : job.pitch;
    const int8_t *w[2];
#pragma unroll
    for (int half = 0; half < 2; half++) { // rows behind the last are read as the last
        const int64_t row = first + g + 8 * half;
        w[half] = a.codes + (rows.expert * a.rows + (row < a.rows ? row : a.rows - 1)) * a.depth;
    }
    float sum[TILES][4] = {{0.0f}};
    for (int base = warp_index() * CHUNK + 16 * t; base - 16 * t < depth;
         base += AHEAD * WARPS * CHUNK) {
        uint4 codes[AHEAD][2];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int k = base + i * WARPS * CHUNK;
                codes[i][half] =
                    k < depth ? load_once((const uint4 *)(w[half] + k)) : uint4{0, 0, 0, 0};
            }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int k = base + i * WARPS * CHUNK;
            const uint32_t lo[4] = {codes[i][0].x, codes[i][0].y, codes[i][0].z, codes[i][0].w};
            const uint32_t hi[4] = {codes[i][1].x, codes[i][1].y, codes[i][1].z, codes[i][1].w};
            uint32_t fragment[4][4];
#pragma unroll
            for (int step = 0; step < 4; step++) {
                pairs_of<TYPE>(lo[step], fragment[step], fragment[step] + 2);
                pairs_of<TYPE>(hi[step], fragment[step] + 1, fragment[step] + 3);
            }
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const bool is_there = 8 * tile + g < n_x && k < depth;
                const uint16_t *row = x + (rows.begin + 8 * tile + g) * pitch + k;
#pragma unroll
                for (int term = 0; term < TERMS; term++) {
                    uint4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
                    if (is_there) {
                        low = load((const uint4 *)(row + term * a.m * pitch));
                        high = load((const uint4 *)(row + term * a.m * pitch) + 1);
                    }
                    const uint32_t words[8] = {low.x,  low.y,  low.z,  low.w,
                                               high.x, high.y, high.z, high.w};
#pragma unroll
                    for (int step = 0; step < 4; step++)
                        mma_16x8x16<TYPE>(sum[tile], fragment[step], words + 2 * step);
                }
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int r = 0; r < 4; r++)
            shared_store(sums + (warp_index() * X + 8 * tile + 2 * t + r % 2) * PITCH + g +
                             8 * (r / 2),
                         sum[tile][r]);
    block_sync();
    for (int i = thread_index(); i < ROWS * n_x; i += THREADS) { // consecutive rows of W
        const int64_t row = first + i % ROWS;
        if (row >= a.rows) continue;
        float total = 0.0f;
        for (int warp = 0; warp < WARPS; warp++)
            total += shared_load(sums + (warp * X + i / ROWS) * PITCH + i % ROWS);
        store_io(a.io_dtype, a.y, (rows.begin + i / ROWS) * a.rows + row,
                 linear8_finish(a, rows.expert * a.rows + row, total));
    }
}

// ---- gradients ----------------------------------------------------------------------------------

template <int TILES> HB_KERNEL(THREADS) linear8_gradient_kernel(HB_ARGS linear8_job job)
{
    enum { X = 8 * TILES, PITCH = COLUMNS + 4 };
    const hb_cuda_linear8 &a = job.a;
    float *sums = (float *)shared_memory(); // [WARPS][X][PITCH]
    const int g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t block = (uint32_t)block_index(), x_tiles = (uint32_t)job.x_tiles;
    const int64_t first = (int64_t)(block / x_tiles) * COLUMNS;
    const expert_rows rows = expert_find(a, block % x_tiles, X);
    if (rows.begin >= rows.end) return;
    if (rows.expert < 0) return store_zeros(a, rows, a.depth, first, COLUMNS);
    const int n_x = (int)(rows.end - rows.begin);
    // Columns behind the last are read as the first and not stored.
    const int64_t k = first + 4 * g < a.depth ? first + 4 * g : first;
    const int8_t *w = a.codes + rows.expert * a.rows * a.depth + k;
    float sum[TILES][2][4] = {{{0.0f}}};
    for (int64_t base = warp_index() * ROWS + 4 * t; base - 4 * t < a.rows;
         base += STEPS * WARPS * ROWS) {
        uint32_t data[STEPS][4]; // four columns of each of four rows
#pragma unroll
        for (int i = 0; i < STEPS; i++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int64_t row = base + i * WARPS * ROWS + n;
                data[i][n] = row < a.rows ? load_once((const uint32_t *)(w + row * a.depth)) : 0;
            }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int64_t row = base + i * WARPS * ROWS;
            const uint32_t *codes = data[i];
            uint32_t fragment[2][4];
#pragma unroll
            for (int half = 0; half < 2; half++) { // rows 4t, 4t + 1, and 4t + 2, 4t + 3
                const uint32_t *two = codes + 2 * half;
                // [first row, second row] of columns 0 and 1, then 2 and 3.
                pairs_of<1>(merge_bytes(two[0], two[1], 0x5140), fragment[0] + 2 * half,
                            fragment[0] + 2 * half + 1);
                pairs_of<1>(merge_bytes(two[0], two[1], 0x7362), fragment[1] + 2 * half,
                            fragment[1] + 2 * half + 1);
            }
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const bool is_there = 8 * tile + g < n_x && row < a.rows;
                const uint16_t *x = job.planes + (rows.begin + 8 * tile + g) * job.pitch + row;
#pragma unroll
                for (int term = 0; term < 3; term++) {
                    uint2 four = {0, 0};
                    if (is_there) four = load((const uint2 *)(x + term * a.m * job.pitch));
                    const uint32_t words[2] = {four.x, four.y};
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        mma_16x8x16<1>(sum[tile][half], fragment[half], words);
                }
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int e = 0; e < 2; e++) { // rows 2t and 2t + 1 of x: four columns each
            float *p = sums + (warp_index() * X + 8 * tile + 2 * t + e) * PITCH + 4 * g;
            shared_store((uint4 *)p,
                         uint4{float_bits(sum[tile][0][e]), float_bits(sum[tile][0][2 + e]),
                               float_bits(sum[tile][1][e]), float_bits(sum[tile][1][2 + e])});
        }
    block_sync();
    for (int i = thread_index(); i < COLUMNS * n_x; i += THREADS) {
        const int64_t column = first + i % COLUMNS;
        if (column >= a.depth) continue;
        float total = 0.0f;
        for (int warp = 0; warp < WARPS; warp++)
            total += shared_load(sums + (warp * X + i / COLUMNS) * PITCH + i % COLUMNS);
        store_io(a.io_dtype, a.y, (rows.begin + i / COLUMNS) * a.depth + column, total);
    }
}

template <int TILES> int launch(const hb_cuda_queue *queue, const linear8_job &job)
{
    linear8_job sized = job;
    sized.x_tiles = expert_tiles(job.a, 8 * TILES);
    if (job.a.transposed)
        return HB_LAUNCH((linear8_gradient_kernel<TILES>),
                         hb_ceil_div(job.a.depth, (int64_t)COLUMNS) * sized.x_tiles, THREADS,
                         WARPS * 8 * TILES * (COLUMNS + 4) * 4, queue->stream, sized);
    const int64_t blocks = hb_ceil_div(job.a.rows, (int64_t)ROWS) * sized.x_tiles;
    const int bytes = WARPS * 8 * TILES * 20 * 4;
    switch (job.a.io_dtype) {
    case HB_F32:
        return HB_LAUNCH((linear8_exact_kernel<1, 3, TILES>), blocks, THREADS, bytes, queue->stream,
                         sized);
    case HB_BF16:
        return HB_LAUNCH((linear8_exact_kernel<1, 1, TILES>), blocks, THREADS, bytes, queue->stream,
                         sized);
    default:
        return HB_LAUNCH((linear8_exact_kernel<2, 1, TILES>), blocks, THREADS, bytes, queue->stream,
                         sized);
    }
}

int split(const hb_cuda_queue *queue, const linear8_job &job)
{
    linear8_job sized = job;
    sized.x_tiles = expert_tiles(job.a, SPLIT_ROWS);
    const int64_t blocks = hb_ceil_div(job.pitch, (int64_t)THREADS * SPLIT_EACH) * sized.x_tiles;
    switch (job.a.io_dtype) {
    case HB_F32:
        return HB_LAUNCH((linear8_split_kernel<HB_F32>), blocks, THREADS, 0, queue->stream, sized);
    case HB_BF16:
        return HB_LAUNCH((linear8_split_kernel<HB_BF16>), blocks, THREADS, 0, queue->stream, sized);
    default:
        return HB_LAUNCH((linear8_split_kernel<HB_F16>), blocks, THREADS, 0, queue->stream, sized);
    }
}

bool needs_split(const hb_cuda_linear8 &a)
{
    return a.transposed || a.io_dtype == HB_F32;
}

int64_t steps_of(const hb_cuda_linear8 &a)
{
    return a.transposed ? a.rows : a.depth;
}

int64_t pitch_of(const hb_cuda_linear8 &a)
{
    return hb_ceil_div(steps_of(a), (int64_t)16) * 16;
}

// Rows of x at a time.
int64_t turn_of(const hb_cuda_linear8 &a)
{
    if (!needs_split(a) || a.offsets != nullptr || pitch_of(a) == 0) return a.m;
    const int64_t rows = MOST_BYTES / (pitch_of(a) * 6) / 16 * 16;
    return a.m <= rows ? a.m : rows > 16 ? rows : 16;
}

bool aligned_to(const void *p, uintptr_t bytes)
{
    return (uintptr_t)p % bytes == 0;
}

} // namespace

bool hb_cuda_linear8_wide_fits(const hb_cuda_queue *queue, const hb_cuda_linear8 &a)
{
    if (hb_cuda_device_major(queue->device) < 8) return false;
    if (a.transposed) return a.depth % 4 == 0 && aligned_to(a.codes, 4);
    return a.depth % 16 == 0 && a.depth < 1 << 30 && aligned_to(a.codes, 16) &&
           (needs_split(a) || aligned_to(a.x, 16));
}

int64_t hb_cuda_linear8_wide_workspace(const hb_cuda_linear8 &a)
{
    if (!needs_split(a)) return 0;
    return hb_ceil_div(turn_of(a) * pitch_of(a) * 6, (int64_t)256) * 256;
}

int hb_cuda_launch_linear8_wide(const hb_cuda_queue *queue, const linear8_job &job)
{
    const hb_cuda_linear8 &a = job.a;
    const int64_t turn = turn_of(a), io_bytes = (int64_t)hb_dtype_bytes((hb_dtype)a.io_dtype);
    const int64_t each = a.offsets != nullptr ? a.m / a.experts : a.m;
    const int64_t outputs = a.transposed ? a.depth : a.rows;
    for (int64_t first = 0; first < a.m; first += turn) {
        linear8_job part = job;
        part.a.x = (const uint8_t *)a.x + first * steps_of(a) * io_bytes;
        part.a.y = (uint8_t *)a.y + first * outputs * io_bytes;
        part.a.m = a.m - first < turn ? a.m - first : turn;
        part.planes = (uint16_t *)a.workspace;
        part.pitch = pitch_of(a);
        int status = needs_split(a) && part.pitch > 0 ? split(queue, part) : 0;
        if (status == 0) status = each <= 8 ? launch<1>(queue, part) : launch<2>(queue, part);
        if (status != 0) return status;
    }
    return 0;
}
