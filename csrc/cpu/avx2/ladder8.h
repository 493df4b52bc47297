// From v to 8-bit codes with AVX2: the ladder and the search of kernels_codec.h.
#ifndef HB_CPU_AVX2_LADDER8_H
#define HB_CPU_AVX2_LADDER8_H

#include "cpu/avx2/io.h"

typedef struct {
    __m256 top;       // levels 0..2, nodes 1..7
    __m256 level3;    // nodes 8..15
    __m256 level4[2]; // 16..31
    __m256 level5[4]; // 32..63
    const float *rest;
} tree;

static inline tree load_tree(const hb_search8 *search)
{
    tree t = {.top = _mm256_loadu_ps(search->tree),
              .level3 = _mm256_loadu_ps(search->tree + 8),
              .rest = search->tree};
    for (int k = 0; k < 2; k++) t.level4[k] = _mm256_loadu_ps(search->tree + 16 + 8 * k);
    for (int k = 0; k < 4; k++) t.level5[k] = _mm256_loadu_ps(search->tree + 32 + 8 * k);
    return t;
}

// To the right child where v > threshold (a true comparison is -1); NaN goes left.
static inline __m256i descend(__m256i node, __m256 v, __m256 threshold)
{
    __m256i above = _mm256_castps_si256(_mm256_cmp_ps(v, threshold, _CMP_GT_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(node, node), above);
}

// Chooses by bit `bit` of the node.
static inline __m256 choose(__m256i node, int bit, __m256 if_clear, __m256 if_set)
{
    return _mm256_blendv_ps(if_clear, if_set,
                            _mm256_castsi256_ps(_mm256_slli_epi32(node, 31 - bit)));
}

// Codes + 256. Permutations use the low 3 bits of a node, which is its place in a register.
static inline __m256i code_of(const tree *t, __m256 v)
{
    __m256i node =
        descend(_mm256_set1_epi32(1), v, _mm256_permutevar8x32_ps(t->top, _mm256_set1_epi32(1)));
    node = descend(node, v, _mm256_permutevar8x32_ps(t->top, node));
    node = descend(node, v, _mm256_permutevar8x32_ps(t->top, node));
    node = descend(node, v, _mm256_permutevar8x32_ps(t->level3, node));
    node = descend(node, v,
                   choose(node, 3, _mm256_permutevar8x32_ps(t->level4[0], node),
                          _mm256_permutevar8x32_ps(t->level4[1], node)));
    __m256 lo = choose(node, 3, _mm256_permutevar8x32_ps(t->level5[0], node),
                       _mm256_permutevar8x32_ps(t->level5[1], node));
    __m256 hi = choose(node, 3, _mm256_permutevar8x32_ps(t->level5[2], node),
                       _mm256_permutevar8x32_ps(t->level5[3], node));
    node = descend(node, v, choose(node, 4, lo, hi));
    node = descend(node, v, _mm256_i32gather_ps(t->rest, node, 4));
    return descend(node, v, _mm256_i32gather_ps(t->rest, node, 4));
}

// The low bytes of eight lanes.
static inline uint64_t low_bytes(__m256i lanes)
{
    lanes = _mm256_and_si256(lanes, _mm256_set1_epi32(0xff));
    __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    return (uint64_t)_mm_cvtsi128_si64(_mm_packus_epi16(words, words));
}

typedef struct {
    __m256 border, slope, offset;
    __m256i cap;
    __m256i zero; // bytes
    bool is_signed;
} ladder;

static inline ladder load_ladder(const hb_ladder8 *from)
{
    return (ladder){
        .border = _mm256_loadu_ps(from->border),
        .slope = _mm256_loadu_ps(from->slope),
        .offset = _mm256_loadu_ps(from->offset),
        .cap = _mm256_loadu_si256((const void *)from->cap),
        .zero = _mm256_set1_epi8((char)from->zero),
        .is_signed = from->is_signed,
    };
}

// floor(q / UNIT) of eight elements; lanes of `near` become -1 where only the search can decide.
static inline __m256i climb(const ladder *l, __m256 v, __m256i *near)
{
    // As integers negative numbers become 0. min gives its second operand for NaN, and the
    // conversion to q INT_MIN.
    __m256i bits = _mm256_castps_si256(v);
    bits = l->is_signed ? _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff))
                        : _mm256_max_epi32(bits, _mm256_setzero_si256());
    __m256 a = _mm256_min_ps(_mm256_set1_ps(1.0f), _mm256_castsi256_ps(bits));
    __m256i high = _mm256_srli_epi32(_mm256_castps_si256(a), 16);
    high = _mm256_subs_epu16(high, _mm256_set1_epi32(HB_LADDER_FLOOR));
    __m256i range = _mm256_mulhi_epu16(high, _mm256_set1_epi32(HB_LADDER_RATE));
    __m256 above = _mm256_cmp_ps(a, _mm256_permutevar8x32_ps(l->border, range), _CMP_GT_OQ);
    range = _mm256_sub_epi32(range, _mm256_castps_si256(above));
    __m256i q = _mm256_cvttps_epi32(_mm256_fmadd_ps(_mm256_permutevar8x32_ps(l->slope, range), a,
                                                    _mm256_permutevar8x32_ps(l->offset, range)));
    q = _mm256_min_epi32(q, _mm256_permutevar8x32_epi32(l->cap, range));
    __m256i rest = _mm256_and_si256(_mm256_add_epi32(q, _mm256_set1_epi32(1)),
                                    _mm256_set1_epi32(HB_LADDER_UNIT - 2));
    *near = _mm256_cmpeq_epi32(rest, _mm256_setzero_si256());
    return _mm256_srli_epi32(q, HB_LADDER_SHIFT);
}

// Packs steps to bytes, away from `zero` on the side of v's sign.
static inline __m256i thirty_two_codes(const ladder *l, const __m256 v[4], const __m256i steps[4])
{
    // Packing works in 128-bit lanes: dword 4 k + g of the result comes from vector g.
    const __m256i transpose = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(steps[0], steps[1]),
                                        _mm256_packs_epi32(steps[2], steps[3]));
    if (l->is_signed) {
        __m256i sign[4]; // packing with saturation keeps the sign
        for (int g = 0; g < 4; g++) sign[g] = _mm256_castps_si256(v[g]);
        __m256i negative = _mm256_packs_epi16(_mm256_packs_epi32(sign[0], sign[1]),
                                              _mm256_packs_epi32(sign[2], sign[3]));
        bytes = _mm256_blendv_epi8(_mm256_add_epi8(l->zero, bytes),
                                   _mm256_subs_epu8(l->zero, bytes), negative);
    }
    return _mm256_permutevar8x32_epi32(bytes, transpose);
}

// Seldom: two of 4096 values, and blocks of zeros, whose v is NaN.
static __attribute__((noinline)) void search_thirty_two(const hb_search8 *search, const __m256 v[4],
                                                        uint8_t *codes)
{
    const tree t = load_tree(search);
    for (int g = 0; g < 4; g++) {
        uint64_t bytes = low_bytes(code_of(&t, v[g]));
        memcpy(codes + 8 * g, &bytes, 8);
    }
}

#endif
