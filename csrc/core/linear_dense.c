// y = x W^T + b for a plain W [rows, depth] of float32, bfloat16 or float16, and few rows of x.
//
// The rows of W are split over the pool, in chunks of CHUNK_ROWS; a kernel call multiplies them
// with up to `rows` rows of x. Where x has more, the chunk is cut so small that W comes from memory
// once and from the L1 cache for the rest. A sum is never split: results do not depend on the
// number of threads. float32 sums, then the bias, one rounding to y's dtype.
//
// x is used where it lies; only rows that are not contiguous, or at no regular distance, are
// copied.
#include "core/matrix.h"
#include "core/ops.h"

#include <inttypes.h>

enum {
    CHUNK_ROWS = HB_LINEAR4_MAX_TILE_COLS, // rows of W; what hb_matrix_finish takes
    NEAR_BYTES = 16 << 10,                 // of W that stay in the L1 cache
    STACK_BYTES = 16 << 10,                // scratch up to this size is not allocated
    SERIAL_BYTES = 1 << 19 // work (bytes of weights, weighted with rows of x) worth a thread
};

typedef struct {
    const hb_kernels *kernels;
    hb_matrix y;
    hb_dtype io;
    int64_t x_rows, rows, depth;
    const unsigned char *x, *w;
    int64_t x_stride, w_stride; // elements
    int64_t at_once;            // rows of W multiplied with all of x before the next
    const hb_view *bias;        // or NULL
} product;

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

// Rows [row, row + n) of W, n <= CHUNK_ROWS, times all of x.
static void multiply(const product *p, int64_t row, int64_t n)
{
    _Alignas(64) float sums[HB_DENSE_MAX_ROWS * CHUNK_ROWS];
    float bias[CHUNK_ROWS];
    const hb_kernels_dense *dense = &p->kernels->dense;
    const int64_t item = (int64_t)hb_dtype_bytes(p->io);
    for (int64_t i = 0; i < n && p->bias != NULL; i++)
        bias[i] = hb_load_f32(p->bias->data, (row + i) * p->bias->stride[0], p->bias->dtype);
    for (int64_t m = 0; m < p->x_rows; m += dense->rows) {
        const int n_x = (int)least(dense->rows, p->x_rows - m);
        dense->dot[p->io](p->w + row * p->w_stride * item, p->w_stride, n, p->depth,
                          p->x + m * p->x_stride * item, p->x_stride, n_x, sums, CHUNK_ROWS);
        for (int t = 0; t < n_x; t++)
            hb_matrix_finish(&p->kernels->linear4, &p->y, m + t, row, n, sums + t * CHUNK_ROWS,
                             p->bias != NULL ? bias : NULL);
    }
}

static void multiply_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    const product *p = arg;
    const int64_t row_end = least(end * CHUNK_ROWS, p->rows);
    (void)lane;
    for (int64_t row = begin * CHUNK_ROWS; row < row_end; row += p->at_once)
        multiply(p, row, least(p->at_once, row_end - row));
}

static hb_status check(const hb_view *x, const hb_view *w, const hb_view *bias, const hb_view *y,
                       hb_error *error)
{
    static const char function[] = "linear_dense";
    HB_TRY(hb_matrix_check_view(w, function, "weight", error));
    HB_CHECK(error, w->ndim == 2, HB_ERR_VALUE,
             "linear_dense: weight, expected shape [rows, depth], got %d dimensions", w->ndim);
    HB_TRY(hb_matrix_check_views(x, w->shape[1], "x", "depth", y, w->shape[0], "y", "columns",
                                 function, error));
    HB_CHECK(error, x->device.type == HB_CPU && w->device.type == HB_CPU, HB_ERR_DEVICE,
             "linear_dense: %s, expected memory of the CPU, got CUDA",
             x->device.type == HB_CPU ? "weight" : "x");
    HB_CHECK(error, x->dtype == w->dtype, HB_ERR_TYPE,
             "linear_dense: x, expected the dtype of the weight, %s, got %s",
             hb_dtype_name(w->dtype), hb_dtype_name(x->dtype));
    HB_CHECK(error, y->dtype == w->dtype, HB_ERR_TYPE,
             "linear_dense: y, expected the dtype of the weight, %s, got %s",
             hb_dtype_name(w->dtype), hb_dtype_name(y->dtype));
    HB_CHECK(error, w->stride[1] == 1 || w->shape[0] == 0 || w->shape[1] <= 1, HB_ERR_VALUE,
             "linear_dense: weight, expected contiguous rows, got a stride of %" PRId64,
             w->stride[1]);
    if (bias == NULL) return HB_OK;
    HB_TRY(hb_matrix_check_view(bias, function, "bias", error));
    HB_CHECK(error, bias->device.type == HB_CPU, HB_ERR_DEVICE,
             "linear_dense: bias, expected memory of the CPU, got CUDA");
    HB_CHECK(error, bias->ndim == 1 && bias->shape[0] == w->shape[0], HB_ERR_VALUE,
             "linear_dense: bias, expected shape [%" PRId64 "], got %d dimensions of %" PRId64
             " elements",
             w->shape[0], bias->ndim, hb_view_numel(bias));
    return HB_OK;
}

hb_status hb_linear_dense(hb_context *context, const hb_view *x, const hb_view *w,
                          const hb_view *bias, const hb_view *y, hb_error *error)
{
    HB_TRY(check(x, w, bias, y, error));
    const hb_matrix rows_of_x = hb_matrix_of(x);
    const int64_t item = (int64_t)hb_dtype_bytes(w->dtype);
    product p = {.kernels = &context->kernels,
                 .y = hb_matrix_of(y),
                 .io = w->dtype,
                 .x_rows = rows_of_x.rows,
                 .rows = w->shape[0],
                 .depth = w->shape[1],
                 .w = w->data,
                 .w_stride = w->stride[0],
                 .bias = bias};
    if (p.x_rows == 0 || p.rows == 0) return HB_OK;

    _Alignas(64) unsigned char stack[STACK_BYTES];
    hb_scratch scratch = {0};
    if (hb_matrix_rows_are_regular(&rows_of_x, 0, p.x_rows, &p.x_stride)) {
        p.x = x->data;
    } else {
        unsigned char *copy;
        (void)hb_scratch_reserve(&scratch, p.x_rows * p.depth * item);
        HB_TRY(hb_scratch_open(&scratch, context->scratch, stack, sizeof stack, "linear_dense",
                               &copy, error));
        for (int64_t m = 0; m < p.x_rows; m++)
            hb_matrix_gather_row(&rows_of_x, m, copy + m * p.depth * item);
        p.x = copy;
        p.x_stride = p.depth;
    }
    p.at_once = CHUNK_ROWS;
    if (p.x_rows > context->kernels.dense.rows) {
        const int64_t near = NEAR_BYTES / (p.depth * item + 1);
        p.at_once = near < 2 ? 2 : least(near / 2 * 2, CHUNK_ROWS);
    }
    const int64_t n_chunks = hb_ceil_div(p.rows, CHUNK_ROWS);
    const double work = (double)p.rows * (double)(p.depth * item) * (1.0 + (double)p.x_rows / 8.0);
    if (n_chunks == 1 || work < (double)SERIAL_BYTES)
        multiply_chunks(&p, 0, n_chunks, 0);
    else
        hb_parallel_for(context->pool, n_chunks, multiply_chunks, &p);
    hb_scratch_close(&scratch);
    return HB_OK;
}
