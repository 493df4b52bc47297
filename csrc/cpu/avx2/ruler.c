// Rulers on 32-byte vectors.
#include "cpu/simd.h"

#define VECTOR(name) _mm256_##name
typedef __m256 vector;

#include "cpu/ruler_x86.h"

void hb_ruler_table_avx2(hb_kernels_ruler *kernels)
{
    fill_table(kernels);
}
