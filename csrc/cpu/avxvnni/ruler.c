// The ruler of int8 dot products on 32-byte vectors.
#include "cpu/avxvnni/vnni.h"
#include "cpu/ruler_loops.h"

#define STEP(sum)  HB_DPBUSD(sum, _mm256_set1_epi8(3), _mm256_set1_epi8(3))
#define FIRST(sum) ((float)_mm256_cvtsi256_si32(sum))

HB_RULER_MULTIPLY(multiply_int8, __m256i, _mm256_set1_epi32, STEP, _mm256_add_epi32, FIRST)

void hb_ruler_table_avxvnni(hb_kernels_ruler *kernels)
{
    kernels->int8 = (hb_ruler){multiply_int8, HB_RULER_OPERATIONS(32)};
}
