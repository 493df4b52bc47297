// What the dense.c of x86 share beyond dense_loops.h: float32 sums in vectors of DENSE_BITS. The
// file that includes this has defined the number, and adds load_step and what else is its own.
#ifndef HB_CPU_DENSE_X86_H
#define HB_CPU_DENSE_X86_H

#include "cpu/simd.h"

#define DENSE_INLINE static inline __attribute__((always_inline))

#if DENSE_BITS == 512
#define DENSE_VECTOR(name) _mm512_##name
typedef __m512 vector;

DENSE_INLINE float total_of(vector sum)
{
    return _mm512_reduce_add_ps(sum);
}
#else
#define DENSE_VECTOR(name) _mm256_##name
typedef __m256 vector;

DENSE_INLINE float total_of(vector sum)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
#endif

DENSE_INLINE vector no_sum(void)
{
    return DENSE_VECTOR(setzero_ps)();
}

DENSE_INLINE vector add_sums(vector a, vector b)
{
    return DENSE_VECTOR(add_ps)(a, b);
}

DENSE_INLINE void fetch(const void *address)
{
    _mm_prefetch(address, _MM_HINT_T1);
}

#endif
