// Products with plain bfloat16 weights by vdpbf16ps: a load of W, of x and 32 products.
//
// Accuracy: kernels_dense.h (depth/16 + 8 here; subnormals are zero). Out of the caches this is up
// to 1.6 times as fast as the exact products of avx512/dense.c, from memory no faster.
#include "cpu/avx512/io.h"

#define DENSE_BITS 512
#include "cpu/dense_x86.h"

enum { STEP = 64, PARTS = 2, MAX_X = 8, CHAINED_X = 4 };
typedef __m512i operand;

DENSE_INLINE __mmask32 first_words(int64_t count)
{
    return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << (unsigned)count) - 1u;
}

DENSE_INLINE void load_step(const void *row, int64_t k, int64_t present, hb_dtype io, operand *out)
{
    const uint16_t *words = (const uint16_t *)row + k;
    (void)io;
    for (int p = 0; p < PARTS; p++)
        out[p] = present == STEP
                     ? _mm512_loadu_si512(words + 32 * p)
                     : _mm512_maskz_loadu_epi16(first_words(present - 32 * p), words + 32 * p);
}

DENSE_INLINE vector add_products(vector sum, operand w, operand x)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
}

#include "cpu/dense_loops.h"

HB_DENSE_DOT(bf16, HB_BF16, avx512bf16)

void hb_dense_table_avx512bf16(hb_kernels_dense *kernels)
{
    kernels->dot[HB_BF16] = hb_dense_dot_bf16_avx512bf16;
}
