// Look-up in a 256-entry map with AVX-512 VBMI.
//
// The 256 floats are split into four planes of equal bytes; a plane is four registers, in which 64
// codes are looked up by two byte permutations and a blend. The four result bytes of a code are put
// together again by interleaving.
#ifndef HB_CPU_AVX512VBMI_PLANES8_H
#define HB_CPU_AVX512VBMI_PLANES8_H

#include "cpu/avx512/io.h"

typedef struct {
    __m512i byte[4][4]; // [byte of the float][entries 64 k .. 64 k + 63]
} planes;

static inline planes split_map(const float *map)
{
    _Alignas(64) uint8_t split[4][256];
    for (int i = 0; i < 256; i += 16) {
        __m512i bits = _mm512_loadu_si512(map + i);
        _mm_store_si128((void *)(split[0] + i), _mm512_cvtepi32_epi8(bits));
        _mm_store_si128((void *)(split[1] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 8)));
        _mm_store_si128((void *)(split[2] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 16)));
        _mm_store_si128((void *)(split[3] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 24)));
    }
    planes p;
    for (int b = 0; b < 4; b++)
        for (int k = 0; k < 4; k++) p.byte[b][k] = _mm512_load_si512(split[b] + 64 * k);
    return p;
}

// A permutation of two registers uses 7 bits of a code; `upper` marks those with bit 7.
static inline __m512i look_up(const __m512i table[4], __m512i codes, __mmask64 upper)
{
    __m512i lo = _mm512_permutex2var_epi8(table[0], codes, table[1]);
    __m512i hi = _mm512_permutex2var_epi8(table[2], codes, table[3]);
    return _mm512_mask_blend_epi8(upper, lo, hi);
}

static inline void look_up_sixty_four(const planes *p, __m512i codes, __m512 value[4])
{
    // Interleaving works in 128-bit lanes: dword g of lane l must hold codes 16 g + 4 l .. + 3.
    const __m512i transpose =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    codes = _mm512_permutexvar_epi32(transpose, codes);
    __mmask64 upper = _mm512_movepi8_mask(codes);
    __m512i b0 = look_up(p->byte[0], codes, upper), b1 = look_up(p->byte[1], codes, upper);
    __m512i b2 = look_up(p->byte[2], codes, upper), b3 = look_up(p->byte[3], codes, upper);
    __m512i low01 = _mm512_unpacklo_epi8(b0, b1), high01 = _mm512_unpackhi_epi8(b0, b1);
    __m512i low23 = _mm512_unpacklo_epi8(b2, b3), high23 = _mm512_unpackhi_epi8(b2, b3);
    value[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
    value[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
    value[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
    value[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
}

#endif
