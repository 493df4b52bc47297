// Products of x in floats with int8 weights on tensor cores (sm_80): the exact mode, and gradients
// (transposed). Formulas in linear8.cuh.
//
// The codes become 16-bit floats in registers, exactly. x of 16 bits goes in as it is; float32 x,
// and for gradients x times scale / 127 in float32, as the sum of three bfloat16, exactly, at three
// mma instead of one. So every product is exact and every sum float32, as on the CPU.
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
    AHEAD = 2,   // chunks of a warp under way: exact
    STEPS = 4,   // and of gradients
    COLUMNS = 32 // of W, a block of gradients
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

// y of the rows of x that meet nobody.
template <int IO>
HB_DEVICE void store_zeros(void *y, const expert_rows &rows, int64_t outputs, int64_t first,
                           int64_t most)
{
    const int n = (int)(outputs - first < most ? outputs - first : most);
    for (int i = thread_index(); i < (int)(rows.end - rows.begin) * n; i += THREADS)
        store_float<IO>(y, (rows.begin + i / n) * outputs + first + i % n, 0.0f);
}

// ---- exact --------------------------------------------------------------------------------------

// 16 k of a row of x from `p` on, as the fragments of TERMS mma: 8 words of two elements each.
template <int IO, int TERMS> HB_DEVICE void row_load(const void *x, int64_t i, uint32_t (*words)[8])
{
    if constexpr (IO == 0) {
        const uint4 *p = (const uint4 *)((const float *)x + i);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const uint4 four = load(p + n);
            split_pair(bits_float(four.x), bits_float(four.y), words[0] + 2 * n, 8);
            split_pair(bits_float(four.z), bits_float(four.w), words[0] + 2 * n + 1, 8);
        }
    } else {
        const uint4 *p = (const uint4 *)((const uint16_t *)x + i);
        const uint4 a = load(p), b = load(p + 1);
        words[0][0] = a.x, words[0][1] = a.y, words[0][2] = a.z, words[0][3] = a.w;
        words[0][4] = b.x, words[0][5] = b.y, words[0][6] = b.z, words[0][7] = b.w;
    }
}

template <int IO, int TILES> HB_KERNEL(THREADS) linear8_exact_kernel(HB_ARGS linear8_job job)
{
    enum { X = 8 * TILES, PITCH = 20, TERMS = IO == 0 ? 3 : 1, TYPE = IO == 2 ? 2 : 1 };
    const hb_cuda_linear8 &a = job.a;
    float *sums = (float *)shared_memory(); // [WARPS][X][PITCH]
    const int g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t block = (uint32_t)block_index(), x_tiles = (uint32_t)job.x_tiles;
    const int64_t first = (int64_t)(block / x_tiles) * ROWS;
    const expert_rows rows = expert_find(a, block % x_tiles, X);
    if (rows.begin >= rows.end) return;
    if (rows.expert < 0) return store_zeros<IO>(a.y, rows, a.rows, first, ROWS);
    const int n_x = (int)(rows.end - rows.begin), depth = (int)a.depth;
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
                uint32_t words[TERMS][8] = {{0}};
                if (8 * tile + g < n_x && k < depth)
                    row_load<IO, TERMS>(a.x, (rows.begin + 8 * tile + g) * a.depth + k, words);
#pragma unroll
                for (int term = 0; term < TERMS; term++)
#pragma unroll
                    for (int step = 0; step < 4; step++)
                        mma_16x8x16<TYPE>(sum[tile], fragment[step], words[term] + 2 * step);
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
        store_float<IO>(a.y, (rows.begin + i / ROWS) * a.rows + row,
                        linear8_finish(a, rows.expert * a.rows + row, total));
    }
}

// ---- gradients ----------------------------------------------------------------------------------

// What a lane has of 16 rows of W: four columns of each of four rows, and their scale / 127.
struct block_data {
    uint32_t codes[4];
    float factor[4];
};

template <int IO, int TILES> HB_KERNEL(THREADS) linear8_gradient_kernel(HB_ARGS linear8_job job)
{
    enum { X = 8 * TILES, PITCH = COLUMNS + 4 };
    const hb_cuda_linear8 &a = job.a;
    float *sums = (float *)shared_memory(); // [WARPS][X][PITCH]
    const int g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t block = (uint32_t)block_index(), x_tiles = (uint32_t)job.x_tiles;
    const int64_t first = (int64_t)(block / x_tiles) * COLUMNS;
    const expert_rows rows = expert_find(a, block % x_tiles, X);
    if (rows.begin >= rows.end) return;
    if (rows.expert < 0) return store_zeros<IO>(a.y, rows, a.depth, first, COLUMNS);
    const int n_x = (int)(rows.end - rows.begin);
    // Columns behind the last are read as the first and not stored.
    const int64_t k = first + 4 * g < a.depth ? first + 4 * g : first;
    float sum[TILES][2][4] = {{{0.0f}}};
    for (int64_t base = warp_index() * ROWS + 4 * t; base - 4 * t < a.rows;
         base += STEPS * WARPS * ROWS) {
        block_data data[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; i++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int64_t row = base + i * WARPS * ROWS + n;
                const int64_t stacked = rows.expert * a.rows + row;
                data[i].codes[n] =
                    row < a.rows ? load_once((const uint32_t *)(a.codes + stacked * a.depth + k))
                                 : 0;
                data[i].factor[n] = row < a.rows ? linear8_factor(a.scale, stacked) : 0.0f;
            }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int64_t row = base + i * WARPS * ROWS;
            const uint32_t *codes = data[i].codes;
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
                float x[4];
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const int64_t j = rows.begin + 8 * tile + g;
                    const bool is_there = 8 * tile + g < n_x && row + n < a.rows;
                    x[n] = is_there ? mul_rn(load_float<IO>(a.x, j * a.rows + row + n),
                                             data[i].factor[n])
                                    : 0.0f;
                }
                uint32_t words[3][2];
                split_pair(x[0], x[1], words[0], 2);
                split_pair(x[2], x[3], words[0] + 1, 2);
#pragma unroll
                for (int term = 0; term < 3; term++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        mma_16x8x16<1>(sum[tile][half], fragment[half], words[term]);
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
        store_float<IO>(a.y, (rows.begin + i / COLUMNS) * a.depth + column, total);
    }
}

template <int IO, int TILES> int launch(const hb_cuda_queue *queue, const linear8_job &job)
{
    linear8_job sized = job;
    sized.x_tiles = expert_tiles(job.a, 8 * TILES);
    if (job.a.transposed)
        return HB_LAUNCH((linear8_gradient_kernel<IO, TILES>),
                         hb_ceil_div(job.a.depth, (int64_t)COLUMNS) * sized.x_tiles, THREADS,
                         WARPS * 8 * TILES * (COLUMNS + 4) * 4, queue->stream, sized);
    return HB_LAUNCH((linear8_exact_kernel<IO, TILES>),
                     hb_ceil_div(job.a.rows, (int64_t)ROWS) * sized.x_tiles, THREADS,
                     WARPS * 8 * TILES * 20 * 4, queue->stream, sized);
}

template <int IO> int launch(const hb_cuda_queue *queue, const linear8_job &job)
{
    const int64_t each = job.a.offsets != nullptr ? job.a.m / job.a.experts : job.a.m;
    return each <= 8 ? launch<IO, 1>(queue, job) : launch<IO, 2>(queue, job);
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
    return a.depth % 16 == 0 && a.depth < 1 << 30 && aligned_to(a.codes, 16) && aligned_to(a.x, 16);
}

int hb_cuda_launch_linear8_wide(const hb_cuda_queue *queue, const linear8_job &job)
{
    switch (job.a.io_dtype) {
    case HB_F32: return launch<HB_F32>(queue, job);
    case HB_BF16: return launch<HB_BF16>(queue, job);
    default: return launch<HB_F16>(queue, job);
    }
}
