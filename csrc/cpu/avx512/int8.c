// Row-wise int8 (LLM.int8()) with AVX-512 F/BW/DQ/VL. Formula, layout, source: ref/int8.c.
// Accuracy: bit-equal to the reference.
#include "cpu/avx512/io.h"

static inline float absmax_row(const void *x, int64_t n, float threshold, hb_dtype io)
{
    const __m512 limit = _mm512_set1_ps(threshold);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16) {
        __m512 v = magnitude_f32x16(load_lanes_f32x16(x, i, first_lanes(n - i), io));
        __mmask16 kept = _mm512_cmp_ps_mask(v, limit, _CMP_NGE_UQ); // NaN is kept
        largest = _mm512_mask_max_epi32(largest, kept, largest, _mm512_castps_si512(v));
    }
    return largest_of_magnitudes(largest);
}

static inline void mark_outliers(const void *x, int64_t n, float threshold, uint8_t *mark,
                                 hb_dtype io)
{
    const __m512 limit = _mm512_set1_ps(threshold);
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 lanes = first_lanes(n - i);
        __m512 v = magnitude_f32x16(load_lanes_f32x16(x, i, lanes, io));
        __mmask16 outlier = _mm512_mask_cmp_ps_mask(lanes, v, limit, _CMP_GE_OQ);
        if (outlier) _mm_mask_storeu_epi8(mark + i, outlier, _mm_set1_epi8(1));
    }
}

static inline void encode_row(const void *x, int64_t n, float absmax, float threshold,
                              const uint8_t *zero, int8_t *codes, hb_dtype io)
{
    const __m512 factor = _mm512_set1_ps(127.0f / absmax);
    const __m512 limit = _mm512_set1_ps(threshold);
    const __m512 most = _mm512_set1_ps(127.0f), least = _mm512_set1_ps(-127.0f);
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 lanes = first_lanes(n - i);
        __m512 value = load_lanes_f32x16(x, i, lanes, io);
        __m512 v = _mm512_mul_ps(value, factor);
        __mmask16 kept = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
        kept = _mm512_mask_cmp_ps_mask(kept, magnitude_f32x16(value), limit, _CMP_NGE_UQ);
        if (zero) {
            __m128i marks = _mm_maskz_loadu_epi8(lanes, zero + i);
            kept &= (__mmask16)_mm_movemask_epi8(_mm_cmpeq_epi8(marks, _mm_setzero_si128()));
        }
        v = _mm512_max_ps(_mm512_min_ps(v, most), least);
        __m512i code = _mm512_maskz_mov_epi32(kept, _mm512_cvtps_epi32(v));
        _mm512_mask_cvtepi32_storeu_epi8(codes + i, lanes, code);
    }
}

static inline void decode_row(const int8_t *codes, int64_t n, float scale, void *out, hb_dtype io)
{
    const __m512 factor = _mm512_set1_ps(scale), unit = _mm512_set1_ps(HB_INT8_UNIT);
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 lanes = first_lanes(n - i);
        __m512i code = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, codes + i));
        __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(code), factor), unit);
        store_lanes_f32x16(out, i, v, lanes, io);
    }
}

#define INT8(io, dtype)                                                                            \
    float hb_int8_absmax_##io##_avx512(const void *x, int64_t n, float threshold)                  \
    {                                                                                              \
        return absmax_row(x, n, threshold, dtype);                                                 \
    }                                                                                              \
    void hb_int8_outliers_##io##_avx512(const void *x, int64_t n, float threshold, uint8_t *mark)  \
    {                                                                                              \
        mark_outliers(x, n, threshold, mark, dtype);                                               \
    }                                                                                              \
    void hb_int8_encode_##io##_avx512(const void *x, int64_t n, float absmax, float threshold,     \
                                      const uint8_t *zero, int8_t *codes)                          \
    {                                                                                              \
        encode_row(x, n, absmax, threshold, zero, codes, dtype);                                   \
    }                                                                                              \
    void hb_int8_decode_##io##_avx512(const int8_t *codes, int64_t n, float scale, void *out)      \
    {                                                                                              \
        decode_row(codes, n, scale, out, dtype);                                                   \
    }
INT8(f32, HB_F32)
INT8(bf16, HB_BF16)
INT8(f16, HB_F16)
