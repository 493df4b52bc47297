// Row-wise int8 (LLM.int8()) with AVX2. Formula, layout, source: ref/int8.c.
// Accuracy: bit-equal to the reference.
#include "cpu/avx2/io.h"

static inline float absmax_row(const void *x, int64_t n, float threshold, hb_dtype io)
{
    const __m256 limit = _mm256_set1_ps(threshold);
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 8) {
        __m256 v = magnitude_f32x8(load_upto_f32x8(x, i, n, io));
        v = _mm256_and_ps(v, _mm256_cmp_ps(v, limit, _CMP_NGE_UQ)); // NaN is kept
        largest = _mm256_max_epi32(largest, _mm256_castps_si256(v));
    }
    return largest_of_magnitudes(largest);
}

static inline void mark_outliers(const void *x, int64_t n, float threshold, uint8_t *mark,
                                 hb_dtype io)
{
    const __m256 limit = _mm256_set1_ps(threshold);
    for (int64_t i = 0; i < n; i += 8) {
        __m256 v = magnitude_f32x8(load_upto_f32x8(x, i, n, io));
        int outlier = _mm256_movemask_ps(_mm256_cmp_ps(v, limit, _CMP_GE_OQ));
        for (int l = 0; outlier != 0 && l < 8 && i + l < n; l++)
            if (outlier >> l & 1) mark[i + l] = 1;
    }
}

static inline void encode_row(const void *x, int64_t n, float absmax, float threshold,
                              const uint8_t *zero, int8_t *codes, hb_dtype io)
{
    const __m256 factor = _mm256_set1_ps(127.0f / absmax);
    const __m256 limit = _mm256_set1_ps(threshold);
    const __m256 most = _mm256_set1_ps(127.0f), least = _mm256_set1_ps(-127.0f);
    for (int64_t i = 0; i < n; i += 8) {
        const size_t count = n - i < 8 ? (size_t)(n - i) : 8;
        __m256 value = load_upto_f32x8(x, i, n, io);
        __m256 v = _mm256_mul_ps(value, factor);
        __m256 kept = _mm256_and_ps(_mm256_cmp_ps(v, v, _CMP_ORD_Q),
                                    _mm256_cmp_ps(magnitude_f32x8(value), limit, _CMP_NGE_UQ));
        v = _mm256_max_ps(_mm256_min_ps(v, most), least);
        __m256i code = _mm256_and_si256(_mm256_cvtps_epi32(v), _mm256_castps_si256(kept));
        __m128i words =
            _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
        __m128i bytes = _mm_packs_epi16(words, words);
        uint64_t marks = 0;
        if (zero) {
            memcpy(&marks, zero + i, count);
            __m128i clear = _mm_cmpeq_epi8(_mm_cvtsi64_si128((int64_t)marks), _mm_setzero_si128());
            bytes = _mm_and_si128(bytes, clear);
        }
        int64_t eight = _mm_cvtsi128_si64(bytes);
        memcpy(codes + i, &eight, count);
    }
}

static inline void decode_row(const int8_t *codes, int64_t n, float scale, void *out, hb_dtype io)
{
    const __m256 factor = _mm256_set1_ps(scale), unit = _mm256_set1_ps(HB_INT8_UNIT);
    for (int64_t i = 0; i < n; i += 8) {
        int64_t eight = 0;
        memcpy(&eight, codes + i, n - i < 8 ? (size_t)(n - i) : 8);
        __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(eight)));
        __m256 v = _mm256_mul_ps(_mm256_mul_ps(code, factor), unit);
        store_upto_f32x8(out, i, n, v, false, io);
    }
}

#define INT8(io, dtype)                                                                            \
    float hb_int8_absmax_##io##_avx2(const void *x, int64_t n, float threshold)                    \
    {                                                                                              \
        return absmax_row(x, n, threshold, dtype);                                                 \
    }                                                                                              \
    void hb_int8_outliers_##io##_avx2(const void *x, int64_t n, float threshold, uint8_t *mark)    \
    {                                                                                              \
        mark_outliers(x, n, threshold, mark, dtype);                                               \
    }                                                                                              \
    void hb_int8_encode_##io##_avx2(const void *x, int64_t n, float absmax, float threshold,       \
                                    const uint8_t *zero, int8_t *codes)                            \
    {                                                                                              \
        encode_row(x, n, absmax, threshold, zero, codes, dtype);                                   \
    }                                                                                              \
    void hb_int8_decode_##io##_avx2(const int8_t *codes, int64_t n, float scale, void *out)        \
    {                                                                                              \
        decode_row(codes, n, scale, out, dtype);                                                   \
    }
INT8(f32, HB_F32)
INT8(bf16, HB_BF16)
INT8(f16, HB_F16)
