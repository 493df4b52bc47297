// 8-bit block-wise format with AVX-512 F/BW/DQ/VL. Formula, layout, source: ref/codec8.c.
//
// Encode: eight steps down the search tree; its 255 thresholds stay in sixteen registers, so that a
// step is a register permutation (two and blends on the last levels) and a comparison.
// Decode: a gather per sixteen elements. Accuracy: bit-equal to the reference.
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

static inline void encode_blocks(const void *x, int64_t n, const hb_search8 *search,
                                 int64_t blocksize, const float *absmax, uint8_t *codes,
                                 hb_dtype io)
{
    const tree t = load_tree(search);
    for (int64_t i = 0; i < n; absmax++) {
        const __m512 inverse = _mm512_set1_ps(1.0f / *absmax);
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        for (; i + 16 <= end; i += 16) {
            __m512i code = code_of(&t, _mm512_mul_ps(load_f32x16(x, i, io), inverse));
            _mm_storeu_si128((void *)(codes + i), _mm512_cvtepi32_epi8(code));
        }
        if (i < end) {
            __mmask16 lanes = first_lanes(end - i);
            __m512 v = _mm512_mul_ps(load_lanes_f32x16(x, i, lanes, io), inverse);
            _mm512_mask_cvtepi32_storeu_epi8(codes + i, lanes, code_of(&t, v));
            i = end;
        }
    }
}

static inline void decode_blocks(const uint8_t *codes, int64_t n, const float *map,
                                 int64_t blocksize, const float *absmax, void *out, bool stream,
                                 hb_dtype io)
{
    stream = stream && blocksize % 64 == 0 && (uintptr_t)out % 64 == 0;
    for (int64_t i = 0; i < n; absmax++) {
        const __m512 scale = _mm512_set1_ps(*absmax);
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        for (; i + 16 <= end; i += 16) {
            __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(codes + i)));
            __m512 value = _mm512_i32gather_ps(index, map, 4);
            store_f32x16(out, i, _mm512_mul_ps(value, scale), stream, io);
        }
        if (i < end) {
            __mmask16 lanes = first_lanes(end - i);
            __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, codes + i));
            __m512 value = _mm512_i32gather_ps(index, map, 4);
            store_lanes_f32x16(out, i, _mm512_mul_ps(value, scale), lanes, io);
            i = end;
        }
    }
    if (stream) _mm_sfence();
}

#define CODEC8(io, dtype)                                                                          \
    void hb_map8_encode_##io##_avx512(const void *x, int64_t n, const hb_search8 *search,          \
                                      int64_t blocksize, const float *absmax, uint8_t *codes)      \
    {                                                                                              \
        encode_blocks(x, n, search, blocksize, absmax, codes, dtype);                              \
    }                                                                                              \
    void hb_map8_decode_##io##_avx512(const uint8_t *codes, int64_t n, const float *map,           \
                                      int64_t blocksize, const float *absmax, void *out,           \
                                      bool stream)                                                 \
    {                                                                                              \
        decode_blocks(codes, n, map, blocksize, absmax, out, stream, dtype);                       \
    }
CODEC8(f32, HB_F32)
CODEC8(bf16, HB_BF16)
CODEC8(f16, HB_F16)
