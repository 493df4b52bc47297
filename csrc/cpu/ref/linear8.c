// Products with int8 weights in plain C: the meaning of every member of hb_kernels_linear8.
//
//   dot_int8: c = sum_k w x, exact in int32;   dot_f32: y = sum_k w x, summed in double
//
// Prepared x is the codes themselves. Accuracy: as kernels_linear8.h, dot_f32 with a single
// rounding.
#include "core/kernels_linear8.h"

enum { DOT_ROWS = 4 };

static void prepare_int8(const int8_t *codes, int64_t depth, void *prepared)
{
    if (depth > 0) memcpy(prepared, codes, (size_t)depth);
}

static void dot_int8(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                     const void *prepared, int n_x, int32_t *c, int64_t c_stride)
{
    const int64_t stride = hb_int8_prepared_bytes(depth, 1);
    for (int t = 0; t < n_x; t++) {
        const int8_t *x = (const int8_t *)prepared + t * stride;
        for (int64_t r = 0; r < n_rows; r++) {
            uint32_t sum = 0; // unsigned: wrapping around is defined
            for (int64_t k = 0; k < depth; k++) sum += (uint32_t)(w[r * w_stride + k] * x[k]);
            c[t * c_stride + r] = (int32_t)sum;
        }
    }
}

static void rescale(const int32_t *c, float x_factor, const float *extra, const float *w_factor,
                    int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i++) {
        float value = (float)c[i] * x_factor;
        if (extra != NULL) value += extra[i];
        out[i] = value * w_factor[i];
    }
}

static void dot_f32(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                    const float *x, int64_t x_stride, int n_x, float *y, int64_t y_stride)
{
    for (int t = 0; t < n_x; t++)
        for (int64_t r = 0; r < n_rows; r++) {
            double sum = 0.0;
            for (int64_t k = 0; k < depth; k++)
                sum += (double)w[r * w_stride + k] * (double)x[t * x_stride + k];
            y[t * y_stride + r] = (float)sum;
        }
}

static void decode_rows(const int8_t *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                        int tile_cols, float *panel)
{
    for (int64_t k = 0; k < depth; k++)
        for (int64_t r = 0; r < tile_cols; r++)
            panel[k * tile_cols + r] = r < n_rows ? (float)w[r * w_stride + k] : 0.0f;
}

static void decode_cols(const int8_t *w, int64_t w_stride, const float *factor, int64_t n_rows,
                        int64_t n_cols, int tile_cols, float *panel)
{
    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t c = 0; c < tile_cols; c++)
            panel[r * tile_cols + c] = c < n_cols ? (float)w[r * w_stride + c] * factor[r] : 0.0f;
}

void hb_linear8_table_ref(hb_kernels_linear8 *kernels)
{
    kernels->dot_int8_rows = DOT_ROWS;
    kernels->dot_f32_rows = DOT_ROWS;
    kernels->prepared_bytes = 1;
    kernels->prepare_int8 = prepare_int8;
    kernels->dot_int8 = dot_int8;
    kernels->rescale = rescale;
    kernels->dot_f32 = dot_f32;
    kernels->decode_rows = decode_rows;
    kernels->decode_cols = decode_cols;
}
