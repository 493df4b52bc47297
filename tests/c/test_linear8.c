// Products with int8 weights: each kernel against its definition, then the operations against
// double.
#include "check.h"

#include <math.h>
#include <stdlib.h>

static const double U = 0x1p-24;

static int64_t min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

// ---- kernels
// --------------------------------------------------------------------------------------

static void check_dot_int8(check *c, int64_t depth, int64_t n_rows, int n_x)
{
    const hb_kernels_linear8 *k = &c->kernels->linear8;
    const int64_t w_stride = depth + check_random_below(c, 3) * 7;
    const int64_t c_stride = n_rows + check_random_below(c, 3);
    const int64_t prepared_bytes = hb_int8_prepared_bytes(depth, k->prepared_bytes);
    check_label(c, "depth %d, %d rows, %d x, stride %d", (int)depth, (int)n_rows, n_x,
                (int)w_stride);
    const int64_t w_bytes = n_rows > 0 ? (n_rows - 1) * w_stride + depth : 0;
    int8_t *w = check_buffer(c, (size_t)w_bytes, CHECK_END);
    int8_t *x = check_buffer(c, (size_t)(depth * n_x), CHECK_END);
    uint8_t *prepared = check_buffer(c, (size_t)(prepared_bytes * n_x), CHECK_BEGIN);
    const int64_t n_out = (n_x - 1) * c_stride + n_rows;
    int32_t *got = check_buffer(c, (size_t)n_out * sizeof *got, CHECK_END);
    int32_t *want = malloc((size_t)(n_out + 1) * sizeof *want);
    check_fill_codes(c, w, w_bytes);
    check_fill_codes(c, x, depth * n_x);
    memcpy(want, got, (size_t)n_out * sizeof *want); // what lies between rows stays
    for (int t = 0; t < n_x; t++) {
        for (int64_t r = 0; r < n_rows; r++) {
            int64_t sum = 0;
            for (int64_t i = 0; i < depth; i++) sum += w[r * w_stride + i] * x[t * depth + i];
            want[t * c_stride + r] = (int32_t)sum;
        }
        k->prepare_int8(x + t * depth, depth, prepared + t * prepared_bytes);
    }
    k->dot_int8(w, w_stride, n_rows, depth, prepared, n_x, got, c_stride);
    check_equal(c, got, want, (size_t)n_out * sizeof *got, "dot_int8");
    free(want);
    check_release(c);
}

// As check_dot_int8; rows of the tile behind n_x hold what was there before.
static void check_tile_int8(check *c, int64_t depth, int64_t n_rows, int n_x)
{
    const hb_kernels_linear8 *k = &c->kernels->linear8;
    const int64_t w_stride = depth + check_random_below(c, 3) * 7;
    const int64_t c_stride = n_rows + check_random_below(c, 3);
    check_label(c, "tile of %d x, depth %d, %d rows, stride %d", n_x, (int)depth, (int)n_rows,
                (int)w_stride);
    const int64_t w_bytes = n_rows > 0 ? (n_rows - 1) * w_stride + depth : 0;
    const int64_t n_out = (n_x - 1) * c_stride + n_rows;
    int8_t *w = check_buffer(c, (size_t)w_bytes, CHECK_END);
    int8_t *x = check_buffer(c, (size_t)(depth * n_x), CHECK_END);
    void *tile = check_buffer(c, (size_t)hb_int8_tile_bytes(depth, k->tile_int8_rows), CHECK_BEGIN);
    int32_t *got = check_buffer(c, (size_t)n_out * sizeof *got, CHECK_END);
    int32_t *want = malloc((size_t)(n_out + 1) * sizeof *want);
    check_fill_codes(c, w, w_bytes);
    check_fill_codes(c, x, depth * n_x);
    memcpy(want, got, (size_t)n_out * sizeof *want);
    for (int t = n_x - 1; t >= 0; t--) { // in any order
        for (int64_t r = 0; r < n_rows; r++) {
            int64_t sum = 0;
            for (int64_t i = 0; i < depth; i++) sum += w[r * w_stride + i] * x[t * depth + i];
            want[t * c_stride + r] = (int32_t)sum;
        }
        k->prepare_tile(x + t * depth, depth, t, tile);
    }
    k->tile_int8(w, w_stride, n_rows, depth, tile, n_x, got, c_stride);
    check_equal(c, got, want, (size_t)n_out * sizeof *got, "tile_int8");
    free(want);
    check_release(c);
}

static void check_dot_f32(check *c, int64_t depth, int64_t n_rows, int n_x)
{
    const hb_kernels_linear8 *k = &c->kernels->linear8;
    const int64_t w_stride = depth + check_random_below(c, 2) * 5;
    const int64_t x_stride = depth + check_random_below(c, 2) * 3;
    const int64_t y_stride = n_rows + check_random_below(c, 3);
    check_label(c, "depth %d, %d rows, %d x", (int)depth, (int)n_rows, n_x);
    const int64_t w_bytes = n_rows > 0 ? (n_rows - 1) * w_stride + depth : 0;
    const int64_t x_size = (n_x - 1) * x_stride + depth, n_out = (n_x - 1) * y_stride + n_rows;
    int8_t *w = check_buffer(c, (size_t)w_bytes, CHECK_END);
    float *x = check_buffer(c, (size_t)x_size * sizeof *x, CHECK_END);
    float *y = check_buffer(c, (size_t)n_out * sizeof *y, CHECK_END);
    float *alone = check_buffer(c, (size_t)n_x * sizeof *alone, CHECK_END);
    check_fill_codes(c, w, w_bytes);
    check_fill_normal(c, x, x_size, 3.0f);
    k->dot_f32(w, w_stride, n_rows, depth, x, x_stride, n_x, y, y_stride);
    for (int64_t r = 0; r < n_rows; r++) {
        k->dot_f32(w + r * w_stride, w_stride, 1, depth, x, x_stride, n_x, alone, 1);
        for (int t = 0; t < n_x; t++) {
            double want = 0, magnitude = 0;
            for (int64_t i = 0; i < depth; i++) {
                double product = (double)w[r * w_stride + i] * (double)x[t * x_stride + i];
                want += product;
                magnitude += fabs(product);
            }
            double bound = ((double)depth / 8 + 16) * U * magnitude;
            check_close(c, &y[t * y_stride + r], &want, &bound, 1, "dot_f32 [%d, %d]", t, (int)r);
            check_equal(c, &y[t * y_stride + r], &alone[t], sizeof *y, "rows together and alone");
        }
    }
    check_release(c);
}

static void check_panels(check *c, int64_t depth, int64_t n_rows, int tile_cols)
{
    const hb_kernels_linear8 *k = &c->kernels->linear8, *ref = &c->reference->linear8;
    check_label(c, "depth %d, %d rows, tile_cols %d", (int)depth, (int)n_rows, tile_cols);
    const int64_t w_bytes = n_rows > 0 ? (n_rows - 1) * (depth + 5) + depth : 0;
    int8_t *w = check_buffer(c, (size_t)w_bytes, CHECK_END);
    const size_t rows_bytes = (size_t)(depth * tile_cols) * sizeof(float);
    float *got = check_buffer(c, rows_bytes, CHECK_END),
          *want = check_buffer(c, rows_bytes, CHECK_END);
    check_fill_codes(c, w, w_bytes);
    k->decode_rows(w, depth + 5, n_rows, depth, tile_cols, got);
    ref->decode_rows(w, depth + 5, n_rows, depth, tile_cols, want);
    check_equal(c, got, want, rows_bytes, "decode_rows");

    // The same codes seen from the other side: columns of W are outputs, at most tile_cols of them.
    const int64_t n_cols = min_i64(depth, tile_cols);
    const size_t cols_bytes = (size_t)(n_rows * tile_cols) * sizeof(float);
    float *factor = check_buffer(c, (size_t)n_rows * sizeof *factor, CHECK_END);
    check_fill_wild(c, factor, n_rows, true);
    for (int64_t r = 0; r < n_rows; r++) // which NaN a product gives is not defined
        if (isnan(factor[r])) factor[r] = INFINITY;
    for (int64_t i = 0; i < w_bytes; i++)
        if (w[i] == 0) w[i] = 1;
    got = check_buffer(c, cols_bytes, CHECK_END);
    want = check_buffer(c, cols_bytes, CHECK_END);
    k->decode_cols(w, depth + 5, factor, n_rows, n_cols, tile_cols, got);
    ref->decode_cols(w, depth + 5, factor, n_rows, n_cols, tile_cols, want);
    check_equal(c, got, want, cols_bytes, "decode_cols");
    check_release(c);
}

static void check_rescale(check *c, int64_t n)
{
    const hb_kernels_linear8 *k = &c->kernels->linear8, *ref = &c->reference->linear8;
    check_label(c, "rescale n %d", (int)n);
    const size_t bytes = (size_t)n * sizeof(float);
    int32_t *sums = check_buffer(c, bytes, CHECK_END);
    float *extra = check_buffer(c, bytes, CHECK_END), *factor = check_buffer(c, bytes, CHECK_END);
    float *got = check_buffer(c, bytes, CHECK_END), *want = check_buffer(c, bytes, CHECK_END);
    check_fill_bytes(c, sums, bytes);
    check_fill_normal(c, extra, n, 1e8f);
    check_fill_wild(c, factor, n, false);
    for (int with_extra = 0; with_extra < 2; with_extra++) {
        k->rescale(sums, 0.37f, with_extra ? extra : NULL, factor, n, got);
        ref->rescale(sums, 0.37f, with_extra ? extra : NULL, factor, n, want);
        check_equal(c, got, want, bytes, "rescale, extra %d", with_extra);
    }
    check_release(c);
}

static void bench_kernels(check *c)
{
    const hb_kernels_linear8 *k = &c->kernels->linear8;
    enum { ROWS = 64, DEPTH = 4096, BYTES = ROWS * DEPTH };
    int8_t *w = check_buffer(c, BYTES, CHECK_BEGIN),
           *codes = check_buffer(c, 8 * DEPTH, CHECK_BEGIN);
    const int64_t stride = hb_int8_prepared_bytes(DEPTH, k->prepared_bytes);
    uint8_t *prepared = check_buffer(c, (size_t)(8 * stride), CHECK_BEGIN);
    float *x = check_buffer(c, 8 * DEPTH * sizeof *x, CHECK_BEGIN);
    float *y = check_buffer(c, 8 * ROWS * sizeof *y, CHECK_BEGIN);
    float *panel = check_buffer(c, 64 * 512 * sizeof *panel, CHECK_BEGIN);
    check_fill_codes(c, w, BYTES);
    check_fill_codes(c, codes, 8 * DEPTH);
    check_fill_normal(c, x, 8 * DEPTH, 1.0f);
    for (int t = 0; t < k->dot_int8_rows; t++)
        k->prepare_int8(codes + t * DEPTH, DEPTH, prepared + t * stride);
    const int n = k->dot_int8_rows, nf = k->dot_f32_rows;
    CHECK_BENCH(c, b, "int8 dot 1 x", BYTES, 2.0 * BYTES)
    k->dot_int8(w, DEPTH, ROWS, DEPTH, prepared, 1, (int32_t *)y, ROWS);
    CHECK_BENCH(c, b, "int8 dot all x", 0, 2.0 * BYTES * n)
    k->dot_int8(w, DEPTH, ROWS, DEPTH, prepared, n, (int32_t *)y, ROWS);
    if (CHECK_NEW(c, linear8.tile_int8)) {
        void *tile = check_buffer(c, DEPTH * (size_t)k->tile_int8_rows, CHECK_BEGIN);
        int32_t *sums = check_buffer(c, ROWS * 4 * (size_t)k->tile_int8_rows, CHECK_BEGIN);
        for (int t = 0; t < k->tile_int8_rows; t++) k->prepare_tile(codes, DEPTH, t, tile);
        CHECK_BENCH(c, b, "int8 prepare tile row", DEPTH * 2, 0)
        k->prepare_tile(codes, DEPTH, 0, tile);
        CHECK_BENCH(c, b, "int8 tile all x", 0, 2.0 * BYTES * k->tile_int8_rows)
        k->tile_int8(w, DEPTH, ROWS, DEPTH, tile, k->tile_int8_rows, sums, ROWS);
    }
    CHECK_BENCH(c, b, "int8 dot f32 1 x", BYTES, 2.0 * BYTES)
    k->dot_f32(w, DEPTH, ROWS, DEPTH, x, DEPTH, 1, y, ROWS);
    CHECK_BENCH(c, b, "int8 dot f32 all x", 0, 2.0 * BYTES * nf)
    k->dot_f32(w, DEPTH, ROWS, DEPTH, x, DEPTH, nf, y, ROWS);
    CHECK_BENCH(c, b, "int8 decode rows", 64 * 512 * 5, 0)
    k->decode_rows(w, DEPTH, 64, 512, 64, panel);
    CHECK_BENCH(c, b, "int8 decode cols", 64 * 512 * 5, 0)
    k->decode_cols(w, DEPTH, x, 512 / 8, 64, 64, panel);
    CHECK_BENCH(c, b, "int8 rescale", 64 * 16, 0)
    k->rescale((const int32_t *)w, 0.1f, NULL, x, 64, y);
}

CHECK_GROUP(linear8_kernels)
{
    const hb_kernels_linear8 *k = &c->kernels->linear8;
    const int64_t depths[] = {0,  1,  7,  15,  16,  17,  31,  32,  33,
                              63, 64, 65, 127, 128, 129, 192, 333, 1000};
    const int64_t rows[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 33, 64};
    const int n_depths = sizeof depths / sizeof *depths, n_rows = sizeof rows / sizeof *rows;
    if (c->bench) {
        if (CHECK_NEW(c, linear8.dot_int8) || CHECK_NEW(c, linear8.tile_int8)) bench_kernels(c);
        return;
    }
    for (int d = 0; d < n_depths; d++) {
        for (int r = 0; r < n_rows; r++) {
            if (c->emulated && (d + r) % 3 != 0) continue;
            for (int n_x = 1; n_x <= k->dot_int8_rows && CHECK_NEW(c, linear8.dot_int8); n_x++)
                check_dot_int8(c, depths[d], rows[r], n_x);
            for (int n_x = 1; n_x <= k->dot_f32_rows && CHECK_NEW(c, linear8.dot_f32); n_x++)
                check_dot_f32(c, depths[d], rows[r], n_x);
            for (int cols = 16; cols <= 64 && CHECK_NEW(c, linear8.decode_rows); cols *= 2)
                if (rows[r] <= cols) check_panels(c, depths[d], rows[r], cols);
        }
        if (CHECK_NEW(c, linear8.rescale)) check_rescale(c, min_i64(depths[d], 64));
    }
    if (CHECK_NEW(c, linear8.dot_int8)) check_dot_int8(c, 20000, 3, 1);
    if (!CHECK_NEW(c, linear8.tile_int8)) return;
    for (int d = 0; d < n_depths; d++)
        for (int r = 0; r < n_rows; r++)
            for (int n_x = 1; n_x <= k->tile_int8_rows; n_x += c->emulated ? 5 : 1)
                if (!c->emulated || (d + r) % 3 == 0) check_tile_int8(c, depths[d], rows[r], n_x);
    check_tile_int8(c, 20000, 3, k->tile_int8_rows);
    check_tile_int8(c, 100, 130, k->tile_int8_rows);
}

// ---- operations
// -------------------------------------------------------------------------------------

typedef struct {
    hb_view view;
    float *values; // what the elements are, row-major
} tensor;

// A matrix view [rows, cols] (with a dimension of 1 in front now and then) over fresh memory;
// strided every third time. Elements: `scale` * normal, rounded to dtype, or unset when scale is 0.
static tensor make(check *c, int ndim, int64_t rows, int64_t cols, hb_dtype dtype, float scale)
{
    const bool strided = check_random_below(c, 3) == 0;
    const int64_t col_stride = strided ? 1 + check_random_below(c, 2) : 1;
    const int64_t row_stride = cols * col_stride + (strided ? check_random_below(c, 5) : 0);
    const size_t item = hb_dtype_bytes(dtype);
    int64_t extent =
        rows > 0 && cols > 0 ? (rows - 1) * row_stride + (cols - 1) * col_stride + 1 : 0;
    tensor t = {.view = {.dtype = dtype, .device = {HB_CPU, 0, NULL}, .ndim = 2}};
    t.view.data = check_buffer(c, (size_t)extent * item, CHECK_END);
    t.view.shape[0] = rows, t.view.shape[1] = cols;
    t.view.stride[0] = row_stride, t.view.stride[1] = col_stride;
    if (ndim == 3) {
        t.view.ndim = 3;
        t.view.shape[2] = cols, t.view.stride[2] = col_stride;
        t.view.shape[1] = rows, t.view.stride[1] = row_stride;
        t.view.shape[0] = 1, t.view.stride[0] = 12345;
    }
    t.values = check_buffer(c, (size_t)(rows * cols) * sizeof(float), CHECK_END);
    for (int64_t i = 0; i < rows * cols && scale != 0; i++) {
        int64_t at = i / cols * row_stride + i % cols * col_stride;
        hb_store_f32(t.view.data, at, dtype, check_random_normal(c) * scale);
        t.values[i] = hb_load_f32(t.view.data, at, dtype);
    }
    return t;
}

static float element_of(const tensor *t, int64_t row, int64_t col)
{
    const int last = t->view.ndim - 1;
    return hb_load_f32(t->view.data, row * t->view.stride[last - 1] + col * t->view.stride[last],
                       t->view.dtype);
}

// Half a unit in the last place of the number that `value` is rounded to.
static double rounding(double value, hb_dtype dtype)
{
    if (dtype == HB_F32) return fabs(value) * U + 0x1p-150;
    if (dtype == HB_BF16) return fabs(value) * 0x1p-8 + 0x1p-134;
    return fabs(value) * 0x1p-11 + 0x1p-25;
}

typedef struct {
    int64_t m, rows, depth;
    tensor x, y, bias;
    int8_t *codes;
    float *scale;
} layer;

static layer make_layer(check *c, hb_dtype dtype, bool backward)
{
    const int64_t big = c->emulated ? 60 : 300;
    layer l = {.m = check_random_below(c, 4) == 0
                        ? 1 + check_random_below(c, c->emulated ? 45 : 130)
                        : 1 + check_random_below(c, 12),
               .rows = 1 + check_random_below(c, big / 2),
               .depth = check_random_below(c, big + 150)};
    const int ndim = check_random_below(c, 4) == 0 ? 3 : 2;
    l.x = make(c, ndim, l.m, backward ? l.rows : l.depth, dtype, 1.0f);
    l.y = make(c, ndim, l.m, backward ? l.depth : l.rows, dtype, 0.0f);
    l.bias = make(c, 2, 1, l.rows, (hb_dtype)check_random_below(c, HB_IO_COUNT), 1.0f);
    l.bias.view.shape[0] = l.bias.view.shape[1];
    l.bias.view.stride[0] = l.bias.view.stride[1];
    l.bias.view.ndim = 1;
    l.codes = check_buffer(c, (size_t)(l.rows * l.depth), CHECK_END);
    l.scale = check_buffer(c, (size_t)l.rows * sizeof(float), CHECK_END);
    check_fill_codes(c, l.codes, l.rows * l.depth);
    for (int64_t r = 0; r < l.rows; r++) l.scale[r] = fabsf(check_random_normal(c));
    return l;
}

static double weight(const layer *l, int64_t r, int64_t k)
{
    return (double)l->codes[r * l->depth + k] * (double)l->scale[r] / 127.0;
}

static void compare(check *c, const layer *l, int64_t m, int64_t out, double want, double bound)
{
    const float got = element_of(&l->y, m, out);
    bound += rounding(fabs(want) + bound, l->y.view.dtype);
    check_close(c, &got, &want, &bound, 1, "y[%d, %d]", (int)m, (int)out);
}

// c in |err| <= c u sum |products| of the panel regime, as kernels_linear4.h states it, or of the
// dot.
static double sum_constant(const check *c, int64_t steps)
{
    const double panel = c->kernels->linear4.f32.panel_steps;
    const double in_panels = fmin(panel, (double)steps) + (double)steps / panel + 3;
    return fmax(in_panels, (double)steps / 8 + 16);
}

static void check_exact(check *c, hb_dtype dtype)
{
    layer l = make_layer(c, dtype, false);
    const bool with_bias = check_random_below(c, 2);
    check_label(c, "exact %s, x [%d, %d], %d rows", hb_dtype_name(dtype), (int)l.m, (int)l.depth,
                (int)l.rows);
    hb_error error = {""};
    hb_status status = hb_linear_8bit(c->context, &l.x.view, l.codes, l.scale, l.rows, l.depth,
                                      with_bias ? &l.bias.view : NULL, HB_INT8_EXACT, 0.0f,
                                      &l.y.view, NULL, &error);
    CHECK(c, status == HB_OK, "status %d: %s", status, error.text);
    for (int64_t m = 0; m < l.m; m++)
        for (int64_t r = 0; r < l.rows; r++) {
            double want = 0, magnitude = 0;
            for (int64_t k = 0; k < l.depth; k++) {
                double product = weight(&l, r, k) * (double)l.x.values[m * l.depth + k];
                want += product, magnitude += fabs(product);
            }
            // The sum, then 1/127, its product with the scale, that with the sum, and the bias.
            double bound = (sum_constant(c, l.depth) + 3) * U * magnitude;
            if (with_bias) want += (double)l.bias.values[r], bound += U * (fabs(want) + bound);
            compare(c, &l, m, r, want, bound);
        }
    check_release(c);
}

static void check_grad(check *c, hb_dtype dtype)
{
    layer l = make_layer(c, dtype, true);
    check_label(c, "grad %s, dy [%d, %d], depth %d", hb_dtype_name(dtype), (int)l.m, (int)l.rows,
                (int)l.depth);
    hb_error error = {""};
    hb_status status = hb_linear_8bit_grad_input(c->context, &l.x.view, l.codes, l.scale, l.rows,
                                                 l.depth, &l.y.view, NULL, &error);
    CHECK(c, status == HB_OK, "status %d: %s", status, error.text);
    for (int64_t m = 0; m < l.m; m++)
        for (int64_t k = 0; k < l.depth; k++) {
            double want = 0, magnitude = 0;
            for (int64_t r = 0; r < l.rows; r++) {
                double product = weight(&l, r, k) * (double)l.x.values[m * l.rows + r];
                want += product, magnitude += fabs(product);
            }
            compare(c, &l, m, k, want, (sum_constant(c, l.rows) + 3) * U * magnitude);
        }
    check_release(c);
}

static void check_dynamic(check *c, hb_dtype dtype, float threshold)
{
    layer l = make_layer(c, dtype, false);
    const bool with_bias = check_random_below(c, 2);
    const int64_t n_outliers = threshold > 0 && l.depth > 0 ? check_random_below(c, 20) : 0;
    for (int64_t i = 0; i < n_outliers; i++) {
        const int64_t m = check_random_below(c, l.m), k = check_random_below(c, l.depth);
        const int last = l.x.view.ndim - 1;
        hb_store_f32(l.x.view.data, m * l.x.view.stride[last - 1] + k * l.x.view.stride[last],
                     dtype, i % 5 == 0 ? threshold : threshold * 3 * check_random_normal(c));
        l.x.values[m * l.depth + k] = element_of(&l.x, m, k);
    }
    check_label(c, "dynamic %s, x [%d, %d], %d rows, threshold %g, %d outliers",
                hb_dtype_name(dtype), (int)l.m, (int)l.depth, (int)l.rows, (double)threshold,
                (int)n_outliers);
    hb_error error = {""};
    hb_status status = hb_linear_8bit(c->context, &l.x.view, l.codes, l.scale, l.rows, l.depth,
                                      with_bias ? &l.bias.view : NULL, HB_INT8_DYNAMIC, threshold,
                                      &l.y.view, NULL, &error);
    CHECK(c, status == HB_OK, "status %d: %s", status, error.text);

    int8_t *x_codes = malloc((size_t)(l.m * l.depth + 1));
    float *x_scale = malloc((size_t)l.m * sizeof *x_scale);
    uint8_t *columns = calloc((size_t)l.depth + 1, 1);
    hb_context plain = {.kernels = *c->reference};
    status = hb_quantize_rows_int8(&plain, &l.x.view, threshold, x_codes, x_scale, columns, &error);
    CHECK(c, status == HB_OK, "status %d: %s", status, error.text);
    for (int64_t m = 0; m < l.m; m++)
        for (int64_t r = 0; r < l.rows; r++) {
            double outliers = 0, magnitude = 0;
            int64_t sum = 0; // exact: a bound relative to it holds where it is zero
            for (int64_t k = 0; k < l.depth; k++) {
                const float value = l.x.values[m * l.depth + k];
                sum += l.codes[r * l.depth + k] * x_codes[m * l.depth + k];
                // One row: only the elements; more: whole columns are taken out of the integer
                // product.
                if (!columns[k] || (l.m == 1 && !(fabsf(value) >= threshold))) continue;
                outliers += weight(&l, r, k) * (double)value;
                magnitude += fabs(weight(&l, r, k) * (double)value);
            }
            double want = (double)sum * ((double)l.scale[r] / 127.0) * ((double)x_scale[m] / 127.0);
            // int32 to float, 1/127 twice, and five products and sums.
            double bound =
                8 * U * (fabs(want) + magnitude) + sum_constant(c, l.depth) * U * magnitude;
            want += outliers;
            if (with_bias) want += (double)l.bias.values[r], bound += U * (fabs(want) + bound);
            compare(c, &l, m, r, want, bound);
        }
    free(x_codes);
    free(x_scale);
    free(columns);
    check_release(c);
}

static void check_matmul(check *c, int64_t m, int64_t n, int64_t depth)
{
    check_label(c, "matmul_int8 %d x %d x %d", (int)m, (int)n, (int)depth);
    int8_t *a = check_buffer(c, (size_t)(m * depth), CHECK_END);
    int8_t *b = check_buffer(c, (size_t)(n * depth), CHECK_END);
    int32_t *got = check_buffer(c, (size_t)(m * n) * sizeof *got, CHECK_END);
    int32_t *want = check_buffer(c, (size_t)(m * n) * sizeof *want, CHECK_END);
    check_fill_codes(c, a, m * depth);
    check_fill_codes(c, b, n * depth);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            int64_t sum = 0;
            for (int64_t k = 0; k < depth; k++) sum += a[i * depth + k] * b[j * depth + k];
            want[i * n + j] = (int32_t)sum;
        }
    hb_error error = {""};
    CHECK(c,
          hb_matmul_int8(c->context, &(hb_device){.type = HB_CPU}, depth > 0 ? a : NULL,
                         depth > 0 ? b : NULL, m, n, depth, got, &error) == HB_OK,
          "%s", error.text);
    check_equal(c, got, want, (size_t)(m * n) * sizeof *got, "matmul_int8");
    check_release(c);
}

CHECK_GROUP(linear8)
{
    if (c->bench) return;
    const int rounds = c->emulated ? 4 : 25;
    const float thresholds[] = {0.0f, 2.5f, 6.0f};
    for (int i = 0; i < rounds; i++) {
        hb_pool_set_threads(c->context->pool, 1 + i % 4);
        for (int dtype = 0; dtype < HB_IO_COUNT; dtype++) {
            check_exact(c, (hb_dtype)dtype);
            check_grad(c, (hb_dtype)dtype);
            check_dynamic(c, (hb_dtype)dtype, thresholds[i % 3]);
        }
        check_matmul(c, check_random_below(c, 20), check_random_below(c, 150),
                     check_random_below(c, 300));
    }
    if (!c->emulated) {
        check_matmul(c, 2, 3, HB_INT8_MAX_DEPTH);
        check_matmul(c, 70, 130, 257);
    }
    check_matmul(c, 3, 5, 0); // without memory for elements
    const hb_kernels_linear8 *k = &c->kernels->linear8;
    const int starts[] = {k->tile_int8_from, k->pairs.from};
    for (int i = 0; i < 2; i++) { // around the first row and the second tile
        const int many = starts[i];
        if (many == 0) continue;
        check_matmul(c, many - 1, 40, 130);
        check_matmul(c, many, 40, 130);
        check_matmul(c, many + 1, 40, 130);
        check_matmul(c, 2 * many + 1, 5, 0);
    }
}

// Large enough to be split: the same bits on any number of threads.
CHECK_GROUP(linear8_threads)
{
    if (c->bench) return;
    enum { M = 50, ROWS = 200, DEPTH = 1000 };
    const int64_t m_sizes[] = {1, 5, M};
    float *x = check_buffer(c, M * DEPTH * sizeof *x, CHECK_END);
    float *y[2] = {check_buffer(c, M * DEPTH * sizeof *x, CHECK_END),
                   check_buffer(c, M * DEPTH * sizeof *x, CHECK_END)};
    int8_t *codes = check_buffer(c, ROWS * DEPTH, CHECK_END);
    float scale[ROWS];
    check_fill_codes(c, codes, ROWS * DEPTH);
    check_fill_normal(c, x, M * DEPTH, 2.0f);
    check_fill_normal(c, scale, ROWS, 1.0f);
    hb_error error = {""};
    for (int i = 0; i < 3; i++)
        for (int kind = 0; kind < 4; kind++)
            for (int threads = 1; threads <= (c->emulated ? 2 : 4); threads++) {
                const int64_t m = m_sizes[i];
                check_label(c, "kind %d, %d rows of x, %d threads", kind, (int)m, threads);
                hb_pool_set_threads(c->context->pool, threads);
                const bool backward = kind == 3;
                hb_view a = {x,
                             HB_F32,
                             {HB_CPU, 0, NULL},
                             2,
                             false,
                             {m, backward ? ROWS : DEPTH},
                             {backward ? ROWS : DEPTH, 1}};
                hb_view b = {y[threads > 1],
                             HB_F32,
                             {HB_CPU, 0, NULL},
                             2,
                             false,
                             {m, backward ? DEPTH : ROWS},
                             {backward ? DEPTH : ROWS, 1}};
                memset(b.data, 0, (size_t)hb_view_numel(&b) * sizeof(float));
                hb_status status =
                    backward ? hb_linear_8bit_grad_input(c->context, &a, codes, scale, ROWS, DEPTH,
                                                         &b, NULL, &error)
                             : hb_linear_8bit(c->context, &a, codes, scale, ROWS, DEPTH, NULL,
                                              kind == 0 ? HB_INT8_EXACT : HB_INT8_DYNAMIC,
                                              kind == 2 ? 5.0f : 0.0f, &b, NULL, &error);
                CHECK(c, status == HB_OK, "%s", error.text);
                if (threads > 1)
                    check_equal(c, y[1], y[0], (size_t)hb_view_numel(&b) * sizeof(float), "bits");
            }
}

CHECK_GROUP_ONCE(linear8_errors)
{
    float data[64] = {0};
    int8_t codes[64] = {0};
    hb_error error;
    hb_view x = {data, HB_F32, {HB_CPU, 0, NULL}, 2, false, {2, 4}, {4, 1}};
    hb_view y = {data, HB_F32, {HB_CPU, 0, NULL}, 2, false, {2, 3}, {3, 1}};
    hb_view bias = {data, HB_F32, {HB_CPU, 0, NULL}, 1, false, {2}, {1}};
    hb_view wrong = x;
    wrong.dtype = HB_F64;
    CHECK(c,
          hb_linear_8bit(c->context, &wrong, codes, data, 3, 4, NULL, HB_INT8_EXACT, 0, &y, NULL,
                         &error) == HB_ERR_TYPE,
          "dtype");
    CHECK(c,
          hb_linear_8bit(c->context, &x, codes, data, 3, 5, NULL, HB_INT8_EXACT, 0, &y, NULL,
                         &error) == HB_ERR_VALUE,
          "depth");
    CHECK(c, strstr(error.text, "depth 4") != NULL, "%s", error.text);
    CHECK(c,
          hb_linear_8bit(c->context, &x, codes, data, 3, 4, &bias, HB_INT8_EXACT, 0, &y, NULL,
                         &error) == HB_ERR_VALUE,
          "bias");
    CHECK(c,
          hb_linear_8bit(c->context, &x, codes, data, 3, 4, NULL, HB_INT8_DYNAMIC, -1.0f, &y, NULL,
                         &error) == HB_ERR_VALUE,
          "threshold");
    CHECK(c,
          hb_linear_8bit(c->context, &x, NULL, data, 3, 4, NULL, HB_INT8_EXACT, 0, &y, NULL,
                         &error) == HB_ERR_VALUE,
          "codes");
    y.readonly = true;
    CHECK(c,
          hb_linear_8bit(c->context, &x, codes, data, 3, 4, NULL, HB_INT8_EXACT, 0, &y, NULL,
                         &error) == HB_ERR_BUFFER,
          "read-only");
    CHECK(c,
          hb_matmul_int8(c->context, &(hb_device){.type = HB_CPU}, codes, codes, 1, 1,
                         HB_INT8_MAX_DEPTH + 1, (int32_t *)(void *)data, &error) == HB_ERR_VALUE,
          "depth");
    CHECK(c,
          hb_matmul_int8(c->context, &(hb_device){.type = HB_CPU}, codes, codes, -1, 1, 1,
                         (int32_t *)(void *)data, &error) == HB_ERR_VALUE,
          "negative");
}
