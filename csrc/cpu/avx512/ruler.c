// Rulers on 64-byte vectors.
#include "cpu/simd.h"

#define VECTOR(name) _mm512_##name
typedef __m512 vector;

#include "cpu/ruler_x86.h"

void hb_ruler_table_avx512(hb_kernels_ruler *kernels)
{
    fill_table(kernels);
}
