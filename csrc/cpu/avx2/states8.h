// The vectors of cpu/states8.h with AVX2. Encoding: ladder8.h.
#ifndef HB_CPU_AVX2_STATES8_H
#define HB_CPU_AVX2_STATES8_H

#include "cpu/avx2/ladder8.h"

// Optimizer and dtype are constants for the compiler.
#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 256, GROUP = 2 /* blocks */, LANES = 8 };
typedef __m256 vector;
typedef __m256i integers;
typedef __m256 lanes_mask;
#define V(op) _mm256_##op

typedef const float *decoder;

INLINE decoder make_decoder(const float *map)
{
    return map;
}

INLINE void decode(const decoder *d, const uint8_t *codes, __m256 value[4])
{
    for (int g = 0; g < 4; g++) value[g] = look_up_eight(*d, codes + 8 * g);
}

// A state of the blocks of a group after the step.
typedef struct {
    _Alignas(64) float value[GROUP * BLOCK];
} new_state;

INLINE integers bits_of(vector v)
{
    return _mm256_castps_si256(v);
}

INLINE integers no_bits(void)
{
    return _mm256_setzero_si256();
}

INLINE vector load_lanes(const void *x, int64_t i, hb_dtype io)
{
    return load_f32x8(x, i, io);
}

INLINE void store_lanes(void *x, int64_t i, vector value, hb_dtype io)
{
    store_f32x8(x, i, value, false, io);
}

INLINE lanes_mask is_finite(vector v)
{
    return _mm256_cmp_ps(magnitude_f32x8(v), _mm256_set1_ps(HB_INFINITY), _CMP_LT_OQ);
}

INLINE vector where(lanes_mask mask, vector yes, vector no)
{
    return _mm256_blendv_ps(no, yes, mask);
}

INLINE vector only(lanes_mask mask, vector v)
{
    return _mm256_and_ps(mask, v);
}

INLINE vector sign_of(vector v)
{
    const vector signs = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    const lanes_mask nonzero = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_OQ);
    return where(nonzero, _mm256_or_ps(_mm256_and_ps(v, signs), one), v);
}

// Stores eight values of a state; the magnitudes so far.
INLINE __m256i keep_state(new_state *to, int at, __m256 value, __m256i max)
{
    _mm256_store_ps(to->value + at, value);
    return _mm256_max_epu32(max, bits_of(magnitude_f32x8(value)));
}

// Stores the codes of 32 values from number `at` of a state that keeps its sign: negative values do
// not become 0. Returns the lanes that only a search can decide.
INLINE unsigned store_signed_codes(const ladder *l, const __m256i t[4], const new_state *from,
                                   int at, uint8_t *codes)
{
    __m256 below[4];
    for (int g = 0; g < 4; g++)
        below[g] = _mm256_cmp_ps(_mm256_load_ps(from->value + at + 8 * g), _mm256_setzero_ps(),
                                 _CMP_LT_OQ);
    const __m256i negative = pack_signs(below);
    const __m256i one = _mm256_set1_epi8(1);
    const __m256i steps = pack_steps(l, t);
    const __m256i down = _mm256_subs_epu8(l->zero, _mm256_max_epu8(steps, one));
    const __m256i code = _mm256_blendv_epi8(_mm256_add_epi8(l->zero, steps), down, negative);
    _mm256_storeu_si256((void *)codes, in_order(code));
    return near_a_threshold(t);
}

INLINE unsigned store_codes(const ladder *l, const __m256i t[4], uint8_t *codes)
{
    _mm256_storeu_si256((void *)codes, in_order(pack_steps(l, t)));
    return near_a_threshold(t);
}

#endif
