// The vectors of cpu/states8.h with AVX-512. The file that includes this one says how 64 codes
// become floats (decoder) and has third_bytes, see ladder8.h.
#ifndef HB_CPU_AVX512_STATES8_H
#define HB_CPU_AVX512_STATES8_H

#include "cpu/avx512/ladder8.h"

// Optimizer and dtype are constants for the compiler.
#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 256, GROUP = 2 /* blocks */, LANES = 16 };
typedef __m512 vector;
typedef __m512i integers;
typedef __mmask16 lanes_mask;
#define V(op) _mm512_##op

// A state of the blocks of a group after the step, and where it is negative.
typedef struct {
    _Alignas(64) float value[GROUP * BLOCK];
    _Alignas(8) uint16_t negative[GROUP * BLOCK / 16]; // a bit an element
} new_state;

INLINE integers bits_of(vector v)
{
    return _mm512_castps_si512(v);
}

INLINE integers no_bits(void)
{
    return _mm512_setzero_si512();
}

INLINE vector load_lanes(const void *x, int64_t i, hb_dtype io)
{
    return load_f32x16(x, i, io);
}

INLINE void store_lanes(void *x, int64_t i, vector value, hb_dtype io)
{
    store_f32x16(x, i, value, false, io);
}

INLINE lanes_mask is_finite(vector v)
{
    return _mm512_cmp_ps_mask(magnitude_f32x16(v), _mm512_set1_ps(HB_INFINITY), _CMP_LT_OQ);
}

INLINE vector where(lanes_mask mask, vector yes, vector no)
{
    return _mm512_mask_blend_ps(mask, no, yes);
}

INLINE vector only(lanes_mask mask, vector v)
{
    return _mm512_maskz_mov_ps(mask, v);
}

INLINE vector sign_of(vector v)
{
    const vector signs = _mm512_set1_ps(-0.0f), one = _mm512_set1_ps(1.0f);
    const lanes_mask nonzero = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_OQ);
    return _mm512_mask_or_ps(v, nonzero, _mm512_and_ps(v, signs), one);
}

// Stores sixteen values of a state, and their signs; the magnitudes so far.
INLINE __m512i keep_state(new_state *to, int at, __m512 value, __m512i max)
{
    _mm512_store_ps(to->value + at, value);
    to->negative[at / 16] = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_max_epi32(max, _mm512_castps_si512(magnitude_f32x16(value)));
}

// Stores the codes of 64 values from number `at` of a state that keeps its sign: negative values do
// not become 0. Returns the lanes that only a search can decide.
INLINE unsigned store_signed_codes(const ladder *l, const __m512i t[4], const new_state *from,
                                   int at, uint8_t *codes)
{
    __mmask64 negative;
    memcpy(&negative, from->negative + at / 16, sizeof negative);
    __m512i steps = third_bytes(t);
    __m512i code = _mm512_add_epi8(l->zero, steps);
    steps = _mm512_max_epu8(steps, _mm512_set1_epi8(1));
    code = _mm512_mask_subs_epu8(code, negative, l->zero, steps);
    _mm512_storeu_si512(codes, code);
    return near_a_threshold(t);
}

INLINE unsigned store_codes(const ladder *l, const __m512i t[4], uint8_t *codes)
{
    _mm512_storeu_si512(codes, _mm512_add_epi8(l->zero, third_bytes(t)));
    return near_a_threshold(t);
}

#endif
