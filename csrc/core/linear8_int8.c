// Products of x and a row-wise int8 W that are int8 on both sides, with outlier columns of x apart.
// See linear8.h.
#include "core/linear8.h"

enum {
    PAIR_PASS_ROWS = 512
}; // rows of x for which a panel of W is widened; a multiple of the tile

static void mark_outliers(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product8 *p = arg;
    uint8_t *marks = p->marks + (lane + 1) * hb_round_up(p->depth, 64);
    void *row = p->lanes + lane * p->lane_bytes + p->row_at;
    const hb_dtype io = p->x.view->dtype;
    int64_t stride;
    for (int64_t m = begin; m < end; m++)
        p->context->kernels.codec.outliers_int8[io](hb_matrix_rows(&p->x, m, 1, row, &stride),
                                                    p->depth, p->threshold, marks);
}

// Marks of all rows, and the list of marked columns.
static void find_outliers(hb_product8 *p, int n_lanes, bool serial)
{
    const int64_t stride = hb_round_up(p->depth, 64);
    memset(p->marks, 0, (size_t)(stride * (n_lanes + 1)));
    hb_product8_run_chunks(p, serial, p->x_rows, mark_outliers);
    for (int lane = 1; lane <= n_lanes; lane++)
        for (int64_t k = 0; k < p->depth; k++) p->marks[k] |= p->marks[lane * stride + k];
    for (int64_t k = 0; k < p->depth; k++)
        if (p->marks[k]) p->columns[p->n_columns++] = k;
}

static void prepare_row(const hb_product8 *p, int64_t m, const int8_t *codes)
{
    const hb_kernels_linear8 *k = &p->context->kernels.linear8;
    unsigned char *tile = p->prepared + m / p->int8_rows * p->prepared_stride;
    if (p->tiles)
        k->prepare_tile(codes, p->depth, (int)(m % p->int8_rows), tile);
    else
        k->prepare_int8(codes, p->depth, p->prepared + m * p->prepared_stride);
}

// Row m of x: those of `a`, or those at `room` once they are there.
static const int8_t *codes_of_row(const hb_product8 *p, int64_t m, unsigned char *scratch,
                                  int8_t *room)
{
    if (p->c != NULL) return p->a + m * p->depth; // a may be NULL without elements
    const hb_kernels_codec *codec = &p->context->kernels.codec;
    int64_t stride;
    const void *row = hb_matrix_rows(&p->x, m, 1, scratch + p->row_at, &stride);
    const hb_dtype io = p->x.view->dtype;
    const uint8_t *zero = p->n_columns > 0 && p->x_rows > 1 ? p->marks : NULL;
    float absmax = codec->absmax_int8[io](row, p->depth, p->threshold);
    codec->encode_int8[io](row, p->depth, absmax, p->threshold, zero, room);
    p->x_factor[m] = absmax * HB_INT8_UNIT;
    return room;
}

static void quantize_rows(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product8 *p = arg;
    unsigned char *scratch = p->lanes + lane * p->lane_bytes;
    for (int64_t m = begin; m < end; m++)
        prepare_row(p, m, codes_of_row(p, m, scratch, (int8_t *)(scratch + p->codes_at)));
}

// The same by tiles of the pairs.
static void quantize_tiles(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product8 *p = arg;
    unsigned char *scratch = p->lanes + lane * p->lane_bytes;
    for (int64_t t = begin; t < end; t++) {
        const int64_t m = t * p->int8_rows, n = hb_least(p->int8_rows, p->x_rows - m);
        int8_t *room = (int8_t *)(scratch + p->codes_at);
        const int8_t *codes = codes_of_row(p, m, scratch, room);
        for (int64_t i = 1; i < n; i++) (void)codes_of_row(p, m + i, scratch, room + i * p->depth);
        p->context->kernels.linear8.pairs.widen_x(codes, p->depth, (int)n, p->depth,
                                                  p->prepared + t * p->prepared_stride);
    }
}

// Tiles of outliers in a group.
static int64_t outlier_tiles(const hb_product8 *p)
{
    return hb_ceil_div(p->group, p->context->kernels.linear4.f32.tile_rows);
}

// Outlier columns of tile t of x, as the float32 tile takes them. The columns are gathered into the
// lane's room for sums, which is not in use yet.
static void pack_outliers(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product8 *p = arg;
    const hb_linear4_set *set = &p->context->kernels.linear4.f32;
    float *gathered = (float *)(p->lanes + lane * p->lane_bytes + p->extra_at);
    for (int64_t t = begin; t < end; t++) {
        const int64_t in_group = t % outlier_tiles(p) * set->tile_rows;
        const int64_t first = t / outlier_tiles(p) * p->group + in_group;
        const int n_x =
            (int)hb_least(set->tile_rows, hb_least(p->group - in_group, p->x_rows - first));
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
static void decode_outliers(const hb_product8 *p, int64_t out, int64_t n_out, float *panels)
{
    const int64_t cols = p->context->kernels.linear4.f32.tile_cols;
    memset(panels, 0, (size_t)(hb_round_up(n_out, cols) * p->n_columns) * sizeof(float));
    for (int64_t r = 0; r < n_out; r++) {
        const int8_t *row = p->codes + (out + r) * p->depth;
        float *panel = panels + r / cols * cols * p->n_columns + r % cols;
        for (int64_t j = 0; j < p->n_columns; j++) panel[j * cols] = (float)row[p->columns[j]];
    }
}

// extra[i][r] = sum over the outlier columns, for tile t of x; rows of `extra` are
// HB_PRODUCT8_BLOCK floats apart.
static void multiply_outliers(const hb_product8 *p, int64_t t, int n_x, int64_t n_out,
                              const float *panels, float *sums, float *extra)
{
    const hb_linear4_set *set = &p->context->kernels.linear4.f32;
    const int64_t cols = set->tile_cols;
    for (int64_t r = 0; r < n_out; r += cols) {
        for (int64_t step = 0; step < p->n_columns; step += set->panel_steps) {
            const int64_t n_steps = hb_least(set->panel_steps, p->n_columns - step);
            set->tile(p->outliers + t * p->outliers_stride +
                          step * set->tile_rows * set->element_bytes,
                      panels + (r * p->n_columns + step * cols), n_steps, n_x, step > 0, sums);
        }
        for (int i = 0; i < n_x; i++)
            memcpy(extra + i * HB_PRODUCT8_BLOCK + r, sums + i * cols,
                   (size_t)cols * sizeof(float));
    }
}

// Integer sums of rows [m, m + n_x) of x by rows [out, out + n_out) of W; m begins a tile.
static void sum_rows(const hb_product8 *p, int64_t m, int64_t n_x, int64_t out, int64_t n_out,
                     int32_t *c, int64_t c_stride)
{
    const hb_kernels_linear8 *k = &p->context->kernels.linear8;
    const int8_t *w = p->codes + out * p->depth;
    for (int64_t i = 0; i < n_x; i += p->int8_rows) {
        const int n = (int)hb_least(p->int8_rows, n_x - i);
        const int64_t unit = p->tiles ? (m + i) / p->int8_rows : m + i;
        (p->tiles ? k->tile_int8 : k->dot_int8)(w, p->depth, n_out, p->depth,
                                                p->prepared + unit * p->prepared_stride, n,
                                                c + i * c_stride, c_stride);
    }
}

// What the panel after panel i of outputs from `out` on is widened from: a part of it, [begin, end)
// of n, is asked for. Behind the last panel most likely come the next outputs.
static void fetch_next(const hb_product8 *p, int64_t i, int64_t blocks, int64_t out, int64_t begin,
                       int64_t end, int64_t n)
{
    const int64_t first = out + (i + 1) / blocks * HB_INT8_PAIR_W;
    const int64_t k = (i + 1) % blocks * HB_INT8_PAIR_STEPS;
    const int64_t rows = hb_least(HB_INT8_PAIR_W, p->rows - first);
    if (rows <= 0) return;
    const int8_t *w = p->codes + first * p->depth + k;
    const int64_t per_row = hb_ceil_div(hb_least(HB_INT8_PAIR_STEPS, p->depth - k), 64);
    for (int64_t line = rows * per_row * begin / n; line < rows * per_row * end / n; line++)
        __builtin_prefetch(w + line / per_row * p->depth + line % per_row * 64, 0, 2); // into L2
}

// The same by pairs: a panel of W is widened once for all these rows of x.
static void sum_pairs(const hb_product8 *p, int64_t m, int64_t n_x, int64_t out, int64_t n_out,
                      unsigned char *panel, int32_t *c, int64_t c_stride)
{
    const hb_int8_pairs *pairs = &p->context->kernels.linear8.pairs;
    const int64_t blocks = p->depth > 0 ? hb_ceil_div(p->depth, HB_INT8_PAIR_STEPS) : 1;
    for (int64_t i = 0; i < hb_ceil_div(n_out, HB_INT8_PAIR_W) * blocks; i++) {
        const int64_t r = i / blocks * HB_INT8_PAIR_W, k = i % blocks * HB_INT8_PAIR_STEPS;
        const int64_t n_rows = hb_least(HB_INT8_PAIR_W, n_out - r);
        const int64_t n_steps = hb_least(HB_INT8_PAIR_STEPS, p->depth - k);
        const int64_t block_at = k > 0 ? hb_int8_pair_bytes(k, p->int8_rows) : 0;
        pairs->widen_w(p->codes + (out + r) * p->depth + k, p->depth, n_rows, n_steps, panel);
        const unsigned char *tiles = p->prepared + m / p->int8_rows * p->prepared_stride + block_at;
        for (int64_t t = 0; t < n_x; t += p->int8_rows) {
            const int64_t n = hb_least(p->int8_rows, n_x - t);
            const unsigned char *tile = tiles + t / p->int8_rows * p->prepared_stride;
            fetch_next(p, i, blocks, out, t, t + n, n_x);
            pairs->multiply(panel, n_rows, n_steps, tile,
                            t + n < n_x ? tile + p->prepared_stride : tiles, (int)n, k > 0,
                            c + t * c_stride + r, c_stride);
        }
    }
}

// Rows [m, m + n) of y from the integer sums at c.
static void store_rows(const hb_product8 *p, int64_t m, int64_t n, int64_t out, int64_t n_out,
                       const int32_t *c, const float *factors, const float *extra)
{
    float sums[HB_PRODUCT8_BLOCK];
    for (int64_t i = 0; i < n; i++) {
        p->context->kernels.linear8.rescale(c + i * HB_PRODUCT8_BLOCK, p->x_factor[m + i],
                                            extra != NULL ? extra + i * HB_PRODUCT8_BLOCK : NULL,
                                            factors, n_out, sums);
        hb_product8_store(p, m + i, out, n_out, sums);
    }
}

static void int8_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product8 *p = arg;
    unsigned char *scratch = p->lanes + lane * p->lane_bytes;
    const int64_t tile_rows = p->context->kernels.linear4.f32.tile_rows;
    int32_t *sums = (int32_t *)(scratch + p->sums_at);
    float *extra = (float *)(scratch + p->extra_at);
    float *tile_sums = extra + p->group * HB_PRODUCT8_BLOCK;
    float *panels = tile_sums + tile_rows * HB_PRODUCT8_BLOCK;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t out = chunk / p->x_chunks * HB_PRODUCT8_BLOCK;
        const int64_t n_out = hb_least(HB_PRODUCT8_BLOCK, p->outputs - out);
        const int64_t m_begin = chunk % p->x_chunks * p->x_per_chunk;
        const int64_t m_end = hb_least(m_begin + p->x_per_chunk, p->x_rows);
        const int64_t c_stride = p->c != NULL ? p->rows : HB_PRODUCT8_BLOCK;
        float factors[HB_PRODUCT8_BLOCK];
        for (int64_t r = 0; r < n_out && p->c == NULL; r++)
            factors[r] = p->scale[out + r] * HB_INT8_UNIT;
        if (p->n_columns > 0) decode_outliers(p, out, n_out, panels);
        for (int64_t m = m_begin; m < m_end; m += p->sums_rows) { // x_per_chunk is a multiple
            const int64_t n_x = hb_least(p->sums_rows, m_end - m);
            int32_t *c = p->c != NULL ? p->c + m * p->rows + out : sums;
            if (p->pairs)
                sum_pairs(p, m, n_x, out, n_out, scratch + p->panel_at, c, c_stride);
            else
                sum_rows(p, m, n_x, out, n_out, c, c_stride);
            if (p->c != NULL) continue;
            for (int64_t g = 0; g < n_x; g += p->group) {
                const int64_t n = hb_least(p->group, n_x - g);
                for (int64_t i = 0; i < n && p->n_columns > 0; i += tile_rows)
                    multiply_outliers(p, (m + g) / p->group * outlier_tiles(p) + i / tile_rows,
                                      (int)hb_least(tile_rows, n - i), n_out, panels, tile_sums,
                                      extra + i * HB_PRODUCT8_BLOCK);
                store_rows(p, m + g, n, out, n_out, c + g * HB_PRODUCT8_BLOCK, factors,
                           p->n_columns > 0 ? extra : NULL);
            }
        }
    }
}

hb_status hb_product8_int8(hb_product8 *p, const char *function, hb_error *error)
{
    const hb_kernels_linear8 *k = &p->context->kernels.linear8;
    const hb_linear4_set *set = &p->context->kernels.linear4.f32;
    const int n_lanes = p->n_lanes = hb_product8_lanes(p);
    const bool serial = n_lanes == 1;
    const bool few = p->x_rows * p->depth < 1 << 16;
    const bool has_threshold = p->threshold == p->threshold;
    const int64_t stride = hb_round_up(p->depth, 64);
    p->tiles = k->tile_int8 != NULL && p->x_rows >= k->tile_int8_from;
    p->pairs = !p->tiles && k->pairs.from > 0 && p->x_rows >= k->pairs.from;
    const bool together = p->tiles || p->pairs; // rows of x, in prepared memory
    p->int8_rows = p->tiles ? k->tile_int8_rows : p->pairs ? k->pairs.rows : k->dot_int8_rows;
    p->group = together || !has_threshold ? p->int8_rows : set->tile_rows;
    p->prepared_stride = p->tiles   ? hb_int8_tile_bytes(p->depth, k->tile_int8_rows)
                         : p->pairs ? hb_int8_pair_bytes(p->depth, p->int8_rows)
                                    : hb_int8_prepared_bytes(p->depth, k->prepared_bytes);
    hb_product8_plan_grid(p, p->group, INT64_MAX);
    p->sums_rows = p->pairs ? hb_least(p->x_per_chunk, PAIR_PASS_ROWS) : p->group;

    hb_scratch scratch = {0}, more = {0};
    const int64_t units = together ? hb_ceil_div(p->x_rows, p->int8_rows) : p->x_rows;
    const int64_t prepared_at = hb_scratch_reserve(&scratch, units * p->prepared_stride);
    const int64_t factor_at = hb_scratch_reserve(&scratch, p->x_rows * 4);
    const int64_t marks_at =
        has_threshold ? hb_scratch_reserve(&scratch, stride * (n_lanes + 1)) : 0;
    const int64_t columns_at = has_threshold ? hb_scratch_reserve(&scratch, p->depth * 8) : 0;
    p->row_at = 0;
    p->codes_at = p->c != NULL || p->x.col_stride == 1 ? 0 : hb_round_up(p->depth * 4, 64);
    const int64_t codes = p->depth * (p->c == NULL && p->pairs ? p->int8_rows : 1);
    p->panel_at = p->codes_at + hb_round_up(codes, 64);
    p->sums_at = p->panel_at;
    if (p->pairs)
        p->sums_at += hb_int8_pair_bytes(hb_least(p->depth, HB_INT8_PAIR_STEPS), HB_INT8_PAIR_W);
    p->extra_at = p->sums_at + (p->c != NULL ? 0 : p->sums_rows * HB_PRODUCT8_BLOCK * 4);
    p->lane_bytes = p->extra_at;
    const int64_t lanes_at = hb_scratch_reserve(&scratch, n_lanes * p->lane_bytes);

    _Alignas(64) unsigned char stack[HB_PRODUCT8_STACK_BYTES];
    unsigned char *memory;
    HB_TRY(hb_scratch_open(&scratch, p->context->scratch, stack, sizeof stack, function, &memory,
                           error));
    p->prepared = memory + prepared_at;
    p->x_factor = (float *)(memory + factor_at);
    p->marks = memory + marks_at;
    p->columns = (int64_t *)(memory + columns_at);
    p->lanes = memory + lanes_at;
    if (has_threshold) find_outliers(p, n_lanes, serial || few);
    if (p->pairs)
        hb_product8_run_chunks(p, serial || few, units, quantize_tiles);
    else
        hb_product8_run_chunks(p, serial || few, p->x_rows, quantize_rows);

    hb_status status = HB_OK;
    if (p->n_columns > 0) { // how much is known only now
        const int64_t n_tiles = hb_ceil_div(p->x_rows, p->group) * outlier_tiles(p);
        p->outliers_stride = hb_round_up(
            set->tile_rows * set->element_bytes * hb_round_up(p->n_columns, set->x_block), 64);
        const int64_t gathered = set->tile_rows * p->n_columns;
        const int64_t work = (p->group + set->tile_rows + p->n_columns) * HB_PRODUCT8_BLOCK;
        p->lane_bytes = hb_round_up(p->extra_at + 4 * (gathered > work ? gathered : work), 64);
        const int64_t outliers_at = hb_scratch_reserve(&more, n_tiles * p->outliers_stride);
        const int64_t more_at = hb_scratch_reserve(&more, n_lanes * p->lane_bytes);
        status = hb_scratch_open(&more, p->context->scratch, NULL, 0, function, &memory, error);
        if (status == HB_OK) {
            p->outliers = memory + outliers_at;
            p->lanes = memory + more_at;
            hb_product8_run_chunks(p, serial || few, n_tiles, pack_outliers);
        }
    }
    if (status == HB_OK)
        hb_product8_run_chunks(p, serial, hb_ceil_div(p->outputs, HB_PRODUCT8_BLOCK) * p->x_chunks,
                               int8_chunks);
    hb_scratch_close(&more);
    hb_scratch_close(&scratch);
    return status;
}
