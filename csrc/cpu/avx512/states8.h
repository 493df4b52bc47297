// What the steps on whole 8-bit blocks with AVX-512 share: adam8.h (two and three states) and
// single8.h (one). Formulas: core/kernels_optim.h.
//
// The file that includes this one says how 64 codes become floats:
//
//     decoder                                        the map, prepared
//     decoder make_decoder(const float *map)
//     void decode(const decoder *d, const uint8_t *codes, __m512 value[4])
//     third_bytes                                    see ladder8.h
//
// Some blocks of 256 are taken at a time, and stay in the L1 cache. First their states are decoded
// and averaged with the gradient, which gives their maxima; then they are encoded. Each byte is
// moved once, and the streams of p, g and the codes advance together, as the prefetchers of the
// processor like it. Accuracy: the bits of the separate kernels (codec8.c, optim_loops.h).
#ifndef HB_CPU_AVX512_STATES8_H
#define HB_CPU_AVX512_STATES8_H

#include "cpu/avx512/ladder8.h"

// Optimizer and dtype are constants for the compiler.
#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 256, GROUP = 2 /* blocks */ };

// A state of the blocks of a group after the step, and where it is negative.
typedef struct {
    _Alignas(64) float value[GROUP * BLOCK];
    _Alignas(8) uint16_t negative[GROUP * BLOCK / 16]; // a bit an element
} new_state;

// The scalars in all lanes.
typedef struct {
    __m512 gnorm, decay, keep, beta1, rest1, beta2, rest2, beta3, rest3;
    __m512 size; // of the update
    __m512 alpha, inv_corr1, inv_corr2, eps;
} step_f32x16;

static inline step_f32x16 broadcast_scalars(hb_optimizer optimizer, const hb_optim_scalars *s)
{
    const bool unlimited = optimizer == HB_ADAGRAD || optimizer == HB_ADEMAMIX;
    const float size = optimizer == HB_ADAM ? s->step_size : s->lr;
    const bool fresh = optimizer == HB_MOMENTUM && s->first;
    return (step_f32x16){.gnorm = _mm512_set1_ps(s->gnorm_scale),
                         .decay = _mm512_set1_ps(s->coupled_decay),
                         .keep = _mm512_set1_ps(s->keep),
                         .beta1 = _mm512_set1_ps(fresh ? 0.0f : s->beta1),
                         .rest1 = _mm512_set1_ps(s->beta1_rest),
                         .beta2 = _mm512_set1_ps(s->beta2),
                         .rest2 = _mm512_set1_ps(s->beta2_rest),
                         .beta3 = _mm512_set1_ps(s->beta3),
                         .rest3 = _mm512_set1_ps(s->beta3_rest),
                         .size = _mm512_set1_ps(unlimited ? size : size * s->scale),
                         .alpha = _mm512_set1_ps(s->alpha),
                         .inv_corr1 = _mm512_set1_ps(s->inv_corr1),
                         .inv_corr2 = _mm512_set1_ps(s->inv_corr2),
                         .eps = _mm512_set1_ps(s->eps)};
}

// Fetches elements [first, first + 64) of x. The prefetchers of the processor stop at the end of a
// page, which four streams reach every thousand elements.
static inline void prefetch_elements(const void *x, int64_t first, int64_t bytes)
{
    const uintptr_t at = (uintptr_t)x + (uintptr_t)(first * bytes);
    for (int64_t b = 0; b < 64 * bytes; b += 64)
        _mm_prefetch((const void *)(at + (uintptr_t)b), _MM_HINT_T0);
}

// Stores sixteen values of a state, and their signs; the magnitudes so far.
static inline __m512i keep_state(new_state *to, int at, __m512 value, __m512i max)
{
    _mm512_store_ps(to->value + at, value);
    to->negative[at / 16] = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_max_epi32(max, _mm512_castps_si512(magnitude_f32x16(value)));
}

// What arithmetic cannot decide, one element at a time. keep_sign: a code has the sign of its
// value.
static inline uint8_t search_code(const hb_search8 *search, float value, float inverse,
                                  bool keep_sign)
{
    const int code = hb_search8_code(search, value * inverse), zero = search->ladder.zero;
    if (!keep_sign) return (uint8_t)code;
    return (uint8_t)(code + (value > 0.0f && code < zero) - (value < 0.0f && code >= zero));
}

static __attribute__((noinline)) void search_block(const float *values, float absmax,
                                                   const hb_search8 *search, bool keep_sign,
                                                   uint8_t *codes)
{
    const float inverse = hb_inverse_scale(absmax);
    for (int i = 0; i < BLOCK; i++) codes[i] = search_code(search, values[i], inverse, keep_sign);
}

// Seldom, one of 100 groups of 64: the lanes `near`.
static __attribute__((noinline)) void search_lanes(const float *values, float inverse,
                                                   const hb_search8 *search, bool keep_sign,
                                                   unsigned near, uint8_t *codes)
{
    for (; near != 0; near &= near - 1)
        for (int i = __builtin_ctz(near); i < 64; i += 16)
            codes[i] = search_code(search, values[i], inverse, keep_sign);
}

// Whether `absmax`, of one of the states, is NaN, infinite or so small that its inverse is: all of
// the block is left to search_block then.
static inline bool is_extreme(float absmax, float inverse)
{
    return !(absmax < HB_INFINITY && inverse < HB_INFINITY);
}

// t of sixteen values of a state.
static inline __m512i climb_state(const ladder *l, __m512 value, __m512 inverse)
{
    return climb(l, magnitude(l, _mm512_mul_ps(value, inverse)));
}

// Stores the codes of 64 values from number `at` of a state that keeps its sign: negative values do
// not become 0. Returns the lanes that only a search can decide.
static inline __mmask16 store_signed_codes(const ladder *l, const __m512i t[4],
                                           const new_state *from, int at, uint8_t *codes)
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

// A ladder whose sign the compiler knows.
static inline ladder load_ladder_of(const hb_search8 *search, bool is_signed)
{
    ladder l = load_ladder(search);
    l.is_signed = is_signed;
    return l;
}

#endif
