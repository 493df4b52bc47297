// Products with plain weights in plain C: the meaning of kernels_dense.h, summed in double.
#include "core/kernels_dense.h"

static void dot(hb_dtype io, const void *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                const void *x, int64_t x_stride, int n_x, float *y, int64_t y_stride)
{
    for (int t = 0; t < n_x; t++)
        for (int64_t r = 0; r < n_rows; r++) {
            double sum = 0.0;
            for (int64_t k = 0; k < depth; k++)
                sum += (double)hb_load_f32(w, r * w_stride + k, io) *
                       (double)hb_load_f32(x, t * x_stride + k, io);
            y[t * y_stride + r] = (float)sum;
        }
}

#define DOT(name, io)                                                                              \
    static void hb_dense_dot_##name##_ref(const void *w, int64_t w_stride, int64_t n_rows,         \
                                          int64_t depth, const void *x, int64_t x_stride, int n_x, \
                                          float *y, int64_t y_stride)                              \
    {                                                                                              \
        dot(io, w, w_stride, n_rows, depth, x, x_stride, n_x, y, y_stride);                        \
    }

DOT(f32, HB_F32)
DOT(bf16, HB_BF16)
DOT(f16, HB_F16)

void hb_dense_table_ref(hb_kernels_dense *kernels)
{
    kernels->rows = HB_DENSE_MAX_ROWS;
    kernels->dot[HB_F32] = hb_dense_dot_f32_ref;
    kernels->dot[HB_BF16] = hb_dense_dot_bf16_ref;
    kernels->dot[HB_F16] = hb_dense_dot_f16_ref;
}
