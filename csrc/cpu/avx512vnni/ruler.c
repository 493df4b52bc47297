// The ruler of int8 dot products on 64-byte vectors.
#include "cpu/ruler_loops.h"
#include "cpu/simd.h"

#define STEP(sum)  _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(3), _mm512_set1_epi8(3))
#define FIRST(sum) ((float)_mm_cvtsi128_si32(_mm512_castsi512_si128(sum)))

HB_RULER_MULTIPLY(multiply_int8, __m512i, _mm512_set1_epi32, STEP, _mm512_add_epi32, FIRST)

void hb_ruler_table_avx512vnni(hb_kernels_ruler *kernels)
{
    kernels->int8 = (hb_ruler){multiply_int8, HB_RULER_OPERATIONS(64)};
}
