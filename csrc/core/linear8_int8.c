// Products of x and a row-wise int8 W that are int8 on both sides, with outlier columns of x apart.
// See linear8.h.
#include "core/linear8.h"
#include "core/scratch.h"

static void mark_outliers(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product8 *p = arg;
    uint8_t *marks = p->marks + (lane + 1) * hb_round_up(p->depth, 64);
    void *row = p->lanes + lane * p->lane_bytes + p->row_at;
    const hb_dtype io = p->x.view->dtype;
    int64_t stride;
    for (int64_t m = begin; m < end; m++)
        p->kernels->codec.outliers_int8[io](hb_matrix_rows(&p->x, m, 1, row, &stride), p->depth,
                                            p->threshold, marks);
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
    const hb_kernels_linear8 *k = &p->kernels->linear8;
    if (p->tiles)
        k->prepare_tile(codes, p->depth, (int)(m % p->int8_rows),
                        p->prepared + m / p->int8_rows * p->prepared_stride);
    else
        k->prepare_int8(codes, p->depth, p->prepared + m * p->prepared_stride);
}

static void quantize_rows(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product8 *p = arg;
    const hb_kernels_codec *codec = &p->kernels->codec;
    unsigned char *scratch = p->lanes + lane * p->lane_bytes;
    int8_t *codes = (int8_t *)(scratch + p->codes_at);
    for (int64_t m = begin; m < end; m++) {
        if (p->a != NULL) {
            prepare_row(p, m, p->a + m * p->depth);
            continue;
        }
        int64_t stride;
        const void *row = hb_matrix_rows(&p->x, m, 1, scratch + p->row_at, &stride);
        const hb_dtype io = p->x.view->dtype;
        const uint8_t *zero = p->n_columns > 0 && p->x_rows > 1 ? p->marks : NULL;
        float absmax = codec->absmax_int8[io](row, p->depth, p->threshold);
        codec->encode_int8[io](row, p->depth, absmax, p->threshold, zero, codes);
        p->x_factor[m] = absmax * HB_INT8_UNIT;
        prepare_row(p, m, codes);
    }
}

// Tiles of outliers in a group.
static int64_t outlier_tiles(const hb_product8 *p)
{
    return hb_ceil_div(p->group, p->kernels->linear4.f32.tile_rows);
}

// Outlier columns of tile t of x, as the float32 tile takes them. The columns are gathered into the
// lane's room for sums, which is not in use yet.
static void pack_outliers(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product8 *p = arg;
    const hb_linear4_set *set = &p->kernels->linear4.f32;
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
    const int64_t cols = p->kernels->linear4.f32.tile_cols;
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
    const hb_linear4_set *set = &p->kernels->linear4.f32;
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

// Rows [m, m + n_x) of x by rows [out, out + n_out) of W, integers and what follows.
static void multiply_rows(const hb_product8 *p, int64_t m, int n_x, int64_t out, int64_t n_out,
                          const float *factors, const float *extra, unsigned char *scratch)
{
    const hb_kernels_linear8 *k = &p->kernels->linear8;
    int32_t *c = (int32_t *)(scratch + p->sums_at);
    float *sums = (float *)(c + p->int8_rows * HB_PRODUCT8_BLOCK);
    const int8_t *w = p->codes + out * p->depth;
    for (int first = 0; first < n_x; first += (int)p->int8_rows) {
        const int n = (int)hb_least(p->int8_rows, n_x - first);
        const int64_t unit = p->tiles ? (m + first) / p->int8_rows : m + first;
        int32_t *target = p->c != NULL ? p->c + (m + first) * p->rows + out : c;
        (p->tiles ? k->tile_int8 : k->dot_int8)(w, p->depth, n_out, p->depth,
                                                p->prepared + unit * p->prepared_stride, n, target,
                                                p->c != NULL ? p->rows : HB_PRODUCT8_BLOCK);
        if (p->c != NULL) continue;
        for (int t = 0; t < n; t++) {
            k->rescale(c + t * HB_PRODUCT8_BLOCK, p->x_factor[m + first + t],
                       extra != NULL ? extra + (first + t) * HB_PRODUCT8_BLOCK : NULL, factors,
                       n_out, sums);
            hb_product8_store(p, m + first + t, out, n_out, sums);
        }
    }
}

static void int8_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product8 *p = arg;
    unsigned char *scratch = p->lanes + lane * p->lane_bytes;
    const int64_t tile_rows = p->kernels->linear4.f32.tile_rows;
    float *extra = (float *)(scratch + p->extra_at);
    float *tile_sums = extra + p->group * HB_PRODUCT8_BLOCK;
    float *panels = tile_sums + tile_rows * HB_PRODUCT8_BLOCK;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t out = chunk / p->x_chunks * HB_PRODUCT8_BLOCK;
        const int64_t n_out = hb_least(HB_PRODUCT8_BLOCK, p->outputs - out);
        const int64_t m_begin = chunk % p->x_chunks * p->x_per_chunk;
        const int64_t m_end = hb_least(m_begin + p->x_per_chunk, p->x_rows);
        float factors[HB_PRODUCT8_BLOCK];
        for (int64_t r = 0; r < n_out && p->c == NULL; r++)
            factors[r] = p->scale[out + r] * HB_INT8_UNIT;
        if (p->n_columns == 0) {
            for (int64_t m = m_begin; m < m_end; m += p->int8_rows)
                multiply_rows(p, m, (int)hb_least(p->int8_rows, m_end - m), out, n_out, factors,
                              NULL, scratch);
            continue;
        }
        decode_outliers(p, out, n_out, panels);
        for (int64_t m = m_begin; m < m_end; m += p->group) { // x_per_chunk is a multiple
            const int n_x = (int)hb_least(p->group, m_end - m);
            for (int64_t i = 0; i < n_x; i += tile_rows)
                multiply_outliers(p, m / p->group * outlier_tiles(p) + i / tile_rows,
                                  (int)hb_least(tile_rows, n_x - i), n_out, panels, tile_sums,
                                  extra + i * HB_PRODUCT8_BLOCK);
            multiply_rows(p, m, n_x, out, n_out, factors, extra, scratch);
        }
    }
}

hb_status hb_product8_int8(hb_product8 *p, const char *function, hb_error *error)
{
    const hb_kernels_linear8 *k = &p->kernels->linear8;
    const hb_linear4_set *set = &p->kernels->linear4.f32;
    const int n_lanes = p->n_lanes = hb_product8_lanes(p);
    const bool serial = n_lanes == 1;
    const bool few = p->x_rows * p->depth < 1 << 16;
    const bool has_threshold = p->threshold == p->threshold;
    const int64_t stride = hb_round_up(p->depth, 64);
    p->tiles = k->tile_int8 != NULL && p->x_rows >= k->tile_int8_from;
    p->int8_rows = p->tiles ? k->tile_int8_rows : k->dot_int8_rows;
    p->group = p->tiles || !has_threshold ? p->int8_rows : set->tile_rows;
    p->prepared_stride = p->tiles ? hb_int8_tile_bytes(p->depth, k->tile_int8_rows)
                                  : hb_int8_prepared_bytes(p->depth, k->prepared_bytes);
    hb_product8_plan_grid(p, p->group, INT64_MAX);

    hb_scratch scratch = {0}, more = {0};
    const int64_t units = p->tiles ? hb_ceil_div(p->x_rows, p->int8_rows) : p->x_rows;
    const int64_t prepared_at = hb_scratch_reserve(&scratch, units * p->prepared_stride);
    const int64_t factor_at = hb_scratch_reserve(&scratch, p->x_rows * 4);
    const int64_t marks_at =
        has_threshold ? hb_scratch_reserve(&scratch, stride * (n_lanes + 1)) : 0;
    const int64_t columns_at = has_threshold ? hb_scratch_reserve(&scratch, p->depth * 8) : 0;
    p->row_at = 0;
    p->codes_at = p->c != NULL || p->x.col_stride == 1 ? 0 : hb_round_up(p->depth * 4, 64);
    p->sums_at = p->codes_at + stride;
    p->extra_at = p->sums_at + (p->int8_rows + 1) * HB_PRODUCT8_BLOCK * 4;
    p->lane_bytes = p->extra_at;
    const int64_t lanes_at = hb_scratch_reserve(&scratch, n_lanes * p->lane_bytes);

    _Alignas(64) unsigned char stack[HB_PRODUCT8_STACK_BYTES];
    unsigned char *memory;
    HB_TRY(hb_scratch_open(&scratch, stack, sizeof stack, function, &memory, error));
    p->prepared = memory + prepared_at;
    p->x_factor = (float *)(memory + factor_at);
    p->marks = memory + marks_at;
    p->columns = (int64_t *)(memory + columns_at);
    p->lanes = memory + lanes_at;
    if (has_threshold) find_outliers(p, n_lanes, serial || few);
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
        status = hb_scratch_open(&more, NULL, 0, function, &memory, error);
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
