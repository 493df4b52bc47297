// Kernels of the small operations between a model's matrix products, fused: norms, activations,
// rotary embeddings, attention of one token. ops_fused.c puts them together.
//
// Everything is float32 in contiguous memory; u = 2^-24. Every ISA runs the same source
// (cpu/fused_loops.h), each operation rounded to float32 (float64 where it says so) without
// contraction and summed in a fixed order, so that all give the same bits. NaN and infinities
// propagate. No argument aliases another.
#ifndef HB_CORE_KERNELS_FUSED_H
#define HB_CORE_KERNELS_FUSED_H

#include "core/dtype.h"

enum { HB_FUSED_LANES = 32 }; // of a sum; element i goes to lane i % HB_FUSED_LANES

// sum[i % LANES] += x[i]^2, products and sums float64 (exact products). sum [LANES].
typedef void hb_fused_squares_fn(const float *x, int64_t n, double *sum);
// x[i] *= factor
typedef void hb_fused_scale_fn(float *x, int64_t n, float factor);
// x[i] *= y[i]
typedef void hb_fused_multiply_fn(float *x, const float *y, int64_t n);

// x[i] = f(x[i]):
//   silu       x / (1 + exp(-x))                                     |err| <= 4 u |f|
//   gelu_tanh  x / (1 + exp(-2 z)), z = sqrt(2/pi) (x + 0.044715 x^3)  |err| <= 8 u |x|
// which is 0.5 x (1 + tanh(z)). Results below 2^-126 |x| may be zero.
typedef enum { HB_SILU = 0, HB_GELU_TANH, HB_ACTIVATION_COUNT } hb_activation;
typedef void hb_fused_activate_fn(float *x, int64_t n);

// x[i] = exp(scale x[i] - m), m = max_i scale x[i]; returns their sum, element i in lane i % LANES,
// the lanes one after the other. |err| of an element <= 2 u (|scale x[i]| + |m| + 2) of itself.
typedef float hb_fused_exponentials_fn(float *x, int64_t n, float scale);
// y[i] += sum_r p[r] v[r, i] for i < cols, r = 0, 1, ... in order; v [rows, cols].
typedef void hb_fused_weigh_fn(const float *p, const float *v, int64_t rows, int64_t cols,
                               float *y);

typedef struct {
    hb_fused_squares_fn *squares;
    hb_fused_scale_fn *scale;
    hb_fused_multiply_fn *multiply;
    hb_fused_activate_fn *activate[HB_ACTIVATION_COUNT];
    hb_fused_exponentials_fn *exponentials;
    hb_fused_weigh_fn *weigh;
} hb_kernels_fused;

// One per ISA folder, in fused.c.
void hb_fused_table_ref(hb_kernels_fused *kernels);
void hb_fused_table_avx2(hb_kernels_fused *kernels);
void hb_fused_table_avx512(hb_kernels_fused *kernels);
void hb_fused_table_neon(hb_kernels_fused *kernels);

#endif
