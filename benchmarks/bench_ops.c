// The operations of core/ops.h on a 4096 x 4096 weight, on one and two threads. "cold": each call
// uses another copy of the weight, together far larger than the caches, as a model's layers are.
// GB/s counts the bytes that must move: weights, scales, float inputs and outputs.
#include "check.h"

#include <stdio.h>
#include <stdlib.h>

enum {
    SIZE = 4096,
    ELEMENTS = SIZE * SIZE,
    BLOCKSIZE = 64,
    COLD_BYTES = 160 << 20,
    MAX_ROWS = 512
};

static hb_view view_of(void *data, hb_dtype dtype, int64_t rows, int64_t cols)
{
    hb_view view = {.data = data, .dtype = dtype, .device = {HB_CPU, 0, NULL}, .ndim = 2};
    view.shape[0] = rows, view.shape[1] = cols, view.stride[0] = cols, view.stride[1] = 1;
    return view;
}

typedef struct {
    check *c;
    uint8_t *weights; // copies of one weight, behind one another
    int64_t weight_bytes;
    int n_copies;
    float *scales; // [copies][blocks or rows]
    int64_t n_scales;
    void *x, *y; // [MAX_ROWS, SIZE] float32
    float map[256];
} setup;

static bool open_setup(setup *s, check *c, int64_t weight_bytes, int64_t n_scales)
{
    *s = (setup){.c = c, .weight_bytes = weight_bytes, .n_scales = n_scales};
    s->n_copies = (int)(COLD_BYTES / (weight_bytes + n_scales * 4)) + 1;
    s->weights = aligned_alloc(4096, (size_t)(s->n_copies * weight_bytes));
    s->scales = aligned_alloc(4096, (size_t)(s->n_copies * n_scales) * sizeof *s->scales);
    s->x = aligned_alloc(4096, (size_t)MAX_ROWS * SIZE * 4);
    s->y = aligned_alloc(4096, (size_t)MAX_ROWS * SIZE * 4);
    if (!s->weights || !s->scales || !s->x || !s->y) return false;
    check_fill_bytes(c, s->weights, (size_t)weight_bytes);
    for (int i = 1; i < s->n_copies; i++)
        memcpy(s->weights + i * weight_bytes, s->weights, (size_t)weight_bytes);
    for (int64_t i = 0; i < s->n_copies * n_scales; i++) s->scales[i] = 0.02f;
    check_fill_normal(c, s->x, (int64_t)MAX_ROWS * SIZE, 1.0f);
    return true;
}

static void close_setup(setup *s)
{
    free(s->weights);
    free(s->scales);
    free(s->x);
    free(s->y);
}

static hb_tensor4 tensor4_of(const setup *s, int copy)
{
    const int i = copy % s->n_copies;
    return (hb_tensor4){.format = HB_NF4,
                        .blocksize = BLOCKSIZE,
                        .numel = ELEMENTS,
                        .rows = SIZE,
                        .depth = SIZE,
                        .packed = s->weights + i * s->weight_bytes,
                        .absmax = s->scales + i * s->n_scales};
}

// The same with nested scales: the bytes of the float32 scales serve as codes.
static hb_tensor4 nested4_of(setup *s, int copy)
{
    hb_tensor4 w = tensor4_of(s, copy);
    hb_map8_fill(HB_MAP_DYNAMIC, s->map);
    w.absmax_codes = (const uint8_t *)w.absmax;
    w.absmax = NULL;
    w.nested_absmax = s->scales;
    w.nested_map = s->map;
    w.nested_blocksize = 256;
    w.nested_offset = 0.02f;
    return w;
}

static const char *title(const char *format, int64_t rows, const char *what)
{
    static char text[80];
    snprintf(text, sizeof text, format, (int)rows, what);
    return text;
}

static const int64_t row_counts[] = {1, 4, 16, 64, MAX_ROWS};
enum { N_ROW_COUNTS = sizeof row_counts / sizeof *row_counts };

static void bench_linear4(setup *s, hb_compute compute)
{
    check *c = s->c;
    const hb_dtype io = compute == HB_COMPUTE_BF16 ? HB_BF16 : HB_F32;
    const double weight = (double)(s->weight_bytes + s->n_scales * 4);
    hb_error error;
    for (int i = 0; i < N_ROW_COUNTS; i++) {
        const int64_t m = row_counts[i];
        const double bytes = m <= 4 ? weight : 0, operations = 2.0 * (double)m * ELEMENTS;
        hb_view x = view_of(s->x, io, m, SIZE), y = view_of(s->y, io, m, SIZE);
        if (m == 1)
            CHECK_BENCH(c, b, title("linear_4bit nf4 nested %d rows %s cold", m, hb_dtype_name(io)),
                        s->weight_bytes + s->n_scales, operations)
            {
                hb_tensor4 w = nested4_of(s, b.copy);
                (void)hb_linear_4bit(c->context, &x, &w, NULL, compute, &y, NULL, &error);
            }
        CHECK_BENCH(c, b, title("linear_4bit nf4 %d rows %s cold", m, hb_dtype_name(io)), bytes,
                    operations)
        {
            hb_tensor4 w = tensor4_of(s, b.copy);
            (void)hb_linear_4bit(c->context, &x, &w, NULL, compute, &y, NULL, &error);
        }
        if (m != 1 && m != MAX_ROWS) continue;
        CHECK_BENCH(c, b, title("linear_4bit_grad nf4 %d rows %s cold", m, hb_dtype_name(io)),
                    bytes, operations)
        {
            hb_tensor4 w = tensor4_of(s, b.copy);
            (void)hb_linear_4bit_grad_input(c->context, &x, &w, compute, &y, NULL, &error);
        }
    }
}

BENCH_GROUP(ops_4bit)
{
    setup s;
    float *dense = aligned_alloc(4096, (size_t)ELEMENTS * 4);
    if (open_setup(&s, c, ELEMENTS / 2, ELEMENTS / BLOCKSIZE) && dense != NULL) {
        const double stored = (double)(s.weight_bytes + s.n_scales * 4);
        check_fill_normal(c, dense, ELEMENTS, 0.02f);
        hb_error error;
        for (int threads = 1; threads <= 2; threads++) {
            hb_pool_set_threads(c->context->pool, threads);
            bench_linear4(&s, HB_COMPUTE_F32);
            bench_linear4(&s, HB_COMPUTE_BF16);
            for (int io = 0; io < HB_IO_COUNT; io++) {
                hb_view w = view_of(dense, (hb_dtype)io, SIZE, SIZE);
                const double bytes =
                    stored + (double)ELEMENTS * (double)hb_dtype_bytes((hb_dtype)io);
                const char *name = hb_dtype_name((hb_dtype)io);
                hb_tensor4 first = tensor4_of(&s, 0);
                CHECK_BENCH(c, b, title("quantize_4bit nf4 %d^2 %s", SIZE, name), bytes, 0)
                (void)hb_quantize_4bit(c->context, &w, HB_NF4, BLOCKSIZE, HB_SCALES_ABSMAX,
                                       s.weights, s.scales, &error);
                CHECK_BENCH(c, b, title("dequantize_4bit nf4 %d^2 %s", SIZE, name), bytes, 0)
                (void)hb_dequantize_4bit(c->context, &first, 0, &w, &error);
            }
            check_fill_normal(c, dense, ELEMENTS / 16, 0.02f);
            hb_view part = view_of(dense, HB_F32, SIZE / 16, SIZE);
            CHECK_BENCH(c, b, title("quantize_4bit search nf4 %dx4096 %s", SIZE / 16, "float32"),
                        stored / 16 + ELEMENTS / 4, 0)
            (void)hb_quantize_4bit(c->context, &part, HB_NF4, BLOCKSIZE, HB_SCALES_SEARCH,
                                   s.weights, s.scales, &error);
        }
    }
    free(dense);
    close_setup(&s);
}

BENCH_GROUP(ops_8bit)
{
    setup s;
    int32_t *sums = aligned_alloc(4096, (size_t)MAX_ROWS * SIZE * 4);
    if (open_setup(&s, c, ELEMENTS, SIZE) && sums != NULL) {
        const double stored = (double)(s.weight_bytes + s.n_scales * 4);
        hb_error error;
        for (int threads = 1; threads <= 2; threads++) {
            hb_pool_set_threads(c->context->pool, threads);
            for (int i = 0; i < N_ROW_COUNTS; i++) {
                const int64_t m = row_counts[i];
                const double bytes = m <= 4 ? stored : 0, operations = 2.0 * (double)m * ELEMENTS;
                hb_view x = view_of(s.x, HB_F32, m, SIZE), y = view_of(s.y, HB_F32, m, SIZE);
                for (int kind = 0; kind < 3; kind++) {
                    const char *names[] = {"dynamic", "dynamic outliers", "exact"};
                    CHECK_BENCH(c, b, title("linear_8bit %d rows %s cold", m, names[kind]), bytes,
                                operations)
                    (void)hb_linear_8bit(
                        c->context, &x,
                        (const int8_t *)s.weights + b.copy % s.n_copies * s.weight_bytes, s.scales,
                        SIZE, SIZE, NULL, kind == 2 ? HB_INT8_EXACT : HB_INT8_DYNAMIC,
                        kind == 1 ? 4.0f : 0.0f, &y, NULL, &error);
                }
                CHECK_BENCH(c, b, title("matmul_int8 %d rows%s cold", m, ""), bytes, operations)
                (void)hb_matmul_int8(
                    c->context, &(hb_device){.type = HB_CPU}, (const int8_t *)s.weights,
                    (const int8_t *)s.weights + b.copy % s.n_copies * s.weight_bytes, m, SIZE, SIZE,
                    sums, &error);
                if (m == MAX_ROWS)
                    CHECK_BENCH(c, b, title("linear_8bit_grad %d rows%s cold", m, ""), bytes,
                                operations)
                (void)hb_linear_8bit_grad_input(c->context, &x, (const int8_t *)s.weights, s.scales,
                                                SIZE, SIZE, &y, NULL, &error);
            }
            hb_view rows = view_of(s.x, HB_F32, MAX_ROWS, SIZE);
            const double read = (double)MAX_ROWS * SIZE * 4;
            CHECK_BENCH(c, b, "quantize_rows_int8 512x4096 float32", read * 1.25, 0)
            (void)hb_quantize_rows_int8(c->context, &rows, 0.0f, (int8_t *)sums, s.scales, NULL,
                                        &error);
            CHECK_BENCH(c, b, "dequantize_rows_int8 512x4096 float32", read * 1.25, 0)
            (void)hb_dequantize_rows_int8(c->context, (const int8_t *)sums, s.scales, &rows,
                                          &error);
            float map[256];
            hb_map8_fill(HB_MAP_DYNAMIC, map);
            check_fill_normal(c, s.x, (int64_t)MAX_ROWS * SIZE, 1.0f);
            CHECK_BENCH(c, b, "quantize_8bit dynamic 2M float32", read * 1.25, 0)
            (void)hb_quantize_8bit(c->context, &rows, map, 256, (uint8_t *)sums, s.scales, &error);
        }
    }
    free(sums);
    close_setup(&s);
}

// Plain weights of normal numbers instead of random bytes, and x of the same dtype.
static bool open_dense(setup *s, check *c, hb_dtype io)
{
    enum { X = MAX_ROWS * SIZE };
    const int64_t item = (int64_t)hb_dtype_bytes(io);
    if (!open_setup(s, c, ELEMENTS * item, 1)) return false;
    for (int64_t i = 0; i < s->n_copies * (ELEMENTS / X); i++)
        check_convert(s->x, s->weights + i * X * item, X, io);
    check_convert(s->x, s->y, X, io);
    memcpy(s->x, s->y, (size_t)(X * item));
    return true;
}

// Few rows of x, and 16, which is more than a kernel takes at once.
static void bench_dense(setup *s, hb_dtype io)
{
    static const int64_t counts[] = {1, 2, 4, 8, 16};
    check *c = s->c;
    hb_error error;
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        const int64_t m = counts[i];
        hb_view x = view_of(s->x, io, m, SIZE), y = view_of(s->y, io, m, SIZE);
        CHECK_BENCH(c, b, title("linear_dense %d rows %s cold", m, hb_dtype_name(io)),
                    s->weight_bytes, 2.0 * (double)m * ELEMENTS)
        {
            uint8_t *copy = s->weights + b.copy % s->n_copies * s->weight_bytes;
            hb_view w = view_of(copy, io, SIZE, SIZE);
            (void)hb_linear_dense(c->context, &x, &w, NULL, &y, &error);
        }
    }
}

BENCH_GROUP(ops_dense)
{
    for (int threads = 1; threads <= 2; threads++) {
        hb_pool_set_threads(c->context->pool, threads);
        for (hb_dtype io = 0; io < HB_IO_COUNT; io++) {
            setup s;
            if (open_dense(&s, c, io)) bench_dense(&s, io);
            close_setup(&s);
        }
    }
}

// One step of AdamW over 4 Mi parameters in one tensor. Bytes: p read and written, g read, states
// read and written.
static void bench_adam(check *c, bool state_is_8bit, hb_dtype dtype)
{
    enum { N = 1 << 22, BLOCKS = N / HB_OPTIM_BLOCKSIZE };
    const size_t state_bytes = state_is_8bit ? 1 : 4, bytes = hb_dtype_bytes(dtype);
    float *values = aligned_alloc(4096, (size_t)N * 4), *absmax = calloc(2 * BLOCKS, 4);
    void *p = aligned_alloc(4096, N * bytes), *g = aligned_alloc(4096, N * bytes);
    void *m = calloc(N, state_bytes), *v = calloc(N, state_bytes);
    if (values && absmax && p && g && m && v) {
        float map1[256], map2[256];
        hb_map8_fill(HB_MAP_DYNAMIC, map1);
        hb_map8_fill(HB_MAP_DYNAMIC_UNSIGNED, map2);
        check_fill_normal(c, values, N, 0.02f);
        check_convert(values, p, N, dtype);
        check_convert(values, g, N, dtype);
        const hb_optim_settings settings = {.lr = 1e-4,
                                            .beta1 = 0.9,
                                            .beta2 = 0.999,
                                            .eps = 1e-8,
                                            .weight_decay = 0.01,
                                            .gnorm_scale = 1.0};
        hb_optim_tensor tensor = {.p = p,
                                  .g = g,
                                  .p_dtype = dtype,
                                  .g_dtype = dtype,
                                  .n = N,
                                  .state_is_8bit = state_is_8bit,
                                  .state1 = m,
                                  .state2 = v,
                                  .absmax1 = absmax,
                                  .absmax2 = absmax + BLOCKS};
        hb_error error;
        CHECK_BENCH(
            c, b, title("adamw %d-bit states 4M %s", state_is_8bit ? 8 : 32, hb_dtype_name(dtype)),
            N * (double)(3 * bytes + 4 * state_bytes), 0)
        {
            tensor.step++;
            (void)hb_optimizer_step(c->context, &(hb_device){.type = HB_CPU}, HB_ADAM, &tensor, 1,
                                    &settings, map1, map2, NULL, &error);
        }
    }
    free(values), free(absmax), free(p), free(g), free(m), free(v);
}

BENCH_GROUP(ops_optim)
{
    for (int threads = 1; threads <= 2; threads++) {
        hb_pool_set_threads(c->context->pool, threads);
        for (int state_is_8bit = 0; state_is_8bit < 2; state_is_8bit++) {
            bench_adam(c, state_is_8bit, HB_F32);
            bench_adam(c, state_is_8bit, HB_BF16);
        }
    }
}
