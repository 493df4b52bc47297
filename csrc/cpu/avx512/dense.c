// Products with plain weights, AVX-512 (F, BW, DQ, VL): 32 elements of each row a step.
//
// bfloat16 needs no conversion of order: one load of 32 elements becomes two vectors of float32,
// the even ones by a shift and the odd ones by a mask, of W and of x alike. Products are exact,
// subnormals included. Accuracy: kernels_dense.h (depth/16 + 6).
#include "cpu/avx512/io.h"

#define DENSE_BITS 512
#include "cpu/dense_x86.h"

enum { STEP = 32, PARTS = 2, MAX_X = 8, CHAINED_X = 4 };
typedef vector operand;

DENSE_INLINE void load_step(const void *row, int64_t k, int64_t present, hb_dtype io, operand *out)
{
    if (io == HB_BF16) {
        const uint16_t *words = (const uint16_t *)row + k;
        const __m512i both = present == STEP
                                 ? _mm512_loadu_si512(words)
                                 : _mm512_maskz_loadu_epi16((1u << (unsigned)present) - 1u, words);
        out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        out[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000u)));
    } else if (present == STEP) {
        out[0] = load_f32x16(row, k, io);
        out[1] = load_f32x16(row, k + 16, io);
    } else {
        out[0] = load_lanes_f32x16(row, k, first_lanes(present), io);
        out[1] = load_lanes_f32x16(row, k + 16, present > 16 ? first_lanes(present - 16) : 0, io);
    }
}

DENSE_INLINE vector add_products(vector sum, operand w, operand x)
{
    return _mm512_fmadd_ps(w, x, sum);
}

#include "cpu/dense_loops.h"

HB_DENSE_ENTRIES(avx512, MAX_X, 8)
