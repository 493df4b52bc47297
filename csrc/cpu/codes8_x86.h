// int8 codes and int32 sums in vectors of 32 bytes, AVX2.
#ifndef HB_CPU_CODES8_X86_H
#define HB_CPU_CODES8_X86_H

#include "cpu/simd.h"

// The first n codes at p, then zeros; n >= 32 loads all. Nothing behind them is read.
static inline __attribute__((always_inline)) __m256i load_32_codes(const int8_t *p, int64_t n)
{
    if (n >= 32) return _mm256_loadu_si256((const void *)p);
    int8_t buffer[32] = {0};
    memcpy(buffer, p, (size_t)n);
    return _mm256_loadu_si256((const void *)buffer);
}

// The sum of 8 int32, which wraps around.
static inline int32_t sum_of_lanes(__m256i v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return _mm_cvtsi128_si32(s);
}

#endif
