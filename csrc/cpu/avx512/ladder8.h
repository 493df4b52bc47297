// From v to 8-bit codes with AVX-512 F/BW/DQ/VL: the ladder and the search of kernels_codec.h.
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
    __m512 border, slope, offset; // eight entries, twice
    __m512i cap;  // offset and cap are one more, which makes the test for `near` short
    __m512i zero; // bytes
    bool is_signed;
} ladder;

static inline ladder load_ladder(const hb_ladder8 *from)
{
    return (ladder){
        .border = _mm512_broadcast_f32x8(_mm256_loadu_ps(from->border)),
        .slope = _mm512_broadcast_f32x8(_mm256_loadu_ps(from->slope)),
        .offset = _mm512_add_ps(_mm512_broadcast_f32x8(_mm256_loadu_ps(from->offset)),
                                _mm512_set1_ps(1.0f)),
        .cap = _mm512_add_epi32(_mm512_broadcast_i32x8(_mm256_loadu_si256((const void *)from->cap)),
                                _mm512_set1_epi32(1)),
        .zero = _mm512_set1_epi8((char)from->zero),
        .is_signed = from->is_signed,
    };
}

// floor(q / UNIT) of sixteen elements; `near` gets those that only the search can decide. `bounded`
// says that |v| is below 2 (or NaN).
static inline __m512i climb(const ladder *l, __m512 v, bool bounded, __mmask16 *near)
{
    // As integers negative numbers become 0. min gives its second operand for NaN, and the
    // conversion to q INT_MIN.
    __m512i bits = _mm512_castps_si512(v);
    bits = l->is_signed ? _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff))
                        : _mm512_max_epi32(bits, _mm512_setzero_si512());
    __m512 a = _mm512_castsi512_ps(bits);
    if (!bounded) a = _mm512_min_ps(_mm512_set1_ps(1.0f), a);
    __m512i high = _mm512_srli_epi32(_mm512_castps_si512(a), 16);
    high = _mm512_subs_epu16(high, _mm512_set1_epi32(HB_LADDER_FLOOR));
    __m512i range = _mm512_mulhi_epu16(high, _mm512_set1_epi32(HB_LADDER_RATE));
    __mmask16 above = _mm512_cmp_ps_mask(a, _mm512_permutexvar_ps(range, l->border), _CMP_GT_OQ);
    range = _mm512_mask_add_epi32(range, above, range, _mm512_set1_epi32(1));
    __m512i q = _mm512_cvttps_epi32(_mm512_fmadd_ps(_mm512_permutexvar_ps(range, l->slope), a,
                                                    _mm512_permutexvar_ps(range, l->offset)));
    q = _mm512_min_epi32(q, _mm512_permutexvar_epi32(range, l->cap));
    *near = _mm512_cmpeq_epi32_mask(_mm512_and_si512(q, _mm512_set1_epi32(HB_LADDER_UNIT - 2)),
                                    _mm512_setzero_si512());
    return _mm512_srli_epi32(q, HB_LADDER_SHIFT);
}

// Packs steps to bytes, away from `zero` on the side that `negative` says.
static inline __m128i sixteen_codes(const ladder *l, __mmask16 negative, __m512i steps)
{
    __m512i bytes = _mm512_castsi128_si512(_mm512_cvtepi32_epi8(steps));
    if (l->is_signed)
        bytes = _mm512_mask_subs_epu8(_mm512_add_epi8(l->zero, bytes), negative, l->zero, bytes);
    return _mm512_castsi512_si128(bytes);
}

static inline __mmask64 join_masks(const __mmask16 part[4])
{
    return (__mmask64)part[0] | (__mmask64)part[1] << 16 | (__mmask64)part[2] << 32 |
           (__mmask64)part[3] << 48;
}

static inline __m512i sixty_four_codes(const ladder *l, const __mmask16 negative[4],
                                       const __m512i steps[4])
{
    // Packing works in 128-bit lanes: dword 4 k + g of the result comes from vector g.
    const __m512i transpose =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i bytes = _mm512_packus_epi16(_mm512_packus_epi32(steps[0], steps[1]),
                                        _mm512_packus_epi32(steps[2], steps[3]));
    bytes = _mm512_permutexvar_epi32(transpose, bytes);
    if (!l->is_signed) return bytes;
    __mmask64 all = join_masks(negative);
    return _mm512_mask_subs_epu8(_mm512_add_epi8(l->zero, bytes), all, l->zero, bytes);
}

static inline __mmask16 sign_bits(__m512 v)
{
    return _mm512_movepi32_mask(_mm512_castps_si512(v));
}

// Seldom: two of 4096 values, and blocks of zeros, whose v is NaN.
static __attribute__((noinline)) __m128i search_codes(const hb_search8 *search, __m512 v)
{
    const tree t = load_tree(search);
    return _mm512_cvtepi32_epi8(code_of(&t, v));
}

#endif
