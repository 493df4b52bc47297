// y = x W^T + b and dx = dy W for a row-wise int8 W, and the exact integer product: arguments, and
// the grid that all products walk. linear8.h says what these are.
#include "core/linear8.h"
#include "core/ops_cuda.h"

#include <inttypes.h>

enum { SERIAL_WORK = 1 << 19 }; // bytes of weights, weighted with rows of x, worth a thread

static bool is_small(const hb_product8 *p)
{
    double work = (double)p->rows * (double)p->depth * (1.0 + (double)p->x_rows / 8.0);
    return work < (double)SERIAL_WORK;
}

int hb_product8_lanes(const hb_product8 *p)
{
    return is_small(p) ? 1 : hb_pool_threads(p->context->pool);
}

void hb_product8_run_chunks(hb_product8 *p, bool serial, int64_t n_chunks, hb_chunk_fn fn)
{
    hb_parallel_for_lanes(serial ? NULL : p->context->pool, p->n_lanes, n_chunks, fn, p);
}

void hb_product8_plan_grid(hb_product8 *p, int64_t unit, int64_t most_rows)
{
    const int64_t blocks = hb_ceil_div(p->outputs, HB_PRODUCT8_BLOCK);
    const int64_t units = hb_ceil_div(p->x_rows, unit);
    int64_t wanted = hb_ceil_div(4 * hb_product8_lanes(p), blocks);
    int64_t per_chunk = hb_ceil_div(units, hb_least(wanted, units));
    p->x_per_chunk = hb_least(per_chunk * unit, most_rows);
    p->x_chunks = hb_ceil_div(p->x_rows, p->x_per_chunk);
}

void hb_product8_store(const hb_product8 *p, int64_t m, int64_t begin, int64_t n, const float *sums)
{
    const float *bias = p->bias != NULL ? p->bias + begin : NULL;
    hb_matrix_finish(&p->context->kernels.linear4, &p->y, m, begin, n, sums, bias);
}

// ---- arguments --------------------------------------------------------------------------------

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
    hb_product8 p = {.context = context,
                     .codes = b,
                     .rows = n,
                     .depth = depth,
                     .threshold = hb_f32_from_bits(HB_NAN_BITS),
                     .a = a,
                     .c = c,
                     .x_rows = m,
                     .outputs = n};
    return m == 0 || n == 0 ? HB_OK : hb_product8_int8(&p, "matmul_int8", error);
}

static hb_product8 product_of(hb_context *context, const hb_view *x, const int8_t *codes,
                              const float *scale, int64_t rows, int64_t depth, const hb_view *y)
{
    hb_product8 p = {.context = context,
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
    if (bias != NULL) HB_TRY(hb_matrix_check_bias(bias, rows, function, error));
    if (x->device.type == HB_CUDA)
        return hb_linear_8bit_cuda(function, x, codes, scale, rows, depth, bias, mode, threshold,
                                   false, y, workspace, error);
    hb_product8 p = product_of(context, x, codes, scale, rows, depth, y);
    if (p.x_rows == 0 || p.outputs == 0) return HB_OK;
    hb_scratch scratch = {0};
    if (bias != NULL && hb_matrix_bias_is_plain(bias)) {
        p.bias = bias->data;
    } else if (bias != NULL) {
        unsigned char *memory;
        (void)hb_scratch_reserve(&scratch, rows * (int64_t)sizeof(float));
        HB_TRY(hb_scratch_open(&scratch, context->scratch, NULL, 0, function, &memory, error));
        hb_matrix_copy_bias(bias, (float *)memory);
        p.bias = (float *)memory;
    }
    hb_status status;
    if (mode == HB_INT8_DYNAMIC) {
        if (threshold > 0.0f) p.threshold = threshold;
        status = hb_product8_int8(&p, function, error);
    } else {
        status = p.x_rows <= HB_PRODUCT8_DOT_UNTIL ? hb_product8_dot(&p, function, error)
                                                   : hb_product8_panels(&p, function, error);
    }
    hb_scratch_close(&scratch);
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
    hb_product8 p = product_of(context, dy, codes, scale, rows, depth, dx);
    p.backward = true;
    return p.x_rows == 0 || p.outputs == 0 ? HB_OK : hb_product8_panels(&p, function, error);
}
