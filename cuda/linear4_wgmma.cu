// y = x W^T + b and, transposed, y = x W for 17 to some thousand rows of bfloat16 or float16 x, on
// the warpgroup products of sm_90a, straight from the bitsandbytes layout.
//
//   producers  8 warps decode a tile of W, 8192 weights, into shared memory as 16-bit floats, and
//              one thread of them has the copy engine bring the tile of x
//   consumers  1 or 2 warpgroups multiply both from shared memory, 64 or 128 rows of x each
//
// in a ring of stages, each with a barrier `full` (8 producer warps, the copy and its bytes) and a
// barrier `empty` (the consumers' warps). A stage is 64 of the summation: 64 columns of x, and
//
//   forward     W rows n0 .. n0 + 127, depth k0 .. k0 + 63: a line of 128 bytes each row of W;
//               B is K-major, the step of 16 k moves 32 bytes along the line
//   transposed  W rows k0 .. k0 + 63, depth n0 .. n0 + 127: two tiles of 64 lines; B is MN-major,
//               leading offset 8192 (the next 64 columns), the step of 16 k moves 16 lines
//
// so that in both a thread decodes 32 consecutive weights of one row of W (16 bytes of codes) into
// half a line, and nothing is repacked or transposed. Lines are swizzled (hopper.cuh): the eight
// threads of a store meet eight different pieces, all 32 banks.
//
// A weight is value * absmax in float32, rounded once to x's type: what dequantize4 gives, forward
// and transposed the same. Codes are looked up in pairs, byte -> two float32, in 16 copies of the
// table so that lane l of a half warp always reads banks 2l, 2l + 1. Sums are float32 in the
// tensor cores. Error of a product: one rounding of the weight (2^-9 bfloat16, 2^-12 float16,
// relative), the sums, one rounding of y.
//
// Where there are fewer tiles of y than multiprocessors, the summation is cut into equal parts that
// go to the workspace as float32, and a second kernel adds them in order. Deterministic.
//
// Budget on an H200 (tensor peak 2048 products a clock and multiprocessor, issue 128 lanes): with
// R rows of x to a tile the decoder may take R / 16 instructions a weight, 4 / 8 / 16 for 64 / 128
// / 256 rows. It takes COUNTED. No kernel here has been timed.
#include "codebooks.cuh"
#include "hopper.cuh"
#include "kernels.cuh"
#include "scales4.cuh"

#if defined(HB_CUDA_HOST) || defined(HB_CUDA_SM90A)

namespace
{

enum {
    GROUP = 128,         // threads of a warpgroup
    PRODUCERS = 256,     // threads that decode
    DEPTH = 64,          // of the summation, a stage
    COLUMNS = 128,       // of y, a tile
    UNIT = 32,           // weights that a thread decodes, a stage
    ROW_TILE = 64 * 128, // bytes of 64 rows of x
    W_TILE = COLUMNS * DEPTH * 2,
    PAIR_COPIES = 16,
    PAIR_BYTES = 256 * PAIR_COPIES * 8,
    MAP_BYTES = 256 * 4,
    VALUE_BYTES = 16 * 4,
    MAX_PARTS = 16,
    SUM_THREADS = 256,
    SUM_COLUMNS = 4 * SUM_THREADS
};

// How a block is made up. CONSUMERS warpgroups of 64 * TILES rows each; BLOCKS share a
// multiprocessor; registers of a thread after they are shared out, which adds up to all that the
// block has at its launch (0: they stay as they are).
template <int CONSUMERS_, int TILES_, int STAGES_, int AHEAD_, int BLOCKS_, int PRODUCER_REGISTERS_,
          int CONSUMER_REGISTERS_>
struct shape {
    enum {
        CONSUMERS = CONSUMERS_,
        TILES = TILES_,
        STAGES = STAGES_,
        AHEAD = AHEAD_, // units whose codes are loaded before they are needed
        BLOCKS = BLOCKS_,
        PRODUCER_REGISTERS = PRODUCER_REGISTERS_,
        CONSUMER_REGISTERS = CONSUMER_REGISTERS_,
        THREADS = CONSUMERS * GROUP + PRODUCERS,
        ROWS = CONSUMERS * TILES * 64,
        X_TILE = CONSUMERS * TILES * ROW_TILE,
        STAGE_BYTES = X_TILE + W_TILE,
        SHARED_BYTES = HB_SWIZZLE_ATOM + STAGES * STAGE_BYTES + PAIR_BYTES + MAP_BYTES +
                       VALUE_BYTES + 2 * STAGES * 8
    };
};
typedef shape<1, 1, 6, 8, 1, 0, 0> rows64;
typedef shape<2, 1, 4, 4, 1, 96, 160> rows128;
typedef shape<2, 2, 4, 4, 1, 80, 176> rows256;

struct wgmma_args {
    hb_cuda_linear4 a;
    int64_t columns, depth; // of y, of the summation
    int64_t row_tiles, column_tiles;
    int64_t steps, parts; // stages of the summation in all, cut into parts
    float *partial;       // [parts, m, columns] when parts > 1
    bool wide;            // codes come 16 bytes at a time
    tensor_map x;
};

// entry = (value[byte >> 4], value[byte & 15]) for copy c at byte * 128 + c * 8.
template <int THREADS> HB_DEVICE void pair_table_fill(unsigned char *pairs, const float *value)
{
    for (int i = thread_index(); i < PAIR_BYTES / 16; i += THREADS) {
        const int byte = i / (PAIR_COPIES / 2);
        const uint32_t high = float_bits(shared_load(value + (byte >> 4)));
        const uint32_t low = float_bits(shared_load(value + (byte & 15)));
        shared_store((uint4 *)pairs + i, uint4{high, low, high, low});
    }
}

// A scale as it lies in memory; `value` makes the number of it.
struct raw_scale {
    float outer; // absmax, or the outer scale of a nested one
    uint32_t code;
};

HB_DEVICE raw_scale scale_fetch(const hb_cuda_scales4 &s, int64_t block)
{
    if (s.absmax != nullptr) return {load(s.absmax + block), 0};
    return {load(s.nested_absmax + block_of(block, s.nested_blocksize)),
            load(s.absmax_codes + block)};
}

HB_DEVICE float scale_value(const hb_cuda_scales4 &s, const float *map, float offset, raw_scale raw)
{
    if (s.absmax != nullptr) return raw.outer;
    return add_rn(mul_rn(shared_load(map + raw.code), raw.outer), offset);
}

// 32 weights of one row of W on their way.
struct unit_data {
    uint4 codes;
    raw_scale scale; // of the first
};

// Where a thread's units lie: `stride` elements further with each step, and inside W as far as
// what is left says.
struct unit_walk {
    int64_t element, stride; // element of step 0
    int64_t left;            // transposed: rows from that of step 0 on, else columns
    int32_t inside;          // transposed: weights inside at each step, else UNIT
};

template <bool TRANSPOSED> HB_DEVICE int unit_inside(const unit_walk &walk, int64_t step)
{
    const int64_t left = walk.left - DEPTH * step;
    if (TRANSPOSED) return left > 0 ? walk.inside : 0;
    return left <= 0 ? 0 : left < UNIT ? (int)left : (int)UNIT;
}

HB_DEVICE void unit_load(const wgmma_args &w, int64_t element, int inside, unit_data *unit)
{
    unit->codes = uint4{0, 0, 0, 0};
    unit->scale = raw_scale{0.0f, 0};
    if (inside == 0) return;
    const uint8_t *codes = w.a.packed + element / 2;
    if (w.wide) {
        unit->codes = load_once((const uint4 *)codes);
    } else { // whole words of 8: depth is a multiple of 8
        const uint32_t *words = (const uint32_t *)codes;
        unit->codes.x = load(words);
        if (inside > 8) unit->codes.y = load(words + 1);
        if (inside > 16) unit->codes.z = load(words + 2);
        if (inside > 24) unit->codes.w = load(words + 3);
    }
    unit->scale = scale_fetch(w.a.scales, block_of(element, w.a.blocksize));
}

// Into pieces 4 * half .. + 3 of a line.
template <int IO>
HB_DEVICE void unit_decode(const wgmma_args &w, const unsigned char *pairs, const float *map,
                           float offset, int64_t element, int inside, const unit_data &unit,
                           unsigned char *tile, int line, int half)
{
    float scale = scale_value(w.a.scales, map, offset, unit.scale);
    // Blocks hold 32 weights at least: a second one may begin inside, at a multiple of 8.
    const int first = (int)(w.a.blocksize - (element & (w.a.blocksize - 1)));
    float second = scale;
    if (first < inside)
        second = scale_value(w.a.scales, map, offset,
                             scale_fetch(w.a.scales, block_of(element, w.a.blocksize) + 1));
    const uint32_t lane = (uint32_t)(lane_index() % PAIR_COPIES) * 8;
    const uint32_t word[4] = {unit.codes.x, unit.codes.y, unit.codes.z, unit.codes.w};
#pragma unroll
    for (int piece = 0; piece < 4; piece++) {
        // Outside W the weights are 0, whatever the codes and scales behind it.
        const float factor = 8 * piece >= inside ? 0.0f : 8 * piece >= first ? second : scale;
        uint32_t out[4];
#pragma unroll
        for (int byte = 0; byte < 4; byte++) {
            const uint32_t moved = byte == 0 ? word[piece] << 7 : word[piece] >> (8 * byte - 7);
            const uint2 pair = shared_load((const uint2 *)(pairs + ((moved & 0x7f80) | lane)));
            out[byte] =
                pack<IO>(mul_rn(bits_float(pair.x), factor), mul_rn(bits_float(pair.y), factor));
        }
        const uint32_t at =
            swizzle128((uint32_t)(line * HB_SWIZZLE_LINE + (4 * half + piece) * 16));
        shared_store((uint4 *)(tile + at), uint4{out[0], out[1], out[2], out[3]});
    }
}

template <int IO, bool TRANSPOSED, typename S>
HB_DEVICE void produce(const wgmma_args &w, unsigned char *stages, const unsigned char *pairs,
                       const float *map, uint64_t *full, uint64_t *empty, int64_t row,
                       int64_t column, int64_t begin, int64_t end)
{
    const int thread = thread_index() - S::CONSUMERS * GROUP;
    const int line = thread / 2, half = thread % 2;
    const int64_t w_row = TRANSPOSED ? line % 64 : column + line;
    const int64_t w_column = (TRANSPOSED ? column + line / 64 * 64 : 0) + half * UNIT;
    const int64_t columns_left = w.a.depth - w_column;
    unit_walk walk;
    walk.element = w_row * w.a.depth + w_column;
    walk.stride = TRANSPOSED ? DEPTH * w.a.depth : (int64_t)DEPTH;
    walk.left = TRANSPOSED ? w.a.rows - w_row : w_row < w.a.rows ? columns_left : 0;
    walk.inside = columns_left <= 0 ? 0 : columns_left < UNIT ? (int)columns_left : (int)UNIT;
    const float offset = scale_offset(w.a.scales);
    unit_data units[S::AHEAD];
#pragma unroll
    for (int i = 0; i < S::AHEAD; i++)
        if (begin + i < end)
            unit_load(w, walk.element + walk.stride * (begin + i),
                      unit_inside<TRANSPOSED>(walk, begin + i), units + i);
    int stage = 0;
    uint32_t parity = 1; // of the phase of `empty` before
    for (int64_t base = begin; base < end; base += S::AHEAD) {
#pragma unroll
        for (int i = 0; i < S::AHEAD; i++) {
            const int64_t step = base + i;
            if (step >= end) break;
            unsigned char *x_tile = stages + stage * S::STAGE_BYTES;
            mbarrier_wait(empty + stage, parity);
            if (thread == 0) {
                mbarrier_arrive_expect(full + stage, S::X_TILE);
                tensor_copy(x_tile, &w.x, (int)(step * DEPTH), (int)row, full + stage);
            }
            unit_decode<IO>(w, pairs, map, offset, walk.element + walk.stride * step,
                            unit_inside<TRANSPOSED>(walk, step), units[i], x_tile + S::X_TILE, line,
                            half);
            fence_async_proxy();
            warp_sync();
            if (lane_index() == 0) mbarrier_arrive(full + stage);
            if (step + S::AHEAD < end)
                unit_load(w, walk.element + walk.stride * (step + S::AHEAD),
                          unit_inside<TRANSPOSED>(walk, step + S::AHEAD), units + i);
            if (++stage == S::STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
    }
}

// Two neighbouring elements of a row of y or of a part, the second if there is one.
template <int IO>
HB_DEVICE void store_two(const wgmma_args &w, int64_t part, int64_t row, int64_t column, float low,
                         float high)
{
    const int64_t at = row * w.columns + column;
    const bool two = column + 1 < w.columns;
    if (w.parts > 1) {
        float *out = w.partial + part * w.a.m * w.columns + at;
        if (w.columns % 2 == 0) {
            store((uint2 *)out, uint2{float_bits(low), float_bits(high)});
        } else {
            store(out, low);
            if (two) store(out + 1, high);
        }
        return;
    }
    low += bias_of(w.a, column);
    if (two) high += bias_of(w.a, column + 1);
    if (w.columns % 2 == 0 && ((uintptr_t)w.a.y & 3) == 0) {
        store((uint32_t *)w.a.y + at / 2, pack<IO>(low, high));
    } else {
        store_float<IO>(w.a.y, at, low);
        if (two) store_float<IO>(w.a.y, at + 1, high);
    }
}

template <int IO, bool TRANSPOSED, typename S>
HB_DEVICE void consume(const wgmma_args &w, const unsigned char *stages, uint64_t *full,
                       uint64_t *empty, int64_t row, int64_t column, int64_t part, int64_t steps)
{
    const int group = warp_index() / 4;
    const uint64_t x = operand(stages + group * S::TILES * ROW_TILE, 0, HB_SWIZZLE_ATOM);
    const uint64_t b = operand(stages + S::X_TILE, TRANSPOSED ? W_TILE / 2 : 0, HB_SWIZZLE_ATOM);
    float sum[S::TILES][64]; // set by the first product
    int stage = 0, last = 0;
    uint32_t parity = 0;
    for (int64_t step = 0; step < steps; step++) {
        mbarrier_wait(full + stage, parity);
        warpgroup_fence();
        // Descriptors count in 16 bytes.
        const uint64_t at = (uint64_t)(stage * S::STAGE_BYTES / 16);
#pragma unroll
        for (int k = 0; k < DEPTH / 16; k++)
#pragma unroll
            for (int tile = 0; tile < S::TILES; tile++)
                warpgroup_mma_64x128x16<IO, TRANSPOSED>(
                    sum[tile], x + at + tile * (ROW_TILE / 16) + k * 2,
                    b + at + k * (TRANSPOSED ? 16 * HB_SWIZZLE_LINE / 16 : 2), step > 0 || k > 0);
        warpgroup_commit();
        warpgroup_wait<1>(); // the products of the stage before are done with it
        if (step > 0 && lane_index() == 0) mbarrier_arrive(empty + last);
        last = stage;
        if (++stage == S::STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
    warpgroup_wait<0>();

    const int64_t first_row =
        row + group * S::TILES * 64 + warp_index() % 4 * 16 + lane_index() / 4;
    const int64_t first_column = column + 2 * (lane_index() % 4);
#pragma unroll
    for (int tile = 0; tile < S::TILES; tile++)
#pragma unroll
        for (int i = 0; i < 64; i += 2) {
            const int64_t r = first_row + tile * 64 + 8 * (i / 2 % 2), c = first_column + i / 4 * 8;
            if (r < w.a.m && c < w.columns)
                store_two<IO>(w, part, r, c, sum[tile][i], sum[tile][i + 1]);
        }
}

template <int IO, bool TRANSPOSED, typename S>
HB_KERNEL_FITTING(S::THREADS, S::BLOCKS)
linear4_wgmma_kernel(HB_ARGS wgmma_args w)
{
    unsigned char *stages = shared_memory();
    stages += -shared_address(stages) & (HB_SWIZZLE_ATOM - 1);
    unsigned char *pairs = stages + S::STAGES * S::STAGE_BYTES;
    float *map = (float *)(pairs + PAIR_BYTES), *value = map + 256;
    uint64_t *full = (uint64_t *)(value + 16), *empty = full + S::STAGES;
    if (thread_index() == 0) {
        tensor_map_prefetch(&w.x);
        for (int i = 0; i < S::STAGES; i++) {
            mbarrier_init(full + i, PRODUCERS / HB_LANES + 1);
            mbarrier_init(empty + i, S::CONSUMERS * GROUP / HB_LANES);
        }
        fence_mbarrier_init();
    }
    codebook_fill(value, w.a.format);
    scale_map_fill(w.a.scales, map);
    block_sync();
    pair_table_fill<S::THREADS>(pairs, value);
    block_sync();

    // Blocks that follow each other share a tile of W.
    const int64_t row_tile = block_index() % w.row_tiles;
    const int64_t column_tile = block_index() / w.row_tiles % w.column_tiles;
    const int64_t part = block_index() / (w.row_tiles * w.column_tiles);
    const int64_t row = row_tile * S::ROWS, column = column_tile * COLUMNS;
    const int64_t begin = part * w.steps / w.parts, end = (part + 1) * w.steps / w.parts;
    if (warp_index() >= S::CONSUMERS * GROUP / HB_LANES) {
        if constexpr (S::PRODUCER_REGISTERS != 0) registers_give<S::PRODUCER_REGISTERS>();
        produce<IO, TRANSPOSED, S>(w, stages, pairs, map, full, empty, row, column, begin, end);
    } else {
        if constexpr (S::CONSUMER_REGISTERS != 0) registers_take<S::CONSUMER_REGISTERS>();
        consume<IO, TRANSPOSED, S>(w, stages, full, empty, row, column, part, end - begin);
    }
}

// y = the sum of the parts, in order, + bias.
template <int IO> HB_KERNEL(SUM_THREADS) linear4_wgmma_sum_kernel(HB_ARGS wgmma_args w)
{
    const int64_t chunks = (w.columns + SUM_COLUMNS - 1) / SUM_COLUMNS;
    const int64_t row = block_index() / chunks;
    const int64_t first = block_index() % chunks * SUM_COLUMNS + thread_index();
    float sum[SUM_COLUMNS / SUM_THREADS] = {0.0f};
    for (int64_t part = 0; part < w.parts; part++) {
        const float *in = w.partial + (part * w.a.m + row) * w.columns;
#pragma unroll
        for (int i = 0; i < SUM_COLUMNS / SUM_THREADS; i++)
            if (first + i * SUM_THREADS < w.columns) sum[i] += load(in + first + i * SUM_THREADS);
    }
#pragma unroll
    for (int i = 0; i < SUM_COLUMNS / SUM_THREADS; i++) {
        const int64_t column = first + i * SUM_THREADS;
        if (column < w.columns)
            store_float<IO>(w.a.y, row * w.columns + column, sum[i] + bias_of(w.a, column));
    }
}

// ---- launch -------------------------------------------------------------------------------------

struct plan {
    int rows; // of a tile of y: 64, 128 or 256
    int64_t columns, depth, row_tiles, column_tiles, steps, parts;
};

plan make_plan(const hb_cuda_queue *queue, const hb_cuda_linear4 &a)
{
    plan p;
    p.columns = a.transposed ? a.depth : a.rows;
    p.depth = a.transposed ? a.rows : a.depth;
    // 256 rows decode W least often; 128 where that saves a good part of the padding.
    const int64_t padded128 = hb_ceil_div(a.m, (int64_t)128) * 128;
    const int64_t padded256 = hb_ceil_div(a.m, (int64_t)256) * 256;
    p.rows = a.m <= 64 ? 64 : 8 * padded128 <= 7 * padded256 ? 128 : 256;
    p.row_tiles = hb_ceil_div(a.m, (int64_t)p.rows);
    p.column_tiles = hb_ceil_div(p.columns, (int64_t)COLUMNS);
    p.steps = hb_ceil_div(p.depth, (int64_t)DEPTH);
    const int64_t tiles = p.row_tiles * p.column_tiles;
    const int64_t room = hb_cuda_device_multiprocessors(queue->device);
    p.parts = room / tiles;
    if (p.parts > p.steps / 4) p.parts = p.steps / 4; // a part should fill the ring
    if (p.parts > MAX_PARTS) p.parts = MAX_PARTS;
    if (p.parts < 1) p.parts = 1;
    return p;
}

template <int IO, bool TRANSPOSED, typename S>
int launch(const hb_cuda_queue *queue, const wgmma_args &w)
{
    return HB_LAUNCH((linear4_wgmma_kernel<IO, TRANSPOSED, S>),
                     w.row_tiles * w.column_tiles * w.parts, S::THREADS, S::SHARED_BYTES,
                     queue->stream, w);
}

template <int IO, bool TRANSPOSED>
int launch_rows(const hb_cuda_queue *queue, const wgmma_args &w, int rows)
{
    switch (rows) {
    case 64: return launch<IO, TRANSPOSED, rows64>(queue, w);
    case 128: return launch<IO, TRANSPOSED, rows128>(queue, w);
    default: return launch<IO, TRANSPOSED, rows256>(queue, w);
    }
}

template <int IO> int launch_all(const hb_cuda_queue *queue, const wgmma_args &w, int rows)
{
    const int status = w.a.transposed ? launch_rows<IO, true>(queue, w, rows)
                                      : launch_rows<IO, false>(queue, w, rows);
    if (status != 0 || w.parts == 1) return status;
    return HB_LAUNCH((linear4_wgmma_sum_kernel<IO>),
                     w.a.m * hb_ceil_div(w.columns, (int64_t)SUM_COLUMNS), SUM_THREADS, 0,
                     queue->stream, w);
}

} // namespace

bool hb_cuda_linear4_wgmma_fits(const hb_cuda_queue *queue, const hb_cuda_linear4 *a)
{
    const int64_t limit = 2147483647; // coordinates of the copy engine
    return a->io_dtype != HB_F32 && a->offsets == nullptr && a->m > 0 && a->rows > 0 &&
           a->depth > 0 && a->depth % 8 == 0 && (!a->transposed || a->rows % 8 == 0) &&
           a->m < limit && a->rows < limit && a->depth < limit && ((uintptr_t)a->x & 15) == 0 &&
           ((uintptr_t)a->packed & 3) == 0 && hb_cuda_device_major(queue->device) == 9;
}

int64_t hb_cuda_linear4_wgmma_workspace(const hb_cuda_queue *queue, const hb_cuda_linear4 *a)
{
    if (!hb_cuda_linear4_wgmma_fits(queue, a)) return 0;
    const plan p = make_plan(queue, *a);
    return p.parts == 1 ? 0 : p.parts * a->m * p.columns * (int64_t)sizeof(float);
}

int hb_cuda_launch_linear4_wgmma(const hb_cuda_queue *queue, const hb_cuda_linear4 *a)
{
    if (!hb_cuda_linear4_wgmma_fits(queue, a)) return HB_CUDA_INVALID;
    const plan p = make_plan(queue, *a);
    wgmma_args w = {};
    w.a = *a;
    if (a->transposed) w.a.bias = nullptr;
    w.columns = p.columns;
    w.depth = p.depth;
    w.row_tiles = p.row_tiles;
    w.column_tiles = p.column_tiles;
    w.steps = p.steps;
    w.parts = a->workspace == nullptr ? 1 : p.parts;
    w.partial = (float *)a->workspace;
    w.wide = a->depth % UNIT == 0 && ((uintptr_t)a->packed & 15) == 0;
    const int status = tensor_map_make(&w.x, a->io_dtype, a->x, a->m, p.depth, p.rows);
    if (status != 0) return status;
    return a->io_dtype == HB_BF16 ? launch_all<HB_BF16>(queue, w, p.rows)
                                  : launch_all<HB_F16>(queue, w, p.rows);
}

#else // built without sm_90a

bool hb_cuda_linear4_wgmma_fits(const hb_cuda_queue *, const hb_cuda_linear4 *)
{
    return false;
}

int64_t hb_cuda_linear4_wgmma_workspace(const hb_cuda_queue *, const hb_cuda_linear4 *)
{
    return 0;
}

int hb_cuda_launch_linear4_wgmma(const hb_cuda_queue *, const hb_cuda_linear4 *)
{
    return HB_CUDA_INVALID;
}

#endif
