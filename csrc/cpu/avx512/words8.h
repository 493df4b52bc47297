// What ladder8.h needs, with AVX-512 F/BW/DQ/VL.
#ifndef HB_CPU_AVX512_WORDS8_H
#define HB_CPU_AVX512_WORDS8_H

#include "core/kernels.h"
#include "cpu/simd.h"

// Shuffling works in 128-bit lanes: t[g] gives dword g of each.
static inline __m512i third_bytes(const __m512i t[4])
{
    const __m512i transpose =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i first = _mm512_broadcast_i32x4(
        _mm_setr_epi8(2, 6, 10, 14, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    __m512i bytes[4];
    for (int g = 0; g < 4; g++) bytes[g] = _mm512_shuffle_epi8(t[g], first);
    __m512i low = _mm512_unpacklo_epi32(bytes[0], bytes[1]),
            high = _mm512_unpacklo_epi32(bytes[2], bytes[3]);
    return _mm512_permutexvar_epi32(transpose, _mm512_unpacklo_epi64(low, high));
}

#endif
