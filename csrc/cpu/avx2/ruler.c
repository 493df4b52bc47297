// Rulers on 32-byte vectors.
#include "cpu/ruler_loops.h"
#include "cpu/simd.h"

#define SET1(i)    _mm256_set1_ps((float)(i))
#define STEP(sum)  _mm256_fmadd_ps(sum, _mm256_set1_ps(0.999f), _mm256_set1_ps(0.001f))
#define FIRST(sum) _mm256_cvtss_f32(sum)

HB_RULER_READ(read_32, 32)
HB_RULER_MULTIPLY(multiply_f32, __m256, SET1, STEP, _mm256_add_ps, FIRST)

void hb_ruler_table_avx2(hb_kernels_ruler *kernels)
{
    kernels->read = read_32;
    kernels->f32 = (hb_ruler){multiply_f32, HB_RULER_OPERATIONS(8)};
}
