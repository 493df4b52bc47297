// What avx512/ladder8.h needs, with VBMI.
#ifndef HB_CPU_AVX512VBMI_WORDS8_H
#define HB_CPU_AVX512VBMI_WORDS8_H

#include "core/kernels.h"
#include "cpu/simd.h"

static inline __m512i third_bytes(const __m512i t[4])
{
    // Of two registers: byte 2 of dword 0 of the first is number 2, of the second 64 + 2.
    const __m512i pair = _mm512_set_epi8(
        126, 122, 118, 114, 110, 106, 102, 98, 94, 90, 86, 82, 78, 74, 70, 66, 62, 58, 54, 50, 46,
        42, 38, 34, 30, 26, 22, 18, 14, 10, 6, 2, 126, 122, 118, 114, 110, 106, 102, 98, 94, 90, 86,
        82, 78, 74, 70, 66, 62, 58, 54, 50, 46, 42, 38, 34, 30, 26, 22, 18, 14, 10, 6, 2);
    __m512i low = _mm512_permutex2var_epi8(t[0], pair, t[1]);
    __m512i high = _mm512_permutex2var_epi8(t[2], pair, t[3]);
    return _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
}

#endif
