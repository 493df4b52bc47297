// Intrinsics that SIMDe 0.8.2 lacks or renders loosely, in portable C: elements are copied to
// arrays, worked on one by one, and copied back, after the pseudocode of the Intel Intrinsics
// Guide. Used by the emulated test programs only. test_simde.c compares them with the instructions
// where these exist.
//
// Where a name is added to SIMDe later, the #undef here keeps ours.
#ifndef HB_SIMDE_MISSING_H
#define HB_SIMDE_MISSING_H

#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef __mmask8 // SIMDe knows simde__mmask8 only
#define __mmask8 uint8_t
#endif

#define HB_GET_(type, lanes, array, vector)                                                        \
    type array[lanes];                                                                             \
    memcpy(array, &(vector), sizeof array)
#define HB_RETURN_(vec, array)                                                                     \
    vec result_;                                                                                   \
    memcpy(&result_, array, sizeof result_);                                                       \
    return result_
#define HB_FOR_(lanes) for (int i = 0; i < (lanes); i++)
#define HB_BIT_(mask)  (((uint64_t)(mask) >> i) & 1u)

// ---- masked loads and stores: lanes outside the mask are not touched
// ------------------------------

#define HB_MASKED_MEMORY_(prefix, suffix, vec, mask, type, lanes)                                  \
    static inline vec hb_##prefix##_mask_loadu_##suffix(vec source, mask k, const void *p)         \
    {                                                                                              \
        HB_GET_(type, lanes, r, source);                                                           \
        HB_FOR_(lanes)                                                                             \
        if (HB_BIT_(k)) memcpy(&r[i], (const char *)p + (size_t)i * sizeof(type), sizeof(type));   \
        HB_RETURN_(vec, r);                                                                        \
    }                                                                                              \
    static inline vec hb_##prefix##_maskz_loadu_##suffix(mask k, const void *p)                    \
    {                                                                                              \
        vec zero;                                                                                  \
        memset(&zero, 0, sizeof zero);                                                             \
        return hb_##prefix##_mask_loadu_##suffix(zero, k, p);                                      \
    }                                                                                              \
    static inline void hb_##prefix##_mask_storeu_##suffix(void *p, mask k, vec a)                  \
    {                                                                                              \
        HB_GET_(type, lanes, r, a);                                                                \
        HB_FOR_(lanes)                                                                             \
        if (HB_BIT_(k)) memcpy((char *)p + (size_t)i * sizeof(type), &r[i], sizeof(type));         \
    }

HB_MASKED_MEMORY_(mm512, epi8, __m512i, __mmask64, int8_t, 64)
HB_MASKED_MEMORY_(mm512, epi16, __m512i, __mmask32, int16_t, 32)
HB_MASKED_MEMORY_(mm512, epi32, __m512i, __mmask16, int32_t, 16)
HB_MASKED_MEMORY_(mm512, ps, __m512, __mmask16, int32_t, 16)
HB_MASKED_MEMORY_(mm256, epi8, __m256i, __mmask32, int8_t, 32)
HB_MASKED_MEMORY_(mm256, epi16, __m256i, __mmask16, int16_t, 16)
HB_MASKED_MEMORY_(mm256, epi32, __m256i, __mmask8, int32_t, 8)
HB_MASKED_MEMORY_(mm256, ps, __m256, __mmask8, int32_t, 8)
HB_MASKED_MEMORY_(mm, epi8, __m128i, __mmask16, int8_t, 16)
HB_MASKED_MEMORY_(mm, epi16, __m128i, __mmask8, int16_t, 8)
HB_MASKED_MEMORY_(mm, epi32, __m128i, __mmask8, int32_t, 4)
HB_MASKED_MEMORY_(mm, ps, __m128, __mmask8, int32_t, 4)
#undef _mm512_mask_loadu_epi8
#define _mm512_mask_loadu_epi8 hb_mm512_mask_loadu_epi8
#undef _mm512_mask_loadu_epi16
#define _mm512_mask_loadu_epi16 hb_mm512_mask_loadu_epi16
#undef _mm512_mask_loadu_epi32
#define _mm512_mask_loadu_epi32 hb_mm512_mask_loadu_epi32
#undef _mm512_mask_loadu_ps
#define _mm512_mask_loadu_ps hb_mm512_mask_loadu_ps
#undef _mm256_mask_loadu_epi8
#define _mm256_mask_loadu_epi8 hb_mm256_mask_loadu_epi8
#undef _mm256_mask_loadu_epi16
#define _mm256_mask_loadu_epi16 hb_mm256_mask_loadu_epi16
#undef _mm256_mask_loadu_epi32
#define _mm256_mask_loadu_epi32 hb_mm256_mask_loadu_epi32
#undef _mm256_mask_loadu_ps
#define _mm256_mask_loadu_ps hb_mm256_mask_loadu_ps
#undef _mm_mask_loadu_epi8
#define _mm_mask_loadu_epi8 hb_mm_mask_loadu_epi8
#undef _mm_mask_loadu_epi16
#define _mm_mask_loadu_epi16 hb_mm_mask_loadu_epi16
#undef _mm_mask_loadu_epi32
#define _mm_mask_loadu_epi32 hb_mm_mask_loadu_epi32
#undef _mm_mask_loadu_ps
#define _mm_mask_loadu_ps hb_mm_mask_loadu_ps
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8 hb_mm512_maskz_loadu_epi8
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 hb_mm512_maskz_loadu_epi16
#undef _mm512_maskz_loadu_epi32
#define _mm512_maskz_loadu_epi32 hb_mm512_maskz_loadu_epi32
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps hb_mm512_maskz_loadu_ps
#undef _mm256_maskz_loadu_epi8
#define _mm256_maskz_loadu_epi8 hb_mm256_maskz_loadu_epi8
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 hb_mm256_maskz_loadu_epi16
#undef _mm256_maskz_loadu_epi32
#define _mm256_maskz_loadu_epi32 hb_mm256_maskz_loadu_epi32
#undef _mm256_maskz_loadu_ps
#define _mm256_maskz_loadu_ps hb_mm256_maskz_loadu_ps
#undef _mm_maskz_loadu_epi8
#define _mm_maskz_loadu_epi8 hb_mm_maskz_loadu_epi8
#undef _mm_maskz_loadu_epi16
#define _mm_maskz_loadu_epi16 hb_mm_maskz_loadu_epi16
#undef _mm_maskz_loadu_epi32
#define _mm_maskz_loadu_epi32 hb_mm_maskz_loadu_epi32
#undef _mm_maskz_loadu_ps
#define _mm_maskz_loadu_ps hb_mm_maskz_loadu_ps
#undef _mm512_mask_storeu_epi8
#define _mm512_mask_storeu_epi8 hb_mm512_mask_storeu_epi8
#undef _mm512_mask_storeu_epi16
#define _mm512_mask_storeu_epi16 hb_mm512_mask_storeu_epi16
#undef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32 hb_mm512_mask_storeu_epi32
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps hb_mm512_mask_storeu_ps
#undef _mm256_mask_storeu_epi8
#define _mm256_mask_storeu_epi8 hb_mm256_mask_storeu_epi8
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 hb_mm256_mask_storeu_epi16
#undef _mm256_mask_storeu_epi32
#define _mm256_mask_storeu_epi32 hb_mm256_mask_storeu_epi32
#undef _mm256_mask_storeu_ps
#define _mm256_mask_storeu_ps hb_mm256_mask_storeu_ps
#undef _mm_mask_storeu_epi8
#define _mm_mask_storeu_epi8 hb_mm_mask_storeu_epi8
#undef _mm_mask_storeu_epi16
#define _mm_mask_storeu_epi16 hb_mm_mask_storeu_epi16
#undef _mm_mask_storeu_epi32
#define _mm_mask_storeu_epi32 hb_mm_mask_storeu_epi32
#undef _mm_mask_storeu_ps
#define _mm_mask_storeu_ps hb_mm_mask_storeu_ps

// ---- element by element
// ---------------------------------------------------------------------------

// out[i] = expression of a[i] (and b[i]); lanes of `out` beyond `lanes` are zero.
#define HB_MAP1_(name, in_vec, in_type, lanes, out_vec, out_type, out_lanes, expression)           \
    static inline out_vec hb_##name(in_vec va)                                                     \
    {                                                                                              \
        HB_GET_(in_type, lanes, a, va);                                                            \
        out_type r[out_lanes] = {0};                                                               \
        HB_FOR_(lanes) r[i] = (out_type)(expression);                                              \
        HB_RETURN_(out_vec, r);                                                                    \
    }
#define HB_MAP2_(name, vec, type, lanes, expression)                                               \
    static inline vec hb_##name(vec va, vec vb)                                                    \
    {                                                                                              \
        HB_GET_(type, lanes, a, va);                                                               \
        HB_GET_(type, lanes, b, vb);                                                               \
        type r[lanes];                                                                             \
        HB_FOR_(lanes) r[i] = (type)(expression);                                                  \
        HB_RETURN_(vec, r);                                                                        \
    }
#define HB_COMPARE_(name, vec, type, lanes, mask, operator)                                        \
    static inline mask hb_##name(vec va, vec vb)                                                   \
    {                                                                                              \
        HB_GET_(type, lanes, a, va);                                                               \
        HB_GET_(type, lanes, b, vb);                                                               \
        mask k = 0;                                                                                \
        HB_FOR_(lanes) if (a[i] operator b[i]) k |= (mask)((mask)1 << i);                          \
        return k;                                                                                  \
    }

#define HB_CLAMP_(x, low, high) ((x) < (low) ? (low) : (x) > (high) ? (high) : (x))

// What is no uint32_t becomes the largest one.
HB_MAP1_(mm512_cvttps_epu32, __m512, float, 16, __m512i, uint32_t, 16,
         a[i] > -1.0f && a[i] < 0x1p32f ? (uint32_t)a[i] : UINT32_MAX)
HB_MAP1_(mm512_cvtepi8_epi32, __m128i, int8_t, 16, __m512i, int32_t, 16, a[i])
HB_MAP1_(mm512_cvtepu8_epi32, __m128i, uint8_t, 16, __m512i, int32_t, 16, a[i])
HB_MAP1_(mm512_cvtepu8_epi16, __m256i, uint8_t, 32, __m512i, int16_t, 32, a[i])
HB_MAP1_(mm512_cvtepi32_epi8, __m512i, int32_t, 16, __m128i, int8_t, 16, a[i])
HB_MAP1_(mm512_cvtepi32_epi16, __m512i, int32_t, 16, __m256i, int16_t, 16, a[i])
HB_MAP1_(mm512_cvtsepi32_epi8, __m512i, int32_t, 16, __m128i, int8_t, 16,
         HB_CLAMP_(a[i], -128, 127))
HB_MAP1_(mm512_cvtusepi32_epi8, __m512i, uint32_t, 16, __m128i, uint8_t, 16,
         a[i] > 255 ? 255 : a[i])
HB_MAP1_(mm512_cvtusepi32_epi16, __m512i, uint32_t, 16, __m256i, uint16_t, 16,
         a[i] > 65535 ? 65535 : a[i])
HB_MAP1_(mm512_cvtusepi16_epi8, __m512i, uint16_t, 32, __m256i, uint8_t, 32,
         a[i] > 255 ? 255 : a[i])
HB_MAP1_(mm512_cvtepi64_epi8, __m512i, int64_t, 8, __m128i, int8_t, 16, a[i])
HB_MAP1_(mm256_cvtepi16_epi8, __m256i, int16_t, 16, __m128i, int8_t, 16, a[i])
HB_MAP1_(mm256_cvtepi32_epi8, __m256i, int32_t, 8, __m128i, int8_t, 16, a[i])
HB_MAP1_(mm256_cvtepi32_epi16, __m256i, int32_t, 8, __m128i, int16_t, 8, a[i])
HB_MAP1_(mm256_cvtusepi16_epi8, __m256i, uint16_t, 16, __m128i, uint8_t, 16,
         a[i] > 255 ? 255 : a[i])
HB_MAP1_(mm256_cvtusepi32_epi8, __m256i, uint32_t, 8, __m128i, uint8_t, 16, a[i] > 255 ? 255 : a[i])
HB_MAP1_(mm_cvtepi16_epi8, __m128i, int16_t, 8, __m128i, int8_t, 16, a[i])
HB_MAP1_(mm_cvtepi32_epi8, __m128i, int32_t, 4, __m128i, int8_t, 16, a[i])
HB_MAP1_(mm512_cvtps_pd, __m256, float, 8, __m512d, double, 8, a[i])
HB_MAP1_(mm512_cvtpd_ps, __m512d, double, 8, __m256, float, 8, a[i])
HB_MAP1_(mm512_cvtepi32_pd, __m256i, int32_t, 8, __m512d, double, 8, a[i])
HB_MAP1_(mm512_zextsi256_si512, __m256i, int64_t, 4, __m512i, int64_t, 8, a[i])
HB_MAP1_(mm512_zextsi128_si512, __m128i, int64_t, 2, __m512i, int64_t, 8, a[i])
HB_MAP1_(mm512_zextps256_ps512, __m256, float, 8, __m512, float, 16, a[i])
HB_MAP1_(mm512_moveldup_ps, __m512, float, 16, __m512, float, 16, a[i & ~1])
HB_MAP1_(mm512_movehdup_ps, __m512, float, 16, __m512, float, 16, a[i | 1])
HB_MAP2_(mm512_mulhi_epu16, __m512i, uint16_t, 32, ((uint32_t)a[i] * b[i]) >> 16)
HB_MAP2_(mm512_srav_epi32, __m512i, int32_t, 16, a[i] >> ((uint32_t)b[i] > 31 ? 31 : b[i]))
#define _mm512_cvttps_epu32   hb_mm512_cvttps_epu32
#define _mm512_cvtepi8_epi32  hb_mm512_cvtepi8_epi32
#define _mm512_cvtepu8_epi32  hb_mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi16  hb_mm512_cvtepu8_epi16
#define _mm512_cvtepi32_epi8  hb_mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi16 hb_mm512_cvtepi32_epi16
#undef _mm512_cvtsepi32_epi8
#define _mm512_cvtsepi32_epi8     hb_mm512_cvtsepi32_epi8
#define _mm512_cvtusepi32_epi8    hb_mm512_cvtusepi32_epi8
#define _mm512_cvtusepi32_epi16   hb_mm512_cvtusepi32_epi16
#define _mm512_cvtusepi16_epi8    hb_mm512_cvtusepi16_epi8
#define _mm512_cvtepi64_epi8      hb_mm512_cvtepi64_epi8
#define _mm256_cvtepi16_epi8      hb_mm256_cvtepi16_epi8
#define _mm256_cvtepi32_epi8      hb_mm256_cvtepi32_epi8
#define _mm256_cvtepi32_epi16     hb_mm256_cvtepi32_epi16
#define _mm256_cvtusepi16_epi8    hb_mm256_cvtusepi16_epi8
#define _mm256_cvtusepi32_epi8    hb_mm256_cvtusepi32_epi8
#define _mm_cvtepi16_epi8         hb_mm_cvtepi16_epi8
#define _mm_cvtepi32_epi8         hb_mm_cvtepi32_epi8
#define _mm512_cvtps_pd           hb_mm512_cvtps_pd
#define _mm512_cvtpd_ps           hb_mm512_cvtpd_ps
#define _mm512_cvtepi32_pd        hb_mm512_cvtepi32_pd
#define _mm512_zextsi256_si512    hb_mm512_zextsi256_si512
#define _mm512_zextsi128_si512    hb_mm512_zextsi128_si512
#define _mm512_zextps256_ps512    hb_mm512_zextps256_ps512
#define _mm512_broadcast_i32x8(a) _mm512_inserti64x4(_mm512_castsi256_si512(a), a, 1)
#define _mm512_moveldup_ps        hb_mm512_moveldup_ps
#define _mm512_movehdup_ps        hb_mm512_movehdup_ps
#define _mm512_mulhi_epu16        hb_mm512_mulhi_epu16
#define _mm512_srav_epi32         hb_mm512_srav_epi32

#define _mm512_mask_cvtepi32_storeu_epi8(p, k, a)                                                  \
    hb_mm_mask_storeu_epi8(p, (__mmask16)(k), hb_mm512_cvtepi32_epi8(a))
#define _mm512_mask_cvtepi32_storeu_epi16(p, k, a)                                                 \
    hb_mm256_mask_storeu_epi16(p, (__mmask16)(k), hb_mm512_cvtepi32_epi16(a))

HB_COMPARE_(mm512_cmpeq_epi16_mask, __m512i, int16_t, 32, __mmask32, ==)
HB_COMPARE_(mm512_cmplt_epi32_mask, __m512i, int32_t, 16, __mmask16, <)
HB_COMPARE_(mm512_cmpneq_epi32_mask, __m512i, int32_t, 16, __mmask16, !=)
HB_COMPARE_(mm512_cmpneq_epi8_mask, __m512i, int8_t, 64, __mmask64, !=)
HB_COMPARE_(mm512_cmpgt_epu32_mask, __m512i, uint32_t, 16, __mmask16, >)
HB_COMPARE_(mm512_cmplt_epu32_mask, __m512i, uint32_t, 16, __mmask16, <)
HB_COMPARE_(mm512_cmplt_epu16_mask, __m512i, uint16_t, 32, __mmask32, <)
HB_COMPARE_(mm256_cmpeq_epi8_mask, __m256i, int8_t, 32, __mmask32, ==)
HB_COMPARE_(mm256_cmpgt_epi8_mask, __m256i, int8_t, 32, __mmask32, >)
HB_COMPARE_(mm_cmpeq_epi8_mask, __m128i, int8_t, 16, __mmask16, ==)
#define _mm512_cmpeq_epi16_mask  hb_mm512_cmpeq_epi16_mask
#define _mm512_cmplt_epi32_mask  hb_mm512_cmplt_epi32_mask
#define _mm512_cmpneq_epi32_mask hb_mm512_cmpneq_epi32_mask
#define _mm512_cmpneq_epi8_mask  hb_mm512_cmpneq_epi8_mask
#define _mm512_cmpgt_epu32_mask  hb_mm512_cmpgt_epu32_mask
#define _mm512_cmplt_epu32_mask  hb_mm512_cmplt_epu32_mask
#define _mm512_cmplt_epu16_mask  hb_mm512_cmplt_epu16_mask
#define _mm256_cmpeq_epi8_mask   hb_mm256_cmpeq_epi8_mask
#define _mm256_cmpgt_epi8_mask   hb_mm256_cmpgt_epi8_mask
#define _mm_cmpeq_epi8_mask      hb_mm_cmpeq_epi8_mask
#define _mm512_mask_cmp_ps_mask(k, a, b, predicate)                                                \
    ((__mmask16)((k) & _mm512_cmp_ps_mask(a, b, predicate)))

// ---- sums over all lanes: halves added to halves, as gcc and clang expand them
// ----------------------

#define HB_REDUCE_ADD_(name, vec, type, lanes)                                                     \
    static inline type hb_##name(vec va)                                                           \
    {                                                                                              \
        HB_GET_(type, lanes, a, va);                                                               \
        for (int half = (lanes) / 2; half > 0; half /= 2) HB_FOR_(half) a[i] += a[i + half];       \
        return a[0];                                                                               \
    }
HB_REDUCE_ADD_(mm512_reduce_add_ps, __m512, float, 16)
HB_REDUCE_ADD_(mm512_reduce_add_pd, __m512d, double, 8)
static inline int32_t hb_mm512_reduce_add_epi32(__m512i va) // wraps around
{
    HB_GET_(uint32_t, 16, a, va);
    uint32_t sum = 0;
    HB_FOR_(16) sum += a[i];
    return (int32_t)sum;
}
#define _mm512_reduce_add_ps    hb_mm512_reduce_add_ps
#define _mm512_reduce_add_pd    hb_mm512_reduce_add_pd
#define _mm512_reduce_add_epi32 hb_mm512_reduce_add_epi32

// ---- 16-bit floats
// ----------------------------------------------------------------------------------

#include "core/dtype.h"

// VCVTNEPS2BF16: round to nearest even; NaN stays NaN (quiet); subnormal inputs count as zero.
static inline uint16_t hb_lane_to_bf16(float value)
{
    uint32_t bits = hb_f32_bits(value);
    return (bits & 0x7f800000u) == 0 ? (uint16_t)((bits >> 16) & 0x8000u) : hb_bf16_from_f32(value);
}

static inline float hb_flush(float value)
{
    uint32_t bits = hb_f32_bits(value);
    return (bits & 0x7f800000u) == 0 ? hb_f32_from_bits(bits & 0x80000000u) : value;
}

// VDPBF16PS: two fused multiply-adds, odd element first; subnormals are zero on the way in and out.
static inline float hb_lane_dpbf16(float sum, const uint16_t a[2], const uint16_t b[2])
{
    sum = hb_flush(sum);
    for (int i = 1; i >= 0; i--)
        sum =
            hb_flush(fmaf(hb_flush(hb_f32_from_bf16(a[i])), hb_flush(hb_f32_from_bf16(b[i])), sum));
    return sum;
}

#define HB_BF16_(prefix, vec, bh, half_bh, lanes)                                                  \
    static inline half_bh hb_##prefix##_cvtneps_pbh(vec va)                                        \
    {                                                                                              \
        HB_GET_(float, lanes, a, va);                                                              \
        uint16_t r[sizeof(half_bh) / 2] = {0};                                                     \
        HB_FOR_(lanes) r[i] = hb_lane_to_bf16(a[i]);                                               \
        HB_RETURN_(half_bh, r);                                                                    \
    }                                                                                              \
    static inline bh hb_##prefix##_cvtne2ps_pbh(vec va, vec vb) /* b in the low half */            \
    {                                                                                              \
        HB_GET_(float, lanes, a, va);                                                              \
        HB_GET_(float, lanes, b, vb);                                                              \
        uint16_t r[2 * (lanes)];                                                                   \
        HB_FOR_(lanes) r[i] = hb_lane_to_bf16(b[i]), r[i + (lanes)] = hb_lane_to_bf16(a[i]);       \
        HB_RETURN_(bh, r);                                                                         \
    }                                                                                              \
    static inline vec hb_##prefix##_dpbf16_ps(vec sum, bh va, bh vb)                               \
    {                                                                                              \
        HB_GET_(float, lanes, r, sum);                                                             \
        HB_GET_(uint16_t, 2 * (lanes), a, va);                                                     \
        HB_GET_(uint16_t, 2 * (lanes), b, vb);                                                     \
        HB_FOR_(lanes) r[i] = hb_lane_dpbf16(r[i], a + 2 * i, b + 2 * i);                          \
        HB_RETURN_(vec, r);                                                                        \
    }
HB_BF16_(mm512, __m512, __m512bh, __m256bh, 16)
HB_BF16_(mm256, __m256, __m256bh, __m128bh, 8)
#undef _mm512_dpbf16_ps
#undef _mm256_dpbf16_ps
#define _mm512_cvtneps_pbh  hb_mm512_cvtneps_pbh
#define _mm256_cvtneps_pbh  hb_mm256_cvtneps_pbh
#define _mm512_cvtne2ps_pbh hb_mm512_cvtne2ps_pbh
#define _mm256_cvtne2ps_pbh hb_mm256_cvtne2ps_pbh
#define _mm512_dpbf16_ps    hb_mm512_dpbf16_ps
#define _mm256_dpbf16_ps    hb_mm256_dpbf16_ps

// VCVTPH2PS and VCVTPS2PH with round to nearest even (the rounding argument is ignored); SIMDe's
// own versions pass subnormals and NaN through other paths.
HB_MAP1_(mm512_cvtph_ps, __m256i, uint16_t, 16, __m512, float, 16, hb_f32_from_f16(a[i]))
HB_MAP1_(mm256_cvtph_ps, __m128i, uint16_t, 8, __m256, float, 8, hb_f32_from_f16(a[i]))
HB_MAP1_(mm512_cvtps_ph, __m512, float, 16, __m256i, uint16_t, 16, hb_f16_from_f32(a[i]))
HB_MAP1_(mm256_cvtps_ph, __m256, float, 8, __m128i, uint16_t, 8, hb_f16_from_f32(a[i]))
#undef _mm512_cvtph_ps
#undef _mm256_cvtph_ps
#undef _mm256_cvtps_ph
#define _mm512_cvtph_ps                    hb_mm512_cvtph_ps
#define _mm256_cvtph_ps                    hb_mm256_cvtph_ps
#define _mm512_cvtps_ph(a, rounding)       hb_mm512_cvtps_ph(a)
#define _mm512_cvt_roundps_ph(a, rounding) hb_mm512_cvtps_ph(a)
#define _mm256_cvtps_ph(a, rounding)       hb_mm256_cvtps_ph(a)
static inline float hb_cvtsh_ss(uint16_t a)
{
    return hb_f32_from_f16(a);
}
#define _cvtsh_ss              hb_cvtsh_ss
#define _cvtss_sh(a, rounding) hb_f16_from_f32(a)

// ---- the rest
// ---------------------------------------------------------------------------------------

#undef _mm512_dpbusd_epi32 // exact: 4 products of u8 and s8, no saturation
static inline __m512i hb_mm512_dpbusd_epi32(__m512i sum, __m512i va, __m512i vb)
{
    HB_GET_(uint32_t, 16, r, sum);
    HB_GET_(uint8_t, 64, a, va);
    HB_GET_(int8_t, 64, b, vb);
    HB_FOR_(64) r[i / 4] += (uint32_t)((int)a[i] * b[i]);
    HB_RETURN_(__m512i, r);
}
#define _mm512_dpbusd_epi32 hb_mm512_dpbusd_epi32

#undef _mm256_dpbusd_epi32
static inline __m256i hb_mm256_dpbusd_epi32(__m256i sum, __m256i va, __m256i vb)
{
    HB_GET_(uint32_t, 8, r, sum);
    HB_GET_(uint8_t, 32, a, va);
    HB_GET_(int8_t, 32, b, vb);
    HB_FOR_(32) r[i / 4] += (uint32_t)((int)a[i] * b[i]);
    HB_RETURN_(__m256i, r);
}
#define _mm256_dpbusd_epi32 hb_mm256_dpbusd_epi32

#undef _mm256_dpwssd_epi32 // wraps around as well
static inline __m256i hb_mm256_dpwssd_epi32(__m256i sum, __m256i va, __m256i vb)
{
    HB_GET_(uint32_t, 8, r, sum);
    HB_GET_(int16_t, 16, a, va);
    HB_GET_(int16_t, 16, b, vb);
    HB_FOR_(16) r[i / 2] += (uint32_t)((int)a[i] * b[i]);
    HB_RETURN_(__m256i, r);
}
#define _mm256_dpwssd_epi32 hb_mm256_dpwssd_epi32

static inline __m512i hb_mm512_i32gather(__m512i index, const void *base, int scale)
{
    HB_GET_(int32_t, 16, a, index);
    HB_FOR_(16) memcpy(&a[i], (const char *)base + (int64_t)a[i] * scale, 4);
    HB_RETURN_(__m512i, a);
}
#define _mm512_i32gather_epi32 hb_mm512_i32gather
#undef _mm512_i32gather_ps
#define _mm512_i32gather_ps(index, base, scale)                                                    \
    _mm512_castsi512_ps(hb_mm512_i32gather(index, base, scale))

// One rounding; SIMDe multiplies and then adds. Kernels that promise bits use this width.
static inline __m256 hb_mm256_fmadd_ps(__m256 va, __m256 vb, __m256 vc)
{
    HB_GET_(float, 8, a, va);
    HB_GET_(float, 8, b, vb);
    HB_GET_(float, 8, c, vc);
    HB_FOR_(8) c[i] = fmaf(a[i], b[i], c[i]);
    HB_RETURN_(__m256, c);
}
#undef _mm256_fmadd_ps
#define _mm256_fmadd_ps hb_mm256_fmadd_ps

#ifndef _MM_FROUND_TO_NEG_INF
#define _MM_FROUND_TO_NEG_INF 1
#endif
#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC 8
#endif
// With a rounding of its own, here downwards or to nearest even.
static inline __m512 hb_mm512_fmadd_round_ps(__m512 va, __m512 vb, __m512 vc, int rounding)
{
    HB_GET_(float, 16, a, va);
    HB_GET_(float, 16, b, vb);
    HB_GET_(float, 16, c, vc);
    const int before = fegetround();
    if ((rounding & 3) == 1) fesetround(FE_DOWNWARD);
    HB_FOR_(16)
    {
        volatile float factor = a[i]; // computed here and now
        volatile float sum = fmaf(factor, b[i], c[i]);
        c[i] = sum;
    }
    fesetround(before);
    HB_RETURN_(__m512, c);
}
#undef _mm512_fmadd_round_ps
#define _mm512_fmadd_round_ps hb_mm512_fmadd_round_ps

static inline void hb_mm512_mask_compressstoreu_epi8(void *p, __mmask64 k, __m512i va)
{
    HB_GET_(uint8_t, 64, a, va);
    uint8_t *out = p;
    HB_FOR_(64) if (HB_BIT_(k)) *out++ = a[i];
}
#define _mm512_mask_compressstoreu_epi8 hb_mm512_mask_compressstoreu_epi8

#define _mm512_stream_ps(p, a)    _mm512_storeu_ps(p, a)
#define _mm512_stream_si512(p, a) _mm512_storeu_si512(p, a)
#define _mm512_cvtss_f32(a)       _mm_cvtss_f32(_mm512_castps512_ps128(a))
#define _mm512_cvtsi512_si32(a)   _mm_cvtsi128_si32(_mm512_castsi512_si128(a))
#define _mm512_undefined_epi32()  _mm512_setzero_si512()
#define _mm512_undefined_ps()     _mm512_setzero_ps()
#define _cvtu32_mask16(a)         ((__mmask16)(a))
#define _cvtmask16_u32(k)         ((uint32_t)(k))
#define _cvtu64_mask64(a)         ((__mmask64)(a))
#define _cvtmask64_u64(k)         ((uint64_t)(k))
#define _kand_mask64(a, b)        ((__mmask64)((a) & (b)))
#define _bzhi_u32(a, n)           ((uint32_t)((n) >= 32 ? (a) : (a) & ((1u << (n)) - 1u)))
#define _bzhi_u64(a, n)           ((uint64_t)((n) >= 64 ? (a) : (a) & ((UINT64_C(1) << (n)) - 1u)))

#endif
