// 8-bit block-wise format with AVX-512 F/BW/DQ/VL. Formula, layout, source: ref/codec8.c.
//
// Encode: for maps with a ladder (kernels_codec.h) 64 codes at once by arithmetic; where one of
// them is too near to a threshold, and for all other maps, eight steps down the search tree: its
// 255 thresholds stay in sixteen registers, so that a step is a register permutation (two and
// blends on the last levels) and a comparison. Decode: a gather per sixteen elements. Accuracy:
// bit-equal to the reference.
#include "cpu/avx512/words8.h"

#include "cpu/avx512/ladder8.h"

// v of up to 64 elements from i, 16 each; elements from `end` on are not read and count as 0.
static inline void load_sixty_four(const void *x, int64_t i, int64_t end, __m512 inverse,
                                   hb_dtype io, __m512 v[4])
{
    for (int g = 0; g < 4; g++, i += 16) {
        const __m512 value = end - i >= 16 ? load_f32x16(x, i, io)
                             : end > i     ? load_lanes_f32x16(x, i, first_lanes(end - i), io)
                                           : _mm512_setzero_ps();
        v[g] = _mm512_mul_ps(value, inverse);
    }
}

// Seldom: the lanes that arithmetic cannot decide, of each sixteen. Loads them once more, so that
// nothing has to be kept for this.
static __attribute__((noinline)) void search_lanes(const hb_search8 *search, const void *x,
                                                   int64_t i, int64_t end, __m512 inverse,
                                                   hb_dtype io, __mmask16 near, uint8_t *codes)
{
    const tree t = load_tree(search);
    __m512 v[4];
    load_sixty_four(x, i, end, inverse, io, v);
    for (int g = 0; g < 4; g++, i += 16) {
        const __mmask16 lanes = end > i ? near & first_lanes(end - i) : 0;
        _mm512_mask_cvtepi32_storeu_epi8(codes + i, lanes, code_of(&t, v[g]));
    }
}

// Up to 64 elements of a block. `whole`: not fewer, known to the compiler.
static inline __attribute__((always_inline)) void
climb_sixty_four(const ladder *l, const void *x, int64_t i, int64_t end, __m512 inverse,
                 const hb_search8 *search, uint8_t *codes, hb_dtype io, bool whole)
{
    __m512 v[4];
    __m512i t[4];
    __mmask16 negative[4];
    load_sixty_four(x, i, whole ? i + 64 : end, inverse, io, v);
    for (int g = 0; g < 4; g++) {
        __m512i bits = _mm512_castps_si512(magnitude(l, v[g]));
        bits = _mm512_min_epi32(bits, _mm512_castps_si512(_mm512_set1_ps(1.0f)));
        t[g] = climb(l, _mm512_castsi512_ps(bits));
        negative[g] = sign_bits(v[g]);
    }
    const __m512i code = sixty_four_codes(l, negative, t);
    if (whole)
        _mm512_storeu_si512(codes + i, code);
    else
        _mm512_mask_storeu_epi8(codes + i, ((__mmask64)1 << (end - i)) - 1, code);
    const __mmask16 nan =
        _mm512_cmp_ps_mask(v[0], v[1], _CMP_UNORD_Q) | _mm512_cmp_ps_mask(v[2], v[3], _CMP_UNORD_Q);
    const __mmask16 near = near_a_threshold(t) | nan;
    if (__builtin_expect(near != 0, 0)) search_lanes(search, x, i, end, inverse, io, near, codes);
}

static inline void climb_blocks(const void *x, int64_t n, const hb_search8 *search,
                                int64_t blocksize, const float *absmax, uint8_t *codes, hb_dtype io,
                                bool is_signed)
{
    const ladder l = load_ladder(search, is_signed);
    for (int64_t i = 0; i < n; absmax++) {
        const __m512 inverse = _mm512_set1_ps(hb_inverse_scale(*absmax));
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        for (; end - i >= 64; i += 64)
            climb_sixty_four(&l, x, i, end, inverse, search, codes, io, true);
        if (i < end) climb_sixty_four(&l, x, i, end, inverse, search, codes, io, false);
        i = end;
    }
}

static inline void search_blocks(const void *x, int64_t n, const hb_search8 *search,
                                 int64_t blocksize, const float *absmax, uint8_t *codes,
                                 hb_dtype io)
{
    const tree t = load_tree(search);
    for (int64_t i = 0; i < n; absmax++) {
        const __m512 inverse = _mm512_set1_ps(hb_inverse_scale(*absmax));
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
        if (search->decades.fits && search->decades.is_signed)                                     \
            climb_blocks(x, n, search, blocksize, absmax, codes, dtype, true);                     \
        else if (search->decades.fits)                                                             \
            climb_blocks(x, n, search, blocksize, absmax, codes, dtype, false);                    \
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
