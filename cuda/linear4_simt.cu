// y = x W^T + b and, transposed, y = x W with 4-bit W, for everything that tensor cores do not
// take: float32 x (exact float32 products), any depth, block size and alignment, GPUs before sm_80.
// A weight is value * absmax, rounded to float32, and never to 16 bits.
//
//   forward     a warp takes 4 rows of W and 8 rows of x, lane l the weights 8l .. 8l + 7 of every
//               256: 4 bytes of codes a row, 8 consecutive elements of each row of x. At the end
//               the 32 lanes' 32 sums are added across the warp
//   transposed  a warp takes 256 columns of W and 8 rows of x, lane l the columns 8l .. 8l + 7 of
//               every eighth row of W; the block's eight warps add up in their order
//
// Wide is this; what it cannot load in whole words (depth no multiple of 8, codes or x that begin
// anywhere) the narrow kernels take element by element, one row of W a warp, one column a lane.
//
// Few tiles: several blocks share the steps of one (linear4.cuh). Floor at one row of x and
// float32: 0.5625 bytes a weight, of which this is far, with two and a half instructions to decode
// a weight and one multiply-add for each row of x; at 8 rows the multiply-adds are most of it.
#include "linear4.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / HB_LANES,
    COLUMNS = 8, // rows of x a warp
    WIDE = 8,    // weights of a lane at once
    WIDE_ROWS = 4,
    RESIDENT = 2,
    SPLIT_DEPTH = 2048, // steps worth a block of their own
    SPLIT_ROWS = 256,
    TABLE_BYTES = 16 * 4
};

struct decoder {
    const float *value, *map; // in shared memory
    float offset;
};

// Tables into shared memory, of which `more` bytes behind them are the caller's.
HB_DEVICE decoder decoder_fill(const hb_cuda_linear4 &a, int more)
{
    float *value = (float *)shared_memory(), *map = (float *)(shared_memory() + TABLE_BYTES + more);
    codebook_fill(value, a.format);
    scale_map_fill(a.scales, map);
    block_sync();
    return {value, map, scale_offset(a.scales)};
}

// Eight weights from `element`, a multiple of 8: all in one block.
HB_DEVICE void decode_wide(const linear4_job &job, const decoder &d, int64_t element, float *w)
{
    const uint32_t codes = load_once((const uint32_t *)(job.a.packed + element / 2));
    const float scale = scale_of(job.a.scales, d.map, d.offset, element >> job.block_shift);
#pragma unroll
    for (int i = 0; i < WIDE; i++) // the first of a byte is its high half
        w[i] = mul_rn(shared_load(d.value + (codes >> (4 * (i ^ 1)) & 15)), scale);
}

HB_DEVICE float decode(const linear4_job &job, const decoder &d, int64_t element)
{
    const uint32_t byte = load(job.a.packed + element / 2);
    const float scale = scale_of(job.a.scales, d.map, d.offset, element >> job.block_shift);
    return mul_rn(shared_load(d.value + (element % 2 ? byte & 15 : byte >> 4)), scale);
}

// Eight consecutive elements of x, 16-byte aligned, to be read again by others.
template <int IO> HB_DEVICE void load_x(const void *x, int64_t i, float *value)
{
    if (IO == 0) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 four = load((const uint4 *)((const float *)x + i) + half);
            value[4 * half] = bits_float(four.x);
            value[4 * half + 1] = bits_float(four.y);
            value[4 * half + 2] = bits_float(four.z);
            value[4 * half + 3] = bits_float(four.w);
        }
        return;
    }
    const uint4 eight = load((const uint4 *)((const uint16_t *)x + i));
    const uint32_t pair[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int p = 0; p < 4; p++) {
        value[2 * p] = unpack_low<IO>(pair[p]);
        value[2 * p + 1] = unpack_high<IO>(pair[p]);
    }
}

// Which tile, split and rows of x a block has.
struct place {
    int64_t tile, split;
    expert_rows rows;
};

HB_DEVICE place place_of(const linear4_job &job)
{
    const int64_t column = block_index() % job.columns, rest = block_index() / job.columns;
    return {rest % job.tiles, rest / job.tiles, expert_find(job.a, column, COLUMNS)};
}

template <int IO, bool IS_WIDE>
HB_KERNEL_RESIDENT(THREADS, RESIDENT)
linear4_simt_kernel(HB_ARGS linear4_job job)
{
    enum { ROWS = IS_WIDE ? WIDE_ROWS : 1, STEP = IS_WIDE ? WIDE * HB_LANES : HB_LANES };
    const hb_cuda_linear4 &a = job.a;
    const decoder d = decoder_fill(a, 0);
    const place p = place_of(job);
    const int64_t row = (p.tile * WARPS + warp_index()) * ROWS;
    if (p.rows.begin >= p.rows.end || row >= a.rows) return; // the whole warp
    const int64_t count = p.rows.end - p.rows.begin;
    float sum[ROWS][COLUMNS] = {};
    if (p.rows.expert >= 0) {
        const int64_t turns = (a.depth + STEP - 1) / STEP;
        const int64_t begin = turns * p.split / job.splits * STEP;
        int64_t end = turns * (p.split + 1) / job.splits * STEP;
        if (end > a.depth) end = a.depth;
        for (int64_t k = begin + lane_index() * (STEP / HB_LANES); k < end; k += STEP) {
            float w[ROWS][IS_WIDE ? WIDE : 1];
#pragma unroll
            for (int r = 0; r < ROWS; r++) { // rows behind the last are read as the last
                const int64_t of =
                    p.rows.expert * a.rows + (row + r < a.rows ? row + r : a.rows - 1);
                if (IS_WIDE)
                    decode_wide(job, d, of * a.depth + k, w[r]);
                else
                    w[r][0] = decode(job, d, of * a.depth + k);
            }
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                if (j >= count) continue;
                const int64_t at = (p.rows.begin + j) * a.depth + k;
                float x[IS_WIDE ? WIDE : 1];
                if (IS_WIDE)
                    load_x<IO>(a.x, at, x);
                else
                    x[0] = load_float<IO>(a.x, at);
#pragma unroll
                for (int i = 0; i < (IS_WIDE ? WIDE : 1); i++)
#pragma unroll
                    for (int r = 0; r < ROWS; r++) sum[r][j] += w[r][i] * x[i];
            }
        }
    }
    float mine = 0.0f; // of row lane / 8 and column lane % 8
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            float all = sum[r][j];
            for (int mask = 1; mask < HB_LANES; mask *= 2)
                all += bits_float(shuffle_xor(float_bits(all), mask));
            if (lane_index() == r * COLUMNS + j) mine = all;
        }
    const int r = lane_index() / COLUMNS, j = lane_index() % COLUMNS;
    if (r < ROWS && j < count && row + r < a.rows)
        linear4_store<IO>(job, p.split, p.rows, p.rows.begin + j, row + r, mine);
}

template <int IO, bool IS_WIDE>
HB_KERNEL_RESIDENT(THREADS, 1)
linear4_simt_transposed_kernel(HB_ARGS linear4_job job)
{
    enum { EACH = IS_WIDE ? WIDE : 1, TILE = EACH * HB_LANES };
    const hb_cuda_linear4 &a = job.a;
    float *sums = (float *)(shared_memory() + TABLE_BYTES); // [WARPS][TILE]
    const decoder d = decoder_fill(a, WARPS * TILE * 4);
    const place p = place_of(job);
    if (p.rows.begin >= p.rows.end) return; // the whole block
    const int64_t count = p.rows.end - p.rows.begin;
    const int64_t k = p.tile * TILE + lane_index() * EACH;
    float sum[COLUMNS][EACH] = {};
    if (p.rows.expert >= 0 && k < a.depth) {
        const int64_t end = a.rows * (p.split + 1) / job.splits;
        for (int64_t n = a.rows * p.split / job.splits + warp_index(); n < end; n += WARPS) {
            const int64_t element = (p.rows.expert * a.rows + n) * a.depth + k;
            float w[EACH];
            if (IS_WIDE)
                decode_wide(job, d, element, w);
            else
                w[0] = decode(job, d, element);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                if (j >= count) continue;
                const float x = load_float<IO>(a.x, (p.rows.begin + j) * a.rows + n);
#pragma unroll
                for (int i = 0; i < EACH; i++) sum[j][i] += w[i] * x;
            }
        }
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        if (j >= count) continue;
#pragma unroll
        for (int i = 0; i < EACH; i++) // lane after lane: no two in one bank
            shared_store(sums + warp_index() * TILE + i * HB_LANES + lane_index(), sum[j][i]);
        block_sync();
        const int i = thread_index(); // column i of the tile
        if (i < TILE && p.tile * TILE + i < a.depth) {
            float all = 0.0f;
            for (int w = 0; w < WARPS; w++)
                all += shared_load(sums + w * TILE + i % EACH * HB_LANES + i / EACH);
            linear4_store<IO>(job, p.split, p.rows, p.rows.begin + j, p.tile * TILE + i, all);
        }
        block_sync();
    }
}

bool is_wide(const hb_cuda_linear4 &a)
{
    const bool x = a.transposed || ((uintptr_t)a.x & 15) == 0;
    return x && a.depth % WIDE == 0 && ((uintptr_t)a.packed & 3) == 0;
}

// Outputs of a block.
int64_t tile_of(const hb_cuda_linear4 &a)
{
    if (a.transposed) return HB_LANES * (is_wide(a) ? WIDE : 1);
    return WARPS * (is_wide(a) ? WIDE_ROWS : 1);
}

int64_t splits(const hb_cuda_queue *queue, const hb_cuda_linear4 &a)
{
    const int64_t blocks = hb_ceil_div(linear4_outputs(a), tile_of(a)) * expert_tiles(a, COLUMNS);
    return linear4_splits(queue, blocks, linear4_steps(a), RESIDENT,
                          a.transposed ? SPLIT_ROWS : SPLIT_DEPTH);
}

template <int IO, bool IS_WIDE> int launch(const hb_cuda_queue *queue, const hb_cuda_linear4 &a)
{
    const linear4_job job = linear4_job_of(a, tile_of(a), COLUMNS, splits(queue, a));
    const int64_t blocks = job.tiles * job.columns * job.splits;
    const int bytes = TABLE_BYTES + scale_map_bytes(a.scales);
    const int sums = WARPS * HB_LANES * (IS_WIDE ? WIDE : 1) * 4;
    const int status = a.transposed ? HB_LAUNCH((linear4_simt_transposed_kernel<IO, IS_WIDE>),
                                                blocks, THREADS, bytes + sums, queue->stream, job)
                                    : HB_LAUNCH((linear4_simt_kernel<IO, IS_WIDE>), blocks, THREADS,
                                                bytes, queue->stream, job);
    return status != 0 ? status : linear4_add_partial(queue, job);
}

template <int IO> int launch(const hb_cuda_queue *queue, const hb_cuda_linear4 &a)
{
    return is_wide(a) ? launch<IO, true>(queue, a) : launch<IO, false>(queue, a);
}

} // namespace

bool hb_cuda_linear4_simt_fits(const hb_cuda_queue *, const hb_cuda_linear4 *)
{
    return true;
}

int64_t hb_cuda_linear4_simt_workspace(const hb_cuda_queue *queue, const hb_cuda_linear4 *args)
{
    return linear4_partial_bytes(*args, splits(queue, *args));
}

int hb_cuda_launch_linear4_simt(const hb_cuda_queue *queue, const hb_cuda_linear4 *args)
{
    switch (args->io_dtype) {
    case HB_F32: return launch<HB_F32>(queue, *args);
    case HB_BF16: return launch<HB_BF16>(queue, *args);
    default: return launch<HB_F16>(queue, *args);
    }
}
