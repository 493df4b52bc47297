// Rulers on 64-byte vectors.
#include "cpu/ruler_loops.h"
#include "cpu/simd.h"

#define SET1(i)    _mm512_set1_ps((float)(i))
#define STEP(sum)  _mm512_fmadd_ps(sum, _mm512_set1_ps(0.999f), _mm512_set1_ps(0.001f))
#define FIRST(sum) _mm512_cvtss_f32(sum)

HB_RULER_READ(read_64, 64)
HB_RULER_MULTIPLY(multiply_f32, __m512, SET1, STEP, _mm512_add_ps, FIRST)

void hb_ruler_table_avx512(hb_kernels_ruler *kernels)
{
    kernels->read = read_64;
    kernels->f32 = (hb_ruler){multiply_f32, HB_RULER_OPERATIONS(16)};
}
