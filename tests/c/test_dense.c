// Products with plain weights: each kernel against double, then the operation with strides, bias
// and many rows of x.
#include "check.h"

#include <math.h>
#include <stdlib.h>

static const double U = 0x1p-24;

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

// What kernels_dense.h promises for a sum of `depth` products of these magnitudes. Subnormal
// elements do not occur in these tests but where they are meant.
static double sum_bound(int64_t depth, double magnitude)
{
    return ((double)depth / 8 + 16) * U * magnitude;
}

// ---- kernels
// --------------------------------------------------------------------------------------

typedef struct {
    hb_dtype io;
    int64_t depth, n_rows, w_stride, x_stride, y_stride;
    int n_x;
    void *w, *x;
    float *y;
} kernel_case;

// Rows that end at an unreadable page: the last one really does, so each length of its end counts.
static kernel_case make_case(check *c, hb_dtype io, int64_t depth, int64_t n_rows, int n_x)
{
    const size_t item = hb_dtype_bytes(io);
    kernel_case k = {.io = io, .depth = depth, .n_rows = n_rows, .n_x = n_x};
    k.w_stride = depth + check_random_below(c, 2) * 5;
    k.x_stride = depth + check_random_below(c, 2) * 3;
    k.y_stride = n_rows + check_random_below(c, 3);
    const int64_t w_size = n_rows > 0 ? (n_rows - 1) * k.w_stride + depth : 0;
    const int64_t x_size = (n_x - 1) * k.x_stride + depth;
    k.w = check_buffer(c, (size_t)w_size * item, CHECK_END);
    k.x = check_buffer(c, (size_t)x_size * item, CHECK_END);
    k.y = check_buffer(c, (size_t)((n_x - 1) * k.y_stride + n_rows) * sizeof *k.y, CHECK_END);
    for (int64_t i = 0; i < w_size; i++) hb_store_f32(k.w, i, io, check_random_normal(c));
    for (int64_t i = 0; i < x_size; i++) hb_store_f32(k.x, i, io, 3 * check_random_normal(c));
    check_label(c, "%s, depth %d, %d rows, %d x", hb_dtype_name(io), (int)depth, (int)n_rows, n_x);
    return k;
}

static const void *row_of(const kernel_case *k, const void *base, int64_t stride, int64_t row)
{
    return (const char *)base + row * stride * (int64_t)hb_dtype_bytes(k->io);
}

static void run_case(check *c, const kernel_case *k)
{
    c->kernels->dense.dot[k->io](k->w, k->w_stride, k->n_rows, k->depth, k->x, k->x_stride, k->n_x,
                                 k->y, k->y_stride);
}

static void check_dot(check *c, hb_dtype io, int64_t depth, int64_t n_rows, int n_x)
{
    const kernel_case k = make_case(c, io, depth, n_rows, n_x);
    float *alone = check_buffer(c, (size_t)n_x * sizeof *alone, CHECK_END);
    const int64_t n_y = (n_x - 1) * k.y_stride + n_rows;
    for (int64_t i = 0; i < n_y; i++) k.y[i] = 77.0f;
    run_case(c, &k);
    for (int64_t i = 0; i < n_y; i++)
        if (i % k.y_stride >= n_rows) CHECK(c, k.y[i] == 77.0f, "between rows of y at %d", (int)i);
    for (int64_t r = 0; r < n_rows; r++) {
        c->kernels->dense.dot[io](row_of(&k, k.w, k.w_stride, r), k.w_stride, 1, depth, k.x,
                                  k.x_stride, n_x, alone, 1);
        for (int t = 0; t < n_x; t++) {
            double want = 0, magnitude = 0;
            for (int64_t i = 0; i < depth; i++) {
                const double product = (double)hb_load_f32(k.w, r * k.w_stride + i, io) *
                                       (double)hb_load_f32(k.x, t * k.x_stride + i, io);
                want += product;
                magnitude += fabs(product);
            }
            const double bound = sum_bound(depth, magnitude);
            const float *y = &k.y[t * k.y_stride + r];
            check_close(c, y, &want, &bound, 1, "dot [%d, %d]", t, (int)r);
            check_equal(c, y, &alone[t], sizeof *y, "rows together and alone");
        }
    }
    check_release(c);
}

// One element that is not finite, in W or in x, at any place: it must come out there, only there.
static void check_nonfinite(check *c, hb_dtype io, int64_t depth, int n_x)
{
    const int64_t n_rows = 5;
    const kernel_case k = make_case(c, io, depth, n_rows, n_x);
    const bool in_w = check_random_below(c, 2);
    const int64_t row = check_random_below(c, in_w ? n_rows : n_x);
    const int64_t at = check_random_below(c, depth);
    const float value = check_random_below(c, 2) ? NAN : INFINITY;
    hb_store_f32(in_w ? k.w : k.x, row * (in_w ? k.w_stride : k.x_stride) + at, io, value);
    run_case(c, &k);
    for (int t = 0; t < n_x; t++)
        for (int64_t r = 0; r < n_rows; r++) {
            const float y = k.y[t * k.y_stride + r];
            const bool hit = row == (in_w ? r : t);
            CHECK(c, isfinite(y) == !hit, "%g at %d of row %d of %s gives %g at [%d, %d]",
                  (double)value, (int)at, (int)row, in_w ? "W" : "x", (double)y, t, (int)r);
            if (hit && isinf(value)) {
                const float w = hb_load_f32(k.w, r * k.w_stride + at, io);
                const float x = hb_load_f32(k.x, t * k.x_stride + at, io);
                CHECK(c, y == w * x || isnan(w * x), "%g times %g gives %g", (double)w, (double)x,
                      (double)y);
            }
        }
    check_release(c);
}

// Subnormal elements: exact, or zero where hardware dot products take them so.
static void check_subnormal(check *c, hb_dtype io)
{
    const float tiny = io == HB_F16 ? 0x1p-24f : io == HB_BF16 ? 0x1p-133f : 0x1p-149f;
    const float large = io == HB_F16 ? 0x1p10f : 0x1p100f;
    const bool hardware = io == HB_BF16 && (c->flags & HB_CPU_AVX512BF16);
    kernel_case k = make_case(c, io, 70, 2, 1);
    for (int64_t i = 0; i < 70; i++) {
        for (int r = 0; r < 2; r++) hb_store_f32(k.w, r * k.w_stride + i, io, 3 * tiny);
        hb_store_f32(k.x, i, io, large);
    }
    run_case(c, &k);
    const float want = 210 * tiny * large;
    for (int r = 0; r < 2; r++)
        CHECK(c, k.y[r] == want || (hardware && k.y[r] == 0), "subnormal %s: %g, expected %g",
              hb_dtype_name(io), (double)k.y[r], (double)want);
    check_release(c);
}

static void bench_kernels(check *c, hb_dtype io)
{
    enum { ROWS = 32, DEPTH = 4096 };
    static const char *const names[HB_IO_COUNT][3] = {
        {"dense f32, 1 row, L2", "dense f32, 4 rows, L2", "dense f32, 8 rows, L2"},
        {"dense bf16, 1 row, L2", "dense bf16, 4 rows, L2", "dense bf16, 8 rows, L2"},
        {"dense f16, 1 row, L2", "dense f16, 4 rows, L2", "dense f16, 8 rows, L2"}};
    const kernel_case k = make_case(c, io, DEPTH, ROWS, c->kernels->dense.rows);
    const double products = ROWS * DEPTH, bytes = products * (double)hb_dtype_bytes(io);
    for (int i = 0; i < 3; i++) {
        const int n_x = i == 0 ? 1 : 4 * i;
        if (n_x > c->kernels->dense.rows) continue;
        CHECK_BENCH(c, b, names[io][i], bytes, 2 * products * n_x)
        c->kernels->dense.dot[io](k.w, k.w_stride, ROWS, DEPTH, k.x, k.x_stride, n_x, k.y,
                                  k.y_stride);
    }
    check_release(c);
}

CHECK_GROUP(dense_kernels)
{
    const int64_t depths[] = {0,   1,   2,    7,    8,    9,    15,   16,  17,  31,
                              32,  33,  47,   63,   64,   65,   96,   127, 128, 129,
                              200, 512, 1000, 1023, 1024, 1025, 1088, 2100};
    const int64_t rows[] = {0, 1, 2, 3, 5, 64};
    const int n_depths = sizeof depths / sizeof *depths, n_rows = sizeof rows / sizeof *rows;
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, dense.dot[io])) continue;
        if (c->bench) {
            bench_kernels(c, io);
            continue;
        }
        for (int n_x = 1; n_x <= c->kernels->dense.rows; n_x++) {
            for (int d = 0; d < n_depths; d++)
                for (int r = 0; r < n_rows; r++)
                    if ((!c->emulated || (d + r + n_x) % 5 == 0) && depths[d] * rows[r] < 70000)
                        check_dot(c, io, depths[d], rows[r], n_x);
            for (int i = 0; i < (c->emulated ? 4 : 20); i++)
                check_nonfinite(c, io, 1 + check_random_below(c, 150), n_x);
        }
        check_subnormal(c, io);
    }
}

// ---- the operation
// ----------------------------------------------------------------------------------

typedef struct {
    hb_view view;
    float *values; // what the elements are, row-major
} tensor;

static int64_t step_of(check *c)
{
    static const int64_t steps[] = {1, 1, 1, 2, 3, -1};
    return steps[check_random_below(c, sizeof steps / sizeof *steps)];
}

// [rows, cols], or [2, rows / 2, cols] when rows are even and `deep`; with strides of any sign
// inside fresh memory that ends at an unreadable page. scale 0: nothing is filled in.
static tensor make(check *c, int64_t rows, int64_t cols, hb_dtype dtype, int64_t col_step,
                   bool deep, float scale)
{
    const int64_t width = llabs(col_step), row_step = cols * width + check_random_below(c, 3);
    const size_t item = hb_dtype_bytes(dtype);
    const int64_t size = rows > 0 && cols > 0 ? (rows - 1) * row_step + (cols - 1) * width + 1 : 0;
    char *memory = check_buffer(c, (size_t)size * item, CHECK_END);
    if (scale == 0) memset(memory, 0x5a, (size_t)size * item);
    const int64_t first = col_step < 0 && cols > 0 ? (cols - 1) * width : 0;
    tensor t = {.view = {.data = memory + first * (int64_t)item,
                         .dtype = dtype,
                         .device = {HB_CPU, 0, NULL},
                         .ndim = 2,
                         .shape = {rows, cols},
                         .stride = {row_step, col_step}}};
    t.values = check_buffer(c, (size_t)(rows * cols) * sizeof(float), CHECK_END);
    for (int64_t i = 0; i < rows * cols && scale != 0; i++) {
        const int64_t at = i / cols * row_step + i % cols * col_step;
        hb_store_f32(t.view.data, at, dtype, scale * check_random_normal(c));
        t.values[i] = hb_load_f32(t.view.data, at, dtype);
    }
    if (deep && rows % 2 == 0) {
        t.view.ndim = 3;
        t.view.shape[0] = 2, t.view.shape[1] = rows / 2, t.view.shape[2] = cols;
        t.view.stride[0] = rows / 2 * row_step, t.view.stride[1] = row_step;
        t.view.stride[2] = col_step;
    }
    return t;
}

// Half a unit in the last place of the number that `value` is rounded to.
static double rounding(double value, hb_dtype dtype)
{
    if (dtype == HB_F32) return fabs(value) * U + 0x1p-150;
    if (dtype == HB_BF16) return fabs(value) * 0x1p-8 + 0x1p-134;
    return fabs(value) * 0x1p-11 + 0x1p-25;
}

static void check_operation(check *c, hb_dtype io, int64_t m, int64_t rows, int64_t depth)
{
    const bool deep = check_random_below(c, 2), with_bias = check_random_below(c, 2);
    const int64_t x_step = step_of(c), y_step = step_of(c);
    const tensor x = make(c, m, depth, io, x_step, deep, 1.0f);
    const tensor w = make(c, rows, depth, io, 1, false, 1.0f);
    const tensor y = make(c, m, rows, io, y_step, deep, 0.0f);
    tensor bias =
        make(c, 1, rows, (hb_dtype)check_random_below(c, HB_IO_COUNT), step_of(c), false, 1.0f);
    bias.view.ndim = 1;
    bias.view.shape[0] = rows, bias.view.stride[0] = bias.view.stride[1];
    check_label(c, "%s, x [%d, %d], %d rows, steps %d and %d, %d dimensions", hb_dtype_name(io),
                (int)m, (int)depth, (int)rows, (int)x_step, (int)y_step, x.view.ndim);
    hb_error error = {""};
    const hb_status status = hb_linear_dense(c->context, &x.view, &w.view,
                                             with_bias ? &bias.view : NULL, &y.view, &error);
    CHECK(c, status == HB_OK, "status %d: %s", status, error.text);
    const hb_view *v = &y.view;
    for (int64_t t = 0; t < m; t++)
        for (int64_t r = 0; r < rows; r++) {
            double want = with_bias ? (double)bias.values[r] : 0, magnitude = 0;
            for (int64_t i = 0; i < depth; i++) {
                const double product =
                    (double)w.values[r * depth + i] * (double)x.values[t * depth + i];
                want += product;
                magnitude += fabs(product);
            }
            double bound = sum_bound(depth, magnitude) * (1 + U) + (with_bias ? U * fabs(want) : 0);
            bound += rounding(fabs(want) + bound, io);
            int64_t at = t * v->stride[0];
            if (v->ndim == 3) at = t / v->shape[1] * v->stride[0] + t % v->shape[1] * v->stride[1];
            const float got = hb_load_f32(v->data, at + r * v->stride[v->ndim - 1], io);
            check_close(c, &got, &want, &bound, 1, "y[%d, %d]", (int)t, (int)r);
        }
    check_release(c);
}

// Parts of a large product on one and on all threads: the same bits.
static void check_threads(check *c)
{
    enum { ROWS = 700, DEPTH = 900, M = 3 };
    const int before = hb_pool_threads(c->context->pool);
    const tensor x = make(c, M, DEPTH, HB_F32, 1, false, 1.0f);
    const tensor w = make(c, ROWS, DEPTH, HB_F32, 1, false, 1.0f);
    float *y[2];
    hb_error error = {""};
    for (int i = 0; i < 2; i++) {
        y[i] = check_buffer(c, M * ROWS * sizeof **y, CHECK_END);
        const hb_view view = {y[i], HB_F32, {HB_CPU, 0, NULL}, 2, false, {M, ROWS}, {ROWS, 1}};
        hb_pool_set_threads(c->context->pool, i == 0 ? 1 : 3);
        const hb_status status = hb_linear_dense(c->context, &x.view, &w.view, NULL, &view, &error);
        CHECK(c, status == HB_OK, "status %d: %s", status, error.text);
    }
    hb_pool_set_threads(c->context->pool, before);
    check_equal(c, y[1], y[0], M * ROWS * sizeof **y, "three threads and one");
    check_release(c);
}

static void check_errors(check *c)
{
    const tensor x = make(c, 2, 8, HB_F32, 1, false, 1.0f),
                 w = make(c, 3, 8, HB_F32, 1, false, 1.0f);
    const tensor y = make(c, 2, 3, HB_F32, 1, false, 1.0f);
    const struct {
        const char *text;
        hb_status status;
        int what;
    } cases[] = {
        {"linear_dense: x has depth 7, weight has 8", HB_ERR_VALUE, 0},
        {"linear_dense: y has columns 2, weight has 3", HB_ERR_VALUE, 1},
        {"linear_dense: x, expected the dtype of the weight, float32, got bfloat16", HB_ERR_TYPE,
         2},
        {"linear_dense: y, expected the dtype of the weight, float32, got float16", HB_ERR_TYPE, 3},
        {"linear_dense: weight, expected contiguous rows, got a stride of 2", HB_ERR_VALUE, 4},
        {"linear_dense: weight, expected shape [rows, depth], got 1 dimensions", HB_ERR_VALUE, 5},
        {"linear_dense: weight, expected float32, bfloat16 or float16, got int8", HB_ERR_TYPE, 6},
        {"linear_dense: bias, expected shape [3], got 1 dimensions of 2 elements", HB_ERR_VALUE, 7},
        {"linear_dense: y, expected writable memory, got read-only", HB_ERR_BUFFER, 8},
        {"linear_dense: x, expected memory of the CPU, got CUDA", HB_ERR_DEVICE, 9},
        {"linear_dense: weight, expected memory of the CPU, got CUDA", HB_ERR_DEVICE, 10},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        hb_view a = x.view, b = w.view, out = y.view;
        hb_view bias = {w.view.data, HB_F32, {HB_CPU, 0, NULL}, 1, false, {2}, {1}};
        switch (cases[i].what) {
        case 0: a.shape[1] = 7; break;
        case 1: out.shape[1] = 2; break;
        case 2: a.dtype = HB_BF16; break;
        case 3: out.dtype = HB_F16; break;
        case 4: b.stride[1] = 2; break;
        case 5: b.ndim = 1; break;
        case 6: b.dtype = HB_I8; break;
        case 8: out.readonly = true; break;
        case 9: a.device.type = out.device.type = b.device.type = HB_CUDA; break;
        case 10: b.device.type = HB_CUDA; break;
        default: break;
        }
        if (cases[i].what == 9 || cases[i].what == 10) { // contiguous, as memory of CUDA must be
            a.stride[0] = b.stride[0] = 8;
            out.stride[0] = 3;
        }
        hb_error error = {""};
        const hb_status status =
            hb_linear_dense(c->context, &a, &b, cases[i].what == 7 ? &bias : NULL, &out, &error);
        CHECK(c, status == cases[i].status && strcmp(error.text, cases[i].text) == 0,
              "status %d, \"%s\", expected \"%s\"", status, error.text, cases[i].text);
    }
    check_release(c);
}

CHECK_GROUP(dense_operation)
{
    if (c->bench) return;
    for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
        if (!CHECK_NEW(c, dense.dot[io])) continue;
        for (int i = 0; i < (c->emulated ? 12 : 120); i++)
            check_operation(c, io, check_random_below(c, i % 4 ? 10 : 40),
                            check_random_below(c, 150),
                            i % 8 ? check_random_below(c, 80) : least(i * 40, 3000));
    }
    if (CHECK_NEW(c, dense.dot[HB_F32])) check_threads(c);
    check_errors(c);
}
