// From v to 8-bit codes with AVX2: the decades and the search of kernels_codec.h.
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
    __m256i offset;
    __m256 slope;
    __m256i zero; // bytes
    bool is_signed;
} ladder;

// is_signed: whether the map is, a constant at every call.
static inline ladder load_ladder(const hb_search8 *search, bool is_signed)
{
    const hb_decades8 *from = &search->decades;
    return (ladder){
        .offset = _mm256_loadu_si256((const void *)from->offset8),
        .slope = _mm256_loadu_ps(from->slope8),
        .zero = _mm256_set1_epi8((char)from->zero),
        .is_signed = is_signed,
    };
}

// t of eight a.
static inline __m256i climb(const ladder *l, __m256 a)
{
    __m256i bits = _mm256_castps_si256(a);
    __m256i group = _mm256_mulhi_epu16(bits, _mm256_set1_epi32(HB_DECADE_RATE << 16));
    __m256i offset = _mm256_permutevar8x32_epi32(l->offset, _mm256_srli_epi32(group, 16));
    __m256i place = _mm256_srli_epi32(_mm256_sub_epi32(offset, bits), 27);
    __m256 w = _mm256_fmadd_ps(_mm256_permutevar8x32_ps(l->slope, place), a,
                               _mm256_set1_ps(0x1p30f * HB_DECADE_BASE));
    w = _mm256_min_ps(w, _mm256_set1_ps(0x1.fffffep30f));
    return _mm256_srlv_epi32(_mm256_cvttps_epi32(w), place);
}

// a of v <= 1; NaN becomes HB_DECADE_FLOOR.
static inline __m256 magnitude(const ladder *l, __m256 v)
{
    return _mm256_max_ps(l->is_signed ? magnitude_f32x8(v) : v, _mm256_set1_ps(HB_DECADE_FLOOR));
}

// Lane i says that only the search can decide on lane i of one of the four.
static inline unsigned near_a_threshold(const __m256i t[4])
{
    __m256i least = _mm256_min_epu16(_mm256_min_epu16(t[0], t[1]), _mm256_min_epu16(t[2], t[3]));
    least = _mm256_and_si256(least, _mm256_set1_epi32(0x10000 - HB_DECADE_NEAR));
    least = _mm256_cmpeq_epi32(least, _mm256_setzero_si256());
    return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(least));
}

// Packing works in 128-bit lanes: dword 4 k + g of what is packed comes from vector g.
static inline __m256i in_order(__m256i packed)
{
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// -1 in the bytes of the 32 lanes whose sign is set, packed.
static inline __m256i pack_signs(const __m256 v[4])
{
    __m256i sign[4]; // packing with saturation keeps it
    for (int g = 0; g < 4; g++) sign[g] = _mm256_castps_si256(v[g]);
    return _mm256_packs_epi16(_mm256_packs_epi32(sign[0], sign[1]),
                              _mm256_packs_epi32(sign[2], sign[3]));
}

// The high words of 32 t as bytes, packed; of a map without negative entries one less.
static inline __m256i pack_steps(const ladder *l, const __m256i t[4])
{
    __m256i word[4];
    for (int g = 0; g < 4; g++) word[g] = _mm256_srli_epi32(t[g], 16);
    __m256i low = _mm256_packus_epi32(word[0], word[1]),
            high = _mm256_packus_epi32(word[2], word[3]);
    if (!l->is_signed) {
        low = _mm256_subs_epu16(low, _mm256_set1_epi16(1));
        high = _mm256_subs_epu16(high, _mm256_set1_epi16(1));
    }
    return _mm256_packus_epi16(low, high);
}

// The codes `steps` away from `zero`, below it where the sign of `negative` is set; they saturate.
static inline __m256i codes_of_steps(const ladder *l, __m256i steps, __m256i negative)
{
    return _mm256_blendv_epi8(_mm256_add_epi8(l->zero, steps), _mm256_subs_epu8(l->zero, steps),
                              negative);
}

#endif
