// Eight elements of any io dtype from and to float32 lanes. Parts of eight go through a buffer of
// the caller. `io` is a constant at every call, so that the compiler keeps one branch.
#ifndef HB_CPU_AVX2_IO_H
#define HB_CPU_AVX2_IO_H

#include "core/kernels.h"
#include "cpu/simd.h"

static inline __m256 load_f32x8(const void *x, int64_t i, hb_dtype io)
{
    if (io == HB_F32) return _mm256_loadu_ps((const float *)x + i);
    __m128i half = _mm_loadu_si128((const void *)((const uint16_t *)x + i));
    if (io == HB_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// The first `count` <= 8 lanes; no others are read, and they hold 0.
static inline __m256 load_part_f32x8(const void *x, int64_t i, int64_t count, hb_dtype io)
{
    uint8_t part[32] = {0};
    const size_t bytes = hb_dtype_bytes(io);
    memcpy(part, (const uint8_t *)x + (size_t)i * bytes, (size_t)count * bytes);
    return load_f32x8(part, 0, io);
}

// Whole vectors, or the rest before `end`.
static inline __m256 load_upto_f32x8(const void *x, int64_t i, int64_t end, hb_dtype io)
{
    return i + 8 <= end ? load_f32x8(x, i, io) : load_part_f32x8(x, i, end - i, io);
}

// float32 -> bfloat16 in the low halves of the lanes, half to even, NaN made quiet.
static inline __m256i bf16_bits_f32x8(__m256 value)
{
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    rounded = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), is_nan));
    return _mm256_srli_epi32(rounded, 16);
}

static inline __m128i narrow_f32x8(__m256 value, hb_dtype io)
{
    if (io == HB_F16) return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256i bits = bf16_bits_f32x8(value);
    return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}

// `stream` needs out + i aligned to the whole vector.
static inline void store_f32x8(void *out, int64_t i, __m256 value, bool stream, hb_dtype io)
{
    if (io == HB_F32) {
        if (stream)
            _mm256_stream_ps((float *)out + i, value);
        else
            _mm256_storeu_ps((float *)out + i, value);
    } else {
        __m128i half = narrow_f32x8(value, io);
        if (stream)
            _mm_stream_si128((void *)((uint16_t *)out + i), half);
        else
            _mm_storeu_si128((void *)((uint16_t *)out + i), half);
    }
}

static inline void store_upto_f32x8(void *out, int64_t i, int64_t end, __m256 value, bool stream,
                                    hb_dtype io)
{
    if (i + 8 <= end) {
        store_f32x8(out, i, value, stream, io);
        return;
    }
    uint8_t part[32];
    const size_t bytes = hb_dtype_bytes(io);
    store_f32x8(part, 0, value, false, io);
    memcpy((uint8_t *)out + (size_t)i * bytes, part, (size_t)(end - i) * bytes);
}

static inline __m256 magnitude_f32x8(__m256 value)
{
    return _mm256_and_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
}

static inline __m128 look_up_four(const float *map, const uint8_t *codes)
{
    __m128 v = _mm_load_ss(map + codes[0]);
    v = _mm_insert_ps(v, _mm_load_ss(map + codes[1]), 0x10);
    v = _mm_insert_ps(v, _mm_load_ss(map + codes[2]), 0x20);
    return _mm_insert_ps(v, _mm_load_ss(map + codes[3]), 0x30);
}

// The entries of eight codes, one after the other: a gather takes twice as long on Zen 4, and far
// longer where its leaks have been mended.
static inline __m256 look_up_eight(const float *map, const uint8_t *codes)
{
    return _mm256_set_m128(look_up_four(map, codes + 4), look_up_four(map, codes));
}

// The largest of eight magnitudes, or NaN (of any sign): their bit patterns order like the numbers.
static inline float largest_of_magnitudes(__m256i bits)
{
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
    const uint32_t largest = (uint32_t)_mm_cvtsi128_si32(m);
    return hb_f32_from_bits(largest > 0x7f800000 ? HB_NAN_BITS : largest);
}

#endif
