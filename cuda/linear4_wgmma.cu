// y = x W^T + b and, transposed, y = x W for 17 to some thousand rows of bfloat16 or float16 x, on
// the warpgroup products of sm_90a, straight from the bitsandbytes layout.
//
//   producers  2 warpgroups, in turn, decode a tile of W, 8192 weights, into shared memory, and one
//              thread of each has the copy engine bring the tile of x
//   consumers  1 or 2 warpgroups multiply both from shared memory, 64 or 128 rows of x each
//
// in a ring of stages, each with a barrier `full` (4 producer warps, the copy and its bytes) and a
// barrier `empty` (the consumers' warps). A stage is 64 of the summation: 64 columns of x, and
//
//   forward     W rows n0 .. n0 + 127, depth k0 .. k0 + 63: a line of 128 bytes each row of W;
//               B is K-major, the step of 16 k moves 32 bytes along the line
//   transposed  W rows k0 .. k0 + 63, depth n0 .. n0 + 127: two tiles of 64 lines; B is MN-major,
//               leading offset 8192 (the next 64 columns), the step of 16 k moves 16 lines
//
// so that in both a thread decodes 32 consecutive weights of a row of W (16 bytes of codes) into
// half a line, twice a stage, and nothing is repacked or transposed. Lines are swizzled
// (hopper.cuh): the eight threads of a store meet eight different pieces, all 32 banks.
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
// Budget on an H200 (2048 products and 128 lanes' instructions a clock and multiprocessor): with R
// rows of x to a tile the decoder may take R / 16 instructions a weight: 4, 8, 16 for 64, 128, 256
// rows, or be what the kernel waits for. It takes 5.3 (nested scales 6.3), 3.1 of them for the
// decoding itself: up to 64 rows it is the limit, from 128 on it is not. The products take 10 to 17
// instructions of each warp, while the tensor cores work 64 clocks. Shared memory, 128 bytes a
// clock: 256 rows keep it busy for 1.13 times the products' time (reading operands 0.75, table
// 0.25, tiles 0.13), which bounds them at 0.89 of the peak. Registers: 128 a thread at the launch
// (64 rows: 102), 176 or 160 for consumers; no spills. Nothing here has been timed.
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
    UNIT = 32,           // weights that a thread decodes at a time, two units a stage
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
        AHEAD = AHEAD_, // steps of a producer whose codes are loaded before they are needed
        BLOCKS = BLOCKS_,
        PRODUCER_REGISTERS = PRODUCER_REGISTERS_,
        CONSUMER_REGISTERS = CONSUMER_REGISTERS_,
        THREADS = CONSUMERS * GROUP + PRODUCERS,
        ROWS = CONSUMERS * TILES * 64,
        X_TILE = CONSUMERS * TILES * ROW_TILE,
        STAGE_BYTES = X_TILE + W_TILE,
        SHARED_BYTES = STAGES * STAGE_BYTES + PAIR_BYTES + MAP_BYTES + VALUE_BYTES + 2 * STAGES * 8
    };
    // A warpgroup of producers comes back to the stages of one parity.
    static_assert(STAGES % 2 == 0 && SHARED_BYTES <= 227 * 1024, "stages");
};
typedef shape<1, 1, 6, 4, 1, 0, 0> rows64;
typedef shape<2, 1, 4, 2, 1, 96, 160> rows128;
typedef shape<2, 2, 4, 2, 1, 80, 176> rows256;

struct wgmma_args {
    hb_cuda_linear4 a;
    int64_t columns; // of y
    int64_t row_tiles, column_tiles;
    int64_t steps, parts;              // stages of the summation in all, cut into parts
    float *partial;                    // [parts, m, columns] when parts > 1
    bool wide;                         // every unit is 16 aligned bytes of codes with one scale
    int32_t block_shift, nested_shift; // logarithms of block sizes; -1: none
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

HB_DEVICE raw_scale scale_fetch(const wgmma_args &w, uint32_t block)
{
    const hb_cuda_scales4 &s = w.a.scales;
    if (s.absmax != nullptr) return {load(s.absmax + block), 0};
    const int64_t outer =
        w.nested_shift >= 0 ? block >> w.nested_shift : block / s.nested_blocksize;
    return {load(s.nested_absmax + outer), load(s.absmax_codes + block)};
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

// Where a thread's units lie: `stride` elements further with each of its steps, inside W as far as
// `left` says, which falls by 2 DEPTH: columns, or when transposed rows.
struct unit_walk {
    int64_t element, stride;
    int32_t left;
    int32_t most; // weights inside W at best
};

// Weights inside W `steps` steps of this thread before the walk's place.
template <bool TRANSPOSED> HB_DEVICE int unit_inside(const unit_walk &walk, int steps)
{
    const int left = walk.left + 2 * DEPTH * steps;
    if (TRANSPOSED) return left > 0 ? walk.most : 0;
    return left <= 0 ? 0 : left < walk.most ? left : walk.most;
}

template <bool WIDE>
HB_DEVICE void unit_load(const wgmma_args &w, int64_t element, int inside, unit_data *unit)
{
    unit->codes = uint4{0, 0, 0, 0};
    if (inside == 0) return;
    const uint8_t *codes = w.a.packed + (element >> 1);
    if (WIDE) {
        unit->codes = load_once((const uint4 *)codes);
    } else { // whole words of 8: depth is a multiple of 8
        const uint32_t *words = (const uint32_t *)codes;
        unit->codes.x = load(words);
        if (inside > 8) unit->codes.y = load(words + 1);
        if (inside > 16) unit->codes.z = load(words + 2);
        if (inside > 24) unit->codes.w = load(words + 3);
    }
    unit->scale = scale_fetch(w, (uint32_t)(element >> w.block_shift));
}

// Eight weights into a piece of a line.
template <int IO>
HB_DEVICE void piece_decode(const unsigned char *pairs, uint32_t lane, uint32_t word, float factor,
                            unsigned char *piece)
{
    uint32_t out[4];
#pragma unroll
    for (int byte = 0; byte < 4; byte++) {
        const uint32_t moved = byte == 0 ? word << 7 : word >> (8 * byte - 7);
        const uint2 pair = shared_load((const uint2 *)(pairs + ((moved & 0x7f80) | lane)));
        out[byte] =
            pack<IO>(mul_rn(bits_float(pair.x), factor), mul_rn(bits_float(pair.y), factor));
    }
    shared_store((uint4 *)piece, uint4{out[0], out[1], out[2], out[3]});
}

// Into pieces 4 * half .. + 3 of a line, `tile` the tile's line and `swizzle` what its number
// changes in a piece's offset. Outside W the weights are 0, whatever codes and scales lie there.
template <int IO, bool WIDE>
HB_DEVICE void unit_decode(const wgmma_args &w, const unsigned char *pairs, const float *map,
                           float offset, int64_t element, int inside, const unit_data &unit,
                           unsigned char *tile, uint32_t swizzle)
{
    const uint32_t lane = (uint32_t)(lane_index() % PAIR_COPIES) * 8;
    float scale = inside == 0 ? 0.0f : scale_value(w.a.scales, map, offset, unit.scale);
    if (WIDE) { // one block, all inside or all outside
        piece_decode<IO>(pairs, lane, unit.codes.x, scale, tile + (0 ^ swizzle));
        piece_decode<IO>(pairs, lane, unit.codes.y, scale, tile + (16 ^ swizzle));
        piece_decode<IO>(pairs, lane, unit.codes.z, scale, tile + (32 ^ swizzle));
        piece_decode<IO>(pairs, lane, unit.codes.w, scale, tile + (48 ^ swizzle));
        return;
    }
    // Blocks hold 32 weights at least: a second one may begin inside, at a multiple of 8.
    const int first = (int)w.a.blocksize - (int)((uint32_t)element & (w.a.blocksize - 1));
    uint4 codes = unit.codes;
#pragma unroll 1
    for (int at = 0; at < UNIT; at += 8) {
        if (at == first && at < inside)
            scale = scale_value(w.a.scales, map, offset,
                                scale_fetch(w, (uint32_t)(element >> w.block_shift) + 1));
        piece_decode<IO>(pairs, lane, codes.x, at < inside ? scale : 0.0f,
                         tile + ((uint32_t)at * 2 ^ swizzle));
        codes = uint4{codes.y, codes.z, codes.w, 0};
    }
}

template <int IO, bool TRANSPOSED, bool WIDE, typename S>
HB_DEVICE void produce(const wgmma_args &w, unsigned char *stages, const unsigned char *pairs,
                       const float *map, uint64_t *full, uint64_t *empty, int64_t row,
                       int64_t column, int begin, int end)
{
    const int thread = thread_index() % GROUP;
    const int group =
        warp_uniform(thread_index() / GROUP) - S::CONSUMERS; // 0 or 1: takes every second step
    const int line = thread / 2, half = thread % 2;          // and line + 64
    unit_walk walk[2];
#pragma unroll
    for (int u = 0; u < 2; u++) {
        const int64_t step = (int64_t)DEPTH * (begin + group);
        const int64_t w_row = TRANSPOSED ? step + line : column + line + 64 * u;
        const int64_t w_column = (TRANSPOSED ? column + 64 * u : step) + half * UNIT;
        const int64_t left = w.a.depth - w_column;
        walk[u].element = w_row * w.a.depth + w_column;
        walk[u].stride = 2 * DEPTH * (TRANSPOSED ? w.a.depth : 1);
        walk[u].left = (int32_t)(TRANSPOSED ? w.a.rows - w_row : left);
        walk[u].most = UNIT;
        if (TRANSPOSED)
            walk[u].most = (int32_t)(left <= 0 ? 0 : left < UNIT ? left : (int64_t)UNIT);
        else if (w_row >= w.a.rows)
            walk[u].most = 0;
    }
    // The pieces 0 .. 3 or 4 .. 7 of a line begin at the line; the swizzle says where (it changes
    // bits 4 to 6, the half being bit 6), for line and line + 64 the same.
    const uint32_t line_start = (uint32_t)(S::X_TILE + line * HB_SWIZZLE_LINE);
    const uint32_t swizzle = (uint32_t)((half * 4 ^ line % 8) * 16);
    const float offset = scale_offset(w.a.scales);
    unit_data units[S::AHEAD][2];
#pragma unroll
    for (int i = 0; i < S::AHEAD; i++)
#pragma unroll
        for (int u = 0; u < 2; u++) {
            if (begin + group + 2 * i < end)
                unit_load<WIDE>(w, walk[u].element, unit_inside<TRANSPOSED>(walk[u], 0),
                                &units[i][u]);
            walk[u].element += walk[u].stride;
            walk[u].left -= 2 * DEPTH;
        }
    int stage = group;
    uint32_t parity = 1; // of the phase of `empty` before
    for (int base = begin + group; base < end; base += 2 * S::AHEAD) {
#pragma unroll
        for (int i = 0; i < S::AHEAD; i++) {
            const int step = base + 2 * i;
            if (step >= end) break;
            unsigned char *x_tile = stages + stage * S::STAGE_BYTES;
            mbarrier_wait(empty + stage, parity);
            if (thread == 0) {
                mbarrier_arrive_expect(full + stage, S::X_TILE);
                tensor_copy(x_tile, &w.x, step * DEPTH, (int)row, full + stage);
            }
#pragma unroll
            for (int u = 0; u < 2; u++)
                unit_decode<IO, WIDE>(w, pairs, map, offset,
                                      walk[u].element - S::AHEAD * walk[u].stride,
                                      unit_inside<TRANSPOSED>(walk[u], S::AHEAD), units[i][u],
                                      x_tile + line_start + u * 64 * HB_SWIZZLE_LINE, swizzle);
            fence_async_proxy();
            warp_sync();
            if (lane_index() == 0) mbarrier_arrive(full + stage);
#pragma unroll
            for (int u = 0; u < 2; u++) {
                if (step + 2 * S::AHEAD < end)
                    unit_load<WIDE>(w, walk[u].element, unit_inside<TRANSPOSED>(walk[u], 0),
                                    &units[i][u]);
                walk[u].element += walk[u].stride;
                walk[u].left -= 2 * DEPTH;
            }
            stage += 2;
            if (stage >= S::STAGES) {
                stage -= S::STAGES;
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
                       uint64_t *empty, int64_t row, int64_t column, int64_t part, int steps)
{
    const int group = warp_index() / 4;
    const uint64_t x = operand(stages + group * S::TILES * ROW_TILE, 0, HB_SWIZZLE_ATOM);
    const uint64_t b = operand(stages + S::X_TILE, TRANSPOSED ? W_TILE / 2 : 0, HB_SWIZZLE_ATOM);
    float sum[S::TILES][64]; // set by the first product
    int stage = 0, last = 0;
    uint32_t parity = 0;
    for (int step = 0; step < steps; step++) {
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

template <int IO, bool TRANSPOSED, bool WIDE, typename S>
HB_KERNEL_RESIDENT(S::THREADS, S::BLOCKS)
linear4_wgmma_kernel(HB_ARGS wgmma_args w)
{
    unsigned char *stages = shared_tiles();
    unsigned char *pairs = stages + S::STAGES * S::STAGE_BYTES;
    float *map = (float *)(pairs + PAIR_BYTES), *value = map + 256;
    uint64_t *full = (uint64_t *)(value + 16), *empty = full + S::STAGES;
    if (thread_index() == 0) {
        tensor_map_prefetch(&w.x);
        for (int i = 0; i < S::STAGES; i++) {
            mbarrier_init(full + i, GROUP / HB_LANES + 1);
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
    const int begin = (int)(part * w.steps / w.parts), end = (int)((part + 1) * w.steps / w.parts);
    if (warp_index() >= S::CONSUMERS * GROUP / HB_LANES) {
        if constexpr (S::PRODUCER_REGISTERS != 0) registers_give<S::PRODUCER_REGISTERS>();
        produce<IO, TRANSPOSED, WIDE, S>(w, stages, pairs, map, full, empty, row, column, begin,
                                         end);
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

int32_t shift_of(int64_t size)
{
    return size > 0 && (size & (size - 1)) == 0 ? 63 - __builtin_clzll((uint64_t)size) : -1;
}

template <int IO, bool TRANSPOSED, bool WIDE, typename S>
int launch(const hb_cuda_queue *queue, const wgmma_args &w)
{
    return HB_LAUNCH((linear4_wgmma_kernel<IO, TRANSPOSED, WIDE, S>),
                     w.row_tiles * w.column_tiles * w.parts, S::THREADS, S::SHARED_BYTES,
                     queue->stream, w);
}

template <int IO, bool TRANSPOSED, bool WIDE>
int launch_rows(const hb_cuda_queue *queue, const wgmma_args &w, int rows)
{
    switch (rows) {
    case 64: return launch<IO, TRANSPOSED, WIDE, rows64>(queue, w);
    case 128: return launch<IO, TRANSPOSED, WIDE, rows128>(queue, w);
    default: return launch<IO, TRANSPOSED, WIDE, rows256>(queue, w);
    }
}

template <int IO> int launch_all(const hb_cuda_queue *queue, const wgmma_args &w, int rows)
{
    const int status = w.a.transposed ? (w.wide ? launch_rows<IO, true, true>(queue, w, rows)
                                                : launch_rows<IO, true, false>(queue, w, rows))
                                      : (w.wide ? launch_rows<IO, false, true>(queue, w, rows)
                                                : launch_rows<IO, false, false>(queue, w, rows));
    if (status != 0 || w.parts == 1) return status;
    return HB_LAUNCH((linear4_wgmma_sum_kernel<IO>),
                     w.a.m * hb_ceil_div(w.columns, (int64_t)SUM_COLUMNS), SUM_THREADS, 0,
                     queue->stream, w);
}

} // namespace

bool hb_cuda_linear4_wgmma_fits(const hb_cuda_queue *queue, const hb_cuda_linear4 *a)
{
    const int64_t limit = 2147483647; // coordinates of the copy engine
    return a->io_dtype != HB_F32 && a->offsets == nullptr && a->m > 0 &&
           shift_of(a->blocksize) >= 5 && a->rows * a->depth / a->blocksize < limit &&
           a->scales.nested_blocksize < limit && a->rows > 0 && a->depth > 0 && a->depth % 8 == 0 &&
           (!a->transposed || a->rows % 8 == 0) && a->m < limit && a->rows < limit &&
           a->depth < limit && ((uintptr_t)a->x & 15) == 0 && ((uintptr_t)a->packed & 3) == 0 &&
           hb_cuda_device_major(queue->device) == 9;
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
    w.row_tiles = p.row_tiles;
    w.column_tiles = p.column_tiles;
    w.steps = p.steps;
    w.parts = a->workspace == nullptr ? 1 : p.parts;
    w.partial = (float *)a->workspace;
    w.block_shift = shift_of(a->blocksize);
    w.nested_shift = shift_of(a->scales.nested_blocksize);
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
