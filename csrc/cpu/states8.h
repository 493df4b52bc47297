// What the steps on whole 8-bit blocks share, on x86: adam8.h (two and three states), single8.h
// (one) and norm8.h. Formulas: core/kernels_optim.h.
//
// Some blocks of 256 are taken at a time, and stay in the L1 cache. First their states are decoded
// and averaged with the gradient, which gives their maxima; then they are encoded. Each byte is
// moved once, and the streams of p, g and the codes advance together, as the prefetchers of the
// processor like it. Accuracy: the bits of the separate kernels (codec8.c, optim_loops.h).
//
// The file that includes this one defines, for vectors of LANES float32,
//
//     vector, integers, lanes_mask; V(op)                       the intrinsic of these vectors
//     bits_of(v), no_bits()                                     as integers; zeros
//     load_lanes(x, i, io), store_lanes(x, i, v, io)            from and to any io dtype
//     is_finite(v), where(mask, yes, no), only(mask, v)         only: zero elsewhere
//     sign_of(v)                                                1 or -1; zeros and NaN stay
//     decoder, make_decoder(map), decode(decoder, codes, v)     the map, prepared; STEP codes
//     new_state                                                 .value[GROUP * BLOCK], aligned
//     keep_state(to, at, v, max)                                stores v, and max with |v|
//     ladder, load_ladder(search, is_signed)                    the map, prepared to encode
//     climb(ladder, a), magnitude(ladder, v)                    t and a of kernels_codec.h
//     store_signed_codes(ladder, t, from, at, codes)            STEP codes of a state that keeps
//     store_codes(ladder, t, codes)                             its sign; of one without a sign
//
// The last two return the lanes that only a search can decide, near a threshold in one of the four.
#ifndef HB_CPU_STATES8_H
#define HB_CPU_STATES8_H

enum { STEP = 4 * LANES };

// The scalars in all lanes.
typedef struct {
    vector gnorm, decay, keep, beta1, rest1, beta2, rest2, beta3, rest3;
    vector size; // of the update
    vector alpha, inv_corr1, inv_corr2, eps;
} step_lanes;

static inline step_lanes broadcast_scalars(hb_optimizer optimizer, const hb_optim_scalars *s)
{
    const bool unlimited = optimizer == HB_ADAGRAD || optimizer == HB_ADEMAMIX;
    const float size = optimizer == HB_ADAM ? s->step_size : s->lr;
    const bool fresh = optimizer == HB_MOMENTUM && s->first;
    return (step_lanes){.gnorm = V(set1_ps)(s->gnorm_scale),
                        .decay = V(set1_ps)(s->coupled_decay),
                        .keep = V(set1_ps)(s->keep),
                        .beta1 = V(set1_ps)(fresh ? 0.0f : s->beta1),
                        .rest1 = V(set1_ps)(s->beta1_rest),
                        .beta2 = V(set1_ps)(s->beta2),
                        .rest2 = V(set1_ps)(s->beta2_rest),
                        .beta3 = V(set1_ps)(s->beta3),
                        .rest3 = V(set1_ps)(s->beta3_rest),
                        .size = V(set1_ps)(unlimited ? size : size * s->scale),
                        .alpha = V(set1_ps)(s->alpha),
                        .inv_corr1 = V(set1_ps)(s->inv_corr1),
                        .inv_corr2 = V(set1_ps)(s->inv_corr2),
                        .eps = V(set1_ps)(s->eps)};
}

// Fetches elements [first, first + 64) of x, for every 64th `first`. The prefetchers of the
// processor stop at the end of a page, which four streams reach every thousand elements.
static inline void prefetch_elements(const void *x, int64_t first, int64_t bytes)
{
    const uintptr_t at = (uintptr_t)x + (uintptr_t)(first * bytes);
    if (STEP < 64 && first % 64 != 0) return;
    for (int64_t b = 0; b < 64 * bytes; b += 64)
        _mm_prefetch((const void *)(at + (uintptr_t)b), _MM_HINT_T0);
}

// What arithmetic cannot decide, one element at a time. keep_sign: a code has the sign of its
// value.
static inline uint8_t search_code(const hb_search8 *search, float value, float inverse,
                                  bool keep_sign)
{
    const int code = hb_search8_code(search, value * inverse), zero = search->decades.zero;
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

// Seldom, one of 100 groups: the lanes `near`.
static __attribute__((noinline)) void search_lanes(const float *values, float inverse,
                                                   const hb_search8 *search, bool keep_sign,
                                                   unsigned near, uint8_t *codes)
{
    for (; near != 0; near &= near - 1)
        for (int i = __builtin_ctz(near); i < STEP; i += LANES)
            codes[i] = search_code(search, values[i], inverse, keep_sign);
}

// Whether `absmax`, of one of the states, is NaN, infinite or so small that its inverse is: all of
// the block is left to search_block then.
static inline bool is_extreme(float absmax, float inverse)
{
    return !(absmax < HB_INFINITY && inverse < HB_INFINITY);
}

// t of LANES values of a state.
static inline integers climb_state(const ladder *l, vector value, vector inverse)
{
    return climb(l, magnitude(l, V(mul_ps)(value, inverse)));
}

#endif
