// 4-bit products of many rows of x: panels of decoded weights, which a register tile multiplies.
#include "core/linear4.h"

static unsigned char *shared_panel(const hb_product4 *p, int64_t out, int64_t step)
{
    const hb_linear4_set *set = p->set;
    return p->shared + out / set->tile_cols * p->shared_stride + hb_linear4_panel_bytes(set, step);
}

// Forward: one panel, all steps. Backward: HB_LINEAR4_SHARED_STEPS steps of all panels, so that
// scales and cache lines of a row are used up at once.
static void decode_shared(const hb_product4 *p, int64_t chunk, float *scales)
{
    const hb_linear4_set *set = p->set;
    if (p->backward) {
        int64_t step = chunk * HB_LINEAR4_SHARED_STEPS,
                n_steps = hb_least(HB_LINEAR4_SHARED_STEPS, p->steps - step);
        if (p->expand) hb_product4_expand_scales(p, step, n_steps, scales);
        for (int64_t out = 0; out < p->outputs; out += set->tile_cols)
            hb_product4_decode_panel(p, out, hb_least(set->tile_cols, p->outputs - out), step,
                                     n_steps, scales, step, shared_panel(p, out, step));
        return;
    }
    int64_t out = chunk * set->tile_cols, n_out = hb_least(set->tile_cols, p->outputs - out);
    if (p->expand) hb_product4_expand_scales(p, out, n_out, scales);
    for (int64_t step = 0; step < p->steps; step += set->panel_steps)
        hb_product4_decode_panel(p, out, n_out, step, hb_least(set->panel_steps, p->steps - step),
                                 scales, 0, shared_panel(p, out, step));
}

int64_t hb_product4_shared_chunks(const hb_product4 *p)
{
    if (p->m_begin > 0) return 0;
    return p->backward ? hb_ceil_div(p->steps, HB_LINEAR4_SHARED_STEPS)
                       : hb_ceil_div(p->outputs, p->set->tile_cols);
}

// Rows of y of tile t of x, from its sums.
static void store_tile(const hb_product4 *p, int64_t out, int64_t n_out, int64_t t,
                       const float *sums)
{
    const hb_linear4_set *set = p->set;
    const int64_t cols = set->tile_cols, m_begin = t * set->tile_rows;
    const int64_t m_end = hb_least(m_begin + set->tile_rows, p->m_count);
    for (int64_t m = m_begin; m < m_end; m++, sums += cols) {
        const float *row = sums;
        _Alignas(64) float natural[HB_LINEAR4_MAX_TILE_COLS];
        if (p->rounded != NULL) {
            const float unscale = p->rounded->step * 0x1p7f;
            for (int64_t c = 0; c < cols; c++) natural[c] = row[c] * unscale;
            row = natural;
        }
        if (p->backward && !set->columns_in_order) {
            for (int64_t c = 0; c < cols; c++) natural[set->column_order[c]] = row[c];
            row = natural;
        }
        hb_product4_store(p, p->m_begin + m, out, n_out, row);
    }
}

// Codes and scales of a panel to be decoded, row by row of W; brought into the L2 cache bit by bit,
// because decoding waits for them longer than it computes.
typedef struct {
    const char *codes, *scales; // of the first row; NULL: no scales of W's own, or no panel
    int64_t code_stride, scale_stride, code_bytes; // bytes from row to row, and of a row
    int64_t row, n_rows;                           // the next to bring, and how many there are
} upcoming;

static upcoming panel_to_come(const hb_product4 *p, int64_t out, int64_t step)
{
    const hb_linear4_set *set = p->set;
    if (p->share || p->blocksize == 0 || out >= p->outputs) return (upcoming){0};
    const int64_t n_out = hb_least(set->tile_cols, p->outputs - out);
    const int64_t n_steps = hb_least(set->panel_steps, p->steps - step);
    const int64_t depth = p->w->depth;
    const int64_t first = p->backward ? step * depth + out : out * depth + step;
    return (upcoming){
        .codes = (const char *)(p->w->packed + first / 2),
        .scales = p->expand ? NULL : (const char *)(p->w->absmax + first / p->blocksize),
        .code_stride = depth / 2,
        .scale_stride = depth / p->blocksize * (int64_t)sizeof(float),
        .code_bytes = (p->backward ? n_out : n_steps) / 2,
        .n_rows = p->backward ? n_steps : n_out,
    };
}

static void prefetch_rows(upcoming *panel, int64_t n)
{
    const int64_t end = hb_least(panel->row + n, panel->n_rows);
    for (; panel->row < end; panel->row++) {
        const char *codes = panel->codes + panel->row * panel->code_stride;
        for (int64_t i = 0; i < panel->code_bytes; i += 64) __builtin_prefetch(codes + i, 0, 2);
        if (panel->scales != NULL)
            __builtin_prefetch(panel->scales + panel->row * panel->scale_stride, 0, 2);
    }
}

// A panel of outputs [out, ..) and its steps [step, ..), times tiles of x.
static void multiply_panel(const hb_product4 *p, int64_t out, int64_t step, int64_t tile_begin,
                           int64_t tile_end, const unsigned char *panel, upcoming next, float *sums)
{
    const hb_linear4_set *set = p->set;
    const int64_t n_out = hb_least(set->tile_cols, p->outputs - out);
    const int64_t n_steps = hb_least(set->panel_steps, p->steps - step);
    const int64_t rows_a_tile = hb_ceil_div(next.n_rows, tile_end - tile_begin);
    if (set->begin != NULL) set->begin();
    for (int64_t t = tile_begin; t < tile_end; t++, sums += set->tile_rows * set->tile_cols) {
        const int n_x = (int)hb_least(set->tile_rows, p->m_count - t * set->tile_rows);
        const unsigned char *packed =
            p->packed + t * p->packed_stride + hb_linear4_tile_bytes(set, step);
        prefetch_rows(&next, rows_a_tile);
        set->tile(packed, panel, n_steps, n_x, step > 0, sums);
        // At once, while the sums are in L1: the lines of y are far apart and seldom in a cache,
        // and the next tile takes long enough to wait for them.
        if (step + n_steps == p->steps) store_tile(p, out, n_out, t, sums);
    }
    if (set->end != NULL) set->end();
}

// A group of outputs: all its panels of some steps before the next steps, so that these steps of x
// come from the L2 cache after the first panel, whatever all of x takes.
static void multiply_group(const hb_product4 *p, int64_t out_begin, int64_t out_end,
                           int64_t tile_begin, int64_t tile_end, unsigned char *scratch)
{
    const hb_linear4_set *set = p->set;
    const int64_t cols = set->tile_cols;
    const int64_t group_sums = (tile_end - tile_begin) * set->tile_rows * cols;
    float *const all_sums = (float *)(scratch + p->sums_at);
    float *scales = p->all_scales != NULL ? p->all_scales : (float *)(scratch + p->scales_at);
    // Forward, expanded scales have a row for each output.
    const bool own_scales = !p->share && p->expand && !p->backward && p->blocksize > 0;
    const int64_t scales_stride = own_scales ? p->w->depth / p->blocksize : 0;

    if (own_scales) hb_product4_expand_scales(p, out_begin, out_end - out_begin, scales);
    if (p->steps == 0) {
        memset(all_sums, 0, (size_t)(set->tile_rows * cols) * sizeof(float));
        for (int64_t out = out_begin; out < out_end; out += cols)
            for (int64_t t = tile_begin; t < tile_end; t++)
                store_tile(p, out, hb_least(cols, p->outputs - out), t, all_sums);
    }
    for (int64_t step = 0; step < p->steps; step += set->panel_steps) {
        const int64_t n_steps = hb_least(set->panel_steps, p->steps - step);
        float *sums = all_sums;
        for (int64_t out = out_begin; out < out_end; out += cols, sums += group_sums) {
            const unsigned char *panel = scratch;
            if (p->share)
                panel = shared_panel(p, out, step);
            else
                hb_product4_decode_panel(p, out, hb_least(cols, p->outputs - out), step, n_steps,
                                         scales + (out - out_begin) * scales_stride, 0, scratch);
            const upcoming next = out + cols < out_end ? panel_to_come(p, out + cols, step)
                                  : step + n_steps < p->steps
                                      ? panel_to_come(p, out_begin, step + n_steps)
                                      : panel_to_come(p, out_end, 0);
            multiply_panel(p, out, step, tile_begin, tile_end, panel, next, sums);
        }
    }
}

void hb_product4_panel_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product4 *p = arg;
    unsigned char *scratch = p->lanes + lane * p->lane_bytes;
    int64_t n_tiles = hb_ceil_div(p->m_count, p->set->tile_rows);
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int64_t out_begin = chunk / p->m_chunks * p->group;
        int64_t out_end = hb_least(out_begin + p->group, p->outputs);
        int64_t tile_begin = chunk % p->m_chunks * p->tiles_per_chunk;
        int64_t tile_end = hb_least(tile_begin + p->tiles_per_chunk, n_tiles);
        if (tile_begin >= tile_end) continue; // a shorter last pass
        multiply_group(p, out_begin, out_end, tile_begin, tile_end, scratch);
    }
}

void hb_product4_pack_tiles(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product4 *p = arg;
    const int64_t bytes = (int64_t)hb_dtype_bytes(p->x.view->dtype);
    (void)lane;
    for (int64_t t = begin; t < end; t++) {
        const int64_t m = t * p->set->tile_rows;
        const int n_x = (int)hb_least(p->set->tile_rows, p->m_count - m);
        unsigned char *target = p->gathered == NULL ? NULL : p->gathered + m * p->steps * bytes;
        int64_t stride;
        const void *rows = hb_matrix_rows(&p->x, p->m_begin + m, n_x, target, &stride);
        p->set->pack_x(rows, p->x.view->dtype, stride, n_x, p->steps,
                       p->packed + t * p->packed_stride);
    }
}

void hb_product4_prepare_shared(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product4 *p = arg;
    float *scales = (float *)(p->lanes + lane * p->lane_bytes + p->scales_at);
    const int64_t n_decode = hb_product4_shared_chunks(p);
    for (int64_t c = begin; c < hb_least(end, n_decode); c++) decode_shared(p, c, scales);
    if (end > n_decode)
        hb_product4_pack_tiles(arg, hb_most(begin, n_decode) - n_decode, end - n_decode, lane);
}

void hb_product4_expand_all_scales(void *arg, int64_t begin, int64_t end, int lane)
{
    const hb_product4 *p = arg;
    (void)lane;
    const int64_t row = begin * HB_LINEAR4_SHARED_STEPS,
                  row_end = hb_least(end * HB_LINEAR4_SHARED_STEPS, p->steps);
    hb_product4_expand_scales(p, row, row_end - row,
                              p->all_scales + row * (p->outputs / p->blocksize));
}
