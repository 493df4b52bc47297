// y = x W^T of int8 by int8 for more than a few rows of x, on tensor cores (sm_80), with all that
// follows the sums in the same launch. Formulas in linear8.cuh.
//
// A block of four warps makes MI * 16 * WARPS_M rows of x by NI * 8 * WARPS_N rows of W
// ("outputs"): a large tile 128 x 128, or 64 x 32 where large ones would leave multiprocessors
// without work. 64 consecutive k of both ("a chunk") lie in shared memory, row after row, 64 bytes
// each, STAGES chunks under way by cp.async:
//
//   x [x rows][64]    16-byte piece p of a row lies at p ^ (row / 2) % 4
//   W [outputs][64]   and at p ^ (row / RUN) % 4, RUN below: so the eight rows that ldmatrix takes
//   at
//                     a time lie in 32 different banks
//
// Column c of the mma number j of a warp is output 2 NI (c / 2) + 2j + c % 2: so lane t ends with 2
// NI consecutive outputs of each of its rows, which are stored 16 bytes at a time.
//
// Outlier columns are read from the list on the device, 32 at a time: x in 16 bits (float32 as
// three bfloat16, exactly) and the codes as 16-bit floats, both exact, go through a float32 mma,
// and are added to the scaled integer sum. More than 32 are added in portions, in ascending order.
//
// Floor at 2048 rows, 4096 x 4096 on an H200: 43.5 us at 1580 TOP/s. mma.sync reaches 62 to 75 % of
// the tensor peak of sm_90 at best; wgmma (m64nNk32, both operands K-major, so x8 and W as they
// lie) is the next step there, with this epilogue.
#include "linear8.cuh"

namespace
{

enum {
    WARPS = 4,
    THREADS = WARPS * HB_LANES,
    CHUNK = 64,
    PORTION = 32,        // outlier columns at a time
    PITCH = PORTION + 8, // elements of a row of them: 20 words, so that 8 rows hit 8 x 4 banks
};

// The shape of a block's tile.
template <int WARPS_M_, int MI_, int NI_, int STAGES_> struct shape {
    enum {
        WARPS_M = WARPS_M_, // warps beside one another along x; the others along the outputs
        WARPS_N = WARPS / WARPS_M,
        MI = MI_, // mma of 16 rows of x a warp
        NI = NI_, // mma of 8 outputs a warp
        STAGES = STAGES_,
        BM = WARPS_M * MI * 16,
        BN = WARPS_N * NI * 8,
        RUN = 2 * NI, // consecutive outputs of a lane
        STAGE_BYTES = (BM + BN) * CHUNK,
        FACTORS = STAGES * STAGE_BYTES, // float [BM] of x, [BN] of W, [BN] bias
        SHARED_BYTES = FACTORS + (BM + 2 * BN) * 4
    };
};
typedef shape<2, 4, 8, 4> large_tile;
typedef shape<4, 1, 4, 12> small_tile;
static_assert((3 * large_tile::BM + large_tile::BN) * PITCH * 2 <= large_tile::FACTORS, "");
static_assert((3 * small_tile::BM + small_tile::BN) * PITCH * 2 <= small_tile::FACTORS, "");

// Where a thread copies from: 16 bytes of every 32nd row of x and of W. Rows that are not there are
// read as the tile's first, and their sums not stored.
template <typename S> struct source {
    const int8_t *x, *w; // at this thread's bytes of the next chunk
    uint32_t x_offset[S::BM / HB_LANES], w_offset[S::BN / HB_LANES];
    int x_target, w_target; // where in a stage, of the first row
    int left;               // bytes of the depth from there on; behind its end zeros are copied
};

template <typename S> HB_DEVICE void stage_load(source<S> *from, unsigned char *stage)
{
    const int bytes = from->left > 0 ? 16 : 0;
#pragma unroll
    for (int i = 0; i < S::BM / HB_LANES; i++)
        async_copy<16>(stage + from->x_target + i * HB_LANES * CHUNK, from->x + from->x_offset[i],
                       bytes);
#pragma unroll
    for (int i = 0; i < S::BN / HB_LANES; i++) {
        // 32 rows on, (row / RUN) % 4 is the same, or for runs of 16 has its upper bit turned.
        const int turn = S::RUN == 16 ? i % 2 * 32 : 0;
        async_copy<16>(stage + (from->w_target ^ turn) + i * HB_LANES * CHUNK,
                       from->w + from->w_offset[i], bytes);
    }
    from->x += CHUNK;
    from->w += CHUNK;
    from->left -= CHUNK;
}

// The output of the tile that is column c of a warp's mma j, without the warp's first.
template <typename S> HB_DEVICE int output_of(int j, int c)
{
    return S::RUN * (c / 2) + 2 * j + c % 2;
}

// x and w: the rows and pieces of a stage of which this lane gives the addresses; upper: from there
// to the other 32 k of x.
template <typename S>
HB_DEVICE void chunk_add(const unsigned char *x, int upper, const unsigned char *w,
                         int32_t (*sum)[S::NI][4])
{
    uint32_t a[S::MI][2][4];
#pragma unroll
    for (int i = 0; i < S::MI; i++) {
        load_matrices(x + i * 16 * CHUNK, a[i][0]);
        load_matrices(x + i * 16 * CHUNK + upper, a[i][1]);
    }
#pragma unroll
    for (int j = 0; j < S::NI; j++) {
        uint32_t b[4];
        load_matrices(w + 2 * j * CHUNK, b);
#pragma unroll
        for (int i = 0; i < S::MI; i++) {
            mma_int8(sum[i][j], a[i][0], b);
            mma_int8(sum[i][j], a[i][1], b + 2);
        }
    }
}

// A portion of the outlier columns into shared memory: TERMS planes [BM][PITCH] of x, then [BN]
// [PITCH] of codes; what is not there is 0.
template <int IO, typename S>
HB_DEVICE void portion_load(const linear8_job &job, int begin, int count, const expert_rows &rows,
                            int64_t first, unsigned char *shared)
{
    enum { TERMS = IO == 0 ? 3 : 1, TYPE = IO == 2 ? 2 : 1 };
    uint16_t *planes = (uint16_t *)shared;
    const hb_cuda_linear8 &a = job.a;
    const int o = thread_index() % PORTION; // this thread's column, of every fourth row
    const int64_t k = begin + o < count ? load(job.columns + begin + o) : -1;
    for (int row = thread_index() / PORTION; row < S::BM; row += THREADS / PORTION) {
        uint16_t terms[3] = {0, 0, 0};
        const int64_t i = (rows.begin + row) * a.depth + k;
        if (k >= 0 && row < rows.end - rows.begin) {
            if constexpr (IO == 0)
                split_bf16(load((const float *)a.x + i), terms);
            else
                terms[0] = load((const uint16_t *)a.x + i);
        }
#pragma unroll
        for (int term = 0; term < TERMS; term++)
            shared_store(planes + (term * S::BM + row) * PITCH + o, terms[term]);
    }
    for (int row = thread_index() / PORTION; row < S::BN; row += THREADS / PORTION) {
        float code = 0.0f;
        if (k >= 0 && first + row < a.rows)
            code = (float)load(a.codes + (rows.expert * a.rows + first + row) * a.depth + k);
        shared_store(planes + (TERMS * S::BM + row) * PITCH + o, (uint16_t)pack<TYPE>(code, 0.0f));
    }
}

// value[j] += the portion's products for 16 rows of x, of which this warp's mma i has the first.
template <int IO, typename S>
HB_DEVICE void portion_add(const unsigned char *shared, int i, int m_warp, int n_warp,
                           float (*value)[4])
{
    enum { TERMS = IO == 0 ? 3 : 1, TYPE = IO == 2 ? 2 : 1 };
    const uint16_t *planes = (const uint16_t *)shared;
    const int g = lane_index() / 4, t = lane_index() % 4;
    const uint16_t *x = planes + ((m_warp * S::MI + i) * 16 + g) * PITCH + 2 * t;
    const uint16_t *w =
        planes + (TERMS * S::BM + n_warp * S::NI * 8 + output_of<S>(0, g)) * PITCH + 2 * t;
#pragma unroll
    for (int j = 0; j < S::NI; j++) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
        for (int step = 0; step < PORTION; step += 16) {
            uint32_t b[2];
#pragma unroll
            for (int r = 0; r < 2; r++)
                b[r] = shared_load((const uint32_t *)(w + 2 * j * PITCH + step + 8 * r));
#pragma unroll
            for (int term = 0; term < TERMS; term++) {
                uint32_t fragment[4];
#pragma unroll
                for (int r = 0; r < 4; r++)
                    fragment[r] =
                        shared_load((const uint32_t *)(x + (term * S::BM + 8 * (r % 2)) * PITCH +
                                                       step + 8 * (r / 2)));
                mma_16x8x16<TYPE>(sum, fragment, b);
            }
        }
#pragma unroll
        for (int r = 0; r < 4; r++) value[j][r] = add_rn(value[j][r], sum[r]);
    }
}

enum { EIGHT = 8 };

// Eight consecutive outputs of one row of y, or `count` if that is less.
template <int IO>
HB_DEVICE void store_run(void *y, int64_t i, const float *value, int count, bool aligned)
{
    if (aligned && count >= EIGHT) {
        store8<IO>(y, i, value);
    } else {
#pragma unroll
        for (int n = 0; n < EIGHT; n++)
            if (n < count) store_float<IO>(y, i + n, value[n]);
    }
}

template <int IO, typename S, bool SUMS>
HB_KERNEL_RESIDENT(THREADS, 1)
linear8_tile_kernel(HB_ARGS linear8_job job)
{
    const hb_cuda_linear8 &a = job.a;
    unsigned char *shared = shared_memory();
    const uint32_t block = (uint32_t)block_index(), columns = (uint32_t)job.x_tiles;
    const int64_t first = (int64_t)(block / columns) * S::BN, x_tile = block % columns;
    expert_rows rows = {x_tile * S::BM, a.m, 0};
    if constexpr (!SUMS)
        rows = expert_find(a, x_tile, S::BM);
    else if (a.m - rows.begin > S::BM)
        rows.end = rows.begin + S::BM;
    if (rows.begin >= rows.end) return;
    const int n_rows = (int)(rows.end - rows.begin);
    const int n_outputs = (int)(a.rows - first < S::BN ? a.rows - first : (int64_t)S::BN);
    if constexpr (!SUMS) {
        if (rows.expert < 0) {
            for (int i = thread_index(); i < n_rows * n_outputs; i += THREADS)
                store_float<IO>(a.y, (rows.begin + i / n_outputs) * a.rows + first + i % n_outputs,
                                0.0f);
            return;
        }
    }
    const int64_t weight = rows.expert * a.rows + first; // row of the stack

    const int mine = thread_index() / 4, part = thread_index() % 4;
    source<S> from;
    from.x = job.x_codes + rows.begin * a.depth + 16 * part;
    from.w = a.codes + weight * a.depth + 16 * part;
    from.left = (int)a.depth - 16 * part;
#pragma unroll
    for (int i = 0; i < S::BM / HB_LANES; i++) {
        const int row = mine + i * HB_LANES;
        from.x_offset[i] = (uint32_t)(row < n_rows ? row : 0) * (uint32_t)a.depth;
    }
#pragma unroll
    for (int i = 0; i < S::BN / HB_LANES; i++) {
        const int row = mine + i * HB_LANES;
        from.w_offset[i] = (uint32_t)(row < n_outputs ? row : 0) * (uint32_t)a.depth;
    }
    from.x_target = mine * CHUNK + 16 * (part ^ (mine / 2) % 4);
    from.w_target = (S::BM + mine) * CHUNK + 16 * (part ^ (mine / S::RUN) % 4);
    const int chunks = (int)((a.depth + CHUNK - 1) / CHUNK);
    for (int s = 0; s < S::STAGES - 1; s++) {
        if (s < chunks) stage_load<S>(&from, shared + s * S::STAGE_BYTES);
        async_commit();
    }
    float *x_factor = (float *)(shared + S::FACTORS), *factor = x_factor + S::BM;
    float *bias = factor + S::BN;
    if constexpr (!SUMS) { // read behind the barriers below
        const int i = thread_index();
        if (i < n_rows) shared_store(x_factor + i, linear8_factor(job.x_scale, rows.begin + i));
        if (i < n_outputs) {
            shared_store(factor + i, linear8_factor(a.scale, weight + i));
            shared_store(bias + i, linear8_bias(a, weight + i));
        }
    }
    const int m_warp = warp_index() % S::WARPS_M, n_warp = warp_index() / S::WARPS_M;
    const int g = lane_index() / 4, t = lane_index() % 4;
    // Matrix lane / 8 of load_matrices is, for x, rows 0..7 or 8..15 of piece 0 or 1 (of 32 k), for
    // W eight outputs of piece 0, 1, 2 or 3.
    const int matrix = lane_index() / 8, r = lane_index() % 8;
    const unsigned char *x =
        shared + (m_warp * S::MI * 16 + matrix % 2 * 8 + r) * CHUNK + 16 * (matrix / 2 ^ r / 2);
    const unsigned char *w =
        shared + (S::BM + n_warp * S::NI * 8 + output_of<S>(0, r)) * CHUNK + 16 * (matrix ^ r / 2);
    const int upper = (r / 2 & 2) != 0 ? -32 : 32; // piece ^ 2
    int32_t sum[S::MI][S::NI][4] = {{{0}}};
    int stage = 0, free_stage = (S::STAGES - 1) * S::STAGE_BYTES; // offsets
    for (int chunk = 0; chunk < chunks; chunk++) {
        async_wait<S::STAGES - 2>();
        block_sync();
        if (chunk + S::STAGES - 1 < chunks) stage_load<S>(&from, shared + free_stage);
        async_commit();
        chunk_add<S>(x + stage, upper, w + stage, sum);
        free_stage = stage;
        stage = stage + S::STAGE_BYTES < S::FACTORS ? stage + S::STAGE_BYTES : 0;
    }
    async_wait<0>();
    block_sync(); // also where there is no chunk

    const int output = n_warp * S::NI * 8 + S::RUN * t; // this lane's first
    const int count = n_outputs - output;
    if constexpr (SUMS) {
        const bool whole = count >= S::RUN && a.rows % 4 == 0 && ((uintptr_t)job.c & 15) == 0;
#pragma unroll
        for (int i = 0; i < 2 * S::MI; i++) {
            const int row = m_warp * S::MI * 16 + 8 * i + g;
            if (row >= n_rows) continue;
            int32_t *c = job.c + (rows.begin + row) * a.rows + first + output;
#pragma unroll
            for (int j = 0; j < S::NI; j += 2) {
                const int32_t *low = sum[i / 2][j] + 2 * (i % 2);
                const int32_t *high = sum[i / 2][j + 1] + 2 * (i % 2);
                const int32_t four[4] = {low[0], low[1], high[0], high[1]};
                if (whole)
                    store_once((uint4 *)(c + 2 * j), uint4{(uint32_t)four[0], (uint32_t)four[1],
                                                           (uint32_t)four[2], (uint32_t)four[3]});
                else
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (2 * j + e < count) store(c + 2 * j + e, four[e]);
            }
        }
        return;
    } else {
        // The sums become float32 in place.
        float value[S::MI][S::NI][4];
#pragma unroll
        for (int i = 0; i < 2 * S::MI; i++) {
            const int row = m_warp * S::MI * 16 + 8 * i + g;
            const float scale = shared_load(x_factor + row); // anything behind the last row
#pragma unroll
            for (int j = 0; j < S::NI; j++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    value[i / 2][j][2 * (i % 2) + e] =
                        mul_rn((float)sum[i / 2][j][2 * (i % 2) + e], scale);
        }
        const int outliers = linear8_columns(job);
        for (int begin = 0; begin < outliers; begin += PORTION) {
            block_sync(); // the chunks, or the last portion, are done with
            portion_load<IO, S>(job, begin, outliers, rows, first, shared);
            block_sync();
#pragma unroll
            for (int i = 0; i < S::MI; i++) portion_add<IO, S>(shared, i, m_warp, n_warp, value[i]);
        }
        const bool aligned = a.rows % 8 == 0 && ((uintptr_t)a.y & 15) == 0;
#pragma unroll
        for (int e = 0; e < S::RUN; e += EIGHT) {
#pragma unroll
            for (int i = 0; i < 2 * S::MI; i++) {
                const int row = m_warp * S::MI * 16 + 8 * i + g;
                if (row >= n_rows) continue;
                float run[EIGHT];
#pragma unroll
                for (int n = 0; n < EIGHT; n++) {
                    run[n] = mul_rn(value[i / 2][(e + n) / 2][2 * (i % 2) + n % 2],
                                    shared_load(factor + output + e + n));
                    if (a.bias != nullptr)
                        run[n] = add_rn(run[n], shared_load(bias + output + e + n));
                }
                store_run<IO>(a.y, (rows.begin + row) * a.rows + first + output + e, run, count - e,
                              aligned);
            }
        }
    }
}

template <int IO, typename S, bool SUMS>
int launch(const hb_cuda_queue *queue, const linear8_job &job)
{
    linear8_job sized = job;
    sized.x_tiles = expert_tiles(job.a, S::BM);
    const int64_t blocks = hb_ceil_div(job.a.rows, (int64_t)S::BN) * sized.x_tiles;
    return HB_LAUNCH((linear8_tile_kernel<IO, S, SUMS>), blocks, THREADS, S::SHARED_BYTES,
                     queue->stream, sized);
}

template <typename S> int launch(const hb_cuda_queue *queue, const linear8_job &job)
{
    if (job.c != nullptr) return launch<HB_F32, S, true>(queue, job);
    switch (job.a.io_dtype) {
    case HB_F32: return launch<HB_F32, S, false>(queue, job);
    case HB_BF16: return launch<HB_BF16, S, false>(queue, job);
    default: return launch<HB_F16, S, false>(queue, job);
    }
}

} // namespace

bool hb_cuda_linear8_tile_fits(const hb_cuda_queue *queue, const linear8_job &job)
{
    return job.x_codes != nullptr && job.a.depth % 16 == 0 && ((uintptr_t)job.x_codes & 15) == 0 &&
           ((uintptr_t)job.a.codes & 15) == 0 && hb_cuda_device_major(queue->device) >= 8;
}

int hb_cuda_launch_linear8_tile(const hb_cuda_queue *queue, const linear8_job &job, int32_t path)
{
    if (path == HB_CUDA_AUTO) {
        const int64_t blocks = hb_ceil_div(job.a.rows, (int64_t)large_tile::BN) *
                               hb_ceil_div(job.a.m, (int64_t)large_tile::BM);
        const bool is_large = blocks >= hb_cuda_device_multiprocessors(queue->device) &&
                              (job.a.offsets == nullptr || job.a.m / job.a.experts >= 64);
        path = is_large ? HB_CUDA_TILE : HB_CUDA_TILE_SMALL;
    }
    return path == HB_CUDA_TILE ? launch<large_tile>(queue, job) : launch<small_tile>(queue, job);
}
