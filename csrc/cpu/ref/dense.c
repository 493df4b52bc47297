// Products with plain weights in plain C: the meaning of kernels_dense.h, summed in double.
#include "cpu/dense_entries.h"

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

HB_DENSE_ENTRIES(ref, HB_DENSE_MAX_ROWS, 0)
