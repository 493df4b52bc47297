// Kernels of y = x W^T for a plain matrix W of float32, bfloat16 or float16, and few rows of x.
//
// A few rows of x are bound by the reading of W, so each load of W serves all of them, and W is
// read as it lies: nothing is packed. x has the dtype of W. linear_dense.c splits and stores.
//
//             products                             sums
//   float32   fused into the sum                   float32
//   bfloat16  exact (8 + 8 bits) and so are        float32
//   float16   those of float16 (11 + 11 bits)      float32
//
// Accuracy, u = 2^-24: |err| <= (depth/8 + 16) u sum_k |w x|. A sum has at least 8 lanes, each of
// which takes a product with one rounding (depth/8 of them); they are folded pairwise, which with
// second order terms fits in 16. A set on hardware dot products (vdpbf16ps: two roundings for the
// two products of a lane, at least 16 lanes) has the same bound for normal numbers, but takes
// subnormal bfloat16, products and sums as zero: sum_k (|w| + |x|) 2^-126 + depth 2^-125 more.
// Infinities and NaN propagate.
#ifndef HB_CORE_KERNELS_DENSE_H
#define HB_CORE_KERNELS_DENSE_H

#include "core/dtype.h"

#define HB_DENSE_MAX_ROWS 8

// y[t * y_stride + r] = sum_k w[r, k] x[t, k] for r < n_rows, t < n_x (1..rows). Row r of W begins
// w_stride elements after row r - 1, and so x; both have their elements' alignment, and nothing is
// read behind the depth elements of a row. Each y has the same bits whatever n_rows; it may depend
// on n_x.
typedef void (*hb_dense_dot)(const void *w, int64_t w_stride, int64_t n_rows, int64_t depth,
                             const void *x, int64_t x_stride, int n_x, float *y, int64_t y_stride);

typedef struct {
    int32_t rows; // of x that one call of dot takes at most, <= HB_DENSE_MAX_ROWS
    // Rows of x up to which this was measured to be no slower than torch's product, so that layers
    // should use it; 0 where nobody measured.
    int32_t until[HB_IO_COUNT];
    hb_dense_dot dot[HB_IO_COUNT];
} hb_kernels_dense;

// Each fills the members that its ISA does better. Called from that folder's table.c.
void hb_dense_table_ref(hb_kernels_dense *kernels);
void hb_dense_table_avx2(hb_kernels_dense *kernels);
void hb_dense_table_avx512(hb_kernels_dense *kernels);
void hb_dense_table_avx512bf16(hb_kernels_dense *kernels);
void hb_dense_table_neon(hb_kernels_dense *kernels);

#endif
