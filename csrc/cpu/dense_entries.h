// The functions that the table of products with plain weights points at, over the function `dot`
// of each ISA's dense.c; the dtype is a constant in each call.
#ifndef HB_CPU_DENSE_ENTRIES_H
#define HB_CPU_DENSE_ENTRIES_H

#include "core/kernels_dense.h"

#define HB_DENSE_DOT(name, io, isa)                                                                \
    static void hb_dense_dot_##name##_##isa(const void *w, int64_t w_stride, int64_t n_rows,       \
                                            int64_t depth, const void *x, int64_t x_stride,        \
                                            int n_x, float *y, int64_t y_stride)                   \
    {                                                                                              \
        dot(io, w, w_stride, n_rows, depth, x, x_stride, n_x, y, y_stride);                        \
    }

// All three dtypes, and hb_dense_table_<isa>; `until` as in the table.
#define HB_DENSE_ENTRIES(isa, n_rows_of_x, until_rows)                                             \
    HB_DENSE_DOT(f32, HB_F32, isa)                                                                 \
    HB_DENSE_DOT(bf16, HB_BF16, isa)                                                               \
    HB_DENSE_DOT(f16, HB_F16, isa)                                                                 \
    void hb_dense_table_##isa(hb_kernels_dense *kernels)                                           \
    {                                                                                              \
        kernels->rows = (n_rows_of_x);                                                             \
        for (int io = 0; io < HB_IO_COUNT; io++) kernels->until[io] = (until_rows);                \
        kernels->dot[HB_F32] = hb_dense_dot_f32_##isa;                                             \
        kernels->dot[HB_BF16] = hb_dense_dot_bf16_##isa;                                           \
        kernels->dot[HB_F16] = hb_dense_dot_f16_##isa;                                             \
    }

#endif
