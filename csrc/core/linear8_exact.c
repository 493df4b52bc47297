// Products of float32 x with a row-wise int8 W, forward and backward. See linear8.h.
#include "core/linear8.h"

enum { PASS_ROWS = 240 }; // rows of x whose panel sums a lane keeps

// out[i] = sums[i] * factor of output begin + i.
static void scale_sums(const hb_product8 *p, int64_t begin, int64_t n, const float *sums,
                       float *out)
{
    for (int64_t i = 0; i < n; i++) out[i] = sums[i] * (p->scale[begin + i] * HB_INT8_UNIT);
}

// ---- few rows ---------------------------------------------------------------------------------

static void dot_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product8 *p = arg;
    const hb_kernels_linear8 *k = &p->context->kernels.linear8;
    (void)lane;
    _Alignas(64) float sums[HB_PRODUCT8_DOT_UNTIL * HB_PRODUCT8_BLOCK];
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t out = chunk * HB_PRODUCT8_BLOCK,
                      n_out = hb_least(HB_PRODUCT8_BLOCK, p->outputs - out);
        for (int64_t m = 0; m < p->x_rows; m += k->dot_f32_rows) {
            const int n_x = (int)hb_least(k->dot_f32_rows, p->x_rows - m);
            k->dot_f32(p->codes + out * p->depth, p->depth, n_out, p->depth,
                       (const float *)(p->prepared + m * p->prepared_stride),
                       p->prepared_stride / 4, n_x, sums, HB_PRODUCT8_BLOCK);
            for (int t = 0; t < n_x; t++) {
                scale_sums(p, out, n_out, sums + t * HB_PRODUCT8_BLOCK,
                           sums + t * HB_PRODUCT8_BLOCK);
                hb_product8_store(p, m + t, out, n_out, sums + t * HB_PRODUCT8_BLOCK);
            }
        }
    }
}

hb_status hb_product8_dot(hb_product8 *p, const char *function, hb_error *error)
{
    p->n_lanes = hb_product8_lanes(p);
    p->prepared_stride = hb_round_up(p->depth * 4, 64);
    p->x_chunks = 1;
    hb_scratch scratch = {0};
    (void)hb_scratch_reserve(&scratch, p->x_rows * p->prepared_stride);
    _Alignas(64) unsigned char stack[HB_PRODUCT8_STACK_BYTES];
    HB_TRY(hb_scratch_open(&scratch, p->context->scratch, stack, sizeof stack, function,
                           &p->prepared, error));
    for (int64_t m = 0; m < p->x_rows; m++) {
        float *row = (float *)(p->prepared + m * p->prepared_stride);
        const int64_t offset = hb_matrix_row_offset(&p->x, m);
        for (int64_t i = 0; i < p->depth; i++)
            row[i] = hb_load_f32(p->x.view->data, offset + i * p->x.col_stride, p->x.view->dtype);
    }
    hb_product8_run_chunks(p, p->n_lanes == 1, hb_ceil_div(p->outputs, HB_PRODUCT8_BLOCK),
                           dot_chunks);
    hb_scratch_close(&scratch);
    return HB_OK;
}

// ---- many rows --------------------------------------------------------------------------------

static void pack_tiles(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product8 *p = arg;
    const hb_linear4_set *set = &p->context->kernels.linear4.f32;
    unsigned char *gathered = p->lanes + lane * p->lane_bytes;
    for (int64_t t = begin; t < end; t++) {
        const int64_t m = p->x_begin + t * set->tile_rows;
        const int n_x = (int)hb_least(set->tile_rows, p->x_begin + p->pass_rows - m);
        int64_t stride;
        const void *rows = hb_matrix_rows(&p->x, m, n_x, gathered, &stride);
        set->pack_x(rows, p->x.view->dtype, stride, n_x, p->x.cols,
                    p->prepared + t * p->prepared_stride);
    }
}

// The panel of outputs [out, out + n_out) over inner indices [step, step + n_steps).
static void decode_panel(const hb_product8 *p, int64_t out, int64_t n_out, int64_t step,
                         int64_t n_steps, float *factors, float *panel)
{
    const int cols = p->context->kernels.linear4.f32.tile_cols;
    if (!p->backward) {
        p->context->kernels.linear8.decode_rows(p->codes + out * p->depth + step, p->depth, n_out,
                                                n_steps, cols, panel);
        return;
    }
    for (int64_t r = 0; r < n_steps; r++) factors[r] = p->scale[step + r] * HB_INT8_UNIT;
    p->context->kernels.linear8.decode_cols(p->codes + step * p->depth + out, p->depth, factors,
                                            n_steps, n_out, cols, panel);
}

static void multiply_panels(const hb_product8 *p, int64_t out, int64_t tile_begin, int64_t tile_end,
                            int64_t m_end, unsigned char *scratch)
{
    const hb_linear4_set *set = &p->context->kernels.linear4.f32;
    const int64_t cols = set->tile_cols, n_out = hb_least(cols, p->outputs - out);
    const int64_t tile_sums = set->tile_rows * cols;
    float *panel = (float *)scratch;
    float *factors = panel + set->panel_steps * cols;
    float *sums = (float *)(scratch + p->sums_at);
    if (p->x.cols == 0)
        memset(sums, 0, (size_t)((tile_end - tile_begin) * tile_sums) * sizeof(float));
    for (int64_t step = 0; step < p->x.cols; step += set->panel_steps) {
        const int64_t n_steps = hb_least(set->panel_steps, p->x.cols - step);
        decode_panel(p, out, n_out, step, n_steps, factors, panel);
        for (int64_t t = tile_begin; t < tile_end; t++) {
            const int n_x = (int)hb_least(set->tile_rows, m_end - t * set->tile_rows);
            set->tile(p->prepared + t * p->prepared_stride +
                          step * set->tile_rows * set->element_bytes,
                      panel, n_steps, n_x, step > 0, sums + (t - tile_begin) * tile_sums);
        }
    }
    for (int64_t m = tile_begin * set->tile_rows; m < hb_least(tile_end * set->tile_rows, m_end);
         m++) {
        float *row = sums + (m - tile_begin * set->tile_rows) * cols;
        if (!p->backward) scale_sums(p, out, n_out, row, row);
        hb_product8_store(p, p->x_begin + m, out, n_out, row);
    }
}

static void panel_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product8 *p = arg;
    const int64_t cols = p->context->kernels.linear4.f32.tile_cols;
    const int64_t tile_rows = p->context->kernels.linear4.f32.tile_rows;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t out_begin = chunk / p->x_chunks * HB_PRODUCT8_BLOCK;
        const int64_t out_end = hb_least(out_begin + HB_PRODUCT8_BLOCK, p->outputs);
        const int64_t m_begin = chunk % p->x_chunks * p->x_per_chunk;
        const int64_t m_end = hb_least(m_begin + p->x_per_chunk, p->pass_rows);
        for (int64_t out = out_begin; out < out_end; out += cols)
            multiply_panels(p, out, m_begin / tile_rows, hb_ceil_div(m_end, tile_rows), m_end,
                            p->lanes + lane * p->lane_bytes);
    }
}

hb_status hb_product8_panels(hb_product8 *p, const char *function, hb_error *error)
{
    const hb_linear4_set *set = &p->context->kernels.linear4.f32;
    const int n_lanes = p->n_lanes = hb_product8_lanes(p);
    const int64_t item = (int64_t)hb_dtype_bytes(p->x.view->dtype), all_rows = p->x_rows;
    const int64_t pass_rows = hb_least(PASS_ROWS / set->tile_rows * set->tile_rows, all_rows);
    p->prepared_stride =
        hb_round_up(set->tile_rows * set->element_bytes * hb_round_up(p->x.cols, set->x_block), 64);
    p->x_rows = pass_rows;
    hb_product8_plan_grid(p, set->tile_rows, pass_rows);
    p->x_rows = all_rows;

    int64_t stride;
    const bool gather = !hb_matrix_rows_are_regular(&p->x, 0, all_rows, &stride);
    hb_scratch scratch = {0};
    (void)hb_scratch_reserve(&scratch, hb_ceil_div(pass_rows, set->tile_rows) * p->prepared_stride);
    p->sums_at = hb_round_up((set->panel_steps * (set->tile_cols + 1)) * 4, 64);
    p->lane_bytes = p->sums_at + hb_round_up(p->x_per_chunk, set->tile_rows) * set->tile_cols * 4;
    if (gather && p->lane_bytes < set->tile_rows * p->x.cols * item)
        p->lane_bytes = set->tile_rows * p->x.cols * item;
    p->lane_bytes = hb_round_up(p->lane_bytes, 64);
    const int64_t lanes_at = hb_scratch_reserve(&scratch, n_lanes * p->lane_bytes);

    _Alignas(64) unsigned char stack[HB_PRODUCT8_STACK_BYTES];
    HB_TRY(hb_scratch_open(&scratch, p->context->scratch, stack, sizeof stack, function,
                           &p->prepared, error));
    p->lanes = p->prepared + lanes_at;
    for (p->x_begin = 0; p->x_begin < all_rows; p->x_begin += pass_rows) {
        const int64_t n = p->pass_rows = hb_least(pass_rows, all_rows - p->x_begin);
        const bool few = n * p->x.cols < 1 << 16;
        p->x_chunks = hb_ceil_div(n, p->x_per_chunk);
        hb_product8_run_chunks(p, n_lanes == 1 || few, hb_ceil_div(n, set->tile_rows), pack_tiles);
        hb_product8_run_chunks(p, n_lanes == 1,
                               hb_ceil_div(p->outputs, HB_PRODUCT8_BLOCK) * p->x_chunks,
                               panel_chunks);
    }
    hb_scratch_close(&scratch);
    return HB_OK;
}
