// 8-bit block-wise format with AVX-512 F/BW/DQ/VL. Formula, layout, source: ref/codec8.c.
//
// Encode: for maps with a ladder (kernels_codec.h) 64 codes at once by arithmetic; where one of
// them is too near to a threshold, and for all other maps, eight steps down the search tree: its
// 255 thresholds stay in sixteen registers, so that a step is a register permutation (two and
// blends on the last levels) and a comparison. Decode: a gather per sixteen elements. Accuracy:
// bit-equal to the reference.
#include "cpu/avx512/ladder8.h"

static inline void climb_blocks(const void *x, int64_t n, const hb_search8 *search,
                                int64_t blocksize, const float *absmax, uint8_t *codes, hb_dtype io)
{
    const ladder l = load_ladder(&search->ladder);
    for (int64_t i = 0; i < n; absmax++) {
        const __m512 inverse = _mm512_set1_ps(hb_inverse_scale(*absmax));
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        for (; i + 64 <= end; i += 64) {
            __m512 v[4];
            __m512i steps[4];
            __mmask16 near[4], negative[4];
            for (int g = 0; g < 4; g++) {
                v[g] = _mm512_mul_ps(load_f32x16(x, i + 16 * g, io), inverse);
                steps[g] = climb(&l, v[g], false, &near[g]);
                negative[g] = sign_bits(v[g]);
            }
            _mm512_storeu_si512(codes + i, sixty_four_codes(&l, negative, steps));
            if (__builtin_expect(near[0] | near[1] | near[2] | near[3], 0))
                for (int g = 0; g < 4; g++)
                    if (near[g] != 0)
                        _mm_storeu_si128((void *)(codes + i + 16 * g), search_codes(search, v[g]));
        }
        for (; i < end; i += 16) {
            __mmask16 lanes = first_lanes(end - i), near;
            __m512 v = _mm512_mul_ps(load_lanes_f32x16(x, i, lanes, io), inverse);
            __m128i code = sixteen_codes(&l, sign_bits(v), climb(&l, v, false, &near));
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
