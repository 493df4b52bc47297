// 8-bit block-wise format with AVX2. Formula, layout, source: ref/codec8.c.
//
// Encode: for maps with decades (kernels_codec.h) 32 codes at once by arithmetic; where one of
// them is too near to a threshold, and for all other maps, eight steps down the search tree, of
// which levels 0..5 stay in registers (63 thresholds) and the last two are gathered. Decode: one
// entry after the other. Accuracy: bit-equal to the reference.
#include "cpu/avx2/ladder8.h"

// v of 32 elements, 8 each.
static inline void load_thirty_two(const void *x, int64_t i, __m256 inverse, hb_dtype io,
                                   __m256 v[4])
{
    for (int g = 0; g < 4; g++) v[g] = _mm256_mul_ps(load_f32x8(x, i + 8 * g, io), inverse);
}

// Seldom, one of 100 groups of 32: all of them. Loads them once more, so that nothing has to be
// kept for this.
static __attribute__((noinline)) void search_thirty_two(const hb_search8 *search, const void *x,
                                                        int64_t i, __m256 inverse, hb_dtype io,
                                                        uint8_t *codes)
{
    const tree t = load_tree(search);
    __m256 v[4];
    load_thirty_two(x, i, inverse, io, v);
    for (int g = 0; g < 4; g++) {
        const uint64_t bytes = low_bytes(code_of(&t, v[g]));
        memcpy(codes + 8 * g, &bytes, 8);
    }
}

// The codes of 32 elements of a block from i.
static inline __attribute__((always_inline)) void climb_thirty_two(const ladder *l, const void *x,
                                                                   int64_t i, __m256 inverse,
                                                                   const hb_search8 *search,
                                                                   uint8_t *codes, hb_dtype io)
{
    __m256 v[4];
    __m256i t[4];
    load_thirty_two(x, i, inverse, io, v);
    for (int g = 0; g < 4; g++)
        t[g] = climb(l, _mm256_min_ps(magnitude(l, v[g]), _mm256_set1_ps(1.0f)));
    __m256i code = pack_steps(l, t);
    if (l->is_signed) code = codes_of_steps(l, code, pack_signs(v));
    _mm256_storeu_si256((void *)codes, in_order(code));
    const __m256 nan = _mm256_or_ps(_mm256_cmp_ps(v[0], v[1], _CMP_UNORD_Q),
                                    _mm256_cmp_ps(v[2], v[3], _CMP_UNORD_Q));
    const unsigned near = near_a_threshold(t) | (unsigned)_mm256_movemask_ps(nan);
    if (__builtin_expect(near != 0, 0)) search_thirty_two(search, x, i, inverse, io, codes);
}

static inline __attribute__((always_inline)) void
climb_blocks(const void *x, int64_t n, const hb_search8 *search, int64_t blocksize,
             const float *absmax, uint8_t *codes, hb_dtype io, bool is_signed)
{
    const size_t bytes = hb_dtype_bytes(io);
    const ladder l = load_ladder(search, is_signed);
    for (int64_t i = 0; i < n; absmax++) {
        const __m256 inverse = _mm256_set1_ps(hb_inverse_scale(*absmax));
        const int64_t end = n - i < blocksize ? n : i + blocksize;
        for (; end - i >= 32; i += 32) climb_thirty_two(&l, x, i, inverse, search, codes + i, io);
        if (i < end) {
            float rest[32] = {0};
            uint8_t some[32];
            memcpy(rest, (const uint8_t *)x + (size_t)i * bytes, (size_t)(end - i) * bytes);
            climb_thirty_two(&l, rest, 0, inverse, search, some, io);
            memcpy(codes + i, some, (size_t)(end - i));
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
        for (; i + 8 <= end; i += 8) {
            const __m256 value = _mm256_mul_ps(look_up_eight(map, codes + i), scale);
            store_f32x8(out, i, value, stream, io);
        }
        if (i < end) {
            uint8_t rest[8] = {0};
            memcpy(rest, codes + i, (size_t)(end - i));
            const __m256 value = _mm256_mul_ps(look_up_eight(map, rest), scale);
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
        if (search->decades.fits && search->decades.is_signed)                                     \
            climb_blocks(x, n, search, blocksize, absmax, codes, dtype, true);                     \
        else if (search->decades.fits)                                                             \
            climb_blocks(x, n, search, blocksize, absmax, codes, dtype, false);                    \
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
