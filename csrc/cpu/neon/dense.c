// Products with plain weights on 4 float32 lanes (baseline Advanced SIMD): 8 elements of each row
// a step, in two vectors. Ends of rows go through a small buffer. Accuracy: kernels_dense.h.
#include "cpu/neon/io.h"

#define DENSE_INLINE static inline __attribute__((always_inline))

// Never one chain: four lanes alone would be fewer than the accuracy is promised for.
enum { STEP = 8, PARTS = 2, MAX_X = 4, CHAINED_X = 4 };
typedef float32x4_t operand, vector;

DENSE_INLINE void load_step(const void *row, int64_t k, int64_t present, hb_dtype io, operand *out)
{
    for (int p = 0; p < PARTS; p++)
        out[p] = present == STEP ? load_f32x4(row, k + 4 * p, io)
                                 : load_upto_f32x4(row, k + 4 * p, k + present, io);
}

DENSE_INLINE vector no_sum(void)
{
    return vdupq_n_f32(0.0f);
}

DENSE_INLINE vector add_products(vector sum, operand w, operand x)
{
    return vfmaq_f32(sum, w, x);
}

DENSE_INLINE vector add_sums(vector a, vector b)
{
    return vaddq_f32(a, b);
}

DENSE_INLINE float total_of(vector sum)
{
    return vaddvq_f32(sum);
}

DENSE_INLINE void fetch(const void *address)
{
    __builtin_prefetch(address, 0, 2); // pldl2keep
}

#include "cpu/dense_loops.h"

HB_DENSE_ENTRIES(neon, MAX_X, 0) // not measured
