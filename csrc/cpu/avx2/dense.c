// Products with plain weights, AVX2 with FMA and F16C: 16 elements of each row a step.
//
// bfloat16 as in avx512/dense.c: even elements by a shift, odd ones by a mask. Ends of rows go
// through a small buffer. Accuracy: kernels_dense.h (depth/8 + 5).
#include "cpu/avx2/io.h"

#define DENSE_BITS 256
#include "cpu/dense_x86.h"

enum { STEP = 16, PARTS = 2, MAX_X = 4, CHAINED_X = 2 };
typedef vector operand;

DENSE_INLINE void load_whole(const void *row, int64_t k, hb_dtype io, operand *out)
{
    if (io == HB_BF16) {
        const __m256i both = _mm256_loadu_si256((const void *)((const uint16_t *)row + k));
        out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        out[1] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000u)));
    } else {
        out[0] = load_f32x8(row, k, io);
        out[1] = load_f32x8(row, k + 8, io);
    }
}

DENSE_INLINE void load_step(const void *row, int64_t k, int64_t present, hb_dtype io, operand *out)
{
    if (present == STEP) {
        load_whole(row, k, io, out);
    } else {
        uint8_t part[STEP * 4] = {0};
        const int64_t item = io == HB_F32 ? 4 : 2;
        memcpy(part, (const uint8_t *)row + k * item, (size_t)(present * item));
        load_whole(part, 0, io, out);
    }
}

DENSE_INLINE vector add_products(vector sum, operand w, operand x)
{
    return _mm256_fmadd_ps(w, x, sum);
}

#include "cpu/dense_loops.h"

HB_DENSE_ENTRIES(avx2, MAX_X, 8)
