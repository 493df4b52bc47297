// 8-bit block-wise format with AVX2. Formula, layout, source: ref/codec8.c.
//
// Encode: for maps with a ladder (kernels_codec.h) 32 codes at once by arithmetic; where one of
// them is too near to a threshold, and for all other maps, eight steps down the search tree, of
// which levels 0..5 stay in registers (63 thresholds) and the last two are gathered. Decode: a
// gather per eight elements. Accuracy: bit-equal to the reference.
#include "cpu/avx2/ladder8.h"

static inline void climb_blocks(const void *x, int64_t n, const hb_search8 *search,
                                int64_t blocksize, const float *absmax, uint8_t *codes, hb_dtype io)
{
    const ladder l = load_ladder(&search->ladder);
    for (int64_t i = 0; i < n; absmax++) {
        const __m256 inverse = _mm256_set1_ps(hb_inverse_scale(*absmax));
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        for (; i < end; i += 32) {
            uint8_t part[32], *target = i + 32 <= end ? codes + i : part;
            __m256 v[4];
            __m256i steps[4], near[4];
            for (int g = 0; g < 4; g++) {
                v[g] = _mm256_setzero_ps();
                if (i + 8 * g < end)
                    v[g] = _mm256_mul_ps(load_upto_f32x8(x, i + 8 * g, end, io), inverse);
                steps[g] = climb(&l, v[g], &near[g]);
            }
            _mm256_storeu_si256((void *)target, thirty_two_codes(&l, v, steps));
            __m256i any = _mm256_or_si256(_mm256_or_si256(near[0], near[1]),
                                          _mm256_or_si256(near[2], near[3]));
            if (__builtin_expect(!_mm256_testz_si256(any, any), 0))
                search_thirty_two(search, v, target);
            if (target == part) memcpy(codes + i, part, (size_t)(end - i));
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
        const __m256 inverse = _mm256_set1_ps(hb_inverse_scale(*absmax));
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        for (; i < end; i += 8) {
            __m256 v = _mm256_mul_ps(load_upto_f32x8(x, i, end, io), inverse);
            uint64_t bytes = low_bytes(code_of(&t, v));
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
        if (search->ladder.fits)                                                                   \
            climb_blocks(x, n, search, blocksize, absmax, codes, dtype);                           \
        else                                                                                       \
            search_blocks(x, n, search, blocksize, absmax, codes, dtype);                          \
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
