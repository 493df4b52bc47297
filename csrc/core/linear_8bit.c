// y = x W^T + b and dx = dy W for a row-wise int8 W, and the exact integer product.
//
//   w[r, k] = codes[r, k] * scale[r] / 127
//   dynamic: y[m, r] = (sum_k cx[m, k] codes[r, k] * sx[m]/127 + sum_o x[m, o] codes[r, o]) *
//   scale[r]/127
//            + bias[r], with cx, sx the row-wise int8 form of x without its outlier columns o
//   exact:   y[m, r] = (sum_k x[m, k] codes[r, k]) * scale[r]/127 + bias[r]
//
// Source: LLM.int8(), arXiv:2208.07339, §3. Everything behind the integer sum is float32, rounded
// once to y's dtype. All products walk a grid of chunks: a block of outputs (of W's rows, backward
// of its columns) by a range of rows of x. The sum over the inner index is never split, so results
// do not depend on the number of threads. Scratch is one allocation per call: x in the kernels'
// layout, then a part per lane.
#include "core/matrix.h"
#include "core/ops.h"
#include "core/ops_cuda.h"

#include <inttypes.h>
#include <stdlib.h>

enum {
    BLOCK = HB_LINEAR4_MAX_TILE_COLS, // outputs per block; every tile_cols divides it
    STACK_BYTES = 16 << 10,           // scratch up to this size is not allocated
    SERIAL_WORK = 1 << 19,            // bytes of weights, weighted with rows of x, worth a thread
    PASS_ROWS = 240,                  // rows of x whose panel sums a lane keeps
    DOT_UNTIL = 8                     // rows of x up to which dot_f32 beats panels
};

typedef struct {
    const hb_kernels *kernels;
    hb_pool *pool;
    hb_matrix x, y;
    const int8_t *codes;
    const float *scale;
    int64_t rows, depth; // of W
    bool backward;
    float threshold;   // NaN: no outliers
    const float *bias; // [rows] or NULL

    int32_t *c; // integer product: [x rows, rows] instead of y
    const int8_t *a;

    // The grid.
    int64_t x_rows, outputs, x_per_chunk, x_chunks;
    int64_t x_begin, pass_rows; // rows of x in this pass (panels)

    // Scratch.
    unsigned char *prepared; // rows of x (dot), or tiles (panels, int8 where `tiles`)
    int64_t prepared_stride;
    bool tiles;        // int8: tile_int8 multiplies, not dot_int8
    int64_t int8_rows; // rows of x that one call of it takes
    int64_t group; // rows of x that share a unit of the grid: what tiles of outliers never straddle
    float *x_factor; // [x_rows]: scale / 127
    uint8_t *marks;  // [depth], outlier columns; one more per lane behind it
    int64_t *columns, n_columns;
    unsigned char *outliers; // x of those columns in tiles
    int64_t outliers_stride;
    unsigned char *lanes;
    int n_lanes;
    int64_t lane_bytes, row_at, codes_at, sums_at, extra_at;
} product;

static int64_t round_up(int64_t n, int64_t multiple)
{
    return hb_ceil_div(n, multiple) * multiple;
}

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static bool is_small(const product *p)
{
    double work = (double)p->rows * (double)p->depth * (1.0 + (double)p->x_rows / 8.0);
    return work < (double)SERIAL_WORK;
}

static int lanes_of(const product *p)
{
    return is_small(p) ? 1 : hb_pool_threads(p->pool);
}

static void run(product *p, bool serial, int64_t n_chunks, hb_chunk_fn fn)
{
    hb_parallel_for_lanes(serial ? NULL : p->pool, p->n_lanes, n_chunks, fn, p);
}

// Chunks of `unit`-multiples of rows of x, so that there are at least four per lane where possible.
static void plan_grid(product *p, int64_t unit, int64_t most_rows)
{
    const int64_t blocks = hb_ceil_div(p->outputs, BLOCK);
    const int64_t units = hb_ceil_div(p->x_rows, unit);
    int64_t wanted = hb_ceil_div(4 * lanes_of(p), blocks);
    int64_t per_chunk = hb_ceil_div(units, least(wanted, units));
    p->x_per_chunk = least(per_chunk * unit, most_rows);
    p->x_chunks = hb_ceil_div(p->x_rows, p->x_per_chunk);
}

// Row m of x as contiguous elements: in place, or copied to `target`.
static const void *dense_row(const product *p, int64_t m, void *target)
{
    if (p->x.col_stride == 1) return hb_matrix_element(&p->x, hb_matrix_row_offset(&p->x, m));
    hb_matrix_gather_row(&p->x, m, target);
    return target;
}

// out[i] = sums[i] * factor of output begin + i.
static void scale_sums(const product *p, int64_t begin, int64_t n, const float *sums, float *out)
{
    for (int64_t i = 0; i < n; i++) out[i] = sums[i] * (p->scale[begin + i] * HB_INT8_UNIT);
}

static void store(const product *p, int64_t m, int64_t begin, int64_t n, const float *sums)
{
    const float *bias = p->bias != NULL ? p->bias + begin : NULL;
    hb_matrix_finish(&p->kernels->linear4, &p->y, m, begin, n, sums, bias);
}

// ---- scratch ------------------------------------------------------------------------------------

typedef struct {
    unsigned char *memory; // to be freed; NULL when the stack was enough
    int64_t used;
} arena;

// Reserves `bytes` behind what was reserved before; the offset, a multiple of 64.
static int64_t reserve(arena *a, int64_t bytes)
{
    int64_t at = a->used;
    a->used += round_up(bytes, 64);
    return at;
}

// The memory, 64-byte aligned: `stack` if that is given and large enough. NULL when there is none.
static unsigned char *open_arena(arena *a, unsigned char *stack)
{
    if (stack != NULL && a->used <= STACK_BYTES) return stack;
    a->memory = malloc((size_t)a->used + 64);
    return a->memory == NULL ? NULL : a->memory + (64 - (uintptr_t)a->memory % 64) % 64;
}

// ---- both sides int8
// ------------------------------------------------------------------------------

static void mark_outliers(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    uint8_t *marks = p->marks + (lane + 1) * round_up(p->depth, 64);
    void *row = p->lanes + lane * p->lane_bytes + p->row_at;
    const hb_dtype io = p->x.view->dtype;
    for (int64_t m = begin; m < end; m++)
        p->kernels->codec.outliers_int8[io](dense_row(p, m, row), p->depth, p->threshold, marks);
}

// Marks of all rows, and the list of marked columns.
static void find_outliers(product *p, int n_lanes, bool serial)
{
    const int64_t stride = round_up(p->depth, 64);
    memset(p->marks, 0, (size_t)(stride * (n_lanes + 1)));
    run(p, serial, p->x_rows, mark_outliers);
    for (int lane = 1; lane <= n_lanes; lane++)
        for (int64_t k = 0; k < p->depth; k++) p->marks[k] |= p->marks[lane * stride + k];
    for (int64_t k = 0; k < p->depth; k++)
        if (p->marks[k]) p->columns[p->n_columns++] = k;
}

static void prepare_row(const product *p, int64_t m, const int8_t *codes)
{
    const hb_kernels_linear8 *k = &p->kernels->linear8;
    if (p->tiles)
        k->prepare_tile(codes, p->depth, (int)(m % p->int8_rows),
                        p->prepared + m / p->int8_rows * p->prepared_stride);
    else
        k->prepare_int8(codes, p->depth, p->prepared + m * p->prepared_stride);
}

static void quantize_rows(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    const hb_kernels_codec *codec = &p->kernels->codec;
    unsigned char *scratch = p->lanes + lane * p->lane_bytes;
    int8_t *codes = (int8_t *)(scratch + p->codes_at);
    for (int64_t m = begin; m < end; m++) {
        if (p->a != NULL) {
            prepare_row(p, m, p->a + m * p->depth);
            continue;
        }
        const void *row = dense_row(p, m, scratch + p->row_at);
        const hb_dtype io = p->x.view->dtype;
        const uint8_t *zero = p->n_columns > 0 && p->x_rows > 1 ? p->marks : NULL;
        float absmax = codec->absmax_int8[io](row, p->depth, p->threshold);
        codec->encode_int8[io](row, p->depth, absmax, p->threshold, zero, codes);
        p->x_factor[m] = absmax * HB_INT8_UNIT;
        prepare_row(p, m, codes);
    }
}

// Tiles of outliers in a group.
static int64_t outlier_tiles(const product *p)
{
    return hb_ceil_div(p->group, p->kernels->linear4.f32.tile_rows);
}

// Outlier columns of tile t of x, as the float32 tile takes them. The columns are gathered into the
// lane's room for sums, which is not in use yet.
static void pack_outliers(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    const hb_linear4_set *set = &p->kernels->linear4.f32;
    float *gathered = (float *)(p->lanes + lane * p->lane_bytes + p->extra_at);
    for (int64_t t = begin; t < end; t++) {
        const int64_t in_group = t % outlier_tiles(p) * set->tile_rows;
        const int64_t first = t / outlier_tiles(p) * p->group + in_group;
        const int n_x = (int)least(set->tile_rows, least(p->group - in_group, p->x_rows - first));
        if (n_x <= 0) continue;
        for (int i = 0; i < n_x; i++) {
            const int64_t row = hb_matrix_row_offset(&p->x, first + i);
            for (int64_t j = 0; j < p->n_columns; j++)
                gathered[i * p->n_columns + j] = hb_load_f32(
                    p->x.view->data, row + p->columns[j] * p->x.col_stride, p->x.view->dtype);
        }
        set->pack_x(gathered, HB_F32, p->n_columns, n_x, p->n_columns,
                    p->outliers + t * p->outliers_stride);
    }
}

// Codes of the outlier columns of rows [out, out + n_out) of W as float32 panels, `tile_cols` rows
// each.
static void decode_outliers(const product *p, int64_t out, int64_t n_out, float *panels)
{
    const int64_t cols = p->kernels->linear4.f32.tile_cols;
    memset(panels, 0, (size_t)(round_up(n_out, cols) * p->n_columns) * sizeof(float));
    for (int64_t r = 0; r < n_out; r++) {
        const int8_t *row = p->codes + (out + r) * p->depth;
        float *panel = panels + r / cols * cols * p->n_columns + r % cols;
        for (int64_t j = 0; j < p->n_columns; j++) panel[j * cols] = (float)row[p->columns[j]];
    }
}

// extra[i][r] = sum over the outlier columns, for tile t of x; rows of `extra` are BLOCK floats
// apart.
static void multiply_outliers(const product *p, int64_t t, int n_x, int64_t n_out,
                              const float *panels, float *sums, float *extra)
{
    const hb_linear4_set *set = &p->kernels->linear4.f32;
    const int64_t cols = set->tile_cols;
    for (int64_t r = 0; r < n_out; r += cols) {
        for (int64_t step = 0; step < p->n_columns; step += set->panel_steps) {
            const int64_t n_steps = least(set->panel_steps, p->n_columns - step);
            set->tile(p->outliers + t * p->outliers_stride +
                          step * set->tile_rows * set->element_bytes,
                      panels + (r * p->n_columns + step * cols), n_steps, n_x, step > 0, sums);
        }
        for (int i = 0; i < n_x; i++)
            memcpy(extra + i * BLOCK + r, sums + i * cols, (size_t)cols * sizeof(float));
    }
}

// Rows [m, m + n_x) of x by rows [out, out + n_out) of W, integers and what follows.
static void multiply_rows(const product *p, int64_t m, int n_x, int64_t out, int64_t n_out,
                          const float *factors, const float *extra, unsigned char *scratch)
{
    const hb_kernels_linear8 *k = &p->kernels->linear8;
    int32_t *c = (int32_t *)(scratch + p->sums_at);
    float *sums = (float *)(c + p->int8_rows * BLOCK);
    const int8_t *w = p->codes + out * p->depth;
    for (int first = 0; first < n_x; first += (int)p->int8_rows) {
        const int n = (int)least(p->int8_rows, n_x - first);
        const int64_t unit = p->tiles ? (m + first) / p->int8_rows : m + first;
        int32_t *target = p->c != NULL ? p->c + (m + first) * p->rows + out : c;
        (p->tiles ? k->tile_int8 : k->dot_int8)(w, p->depth, n_out, p->depth,
                                                p->prepared + unit * p->prepared_stride, n, target,
                                                p->c != NULL ? p->rows : BLOCK);
        if (p->c != NULL) continue;
        for (int t = 0; t < n; t++) {
            k->rescale(c + t * BLOCK, p->x_factor[m + first + t],
                       extra != NULL ? extra + (first + t) * BLOCK : NULL, factors, n_out, sums);
            store(p, m + first + t, out, n_out, sums);
        }
    }
}

static void int8_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    unsigned char *scratch = p->lanes + lane * p->lane_bytes;
    const int64_t tile_rows = p->kernels->linear4.f32.tile_rows;
    float *extra = (float *)(scratch + p->extra_at);
    float *tile_sums = extra + p->group * BLOCK;
    float *panels = tile_sums + tile_rows * BLOCK;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t out = chunk / p->x_chunks * BLOCK;
        const int64_t n_out = least(BLOCK, p->outputs - out);
        const int64_t m_begin = chunk % p->x_chunks * p->x_per_chunk;
        const int64_t m_end = least(m_begin + p->x_per_chunk, p->x_rows);
        float factors[BLOCK];
        for (int64_t r = 0; r < n_out && p->c == NULL; r++)
            factors[r] = p->scale[out + r] * HB_INT8_UNIT;
        if (p->n_columns == 0) {
            for (int64_t m = m_begin; m < m_end; m += p->int8_rows)
                multiply_rows(p, m, (int)least(p->int8_rows, m_end - m), out, n_out, factors, NULL,
                              scratch);
            continue;
        }
        decode_outliers(p, out, n_out, panels);
        for (int64_t m = m_begin; m < m_end; m += p->group) { // x_per_chunk is a multiple
            const int n_x = (int)least(p->group, m_end - m);
            for (int64_t i = 0; i < n_x; i += tile_rows)
                multiply_outliers(p, m / p->group * outlier_tiles(p) + i / tile_rows,
                                  (int)least(tile_rows, n_x - i), n_out, panels, tile_sums,
                                  extra + i * BLOCK);
            multiply_rows(p, m, n_x, out, n_out, factors, extra, scratch);
        }
    }
}

static hb_status run_int8(product *p, const char *function, hb_error *error)
{
    const hb_kernels_linear8 *k = &p->kernels->linear8;
    const hb_linear4_set *set = &p->kernels->linear4.f32;
    const int n_lanes = p->n_lanes = lanes_of(p);
    const bool serial = n_lanes == 1;
    const bool few = p->x_rows * p->depth < 1 << 16;
    const bool has_threshold = p->threshold == p->threshold;
    const int64_t stride = round_up(p->depth, 64);
    p->tiles = k->tile_int8 != NULL && p->x_rows >= k->tile_int8_from;
    p->int8_rows = p->tiles ? k->tile_int8_rows : k->dot_int8_rows;
    p->group = p->tiles || !has_threshold ? p->int8_rows : set->tile_rows;
    p->prepared_stride = p->tiles ? hb_int8_tile_bytes(p->depth, k->tile_int8_rows)
                                  : hb_int8_prepared_bytes(p->depth, k->prepared_bytes);
    plan_grid(p, p->group, INT64_MAX);

    arena a = {NULL, 0};
    const int64_t units = p->tiles ? hb_ceil_div(p->x_rows, p->int8_rows) : p->x_rows;
    const int64_t prepared_at = reserve(&a, units * p->prepared_stride);
    const int64_t factor_at = reserve(&a, p->x_rows * 4);
    const int64_t marks_at = has_threshold ? reserve(&a, stride * (n_lanes + 1)) : 0;
    const int64_t columns_at = has_threshold ? reserve(&a, p->depth * 8) : 0;
    const int64_t lanes_at = a.used;
    p->row_at = 0;
    p->codes_at = p->c != NULL || p->x.col_stride == 1 ? 0 : round_up(p->depth * 4, 64);
    p->sums_at = p->codes_at + stride;
    p->extra_at = p->sums_at + (p->int8_rows + 1) * BLOCK * 4;
    p->lane_bytes = p->extra_at;
    (void)reserve(&a, n_lanes * p->lane_bytes);

    _Alignas(64) unsigned char stack[STACK_BYTES];
    unsigned char *scratch = open_arena(&a, stack);
    HB_CHECK(error, scratch != NULL, HB_ERR_MEMORY,
             "%s: no memory for %" PRId64 " bytes of scratch", function, a.used);
    p->prepared = scratch + prepared_at;
    p->x_factor = (float *)(scratch + factor_at);
    p->marks = scratch + marks_at;
    p->columns = (int64_t *)(scratch + columns_at);
    p->lanes = scratch + lanes_at;
    if (has_threshold) find_outliers(p, n_lanes, serial || few);
    run(p, serial || few, p->x_rows, quantize_rows);

    arena b = {NULL, 0};
    if (p->n_columns > 0) { // how much is known only now
        const int64_t n_tiles = hb_ceil_div(p->x_rows, p->group) * outlier_tiles(p);
        p->outliers_stride = round_up(
            set->tile_rows * set->element_bytes * round_up(p->n_columns, set->x_block), 64);
        const int64_t gathered = set->tile_rows * p->n_columns;
        const int64_t work = (p->group + set->tile_rows + p->n_columns) * BLOCK;
        p->lane_bytes = round_up(p->extra_at + 4 * (gathered > work ? gathered : work), 64);
        const int64_t outliers_at = reserve(&b, n_tiles * p->outliers_stride);
        const int64_t more_at = reserve(&b, n_lanes * p->lane_bytes);
        unsigned char *more = open_arena(&b, NULL);
        if (more == NULL) {
            free(a.memory);
            return hb_fail(error, HB_ERR_MEMORY, "%s: no memory for %" PRId64 " bytes of scratch",
                           function, b.used);
        }
        p->outliers = more + outliers_at;
        p->lanes = more + more_at;
        run(p, serial || few, n_tiles, pack_outliers);
    }
    run(p, serial, hb_ceil_div(p->outputs, BLOCK) * p->x_chunks, int8_chunks);
    free(b.memory);
    free(a.memory);
    return HB_OK;
}

// ---- float32 x, few rows
// --------------------------------------------------------------------------

static void dot_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    const hb_kernels_linear8 *k = &p->kernels->linear8;
    (void)lane;
    _Alignas(64) float sums[DOT_UNTIL * BLOCK];
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t out = chunk * BLOCK, n_out = least(BLOCK, p->outputs - out);
        for (int64_t m = 0; m < p->x_rows; m += k->dot_f32_rows) {
            const int n_x = (int)least(k->dot_f32_rows, p->x_rows - m);
            k->dot_f32(p->codes + out * p->depth, p->depth, n_out, p->depth,
                       (const float *)(p->prepared + m * p->prepared_stride),
                       p->prepared_stride / 4, n_x, sums, BLOCK);
            for (int t = 0; t < n_x; t++) {
                scale_sums(p, out, n_out, sums + t * BLOCK, sums + t * BLOCK);
                store(p, m + t, out, n_out, sums + t * BLOCK);
            }
        }
    }
}

static hb_status run_dot(product *p, const char *function, hb_error *error)
{
    p->n_lanes = lanes_of(p);
    p->prepared_stride = round_up(p->depth * 4, 64);
    p->x_chunks = 1;
    arena a = {NULL, 0};
    (void)reserve(&a, p->x_rows * p->prepared_stride);
    _Alignas(64) unsigned char stack[STACK_BYTES];
    p->prepared = open_arena(&a, stack);
    HB_CHECK(error, p->prepared != NULL, HB_ERR_MEMORY,
             "%s: no memory for %" PRId64 " bytes of scratch", function, a.used);
    for (int64_t m = 0; m < p->x_rows; m++) {
        float *row = (float *)(p->prepared + m * p->prepared_stride);
        const int64_t offset = hb_matrix_row_offset(&p->x, m);
        for (int64_t i = 0; i < p->depth; i++)
            row[i] = hb_load_f32(p->x.view->data, offset + i * p->x.col_stride, p->x.view->dtype);
    }
    run(p, p->n_lanes == 1, hb_ceil_div(p->outputs, BLOCK), dot_chunks);
    free(a.memory);
    return HB_OK;
}

// ---- float32 x, many rows
// -------------------------------------------------------------------------

static void pack_tiles(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    const hb_linear4_set *set = &p->kernels->linear4.f32;
    const int64_t bytes = (int64_t)hb_dtype_bytes(p->x.view->dtype);
    unsigned char *gathered = p->lanes + lane * p->lane_bytes;
    for (int64_t t = begin; t < end; t++) {
        const int64_t m = p->x_begin + t * set->tile_rows;
        const int n_x = (int)least(set->tile_rows, p->x_begin + p->pass_rows - m);
        int64_t stride = p->x.cols;
        const void *rows = gathered;
        if (hb_matrix_rows_are_regular(&p->x, m, n_x, &stride)) {
            rows = hb_matrix_element(&p->x, hb_matrix_row_offset(&p->x, m));
        } else {
            stride = p->x.cols;
            for (int i = 0; i < n_x; i++)
                hb_matrix_gather_row(&p->x, m + i, gathered + i * p->x.cols * bytes);
        }
        set->pack_x(rows, p->x.view->dtype, stride, n_x, p->x.cols,
                    p->prepared + t * p->prepared_stride);
    }
}

// The panel of outputs [out, out + n_out) over inner indices [step, step + n_steps).
static void decode_panel(const product *p, int64_t out, int64_t n_out, int64_t step,
                         int64_t n_steps, float *factors, float *panel)
{
    const int cols = p->kernels->linear4.f32.tile_cols;
    if (!p->backward) {
        p->kernels->linear8.decode_rows(p->codes + out * p->depth + step, p->depth, n_out, n_steps,
                                        cols, panel);
        return;
    }
    for (int64_t r = 0; r < n_steps; r++) factors[r] = p->scale[step + r] * HB_INT8_UNIT;
    p->kernels->linear8.decode_cols(p->codes + step * p->depth + out, p->depth, factors, n_steps,
                                    n_out, cols, panel);
}

static void multiply_panels(const product *p, int64_t out, int64_t tile_begin, int64_t tile_end,
                            int64_t m_end, unsigned char *scratch)
{
    const hb_linear4_set *set = &p->kernels->linear4.f32;
    const int64_t cols = set->tile_cols, n_out = least(cols, p->outputs - out);
    const int64_t tile_sums = set->tile_rows * cols;
    float *panel = (float *)scratch;
    float *factors = panel + set->panel_steps * cols;
    float *sums = (float *)(scratch + p->sums_at);
    if (p->x.cols == 0)
        memset(sums, 0, (size_t)((tile_end - tile_begin) * tile_sums) * sizeof(float));
    for (int64_t step = 0; step < p->x.cols; step += set->panel_steps) {
        const int64_t n_steps = least(set->panel_steps, p->x.cols - step);
        decode_panel(p, out, n_out, step, n_steps, factors, panel);
        for (int64_t t = tile_begin; t < tile_end; t++) {
            const int n_x = (int)least(set->tile_rows, m_end - t * set->tile_rows);
            set->tile(p->prepared + t * p->prepared_stride +
                          step * set->tile_rows * set->element_bytes,
                      panel, n_steps, n_x, step > 0, sums + (t - tile_begin) * tile_sums);
        }
    }
    for (int64_t m = tile_begin * set->tile_rows; m < least(tile_end * set->tile_rows, m_end);
         m++) {
        float *row = sums + (m - tile_begin * set->tile_rows) * cols;
        if (!p->backward) scale_sums(p, out, n_out, row, row);
        store(p, p->x_begin + m, out, n_out, row);
    }
}

static void panel_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    const int64_t cols = p->kernels->linear4.f32.tile_cols;
    const int64_t tile_rows = p->kernels->linear4.f32.tile_rows;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t out_begin = chunk / p->x_chunks * BLOCK;
        const int64_t out_end = least(out_begin + BLOCK, p->outputs);
        const int64_t m_begin = chunk % p->x_chunks * p->x_per_chunk;
        const int64_t m_end = least(m_begin + p->x_per_chunk, p->pass_rows);
        for (int64_t out = out_begin; out < out_end; out += cols)
            multiply_panels(p, out, m_begin / tile_rows, hb_ceil_div(m_end, tile_rows), m_end,
                            p->lanes + lane * p->lane_bytes);
    }
}

static hb_status run_panels(product *p, const char *function, hb_error *error)
{
    const hb_linear4_set *set = &p->kernels->linear4.f32;
    const int n_lanes = p->n_lanes = lanes_of(p);
    const int64_t item = (int64_t)hb_dtype_bytes(p->x.view->dtype), all_rows = p->x_rows;
    const int64_t pass_rows = least(PASS_ROWS / set->tile_rows * set->tile_rows, all_rows);
    p->prepared_stride =
        round_up(set->tile_rows * set->element_bytes * round_up(p->x.cols, set->x_block), 64);
    p->x_rows = pass_rows;
    plan_grid(p, set->tile_rows, pass_rows);
    p->x_rows = all_rows;

    int64_t stride;
    const bool gather = !hb_matrix_rows_are_regular(&p->x, 0, all_rows, &stride);
    arena a = {NULL, 0};
    (void)reserve(&a, hb_ceil_div(pass_rows, set->tile_rows) * p->prepared_stride);
    const int64_t lanes_at = a.used;
    p->sums_at = round_up((set->panel_steps * (set->tile_cols + 1)) * 4, 64);
    p->lane_bytes = p->sums_at + round_up(p->x_per_chunk, set->tile_rows) * set->tile_cols * 4;
    if (gather && p->lane_bytes < set->tile_rows * p->x.cols * item)
        p->lane_bytes = set->tile_rows * p->x.cols * item;
    p->lane_bytes = round_up(p->lane_bytes, 64);
    (void)reserve(&a, n_lanes * p->lane_bytes);

    _Alignas(64) unsigned char stack[STACK_BYTES];
    p->prepared = open_arena(&a, stack);
    HB_CHECK(error, p->prepared != NULL, HB_ERR_MEMORY,
             "%s: no memory for %" PRId64 " bytes of scratch", function, a.used);
    p->lanes = p->prepared + lanes_at;
    for (p->x_begin = 0; p->x_begin < all_rows; p->x_begin += pass_rows) {
        const int64_t n = p->pass_rows = least(pass_rows, all_rows - p->x_begin);
        const bool few = n * p->x.cols < 1 << 16;
        p->x_chunks = hb_ceil_div(n, p->x_per_chunk);
        run(p, n_lanes == 1 || few, hb_ceil_div(n, set->tile_rows), pack_tiles);
        run(p, n_lanes == 1, hb_ceil_div(p->outputs, BLOCK) * p->x_chunks, panel_chunks);
    }
    free(a.memory);
    return HB_OK;
}

// ---- arguments
// --------------------------------------------------------------------------------------

static hb_status check_weight(const int8_t *codes, const float *scale, int64_t rows, int64_t depth,
                              const char *function, hb_error *error)
{
    HB_CHECK(error, rows >= 0 && depth >= 0, HB_ERR_VALUE,
             "%s: weight, expected sizes that are not negative, got %" PRId64 " x %" PRId64,
             function, rows, depth);
    HB_CHECK(error, rows == 0 || depth == 0 || codes != NULL, HB_ERR_VALUE,
             "%s: weight, expected codes, got none", function);
    HB_CHECK(error, rows == 0 || scale != NULL, HB_ERR_VALUE,
             "%s: scale, expected memory, got none", function);
    return HB_OK;
}

hb_status hb_matmul_int8(hb_context *context, const hb_device *device, const int8_t *a,
                         const int8_t *b, int64_t m, int64_t n, int64_t depth, int32_t *c,
                         hb_error *error)
{
    HB_CHECK(error, m >= 0 && n >= 0 && depth >= 0, HB_ERR_VALUE,
             "matmul_int8: sizes, expected none negative, got %" PRId64 ", %" PRId64 ", %" PRId64,
             m, n, depth);
    HB_CHECK(error, depth <= HB_INT8_MAX_DEPTH, HB_ERR_VALUE,
             "matmul_int8: depth, expected at most %d (sums must fit in int32), got %" PRId64,
             HB_INT8_MAX_DEPTH, depth);
    if (device->type == HB_CUDA) return hb_matmul_int8_cuda(device, a, b, m, n, depth, c, error);
    product p = {.kernels = &context->kernels,
                 .pool = context->pool,
                 .codes = b,
                 .rows = n,
                 .depth = depth,
                 .threshold = hb_f32_from_bits(HB_NAN_BITS),
                 .a = a,
                 .c = c,
                 .x_rows = m,
                 .outputs = n};
    return m == 0 || n == 0 ? HB_OK : run_int8(&p, "matmul_int8", error);
}

static product product_of(hb_context *context, const hb_view *x, const int8_t *codes,
                          const float *scale, int64_t rows, int64_t depth, const hb_view *y)
{
    product p = {.kernels = &context->kernels,
                 .pool = context->pool,
                 .x = hb_matrix_of(x),
                 .y = hb_matrix_of(y),
                 .codes = codes,
                 .scale = scale,
                 .rows = rows,
                 .depth = depth,
                 .threshold = hb_f32_from_bits(HB_NAN_BITS)};
    p.x_rows = p.x.rows;
    p.outputs = p.y.cols;
    return p;
}

static hb_status check_bias(const hb_view *bias, int64_t rows, hb_error *error)
{
    HB_TRY(hb_matrix_check_view(bias, "linear_8bit", "bias", error));
    HB_CHECK(error, bias->ndim == 1 && bias->shape[0] == rows, HB_ERR_VALUE,
             "linear_8bit: bias, expected shape [%" PRId64 "], got %d dimensions of %" PRId64
             " elements",
             rows, bias->ndim, hb_view_numel(bias));
    return HB_OK;
}

// bias as float32: in place, or copied to *memory (to be freed).
static hb_status bias_f32(const hb_view *bias, int64_t rows, const float **out, float **memory,
                          hb_error *error)
{
    HB_TRY(check_bias(bias, rows, error));
    *out = bias->data;
    if (rows == 0 || (bias->dtype == HB_F32 && (bias->stride[0] == 1 || rows == 1))) return HB_OK;
    *memory = malloc((size_t)rows * sizeof **memory);
    HB_CHECK(error, *memory != NULL, HB_ERR_MEMORY, "linear_8bit: no memory for the bias");
    for (int64_t i = 0; i < rows; i++)
        (*memory)[i] = hb_load_f32(bias->data, i * bias->stride[0], bias->dtype);
    *out = *memory;
    return HB_OK;
}

hb_status hb_linear_8bit(hb_context *context, const hb_view *x, const int8_t *codes,
                         const float *scale, int64_t rows, int64_t depth, const hb_view *bias,
                         hb_int8_mode mode, float threshold, const hb_view *y, void *workspace,
                         hb_error *error)
{
    static const char function[] = "linear_8bit";
    HB_TRY(check_weight(codes, scale, rows, depth, function, error));
    HB_TRY(hb_matrix_check_views(x, depth, "x", "depth", y, rows, "y", "columns", function, error));
    HB_CHECK(error, threshold >= 0.0f, HB_ERR_VALUE,
             "linear_8bit: threshold, expected 0 (off) or a positive number, got %g",
             (double)threshold);
    HB_CHECK(error, mode == HB_INT8_EXACT || depth <= HB_INT8_MAX_DEPTH, HB_ERR_VALUE,
             "linear_8bit: depth, expected at most %d in dynamic mode, got %" PRId64,
             HB_INT8_MAX_DEPTH, depth);
    if (x->device.type == HB_CUDA) {
        if (bias != NULL) HB_TRY(check_bias(bias, rows, error));
        return hb_linear_8bit_cuda(function, x, codes, scale, rows, depth, bias, mode, threshold,
                                   false, y, workspace, error);
    }
    product p = product_of(context, x, codes, scale, rows, depth, y);
    float *memory = NULL;
    if (bias != NULL) HB_TRY(bias_f32(bias, rows, &p.bias, &memory, error));
    hb_status status = HB_OK;
    if (p.x_rows > 0 && p.outputs > 0) {
        if (mode == HB_INT8_DYNAMIC) {
            if (threshold > 0.0f) p.threshold = threshold;
            status = run_int8(&p, function, error);
        } else {
            status = p.x_rows <= DOT_UNTIL ? run_dot(&p, function, error)
                                           : run_panels(&p, function, error);
        }
    }
    free(memory);
    return status;
}

hb_status hb_linear_8bit_grad_input(hb_context *context, const hb_view *dy, const int8_t *codes,
                                    const float *scale, int64_t rows, int64_t depth,
                                    const hb_view *dx, void *workspace, hb_error *error)
{
    static const char function[] = "linear_8bit_grad_input";
    HB_TRY(check_weight(codes, scale, rows, depth, function, error));
    HB_TRY(hb_matrix_check_views(dy, rows, "dy", "columns", dx, depth, "dx", "depth", function,
                                 error));
    if (dy->device.type == HB_CUDA)
        return hb_linear_8bit_cuda(function, dy, codes, scale, rows, depth, NULL, HB_INT8_EXACT,
                                   0.0f, true, dx, workspace, error);
    product p = product_of(context, dy, codes, scale, rows, depth, dx);
    p.backward = true;
    return p.x_rows == 0 || p.outputs == 0 ? HB_OK : run_panels(&p, function, error);
}
