// From v to 8-bit codes with AVX-512 F/BW/DQ/VL: the decades and the search of kernels_codec.h.
//
// The file that includes this one has a function that VBMI does in fewer instructions:
//
//     __m512i third_bytes(const __m512i t[4])          byte 2 of the 64 dwords, in order
#ifndef HB_CPU_AVX512_LADDER8_H
#define HB_CPU_AVX512_LADDER8_H

#include "cpu/avx512/io.h"

typedef struct {
    __m512 top;       // levels 0..3, node 1..15
    __m512 level4;    // nodes 16..31
    __m512 level5[2]; // 32..63
    __m512 level6[4]; // 64..127
    __m512 level7[8]; // 128..255
} tree;

static inline tree load_tree(const hb_search8 *search)
{
    tree t;
    t.top = _mm512_loadu_ps(search->tree);
    t.level4 = _mm512_loadu_ps(search->tree + 16);
    for (int k = 0; k < 2; k++) t.level5[k] = _mm512_loadu_ps(search->tree + 32 + 16 * k);
    for (int k = 0; k < 4; k++) t.level6[k] = _mm512_loadu_ps(search->tree + 64 + 16 * k);
    for (int k = 0; k < 8; k++) t.level7[k] = _mm512_loadu_ps(search->tree + 128 + 16 * k);
    return t;
}

// To the right child where v > threshold; NaN goes left.
static inline __m512i descend(__m512i node, __m512 v, __m512 threshold)
{
    __m512i child = _mm512_add_epi32(node, node);
    __mmask16 above = _mm512_cmp_ps_mask(v, threshold, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(child, above, child, _mm512_set1_epi32(1));
}

// Codes as the low bytes of 32-bit lanes. Permutations use the low 4 (two registers: 5) bits of a
// node, which is its place in the level; the bits above choose among registers.
static inline __m512i code_of(const tree *t, __m512 v)
{
    __m512i node = descend(_mm512_set1_epi32(1), v,
                           _mm512_broadcastss_ps(_mm_movehdup_ps(_mm512_castps512_ps128(t->top))));
    for (int level = 1; level < 4; level++)
        node = descend(node, v, _mm512_permutexvar_ps(node, t->top));
    node = descend(node, v, _mm512_permutexvar_ps(node, t->level4));
    node = descend(node, v, _mm512_permutex2var_ps(t->level5[0], node, t->level5[1]));
    __mmask16 bit5 = _mm512_test_epi32_mask(node, _mm512_set1_epi32(32));
    __m512 lo = _mm512_permutex2var_ps(t->level6[0], node, t->level6[1]);
    __m512 hi = _mm512_permutex2var_ps(t->level6[2], node, t->level6[3]);
    node = descend(node, v, _mm512_mask_blend_ps(bit5, lo, hi));
    bit5 = _mm512_test_epi32_mask(node, _mm512_set1_epi32(32));
    __mmask16 bit6 = _mm512_test_epi32_mask(node, _mm512_set1_epi32(64));
    __m512 q0 = _mm512_permutex2var_ps(t->level7[0], node, t->level7[1]);
    __m512 q1 = _mm512_permutex2var_ps(t->level7[2], node, t->level7[3]);
    __m512 q2 = _mm512_permutex2var_ps(t->level7[4], node, t->level7[5]);
    __m512 q3 = _mm512_permutex2var_ps(t->level7[6], node, t->level7[7]);
    lo = _mm512_mask_blend_ps(bit5, q0, q1);
    hi = _mm512_mask_blend_ps(bit5, q2, q3);
    return descend(node, v, _mm512_mask_blend_ps(bit6, lo, hi));
}

typedef struct {
    __m512i offset[2];
    __m512 slope;
    __m512i zero; // bytes: the code of 0, unsigned -1
    bool is_signed;
} ladder;

// is_signed: whether the map is, a constant at every call.
static inline ladder load_ladder(const hb_search8 *search, bool is_signed)
{
    const hb_decades8 *from = &search->decades;
    return (ladder){
        .offset = {_mm512_loadu_si512(from->offset), _mm512_loadu_si512(from->offset + 16)},
        .slope = _mm512_loadu_ps(from->slope),
        .zero = _mm512_set1_epi8((char)(is_signed ? from->zero : -1)),
        .is_signed = is_signed,
    };
}

// t of sixteen a.
static inline __m512i climb(const ladder *l, __m512 a)
{
    __m512i bits = _mm512_castps_si512(a), exponent = _mm512_srli_epi32(bits, 23);
    __m512i offset = _mm512_permutex2var_epi32(l->offset[0], exponent, l->offset[1]);
    __m512i place = _mm512_srli_epi32(_mm512_sub_epi32(offset, bits), 27);
    __m512 w = _mm512_fmadd_ps(_mm512_permutexvar_ps(place, l->slope), a,
                               _mm512_set1_ps(0x1p31f * HB_DECADE_BASE));
    return _mm512_srlv_epi32(_mm512_cvttps_epu32(w), place);
}

// a of v; NaN becomes something from HB_DECADE_FLOOR on.
static inline __m512 magnitude(const ladder *l, __m512 v)
{
    enum { LARGER_MAGNITUDE = 11 }; // of two numbers, without a sign; not the NaN
    const __m512 least = _mm512_set1_ps(HB_DECADE_FLOOR);
    if (l->is_signed) return _mm512_range_ps(v, least, LARGER_MAGNITUDE);
    // As integers negative numbers are below the floor.
    return _mm512_castsi512_ps(
        _mm512_max_epi32(_mm512_castps_si512(v), _mm512_castps_si512(least)));
}

// Lane i says that only the search can decide on lane i of one of the four.
static inline __mmask16 near_a_threshold(const __m512i t[4])
{
    __m512i least = _mm512_min_epu16(_mm512_min_epu16(t[0], t[1]), _mm512_min_epu16(t[2], t[3]));
    least = _mm512_and_si512(least, _mm512_set1_epi32(0x10000 - HB_DECADE_NEAR));
    return _mm512_cmpeq_epi32_mask(least, _mm512_setzero_si512());
}

static inline __mmask64 join_masks(const __mmask16 part[4])
{
    return (__mmask64)part[0] | (__mmask64)part[1] << 16 | (__mmask64)part[2] << 32 |
           (__mmask64)part[3] << 48;
}

// Codes of 64 values: 16 g .. of t[g]. Negative codes saturate at 0.
static inline __m512i sixty_four_codes(const ladder *l, const __mmask16 negative[4],
                                       const __m512i t[4])
{
    __m512i steps = third_bytes(t);
    __m512i codes = _mm512_add_epi8(l->zero, steps);
    if (!l->is_signed) return codes;
    return _mm512_mask_subs_epu8(codes, join_masks(negative), l->zero, steps);
}

static inline __mmask16 sign_bits(__m512 v)
{
    return _mm512_movepi32_mask(_mm512_castps_si512(v));
}

#endif
