// 8-bit block-wise format with AVX-512 F/BW/DQ/VL. Formula, layout, source: ref/codec8.c.
//
// Encode: for maps with a ladder (kernels_codec.h) 64 codes at once by arithmetic; where one of
// them is too near to a threshold, and for all other maps, eight steps down the search tree: its
// 255 thresholds stay in sixteen registers, so that a step is a register permutation (two and
// blends on the last levels) and a comparison. Decode: a gather per sixteen elements. Accuracy:
// bit-equal to the reference.
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
    __m512i cap;
    __m512i zero; // bytes
    bool is_signed;
} ladder;

static inline ladder load_ladder(const hb_ladder8 *from)
{
    return (ladder){
        .border = _mm512_broadcast_f32x8(_mm256_loadu_ps(from->border)),
        .slope = _mm512_broadcast_f32x8(_mm256_loadu_ps(from->slope)),
        .offset = _mm512_broadcast_f32x8(_mm256_loadu_ps(from->offset)),
        .cap = _mm512_broadcast_i32x8(_mm256_loadu_si256((const void *)from->cap)),
        .zero = _mm512_set1_epi8((char)from->zero),
        .is_signed = from->is_signed,
    };
}

// floor(q / UNIT) of sixteen elements; `near` gets those that only the search can decide.
static inline __m512i climb(const ladder *l, __m512 v, __mmask16 *near)
{
    // As integers negative numbers become 0. min gives its second operand for NaN, and the
    // conversion to q INT_MIN.
    __m512i bits = _mm512_castps_si512(v);
    bits = l->is_signed ? _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff))
                        : _mm512_max_epi32(bits, _mm512_setzero_si512());
    __m512 a = _mm512_min_ps(_mm512_set1_ps(1.0f), _mm512_castsi512_ps(bits));
    __m512i high = _mm512_srli_epi32(_mm512_castps_si512(a), 16);
    high = _mm512_subs_epu16(high, _mm512_set1_epi32(HB_LADDER_FLOOR));
    __m512i range = _mm512_mulhi_epu16(high, _mm512_set1_epi32(HB_LADDER_RATE));
    __mmask16 above = _mm512_cmp_ps_mask(a, _mm512_permutexvar_ps(range, l->border), _CMP_GT_OQ);
    range = _mm512_mask_add_epi32(range, above, range, _mm512_set1_epi32(1));
    __m512i q = _mm512_cvttps_epi32(_mm512_fmadd_ps(_mm512_permutexvar_ps(range, l->slope), a,
                                                    _mm512_permutexvar_ps(range, l->offset)));
    q = _mm512_min_epi32(q, _mm512_permutexvar_epi32(range, l->cap));
    *near = _mm512_testn_epi32_mask(_mm512_add_epi32(q, _mm512_set1_epi32(1)),
                                    _mm512_set1_epi32(HB_LADDER_UNIT - 2));
    return _mm512_srli_epi32(q, HB_LADDER_SHIFT);
}

// Sixteen bytes in the order of the lanes.
static inline __m128i sixteen_codes(const ladder *l, __m512 v, __m512i steps)
{
    __m128i zero = _mm512_castsi512_si128(l->zero), bytes = _mm512_cvtepi32_epi8(steps);
    if (!l->is_signed) return bytes;
    return _mm_mask_subs_epu8(_mm_add_epi8(zero, bytes),
                              _mm512_movepi32_mask(_mm512_castps_si512(v)), zero, bytes);
}

static inline __m512i sixty_four_codes(const ladder *l, const __m512 v[4], const __m512i steps[4])
{
    // Packing works in 128-bit lanes: dword 4 k + g of the result comes from vector g.
    const __m512i transpose =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i bytes = _mm512_packus_epi16(_mm512_packus_epi32(steps[0], steps[1]),
                                        _mm512_packus_epi32(steps[2], steps[3]));
    bytes = _mm512_permutexvar_epi32(transpose, bytes);
    if (!l->is_signed) return bytes;
    __mmask64 negative = 0;
    for (int g = 0; g < 4; g++)
        negative |= (__mmask64)_mm512_movepi32_mask(_mm512_castps_si512(v[g])) << (16 * g);
    return _mm512_mask_subs_epu8(_mm512_add_epi8(l->zero, bytes), negative, l->zero, bytes);
}

// Seldom: two of 4096 values, and blocks of zeros, whose v is NaN.
static __attribute__((noinline)) __m128i search_codes(const hb_search8 *search, __m512 v)
{
    const tree t = load_tree(search);
    return _mm512_cvtepi32_epi8(code_of(&t, v));
}

static inline void climb_blocks(const void *x, int64_t n, const hb_search8 *search,
                                int64_t blocksize, const float *absmax, uint8_t *codes, hb_dtype io)
{
    const ladder l = load_ladder(&search->ladder);
    for (int64_t i = 0; i < n; absmax++) {
        const __m512 inverse = _mm512_set1_ps(1.0f / *absmax);
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        for (; i + 64 <= end; i += 64) {
            __m512 v[4];
            __m512i steps[4];
            __mmask16 near[4];
            for (int g = 0; g < 4; g++) {
                v[g] = _mm512_mul_ps(load_f32x16(x, i + 16 * g, io), inverse);
                steps[g] = climb(&l, v[g], &near[g]);
            }
            _mm512_storeu_si512(codes + i, sixty_four_codes(&l, v, steps));
            if (__builtin_expect(near[0] | near[1] | near[2] | near[3], 0))
                for (int g = 0; g < 4; g++)
                    if (near[g] != 0)
                        _mm_storeu_si128((void *)(codes + i + 16 * g), search_codes(search, v[g]));
        }
        for (; i < end; i += 16) {
            __mmask16 lanes = first_lanes(end - i), near;
            __m512 v = _mm512_mul_ps(load_lanes_f32x16(x, i, lanes, io), inverse);
            __m128i code = sixteen_codes(&l, v, climb(&l, v, &near));
            if ((near & lanes) != 0) code = search_codes(search, v);
            _mm_mask_storeu_epi8(codes + i, lanes, code);
        }
        i = end;
    }
}

static inline void search_blocks(const void *x, int64_t n, const hb_search8 *search,
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
        if (search->ladder.fits)                                                                   \
            climb_blocks(x, n, search, blocksize, absmax, codes, dtype);                           \
        else                                                                                       \
            search_blocks(x, n, search, blocksize, absmax, codes, dtype);                          \
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
