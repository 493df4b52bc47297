// y = x W^T + b for 1 to 8 rows of bfloat16 or float16 x, on tensor cores, straight from the
// bitsandbytes layout. Any number of rows from 1 to 8 costs the same; more are done eight at a
// time.
//
// The weights are the 16-row operand: a warp holds 16 rows of W and 64 consecutive k ("a chunk"),
// lane (g, t) 8 bytes of row g and 8 of row g + 8. The order of k inside a chunk is free as long as
// x has the same one, so each byte becomes a fragment register by one look-up (pair_table.cuh), and
// the products of one scale are summed by mma alone, then scaled in float32:
//
//   coarse  depth a multiple of 64, blocks of 64 or more: a chunk has one scale. Lane t has
//           k = 16t .. 16t + 15, in one load
//   fine    depth a multiple of 32: each half of a chunk has one scale. Lane t has
//           k = 8t .. 8t + 7 of both halves
//
// A block makes 16 rows of W; its eight warps take every eighth chunk and are summed in order:
// deterministic. Blocks stay and go on to the next 16 rows where there are more than the GPU holds,
// with the first loads of the next under way while this one ends. Few rows and great depth: several
// blocks share a tile (linear4.cuh).
//
// Floor: 0.5625 bytes a weight at block size 64, for which an H200 has time for 4.4 instructions of
// a lane a weight (4.0 with nested scales). The loop issues 2.4 (3.1) of them in sm_90 code: for a
// byte of two weights one to cut it out, one for the address, one look-up; for 32 bytes of a lane
// four mma, four multiply-adds, six loads and twelve for addresses. See tests/cuda/gates.toml.
#include "linear4.cuh"
#include "pair_table.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / HB_LANES,
    ROWS = 16,   // of W a block
    COLUMNS = 8, // rows of x a block
    CHUNK = 64,
    RESIDENT = 2, // blocks a multiprocessor
    SUM_BYTES = 2 * WARPS * ROWS * COLUMNS * 4,
    // Chunks worth a block of its own: below, a second kernel costs more than it spares.
    SPLIT_CHUNKS = 64
};

// Chunks of a warp under way: what fits into 128 registers.
template <bool FINE, bool NESTED> struct ahead {
    enum { CHUNKS = 4 - FINE - NESTED };
};

// Where a lane finds the scales of a row of W. Elements are counted in 32 bits from the beginning
// of the row's first block, blocks from the beginning of the first nested one.
struct scale_source {
    const float *outer;   // absmax at the first block; nested: nested_absmax
    const uint8_t *codes; // nested: absmax_codes at the first block
    uint32_t phase, outer_phase;
};

// Where a lane reads, and which chunks are still to be loaded.
struct source {
    const uint8_t *codes[2]; // rows g and g + 8, at `chunk`
    scale_source scale[2];
    const uint16_t *x;   // at `chunk`
    uint32_t chunk, end; // this warp's next chunk; the tile's end
};

// Registers of one chunk.
template <bool FINE> struct chunk_data {
    uint32_t codes[2][2]; // [row][half]
    linear4_scale scale[2][FINE ? 2 : 1];
    uint4 x[2];
};

template <bool FINE, bool NESTED>
HB_DEVICE source source_of(const linear4_job &job, int64_t tile, int64_t split,
                           const expert_rows &rows)
{
    const hb_cuda_linear4 &a = job.a;
    const int g = lane_index() / 4, t = lane_index() % 4;
    const uint32_t chunks = (uint32_t)((a.depth + CHUNK - 1) / CHUNK);
    source s;
    s.chunk = (uint32_t)(chunks * split / job.splits) + (uint32_t)warp_index();
    s.end = rows.expert < 0 ? 0 : (uint32_t)(chunks * (split + 1) / job.splits);
    const int64_t expert = rows.expert < 0 ? 0 : rows.expert;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Rows behind the last are read as the last and not stored.
        int64_t r = tile * ROWS + g + 8 * half;
        r = expert * a.rows + (r < a.rows ? r : a.rows - 1);
        const int64_t element = r * a.depth, block = element >> job.block_shift;
        s.codes[half] =
            a.packed + element / 2 + (int64_t)s.chunk * (CHUNK / 2) + (FINE ? 4 : 8) * t;
        scale_source &scale = s.scale[half];
        scale.phase = (uint32_t)element & (uint32_t)(a.blocksize - 1);
        if (NESTED) {
            scale.outer = a.scales.nested_absmax + (block >> job.nested_shift);
            scale.outer_phase = (uint32_t)block & (uint32_t)(a.scales.nested_blocksize - 1);
            scale.codes = a.scales.absmax_codes + block;
        } else {
            scale.outer = a.scales.absmax + block;
        }
    }
    int64_t x_row = rows.begin + g; // so are rows of x
    if (x_row >= rows.end) x_row = rows.end - 1;
    s.x = (const uint16_t *)a.x + x_row * a.depth + (int64_t)s.chunk * CHUNK + (FINE ? 8 : 16) * t;
    return s;
}

// The scale of element k of a row.
template <bool NESTED>
HB_DEVICE linear4_scale scale_at(const linear4_job &job, const scale_source &s, uint32_t k)
{
    const uint32_t block = (s.phase + k) >> job.block_shift;
    if (!NESTED) return {load(s.outer + block), 0};
    return {load(s.outer + ((s.outer_phase + block) >> job.nested_shift)), load(s.codes + block)};
}

// Chunk `number` (a constant) of this warp from where `s` stands. Of the last chunk of a
// depth that is an odd multiple of 32, the second half is read as zeros.
template <bool FINE, bool NESTED>
HB_DEVICE void chunk_load(const linear4_job &job, const source &s, int number, chunk_data<FINE> *c)
{
    const uint32_t k = (s.chunk + number * WARPS) * CHUNK;
    const bool whole = !FINE || k + CHUNK <= (uint32_t)job.a.depth;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint8_t *codes = s.codes[r] + number * WARPS * (CHUNK / 2);
        c->scale[r][0] = scale_at<NESTED>(job, s.scale[r], k);
        if (FINE) {
            const uint32_t next = whole ? k + CHUNK / 2 : k;
            c->scale[r][FINE ? 1 : 0] = scale_at<NESTED>(job, s.scale[r], next);
            c->codes[r][0] = load_once((const uint32_t *)codes);
            c->codes[r][1] = whole ? load_once((const uint32_t *)(codes + CHUNK / 4)) : 0;
        } else {
            const uint2 both = load_once((const uint2 *)codes);
            c->codes[r][0] = both.x;
            c->codes[r][1] = both.y;
        }
    }
    const uint16_t *x = s.x + number * WARPS * CHUNK;
    c->x[0] = load((const uint4 *)x);
    if (whole)
        c->x[1] = load((const uint4 *)(x + (FINE ? CHUNK / 2 : 8)));
    else
        c->x[1] = uint4{0, 0, 0, 0};
}

template <int IO, bool FINE, bool NESTED>
HB_DEVICE void chunk_add(uint32_t pair, const float *map, float offset, const chunk_data<FINE> &c,
                         float *sum)
{
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t x[4] = {c.x[half].x, c.x[half].y, c.x[half].z, c.x[half].w};
#pragma unroll
        for (int step = 0; step < 2; step++) { // two bytes of each row, four k of each lane
            uint32_t fragment[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                fragment[i] = pair_at(pair, c.codes[i % 2][half], 2 * step + i / 2);
            mma_16x8x16<IO>(part, fragment, x + 2 * step);
        }
        if (FINE || half == 1) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const linear4_scale &raw = c.scale[i / 2][FINE ? half : 0];
                sum[i] += scale_finish<NESTED>(raw, map, offset) * part[i];
                part[i] = 0.0f;
            }
        }
    }
}

template <int IO, bool FINE, bool NESTED>
HB_KERNEL_RESIDENT(THREADS, RESIDENT)
linear4_mma_kernel(HB_ARGS linear4_job job)
{
    constexpr int AHEAD = ahead<FINE, NESTED>::CHUNKS, TURN = AHEAD * WARPS;
    const hb_cuda_linear4 &a = job.a;
    const uint32_t pair = shared_address(shared_memory()) + 4 * (uint32_t)lane_index();
    float *sums = (float *)(shared_memory() + PAIR_TABLE_BYTES); // [2][WARPS][ROWS][COLUMNS]
    float *map = (float *)(shared_memory() + PAIR_TABLE_BYTES + SUM_BYTES);
    const int64_t items = job.tiles * job.columns * job.splits;
    const int g = lane_index() / 4, t = lane_index() % 4;

    // An item is (tile, split, columns), the columns first. With experts there is one a block.
    int64_t item = block_index();
    expert_rows rows = expert_find(a, item % job.columns, COLUMNS);
    if (rows.begin >= rows.end) return; // the whole block
    int64_t tile = item / job.columns / job.splits, split = item / job.columns % job.splits;
    source s = source_of<FINE, NESTED>(job, tile, split, rows);
    chunk_data<FINE> data[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        if (s.chunk + i * WARPS < s.end) chunk_load<FINE, NESTED>(job, s, i, data + i);

    pair_table_fill<IO, THREADS>(shared_memory(), a.format);
    scale_map_fill(a.scales, map);
    const float offset = scale_offset(a.scales);
    block_sync();

    for (int parity = 0;; parity ^= 1) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        const int64_t next = item + grid_blocks();
        const expert_rows these = rows;
        const int64_t this_tile = tile, this_split = split;
        for (; s.chunk + TURN < s.end;) { // a full turn, and there are chunks behind it
            s.chunk += TURN;
            s.codes[0] += TURN * (CHUNK / 2);
            s.codes[1] += TURN * (CHUNK / 2);
            s.x += TURN * CHUNK;
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                chunk_add<IO, FINE, NESTED>(pair, map, offset, data[i], sum);
                if (s.chunk + i * WARPS < s.end) chunk_load<FINE, NESTED>(job, s, i, data + i);
            }
        }
        const uint32_t chunk = s.chunk, end = s.end; // the last turn
        s.end = 0;
        if (next < items) {
            rows = plain_rows(a, next % job.columns, COLUMNS);
            tile = next / job.columns / job.splits;
            split = next / job.columns % job.splits;
            s = source_of<FINE, NESTED>(job, tile, split, rows);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (chunk + i * WARPS < end)
                chunk_add<IO, FINE, NESTED>(pair, map, offset, data[i], sum);
            if (s.chunk + i * WARPS < s.end) chunk_load<FINE, NESTED>(job, s, i, data + i);
        }

        // Two places for the sums in turn: one barrier an item.
        float *mine = sums + (parity * WARPS + warp_index()) * ROWS * COLUMNS;
        shared_store(mine + g * COLUMNS + 2 * t, sum[0]);
        shared_store(mine + g * COLUMNS + 2 * t + 1, sum[1]);
        shared_store(mine + (g + 8) * COLUMNS + 2 * t, sum[2]);
        shared_store(mine + (g + 8) * COLUMNS + 2 * t + 1, sum[3]);
        block_sync();
        const int i = thread_index(); // consecutive threads: consecutive rows of W
        const int64_t row = this_tile * ROWS + i % ROWS, j = these.begin + i / ROWS;
        if (i < ROWS * COLUMNS && row < a.rows && j < these.end) {
            const float *column =
                sums + parity * WARPS * ROWS * COLUMNS + i % ROWS * COLUMNS + i / ROWS;
            float y = 0.0f;
            for (int w = 0; w < WARPS; w++) y += shared_load(column + w * ROWS * COLUMNS);
            linear4_store<IO>(job, this_split, these, j, row, y);
        }
        item = next;
        if (item >= items) return;
    }
}

int64_t splits(const hb_cuda_queue *queue, const hb_cuda_linear4 &a)
{
    const int64_t blocks = hb_ceil_div(a.rows, (int64_t)ROWS) * expert_tiles(a, COLUMNS);
    return linear4_splits(queue, blocks, hb_ceil_div(a.depth, (int64_t)CHUNK), RESIDENT,
                          SPLIT_CHUNKS);
}

template <int IO, bool FINE, bool NESTED>
int launch(const hb_cuda_queue *queue, const hb_cuda_linear4 &a)
{
    const linear4_job job = linear4_job_of(a, ROWS, COLUMNS, splits(queue, a));
    const int64_t items = job.tiles * job.columns * job.splits;
    int64_t most = (int64_t)RESIDENT * hb_cuda_device_multiprocessors(queue->device);
    const int64_t blocks = a.offsets == nullptr && most >= 1 && items > most ? most : items;
    const int shared_bytes = PAIR_TABLE_BYTES + SUM_BYTES + scale_map_bytes(a.scales);
    const int status = HB_LAUNCH((linear4_mma_kernel<IO, FINE, NESTED>), blocks, THREADS,
                                 shared_bytes, queue->stream, job);
    return status != 0 ? status : linear4_add_partial(queue, job);
}

template <int IO, bool FINE> int launch(const hb_cuda_queue *queue, const hb_cuda_linear4 &a)
{
    return a.scales.absmax != nullptr ? launch<IO, FINE, false>(queue, a)
                                      : launch<IO, FINE, true>(queue, a);
}

template <int IO> int launch(const hb_cuda_queue *queue, const hb_cuda_linear4 &a)
{
    const bool coarse = a.depth % CHUNK == 0 && a.blocksize >= CHUNK;
    return coarse ? launch<IO, false>(queue, a) : launch<IO, true>(queue, a);
}

} // namespace

// Nested blocks whose number is a shift, as always but by malice.
static bool nested_is_simple(const hb_cuda_scales4 &s)
{
    const int64_t n = s.nested_blocksize;
    return s.absmax != nullptr || ((n & (n - 1)) == 0 && n <= 1 << 30);
}

bool hb_cuda_linear4_mma_fits(const hb_cuda_queue *queue, const hb_cuda_linear4 *a)
{
    return !a->transposed && a->io_dtype != HB_F32 && a->depth > 0 && a->depth % 32 == 0 &&
           a->depth <= 1 << 30 && nested_is_simple(a->scales) && ((uintptr_t)a->packed & 7) == 0 &&
           ((uintptr_t)a->x & 15) == 0 && hb_cuda_device_major(queue->device) >= 8;
}

int64_t hb_cuda_linear4_mma_workspace(const hb_cuda_queue *queue, const hb_cuda_linear4 *args)
{
    return linear4_partial_bytes(*args, splits(queue, *args));
}

int hb_cuda_launch_linear4_mma(const hb_cuda_queue *queue, const hb_cuda_linear4 *args)
{
    return args->io_dtype == HB_BF16 ? launch<HB_BF16>(queue, *args) : launch<HB_F16>(queue, *args);
}
