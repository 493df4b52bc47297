// Quantize and dequantize of the row-wise int8 format (LLM.int8()).
//
//   x[r, k] ~ codes[r, k] * scale[r] / 127,  scale[r] = max |x[r, :]|  (over elements below
//   threshold)
//
// Source: arXiv:2208.07339. Formula and layout: cpu/ref/int8.c. A matrix is a view whose leading
// dimensions are flattened; rows of any length, rows that hold NaN get scale NaN and codes 0.
#include "core/ops_cuda.h"
#include "core/pieces.h"

typedef struct {
    const hb_kernels_codec *codec;
    const hb_view *x;
    bool contiguous;
    int64_t rows, depth;
    float threshold; // NaN: no outliers
    const uint8_t *zero;
    int8_t *codes;
    float *scale;
    uint8_t *outlier_columns;
} quantize_job;

// Marks outliers of columns [begin, end) * HB_PIECE in all rows: every mark has one writer.
static void mark_columns(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    const quantize_job *job = arg;
    _Alignas(64) uint8_t scratch[HB_PIECE_BYTES];
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t column = piece * HB_PIECE;
        int64_t n = hb_min_i64(HB_PIECE, job->depth - column);
        for (int64_t row = 0; row < job->rows; row++) {
            const void *x =
                hb_piece_in(job->x, job->contiguous, row * job->depth + column, n, scratch);
            job->codec->outliers_int8[job->x->dtype](x, n, job->threshold,
                                                     job->outlier_columns + column);
        }
    }
}

static void quantize_row(const quantize_job *job, int64_t row)
{
    _Alignas(64) uint8_t scratch[HB_PIECE_BYTES];
    const hb_dtype io = job->x->dtype;
    const int64_t begin = row * job->depth;
    float absmax = 0.0f;
    for (int64_t k = 0; k < job->depth; k += HB_PIECE) {
        int64_t n = hb_min_i64(HB_PIECE, job->depth - k);
        const void *x = hb_piece_in(job->x, job->contiguous, begin + k, n, scratch);
        float largest = job->codec->absmax_int8[io](x, n, job->threshold);
        if (!(largest <= absmax)) absmax = largest; // greater, or NaN
        if (absmax != absmax) break;
    }
    job->scale[row] = absmax;
    for (int64_t k = 0; k < job->depth; k += HB_PIECE) {
        int64_t n = hb_min_i64(HB_PIECE, job->depth - k);
        const void *x = hb_piece_in(job->x, job->contiguous, begin + k, n, scratch);
        job->codec->encode_int8[io](x, n, absmax, job->threshold, job->zero ? job->zero + k : NULL,
                                    job->codes + begin + k);
    }
}

static int64_t rows_per_chunk(int64_t depth)
{
    return depth > 0 ? hb_ceil_div(HB_CHUNK, depth) : HB_CHUNK;
}

static void quantize_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    const quantize_job *job = arg;
    const int64_t chunk = rows_per_chunk(job->depth);
    const int64_t stop = hb_min_i64(end * chunk, job->rows);
    for (int64_t row = begin * chunk; row < stop; row++) quantize_row(job, row);
}

// Rows and depth of a view whose leading dimensions are flattened.
static void matrix_shape(const hb_view *view, int64_t *rows, int64_t *depth)
{
    *rows = 1;
    for (int d = 0; d < view->ndim - 1; d++) *rows *= view->shape[d];
    *depth = view->shape[view->ndim - 1];
}

hb_status hb_quantize_rows_int8(hb_context *context, const hb_view *x, float threshold,
                                int8_t *codes, float *scale, uint8_t *outlier_columns,
                                hb_error *error)
{
    HB_TRY(hb_check_view(error, "quantize_rows_int8", "x", x, false));
    HB_CHECK(error, x->ndim >= 1, HB_ERR_VALUE,
             "quantize_rows_int8: x has 0 dimensions, expected at least 1");
    HB_CHECK(error, threshold >= 0.0f, HB_ERR_VALUE,
             "quantize_rows_int8: threshold is %g, expected 0 (off) or a positive number",
             (double)threshold);
    HB_CHECK(error, threshold == 0.0f || outlier_columns != NULL, HB_ERR_VALUE,
             "quantize_rows_int8: outlier_columns is NULL, expected memory when threshold is %g",
             (double)threshold);
    quantize_job job = {.codec = &context->kernels.codec,
                        .x = x,
                        .contiguous = hb_view_is_contiguous(x),
                        .threshold = threshold > 0.0f ? threshold : hb_f32_from_bits(HB_NAN_BITS),
                        .codes = codes,
                        .scale = scale,
                        .outlier_columns = outlier_columns};
    matrix_shape(x, &job.rows, &job.depth);
    if (x->device.type == HB_CUDA)
        return hb_quantize_rows_int8_cuda(x, job.rows, job.depth, threshold, codes, scale,
                                          outlier_columns, error);
    if (outlier_columns != NULL && job.depth > 0) memset(outlier_columns, 0, (size_t)job.depth);
    if (threshold > 0.0f) {
        hb_parallel_for(context->pool, hb_ceil_div(job.depth, HB_PIECE), mark_columns, &job);
        if (job.rows > 1) job.zero = outlier_columns;
    }
    hb_parallel_for(context->pool, hb_ceil_div(job.rows, rows_per_chunk(job.depth)),
                    quantize_chunks, &job);
    return HB_OK;
}

typedef struct {
    const hb_kernels_codec *codec;
    const int8_t *codes;
    const float *scale;
    int64_t rows, depth;
    const hb_view *out;
    bool contiguous;
} dequantize_job;

static void dequantize_chunks(void *arg, int64_t begin, int64_t end, int lane)
{
    (void)lane;
    const dequantize_job *job = arg;
    _Alignas(64) uint8_t scratch[HB_PIECE_BYTES];
    const int64_t chunk = rows_per_chunk(job->depth);
    const int64_t stop = hb_min_i64(end * chunk, job->rows);
    for (int64_t row = begin * chunk; row < stop; row++) {
        for (int64_t k = 0; k < job->depth; k += HB_PIECE) {
            int64_t n = hb_min_i64(HB_PIECE, job->depth - k);
            int64_t first = row * job->depth + k;
            void *out = hb_piece_out(job->out, job->contiguous, first, scratch);
            job->codec->decode_int8[job->out->dtype](job->codes + first, n, job->scale[row], out);
            hb_piece_out_done(job->out, job->contiguous, first, n, scratch);
        }
    }
}

hb_status hb_dequantize_rows_int8(hb_context *context, const int8_t *codes, const float *scale,
                                  const hb_view *out, hb_error *error)
{
    HB_TRY(hb_check_view(error, "dequantize_rows_int8", "out", out, true));
    HB_CHECK(error, out->ndim >= 1, HB_ERR_VALUE,
             "dequantize_rows_int8: out has 0 dimensions, expected at least 1");
    dequantize_job job = {.codec = &context->kernels.codec,
                          .codes = codes,
                          .scale = scale,
                          .out = out,
                          .contiguous = hb_view_is_contiguous(out)};
    matrix_shape(out, &job.rows, &job.depth);
    if (out->device.type == HB_CUDA)
        return hb_dequantize_rows_int8_cuda(codes, scale, job.rows, job.depth, out, error);
    hb_parallel_for(context->pool, hb_ceil_div(job.rows, rows_per_chunk(job.depth)),
                    dequantize_chunks, &job);
    return HB_OK;
}
