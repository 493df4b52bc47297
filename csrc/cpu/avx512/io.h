// Sixteen elements of any io dtype from and to float32 lanes, whole or the first `count` of them.
// `io` is a constant at every call, so that the compiler keeps one branch.
#ifndef HB_CPU_AVX512_IO_H
#define HB_CPU_AVX512_IO_H

#include "core/kernels.h"
#include "cpu/simd.h"

static inline __mmask16 first_lanes(int64_t count)
{
    return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
}

static inline __m512 widen_f32x16(__m256i half, hb_dtype io)
{
    if (io == HB_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline __m512 load_f32x16(const void *x, int64_t i, hb_dtype io)
{
    if (io == HB_F32) return _mm512_loadu_ps((const float *)x + i);
    return widen_f32x16(_mm256_loadu_si256((const void *)((const uint16_t *)x + i)), io);
}

// Lanes outside `lanes` are not read and hold 0.
static inline __m512 load_lanes_f32x16(const void *x, int64_t i, __mmask16 lanes, hb_dtype io)
{
    if (io == HB_F32) return _mm512_maskz_loadu_ps(lanes, (const float *)x + i);
    return widen_f32x16(_mm256_maskz_loadu_epi16(lanes, (const uint16_t *)x + i), io);
}

// float32 -> bfloat16, half to even, NaN made quiet. vcvtneps2bf16 would flush subnormals.
static inline __m256i bf16_from_f32x16(__m512 value)
{
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x00400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

static inline __m256i narrow_f32x16(__m512 value, hb_dtype io)
{
    if (io == HB_F16) return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return bf16_from_f32x16(value);
}

// `stream` needs out + i aligned to the whole vector.
static inline void store_f32x16(void *out, int64_t i, __m512 value, bool stream, hb_dtype io)
{
    if (io == HB_F32) {
        if (stream)
            _mm512_stream_ps((float *)out + i, value);
        else
            _mm512_storeu_ps((float *)out + i, value);
    } else {
        __m256i half = narrow_f32x16(value, io);
        if (stream)
            _mm256_stream_si256((void *)((uint16_t *)out + i), half);
        else
            _mm256_storeu_si256((void *)((uint16_t *)out + i), half);
    }
}

static inline void store_lanes_f32x16(void *out, int64_t i, __m512 value, __mmask16 lanes,
                                      hb_dtype io)
{
    if (io == HB_F32)
        _mm512_mask_storeu_ps((float *)out + i, lanes, value);
    else
        _mm256_mask_storeu_epi16((uint16_t *)out + i, lanes, narrow_f32x16(value, io));
}

static inline __m512 magnitude_f32x16(__m512 value)
{
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff)));
}

// The largest of sixteen magnitudes, or NaN (of any sign): their bit patterns order like the
// numbers.
static inline float largest_of_magnitudes(__m512i bits)
{
    const uint32_t largest = _mm512_reduce_max_epu32(bits);
    return hb_f32_from_bits(largest > 0x7f800000 ? HB_NAN_BITS : largest);
}

#endif
