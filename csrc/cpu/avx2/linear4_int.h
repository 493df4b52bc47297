// Quantizing x for the integer products with 4-bit weights (kernels_linear4.h), on 8 lanes.
#ifndef HB_CPU_AVX2_LINEAR4_INT_H
#define HB_CPU_AVX2_LINEAR4_INT_H

#include "cpu/avx2/io.h"

enum { INT_CHUNK = 64 };

// Elements [at, at + 64) of x, zeros from `end` on, as int16 codes in plain order: 16 a vector.
// Returns the scale that is stored (`unit` times the step), NaN where one of them is not finite.
static inline __attribute__((always_inline)) float quantize_chunk(const void *x, hb_dtype io,
                                                                  int64_t at, int64_t end,
                                                                  int limit, float unit,
                                                                  __m256i codes[4])
{
    __m256 value[8];
    __m256i largest = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const int64_t k = at + 8 * i;
        value[i] = k < end ? load_upto_f32x8(x, k, end, io) : _mm256_setzero_ps();
        largest = _mm256_max_epi32(largest, _mm256_castps_si256(magnitude_f32x8(value[i])));
    }
    const float amax = largest_of_magnitudes(largest);
    if (!(amax <= 0x1.fffffep127f)) {
        for (int i = 0; i < 4; i++) codes[i] = _mm256_setzero_si256();
        return hb_f32_from_bits(HB_NAN_BITS);
    }
    const float least = 0x1p-112f, wished = amax / (float)limit;
    const float step = wished > least ? wished : least;
    const __m256 inverse = _mm256_set1_ps(1.0f / step);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(value[2 * i], inverse));
        __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(value[2 * i + 1], inverse));
        codes[i] = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    }
    return step * unit;
}

// The same as int8, 32 a vector, columns in plain order.
static inline void narrow_chunk(const __m256i codes[4], __m256i *bytes)
{
    bytes[0] = _mm256_permute4x64_epi64(_mm256_packs_epi16(codes[0], codes[1]), 0xd8);
    bytes[1] = _mm256_permute4x64_epi64(_mm256_packs_epi16(codes[2], codes[3]), 0xd8);
}

// int8 columns of even and of odd number, 32 each.
static inline void split_chunk(const __m256i codes[4], __m256i *even, __m256i *odd)
{
    __m256i e[4], o[4];
    for (int i = 0; i < 4; i++) { // dwords: two columns each
        e[i] = _mm256_srai_epi32(_mm256_slli_epi32(codes[i], 16), 16);
        o[i] = _mm256_srai_epi32(codes[i], 16);
    }
    // Packing twice leaves 8-byte pieces of vector i in places 4 (i / 2)... : put them in order.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    *even = _mm256_permutevar8x32_epi32(
        _mm256_packs_epi16(_mm256_packs_epi32(e[0], e[1]), _mm256_packs_epi32(e[2], e[3])), order);
    *odd = _mm256_permutevar8x32_epi32(
        _mm256_packs_epi16(_mm256_packs_epi32(o[0], o[1]), _mm256_packs_epi32(o[2], o[3])), order);
}

#endif
