// Products with plain weights, AVX2 with FMA and F16C: 16 elements of each row a step.
//
// bfloat16 as in avx512/dense.c: even elements by a shift, odd ones by a mask. Ends of rows go
// through a small buffer. Accuracy: kernels_dense.h (depth/8 + 5).
#include "cpu/avx2/io.h"

#define DENSE_INLINE static inline __attribute__((always_inline))

enum { STEP = 16, PARTS = 2, MAX_X = 4, CHAINED_X = 2 };
typedef __m256 operand, vector;

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

DENSE_INLINE vector no_sum(void)
{
    return _mm256_setzero_ps();
}

DENSE_INLINE vector add_products(vector sum, operand w, operand x)
{
    return _mm256_fmadd_ps(w, x, sum);
}

DENSE_INLINE vector add_sums(vector a, vector b)
{
    return _mm256_add_ps(a, b);
}

DENSE_INLINE float total_of(vector sum)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

DENSE_INLINE void fetch(const void *address)
{
    _mm_prefetch(address, _MM_HINT_T1);
}

#include "cpu/dense_loops.h"

DENSE_DOT(f32, HB_F32, avx2)
DENSE_DOT(bf16, HB_BF16, avx2)
DENSE_DOT(f16, HB_F16, avx2)

void hb_dense_table_avx2(hb_kernels_dense *kernels)
{
    kernels->rows = MAX_X;
    for (int io = 0; io < HB_IO_COUNT; io++) kernels->until[io] = 8;
    kernels->dot[HB_F32] = hb_dense_dot_f32_avx2;
    kernels->dot[HB_BF16] = hb_dense_dot_bf16_avx2;
    kernels->dot[HB_F16] = hb_dense_dot_f16_avx2;
}
