// y = x W^T + b for 9 rows of bfloat16 or float16 x and more, and y = x W (transposed) for any
// number, on tensor cores with mma.sync, straight from the bitsandbytes layout.
//
// A block makes 128 outputs of 16, 32 or 64 rows of x. Tiles of codes and x for 128 steps of the
// sum come by cp.async through a ring of stages, so that every weight is decoded once a block, by
// the warp that owns its outputs, into the fragments of the 16-row operand:
//
//   8 warps = 4 groups of 32 outputs (two fragments) x 2 halves of a stage's 128 steps; the halves
//   are added through shared memory at the end. Few tiles: several blocks share the steps of one
//   (linear4.cuh)
//
//   forward     outputs are rows of W. The pair table of linear4_mma.cu turns a byte into a
//   fragment
//               register; sums of one scale are made by mma alone and scaled in float32: codebook
//               entries rounded to 16 bits, all else float32. Coarse and fine as there
//   transposed  outputs are columns k of W, the sum runs over its rows, along which scales differ:
//               weights are scaled in float32 and rounded to 16 bits, as dequantize would. Lane
//               (g, t) reads k = 4g .. 4g + 3 of rows 8t .. 8t + 7: pairs of rows make a register,
//               columns k and k + 1 the rows g and g + 8 of the fragment
//
// The order of steps within a half is free as long as x has the same: lane t takes 8 (coarse: 16)
// consecutive ones, which it reads from shared memory 16 bytes at a time.
//
// Shared memory: units of 16 bytes change places within their row by an exclusive or, so that what
// the lanes of a quarter warp read lies in different banks:
//
//   x      [column][16 units of 8 steps]       unit ^ (column odd ? 5 : 0)
//   codes  [row of W][4 units of 32 columns]   unit ^ (row & 2 | row >> 2 & 1); transposed: ^ row
//   >> 3 scales [4 groups of 32 columns][128 rows of W]; coarse: [2 of 64]
//
// Floor: 64 rows of x take 64 clocks of mma.sync for 1024 weights on an A100, 16 rows a quarter of
// it; decoding takes 32 look-ups of shared memory besides.
#include "linear4.cuh"
#include "pair_table.cuh"

namespace
{

enum {
    THREADS = 256,
    OUTPUTS = 128, // of a block
    STEPS = 128,   // of a stage
    GROUPS = 4,    // of 32 outputs
    UNIT = 16,     // bytes
    CODE_BYTES = 128 * 64,
    SCALE_BYTES = 4 * 128 * 4,
    VALUE_BYTES = 2 * 16 * 4, // with room to begin at a multiple of 64
    // Stages worth a block of its own, and blocks that a multiprocessor holds.
    SPLIT_STAGES = 4,
    RESIDENT = 1
};

// What a kernel does; COLUMNS: rows of x in a block.
template <int COLUMNS_, bool TRANSPOSED_, bool FINE_> struct shape {
    enum {
        COLUMNS = COLUMNS_,
        TRANSPOSED = TRANSPOSED_,
        FINE = FINE_, // a scale for every 32 columns of W instead of 64
        STAGES = COLUMNS == 64   ? 2
                 : COLUMNS == 32 ? 3
                                 : 4,
        X_BYTES = COLUMNS * STEPS * 2,
        STAGE_BYTES = CODE_BYTES + X_BYTES + SCALE_BYTES,
        SCALES_AT = CODE_BYTES + X_BYTES, // in a stage
        TABLE_BYTES = TRANSPOSED ? (int)VALUE_BYTES : (int)PAIR_TABLE_BYTES,
        SUM_PITCH = OUTPUTS + 4, // floats; keeps the lanes of a store apart
        TILES = COLUMNS / 8,
        SHARED_BYTES = TABLE_BYTES + STAGES * STAGE_BYTES
    };
    static_assert(COLUMNS * SUM_PITCH * 4 <= STAGES * STAGE_BYTES, "sums take the ring's place");
};

template <typename S> HB_DEVICE int code_unit(int row, int unit)
{
    return unit ^ (S::TRANSPOSED ? row >> 3 & 3 : (row & 2) | (row >> 2 & 1));
}
HB_DEVICE int x_unit(int column, int unit)
{
    return unit ^ (column % 2 * 5);
}

// What a thread copies of every stage: two units of codes (rows thread / 4 and 64 behind it), one
// to four of x (columns thread / 16 and 16, 32, 48 behind), and one or two scales. Pointers move
// from stage to stage and may point outside W and x, where nothing is read and 0 is stored.
template <typename S> struct copier {
    const uint8_t *codes[2];
    const uint16_t *x[S::COLUMNS / 16];
    bool code_inside[2], x_inside[S::COLUMNS / 16]; // but for the steps
    int64_t element;                                // of the first scale
    bool scale_inside[2];                           // but for the steps
    uint32_t step;                                  // where the next stage begins
};

template <typename S>
HB_DEVICE copier<S> copier_of(const linear4_job &job, const expert_rows &rows, int64_t output,
                              int64_t step)
{
    const hb_cuda_linear4 &a = job.a;
    const int64_t row = S::TRANSPOSED ? step : output, column = S::TRANSPOSED ? output : step;
    const int64_t base = (rows.expert < 0 ? 0 : rows.expert) * a.rows;
    copier<S> c;
    c.step = (uint32_t)step;
#pragma unroll
    for (int p = 0; p < 2; p++) {
        const int64_t r = row + thread_index() / 4 + 64 * p, k = column + thread_index() % 4 * 32;
        c.codes[p] = a.packed + ((base + r) * a.depth + k) / 2;
        c.code_inside[p] = S::TRANSPOSED ? k < a.depth : r < a.rows;
    }
#pragma unroll
    for (int p = 0; p < S::COLUMNS / 16; p++) {
        const int64_t j = rows.begin + thread_index() / 16 + 16 * p;
        c.x[p] = (const uint16_t *)a.x + j * job.steps + step + thread_index() % 16 * 8;
        c.x_inside[p] = j < rows.end;
    }
    const int64_t r = row + thread_index() / 2, k = column + thread_index() % 2 * 64;
    c.element = (base + r) * a.depth + k;
#pragma unroll
    for (int q = 0; q < 2; q++)
        c.scale_inside[q] = S::TRANSPOSED ? k + 32 * q < a.depth : r < a.rows;
    return c;
}

// Starts the copies of the next stage but for its scales. `to`: its 32-bit address.
template <typename S>
HB_DEVICE void copy_stage(const linear4_job &job, const copier<S> &c, uint32_t to)
{
    const uint32_t steps = (uint32_t)job.steps;
    const int row = thread_index() / 4, unit = thread_index() % 4;
#pragma unroll
    for (int p = 0; p < 2; p++) { // 64 rows on, a unit keeps its place in the row
        const uint32_t at = c.step + (S::TRANSPOSED ? row + 64 * p : 32 * unit);
        async_copy_at<UNIT>(to + ((row + 64 * p) * 4 + code_unit<S>(row, unit)) * UNIT, c.codes[p],
                            c.code_inside[p] && at < steps ? UNIT : 0);
    }
    const int column = thread_index() / 16, x = thread_index() % 16;
    const bool inside = c.step + 8 * x < steps;
#pragma unroll
    for (int p = 0; p < S::COLUMNS / 16; p++)
        async_copy_at<UNIT>(to + CODE_BYTES + ((column + 16 * p) * 16 + x_unit(column, x)) * UNIT,
                            c.x[p], c.x_inside[p] && inside ? UNIT : 0);
    async_commit();
}

// This thread's scales of the next stage: of row thread / 2 of its tile of W and half thread % 2 of
// the columns. Loaded early, stored when the stage before it is done; 0 outside W, where codes are
// 0 but 0 times infinity is not.
template <typename S> struct scale_pair {
    linear4_scale raw[S::FINE ? 2 : 1];
    bool inside[S::FINE ? 2 : 1];
};

template <typename S, bool NESTED>
HB_DEVICE void scales_load(const linear4_job &job, const copier<S> &c, scale_pair<S> *to)
{
    const uint32_t steps = (uint32_t)job.steps;
#pragma unroll
    for (int q = 0; q < (S::FINE ? 2 : 1); q++) {
        const uint32_t at =
            c.step + (S::TRANSPOSED ? thread_index() / 2 : thread_index() % 2 * 64 + 32 * q);
        to->inside[q] = c.scale_inside[q] && at < steps;
        if (to->inside[q])
            to->raw[q] = scale_load<NESTED>(job, (c.element + 32 * q) >> job.block_shift);
    }
}

template <typename S, bool NESTED>
HB_DEVICE void scales_store(const scale_pair<S> &from, const float *map, float offset, uint32_t to)
{
    const int per_half = S::FINE ? 2 : 1;
#pragma unroll
    for (int q = 0; q < per_half; q++) {
        const float scale = from.inside[q] ? scale_finish<NESTED>(from.raw[q], map, offset) : 0.0f;
        const int place = (thread_index() % 2 * per_half + q) * 128 + thread_index() / 2;
        shared_store_at(to + S::SCALES_AT + 4 * place, scale);
    }
}

template <typename S> HB_DEVICE void next_stage(const linear4_job &job, copier<S> *c)
{
    const int64_t elements = S::TRANSPOSED ? STEPS * job.a.depth : (int64_t)STEPS;
    c->step += STEPS;
    c->element += elements;
    c->codes[0] += elements / 2;
    c->codes[1] += elements / 2;
#pragma unroll
    for (int p = 0; p < S::COLUMNS / 16; p++) c->x[p] += STEPS;
}

// Where in a stage a lane of a warp reads: for its 32 outputs (from 32 * group) and 64 steps (from
// 64 * part). What it reads of other fragments, rows and columns lies at constant distances.
template <typename S> struct reader {
    uint32_t codes[2], scales, x[2];
};

template <typename S> HB_DEVICE reader<S> reader_of(int group, int part)
{
    const int g = lane_index() / 4, t = lane_index() % 4;
    reader<S> r;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int unit = 8 * part + (S::FINE ? 4 * h + t : 2 * t + h);
        r.x[h] = (uint32_t)(CODE_BYTES + (g * 16 + x_unit(g, unit)) * UNIT);
        if (S::TRANSPOSED) {
            const int row = 64 * part + 32 * h + 8 * t;
            r.codes[h] = (uint32_t)((row * 4 + code_unit<S>(row, group)) * UNIT + 2 * g);
        } else {
            const int row = 32 * group + g, column = S::FINE ? 2 * part + h : 2 * part + t / 2;
            r.codes[h] = (uint32_t)((row * 4 + code_unit<S>(row, column)) * UNIT +
                                    (S::FINE ? 4 * t : t % 2 * 8));
        }
    }
    const int scale = S::TRANSPOSED ? group * 128 + 64 * part + 8 * t
                                    : part * (S::FINE ? 2 : 1) * 128 + 32 * group + g;
    r.scales = (uint32_t)(S::SCALES_AT + 4 * scale);
    return r;
}

// sum += W x for this warp's outputs and steps of the stage at `from`.
template <int IO, typename S>
HB_DEVICE void forward_add(uint32_t pair, const reader<S> &r, uint32_t from,
                           float (*sum)[S::TILES][4])
{
    uint32_t codes[2][2][2]; // [fragment][row g or g + 8][half]
    float scale[2][2][S::FINE ? 2 : 1];
#pragma unroll
    for (int f = 0; f < 2; f++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t row = (uint32_t)(16 * f + 8 * i); // from the lane's first
            if (S::FINE) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    codes[f][i][h] = shared_load_at<uint32_t>(from + r.codes[h] + row * 64);
                    scale[f][i][S::FINE ? h : 0] =
                        shared_load_at<float>(from + r.scales + 4 * (128 * (uint32_t)h + row));
                }
            } else {
                const uint2 both = shared_load_at<uint2>(from + r.codes[0] + row * 64);
                codes[f][i][0] = both.x;
                codes[f][i][1] = both.y;
                scale[f][i][0] = shared_load_at<float>(from + r.scales + 4 * row);
            }
        }
    enum { HALVES = S::FINE ? 1 : 2 }; // of one scale
#pragma unroll
    for (int first = 0; first < 2; first += HALVES) {
        uint32_t fragment[2][HALVES][2][4]; // [fragment][half][16 steps][register]
#pragma unroll
        for (int f = 0; f < 2; f++)
#pragma unroll
            for (int h = 0; h < HALVES; h++)
#pragma unroll
                for (int s = 0; s < 2; s++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        fragment[f][h][s][i] =
                            pair_at(pair, codes[f][i % 2][first + h], 2 * s + i / 2);
#pragma unroll
        for (int j = 0; j < S::TILES; j++) {
            float product[2][4] = {};
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                const uint4 four =
                    shared_load_at<uint4>(from + r.x[first + h] + (uint32_t)(j * 8 * STEPS * 2));
                const uint32_t x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int f = 0; f < 2; f++) {
                    mma_16x8x16<IO>(product[f], fragment[f][h][0], x);
                    mma_16x8x16<IO>(product[f], fragment[f][h][1], x + 2);
                }
            }
#pragma unroll
            for (int f = 0; f < 2; f++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    sum[f][j][i] += scale[f][i / 2][S::FINE ? first : 0] * product[f][i];
        }
    }
}

// sum += W^T x for this warp's outputs (columns of W) and steps (rows). Output 4g + 2f + (0, 1) of
// the warp is row g, g + 8 of fragment f. values: the codebook's 32-bit address, a multiple of 64.
template <int IO, typename S>
HB_DEVICE void transposed_add(uint32_t values, const reader<S> &r, uint32_t from,
                              float (*sum)[S::TILES][4])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint32_t fragment[2][2][4]; // [fragment][16 steps][register]
#pragma unroll
        for (int s = 0; s < 2; s++) {
            const uint4 scales =
                shared_load_at<uint4>(from + r.scales + 4 * (32 * (uint32_t)h + 4 * (uint32_t)s));
            const float scale[4] = {bits_float(scales.x), bits_float(scales.y),
                                    bits_float(scales.z), bits_float(scales.w)};
            float w[2][2][4]; // [fragment][column][row]
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Four codes, each times the 4 bytes of a value.
                const uint32_t four = 4 * (uint32_t)shared_load_at<uint16_t>(
                                              from + r.codes[h] + 64 * (uint32_t)(4 * s + i));
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const uint32_t at = (four >> (4 * (c ^ 1)) & 60) | values;
                    w[c / 2][c % 2][i] = mul_rn(shared_load_at<float>(at), scale[i]);
                }
            }
#pragma unroll
            for (int f = 0; f < 2; f++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    fragment[f][s][i] =
                        pack<IO>(w[f][i % 2][2 * (i / 2)], w[f][i % 2][2 * (i / 2) + 1]);
        }
#pragma unroll
        for (int j = 0; j < S::TILES; j++) {
            const uint4 four = shared_load_at<uint4>(from + r.x[h] + (uint32_t)(j * 8 * STEPS * 2));
            const uint32_t x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int f = 0; f < 2; f++) {
                mma_16x8x16<IO>(sum[f][j], fragment[f][0], x);
                mma_16x8x16<IO>(sum[f][j], fragment[f][1], x + 2);
            }
        }
    }
}

// Where element i of a lane's fragment f, column tile j lies among the block's sums.
template <typename S> HB_DEVICE float *sum_at(float *sums, int group, int f, int j, int i)
{
    const int g = lane_index() / 4, t = lane_index() % 4;
    const int output =
        32 * group + (S::TRANSPOSED ? 4 * g + 2 * f + i / 2 : 16 * f + g + 8 * (i / 2));
    return sums + (8 * j + 2 * t + i % 2) * S::SUM_PITCH + output;
}

template <int IO, typename S, bool NESTED>
HB_KERNEL_RESIDENT(THREADS, RESIDENT)
linear4_tile_kernel(HB_ARGS linear4_job job)
{
    const hb_cuda_linear4 &a = job.a;
    unsigned char *ring = shared_memory() + S::TABLE_BYTES;
    float *map = (float *)(ring + S::STAGES * S::STAGE_BYTES);
    const int group = warp_index() % GROUPS, part = warp_index() / GROUPS;

    const int64_t column = block_index() % job.columns, rest = block_index() / job.columns;
    const int64_t output = rest % job.tiles * OUTPUTS, split = rest / job.tiles;
    const expert_rows rows = expert_find(a, column, S::COLUMNS);
    if (rows.begin >= rows.end) return; // the whole block
    const int64_t all = (job.steps + STEPS - 1) / STEPS;
    const int64_t first = all * split / job.splits;
    const int stages = rows.expert < 0 ? 0 : (int)(all * (split + 1) / job.splits - first);
    copier<S> c = copier_of<S>(job, rows, output, first * STEPS);

    // Shared memory begins at a multiple of 16; the codebook's address takes codes by an or.
    const uint32_t start = shared_address(shared_memory());
    const uint32_t table = S::TRANSPOSED ? (start + 63) & ~63u : start;
    if (S::TRANSPOSED)
        codebook_fill((float *)(shared_memory() + (table - start)), a.format);
    else
        pair_table_fill<IO, THREADS>(shared_memory(), a.format);
    scale_map_fill(a.scales, map);
    const float offset = scale_offset(a.scales);
    block_sync(); // the map is used at once

    // All stages but one are under way before the first is used; a group of copies for each, also
    // for those that do not exist, so that the number of groups to wait for is always the same.
    const uint32_t begin = start + S::TABLE_BYTES, end = begin + S::STAGES * S::STAGE_BYTES;
    uint32_t here = begin, target = begin;
#pragma unroll
    for (int s = 0; s < S::STAGES - 1; s++, target += S::STAGE_BYTES) {
        if (s >= stages) {
            async_commit();
            continue;
        }
        copy_stage<S>(job, c, target);
        scale_pair<S> scales;
        scales_load<S, NESTED>(job, c, &scales);
        scales_store<S, NESTED>(scales, map, offset, target);
        next_stage<S>(job, &c);
    }

    float sum[2][S::TILES][4] = {};
    const reader<S> r = reader_of<S>(group, part);
    for (int s = 0; s < stages; s++) {
        async_wait<S::STAGES - 2>();
        block_sync(); // stage `here` is complete, and nobody reads stage `target` any more
        const bool more = s + S::STAGES - 1 < stages;
        scale_pair<S> scales;
        if (more) {
            copy_stage<S>(job, c, target);
            scales_load<S, NESTED>(job, c, &scales);
            next_stage<S>(job, &c);
        } else {
            async_commit();
        }
        if (S::TRANSPOSED)
            transposed_add<IO, S>(table, r, here, sum);
        else
            forward_add<IO, S>(table + 4 * (uint32_t)lane_index(), r, here, sum);
        if (more) scales_store<S, NESTED>(scales, map, offset, target);
        here = here + S::STAGE_BYTES == end ? begin : here + S::STAGE_BYTES;
        target = target + S::STAGE_BYTES == end ? begin : target + S::STAGE_BYTES;
    }
    async_wait<0>();
    block_sync(); // the sums take the place of the ring

    float *sums = (float *)ring;
    for (int p = 1; p >= 0; p--) {
        if (part == p)
#pragma unroll
            for (int f = 0; f < 2; f++)
#pragma unroll
                for (int j = 0; j < S::TILES; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float *place = sum_at<S>(sums, group, f, j, i);
                        const float other = p == 1 ? 0.0f : shared_load(place);
                        shared_store(place, sum[f][j][i] + other);
                    }
        block_sync();
    }
    for (int i = thread_index(); i < S::COLUMNS * OUTPUTS; i += THREADS) {
        const int64_t j = rows.begin + i / OUTPUTS, o = output + i % OUTPUTS;
        if (j < rows.end && o < job.outputs)
            linear4_store<IO>(job, split, rows, j, o,
                              shared_load(sums + i / OUTPUTS * S::SUM_PITCH + i % OUTPUTS));
    }
}

bool is_coarse(const hb_cuda_linear4 &a)
{
    return a.depth % 64 == 0 && a.blocksize >= 64;
}

// Rows of x in a block: 16, 32 or 64, as many as an expert has on average. The fine kernel has no
// registers for 64.
int64_t columns_of(const hb_cuda_linear4 &a)
{
    const int64_t m = a.offsets == nullptr || a.experts == 0 ? a.m : hb_ceil_div(a.m, a.experts);
    return m <= 16 ? 16 : m <= 32 || !(a.transposed || is_coarse(a)) ? 32 : 64;
}

int64_t splits(const hb_cuda_queue *queue, const hb_cuda_linear4 &a)
{
    const int64_t tiles = hb_ceil_div(linear4_outputs(a), (int64_t)OUTPUTS);
    return linear4_splits(queue, tiles * expert_tiles(a, columns_of(a)),
                          hb_ceil_div(linear4_steps(a), (int64_t)STEPS), RESIDENT, SPLIT_STAGES);
}

template <int IO, typename S> int launch(const hb_cuda_queue *queue, const hb_cuda_linear4 &a)
{
    const linear4_job job = linear4_job_of(a, OUTPUTS, S::COLUMNS, splits(queue, a));
    const int64_t blocks = job.tiles * job.columns * job.splits;
    const int bytes = S::SHARED_BYTES + scale_map_bytes(a.scales);
    const int status = a.scales.absmax != nullptr
                           ? HB_LAUNCH((linear4_tile_kernel<IO, S, false>), blocks, THREADS, bytes,
                                       queue->stream, job)
                           : HB_LAUNCH((linear4_tile_kernel<IO, S, true>), blocks, THREADS, bytes,
                                       queue->stream, job);
    return status != 0 ? status : linear4_add_partial(queue, job);
}

template <int IO> int launch(const hb_cuda_queue *queue, const hb_cuda_linear4 &a)
{
    const int64_t columns = columns_of(a);
    if (a.transposed)
        return columns == 16   ? launch<IO, shape<16, true, true>>(queue, a)
               : columns == 32 ? launch<IO, shape<32, true, true>>(queue, a)
                               : launch<IO, shape<64, true, true>>(queue, a);
    if (!is_coarse(a))
        return columns == 16 ? launch<IO, shape<16, false, true>>(queue, a)
                             : launch<IO, shape<32, false, true>>(queue, a);
    return columns == 16   ? launch<IO, shape<16, false, false>>(queue, a)
           : columns == 32 ? launch<IO, shape<32, false, false>>(queue, a)
                           : launch<IO, shape<64, false, false>>(queue, a);
}

} // namespace

bool hb_cuda_linear4_tile_fits(const hb_cuda_queue *queue, const hb_cuda_linear4 *a)
{
    return a->io_dtype != HB_F32 && a->depth > 0 && a->depth % 32 == 0 &&
           linear4_steps(*a) % 8 == 0 && linear4_steps(*a) <= 1 << 30 &&
           ((uintptr_t)a->packed & 15) == 0 && ((uintptr_t)a->x & 15) == 0 &&
           hb_cuda_device_major(queue->device) >= 8;
}

int64_t hb_cuda_linear4_tile_workspace(const hb_cuda_queue *queue, const hb_cuda_linear4 *args)
{
    return linear4_partial_bytes(*args, splits(queue, *args));
}

int hb_cuda_launch_linear4_tile(const hb_cuda_queue *queue, const hb_cuda_linear4 *args)
{
    return args->io_dtype == HB_BF16 ? launch<HB_BF16>(queue, *args) : launch<HB_F16>(queue, *args);
}
