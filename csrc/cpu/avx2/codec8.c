// 8-bit block-wise format with AVX2. Formula, layout, source: ref/codec8.c.
//
// Encode: eight steps down the search tree; levels 0..5 stay in registers (63 thresholds), the last
// two are gathered. Decode: a gather per eight elements. Accuracy: bit-equal to the reference.
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

static inline void encode_blocks(const void *x, int64_t n, const hb_search8 *search,
                                 int64_t blocksize, const float *absmax, uint8_t *codes,
                                 hb_dtype io)
{
    const tree t = load_tree(search);
    const __m256i low_byte = _mm256_set1_epi32(0xff);
    for (int64_t i = 0; i < n; absmax++) {
        const __m256 inverse = _mm256_set1_ps(1.0f / *absmax);
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        for (; i < end; i += 8) {
            __m256 v = _mm256_mul_ps(load_upto_f32x8(x, i, end, io), inverse);
            __m256i code = _mm256_and_si256(code_of(&t, v), low_byte);
            __m128i words =
                _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
            uint64_t bytes = (uint64_t)_mm_cvtsi128_si64(_mm_packus_epi16(words, words));
            memcpy(codes + i, &bytes, end - i < 8 ? (size_t)(end - i) : 8);
        }
        i = end;
    }
}

static inline void decode_blocks(const uint8_t *codes, int64_t n, const float *map,
                                 int64_t blocksize, const float *absmax, void *out, bool stream,
                                 hb_dtype io)
{
    stream = stream && blocksize % 32 == 0 && (uintptr_t)out % 32 == 0;
    for (int64_t i = 0; i < n; absmax++) {
        const __m256 scale = _mm256_set1_ps(*absmax);
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        for (; i < end; i += 8) {
            uint64_t bytes = 0;
            memcpy(&bytes, codes + i, end - i < 8 ? (size_t)(end - i) : 8);
            __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
            __m256 value = _mm256_mul_ps(_mm256_i32gather_ps(map, index, 4), scale);
            store_upto_f32x8(out, i, end, value, stream, io);
        }
        i = end;
    }
    if (stream) _mm_sfence();
}

#define CODEC8(io, dtype)                                                                          \
    void hb_map8_encode_##io##_avx2(const void *x, int64_t n, const hb_search8 *search,            \
                                    int64_t blocksize, const float *absmax, uint8_t *codes)        \
    {                                                                                              \
        encode_blocks(x, n, search, blocksize, absmax, codes, dtype);                              \
    }                                                                                              \
    void hb_map8_decode_##io##_avx2(const uint8_t *codes, int64_t n, const float *map,             \
                                    int64_t blocksize, const float *absmax, void *out,             \
                                    bool stream)                                                   \
    {                                                                                              \
        decode_blocks(codes, n, map, blocksize, absmax, out, stream, dtype);                       \
    }
CODEC8(f32, HB_F32)
CODEC8(bf16, HB_BF16)
CODEC8(f16, HB_F16)
