// y = x W^T + b for 1 to 8 rows of bfloat16 or float16 x, on tensor cores, straight from the
// bitsandbytes layout. Any number of rows from 1 to 8 costs the same; more are done eight at a
// time.
//
// The weights are the 16-row operand: a warp holds 16 rows of W and 64 consecutive k ("a chunk"),
// lane (g, t) the 8 bytes of row g and of row g + 8 with k = 16t .. 16t + 15. The order of k inside
// a chunk is free as long as x has the same one, so each byte becomes a fragment register by one
// look-up:
//
//   pair[byte] = (value[byte >> 4], value[byte & 15]) in two 16-bit floats, 32 copies, one a bank
//
// Four mma of 16 k make the chunk's part, which is then scaled in float32: a chunk lies within one
// block of scales, as depth % 64 == 0 and blocksize >= 64. The eight warps of a block take every
// eighth chunk of the same 16 rows and are summed in order: deterministic.
//
// Floor: 0.5625 bytes a weight at block size 64 (H200: 4.4 instructions of a lane a weight; this
// loop needs 2.3).
#include "codebooks.cuh"
#include "kernels.cuh"
#include "scales4.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / HB_LANES,
    ROWS = 16,   // of W a block
    COLUMNS = 8, // rows of x a block
    CHUNK = 64,
    AHEAD = 4, // chunks loaded before the first is used
    PAIR_BYTES = 256 * HB_LANES * 4,
    SUM_BYTES = WARPS * ROWS * COLUMNS * 4
};

// 256 entries of 32 copies: entry e, copy l at word e * 32 + l, so that lane l reads bank l.
template <int IO> HB_DEVICE void pair_table_fill(uint32_t *pair, const float *value)
{
    for (int i = thread_index(); i < 256 * HB_LANES / 4; i += THREADS) {
        int entry = i / (HB_LANES / 4);
        uint32_t bits =
            pack<IO>(shared_load(value + (entry >> 4)), shared_load(value + (entry & 15)));
        shared_store((uint4 *)pair + i, uint4{bits, bits, bits, bits});
    }
}

// Registers of one chunk: the codes of both rows, their scales, x.
struct chunk_data {
    uint2 codes[2];
    float scale[2];
    uint4 x[2];
};

template <int IO>
HB_DEVICE void chunk_load(const hb_cuda_linear4 &a, const float *map, float offset, int64_t row,
                          int64_t x_row, int64_t chunk, chunk_data *c)
{
    const int t = lane_index() % 4;
    const int64_t k = chunk * CHUNK;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Rows behind the last are read as the last and not stored.
        int64_t r = row + 8 * half < a.rows ? row + 8 * half : a.rows - 1;
        int64_t element = r * a.depth + k;
        c->codes[half] = load_once((const uint2 *)(a.packed + element / 2 + 8 * t));
        c->scale[half] = scale_of(a.scales, map, offset, block_of(element, a.blocksize));
        c->x[half] = uint4{0, 0, 0, 0};
        if (x_row < a.m)
            c->x[half] =
                load((const uint4 *)((const uint16_t *)a.x + x_row * a.depth + k + 16 * t) + half);
    }
}

template <int IO> HB_DEVICE void chunk_add(const uint32_t *pair, const chunk_data &c, float *sum)
{
    const uint32_t *mine = pair + lane_index();
    const uint32_t word[2][2] = {{c.codes[0].x, c.codes[0].y}, {c.codes[1].x, c.codes[1].y}};
    const uint32_t x[8] = {c.x[0].x, c.x[0].y, c.x[0].z, c.x[0].w,
                           c.x[1].x, c.x[1].y, c.x[1].z, c.x[1].w};
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int step = 0; step < 4; step++) { // k = 16t + 4 step .. + 3: bytes 2 step and 2 step + 1
        uint32_t fragment[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            uint32_t bytes = word[r % 2][step / 2] >> (16 * (step % 2) + 8 * (r / 2));
            fragment[r] = shared_load(mine + (bytes & 255) * HB_LANES);
        }
        const uint32_t columns[2] = {x[2 * step], x[2 * step + 1]};
        mma_16x8x16<IO>(part, fragment, columns);
    }
    sum[0] += c.scale[0] * part[0];
    sum[1] += c.scale[0] * part[1];
    sum[2] += c.scale[1] * part[2];
    sum[3] += c.scale[1] * part[3];
}

template <int IO> HB_KERNEL(THREADS) linear4_mma_kernel(HB_ARGS hb_cuda_linear4 a)
{
    uint32_t *pair = (uint32_t *)shared_memory();
    float *sums = (float *)(shared_memory() + PAIR_BYTES); // [WARPS][ROWS][COLUMNS]
    float *value = sums;                                   // the codebook, until the pairs are made
    float *map = (float *)(shared_memory() + PAIR_BYTES + SUM_BYTES);
    codebook_fill(value, a.format);
    scale_map_fill(a.scales, map);
    block_sync();
    pair_table_fill<IO>(pair, value);
    block_sync();

    const int64_t row_blocks = (a.rows + ROWS - 1) / ROWS;
    const int64_t first_row = block_index() % row_blocks * ROWS;
    const int64_t first_x = block_index() / row_blocks * COLUMNS;
    const int g = lane_index() / 4, t = lane_index() % 4;
    const float offset = scale_offset(a.scales);
    const int64_t chunks = a.depth / CHUNK;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int64_t base = warp_index(); base < chunks; base += WARPS * AHEAD) {
        chunk_data data[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (base + i * WARPS < chunks)
                chunk_load<IO>(a, map, offset, first_row + g, first_x + g, base + i * WARPS,
                               data + i);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (base + i * WARPS < chunks) chunk_add<IO>(pair, data[i], sum);
    }

    float *mine = sums + warp_index() * ROWS * COLUMNS;
    shared_store(mine + g * COLUMNS + 2 * t, sum[0]);
    shared_store(mine + g * COLUMNS + 2 * t + 1, sum[1]);
    shared_store(mine + (g + 8) * COLUMNS + 2 * t, sum[2]);
    shared_store(mine + (g + 8) * COLUMNS + 2 * t + 1, sum[3]);
    block_sync();
    const int i = thread_index(); // consecutive threads: consecutive rows of W
    const int64_t row = first_row + i % ROWS, x_row = first_x + i / ROWS;
    if (i >= ROWS * COLUMNS || row >= a.rows || x_row >= a.m) return;
    float y = 0.0f;
    for (int w = 0; w < WARPS; w++)
        y += shared_load(sums + (w * ROWS + i % ROWS) * COLUMNS + i / ROWS);
    y += bias_of(a, row);
    store_float<IO>(a.y, x_row * a.rows + row, y);
}

template <int IO> int launch(const hb_cuda_queue *queue, const hb_cuda_linear4 &a)
{
    const int64_t blocks = hb_ceil_div(a.rows, (int64_t)ROWS) * hb_ceil_div(a.m, (int64_t)COLUMNS);
    const int shared_bytes = PAIR_BYTES + SUM_BYTES + scale_map_bytes(a.scales);
    return HB_LAUNCH((linear4_mma_kernel<IO>), blocks, THREADS, shared_bytes, queue->stream, a);
}

} // namespace

bool hb_cuda_linear4_mma_fits(const hb_cuda_queue *queue, const hb_cuda_linear4 *a)
{
    return a->io_dtype != HB_F32 && a->depth % CHUNK == 0 && a->blocksize >= CHUNK &&
           ((uintptr_t)a->packed & 7) == 0 && ((uintptr_t)a->x & 15) == 0 &&
           hb_cuda_device_major(queue->device) >= 8;
}

int hb_cuda_launch_linear4_mma(const hb_cuda_queue *queue, const hb_cuda_linear4 *args)
{
    return args->io_dtype == HB_BF16 ? launch<HB_BF16>(queue, *args) : launch<HB_F16>(queue, *args);
}
