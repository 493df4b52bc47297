// The ruler of bfloat16 dot products on 64-byte vectors.
#include "cpu/ruler_loops.h"
#include "cpu/simd.h"

#define HALF       ((__m512bh)_mm512_set1_epi16(0x3f00))
#define SET1(i)    _mm512_set1_ps((float)(i))
#define STEP(sum)  _mm512_dpbf16_ps(sum, HALF, HALF)
#define FIRST(sum) _mm512_cvtss_f32(sum)

HB_RULER_MULTIPLY(multiply_bf16, __m512, SET1, STEP, _mm512_add_ps, FIRST)

void hb_ruler_table_avx512bf16(hb_kernels_ruler *kernels)
{
    kernels->bf16 = (hb_ruler){multiply_bf16, HB_RULER_OPERATIONS(32)};
}
