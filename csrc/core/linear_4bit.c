// y = x W^T + b and dx = dy W, W in 4 bits straight from the bitsandbytes layout: arguments, the
// choice between the ways to multiply, and the order of a call. linear4.h says what these are.
#include "core/linear4.h"
#include "core/ops_cuda.h"

#include <inttypes.h>

enum {
    PACKED_BYTES = 8 << 20,      // most that packed x takes, if one tile fits
    PASS_ROW_BYTES = 1024,       // of a column of x in a pass: 512 rows of bfloat16, 256 of float32
    PASS_BYTES = 512 << 10,      // or more, while their packed form has this size: half an L2 cache
    SHARED_BYTES = 4 << 20,      // most that shared panels take
    STACK_BYTES = 8 << 10,       // scratch up to this size is not allocated
    GROUP_OUTPUTS = 64,          // of the panels of a chunk: a power of two; backward twice as many
    GROUP_SUMS_BYTES = 72 << 10, // most that their sums take beside x in an L2 cache
    GROUPS_A_LANE = 16,          // chunks of panels that keep all lanes busy to the end
    SERIAL_BYTES = 1 << 19,      // work (bytes of weights, weighted with rows of x) worth a thread
};

// ---- plan -------------------------------------------------------------------------------------

// Few rows of x: each row of W once, all rows of x in one pass.
static void plan_dot(hb_product4 *p)
{
    const hb_linear4_set *set = p->set;
    p->bring_x = hb_product4_permute_rows;
    p->multiply = hb_product4_dot_chunks;
    p->unit = 1;
    p->packed_stride = hb_linear4_permuted_bytes(set, p->steps);
    p->pass_rows = p->x.rows;
    p->group = HB_LINEAR4_DOT_CHUNK_ROWS;
    p->m_chunks = 1;
    p->lane_sums = set->dot_rows * HB_LINEAR4_DOT_CHUNK_ROWS;
    if (p->expand) p->lane_scales = HB_LINEAR4_DOT_SCALE_ROWS * (p->w->depth / p->blocksize);
}

// Few rows of dy: a tile of them, as many chunks of columns of W for each lane.
static void plan_add(hb_product4 *p)
{
    const hb_linear4_set *set = p->set;
    p->bring_x = hb_product4_pack_tiles;
    p->multiply = hb_product4_add_chunks;
    p->unit = set->tile_rows;
    p->packed_stride = hb_round_up(hb_linear4_tile_bytes(set, p->steps), 64);
    p->pass_rows = p->x.rows;
    const int64_t units = hb_ceil_div(p->outputs, HB_LINEAR4_ADD_UNIT);
    const int64_t chunks = hb_round_up(hb_ceil_div(p->outputs, HB_LINEAR4_ADD_COLS), p->n_lanes);
    p->group = hb_ceil_div(units, chunks) * HB_LINEAR4_ADD_UNIT;
    p->m_chunks = 1;
    p->lane_sums = p->x.rows * p->group;
    p->sums_at = p->lane_sums * (int64_t)sizeof(float); // behind the totals
}

// Rows of x in a pass over panels: so many that packed x stays in the caches, in whole units, and
// passes of one length: each decodes all of W.
static int64_t rows_of_a_pass(const hb_product4 *p)
{
    const int64_t rows = p->x.rows;
    if (p->packed_stride == 0) return rows;
    const int64_t usual = hb_ceil_div(PASS_ROW_BYTES / p->set->element_bytes, p->unit);
    const int64_t most = hb_most(
        hb_least(hb_most(PASS_BYTES / p->packed_stride, usual), PACKED_BYTES / p->packed_stride),
        1);
    const int64_t units = hb_ceil_div(rows, p->unit);
    return hb_least(hb_ceil_div(units, hb_ceil_div(units, most)) * p->unit, rows);
}

// Floats of expanded scales that a lane needs beside panels.
static int64_t panel_scales(const hb_product4 *p)
{
    if (p->blocksize == 0) return p->set->panel_steps / HB_LINEAR4_MIN_BLOCKSIZE + 2;
    if (!p->expand) return 0;
    const int64_t a_row = p->w->depth / p->blocksize;
    if (p->backward) return p->share ? HB_LINEAR4_SHARED_STEPS * a_row : 0;
    return p->group * a_row;
}

// Outputs of a chunk at least: backward, two panels share each cache line of W, which should stay
// on one thread.
static int64_t least_group(const hb_product4 *p)
{
    return p->backward ? 2 * p->set->tile_cols : p->set->tile_cols;
}

// The same where there are outputs enough for all lanes: more panels for the steps of x that lie in
// the L2 cache, and backward what a cache line of W has.
static int64_t panel_group(const hb_product4 *p)
{
    int64_t group = hb_most(p->backward ? 2 * GROUP_OUTPUTS : GROUP_OUTPUTS, least_group(p));
    while (group > least_group(p) && (p->outputs / group < GROUPS_A_LANE * p->n_lanes ||
                                      p->pass_rows * group * 4 > GROUP_SUMS_BYTES))
        group /= 2;
    return group;
}

static void plan_panels(hb_product4 *p)
{
    const hb_linear4_set *set = p->set;
    p->bring_x = hb_product4_pack_tiles;
    p->multiply = hb_product4_panel_chunks;
    p->unit = set->tile_rows;
    p->packed_stride = hb_round_up(hb_linear4_tile_bytes(set, p->steps), 64);
    p->pass_rows = rows_of_a_pass(p);
    const int64_t tiles = hb_ceil_div(p->pass_rows, set->tile_rows);

    // Few outputs: split the rows of x too, into at least 4 chunks a lane if they are there.
    const int64_t panels = hb_ceil_div(p->outputs, set->tile_cols);
    const bool few_outputs =
        !p->serial && tiles > 1 && hb_ceil_div(p->outputs, least_group(p)) < 4 * p->n_lanes;
    p->shared_stride = hb_linear4_panel_bytes(set, p->steps);
    p->share = p->blocksize > 0 && few_outputs && p->shared_stride <= SHARED_BYTES / panels;
    p->group = p->share ? set->tile_cols : panel_group(p);
    const int64_t groups = hb_ceil_div(p->outputs, p->group);
    const int64_t m_chunks = hb_least(tiles, hb_ceil_div(p->serial ? 1 : 4 * p->n_lanes, groups));
    p->tiles_per_chunk = hb_ceil_div(tiles, m_chunks);
    p->m_chunks = hb_ceil_div(tiles, p->tiles_per_chunk);
    p->sums_at = hb_linear4_panel_bytes(set, set->panel_steps);
    p->lane_sums = p->tiles_per_chunk * set->tile_rows * p->group;
    p->lane_scales = panel_scales(p);
}

// `numel`: elements of the weights that are multiplied in one loop.
static void plan(hb_product4 *p, int64_t numel)
{
    const int64_t rows = p->x.rows;
    p->serial = numel / 2 * (1 + rows / 2) < SERIAL_BYTES;
    p->n_lanes = p->serial ? 1 : hb_pool_threads(p->context->pool);
    const bool plain = p->blocksize > 0 && p->steps > 0;
    if (plain && !p->backward && rows <= p->set->dot_until)
        plan_dot(p);
    else if (plain && p->backward && rows <= p->set->add_until)
        plan_add(p);
    else
        plan_panels(p);
    p->n_groups = hb_ceil_div(p->outputs, p->group);
    p->scales_at = p->sums_at + p->lane_sums * (int64_t)sizeof(float);
    p->lane_bytes = hb_round_up(p->scales_at + p->lane_scales * (int64_t)sizeof(float), 64);
}

// Scratch: packed x, shared panels, gathered x, bias, all scales, then per lane panel, sums,
// scales.
static hb_status open_scratch(hb_product4 *p, const hb_view *bias, hb_scratch *scratch,
                              unsigned char *stack, const char *function, hb_error *error)
{
    const hb_linear4_set *set = p->set;
    const int64_t rows = p->x.rows;
    const int64_t x_bytes = p->steps * (int64_t)hb_dtype_bytes(p->x.view->dtype);
    int64_t stride;
    const bool gather = !hb_matrix_rows_are_regular(&p->x, 0, rows, &stride);
    const bool copy_bias = bias != NULL && !hb_matrix_bias_is_plain(bias);
    const bool all_scales = p->expand && p->backward && p->blocksize > 0 && !p->share;

    const int64_t units = hb_ceil_div(p->pass_rows, p->unit);
    const int64_t panels = hb_ceil_div(p->outputs, set->tile_cols);
    const int64_t packed_at = hb_scratch_reserve(scratch, units * p->packed_stride);
    const int64_t shared_at = hb_scratch_reserve(scratch, p->share ? panels * p->shared_stride : 0);
    const int64_t gathered_at = hb_scratch_reserve(scratch, gather ? p->pass_rows * x_bytes : 0);
    const int64_t bias_at = hb_scratch_reserve(scratch, copy_bias ? p->outputs * 4 : 0);
    const int64_t scales_at =
        hb_scratch_reserve(scratch, all_scales ? p->steps * (p->outputs / p->blocksize) * 4 : 0);
    const int64_t lanes_at = hb_scratch_reserve(scratch, p->n_lanes * p->lane_bytes);

    unsigned char *memory;
    HB_TRY(hb_scratch_open(scratch, p->context->scratch, stack, STACK_BYTES, function, &memory,
                           error));
    p->packed = memory + packed_at;
    p->shared = p->share ? memory + shared_at : NULL;
    p->gathered = gather ? memory + gathered_at : NULL;
    p->all_scales = all_scales ? (float *)(memory + scales_at) : NULL;
    p->lanes = memory + lanes_at;
    p->y_regular = hb_matrix_rows_are_regular(&p->y, 0, rows, &p->y_stride);
    if (bias != NULL) p->bias = bias->data;
    if (copy_bias) {
        hb_matrix_copy_bias(bias, (float *)(memory + bias_at));
        p->bias = (float *)(memory + bias_at);
    }
    return HB_OK;
}

// ---- one call ---------------------------------------------------------------------------------

static void run_chunks(hb_product4 *p, bool serial, int64_t n_chunks, hb_chunk_fn fn)
{
    if (serial || n_chunks <= 1)
        fn(p, 0, n_chunks, 0);
    else
        hb_parallel_for_lanes(p->context->pool, p->n_lanes, n_chunks, fn, p);
}

// A prepared product: pass by pass brings x into the kernels' layout and multiplies.
static hb_status run(hb_product4 *p, const hb_view *bias, const char *function, hb_error *error)
{
    const int64_t rows = p->x.rows;
    if (rows == 0 || p->outputs == 0) return HB_OK;
    plan(p, p->w->numel);
    _Alignas(64) unsigned char stack[STACK_BYTES];
    hb_scratch scratch = {0};
    hb_status status = open_scratch(p, bias, &scratch, stack, function, error);
    if (status == HB_OK && p->all_scales != NULL)
        run_chunks(p, p->serial, hb_ceil_div(p->steps, HB_LINEAR4_SHARED_STEPS),
                   hb_product4_expand_all_scales);
    for (p->m_begin = 0; status == HB_OK && p->m_begin < rows; p->m_begin += p->pass_rows) {
        p->m_count = hb_least(p->pass_rows, rows - p->m_begin);
        const int64_t units = hb_ceil_div(p->m_count, p->unit);
        const bool small = p->serial || p->m_count * p->steps < (1 << 16);
        if (p->share)
            run_chunks(p, false, hb_product4_shared_chunks(p) + units, hb_product4_prepare_shared);
        else
            run_chunks(p, small, units, p->bring_x);
        run_chunks(p, p->serial, p->n_groups * p->m_chunks, p->multiply);
    }
    hb_scratch_close(&scratch);
    return status;
}

// ---- several weights, one x -------------------------------------------------------------------

typedef struct {
    hb_product4 *products;
    int n;
} product_group;

static void group_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const product_group *group = arg;
    for (int i = 0; i < group->n; i++) {
        hb_product4 *p = &group->products[i];
        const int64_t from = hb_most(begin, 0), to = hb_least(end, p->n_groups);
        if (from < to) p->multiply(p, from, to, lane);
        begin -= p->n_groups;
        end -= p->n_groups;
    }
}

// Plans the products for one loop. False where they are not all few rows of the same permuted x.
static bool plan_group(const product_group *group)
{
    int64_t numel = 0;
    for (int i = 0; i < group->n; i++) numel += group->products[i].w->numel;
    for (int i = 0; i < group->n; i++) {
        hb_product4 *p = &group->products[i];
        if (p->x.rows == 0 || p->outputs == 0 || p->set != group->products[0].set) return false;
        plan(p, numel);
        if (p->multiply != hb_product4_dot_chunks) return false;
    }
    return true;
}

static hb_status run_group(const product_group *group, const hb_linear4_item *items,
                           const char *function, hb_error *error)
{
    _Alignas(64) unsigned char stack[HB_LINEAR4_MAX_ITEMS][STACK_BYTES];
    hb_scratch scratch[HB_LINEAR4_MAX_ITEMS] = {{0}};
    hb_product4 *first = &group->products[0];
    hb_status status = HB_OK;
    int64_t chunks = 0;
    int lanes = first->n_lanes; // the pool may have been resized between two plans
    for (int i = 0; i < group->n && status == HB_OK; i++) {
        hb_product4 *p = &group->products[i];
        status = open_scratch(p, items[i].bias, &scratch[i], stack[i], function, error);
        p->m_count = p->x.rows;
        chunks += p->n_groups;
        if (p->n_lanes < lanes) lanes = p->n_lanes;
    }
    if (status == HB_OK) {
        const bool small = first->serial || first->m_count * first->steps < (1 << 16);
        run_chunks(first, small, first->m_count, first->bring_x);
        for (int i = 1; i < group->n; i++) group->products[i].packed = first->packed;
        if (first->serial || chunks <= 1)
            group_chunks((void *)(uintptr_t)group, 0, chunks, 0);
        else
            hb_parallel_for_lanes(first->context->pool, lanes, chunks, group_chunks,
                                  (void *)(uintptr_t)group);
    }
    for (int i = 0; i < group->n; i++) hb_scratch_close(&scratch[i]);
    return status;
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

// An integer set has no backward products, no decoding of single elements and no sums of nothing
// (those are the panels'), and where it has no panels (or the blocks are too small for them) more
// rows of x than dot takes: all exact instead.
static void choose_set(hb_product4 *p, hb_compute compute)
{
    const hb_kernels_linear4 *sets = &p->context->kernels.linear4;
    p->bf16 = compute == HB_COMPUTE_BF16;
    p->set = p->bf16 ? &sets->bf16 : &sets->f32;
    if (compute != HB_COMPUTE_I16 && compute != HB_COMPUTE_I8) return;
    if (p->backward || p->blocksize == 0 || p->steps == 0) return;
    const bool wide = compute == HB_COMPUTE_I16;
    const hb_linear4_set *set = wide ? &sets->i16 : &sets->i8;
    if (p->x.rows > set->dot_until && (set->tile == NULL || p->blocksize < HB_LINEAR4_INT_STEPS))
        return;
    p->set = set;
    p->rounded = &p->context->rounded[p->w->format][wide ? 0 : 1];
}

static void prepare(hb_product4 *p, hb_context *context, const hb_tensor4 *w, hb_compute compute,
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
    p->blocksize = hb_least(common, w->blocksize);
    if (p->blocksize < HB_LINEAR4_MIN_BLOCKSIZE || w->depth > INT32_MAX) p->blocksize = 0;
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

static hb_status check_forward(const hb_view *x, const hb_tensor4 *w, const hb_view *bias,
                               hb_compute compute, const hb_view *y, const char *function,
                               hb_error *error)
{
    HB_TRY(check_weight(w, function, error));
    HB_TRY(hb_matrix_check_views(x, w->depth, "x", "depth", y, w->rows, "y", "columns", function,
                                 error));
    if (bias != NULL) HB_TRY(hb_matrix_check_bias(bias, w->rows, function, error));
    return check_compute(compute, x, function, error);
}

hb_status hb_linear_4bit(hb_context *context, const hb_view *x, const hb_tensor4 *w,
                         const hb_view *bias, hb_compute compute, const hb_view *y, void *workspace,
                         hb_error *error)
{
    static const char function[] = "linear_4bit";
    HB_TRY(check_forward(x, w, bias, compute, y, function, error));
    if (x->device.type == HB_CUDA)
        return hb_linear_4bit_cuda(function, x, w, bias, false, y, workspace, error);
    hb_product4 p = {.backward = false};
    prepare(&p, context, w, compute, x, y);
    return run(&p, bias, function, error);
}

hb_status hb_linear_4bit_group(hb_context *context, const hb_view *x, int n,
                               const hb_linear4_item *items, hb_compute compute, hb_error *error)
{
    static const char function[] = "linear_4bit_group";
    hb_product4 products[HB_LINEAR4_MAX_ITEMS];
    HB_CHECK(error, n > 0 && n <= HB_LINEAR4_MAX_ITEMS, HB_ERR_VALUE,
             "%s: weights, expected 1 to %d, got %d", function, HB_LINEAR4_MAX_ITEMS, n);
    HB_CHECK(error, x->device.type == HB_CPU, HB_ERR_DEVICE,
             "%s: x, expected memory of the CPU, got CUDA", function);
    for (int i = 0; i < n; i++) {
        HB_TRY(check_forward(x, items[i].w, items[i].bias, compute, items[i].y, function, error));
        products[i] = (hb_product4){.backward = false};
        prepare(&products[i], context, items[i].w, compute, x, items[i].y);
    }
    const product_group group = {products, n};
    if (plan_group(&group)) return run_group(&group, items, function, error);
    for (int i = 0; i < n; i++)
        HB_TRY(hb_linear_4bit(context, x, items[i].w, items[i].bias, compute, items[i].y, NULL,
                              error));
    return HB_OK;
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
    hb_product4 p = {.backward = true};
    prepare(&p, context, w, compute, dy, dx);
    return run(&p, NULL, function, error);
}
