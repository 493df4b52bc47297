// y = x W^T + b and dx = dy W, W in 4 bits straight from the bitsandbytes layout.
//
// Both are one product: sums[m, o] = sum_s x[m, s] * weight(o, s), with outputs o the rows of W and
// steps s its columns (forward), or the reverse (backward). Rows of x are taken in passes that keep
// packed x within PACKED_BYTES; within a pass the outputs are split over the pool and every lane
// has its own panel, sums and scales in one allocation made per call. The sum over s is never split
// and its order is fixed by the panel size: results do not depend on the number of threads.
//
// Where W has too few outputs to give every lane panels of its own, all panels are decoded once,
// by all lanes, beside the packing of x, and the multiplications share them ("shared" below).
//
// A block of W that straddles rows still has one scale on every run of gcd(depth, blocksize)
// columns: with at least 32 of them W is read as if quantized with that block size, its scales
// copied out per range of rows (as nested scales are). Otherwise (depth no multiple of 32) elements
// are decoded one by one into the same panels.
#include "core/matrix.h"
#include "core/ops.h"
#include "core/ops_cuda.h"

#include <inttypes.h>
#include <stdlib.h>

enum {
    PACKED_BYTES = 8 << 20, // most that packed x takes, if one tile fits
    PASS_ROW_BYTES = 1024,  // of a column of x in a pass: 512 rows of bfloat16, 256 of float32
    PASS_BYTES = 512 << 10, // or more, while their packed form has this size: half an L2 cache
    SHARED_BYTES = 4 << 20, // most that shared panels take
    SHARED_STEPS = 32,      // rows of W that a chunk decodes for backward panels; even
    STACK_BYTES = 8 << 10,  // scratch up to this size is not allocated
    SERIAL_BYTES = 1 << 19, // work (bytes of weights, weighted with rows of x) worth a thread
    DOT_CHUNK_ROWS = 64,    // rows of W per chunk of the dot regime
    DOT_SCALE_ROWS = 16,    // of which so many have their scales expanded at a time
    MIN_BLOCKSIZE = 32,     // what kernels take
    INT_BLOCKSIZE = 64,     // what the integer sets' panels take, and their unit of steps
};

typedef struct {
    hb_context *context;
    const hb_linear4_set *set;
    const hb_tensor4 *w;
    bool backward, bf16;
    const hb_codebook_int *rounded; // integer sets
    int64_t blocksize; // that kernels see: power of two >= 32 dividing depth; 0: element by element
    bool expand;       // scales are copied out (nested, or blocks straddle rows)
    hb_matrix x, y;
    int64_t steps, outputs;
    const float *bias; // [outputs] or NULL
    bool y_regular;    // rows of y are y_stride elements apart
    int64_t y_stride;

    int64_t m_begin, m_count; // rows of x in this pass
    int64_t tiles_per_chunk;  // panel regime: tiles of x that one chunk multiplies
    int64_t m_chunks;

    unsigned char *packed;   // x of this pass, permuted or in tiles
    int64_t packed_stride;   // bytes from one row (dot) or tile (panel) to the next
    unsigned char *gathered; // x of this pass, contiguous rows, when x has strides
    unsigned char *shared;   // panels of all outputs, [outputs / tile_cols][steps], or NULL
    int64_t shared_stride;   // bytes from one of them to the next
    float *all_scales;       // backward, expanded, not shared: [rows of W][depth / blocksize]
    unsigned char *lanes;
    int n_lanes;
    int64_t lane_bytes, sums_at, scales_at; // in a lane: panel, sums, scales

    _Alignas(64) float codebook[16];
} product;

static int64_t round_up(int64_t n, int64_t multiple)
{
    return hb_ceil_div(n, multiple) * multiple;
}

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

// Bytes of `steps` steps of a tile of x, and of a panel: also the offset of the step behind them.
static int64_t tile_bytes(const hb_linear4_set *set, int64_t steps)
{
    if (set->x_extra == 0)
        return round_up(steps, set->x_block) * set->tile_rows * set->element_bytes;
    return hb_ceil_div(steps, INT_BLOCKSIZE) * set->tile_rows *
           (INT_BLOCKSIZE * set->element_bytes + set->x_extra);
}

static int64_t panel_bytes(const hb_linear4_set *set, int64_t steps)
{
    if (set->panel_extra == 0)
        return round_up(steps, set->pair) * set->tile_cols * set->element_bytes;
    return hb_ceil_div(steps, INT_BLOCKSIZE) * set->tile_cols *
           (INT_BLOCKSIZE * set->element_bytes + set->panel_extra);
}

// ---- weights ----------------------------------------------------------------------------------

// Scales of columns [column, column + n * blocksize) of one row, one per `blocksize` columns.
static void expand_row_scales(const product *p, int64_t row, int64_t column, int64_t n,
                              float *scales)
{
    const hb_tensor4 *w = p->w;
    int64_t start = row * w->depth + column;
    int64_t first = start / w->blocksize;
    int64_t last = (start + (n - 1) * p->blocksize) / w->blocksize;
    hb_expand_absmax(p->context, w, first, last - first + 1, scales);
    if (p->blocksize == w->blocksize) return;
    // Copied within the same array, from the end: a scale's source never lies behind its place.
    for (int64_t i = n - 1; i >= 0; i--)
        scales[i] = scales[(start + i * p->blocksize) / w->blocksize - first];
}

// Scales of all columns of n_rows rows, [n_rows, depth / blocksize].
static void expand_scales(const product *p, int64_t row, int64_t n_rows, float *scales)
{
    const int64_t stride = p->w->depth / p->blocksize;
    if (p->blocksize == p->w->blocksize) { // rows follow one another in the stored scales too
        hb_expand_absmax(p->context, p->w, row * stride, n_rows * stride, scales);
        return;
    }
    for (int64_t r = 0; r < n_rows; r++)
        expand_row_scales(p, row + r, 0, stride, scales + r * stride);
}

// Rows [row, ..) and columns [column, ..) of W; scales (expanded, or NULL) begin at that row and at
// `scale_column`.
static hb_matrix4 block_of(const product *p, int64_t row, int64_t column, const float *scales,
                           int64_t scales_stride, int64_t scale_column)
{
    const hb_tensor4 *w = p->w;
    hb_matrix4 block = {
        .packed = w->packed + (row * w->depth + column) / 2,
        .row_bytes = w->depth / 2,
        .blocksize = p->blocksize,
        .codebook = p->codebook,
        .rounded = p->rounded,
    };
    if (p->expand) {
        block.absmax = scales + (column - scale_column) / p->blocksize;
        block.absmax_stride = scales_stride;
    } else {
        block.absmax = w->absmax + (row * w->depth + column) / w->blocksize;
        block.absmax_stride = w->depth / w->blocksize;
    }
    return block;
}

// Any depth: weights of n_rows x n_cols from (row, column) into a panel, one by one.
static void decode_elements(const product *p, int64_t row, int64_t n_rows, int64_t column,
                            int64_t n_cols, float *scales, unsigned char *panel)
{
    const hb_tensor4 *w = p->w;
    const hb_linear4_set *set = p->set;
    int64_t n_steps = round_up(p->backward ? n_rows : n_cols, set->pair);
    memset(panel, 0, (size_t)(n_steps * set->tile_cols * set->element_bytes));
    uint8_t place_of[HB_LINEAR4_MAX_TILE_COLS];
    for (int c = 0; c < set->tile_cols; c++) place_of[set->column_order[c]] = (uint8_t)c;
    for (int64_t r = 0; r < n_rows; r++) {
        int64_t start = (row + r) * w->depth + column;
        int64_t first_block = start / w->blocksize;
        int64_t last_block = (start + n_cols - 1) / w->blocksize;
        hb_expand_absmax(p->context, w, first_block, last_block - first_block + 1, scales);
        for (int64_t c = 0; c < n_cols; c++) {
            int64_t i = start + c;
            unsigned code = i % 2 == 0 ? w->packed[i / 2] >> 4 : w->packed[i / 2] & 15u;
            float value = p->codebook[code] * scales[i / w->blocksize - first_block];
            int64_t step = p->backward ? r : c;
            int64_t place = p->backward ? place_of[c] : r;
            int64_t at = (step / set->pair * set->tile_cols + place) * set->pair + step % set->pair;
            uint16_t half = hb_bf16_from_f32(value);
            if (set->element_bytes == 2)
                ((uint16_t *)panel)[at] = half;
            else
                ((float *)panel)[at] = p->bf16 ? hb_f32_from_bf16(half) : value;
        }
    }
}

// ---- results ----------------------------------------------------------------------------------

// Outputs [begin, begin + n), n <= 64, of row m of y, from sums in natural order.
static void store(const product *p, int64_t m, int64_t begin, int64_t n, const float *sums)
{
    const float *bias = p->bias != NULL ? p->bias + begin : NULL;
    const hb_kernels_linear4 *kernels = &p->context->kernels.linear4;
    if (p->y_regular)
        kernels->finish(sums, bias, n, p->y.view->dtype,
                        hb_matrix_element(&p->y, m * p->y_stride + begin));
    else
        hb_matrix_finish(kernels, &p->y, m, begin, n, sums, bias);
}

// ---- dot regime -------------------------------------------------------------------------------

static void dot_rows(const product *p, const hb_matrix4 *block, int64_t row, int64_t n_rows,
                     float *sums)
{
    const hb_linear4_set *set = p->set;
    for (int64_t m = 0; m < p->m_count; m += set->dot_rows) {
        int n_x = (int)least(set->dot_rows, p->m_count - m);
        set->dot(block, n_rows, p->steps, p->packed + m * p->packed_stride, n_x, sums,
                 DOT_CHUNK_ROWS);
        for (int t = 0; t < n_x; t++)
            store(p, p->m_begin + m + t, row, n_rows, sums + t * DOT_CHUNK_ROWS);
    }
}

static void dot_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    unsigned char *scratch = p->lanes + lane * p->lane_bytes;
    float *sums = (float *)(scratch + p->sums_at);
    float *scales = (float *)(scratch + p->scales_at);
    int64_t stride = p->blocksize > 0 ? p->steps / p->blocksize : 0;
    int64_t row_end = least(end * DOT_CHUNK_ROWS, p->outputs);
    int64_t at_once = p->expand ? DOT_SCALE_ROWS : DOT_CHUNK_ROWS;
    for (int64_t row = begin * DOT_CHUNK_ROWS; row < row_end; row += at_once) {
        int64_t n_rows = least(at_once, row_end - row);
        if (p->expand) expand_scales(p, row, n_rows, scales);
        hb_matrix4 block = block_of(p, row, 0, scales, stride, 0);
        dot_rows(p, &block, row, n_rows, sums);
    }
}

static void permute_rows(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    (void)lane;
    for (int64_t m = begin; m < end; m++) {
        const void *row =
            p->gathered != NULL
                ? p->gathered + m * p->steps * (int64_t)hb_dtype_bytes(p->x.view->dtype)
                : hb_matrix_element(&p->x, hb_matrix_row_offset(&p->x, p->m_begin + m));
        if (p->gathered != NULL)
            hb_matrix_gather_row(&p->x, p->m_begin + m, (void *)(uintptr_t)row);
        p->set->permute_x(row, p->x.view->dtype, p->steps, p->packed + m * p->packed_stride);
    }
}

// ---- panel regime -----------------------------------------------------------------------------

// The panel of outputs [out, out + n_out) and steps [step, step + n_steps). Forward: `scales` holds
// the expanded scales of these rows, all columns. Backward: those of rows from `scales_row` on, all
// columns. Where elements are decoded one by one it is scratch.
static void decode_panel(const product *p, int64_t out, int64_t n_out, int64_t step,
                         int64_t n_steps, float *scales, int64_t scales_row, unsigned char *panel)
{
    if (p->blocksize == 0) {
        if (p->backward)
            decode_elements(p, step, n_steps, out, n_out, scales, panel);
        else
            decode_elements(p, out, n_out, step, n_steps, scales, panel);
    } else if (p->backward) {
        int64_t stride = p->outputs / p->blocksize;
        hb_matrix4 block = block_of(
            p, step, out, p->expand ? scales + (step - scales_row) * stride : NULL, stride, 0);
        p->set->decode_cols(&block, n_steps, n_out, panel);
    } else {
        hb_matrix4 block = block_of(p, out, step, scales, p->steps / p->blocksize, 0);
        p->set->decode_rows(&block, n_out, n_steps, panel);
    }
}

static unsigned char *shared_panel(const product *p, int64_t out, int64_t step)
{
    const hb_linear4_set *set = p->set;
    return p->shared + out / set->tile_cols * p->shared_stride + panel_bytes(set, step);
}

// Forward: one panel, all steps. Backward: SHARED_STEPS steps of all panels, so that scales and
// cache lines of a row are used up at once.
static void decode_shared(const product *p, int64_t chunk, float *scales)
{
    const hb_linear4_set *set = p->set;
    if (p->backward) {
        int64_t step = chunk * SHARED_STEPS, n_steps = least(SHARED_STEPS, p->steps - step);
        if (p->expand) expand_scales(p, step, n_steps, scales);
        for (int64_t out = 0; out < p->outputs; out += set->tile_cols)
            decode_panel(p, out, least(set->tile_cols, p->outputs - out), step, n_steps, scales,
                         step, shared_panel(p, out, step));
        return;
    }
    int64_t out = chunk * set->tile_cols, n_out = least(set->tile_cols, p->outputs - out);
    if (p->expand) expand_scales(p, out, n_out, scales);
    for (int64_t step = 0; step < p->steps; step += set->panel_steps)
        decode_panel(p, out, n_out, step, least(set->panel_steps, p->steps - step), scales, 0,
                     shared_panel(p, out, step));
}

static int64_t shared_chunks(const product *p)
{
    return p->backward ? hb_ceil_div(p->steps, SHARED_STEPS)
                       : hb_ceil_div(p->outputs, p->set->tile_cols);
}

static void multiply_panel(const product *p, int64_t out, int64_t tile_begin, int64_t tile_end,
                           unsigned char *scratch)
{
    const hb_linear4_set *set = p->set;
    const int64_t cols = set->tile_cols;
    float *sums = (float *)(scratch + p->sums_at);
    float *scales = p->all_scales != NULL ? p->all_scales : (float *)(scratch + p->scales_at);
    int64_t n_out = least(cols, p->outputs - out);
    int64_t tile_sums = set->tile_rows * cols;

    if (p->shared == NULL && p->expand && !p->backward && p->blocksize > 0)
        expand_scales(p, out, n_out, scales);
    if (p->steps == 0)
        memset(sums, 0, (size_t)((tile_end - tile_begin) * tile_sums) * sizeof(float));
    for (int64_t step = 0; step < p->steps; step += set->panel_steps) {
        int64_t n_steps = least(set->panel_steps, p->steps - step);
        const unsigned char *panel = scratch;
        if (p->shared != NULL)
            panel = shared_panel(p, out, step);
        else
            decode_panel(p, out, n_out, step, n_steps, scales, 0, scratch);
        if (set->begin != NULL) set->begin();
        for (int64_t t = tile_begin; t < tile_end; t++) {
            int n_x = (int)least(set->tile_rows, p->m_count - t * set->tile_rows);
            const unsigned char *packed = p->packed + t * p->packed_stride + tile_bytes(set, step);
            set->tile(packed, panel, n_steps, n_x, step > 0, sums + (t - tile_begin) * tile_sums);
        }
        if (set->end != NULL) set->end();
    }
    int64_t m_end = least(tile_end * set->tile_rows, p->m_count);
    for (int64_t m = tile_begin * set->tile_rows; m < m_end; m++) {
        const float *row = sums + (m - tile_begin * set->tile_rows) * cols;
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
        store(p, p->m_begin + m, out, n_out, row);
    }
}

// A chunk is `outputs_per_chunk` outputs times tiles_per_chunk tiles of x.
static int64_t outputs_per_chunk(const product *p)
{
    // Backward, two panels share each cache line of W: keep them on one thread.
    return p->backward && p->shared == NULL ? 2 * p->set->tile_cols : p->set->tile_cols;
}

static void panel_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    unsigned char *scratch = p->lanes + lane * p->lane_bytes;
    int64_t n_tiles = hb_ceil_div(p->m_count, p->set->tile_rows);
    for (int64_t chunk = begin; chunk < end; chunk++) {
        int64_t out_begin = chunk / p->m_chunks * outputs_per_chunk(p);
        int64_t out_end = least(out_begin + outputs_per_chunk(p), p->outputs);
        int64_t tile_begin = chunk % p->m_chunks * p->tiles_per_chunk;
        int64_t tile_end = least(tile_begin + p->tiles_per_chunk, n_tiles);
        for (int64_t out = out_begin; out < out_end; out += p->set->tile_cols)
            multiply_panel(p, out, tile_begin, tile_end, scratch);
    }
}

static void pack_tiles(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    const int64_t bytes = (int64_t)hb_dtype_bytes(p->x.view->dtype);
    (void)lane;
    for (int64_t t = begin; t < end; t++) {
        int64_t m = t * p->set->tile_rows;
        int n_x = (int)least(p->set->tile_rows, p->m_count - m);
        int64_t stride;
        const void *rows;
        if (hb_matrix_rows_are_regular(&p->x, p->m_begin + m, n_x, &stride)) {
            rows = hb_matrix_element(&p->x, hb_matrix_row_offset(&p->x, p->m_begin + m));
        } else {
            for (int i = 0; i < n_x; i++)
                hb_matrix_gather_row(&p->x, p->m_begin + m + i,
                                     p->gathered + (m + i) * p->steps * bytes);
            rows = p->gathered + m * p->steps * bytes;
            stride = p->steps;
        }
        p->set->pack_x(rows, p->x.view->dtype, stride, n_x, p->steps,
                       p->packed + t * p->packed_stride);
    }
}

// Chunks: first those of the shared panels (they take longest), then the tiles of x.
static void prepare_shared(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    float *scales = (float *)(p->lanes + lane * p->lane_bytes + p->scales_at);
    const int64_t n_decode = p->m_begin == 0 ? shared_chunks(p) : 0;
    for (int64_t c = begin; c < least(end, n_decode); c++) decode_shared(p, c, scales);
    if (end > n_decode)
        pack_tiles(arg, (begin > n_decode ? begin : n_decode) - n_decode, end - n_decode, lane);
}

// Chunks of SHARED_STEPS rows of W.
static void expand_all_scales(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    (void)lane;
    const int64_t row = begin * SHARED_STEPS, row_end = least(end * SHARED_STEPS, p->steps);
    expand_scales(p, row, row_end - row, p->all_scales + row * (p->outputs / p->blocksize));
}

// ---- one call ---------------------------------------------------------------------------------

static void run_chunks(const product *p, bool serial, int64_t n_chunks, hb_chunk_fn fn)
{
    if (serial || n_chunks <= 1)
        fn((void *)(uintptr_t)p, 0, n_chunks, 0);
    else
        hb_parallel_for_lanes(p->context->pool, p->n_lanes, n_chunks, fn, (void *)(uintptr_t)p);
}

// Runs a prepared product: sizes the scratch, then pass by pass brings x into the kernels' layout
// and multiplies. bias: as given by the caller.
static hb_status run_product(product *p, const hb_view *bias, const char *function, hb_error *error)
{
    const hb_linear4_set *set = p->set;
    const hb_tensor4 *w = p->w;
    const int64_t rows = p->x.rows, item = (int64_t)hb_dtype_bytes(p->x.view->dtype);
    if (rows == 0 || p->outputs == 0) return HB_OK;

    const bool use_dot = !p->backward && p->blocksize > 0 && rows <= set->dot_until && p->steps > 0;
    const bool serial = w->numel / 2 * (1 + rows / 2) < SERIAL_BYTES;
    const int n_lanes = p->n_lanes = serial ? 1 : hb_pool_threads(p->context->pool);
    // A unit is what is packed together: a row (dot) or a tile of rows.
    const int64_t unit = use_dot ? 1 : set->tile_rows;
    p->packed_stride = use_dot ? hb_linear4_permuted_bytes(set, p->steps)
                               : round_up(tile_bytes(set, p->steps), 64);
    int64_t pass_units = hb_ceil_div(rows, unit);
    if (!use_dot && p->packed_stride > 0)
        pass_units =
            least(pass_units, PACKED_BYTES / p->packed_stride + (PACKED_BYTES < p->packed_stride));
    if (!use_dot && p->packed_stride > 0) {
        int64_t most = PASS_BYTES / p->packed_stride;
        const int64_t usual = PASS_ROW_BYTES / set->element_bytes / unit;
        pass_units = least(pass_units, most > usual ? most : usual);
    }
    const int64_t pass_rows = least(pass_units * unit, rows);

    int64_t stride;
    const bool gather = !hb_matrix_rows_are_regular(&p->x, 0, rows, &stride);
    p->y_regular = hb_matrix_rows_are_regular(&p->y, 0, rows, &p->y_stride);
    const int64_t tiles = hb_ceil_div(pass_rows, set->tile_rows);
    const int64_t panels = hb_ceil_div(p->outputs, set->tile_cols);
    // Few outputs: split the rows of x too, into at least 4 chunks a lane if they are there.
    const bool few_outputs =
        !serial && tiles > 1 && hb_ceil_div(p->outputs, outputs_per_chunk(p)) < 4 * n_lanes;
    p->shared_stride = panel_bytes(set, p->steps);
    const bool share =
        !use_dot && p->blocksize > 0 && few_outputs && p->shared_stride <= SHARED_BYTES / panels;
    const int64_t shared_bytes = share ? panels * p->shared_stride : 0;
    const int64_t group = use_dot ? DOT_CHUNK_ROWS : share ? set->tile_cols : outputs_per_chunk(p);
    const int64_t n_groups = hb_ceil_div(p->outputs, group);
    p->m_chunks = use_dot ? 1 : least(tiles, hb_ceil_div(serial ? 1 : 4 * n_lanes, n_groups));
    p->tiles_per_chunk = hb_ceil_div(tiles, p->m_chunks);
    p->m_chunks = hb_ceil_div(tiles, p->tiles_per_chunk);

    // Scratch: packed x, shared panels, gathered x, bias, all scales, then per lane panel, sums,
    // scales.
    int64_t packed_bytes = pass_units * p->packed_stride;
    int64_t gathered_bytes = gather ? round_up(pass_rows * p->steps * item, 64) : 0;
    bool copy_bias =
        bias != NULL && (bias->dtype != HB_F32 || (bias->stride[0] != 1 && p->outputs > 1));
    int64_t bias_bytes = copy_bias ? round_up(p->outputs * 4, 64) : 0;
    int64_t row_scales = p->blocksize > 0 ? p->steps / p->blocksize : 0;
    int64_t n_scales = 0;
    if (p->blocksize == 0)
        n_scales = set->panel_steps / MIN_BLOCKSIZE + 2;
    else if (p->expand && !p->backward)
        n_scales = (use_dot ? DOT_SCALE_ROWS : set->tile_cols) * row_scales;
    else if (p->expand && share)
        n_scales = SHARED_STEPS * (p->outputs / p->blocksize);
    const bool all_scales = p->expand && p->backward && p->blocksize > 0 && !share;
    const int64_t all_scales_bytes =
        all_scales ? round_up(p->steps * (p->outputs / p->blocksize) * 4, 64) : 0;
    p->sums_at = use_dot ? 0 : panel_bytes(set, set->panel_steps);
    p->scales_at = p->sums_at + (use_dot ? set->dot_rows * DOT_CHUNK_ROWS
                                         : p->tiles_per_chunk * set->tile_rows * set->tile_cols) *
                                    4;
    p->lane_bytes = round_up(p->scales_at + n_scales * 4, 64);
    int64_t total = packed_bytes + shared_bytes + gathered_bytes + bias_bytes + all_scales_bytes +
                    n_lanes * p->lane_bytes;

    _Alignas(64) unsigned char stack[STACK_BYTES];
    unsigned char *allocated = NULL, *scratch = stack;
    if (total > STACK_BYTES) {
        allocated = malloc((size_t)total + 64);
        HB_CHECK(error, allocated != NULL, HB_ERR_MEMORY,
                 "%s: no memory for %" PRId64 " bytes of scratch", function, total);
        scratch = allocated + (64 - (uintptr_t)allocated % 64) % 64;
    }
    p->packed = scratch;
    scratch += packed_bytes;
    p->shared = share ? scratch : NULL;
    scratch += shared_bytes;
    p->gathered = gather ? scratch : NULL;
    scratch += gathered_bytes;
    float *bias_f32 = (float *)scratch;
    scratch += bias_bytes;
    p->all_scales = all_scales ? (float *)scratch : NULL;
    p->lanes = scratch + all_scales_bytes;
    if (bias != NULL) p->bias = copy_bias ? bias_f32 : bias->data;
    for (int64_t i = 0; copy_bias && i < p->outputs; i++)
        bias_f32[i] = hb_load_f32(bias->data, i * bias->stride[0], bias->dtype);

    if (all_scales) run_chunks(p, serial, hb_ceil_div(p->steps, SHARED_STEPS), expand_all_scales);
    for (p->m_begin = 0; p->m_begin < rows; p->m_begin += pass_rows) {
        p->m_count = least(pass_rows, rows - p->m_begin);
        if (share) {
            int64_t n_decode = p->m_begin == 0 ? shared_chunks(p) : 0;
            run_chunks(p, false, n_decode + hb_ceil_div(p->m_count, unit), prepare_shared);
            run_chunks(p, false, n_groups * p->m_chunks, panel_chunks);
            continue;
        }
        bool small = serial || p->m_count * p->steps < (1 << 16);
        run_chunks(p, small, hb_ceil_div(p->m_count, unit), use_dot ? permute_rows : pack_tiles);
        run_chunks(p, serial, n_groups * p->m_chunks, use_dot ? dot_chunks : panel_chunks);
    }
    free(allocated);
    return HB_OK;
}

// ---- arguments --------------------------------------------------------------------------------

static hb_status check_weight(const hb_tensor4 *w, const char *function, hb_error *error)
{
    HB_CHECK(error, hb_blocksize4_is_valid(w->blocksize), HB_ERR_VALUE,
             "%s: blocksize, expected a power of two from 32 to 4096, got %" PRId64, function,
             w->blocksize);
    HB_CHECK(error,
             w->rows >= 0 && w->depth >= 0 &&
                 (w->depth == 0 ? w->numel == 0
                                : w->numel % w->depth == 0 && w->numel / w->depth == w->rows),
             HB_ERR_VALUE, "%s: weight, expected %" PRId64 " x %" PRId64 " elements, got %" PRId64,
             function, w->rows, w->depth, w->numel);
    HB_CHECK(error, w->numel == 0 || w->packed != NULL, HB_ERR_VALUE,
             "%s: weight, expected packed codes, got none", function);
    HB_CHECK(error,
             w->numel == 0 || w->absmax != NULL ||
                 (w->absmax_codes != NULL && w->nested_absmax != NULL && w->nested_map != NULL &&
                  w->nested_blocksize > 0),
             HB_ERR_VALUE, "%s: weight, expected absmax, plain or nested, got neither", function);
    return HB_OK;
}

// An integer set has no backward products and no decoding of single elements, and where it has no
// panels (or the blocks are too small for them) more rows of x than dot takes: all exact instead.
static void choose_set(product *p, hb_compute compute)
{
    const hb_kernels_linear4 *sets = &p->context->kernels.linear4;
    p->bf16 = compute == HB_COMPUTE_BF16;
    p->set = p->bf16 ? &sets->bf16 : &sets->f32;
    if ((compute != HB_COMPUTE_I16 && compute != HB_COMPUTE_I8) || p->backward || p->blocksize == 0)
        return;
    const bool wide = compute == HB_COMPUTE_I16;
    const hb_linear4_set *set = wide ? &sets->i16 : &sets->i8;
    if (p->x.rows > set->dot_until && (set->tile == NULL || p->blocksize < INT_BLOCKSIZE)) return;
    p->set = set;
    p->rounded = &p->context->rounded[p->w->format][wide ? 0 : 1];
}

static void prepare(product *p, hb_context *context, const hb_tensor4 *w, hb_compute compute,
                    const hb_view *x, const hb_view *y)
{
    p->context = context;
    p->w = w;
    p->x = hb_matrix_of(x);
    p->y = hb_matrix_of(y);
    p->steps = p->x.cols;
    p->outputs = p->y.cols;
    memcpy(p->codebook, hb_codebook4_get(w->format)->value, sizeof p->codebook);
    // The largest power of two that divides both.
    int64_t common = w->depth > 0 ? (w->depth & -w->depth) : w->blocksize;
    p->blocksize = least(common, w->blocksize);
    if (p->blocksize < MIN_BLOCKSIZE || w->depth > INT32_MAX) p->blocksize = 0;
    p->expand = w->absmax == NULL || p->blocksize != w->blocksize;
    choose_set(p, compute);
}

// On a GPU there is no integer arithmetic for 4-bit weights.
static hb_status check_compute(hb_compute compute, const hb_view *x, const char *function,
                               hb_error *error)
{
    HB_CHECK(error,
             x->device.type != HB_CUDA || (compute != HB_COMPUTE_I16 && compute != HB_COMPUTE_I8),
             HB_ERR_VALUE, "%s: compute, expected float32 or bfloat16 on CUDA, got %s", function,
             compute == HB_COMPUTE_I16 ? "int16" : "int8");
    return HB_OK;
}

hb_status hb_linear_4bit(hb_context *context, const hb_view *x, const hb_tensor4 *w,
                         const hb_view *bias, hb_compute compute, const hb_view *y, void *workspace,
                         hb_error *error)
{
    static const char function[] = "linear_4bit";
    HB_TRY(check_weight(w, function, error));
    HB_TRY(hb_matrix_check_views(x, w->depth, "x", "depth", y, w->rows, "y", "columns", function,
                                 error));
    if (bias != NULL) {
        HB_TRY(hb_matrix_check_view(bias, function, "bias", error));
        HB_CHECK(error, bias->ndim == 1 && bias->shape[0] == w->rows, HB_ERR_VALUE,
                 "linear_4bit: bias, expected shape [%" PRId64 "], got %d dimensions of %" PRId64
                 " elements",
                 w->rows, bias->ndim, hb_view_numel(bias));
    }
    HB_TRY(check_compute(compute, x, function, error));
    if (x->device.type == HB_CUDA)
        return hb_linear_4bit_cuda(function, x, w, bias, false, y, workspace, error);
    product p = {.backward = false};
    prepare(&p, context, w, compute, x, y);
    return run_product(&p, bias, function, error);
}

hb_status hb_linear_4bit_grad_input(hb_context *context, const hb_view *dy, const hb_tensor4 *w,
                                    hb_compute compute, const hb_view *dx, void *workspace,
                                    hb_error *error)
{
    static const char function[] = "linear_4bit_grad_input";
    HB_TRY(check_weight(w, function, error));
    HB_TRY(hb_matrix_check_views(dy, w->rows, "dy", "columns", dx, w->depth, "dx", "depth",
                                 function, error));
    HB_TRY(check_compute(compute, dy, function, error));
    if (dy->device.type == HB_CUDA)
        return hb_linear_4bit_cuda(function, dy, w, NULL, true, dx, workspace, error);
    product p = {.backward = true};
    prepare(&p, context, w, compute, dy, dx);
    return run_product(&p, NULL, function, error);
}
