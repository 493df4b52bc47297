// y = x W^T of int8 by int8 for a few rows of x (decoding), on tensor cores (sm_80): every weight
// is read once. Formulas in linear8.cuh.
//
// The weights are the 16-row operand: a warp holds 16 rows of W and 64 consecutive k ("a chunk"),
// lane (g, t) the 16 bytes at k = 16t of row g and of row g + 8. The order of k inside a chunk is
// free as long as x has the same one, so the four words serve two mma of 32 k by 8 rows of x, once
// or twice (TILES). A block makes 16 rows of W, its eight warps take every eighth chunk and are
// summed; integers, so in any order. Blocks stay for more rows of W where there are more than the
// GPU holds.
//
// Fused, the common case, there is no other kernel: each block quantizes x for itself into shared
// memory, while its first weights are on their way, and marks outlier columns there, a bit each.
// The warp that meets a marked column adds x times the code in float32; the eight sums are added in
// order. Where x does not fit (or rows meet experts), x comes quantized from the workspace and its
// outlier columns as a list.
//
// Floor: one byte a weight; on an H200 that leaves 7.8 instructions of a lane a weight.
#include "linear8.cuh"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / HB_LANES,
    ROWS = 16, // of W a block
    CHUNK = 64,
    AHEAD = 4,             // chunks of a warp under way
    RESIDENT = 2,          // blocks a multiprocessor
    PITCH = 20,            // words from one column of sums to the next: 8t + g are 32 banks
    MOST_BYTES = 60 * 1024 // of x in shared memory
};

// Where things lie in shared memory.
template <int TILES> struct places {
    enum {
        COLUMNS = 8 * TILES,
        SUM_WORDS = WARPS * COLUMNS * PITCH,
        SUMS = 0,                                      // int32 [2][WARPS][COLUMNS][PITCH]
        OUTLIERS = SUMS + 2 * SUM_WORDS * 4,           // float, the same
        PARTS = OUTLIERS + 2 * SUM_WORDS * 4,          // uint32 [WARPS][COLUMNS + 1]
        FACTORS = PARTS + WARPS * (COLUMNS + 1) * 4,   // float [COLUMNS]
        MARKS = (FACTORS + COLUMNS * 4 + 15) / 16 * 16 // a bit a column of x, then the codes of x
    };
};

// From one row of codes of x to the next: two rows of a chunk lie in different banks.
HB_DEVICE int code_pitch(int64_t depth)
{
    const int pitch = (int)((depth + CHUNK - 1) / CHUNK * CHUNK);
    return pitch % 128 == 0 ? pitch + 64 : pitch;
}
HB_DEVICE int mark_bytes(int64_t depth)
{
    return (int)((depth + 127) / 128 * 16);
}

// Quantizes the rows of x: marks, codes and x_factor. Whether there is an outlier.
template <int IO, int TILES>
HB_DEVICE bool quantize(const hb_cuda_linear8 &a, unsigned char *shared)
{
    enum { COLUMNS = places<TILES>::COLUMNS, STEP = THREADS * 8 };
    uint32_t *parts = (uint32_t *)(shared + places<TILES>::PARTS);
    float *x_factor = (float *)(shared + places<TILES>::FACTORS);
    uint8_t *marks = shared + places<TILES>::MARKS;
    unsigned char *codes = marks + mark_bytes(a.depth);
    const float threshold = outlier_threshold(a.threshold);
    uint32_t largest[COLUMNS] = {0}, any = 0;
    for (int64_t k = thread_index() * 8; k < mark_bytes(a.depth) * 8; k += STEP) {
        uint32_t mask = 0;
        if (k < a.depth)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                if (j >= a.m) break;
                float value[8];
                load8_cached<IO>(a.x, j * a.depth + k, value);
                uint32_t most = larger_magnitude<8>(value, 0);
                if (most >= float_bits(threshold)) { // or NaN
#pragma unroll
                    for (int e = 0; e < 8; e++)
                        if (is_outlier(value[e], threshold)) {
                            mask |= 1u << e;
                            value[e] = 0.0f;
                        }
                    most = larger_magnitude<8>(value, 0);
                }
                largest[j] = max_u32(largest[j], most);
            }
        shared_store(marks + k / 8, (uint8_t)mask);
        any |= mask;
    }
#pragma unroll
    for (int j = 0; j <= COLUMNS; j++) {
        if (j < COLUMNS && j >= a.m) continue;
        uint32_t most = j < COLUMNS ? largest[j < COLUMNS ? j : 0] : any;
        for (int mask = 1; mask < HB_LANES; mask *= 2)
            most = max_u32(most, shuffle_xor(most, mask));
        if (lane_index() == 0) shared_store(parts + warp_index() * (COLUMNS + 1) + j, most);
    }
    block_sync();
    float factor[COLUMNS];
    any = 0;
    for (int w = 0; w < WARPS; w++) any |= shared_load(parts + w * (COLUMNS + 1) + COLUMNS);
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        if (j >= a.m) break;
        uint32_t most = 0;
        for (int w = 0; w < WARPS; w++)
            most = max_u32(most, shared_load(parts + w * (COLUMNS + 1) + j));
        const float absmax = bits_float(most > 0x7f800000u ? 0x7fc00000u : most);
        factor[j] = div_rn(127.0f, absmax);
        if (thread_index() == 0) shared_store(x_factor + j, mul_rn(absmax, HB_INT8_STEP));
    }
    const int pitch = code_pitch(a.depth);
    for (int64_t k = thread_index() * 8; k < a.depth; k += STEP) {
        const uint32_t mask = shared_load(marks + k / 8); // this thread's own
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            if (j >= a.m) break;
            float value[8];
            load8_cached<IO>(a.x, j * a.depth + k, value);
#pragma unroll
            for (int e = 0; e < 8; e++)
                if (mask >> e & 1) value[e] = 0.0f;
            uint2 word;
            if (is_plain_factor(factor[j]))
                word = {encode4_int8<true>(value, factor[j]),
                        encode4_int8<true>(value + 4, factor[j])};
            else
                word = {encode4_int8<false>(value, factor[j]),
                        encode4_int8<false>(value + 4, factor[j])};
            shared_store((uint2 *)(codes + j * pitch + k), word);
        }
    }
    block_sync();
    return any != 0;
}

// The codes of one chunk: 16 bytes of rows g and g + 8.
struct chunk_data {
    uint4 w[2];
};

// Where a lane reads the weights of an item.
struct source {
    const int8_t *w[2];
    int chunks; // 0: nothing to multiply
};

HB_DEVICE source source_of(const hb_cuda_linear8 &a, int64_t first, const expert_rows &rows)
{
    source s;
    s.chunks = rows.expert < 0 || rows.begin >= rows.end ? 0 : (int)((a.depth + CHUNK - 1) / CHUNK);
    const int64_t expert = rows.expert < 0 ? 0 : rows.expert;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Rows behind the last are read as the last and not stored.
        const int64_t row = first + lane_index() / 4 + 8 * half;
        s.w[half] = a.codes + (expert * a.rows + (row < a.rows ? row : a.rows - 1)) * a.depth +
                    16 * (lane_index() % 4);
    }
    return s;
}

HB_DEVICE void chunk_load(const hb_cuda_linear8 &a, const source &s, int chunk, chunk_data *c)
{
    const int k = chunk * CHUNK;
    const bool is_inside = chunk < s.chunks && k + 16 * (lane_index() % 4) < (int)a.depth;
#pragma unroll
    for (int half = 0; half < 2; half++)
        c->w[half] = is_inside ? load_once((const uint4 *)(s.w[half] + k)) : uint4{0, 0, 0, 0};
}

// The outliers among the columns of a chunk: sum[tile][..] as an mma has it.
template <int IO, int TILES>
HB_DEVICE void add_outliers(const hb_cuda_linear8 &a, const source &s, int chunk, uint2 marks,
                            float (*sum)[4])
{
    const int t = lane_index() % 4;
    for (int word = 0; word < 2; word++) {
        uint32_t left = word == 0 ? marks.x : marks.y;
        while (left != 0) {
            const int bit = 31 - count_leading_zeros(left & (0 - left));
            left &= left - 1;
            const int64_t k = chunk * CHUNK + 32 * word + bit;
            const float low = (float)load(s.w[0] - 16 * t + k);
            const float high = (float)load(s.w[1] - 16 * t + k);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int64_t j = 8 * tile + 2 * t + e;
                    if (j >= a.m) continue;
                    const float x = load_float<IO>(a.x, j * a.depth + k);
                    sum[tile][e] = add_rn(sum[tile][e], mul_rn(x, low));
                    sum[tile][2 + e] = add_rn(sum[tile][2 + e], mul_rn(x, high));
                }
        }
    }
}

template <int IO, int TILES, bool FUSED>
HB_KERNEL_RESIDENT(THREADS, 2)
linear8_few_kernel(HB_ARGS linear8_job job)
{
    typedef places<TILES> at;
    const hb_cuda_linear8 &a = job.a;
    unsigned char *shared = shared_memory();
    const int g = lane_index() / 4, t = lane_index() % 4;
    const int64_t items = (a.rows + ROWS - 1) / ROWS * job.x_tiles;
    int64_t item = block_index();
    expert_rows rows = expert_find(a, item % job.x_tiles, at::COLUMNS);
    source s = source_of(a, item / job.x_tiles * ROWS, rows);
    chunk_data data[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) chunk_load(a, s, warp_index() + i * WARPS, data + i);

    const int pitch = code_pitch(a.depth);
    const uint8_t *marks = shared + at::MARKS;
    const unsigned char *codes = marks + mark_bytes(a.depth);
    bool any = false;
    if constexpr (FUSED) any = quantize<IO, TILES>(a, shared);
    const int listed = FUSED ? 0 : linear8_columns(job);

    for (int parity = 0;; parity ^= 1) {
        int32_t sum[TILES][4] = {{0}};
        float extra[TILES][4] = {{0.0f}};
        const int n_x = (int)(rows.end - rows.begin);
        for (int base = warp_index(); base < s.chunks; base += AHEAD * WARPS) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int chunk = base + i * WARPS;
                if (chunk >= s.chunks) continue;
                const uint4 lo = data[i].w[0], hi = data[i].w[1];
                const uint32_t first[4] = {lo.x, hi.x, lo.y, hi.y};
                const uint32_t second[4] = {lo.z, hi.z, lo.w, hi.w};
                const int k = chunk * CHUNK + 16 * t;
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    uint4 x = {0, 0, 0, 0};
                    const int j = 8 * tile + g;
                    if (j < n_x && k < a.depth)
                        x = FUSED ? shared_load((const uint4 *)(codes + j * pitch + k))
                                  : load((const uint4 *)(job.x_codes + (rows.begin + j) * a.depth +
                                                         k));
                    const uint32_t low[2] = {x.x, x.y}, high[2] = {x.z, x.w};
                    mma_int8(sum[tile], first, low);
                    mma_int8(sum[tile], second, high);
                }
                if (FUSED && any) {
                    const uint2 bits = shared_load((const uint2 *)marks + chunk);
                    if ((bits.x | bits.y) != 0) add_outliers<IO, TILES>(a, s, chunk, bits, extra);
                }
                chunk_load(a, s, chunk + AHEAD * WARPS, data + i);
            }
        }

        // The next item's first weights are on their way while this one ends.
        const expert_rows these = rows;
        const int64_t row_first = item / job.x_tiles * ROWS;
        item += job.blocks;
        const bool is_last = item >= items;
        if (!is_last) {
            rows = expert_find(a, item % job.x_tiles, at::COLUMNS);
            s = source_of(a, item / job.x_tiles * ROWS, rows);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) chunk_load(a, s, warp_index() + i * WARPS, data + i);
        }

        int32_t *sums = (int32_t *)(shared + at::SUMS) + parity * at::SUM_WORDS;
        float *extras = (float *)(shared + at::OUTLIERS) + parity * at::SUM_WORDS;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int column = 8 * tile + 2 * t + r % 2;
                const int place = (warp_index() * at::COLUMNS + column) * PITCH + g + 8 * (r / 2);
                shared_store(sums + place, sum[tile][r]);
                if (FUSED && any) shared_store(extras + place, extra[tile][r]);
            }
        block_sync();
        const int column = thread_index() / ROWS; // consecutive threads: consecutive rows of W
        const int64_t row = row_first + thread_index() % ROWS, x_row = these.begin + column;
        if (column < at::COLUMNS && row < a.rows && x_row < these.end) {
            const int place = column * PITCH + thread_index() % ROWS;
            int32_t total = 0;
            float outliers = 0.0f;
            for (int w = 0; w < WARPS; w++) {
                total += shared_load(sums + w * at::COLUMNS * PITCH + place);
                if (FUSED && any)
                    outliers =
                        add_rn(outliers, shared_load(extras + w * at::COLUMNS * PITCH + place));
            }
            if (!FUSED && job.c != nullptr) {
                store(job.c + x_row * a.rows + row, total);
            } else if (these.expert < 0) {
                store_float<IO>(a.y, x_row * a.rows + row, 0.0f);
            } else {
                const int64_t i = these.expert * a.rows + row;
                if (!FUSED) outliers = linear8_outliers<IO>(job, listed, x_row, i);
                const float factor = FUSED ? shared_load((float *)(shared + at::FACTORS) + column)
                                           : linear8_factor(job.x_scale, x_row);
                const float value =
                    linear8_value(total, factor, FUSED ? any : listed > 0, outliers);
                store_float<IO>(a.y, x_row * a.rows + row, linear8_finish(a, i, value));
            }
        }
        if (is_last) return;
    }
}

int64_t fused_bytes(const hb_cuda_linear8 &a)
{
    return hb_ceil_div(a.depth, (int64_t)128) * 16 +
           a.m * (hb_ceil_div(a.depth, (int64_t)CHUNK) * CHUNK + 64);
}

template <int IO, int TILES, bool FUSED>
int launch(const hb_cuda_queue *queue, const linear8_job &job)
{
    linear8_job sized = job;
    sized.x_tiles = expert_tiles(job.a, 8 * TILES);
    const int64_t items = hb_ceil_div(job.a.rows, (int64_t)ROWS) * sized.x_tiles;
    const int64_t most = (int64_t)RESIDENT * hb_cuda_device_multiprocessors(queue->device);
    sized.blocks = items < most || most <= 0 ? items : most;
    const int64_t bytes = places<TILES>::MARKS + (FUSED ? fused_bytes(job.a) : 0);
    return HB_LAUNCH((linear8_few_kernel<IO, TILES, FUSED>), sized.blocks, THREADS, bytes,
                     queue->stream, sized);
}

template <int IO> int launch(const hb_cuda_queue *queue, const linear8_job &job)
{
    const int64_t each = job.a.offsets != nullptr ? job.a.m / job.a.experts : job.a.m;
    if (job.x_codes == nullptr)
        return each <= 8 ? launch<IO, 1, true>(queue, job) : launch<IO, 2, true>(queue, job);
    return each <= 8 ? launch<IO, 1, false>(queue, job) : launch<IO, 2, false>(queue, job);
}

bool is_aligned(const void *p)
{
    return ((uintptr_t)p & 15) == 0;
}

} // namespace

bool hb_cuda_linear8_few_fits(const hb_cuda_queue *queue, const hb_cuda_linear8 &a)
{
    return a.depth % 16 == 0 && is_aligned(a.codes) && hb_cuda_device_major(queue->device) >= 8;
}

bool hb_cuda_linear8_few_fuses(const hb_cuda_linear8 &a)
{
    return a.offsets == nullptr && a.m <= 16 && is_aligned(a.x) && fused_bytes(a) <= MOST_BYTES;
}

int hb_cuda_launch_linear8_few(const hb_cuda_queue *queue, const linear8_job &job)
{
    switch (job.a.io_dtype) {
    case HB_F32: return launch<HB_F32>(queue, job);
    case HB_BF16: return launch<HB_BF16>(queue, job);
    default: return launch<HB_F16>(queue, job);
    }
}
